"""
tokenizer/formats.py against tiktoken, tokenizers and transformers, whose files it reads and writes.

Run: pytest tests/test_formats.py
"""

import base64
import json
import os
import random
import unicodedata
from pathlib import Path

import pytest
import tiktoken
from conftest import load_or_skip
from format_cases import (
    NASTY,
    OWN_TEXT,
    SCRIPTS,
    TEXTS,
    byte_level_file,
    encode_plainly,
    hf_ids,
    make_small,
    nasty_text,
    read_file,
    same_folder,
    tiktoken_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer
from tokenizer import base, formats, patterns, tokenizer_json

tokenizers = pytest.importorskip('tokenizers')
transformers = pytest.importorskip('transformers')


@pytest.fixture(scope='module')
def cache():
    """tiktoken's files: name of the vocabulary -> path."""
    for name in ('gpt2', 'cl100k_base'):
        load_or_skip(name)
    folder = os.environ.get('TIKTOKEN_CACHE_DIR')
    if not folder:
        pytest.skip('needs TIKTOKEN_CACHE_DIR')
    return {'cl100k_base': Path(folder) / '9b5ad71b2ce5302211f9c61530b329a4922fc6a4',
            'vocab.bpe': Path(folder) / '6d1cbeee0f20b3d9449abfede4726ed8212e3aee',
            'encoder.json': Path(folder) / '6c7ea1a7e38e3a7f062df639a5b80947f075ffe6'}


@pytest.fixture(scope='module')
def published(cache):
    """Name -> description read from the published file."""
    return {'gpt2': formats.read_gpt2_files(cache['encoder.json'], cache['vocab.bpe']),
            'cl100k_base': formats.read_tiktoken(cache['cl100k_base'])}


@pytest.fixture(scope='module')
def hf_folders(published, tmp_path_factory):
    folders = {}
    for name, values in published.items():
        folders[name] = tmp_path_factory.mktemp(name)
        formats.write_hf_folder(values, folders[name])
    return folders


@pytest.fixture(scope='module')
def small():
    return make_small()


# The published vocabularies -----------------------------------------------------------------------

@pytest.mark.parametrize('name', ['gpt2', 'cl100k_base'])
def test_published_gives_the_same_ids_in_tokenizers(name, published, hf_folders):
    encoding = tiktoken.get_encoding(name)
    hf = tokenizers.Tokenizer.from_file(str(hf_folders[name] / 'tokenizer.json'))
    fast = transformers.AutoTokenizer.from_pretrained(hf_folders[name])
    for text in TEXTS:
        assert hf_ids(hf, text) == encoding.encode(text, allowed_special='all')
        assert fast(text, add_special_tokens=False)['input_ids'] == hf_ids(hf, text)
        assert fast.decode(hf_ids(hf, text)) == hf.decode(hf_ids(hf, text),
                                                          skip_special_tokens=False) == text
    assert published[name]['special_tokens'] == encoding._special_tokens
    assert fast.eos_token_id == fast.bos_token_id == encoding.eot_token

    @given(nasty_text)
    @settings(max_examples=300)
    def same(text):
        assert hf_ids(hf, text) == encoding.encode(text, allowed_special='all')
    same()


@pytest.mark.parametrize('name', ['gpt2', pytest.param('cl100k_base', marks=pytest.mark.slow)])
def test_this_programs_tokenizer_of_a_published_file(name, published):
    ours, encoding = tokenizer.from_dict(published[name]), tiktoken.get_encoding(name)
    assert ours.to_dict() == published[name] and ours.vocab_size == encoding.n_vocab
    for text in TEXTS:
        assert ours.encode(text, 'all') == encoding.encode(text, allowed_special='all')
        assert ours.encode_array(text).tolist() == encoding.encode_ordinary(text)


@pytest.mark.parametrize('name', ['gpt2', pytest.param('cl100k_base', marks=pytest.mark.slow)])
def test_published_round_trips(name, published, hf_folders, cache, tmp_path):
    assert formats.read(hf_folders[name]) == published[name]
    path = tmp_path / 'own.tiktoken'
    formats.write_tiktoken(published[name], path)
    if name == 'cl100k_base':
        assert path.read_bytes() == cache['cl100k_base'].read_bytes()
    else:
        encoding = tiktoken.get_encoding('gpt2')
        assert tiktoken_of(path, encoding._pat_str)._mergeable_ranks == encoding._mergeable_ranks
        assert formats.read_tiktoken(path, 'gpt2', {'<|endoftext|>': 50256}) == published['gpt2']


def test_published_merges_are_those_of_gpt2(published, cache):
    lines = cache['vocab.bpe'].read_text(encoding='utf-8').splitlines()[1:]
    assert published['gpt2']['merges'] == lines


def test_transformers_reads_a_single_file(hf_folders, published):
    path = hf_folders['gpt2'] / 'tokenizer.json'
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    encoding = tiktoken.get_encoding('gpt2')
    for text in TEXTS:
        assert fast(text)['input_ids'] == encoding.encode(text, allowed_special='all')


# Files that tokenizers and transformers made ------------------------------------------------------

def trained_by_tokenizers(texts, vocab_size, pre_tokenizer, **options):
    hf = tokenizers.Tokenizer(tokenizers.models.BPE(**options))
    hf.pre_tokenizer = pre_tokenizer
    hf.decoder = tokenizers.decoders.ByteLevel()
    hf.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=['<s>', '<|endoftext|>'], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return hf


def pre_tokenizers_of(pattern):
    pre = tokenizers.pre_tokenizers
    byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre.Sequence([pre.Split(tokenizers.Regex(pattern), 'isolated'),
                         byte_level]) if pattern else byte_level


@pytest.mark.parametrize('pattern', ['gpt2', 'gpt4', 'o200k', None])
def test_reads_what_tokenizers_trained(pattern, tmp_path):
    pre_tokenizer = (tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
                     if pattern == 'gpt2' else
                     pre_tokenizers_of(patterns.PATTERNS.get(pattern)))
    theirs = trained_by_tokenizers([*TEXTS, OWN_TEXT], 700, pre_tokenizer)
    theirs.save(str(tmp_path / 'tokenizer.json'))
    values = formats.read(tmp_path)
    assert values['pattern'] == patterns.PATTERNS.get(pattern)
    assert values['special_tokens'] == {'<s>': 0, '<|endoftext|>': 1}
    assert values['byte_ids'][ord('!')] == 2 and values['merge_ids'][0] == 258
    formats.write_tokenizer_json(values, tmp_path / 'ours.json')
    ours = tokenizers.Tokenizer.from_file(str(tmp_path / 'ours.json'))
    assert ours.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        assert hf_ids(ours, text) == hf_ids(theirs, text)
        if '<|endoftext|>' not in text:
            assert encode_plainly(values, text) == hf_ids(theirs, text)

    # the older way to write merges
    old = json.loads((tmp_path / 'tokenizer.json').read_text(encoding='utf-8'))
    old['model']['merges'] = [' '.join(pair) for pair in old['model']['merges']]
    del old['model']['type'], old['model']['ignore_merges']
    (tmp_path / 'old.json').write_text(json.dumps(old))
    assert formats.read(tmp_path / 'old.json') == values


# as its tokenizer.json has it
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def published_like(family):
    """A small vocabulary in the way of SmolLM2's, Qwen's or Llama 3's tokenizer.json, trained by
    tokenizers."""
    pre = tokenizers.pre_tokenizers
    pre_tokenizer = {
        'smollm2': lambda: pre.Sequence([pre.Digits(individual_digits=True),
                                         pre.ByteLevel(add_prefix_space=False)]),
        'qwen': lambda: pre_tokenizers_of(QWEN),
        'llama 3': lambda: pre_tokenizers_of(QWEN.replace(r'\p{N}|', r'\p{N}{1,3}|')),
    }[family]()
    hf = trained_by_tokenizers([*TEXTS, OWN_TEXT], 700, pre_tokenizer,
                               ignore_merges=family == 'llama 3')
    hf.add_special_tokens(['<|im_start|>', '<|im_end|>'])
    hf.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False)
                   for token in ('<think>', '</think>')])
    if family == 'qwen':
        hf.normalizer = tokenizers.normalizers.NFC()
    if family == 'llama 3':
        hf.post_processor = tokenizers.processors.Sequence([
            tokenizers.processors.ByteLevel(trim_offsets=False),
            tokenizers.processors.TemplateProcessing(single='<s> $A', pair='<s> $A <s>:1 $B:1',
                                                     special_tokens=[
                ('<s>', hf.token_to_id('<s>'))])])
    return hf


