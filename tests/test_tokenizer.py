"""tokenizer.py against plain Python, tiktoken itself, and files made to do harm. Run: pytest tests/test_tokenizer.py"""

import hashlib
import io
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, load_or_skip
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import tokenizer
from tokenizer import BPETokenizer, WordTokenizer, base, bytepair, patterns
from tokenizer import fast as bpe

MIXED = 'Hello, wörld!\n\t日本語 🙂 e\u0301 <|endoftext|> \x00 end'
CODE = Path(tokenizer.__file__).read_text(encoding='utf-8')
PROSE = 'Ein Zaun, l’été, can’t: 12 345 Äpfel; the cat, the hat, the rat; to be or not to be. Ein Zaun! '
EOT, USER = '<|endoftext|>', '<|user says|>'  # the second has a space in it, at which text could be cut
HARD = [
    '', ' ', '\n', 'Hello world', "I'll, I'LL, it'ſ, we'Ve, THEY'RE, '\u212a'K, l'été, 's 'Ll '", 'a' * 3000,
    ' ' * 2000 + 'x', 'a\r\nb\rc\n\n\n  \n d \t\t e  \r\n\r\n', '1234567890 12 3٣٤٥ Ⅷ ½ ² 3.14',
    '안녕하세요 세계! \u1100\u1161\u11a8 각', '日本語のテキスト、中文文本。', 'Здравствуй, мир', 'שָׁלוֹם עולם',
    'नमस्ते दुनिया', 'e\u0301 ﬁ ß İ ŉ ǅ ʕ ʔ', '\u1c89\ua7ce\U0001fac8 \u088f', '🙂👩\u200d👩\u200d👧\u200d👦 🇩🇪🏳️\u200d🌈',
    '\x00\x01\x0b\x0c\x1c\x1f\x7f\x85\xa0\u2028\u3000\ufeff\uffff \u200b x', '\U0010ffff\ue000',
    'HTTPServer CamelCase snake_case __init__ !!!...???///\n/', 'a\ud800b\udc00', MIXED, CODE[:20_000],
]
# characters at which pieces end or go on, and what is special
BORDERS = list(" \t\n\r\x0b\x0c\x1c\x85\xa0\u2028\u3000'’sſStTeEvVdDK09٣½²aAéÉßǅʰªЖжʕ中각ि́🙂_-/.!<|>\ua7ce") + [
    '\r\n', '  ', 'the', ' the', EOT, USER, '<|endof', 'says|>', '<|user ']
texts = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(BORDERS), max_size=60).map(''.join))
many = settings(database=None, derandomize=True, deadline=None)  # the same examples everywhere


@pytest.fixture(scope='module')
def gpt2():
    return load_or_skip('gpt2')


@pytest.fixture(scope='module', params=['gpt2', 'cl100k_base', 'o200k_base'])
def published(request):
    """(OpenAI's vocabulary in our BPE, tiktoken's encoding)"""
    load_or_skip(request.param)
    return BPETokenizer.from_tiktoken(request.param), bytepair.open_tiktoken(request.param)


def train(pattern, vocab_size=600, **options):
    return BPETokenizer.train([CODE, *map(readable, HARD)], vocab_size, pattern, [EOT, USER], workers=1, **options)


@pytest.fixture(scope='module')
def trained():
    """A BPE tokenizer of every sort, by name."""
    toks = {name: train(name) for name in ('gpt2', 'gpt4', 'o200k', None)}
    toks['own pattern'] = train(r'\w+|(\d)(\s)', 500)  # with groups, and text in between that it does not match
    values = toks['gpt4'].to_dict()
    shuffled = random.Random(0).sample(range(1000), len(values['merges']) + 258)
    toks['other ids'] = tokenizer.from_dict({
        **values, 'byte_ids': shuffled[:256], 'merge_ids': shuffled[258:],
        'special_tokens': {EOT: shuffled[256], USER: shuffled[257]}})
    toks['whole pieces'] = tokenizer.from_dict({**values, 'ignore_merges': True})
    toks['no merges'] = BPETokenizer([])
    return toks


def readable(text):
    """text with U+FFFD for half surrogates, which UTF-8 does not have."""
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def same_everywhere(tok, text):
    """encode, encode_array and both decodes agree with each other, and with the text."""
    ids = tok.encode(text, 'none')
    assert isinstance(ids, list) and all(type(i) is int and 0 <= i < tok.vocab_size for i in ids)
    array = tok.encode_array(text)
    assert array.dtype == tokenizer.id_dtype(tok.vocab_size)
    assert array.tolist() == ids
    assert tok.decode(ids) == tok.decode(array) == readable(text)
    assert tok.decode_bytes(ids) == readable(text).encode()


# ----------------------------------------------------------------------------------------------------------------------
# round trips

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


@settings(many, max_examples=1200)
@given(text=texts)
@example(text='a\ud800b\ud83d\ude00')
def test_round_trip_of_every_sort(gpt2, trained, text):
    """Above 10,000 round trips: 1,200 texts, nine tokenizers."""
    for tok in (gpt2, *trained.values()):
        same_everywhere(tok, text)


