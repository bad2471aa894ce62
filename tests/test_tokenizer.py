"""tokenizer/: round trips, tiktoken's ids, compiled code, streams. Run: pytest
tests/test_tokenizer.py"""

import io
import itertools
import tracemalloc

import numpy as np
import pytest
from conftest import ROOT, load_or_skip
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizer_cases import (
    CODE,
    EOT,
    HARD,
    MIXED,
    make_trained,
    many,
    same_everywhere,
    texts,
)

import tokenizer
from tokenizer import BPETokenizer, WordTokenizer, base, bytepair, fast, patterns


@pytest.fixture(scope='module', params=['gpt2', 'cl100k_base', 'o200k_base'])
def published(request):
    """(OpenAI's vocabulary in our BPE, tiktoken's encoding)"""
    load_or_skip(request.param)
    return BPETokenizer.from_tiktoken(request.param), bytepair.open_tiktoken(request.param)


@pytest.fixture(scope='module')
def trained():
    return make_trained()


# Round trips --------------------------------------------------------------------------------------

@given(st.text())
def test_byte_round_trip(text):
    tok = tokenizer.ByteTokenizer()
    assert tok.encode(text) == list(text.encode())
    same_everywhere(tok, text)


@given(st.text(min_size=1))
def test_char_round_trip(text):
    tok = tokenizer.CharTokenizer.from_text([text])
    stoi = {char: i for i, char in enumerate(sorted(set(text)))}  # the obvious way
    assert tok.encode(text) == [stoi[char] for char in text]
    same_everywhere(tok, text)


@settings(many, max_examples=600)
@given(text=texts)
@example(text='a\ud800b\ud83d\ude00')
def test_round_trip_of_every_sort(gpt2, trained, text):
    """Above 5,000 round trips: 600 texts, nine tokenizers."""
    for tok in (gpt2, *trained.values()):
        same_everywhere(tok, text)


def test_hard_texts_of_every_sort(gpt2, trained):
    for tok in (tokenizer.ByteTokenizer(), gpt2, *trained.values()):
        for text in HARD:
            same_everywhere(tok, text)


def test_shakespeare_characters():
    path = ROOT.parent / 'shared' / 'data' / 'tinyshakespeare' / 'input.txt'
    if not path.exists():
        pytest.skip('tiny Shakespeare is not at hand')
    text = path.read_text(encoding='utf-8')
    stoi = {char: i for i, char in enumerate(sorted(set(text)))}
    tok = tokenizer.CharTokenizer.from_text(text[i:i + 1000] for i in range(0, len(text), 1000))
    assert tok.vocab_size == 65
    assert tok.encode_array(text).tolist() == [stoi[char] for char in text]


def test_gpt2_ids(gpt2):
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)
    assert gpt2.encode('Hello world') == [15496, 995]  # published ids
    assert gpt2.encode_array(MIXED).dtype == np.uint16
    assert gpt2.decode([15496, 995, 50256]) == 'Hello world<|endoftext|>'


def test_special_token_in_text_of_a_corpus_is_text(gpt2):
    assert 50256 not in gpt2.encode_array('a<|endoftext|>b')
    assert 50256 not in gpt2.encode_batch(['a<|endoftext|>b'])[0]


def test_cl100k_needs_uint32_and_has_gaps():
    tok = load_or_skip('cl100k_base')
    assert (tok.vocab_size, tok.eot) == (100277, 100257)
    same_everywhere(tok, MIXED)
    assert tok.encode_array(MIXED).dtype == np.uint32
    with pytest.raises(ValueError, match='100270'):
        tok.decode([100270])  # below vocab_size, yet unused


def test_id_dtype_limit():
    assert tokenizer.id_dtype(65536) == np.uint16  # the largest id is 65,535
    assert tokenizer.id_dtype(65537) == np.uint32