@pytest.mark.parametrize('family', ['smollm2', 'qwen', 'llama 3'])
def test_published_families(family, tmp_path):
    """Read, used, saved, loaded and written again: the ids of tokenizers, by every way to
    encode."""
    theirs = published_like(family)
    theirs.save(str(tmp_path / 'tokenizer.json'))
    values = formats.read(tmp_path)
    ours = tokenizer.from_dict(values)
    assert (values['pattern']
            == patterns.PATTERNS[{'qwen': 'qwen2', 'llama 3': 'gpt4'}.get(family, family)])
    assert ours.normalizer == ('NFC' if family == 'qwen' else None)
    assert ours.bos_token == ('<s>' if family == 'llama 3' else None)
    assert ours.visible_tokens == ['<think>', '</think>'] and ours.is_fast
    ours.save(tmp_path / 'own.json')
    assert tokenizer.load(tmp_path / 'own.json').to_dict() == ours.to_dict() == values
    formats.write_tokenizer_json(values, tmp_path / 'again.json')
    again = tokenizers.Tokenizer.from_file(str(tmp_path / 'again.json'))
    assert formats.read(tmp_path / 'again.json') == values
    # with what a post-processor adds
    assert again.encode('a', 'b').ids == theirs.encode('a', 'b').ids
    marks = '<|im_start|>a <think>e\u0301</think>\u0338<|im_end|>\u0338'
    for text in [*TEXTS, marks]:
        assert ours.encode(text, 'all') == hf_ids(theirs, text) == hf_ids(again, text)
    ids = hf_ids(theirs, marks)
    assert again.decode(ids) == theirs.decode(ids) and '<think>' in theirs.decode(ids)

    @given(nasty_text.filter(lambda text: not any(token in text
                                                  for token in values['special_tokens'])))
    @settings(max_examples=300)
    def same(text):
        expected = hf_ids(theirs, text)
        assert encode_plainly(values, patterns.normalize(text, ours.normalizer)) == expected
        assert ours.encode(text) == ours.encode(text.encode()) == expected
        assert ours.encode_array(text).tolist() == list(ours.encode_iterable(text)) == expected
        assert ours.encode_batch([text, 'a'])[0].tolist() == expected
        assert (ours.decode(expected)
                == ( unicodedata.normalize('NFC', text) if ours.normalizer else text))
    same()