@settings(many, max_examples=300)
@given(data=st.one_of(st.binary(max_size=40), st.tuples(texts, st.binary(max_size=9)).map(
    lambda both: readable(both[0]).encode() + both[1])))
def test_round_trip_of_bytes(gpt2, trained, data):
    for tok in (tokenizer.ByteTokenizer(), gpt2, *trained.values()):
        assert tok.decode_bytes(tok.encode(data, 'none')) == data


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


# ----------------------------------------------------------------------------------------------------------------------
# as OpenAI's own

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


@settings(many, max_examples=400)
@given(data=st.one_of(st.binary(max_size=30), st.tuples(texts, st.binary(max_size=6), texts).map(
    lambda parts: readable(parts[0]).encode() + parts[1] + readable(parts[2]).encode())))
@example(data=b'x \n \t\xff')
@example(data=b'/1\xe2\x80\x8d\t1\r\xf0\x98\xb7\x91  \x7f\xf7X')  # the blanks before a blank last piece go with it
@example(data='der Käse'.encode()[:-4])  # ends inside a character
@example(data=b'\xff')
@example(data=b'')
def test_published_ids_of_any_bytes(published, data):
    ours, encoding = published
    assert ours.encode(data, 'none') == encoding._encode_bytes(data)


def test_published_vocabularies_are_what_tiktoken_says(published):
    ours, encoding = published
    assert (ours.vocab_size, ours.eot) == (encoding.n_vocab, encoding.eot_token)
    assert ours.special_tokens == encoding._special_tokens
    tokens = encoding.token_byte_values()
    ids = [encoding.encode_single_token(token) for token in tokens]
    assert [ours.decode_bytes([i]) for i in ids] == tokens
    for unused in sorted(set(range(ours.vocab_size)).difference(ids, ours.special_tokens.values()))[:3]:
        with pytest.raises(ValueError, match=f'id {unused}: this vocabulary does not use'):
            ours.decode([unused])


def test_more_blanks_than_tiktoken_can_take(monkeypatch, gpt2):
    """Its regular expressions run out of stack, and it panics; one piece at a time it can encode them."""
    n = 1_500_000
    monkeypatch.setattr(bpe, 'has_gigatoken', lambda: False)
    alone = tokenizer.load('gpt2')
    one_piece = gpt2._encoding._core_bpe.encode_single_piece(b' ' * n)
    assert alone.encode_array(' ' * n).tolist() == one_piece
    assert alone.encode_array('a' + ' ' * (n + 1) + 'b').tolist() == [64, *one_piece, 275]


# ----------------------------------------------------------------------------------------------------------------------
# the fast ways

TEXTS = [*HARD, CODE[20_000:50_000]]


def same_arrays(arrays, tok, expected):
    """expected: {text: ids}"""
    for array, ids in zip(arrays, expected.values(), strict=True):
        assert array.dtype == tokenizer.id_dtype(tok.vocab_size)
        assert array.tolist() == ids


@pytest.mark.parametrize('accelerator', ['tiktoken', 'gigatoken', 'gigatoken in batches'])
def test_fast_ways_give_the_same_ids(monkeypatch, trained, accelerator):
    if accelerator == 'tiktoken':
        monkeypatch.setattr(bpe, 'has_gigatoken', lambda: False)
    else:
        pytest.importorskip('gigatoken')
    older = [text for text in TEXTS if not patterns.NEWER.search(text)]
    for slow in trained.values():
        expected = {text: slow.encode(text, 'none') for text in [*TEXTS, 'x']}
        tok = tokenizer.from_dict(slow.to_dict())  # one that has not chosen its way yet
        for batch in (TEXTS, older, ['x'], ['']):
            if accelerator == 'gigatoken in batches':
                tok._fast.chars = 50_000_000  # so much text has gone before
            same_arrays(tok.encode_batch(batch, workers=2), slow, {text: expected[text] for text in batch})
        assert tok.encode_batch([], workers=2) == []
        same_arrays(map(tok.encode_array, expected), slow, expected)
        if tok.is_fast and tok.pattern:  # so it went the way that this is about
            assert ('gigatoken' in vars(tok._fast)) == (accelerator != 'tiktoken')


def test_tiktokens_vocabularies_go_the_same_ways(monkeypatch, published):
    slow, encoding = published
    expected = {text: encoding.encode_ordinary(text) for text in TEXTS}
    for has_gigatoken in (bpe.has_gigatoken(), False):
        monkeypatch.setattr(bpe, 'has_gigatoken', lambda has_gigatoken=has_gigatoken: has_gigatoken)
        same_arrays(tokenizer.load(encoding.name).encode_batch(TEXTS), slow, expected)
        same_arrays(map(tokenizer.load(encoding.name).encode_array, TEXTS), slow, expected)
        same_arrays(map(tokenizer.from_dict(slow.to_dict()).encode_array, TEXTS), slow, expected)


def test_merges_that_tiktoken_would_do_otherwise():
    """By these merges bc is joined before ab, so abc is never made; tiktoken would take it as a whole piece."""
    tok = BPETokenizer([(b'b', b'c'), (b'a', b'b'), (b'ab', b'c')], 'gpt2')
    text, ids = 'abc abcab', [97, 256, 32, 97, 256, 257]
    assert tok.encode(text) == tok.encode_array(text).tolist() == tok.encode_batch([text])[0].tolist() == ids