def test_char_vocabulary_past_uint16():
    chars = [chr(code) for code in range(0x10000, 0x10000 + 65537)]
    tok = tokenizer.CharTokenizer(chars)
    assert tok.encode_array(chars[-1] + chars[0]).tolist() == [65536, 0]


def test_decode_of_half_a_character():
    tok = tokenizer.ByteTokenizer()
    assert tok.decode_bytes([0xC3]) == b'\xc3'
    assert tok.decode([0xC3, 0x28]) == '\ufffd('


def test_lone_surrogate_becomes_replacement(gpt2):
    for tok in (tokenizer.ByteTokenizer(), gpt2):
        assert tok.decode(tok.encode('a\ud800b')) == 'a\ufffdb'
        assert tok.encode_array('a\ud800b').tolist() == tok.encode('a\ud800b')


def test_empty_text(gpt2):
    for tok in (tokenizer.ByteTokenizer(), tokenizer.CharTokenizer('a'), gpt2):
        same_everywhere(tok, '')


# As OpenAI's own ----------------------------------------------------------------------------------

@pytest.mark.parametrize('text', HARD, ids=range(len(HARD)))
def test_published_ids(published, text):
    ours, encoding = published
    assert ours.encode(text, 'none') == encoding.encode_ordinary(text)
    assert ours.encode(text, 'all') == encoding.encode(text, allowed_special='all')


@settings(many, max_examples=600)
@given(text=texts)
def test_published_ids_of_any_text(published, text):
    ours, encoding = published
    assert ours.encode(text, 'none') == encoding.encode_ordinary(text)
    assert ours.encode(text, 'all') == encoding.encode(text, allowed_special='all')


def test_published_vocabularies_are_what_tiktoken_says(published):
    ours, encoding = published
    assert (ours.vocab_size, ours.eot) == (encoding.n_vocab, encoding.eot_token)
    assert ours.special_tokens == encoding._special_tokens
    tokens = encoding.token_byte_values()
    ids = [encoding.encode_single_token(token) for token in tokens]
    assert [ours.decode_bytes([i]) for i in ids] == tokens
    unused_ids = set(range(ours.vocab_size)).difference(ids, ours.special_tokens.values())
    for unused in sorted(unused_ids)[:3]:
        with pytest.raises(ValueError, match=f'id {unused}: the vocabulary does not use'):
            ours.decode([unused])


def test_more_blanks_than_tiktoken_can_take(monkeypatch, gpt2):
    """Its regular expressions run out of stack, and it panics; one piece at a time it can encode
    them."""
    n = 1_500_000
    monkeypatch.setattr(fast, 'has_gigatoken', lambda: False)
    alone = tokenizer.load('gpt2')
    one_piece = gpt2._encoding._core_bpe.encode_single_piece(b' ' * n)
    assert alone.encode_array(' ' * n).tolist() == one_piece
    assert alone.encode_array('a' + ' ' * (n + 1) + 'b').tolist() == [64, *one_piece, 275]


# The fast ways ------------------------------------------------------------------------------------

TEXTS = [*HARD, CODE[20_000:50_000]]


def same_arrays(arrays, tok, expected):
    """expected: {text: ids}"""
    for array, ids in zip(arrays, expected.values(), strict=True):
        assert array.dtype == tokenizer.id_dtype(tok.vocab_size)
        assert array.tolist() == ids


@pytest.mark.parametrize('accelerator', ['tiktoken', 'gigatoken', 'gigatoken in batches'])
def test_fast_ways_give_the_same_ids(monkeypatch, trained, accelerator):
    if accelerator == 'tiktoken':
        monkeypatch.setattr(fast, 'has_gigatoken', lambda: False)
    else:
        pytest.importorskip('gigatoken')
    older = [text for text in TEXTS if not patterns.has_newer(text)]
    for slow in trained.values():
        expected = {text: slow.encode(text, 'none') for text in [*TEXTS, 'x']}
        tok = tokenizer.from_dict(slow.to_dict())  # one that has not chosen its way yet
        for batch in (TEXTS, older, ['x'], ['']):
            if accelerator == 'gigatoken in batches':
                tok._fast.chars = 50_000_000  # so much text has gone before
            same_arrays(tok.encode_batch(batch, workers=2), slow,
                        {text: expected[text] for text in batch})
        assert tok.encode_batch([], workers=2) == []
        same_arrays(map(tok.encode_array, expected), slow, expected)
        if tok.is_fast and tok.pattern:  # so it went the way that this is about
            assert ('gigatoken' in vars(tok._fast)) == (accelerator != 'tiktoken')