@pytest.mark.parametrize('pattern', ['qwen2', None, r'\S+|\s+'])
def test_nfc_in_a_stream(pattern, monkeypatch):
    """Wherever a stream is cut, the ids are those of the whole text, whose parts may compose over
    a cut."""
    monkeypatch.setattr(base, 'STREAM_CHARS', 4)
    values = {**tokenizer_json.BYTES, 'pattern': patterns.PATTERNS.get(pattern, pattern),
              'normalizer': 'NFC',
              'merges': ['e s', 'Ã ©']}  # es, é
    ours = tokenizer.from_dict(values)
    composing = st.text('es= \n\u0301\u0327\u0338\u1100\u1161\u11a8\uac00\u212b🙂', max_size=40)

    @given(composing)
    @settings(max_examples=300)
    def same(text):
        ids = ours.encode(text)
        assert list(ours.encode_iterable(list(text))) == ids
        assert ours.decode(ids) == unicodedata.normalize('NFC', text)
    same()


def test_nfc_is_that_of_tokenizers():
    """Whatever Unicode this Python is at: every character alone, and between marks that it may
    change places with."""
    theirs = tokenizers.normalizers.NFC()
    marks = ['{}', 'a{}\u0334', 'a\u0345{}', 'a\u0301{}', 'a\u0327{}\u0301', '\U000105d2{}',
             '\U00011935{}']
    for form in marks:
        text = '\n'.join(map(form.format, SCRIPTS))
        assert patterns.normalize(text, 'NFC') == theirs.normalize_str(text), form


def test_digits_apart():
    """SmolLM2's two steps as one pattern: white space before a digit is cut off with what precedes
    it."""
    pre = tokenizers.pre_tokenizers
    theirs = pre.Sequence([pre.Digits(individual_digits=True),
                           pre.ByteLevel(add_prefix_space=False)])

    def same(text):
        expected = [piece for piece, _ in theirs.pre_tokenize_str(text)]
        assert ([patterns.printable(piece.encode())
                 for piece in patterns.split(text, patterns.PATTERNS['smollm2'])]
                == expected)

    same("a  12  b 3's  '5 \n\n6\t٣½ x")
    rng = random.Random(0)
    for _ in range(3000):
        same(''.join(rng.choices([*NASTY, '5'], k=rng.randint(1, 12))))
    # Digits knows Unicode 17, in which 13 were new
    known = [char for char in SCRIPTS if not (0x11de0 <= ord(char) < 0x11dea
                                              or 0x16ff4 <= ord(char) < 0x16ff7)]
    same(''.join(known))
    rng.shuffle(known)
    same(''.join(known))