def test_batches_in_processes(trained):
    texts = ['the cat sat on the mat ' * 4000, '', 'short', *HARD] * 20  # above 2 MB, from where on there are processes
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


# ----------------------------------------------------------------------------------------------------------------------
# text that comes in parts

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
def test_streams_keep_the_halves_of_a_character_together(cut_wherever_possible, gpt2, trained, text):
    for tok in (gpt2, tokenizer.ByteTokenizer(), *trained.values()):
        assert list(tok.encode_iterable(text)) == tok.encode(text)


@pytest.mark.parametrize('chars', [1, 1000, base.STREAM_CHARS])
def test_streams_of_lines_blocks_and_files(monkeypatch, tmp_path, gpt2, trained, chars):
    monkeypatch.setattr(base, 'STREAM_CHARS', chars)
    text = (CODE[:15_000].replace('\n\n', EOT + '\r\n') + 'ſ日本 ' * 99) * (6 if chars > 9999 else 1)
    path = tmp_path / 'text'
    path.write_bytes(text.encode())
    for tok in (gpt2, tokenizer.CharTokenizer.from_text(text), *itertools.islice(trained.values(), 5)):
        expected = tok.encode(text, 'all')
        with open(path, encoding='utf-8', newline='') as file:
            assert list(tok.encode_iterable(file, 'all')) == expected
        assert list(tok.encode_iterable(text.splitlines(keepends=True), 'all')) == expected
        assert list(tok.encode_iterable([text], 'all')) == expected
        assert list(tok.encode_iterable([])) == list(tok.encode_iterable(['', ''])) == []


def test_streams_refuse_what_encode_refuses(cut_wherever_possible, trained):
    for tok in (trained['gpt4'], trained[None], trained['own pattern']):
        for parts in (['well <|user', ' says|>'], ['well <|user says|>'], 'a <|user says|> b', ['<|user ', 'says|>']):
            with pytest.raises(ValueError, match=r"special token '<\|user says\|>'"):
                list(tok.encode_iterable(parts))
            with pytest.raises(ValueError, match=r"special token '<\|user says\|>'"):
                list(tok.encode_iterable(parts, {EOT}))
        assert list(tok.encode_iterable(['well <|user', ' said'])) == tok.encode('well <|user said')
    with pytest.raises(ValueError, match="expected text, got bytes.*encoding='utf-8'"):
        list(trained['gpt4'].encode_iterable(io.BytesIO(b'text')))


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


# ----------------------------------------------------------------------------------------------------------------------
# special tokens

@pytest.fixture(scope='module')
def chat():
    return BPETokenizer.train('the cat, the hat', 262, 'gpt4', [EOT, USER, '[END]'])


def test_special_tokens_have_the_last_ids(chat):
    assert chat.special_tokens == {EOT: 259, USER: 260, '[END]': 261}
    assert (chat.vocab_size, chat.eot) == (262, 259)
    assert chat.decode([259, 260, 261]) == EOT + USER + '[END]'
    assert BPETokenizer.train('the cat', 258, special_tokens='<|x|>').special_tokens == {'<|x|>': 257}


@pytest.mark.parametrize('everything', ['all', {EOT, USER, '[END]'}, frozenset([EOT, USER, '[END]']),
                                        [EOT, USER, '[END]'], (USER, '[END]', EOT)], ids=['all', 'set', 'frozenset', 'list', 'tuple'])
def test_allowed_special_tokens_become_ids(chat, everything):
    text = f'{EOT}{EOT}a{USER} [END]\n<|user says |>'
    ids = chat.encode(text, everything)
    assert ids == [259, 259, 97, 260, 32, 261, *b'\n<|user says |>']
    assert chat.decode(ids) == text


def test_special_tokens_as_ordinary_text(chat):
    assert chat.encode('a[END]', 'none') == list(b'a[END]')


@pytest.mark.parametrize('allowed', ['none_raise', set(), [], {USER}, {'[END]', USER}], ids=str)
def test_special_tokens_not_allowed_are_refused(chat, allowed):
    with pytest.raises(ValueError, match=r"special token '<\|endoftext\|>' \(after 'well '\)") as error:
        chat.encode('well ' + EOT, allowed)
    for remedy in ("allowed_special={'<|endoftext|>'}", "'all'", "allowed_special='none'"):
        assert remedy in str(error.value)
    assert chat.encode(b'the', allowed) == chat.encode('the', allowed)
    with pytest.raises(ValueError, match='special token'):
        chat.encode(b'well ' + EOT.encode(), allowed)


def test_special_tokens_not_allowed_are_refused_in_bytes_that_are_no_text(chat):
    with pytest.raises(ValueError, match='special token'):
        chat.encode(EOT.encode() + b'\xff')
    assert chat.encode(b'[END]\xff', 'none') == list(b'[END]\xff')