def test_tiktokens_vocabularies_go_the_same_ways(monkeypatch, published):
    slow, encoding = published
    expected = {text: encoding.encode_ordinary(text) for text in TEXTS}
    for has_gigatoken in (fast.has_gigatoken(), False):
        monkeypatch.setattr(fast, 'has_gigatoken',
                            lambda has_gigatoken=has_gigatoken: has_gigatoken)
        same_arrays(tokenizer.load(encoding.name).encode_batch(TEXTS), slow, expected)
        same_arrays(map(tokenizer.load(encoding.name).encode_array, TEXTS), slow, expected)
        same_arrays(map(tokenizer.from_dict(slow.to_dict()).encode_array, TEXTS), slow, expected)


def test_merges_that_tiktoken_would_do_otherwise():
    """By these merges bc is joined before ab, so abc is never made; tiktoken would take it as a
    whole piece."""
    tok = BPETokenizer([(b'b', b'c'), (b'a', b'b'), (b'ab', b'c')], 'gpt2')
    text, ids = 'abc abcab', [97, 256, 32, 97, 256, 257]
    assert tok.encode(text) == tok.encode_array(text).tolist() == ids
    assert tok.encode_batch([text])[0].tolist() == ids


def test_batches_in_processes(trained):
    # above 2 MB, from where on there are processes
    texts = ['the cat sat on the mat ' * 4000, '', 'short', *HARD] * 20
    for tok in (trained['own pattern'], WordTokenizer.train(HARD, 100)):
        one = {text: tok.encode_array(text).tolist() for text in set(texts)}
        arrays = tok.encode_batch(texts, workers=2)
        assert [array.tolist() for array in arrays] == [one[text] for text in texts]
        assert {array.dtype for array in arrays} == {np.dtype('uint16')}


def test_pieces_met_before_are_forgotten_in_time(trained):
    tok = BPETokenizer(trained['gpt4'].merges, 'gpt4')
    tok._known = dict.fromkeys(range(1 << 18), [])
    assert tok.encode(CODE[:9000], 'none') == trained['gpt4'].encode(CODE[:9000], 'none')
    assert len(tok._known) < 9000


# Text that comes in parts -------------------------------------------------------------------------

def parts_of(text, rng):
    """text in random parts, some of them empty."""
    ends = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 9)))
    return [text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)])]


@pytest.fixture
def cut_wherever_possible(monkeypatch):
    monkeypatch.setattr(base, 'STREAM_CHARS', 1)


@settings(many, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts, rng=st.randoms(use_true_random=False))
def test_streams_give_the_same_ids(cut_wherever_possible, gpt2, trained, text, rng):
    words = WordTokenizer(['the', ' the', '\n', ' '])
    for tok in (gpt2, tokenizer.ByteTokenizer(), words, *trained.values()):
        expected = tok.encode(text, 'all')
        for parts in (parts_of(text, rng), text):  # a string is an iterable of its characters
            assert list(tok.encode_iterable(parts, 'all')) == expected


@pytest.mark.parametrize('text', ['a\ud83d\ude00b', 'x\n\ud83d\ude00', ' \ud83d\ude00 \ud83d'])
def test_streams_keep_the_halves_of_a_character_together(cut_wherever_possible, gpt2, trained,
                                                         text):
    for tok in (gpt2, tokenizer.ByteTokenizer(), *trained.values()):
        assert list(tok.encode_iterable(text)) == tok.encode(text)