@pytest.mark.parametrize('kind', ['char', 'word'])
def test_characters_and_words_as_a_tokenizer_json(kind, tmp_path):
    text = ' '.join(TEXTS).replace('<|endoftext|>', '')
    ours = (tokenizer.CharTokenizer.from_text(text) if kind == 'char'
            else tokenizer.WordTokenizer.train(text, 100))
    formats.write_hf_folder(ours.to_dict(), tmp_path)
    assert formats.read(tmp_path) == ours.to_dict()
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    assert theirs.get_vocab_size() == ours.vocab_size
    rng = random.Random(0)
    samples = [''.join(rng.choices(text, k=40)) for _ in range(300)]
    for sample in [*samples, *([SCRIPTS] if kind == 'word' else [])]:
        ids = ours.encode(sample)
        assert hf_ids(theirs, sample) == ids
        assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)
    if kind == 'char':
        with pytest.raises(Exception, match='Missing'):
            theirs.encode('ζ')
    changed = json.loads((tmp_path / 'tokenizer.json').read_text(encoding='utf-8'))
    changed['pre_tokenizer'] = {'type': 'Whitespace'}
    with pytest.raises(ValueError, match='type is "WordLevel"'):
        read_file(tmp_path, changed)


@same_folder
@given(st.lists(st.text('ab', max_size=12), min_size=1, max_size=8),
       st.lists(st.text('ab ', max_size=30), max_size=8))
def test_a_token_made_in_two_ways(tmp_path, words, texts):
    """tokenizers' trainer learns (a, bb) and later (ab, b) too, when both come up, for the one
    token abb."""
    theirs = trained_by_tokenizers(words, 300, pre_tokenizers_of(None))
    theirs.save(str(tmp_path / 'tokenizer.json'))
    values = formats.read(tmp_path)
    for text in words + texts:
        assert encode_plainly(values, text) == hf_ids(theirs, text)


def test_two_ways_by_hand(tmp_path):
    """ab + b is listed before a + bb, but bb is joined before ab: abb comes about by the second
    only."""
    values = read_file(tmp_path, byte_level_file(['b b', 'a b', 'ab b', 'a bb']))
    assert values['merges'] == ['b b', 'a b', 'a bb']
    assert encode_plainly(values, 'abbb') == [258, ord('b')]


@st.composite
def any_merges(draw):
    """Merges as no training would list them: in any order, several for one token, some that are
    never reached."""
    tokens = draw(st.lists(st.text('ab', min_size=2, max_size=5), min_size=1, max_size=8,
                           unique=True))
    tokens_and_bytes = {*tokens, 'a', 'b'}
    merges = [f'{token[:i]} {token[i:]}' for token in tokens for i in range(1, len(token))
              if token[:i] in tokens_and_bytes and token[i:] in tokens_and_bytes]
    random.Random(draw(st.integers(0, 999))).shuffle(merges)
    return merges[:draw(st.integers(0, len(merges)))], tokens


@given(any_merges(), st.booleans(), st.lists(st.text('ab', max_size=20), min_size=1))
@settings(same_folder, max_examples=250)
def test_any_merges_are_read_exactly_or_refused(tmp_path, merges_and_tokens, ignore_merges, texts):
    merges, tokens = merges_and_tokens
    file = byte_level_file(merges, tokens, ignore_merges=ignore_merges)
    try:
        values = read_file(tmp_path, file)
    except ValueError as error:
        assert 'stands before one of its parts' in str(error) or 'no merges lead to' in str(error)
        return
    theirs = tokenizers.Tokenizer.from_str(json.dumps(file))
    formats.write_tokenizer_json(values, tmp_path / 'ours.json')
    ours = tokenizers.Tokenizer.from_file(str(tmp_path / 'ours.json'))
    assert ours.get_vocab() == theirs.get_vocab()
    this = tokenizer.from_dict(values)
    for text in texts:
        ids = encode_plainly(values, text)
        assert ids == hf_ids(theirs, text) == hf_ids(ours, text) == this.encode_ordinary(text)
    try:
        formats.write_tiktoken(values, tmp_path / 'ours.tiktoken')
    except ValueError as error:
        assert 'cannot be written' in str(error)
        return
    encoding = tiktoken_of(tmp_path / 'ours.tiktoken', None)
    for text in texts:
        assert encoding.encode(text) == hf_ids(theirs, text)