@pytest.mark.parametrize('allowed, message', [
    ({'<|endofttext|>'}, r"'<\|endofttext\|>'.*it has: <\|endoftext\|>, .*did you mean <\|endoftext\|>"),
    (['x'], "'x', which is no special token"),
    ('some', "'some'; expected 'all', 'none', 'none_raise' or a set"),
    (EOT, "expected 'all'"),
    (None, 'None; expected'),
    (3, '3; expected'),
], ids=str)
def test_unknown_allowed_special(chat, allowed, message):
    with pytest.raises(ValueError, match=message):
        chat.encode('text', allowed)


def test_tokenizers_without_special_tokens():
    for tok in (tokenizer.ByteTokenizer(), tokenizer.CharTokenizer('<|endoftx>'), BPETokenizer([])):
        assert tok.special_tokens == {} and tok.eot is None
        for allowed in ('all', 'none', 'none_raise', set()):
            assert tok.decode(tok.encode(EOT, allowed)) == EOT
        with pytest.raises(ValueError, match='it has: none'):
            tok.encode(EOT, {EOT})


@pytest.mark.parametrize('specials, message', [
    ({'': 300}, "got '': 300"),
    ({5: 300}, 'got 5: 300'),
    ({'<a>': '300'}, "'<a>': '300'"),
    ({'<a>': True}, 'True'),
    ({'<a>': -1}, '-1'),
    ({'<a>': 300, '<b>': 300}, 'same id'),
    ({'<a>': 65}, 'same id'),
    ({'<a>': 300, 'x<a>x': 301}, "'<a>' stands in 'x<a>x'"),
    ({'<a><b>': 300, '<b>': 301}, "'<b>' stands in '<a><b>'"),
    ({'<a>': 300, '<a><b>': 301}, "'<a>' stands in '<a><b>'"),
    ({'=a=': 300, '=b': 301}, "'=' ends '=a=' and begins '=b'"),
    ({'=b': 300, '=a=': 301}, "'=' ends '=a=' and begins '=b'"),
    ({'<|a|>|': 300, '|>|b': 301}, r"'\|>\|' ends '<\|a\|>\|' and begins"),
], ids=str)
def test_special_tokens_that_cannot_be(specials, message):
    with pytest.raises(ValueError, match=message) as error:
        BPETokenizer([], None, specials)
    assert '  ' not in str(error.value)  # a space too many where the message was put together


def test_no_merge_crosses_special_tokens_or_texts():
    for pattern in ('gpt2', 'gpt4', None):
        for accelerate in (None, False):
            merges = [(b'b', b'x'), (b'x', b'a'), (b'c', b'd')]
            text = 'xa<|end|>bx<|end|>' * 50 + 'cd'
            assert BPETokenizer.train(text, 260, pattern, '<|end|>', accelerate=accelerate).merges == merges
            texts = ['xa', 'bx'] * 50 + ['cd']
            assert BPETokenizer.train(texts, 259, pattern, accelerate=accelerate).merges == merges


# ----------------------------------------------------------------------------------------------------------------------
# training

def test_training_on_strings_and_files(tmp_path):
    (tmp_path / 'a.txt').write_text(PROSE, encoding='utf-8')
    expected = BPETokenizer.train(PROSE, 290).to_dict()
    assert BPETokenizer.train([PROSE], 290).to_dict() == expected
    assert BPETokenizer.train(iter([PROSE, '']), 290, workers=2).to_dict() == expected
    assert BPETokenizer.train(tmp_path / 'a.txt', 290).to_dict() == expected
    assert BPETokenizer.train([tmp_path / 'a.txt', 'Q'], 290).to_dict() == expected
    assert BPETokenizer.train('a\ud800a\ud800', 257, None).merges == [(b'a', b'\xef')]  # as U+FFFD


def test_training_with_gigatoken_changes_nothing():
    pytest.importorskip('gigatoken')
    slow, fast = (train('gpt2', 900, accelerate=accelerate).to_dict() for accelerate in (False, True))
    assert slow == fast
    assert len(slow['merges']) == 900 - 256 - 2


@pytest.mark.parametrize('arguments, message', [
    (('text', 255), 'vocab_size is 255; expected at least 256: 256 bytes and 0 special'),
    (('text', 257, 'gpt4', ['<a>', '<b>']), 'at least 258: 256 bytes and 2 special'),
    (('text', 300.0), '300.0'),
    (('', 300), 'the text to train on is empty.* at most 256'),
    (([], 300), 'empty'),
    (('aaaa', 300), 'has 2 pairs to join, and vocab_size 300 asks for 44: .* at most 258'),
    (('aaaa', 300, 'gpt2'), 'has 2 pairs to join'),
    (('aaaa', 300, 'gpt4', ['<a>']), 'at most 259'),
    (('text', 257, '('), 'not a regular expression'),
    (('text', 257, 'gtp4'), 'did you mean gpt4'),
    (('text', 257, 'gpt4', ['<a>', 'x<a>']), 'overlap'),
    (('text', 259, 'gpt4', ['<a>', '<a>']), 'twice|same'),
    (('text', 257, 'gpt4', [5]), 'got 5'),
    (([b'text'], 257), 'as strings or Paths, got bytes'),
    (([5], 257), 'got int'),
    (('text', 257, 'gpt4', (), None, True), "pattern='gpt2'"),
], ids=str)
def test_training_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        BPETokenizer.train(*arguments)