@pytest.mark.parametrize('chars', [1, 1000, base.STREAM_CHARS])
def test_streams_of_lines_blocks_and_files(monkeypatch, tmp_path, gpt2, trained, chars):
    monkeypatch.setattr(base, 'STREAM_CHARS', chars)
    text = (CODE[:15_000].replace('\n\n', EOT + '\r\n') + 'ſ日本 ' * 99) * (6 if chars > 9999
                                                                          else 1)
    path = tmp_path / 'text'
    path.write_bytes(text.encode())
    for tok in (gpt2, tokenizer.CharTokenizer.from_text(text),
                *itertools.islice(trained.values(), 5)):
        expected = tok.encode(text, 'all')
        with open(path, encoding='utf-8', newline='') as file:
            assert list(tok.encode_iterable(file, 'all')) == expected
        assert list(tok.encode_iterable(text.splitlines(keepends=True), 'all')) == expected
        assert list(tok.encode_iterable([text], 'all')) == expected
        assert list(tok.encode_iterable([])) == list(tok.encode_iterable(['', ''])) == []


def test_streams_refuse_what_encode_refuses(cut_wherever_possible, trained):
    for tok in (trained['gpt4'], trained[None], trained['own pattern']):
        for parts in (['well <|user', ' says|>'], ['well <|user says|>'], 'a <|user says|> b',
                      ['<|user ', 'says|>']):
            with pytest.raises(ValueError, match=r"special token '<\|user says\|>'"):
                list(tok.encode_iterable(parts))
            with pytest.raises(ValueError, match=r"special token '<\|user says\|>'"):
                list(tok.encode_iterable(parts, {EOT}))
        assert list(tok.encode_iterable(['well <|user', ' said'])) == tok.encode('well <|user said')
    with pytest.raises(ValueError, match="expected text, got bytes.*encoding='utf-8'"):
        list(trained['gpt4'].encode_iterable(io.BytesIO(b'text')))


def test_streams_go_the_fast_way_and_forget(monkeypatch, gpt2, trained):
    """No part of a stream is encoded in Python, and what is kept of its pieces is dropped in time."""
    monkeypatch.setattr(base, 'STREAM_CHARS', 1000)
    monkeypatch.setattr(base, 'FORGET_CHARS', 10_000)
    words = [f'word{number} {number:x}th <|endoftext|>\n' for number in range(3000)]
    n_chars, text = sum(map(len, words)), ''.join(words)
    for tok in (gpt2, trained['gpt4'], trained['whole pieces']):
        expected, forgotten = tok.encode(text, 'all'), []
        slow = 'encode_plainly' if hasattr(tok, 'encode_plainly') else 'encode_ordinary'
        with monkeypatch.context() as patch:
            patch.setattr(tok, 'forget', lambda tok=tok, forgotten=forgotten: (
                forgotten.append(1), type(tok).forget(tok)))
            if tok.kind == 'tiktoken' or tok.is_fast:
                patch.setattr(tok, slow, lambda text: pytest.fail('encoded in Python'))
            assert list(tok.encode_iterable(words, 'all')) == expected
        assert n_chars / 12_000 - 1 < len(forgotten) <= n_chars / 10_000
        if tok.kind == 'bpe' and not tok.is_fast:
            assert 0 < len(tok._known) < len(set(words))
            tok.forget()
            assert not tok._known


def test_streams_take_little_memory(gpt2, trained):
    block = 'International representatives characterize international characteristics.\n' * 400
    n = 20_000_000 // len(block)
    for tok, times in ((gpt2, n), (trained['gpt4'], n // 20), (trained[None], n // 20)):
        expected = len(tok.encode_array(block)) * times
        tracemalloc.start()
        count = sum(1 for _ in tok.encode_iterable(block for _ in range(times)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == expected
        assert peak < 10_000_000, f'{peak:,} bytes'