@given(st.lists(st.text('ab', min_size=2, max_size=6), max_size=9, unique=True),
       st.lists(st.text('ab', max_size=20), min_size=1))
@settings(same_folder, max_examples=200)
def test_any_ranks_are_read_exactly_or_refused(tmp_path, tokens, texts):
    ranks = {bytes([byte]): byte for byte in range(256)} | {t.encode(): 256 + i
                                                            for i, t in enumerate(tokens)}
    path = tmp_path / 'any.tiktoken'
    path.write_text(''.join(f'{base64.b64encode(token).decode()} {rank}\n'
                            for token, rank in ranks.items()))
    try:
        values = formats.read_tiktoken(path, None)
    except ValueError as error:
        assert 'stands before one of its parts' in str(error) or 'no merges lead to' in str(error)
        return
    encoding = tiktoken_of(path, None)
    for text in texts:
        assert encode_plainly(values, text) == encoding.encode(text)
    formats.write_tiktoken(values, tmp_path / 'again.tiktoken')
    assert (tmp_path / 'again.tiktoken').read_bytes() == path.read_bytes()


def test_most_of_such_merges_and_ranks_are_read(tmp_path):
    """The two tests above would say nothing of a reader that refuses everything."""
    merges = ['b b', 'a a', 'aa a', 'a aa', 'aa bb', 'a b', 'aa b', 'aab b', 'ab b']
    values = read_file(tmp_path, byte_level_file(merges))
    assert values['merges'] == ['b b', 'a a', 'aa a', 'aa bb', 'a b', 'aa b', 'ab b']


def test_llama_3s_file(small, tmp_path):
    """transformers makes tokenizer.json of a tiktoken file by listing every way to split every
    token."""
    converter = pytest.importorskip('transformers.convert_slow_tokenizer').TikTokenConverter
    formats.write_tiktoken(small, tmp_path / 'tokenizer.model')
    theirs = converter(vocab_file=str(tmp_path / 'tokenizer.model'),
                       pattern=patterns.PATTERNS['gpt4'],
                       extra_special_tokens=['<|begin_of_text|>']).converted()
    theirs.save(str(tmp_path / 'tokenizer.json'))
    file = json.loads((tmp_path / 'tokenizer.json').read_text(encoding='utf-8'))
    listed = file['model']['merges']
    values = formats.read(tmp_path / 'tokenizer.json')
    assert values['merges'] == small['merges'] and len(listed) > len(small['merges'])
    assert values['special_tokens'] == {'<|begin_of_text|>': 600}
    for text in TEXTS:
        assert encode_plainly(values, text) == hf_ids(theirs, text)


def test_a_token_taken_whole_only(tmp_path):
    """abc is the join of no two tokens that its bytes ever are: Llama 3 has such."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b'bc': 256, b'ab': 257, b'cd': 258,
                                                            b'abcd': 259}
    path = tmp_path / 'whole.tiktoken'
    path.write_text(''.join(f'{base64.b64encode(token).decode()} {rank}\n'
                            for token, rank in ranks.items()))
    values = formats.read_tiktoken(path, pattern=None)
    encoding = tiktoken_of(path, None)
    assert encode_plainly(values, 'abcd') == encoding.encode('abcd') == [259]
    assert encode_plainly(values, 'abcdd') == encoding.encode('abcdd') == [97, 256, 100, 100]
    formats.write_tokenizer_json(values, tmp_path / 'whole.json')
    assert formats.read(tmp_path / 'whole.json') == values
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / 'whole.json'))
    assert hf_ids(hf, 'abcd') == [259] and hf_ids(hf, 'abcdd') == [97, 256, 100, 100]
    with pytest.raises(ValueError, match="takes a piece whole.* would use b'abcd' .id 259."):
        formats.write_tiktoken({**values, 'ignore_merges': False}, tmp_path / 'other.tiktoken')
    assert not (tmp_path / 'other.tiktoken').exists()


def test_unknown_tokens_options_that_cannot_matter(tmp_path):
    plain = read_file(tmp_path, byte_level_file(['a b']))
    assert read_file(tmp_path, byte_level_file(['a b'], unk_token='<unk>', fuse_unk=True)) == plain