def test_a_vocabulary_of_bytes_alone():
    tok = BPETokenizer.train('text', 256)
    assert tok.merges == [] and tok.encode('text') == list(b'text')


@pytest.mark.parametrize('arguments, message', [
    (([(b'ab', b'c')],), r"merge 0 joins b'ab' and b'c', which are not both bytes or earlier"),
    (([(b'a', b'')],), "joins b'a' and b''"),
    (([(b'a', b'b'), (b'a', b'b')],), "merge 1 makes the token b'ab', which there is already"),
    (([], None, None, range(255)), 'byte_ids has 255 ids; expected 256'),
    (([(b'a', b'b')], None, None, range(255), [255, 256]), 'byte_ids has 255 ids'),
    (([(b'a', b'b')], None, None, None, [300, 301]), 'merge_ids has 2 ids; expected 1'),
    (([(b'a', b'b')], None, None, None, [-1]), 'ids'),
    (([(b'a', b'b')], None, None, None, [97]), 'same id'),
    (([], '('), 'not a regular expression'),
], ids=str)
def test_vocabularies_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        BPETokenizer(*arguments)


# ----------------------------------------------------------------------------------------------------------------------
# words

def test_words_by_hand():
    tok = WordTokenizer.train(['the cat, the dog.', 'the cat'], 100)
    # twice: ' cat' and 'the'; once, by code points: ' dog', ' the', ',', '.'
    assert tok.words == [' cat', 'the', ' dog', ' the', ',', '.']
    assert (tok.vocab_size, tok.eot, tok.special_tokens) == (8, 1, {'<|unk|>': 0, EOT: 1})
    assert tok.encode('the dog, a cat.') == [3, 4, 6, 0, 2, 7]
    assert tok.decode([3, 4, 6, 0, 2, 7]) == 'the dog,<|unk|> cat.'
    assert tok.encode(f'the{EOT} dog', {EOT}) == [3, 1, 4]
    assert WordTokenizer.train(['the cat, the dog.', 'the cat'], 4).words == [' cat', 'the']
    with pytest.raises(ValueError, match='<\\|unk\\|>'):
        tok.encode('the <|unk|>')


@settings(many, max_examples=300)
@given(text=texts.filter(str.strip))
def test_words_of_known_text_round_trip(text):
    text = readable(text).replace(EOT, 'x')
    same_everywhere(WordTokenizer.train(text, 1000), text)
    assert 0 not in WordTokenizer.train(text, 1000).encode_array(text)


def test_words_from_files(tmp_path):
    (tmp_path / 'a.txt').write_text('the cat\n', encoding='utf-8')
    assert WordTokenizer.train(tmp_path / 'a.txt', 100).words == WordTokenizer.train('the cat\n', 100).words


@pytest.mark.parametrize('make, message', [
    (lambda: WordTokenizer.train('text', 2), 'vocab_size is 2; a word vocabulary has at least 3'),
    (lambda: WordTokenizer.train('text', '9'), 'vocab_size is 9'),
    (lambda: WordTokenizer.train('', 9), 'empty'),
    (lambda: WordTokenizer(['the', 'the']), "'the' twice"),
    (lambda: WordTokenizer(['the cat']), "got 'the cat'"),
    (lambda: WordTokenizer(['']), "got ''"),
    (lambda: WordTokenizer([3]), 'got 3'),
    (lambda: WordTokenizer(['the']).decode([3]), 'the ids 0 to 2'),
    (lambda: WordTokenizer(['the']).encode(b'the\xff'), r'not UTF-8 \(byte 3 is 0xff\), and a word'),
    (lambda: tokenizer.CharTokenizer('the').encode(b'\xff'), 'a char tokenizer'),
])
def test_words_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ----------------------------------------------------------------------------------------------------------------------
# files

def of_every_kind(trained):
    return [tokenizer.CharTokenizer('\n\x00"zaé🙂'), tokenizer.ByteTokenizer(),
            WordTokenizer(['the', ' cat', '\n', '🙂']), *trained.values()]


def test_saved_tokenizers_are_the_same(tmp_path, gpt2, trained):
    for i, tok in enumerate([gpt2, *of_every_kind(trained)]):
        path = tmp_path / f'{i}.json'
        tok.save(path)
        tok.save(path)  # over what there is
        for copy in (tokenizer.load(path), tokenizer.load(str(path)), tokenizer.from_dict(tok.to_dict()),
                     tokenizer.from_dict(json.loads(json.dumps(tok.to_dict())))):
            assert type(copy) is type(tok) and copy.to_dict() == tok.to_dict()
            assert (copy.vocab_size, copy.eot, copy.special_tokens) == (tok.vocab_size, tok.eot, tok.special_tokens)
            assert copy.pattern == tok.pattern
        if not isinstance(tok, tokenizer.CharTokenizer):
            assert copy.encode(MIXED, 'all') == tok.encode(MIXED, 'all')
    assert sorted(os.listdir(tmp_path)) == sorted(f'{n}.json' for n in range(i + 1))  # nothing temporary is left


def test_a_pattern_of_ones_own_is_saved(tmp_path):
    tok = BPETokenizer.train('the cat, the hat ' * 3, 262, r'\w\w|"|\s\p{Lu}', ['<|x|>'])
    tok.save(tmp_path / 'my.json')
    copy = tokenizer.load(tmp_path / 'my.json')
    assert copy.pattern == r'\w\w|"|\s\p{Lu}' and copy.merges == tok.merges
    assert copy.encode('that cat<|x|>', 'all') == tok.encode('that cat<|x|>', 'all')


def small_ones():
    return [tokenizer.CharTokenizer('ab\n"é'), tokenizer.ByteTokenizer(), WordTokenizer(['the', ' cat', ',']),
            BPETokenizer.train('the cat, the hat', 262, 'gpt4', [EOT, USER])]


@pytest.mark.parametrize('kind', range(4), ids=['char', 'byte', 'word', 'bpe'])
def test_damaged_files_are_refused(tmp_path, kind):
    tok, path = small_ones()[kind], tmp_path / 'my.json'
    tok.save(path)
    whole = path.read_bytes()

    def refused_or_the_same(content):
        path.write_bytes(content)
        try:
            assert tokenizer.load(path).to_dict() == tok.to_dict()  # the damage hit a space between
            return False
        except ValueError as error:
            assert 'my.json' in str(error)
            return True

    assert not refused_or_the_same(whole)
    for length in range(0, len(whole) - 2, 10):
        assert refused_or_the_same(whole[:length])
    for i, byte in enumerate(whole):
        changed = (byte - ord('0') + 1) % 10 + ord('0') if chr(byte).isdigit() else byte ^ 1
        refused = refused_or_the_same(whole[:i] + bytes([changed]) + whole[i + 1:])
        assert refused or chr(byte).isspace()
    assert refused_or_the_same(whole + b'}')


@pytest.mark.parametrize('content, message', [
    ('{"format": "flatgpt tokenizer", "version": 2}', 'of version 2 .* reads version 1'),
    ('{"format": "flatgpt tokenizer"}', 'of version None'),
    ('{"format": "flatgpt tokenizer", "version": 1, "kind": "byte"}', 'damaged'),
    ('{"format": "flatgpt tokenizer",', 'damaged or cut short'),
    ('["flatgpt tokenizer"]', 'my.json'),
    ('"flatgpt tokenizer"', 'my.json'),
    ('{"a": 1}', 'my.json'),
    ('[]', 'my.json'),
    ('just a text', 'my.json'),
    ('', 'my.json'),
], ids=str)
def test_files_that_are_no_tokenizers(tmp_path, content, message):
    (tmp_path / 'my.json').write_text(content)
    with pytest.raises(ValueError, match=message):
        tokenizer.load(tmp_path / 'my.json')


def test_a_file_of_another_kind(tmp_path):
    values = {'kind': 'syllable', 'words': []}
    (tmp_path / 'my.json').write_text(json.dumps(
        {'format': base.FILE_FORMAT, 'version': 1, 'sha256': tokenizer.digest(values), **values}))
    with pytest.raises(ValueError, match="my.json: unknown kind of tokenizer 'syllable'; expected one of .*newer"):
        tokenizer.load(tmp_path / 'my.json')


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'my.json'
    tokenizer.ByteTokenizer().save(path)

    def disk_full(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', disk_full)
    with pytest.raises(ValueError, match='my.json could not be written .No space left on device.*free some space'):
        tokenizer.CharTokenizer('ab').save(path)
    assert tokenizer.load(path).kind == 'byte'


# ----------------------------------------------------------------------------------------------------------------------
# what is refused

def test_unknown_characters_are_named():
    tok = tokenizer.CharTokenizer('abc')
    with pytest.raises(ValueError, match=r"'d' \(U\+0064\), 'é' \(U\+00E9\), '🙂' \(U\+1F642\)") as error:
        tok.encode('a🙂bdéd')
    assert '--tokenizer=byte' in str(error.value)
    with pytest.raises(ValueError, match='and 16 more'):
        tok.encode('defghijklmnopqrstuvwxyzABC')
    with pytest.raises(ValueError, match=r'U\+D800'):
        tok.encode('a\ud800')


@pytest.mark.parametrize('bad', [-1, 3, 10**12])
def test_ids_out_of_range_are_named(bad):
    with pytest.raises(ValueError, match=f'{bad}.*0 to 2'):
        tokenizer.CharTokenizer('abc').decode([0, bad])


def test_ids_out_of_range_of_others(gpt2):
    with pytest.raises(ValueError, match='256'):
        tokenizer.ByteTokenizer().decode_bytes([65, 256])
    with pytest.raises(ValueError, match='50300.*50256'):
        gpt2.decode([50300])  # models pad GPT-2's vocabulary to 50304


@pytest.mark.parametrize('chars', ['', 'aba', ['ab'], [1], ['\ud800']])
def test_bad_vocabularies(chars):
    with pytest.raises(ValueError, match='char'):
        tokenizer.CharTokenizer(chars)


def test_load_names():
    assert tokenizer.load('byte').vocab_size == 256
    for name, near in (('gtp2', 'gpt2'), ('gpt-4', 'cl100k_base'), ('o200k', 'o200k_base'), ('bytes', 'byte')):
        with pytest.raises(ValueError, match=f"unknown tokenizer '{name}'; expected .*did you mean {near}"):
            tokenizer.load(name)


def test_load_names_that_need_a_text(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no char.json lies
    for name in ('char', 'word', 'bpe'):
        with pytest.raises(ValueError, match=rf'takes its vocabulary from a text: python tokenizer\.py train .*{name}'):
            tokenizer.load(name)
    tokenizer.ByteTokenizer().save('mine.json')
    with pytest.raises(ValueError, match='did you mean mine.json'):
        tokenizer.load('mime.json')


@pytest.mark.parametrize('values, message', [
    ({'kind': 'bytes'}, 'did you mean byte'),
    ({'kind': 'char'}, "lacks 'chars'"),
    ({'kind': 'tiktoken', 'name': 'gpt3'}, 'gpt2'),
    ({'chars': 'abc'}, "the key 'kind'"),
    (None, "the key 'kind'"),
    ({'kind': ['bpe']}, 'unknown kind'),
    ({'kind': 'char', 'chars': None}, 'chars'),
    ({'kind': 'word', 'words': 5}, 'words'),
    ({'kind': 'word', 'words': ['the cat']}, "'the cat'"),
    ({'kind': 'bpe', 'merges': [], 'pattern': None}, "lacks 'special_tokens'"),
    ({'kind': 'bpe', 'merges': 5, 'pattern': None, 'special_tokens': {}}, 'merges'),
    ({'kind': 'bpe', 'merges': ['ab'], 'pattern': None, 'special_tokens': {}}, "merge 0 is 'ab'; expected two tokens"),
    ({'kind': 'bpe', 'merges': ['a b', 'a 日'], 'pattern': None, 'special_tokens': {}}, "merge 1 is 'a 日'"),
    ({'kind': 'bpe', 'merges': ['a b c'], 'pattern': None, 'special_tokens': {}}, "'a b c'"),
    ({'kind': 'bpe', 'merges': [7], 'pattern': None, 'special_tokens': {}}, 'merge 0 is 7'),
    ({'kind': 'bpe', 'merges': ['ab c'], 'pattern': None, 'special_tokens': {}}, "joins b'ab' and b'c'"),
    ({'kind': 'bpe', 'merges': [], 'pattern': 5, 'special_tokens': {}}, 'pattern'),
    ({'kind': 'bpe', 'merges': [], 'pattern': '(', 'special_tokens': {}}, 'pattern'),
    ({'kind': 'bpe', 'merges': [], 'pattern': None, 'special_tokens': [EOT]}, 'special'),
    ({'kind': 'bpe', 'merges': [], 'pattern': None, 'special_tokens': {EOT: 'x'}}, 'special'),
    ({'kind': 'bpe', 'merges': [], 'pattern': None, 'special_tokens': {}, 'byte_ids': 5}, 'byte_ids'),
], ids=str)
def test_from_dict_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.from_dict(values)


def test_no_network_says_what_to_do(tmp_path):
    # A proxy that nobody listens at makes every machine one without a network.
    environment = {**os.environ, 'TIKTOKEN_CACHE_DIR': str(tmp_path), 'https_proxy': 'http://127.0.0.1:9',
                   'HTTPS_PROXY': 'http://127.0.0.1:9', 'no_proxy': '', 'NO_PROXY': ''}
    code = 'import tokenizer\ntry: tokenizer.load("gpt2")\nexcept ValueError as error: print(error)'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=environment, capture_output=True, text=True)
    said = done.stdout
    for part in ('TIKTOKEN_CACHE_DIR', 'vocab.bpe', 'encoder.json', '--tokenizer=byte', str(tmp_path)):
        assert part in said
    for url in bytepair.TIKTOKEN_FILES['gpt2']:
        assert hashlib.sha1(url.encode()).hexdigest() in said


# ----------------------------------------------------------------------------------------------------------------------
# nanoGPT's meta.pkl

def meta_pkl(path, **changes):
    stoi = {'b': 0, 'a': 1, '\n': 2}  # not sorted: ids come from stoi
    meta = {'vocab_size': 3, 'stoi': stoi, 'itos': {i: char for char, i in stoi.items()}, **changes}
    path.write_bytes(pickle.dumps({key: value for key, value in meta.items() if value is not None}))
    return path


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_meta_pkl(tmp_path, protocol):
    path = meta_pkl(tmp_path / 'meta.pkl', extra='ignored')
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()), protocol=protocol))
    tok = tokenizer.from_meta_pkl(path)
    assert tok.encode('ab\n') == [1, 0, 2]
    assert tok.decode([2, 1, 0]) == '\nab'


class Harm:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return (open, (self.victim, 'w'))


def test_meta_pkl_runs_no_code(tmp_path):
    victim = tmp_path / 'victim'
    path = tmp_path / 'meta.pkl'
    path.write_bytes(pickle.dumps({'vocab_size': 1, 'stoi': {'a': 0}, 'itos': {0: 'a'}, 'x': Harm(str(victim))}))
    with pytest.raises(ValueError, match='refused.*prepare.py'):
        tokenizer.from_meta_pkl(path)
    assert not victim.exists()
    pickle.loads(path.read_bytes())['x'].close()
    assert victim.exists()  # so the file was a real attack


@pytest.mark.parametrize('changes, message', [
    ({'itos': None}, 'lacks itos'),
    ({'vocab_size': 4}, 'vocab_size 4'),
    ({'vocab_size': True}, 'int'),
    ({'vocab_size': '3'}, 'int'),
    ({'stoi': {'b': 0, 'a': 1, 'c': 1}}, 'each once'),
    ({'stoi': {'b': 0, 'a': 1, 2: 2}}, 'characters to ids'),
    ({'stoi': {'b': 0, 'a': 1, 'the': 2}}, 'single characters'),
    ({'itos': {0: 'a', 1: 'b', 2: '\n'}}, 'reverse'),
    ({'stoi': ['a', 'b', 'c']}, 'dicts'),
])
def test_meta_pkl_contradictions(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.from_meta_pkl(meta_pkl(tmp_path / 'meta.pkl', **changes))


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 90), value=st.integers(0, 255), cut=st.booleans())
def test_meta_pkl_damaged(tmp_path_factory, position, value, cut):
    path = meta_pkl(tmp_path_factory.getbasetemp() / 'damaged.pkl')
    content = bytearray(path.read_bytes())
    position %= len(content)
    content[position] = value
    path.write_bytes(content[:position] if cut else content)
    try:
        tok = tokenizer.from_meta_pkl(path)
    except ValueError as error:
        assert 'damaged.pkl was refused' in str(error)
    else:
        assert tok.vocab_size == 3  # the damage hit a name or a character


def test_meta_pkl_missing_or_no_pickle(tmp_path):
    with pytest.raises(ValueError, match='does not exist'):
        tokenizer.from_meta_pkl(tmp_path / 'meta.pkl')
    (tmp_path / 'meta.pkl').write_bytes(b'')
    with pytest.raises(ValueError, match='refused'):
        tokenizer.from_meta_pkl(tmp_path / 'meta.pkl')
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match='got list'):
        tokenizer.from_meta_pkl(tmp_path / 'meta.pkl')


# ----------------------------------------------------------------------------------------------------------------------
# what grows with the input

def test_gigatoken_is_made_anew_before_it_knows_too_many_words(monkeypatch, trained):
    pytest.importorskip('gigatoken')
    monkeypatch.setattr(bpe, 'FORGET_CHARS', 1000)
    tok = tokenizer.from_dict(trained['gpt2'].to_dict())
    text = 'some words, and then some more; '
    made = set()
    for _ in range(100):
        assert tok.encode_array(text).tolist() == trained['gpt2'].encode(text)
        made.add(id(tok._fast.gigatoken))
        keep = tok._fast.gigatoken  # so that no id comes back
        made.add(id(keep))
    assert len(text) * 100 > 3000 and len(made) >= 2


def test_a_stream_full_of_special_tokens_is_cut_in_linear_time():
    tok = tokenizer.BPETokenizer([], 'gpt2', {'<|user says|>': 256})
    looked_at = 0

    class Counted(str):
        def startswith(self, *arguments):
            nonlocal looked_at
            looked_at += 1
            return str.startswith(self, *arguments)

        def __getitem__(self, place):
            part = str.__getitem__(self, place)
            assert len(part) <= 20, 'the rest of the text is copied at every candidate'
            return part

    assert tok.safe_cut(Counted('<|user says|>' * 500)) == 0
    assert looked_at < 500 * 30


def test_many_special_tokens():
    names = {f'<|reserved_{i}|>': 1000 + i for i in range(2000)}
    tok = tokenizer.BPETokenizer([], 'gpt2', names)
    assert tok.encode('<|reserved_7|><|reserved_1999|>', 'all') == [1007, 2999]


@pytest.mark.parametrize('described', [
    {'merge_ids': [2**31]}, {'byte_ids': [*range(255), 2**33]}, {'special_tokens': {'<|x|>': 2**31}}])
def test_ids_beyond_what_files_hold_are_refused(described):
    values = {'kind': 'bpe', 'pattern': None, 'special_tokens': {}, 'merges': ['a b'], **described}
    with pytest.raises(ValueError, match='2,147,483,647'):
        tokenizer.from_dict(values)


def test_special_token_that_is_no_text():
    with pytest.raises(ValueError, match='half a surrogate pair'):
        tokenizer.BPETokenizer([], None, {'\ud800': 256})


@pytest.mark.parametrize('ids, named', [([1.5], '1.5'), ('12', "'12'"), ([2**70], str(2**70)), ([256], '256')])
def test_what_is_no_id_is_not_decoded(ids, named):
    with pytest.raises(ValueError, match='cannot decode') as error:
        tokenizer.ByteTokenizer().decode(ids)
    assert named in str(error.value)


@pytest.mark.parametrize('text', [5, None, ['a']])
def test_what_is_no_text_is_not_encoded(text):
    with pytest.raises(ValueError, match='text or bytes'):
        tokenizer.ByteTokenizer().encode(text)


def test_bytearrays_and_unused_ids():
    assert tokenizer.ByteTokenizer().encode(bytearray(b'a\xff')) == [97, 255]
    with pytest.raises(ValueError, match='id 100261: cl100k_base does not use'):
        load_or_skip('cl100k_base').decode([5, 100261])
