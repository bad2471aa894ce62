"""interchange.py against tiktoken, tokenizers and transformers, whose files it reads and writes.

Run: pytest tests/test_interchange.py
"""

import base64
import json
import os
import random
import unicodedata
from pathlib import Path

import pytest
import regex
import tiktoken
from conftest import load_or_skip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tokenizer
from tokenizer import base, bpe, formats, patterns

tokenizers = pytest.importorskip('tokenizers')
transformers = pytest.importorskip('transformers')

TEXTS = [
    '', ' ', 'Hello world', "I'll say: it's, IT'S, we'Ve, they'RE, l'été, 'ſ 'Ll '", 'a' * 300, ' ' * 90 + 'x',
    'def f(x):\n\treturn {"a": [1, 2.5e-10]}\r\n\r\n    # done\n', 'a\r\nb\rc\n\n\n  \n d \t\t e  ',
    '123456 12 3٣٤ Ⅷ ½ ²', '안녕하세요 세계! \u1100\u1161\u11a8 각', '日本語のテキスト、中文文本。', 'Здравствуй, мир',
    'שָׁלוֹם עולם', 'नमस्ते दुनिया', 'e\u0301 ﬁ ß İ ŉ ǅ ʕ', '🙂👩\u200d👩\u200d👧\u200d👦 🇩🇪🏳️\u200d🌈',
    '\x00\x01\x0b\x0c\x1c\x1f\x7f\x85\xa0\u2028\u3000\ufeff\uffff \u200b x',
    'HTTPServer CamelCase snake_case __init__ <|endoftext|> <|fim_prefix|>', '\U0010ffff\ue000 !!!...???///\n/',
]
# characters from which a random text is mostly made of pattern's borders
NASTY = list(" \t\n\r\x0b\x0c\x85\xa0\u2028\u3000'’sStTſrReEvVlLmMdDK09٣½²aAéÉßǅʰªЖжﬁ中각ि́🙂_-/.!<|>") + ['\r\n', '  ']
nasty_text = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(NASTY), max_size=60).map(''.join))
# every character but those of the planes without scripts, and Han and Hangul syllables, which are many and alike
SCRIPTS = ''.join(map(chr, [*range(0x3500), *range(0x9f00, 0xad00), *range(0xd700, 0xd800), *range(0xf900, 0x20100)]))
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # for all examples of a test


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
    """A vocabulary of 600 tokens, as a description."""
    return formats.describe('small', *learnt(), patterns.PATTERNS['gpt4'], {'<|endoftext|>': 700}, False)


def learnt(n=344):
    """{token: id} and merges of a vocabulary learnt from TEXTS and this file."""
    texts = [*TEXTS, Path(__file__).read_text(encoding='utf-8')]
    pairs = bpe.learn(bpe.count_pieces(texts, patterns.PATTERNS['gpt4'], workers=1), n)
    tokens = bpe.token_bytes(pairs)
    return {token: i for i, token in enumerate(tokens)}, [(tokens[left], tokens[right]) for left, right in pairs]


def encode_plainly(values, text):
    """What a description says, step by step."""
    printable_ids = dict(zip(map(patterns.BYTE_TO_CHAR.get, range(256)), values['byte_ids'] or range(256), strict=True))
    merges = [tuple(merge.split(' ')) for merge in values['merges']]
    merge_ids = values['merge_ids'] or range(256, 256 + len(merges))
    printable_ids |= {''.join(merge): i for merge, i in zip(merges, merge_ids, strict=True)}
    ids = []
    for piece in patterns.split(text, values['pattern']):
        parts = [patterns.BYTE_TO_CHAR[byte] for byte in piece.encode()]
        if values['ignore_merges'] and ''.join(parts) in printable_ids:
            parts = [''.join(parts)]
        while set(pairs := list(zip(parts, parts[1:], strict=False))) & set(merges):
            i = pairs.index(next(merge for merge in merges if merge in pairs))
            parts[i:i + 2] = [''.join(parts[i:i + 2])]
        ids += [printable_ids[part] for part in parts]
    return ids


def hf_ids(hf, text):
    return hf.encode(text, add_special_tokens=False).ids


def tiktoken_of(path, pattern):
    """tiktoken's own encoding with the ranks of a file."""
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, Path(path).read_text().splitlines())}
    # tiktoken needs some pattern; this one takes all of a text
    return tiktoken.Encoding('test', pat_str=pattern or r'[\s\S]+', mergeable_ranks=ranks, special_tokens={})


# ----------------------------------------------------------------------------------------------------------------------
# the published vocabularies

@pytest.mark.parametrize('name', ['gpt2', 'cl100k_base'])
def test_published_gives_the_same_ids_in_tokenizers(name, published, hf_folders):
    encoding = tiktoken.get_encoding(name)
    hf = tokenizers.Tokenizer.from_file(str(hf_folders[name] / 'tokenizer.json'))
    fast = transformers.AutoTokenizer.from_pretrained(hf_folders[name])
    for text in TEXTS:
        assert hf_ids(hf, text) == encoding.encode(text, allowed_special='all')
        assert fast(text, add_special_tokens=False)['input_ids'] == hf_ids(hf, text)
        assert fast.decode(hf_ids(hf, text)) == hf.decode(hf_ids(hf, text), skip_special_tokens=False) == text
    assert published[name]['special_tokens'] == encoding._special_tokens
    assert fast.eos_token_id == fast.bos_token_id == encoding.eot_token

    @given(nasty_text)
    @settings(max_examples=300)
    def same(text):
        assert hf_ids(hf, text) == encoding.encode(text, allowed_special='all')
    same()


@pytest.mark.parametrize('name', ['gpt2', 'cl100k_base'])
def test_this_programs_tokenizer_of_a_published_file(name, published):
    ours, encoding = tokenizer.from_dict(published[name]), tiktoken.get_encoding(name)
    assert ours.to_dict() == published[name] and ours.vocab_size == encoding.n_vocab
    for text in TEXTS:
        assert ours.encode(text, 'all') == encoding.encode(text, allowed_special='all')
        assert ours.encode_array(text).tolist() == encoding.encode_ordinary(text)


@pytest.mark.parametrize('name', ['gpt2', 'cl100k_base'])
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
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(hf_folders['gpt2'] / 'tokenizer.json'))
    encoding = tiktoken.get_encoding('gpt2')
    for text in TEXTS:
        assert fast(text)['input_ids'] == encoding.encode(text, allowed_special='all')


# ----------------------------------------------------------------------------------------------------------------------
# files that tokenizers and transformers made

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
    return pre.Sequence([pre.Split(tokenizers.Regex(pattern), 'isolated'), byte_level]) if pattern else byte_level


@pytest.mark.parametrize('pattern', ['gpt2', 'gpt4', 'o200k', None])
def test_reads_what_tokenizers_trained(pattern, tmp_path):
    pre_tokenizer = (tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False) if pattern == 'gpt2' else
                     pre_tokenizers_of(patterns.PATTERNS.get(pattern)))
    theirs = trained_by_tokenizers([*TEXTS, Path(__file__).read_text(encoding='utf-8')], 700, pre_tokenizer)
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


QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
        r"|\s+")  # as its tokenizer.json has it


def published_like(family):
    """A small vocabulary in the way of SmolLM2's, Qwen's or Llama 3's tokenizer.json, trained by tokenizers."""
    pre = tokenizers.pre_tokenizers
    pre_tokenizer = {
        'smollm2': lambda: pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]),
        'qwen': lambda: pre_tokenizers_of(QWEN),
        'llama 3': lambda: pre_tokenizers_of(QWEN.replace(r'\p{N}|', r'\p{N}{1,3}|')),
    }[family]()
    hf = trained_by_tokenizers([*TEXTS, Path(__file__).read_text(encoding='utf-8')], 700, pre_tokenizer,
                               ignore_merges=family == 'llama 3')
    hf.add_special_tokens(['<|im_start|>', '<|im_end|>'])
    hf.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False) for token in ('<think>', '</think>')])
    if family == 'qwen':
        hf.normalizer = tokenizers.normalizers.NFC()
    if family == 'llama 3':
        hf.post_processor = tokenizers.processors.Sequence([
            tokenizers.processors.ByteLevel(trim_offsets=False),
            tokenizers.processors.TemplateProcessing(single='<s> $A', pair='<s> $A <s>:1 $B:1', special_tokens=[
                ('<s>', hf.token_to_id('<s>'))])])
    return hf


@pytest.mark.parametrize('family', ['smollm2', 'qwen', 'llama 3'])
def test_published_families(family, tmp_path):
    """Read, used, saved, loaded and written again: the ids of tokenizers, by every way to encode."""
    theirs = published_like(family)
    theirs.save(str(tmp_path / 'tokenizer.json'))
    values = formats.read(tmp_path)
    ours = tokenizer.from_dict(values)
    assert values['pattern'] == patterns.PATTERNS[{'qwen': 'qwen2', 'llama 3': 'gpt4'}.get(family, family)]
    assert ours.normalizer == ('NFC' if family == 'qwen' else None)
    assert ours.bos_token == ('<s>' if family == 'llama 3' else None)
    assert ours.visible_tokens == ['<think>', '</think>'] and ours.is_fast
    ours.save(tmp_path / 'own.json')
    assert tokenizer.load(tmp_path / 'own.json').to_dict() == ours.to_dict() == values
    formats.write_tokenizer_json(values, tmp_path / 'again.json')
    again = tokenizers.Tokenizer.from_file(str(tmp_path / 'again.json'))
    assert formats.read(tmp_path / 'again.json') == values
    assert again.encode('a', 'b').ids == theirs.encode('a', 'b').ids  # with what a post-processor adds
    marks = '<|im_start|>a <think>e\u0301</think>\u0338<|im_end|>\u0338'
    for text in [*TEXTS, marks]:
        assert ours.encode(text, 'all') == hf_ids(theirs, text) == hf_ids(again, text)
    ids = hf_ids(theirs, marks)
    assert again.decode(ids) == theirs.decode(ids) and '<think>' in theirs.decode(ids)

    @given(nasty_text.filter(lambda text: not any(token in text for token in values['special_tokens'])))
    @settings(max_examples=300)
    def same(text):
        expected = hf_ids(theirs, text)
        assert encode_plainly(values, patterns.normalize(text, ours.normalizer)) == expected
        assert ours.encode(text) == ours.encode_array(text).tolist() == ours.encode(text.encode()) == expected
        assert ours.encode_batch([text, 'a'])[0].tolist() == list(ours.encode_iterable(text)) == expected
        assert ours.decode(expected) == (unicodedata.normalize('NFC', text) if ours.normalizer else text)
    same()


@pytest.mark.parametrize('pattern', ['qwen2', None, r'\S+|\s+'])
def test_nfc_in_a_stream(pattern, monkeypatch):
    """Wherever a stream is cut, the ids are those of the whole text, whose parts may compose over a cut."""
    monkeypatch.setattr(base, 'STREAM_CHARS', 4)
    values = {**formats.BYTES, 'pattern': patterns.PATTERNS.get(pattern, pattern), 'normalizer': 'NFC',
              'merges': ['e s', 'Ã ©']}  # es, é
    ours = tokenizer.from_dict(values)
    composing = st.text('es= \n\u0301\u0327\u0338\u1100\u1161\u11a8\uac00\u212b🙂', max_size=40)

    @given(composing)
    @settings(max_examples=300)
    def same(text):
        ids = ours.encode(text)
        assert list(ours.encode_iterable(list(text))) == ids
        assert ours.decode(ids) == unicodedata.normalize('NFC', text)
        assert ours.decode_bytes(ours.encode(text.encode() + b'\xff')) == ours.decode_bytes(ids) + b'\xff'
    same()


def test_nfc_is_that_of_tokenizers():
    """Whatever Unicode this Python is at: every character alone, and between marks that it may change places with."""
    theirs = tokenizers.normalizers.NFC()
    marks = ['{}', 'a{}\u0334', 'a\u0345{}', 'a\u0301{}', 'a\u0327{}\u0301', '\U000105d2{}', '\U00011935{}']
    for form in marks:
        text = '\n'.join(map(form.format, SCRIPTS))
        assert patterns.normalize(text, 'NFC') == theirs.normalize_str(text), form


def test_digits_apart():
    """SmolLM2's two steps as one pattern: white space before a digit is cut off with what precedes it."""
    pre = tokenizers.pre_tokenizers
    theirs = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])

    def same(text):
        expected = [piece for piece, _ in theirs.pre_tokenize_str(text)]
        assert [patterns.printable(piece.encode()) for piece in patterns.split(text, patterns.PATTERNS['smollm2'])] == expected

    same("a  12  b 3's  '5 \n\n6\t٣½ x")
    rng = random.Random(0)
    for _ in range(3000):
        same(''.join(rng.choices([*NASTY, '5'], k=rng.randint(1, 12))))
    # Digits knows Unicode 17, in which 13 were new
    known = [char for char in SCRIPTS if not (0x11de0 <= ord(char) < 0x11dea or 0x16ff4 <= ord(char) < 0x16ff7)]
    same(''.join(known))
    rng.shuffle(known)
    same(''.join(known))


@pytest.mark.parametrize('kind', ['char', 'word'])
def test_characters_and_words_as_a_tokenizer_json(kind, tmp_path):
    text = ' '.join(TEXTS).replace('<|endoftext|>', '')
    ours = tokenizer.CharTokenizer.from_text(text) if kind == 'char' else tokenizer.WordTokenizer.train(text, 100)
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
@given(st.lists(st.text('ab', max_size=12), min_size=1, max_size=8), st.lists(st.text('ab ', max_size=30), max_size=8))
def test_a_token_made_in_two_ways(tmp_path, words, texts):
    """tokenizers' trainer learns (a, bb) and later (ab, b) too, when both come up, for the one token abb."""
    theirs = trained_by_tokenizers(words, 300, pre_tokenizers_of(None))
    theirs.save(str(tmp_path / 'tokenizer.json'))
    values = formats.read(tmp_path)
    for text in words + texts:
        assert encode_plainly(values, text) == hf_ids(theirs, text)


def byte_level_file(merges, more_tokens=(), /, **model):
    """The content of a tokenizer.json without pattern: the bytes have the ids 0 to 255, then the merges' tokens."""
    vocab = {char: byte for byte, char in patterns.BYTE_TO_CHAR.items()}
    for token in [*(merge.replace(' ', '') for merge in merges), *more_tokens]:
        vocab.setdefault(token, len(vocab))
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
    return {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [], 'normalizer': None,
            'pre_tokenizer': byte_level, 'post_processor': None, 'decoder': byte_level,
            'model': {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
                      'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False,
                      'vocab': vocab, 'merges': list(merges), **model}}


def read_file(tmp_path, content):
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content), encoding='utf-8')
    return formats.read_tokenizer_json(tmp_path / 'tokenizer.json')


def test_two_ways_by_hand(tmp_path):
    """ab + b is listed before a + bb, but bb is joined before ab: abb comes about by the second only."""
    values = read_file(tmp_path, byte_level_file(['b b', 'a b', 'ab b', 'a bb']))
    assert values['merges'] == ['b b', 'a b', 'a bb']
    assert encode_plainly(values, 'abbb') == [258, ord('b')]


@st.composite
def any_merges(draw):
    """Merges as no training would list them: in any order, several for one token, some that are never reached."""
    tokens = draw(st.lists(st.text('ab', min_size=2, max_size=5), min_size=1, max_size=8, unique=True))
    tokens_and_bytes = {*tokens, 'a', 'b'}
    merges = [f'{token[:i]} {token[i:]}' for token in tokens for i in range(1, len(token))
              if token[:i] in tokens_and_bytes and token[i:] in tokens_and_bytes]
    random.Random(draw(st.integers(0, 999))).shuffle(merges)
    return merges[:draw(st.integers(0, len(merges)))], tokens


@given(any_merges(), st.booleans(), st.lists(st.text('ab', max_size=20), min_size=1))
@settings(same_folder, max_examples=400)
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
        assert encode_plainly(values, text) == hf_ids(theirs, text) == hf_ids(ours, text) == this.encode_ordinary(text)
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
@settings(same_folder, max_examples=300)
def test_any_ranks_are_read_exactly_or_refused(tmp_path, tokens, texts):
    ranks = {bytes([byte]): byte for byte in range(256)} | {t.encode(): 256 + i for i, t in enumerate(tokens)}
    path = tmp_path / 'any.tiktoken'
    path.write_text(''.join(f'{base64.b64encode(token).decode()} {rank}\n' for token, rank in ranks.items()))
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
    """transformers makes tokenizer.json of a tiktoken file by listing every way to split every token."""
    converter = pytest.importorskip('transformers.convert_slow_tokenizer').TikTokenConverter
    formats.write_tiktoken(small, tmp_path / 'tokenizer.model')
    theirs = converter(vocab_file=str(tmp_path / 'tokenizer.model'), pattern=patterns.PATTERNS['gpt4'],
                       extra_special_tokens=['<|begin_of_text|>']).converted()
    theirs.save(str(tmp_path / 'tokenizer.json'))
    listed = json.loads((tmp_path / 'tokenizer.json').read_text(encoding='utf-8'))['model']['merges']
    values = formats.read(tmp_path / 'tokenizer.json')
    assert values['merges'] == small['merges'] and len(listed) > len(small['merges'])
    assert values['special_tokens'] == {'<|begin_of_text|>': 600}
    for text in TEXTS:
        assert encode_plainly(values, text) == hf_ids(theirs, text)


def test_a_token_taken_whole_only(tmp_path):
    """abc is the join of no two tokens that its bytes ever are: Llama 3 has such."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b'bc': 256, b'ab': 257, b'cd': 258, b'abcd': 259}
    path = tmp_path / 'whole.tiktoken'
    path.write_text(''.join(f'{base64.b64encode(token).decode()} {rank}\n' for token, rank in ranks.items()))
    values = formats.read(path, pattern=None)
    encoding = tiktoken_of(path, None)
    assert encode_plainly(values, 'abcd') == encoding.encode('abcd') == [259]
    assert encode_plainly(values, 'abcdd') == encoding.encode('abcdd') == [97, 256, 100, 100]
    formats.write_tokenizer_json(values, tmp_path / 'whole.json')
    assert formats.read(tmp_path / 'whole.json') == values
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / 'whole.json'))
    assert hf_ids(hf, 'abcd') == [259] and hf_ids(hf, 'abcdd') == [97, 256, 100, 100]
    with pytest.raises(ValueError, match="takes a piece whole.*b'abcd'"):
        formats.write_tiktoken({**values, 'ignore_merges': False}, tmp_path / 'other.tiktoken')
    assert not (tmp_path / 'other.tiktoken').exists()


def test_unknown_tokens_options_that_cannot_matter(tmp_path):
    plain = read_file(tmp_path, byte_level_file(['a b']))
    assert read_file(tmp_path, byte_level_file(['a b'], unk_token='<unk>', fuse_unk=True)) == plain


# ----------------------------------------------------------------------------------------------------------------------
# round trips

def test_round_trips(small, tmp_path):
    values = {**small, 'special_tokens': {'<|b|>': 600, '<|endoftext|>': 700, '<|a|>': 1000}}  # ids with gaps
    formats.write_tokenizer_json(values, tmp_path / 'a.json')
    assert formats.read(tmp_path / 'a.json') == values
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / 'a.json'))
    assert hf_ids(hf, 'a<|a|><|b|><|endoftext|>') == [97, 1000, 600, 700]
    shuffled = list(range(600))
    random.Random(1).shuffle(shuffled)
    values |= {'byte_ids': shuffled[:256], 'merge_ids': shuffled[256:], 'pattern': None}
    formats.write_hf_folder(values, tmp_path / 'folder')
    assert formats.read(tmp_path / 'folder') == values
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / 'folder' / 'tokenizer.json'))
    for text in TEXTS:
        if '<' not in text:
            assert hf_ids(hf, text) == encode_plainly(values, text)
    formats.write_tiktoken(small, tmp_path / 'a.tiktoken')
    assert formats.read(tmp_path / 'a.tiktoken', 'gpt4', {'<|endoftext|>': 700}) == small
    encoding = tiktoken_of(tmp_path / 'a.tiktoken', patterns.PATTERNS['gpt4'])
    for text in TEXTS:
        assert encoding.encode_ordinary(text) == encode_plainly(small, text)


def test_no_endoftext(small, tmp_path):
    formats.write_hf_folder({**small, 'special_tokens': {}}, tmp_path)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert fast.eos_token is None and fast.bos_token is None
    assert fast('def f(x):')['input_ids'] == encode_plainly(small, 'def f(x):')


def test_gpt2s_files_from_a_folder(small, tmp_path):
    vocab = {patterns.printable(token): i for token, i in formats.tokens_of(small)[0].items()} | {'<|endoftext|>': 600}
    for vocab_name, merges_name, end in [('vocab.json', 'merges.txt', '\n'), ('encoder.json', 'vocab.bpe', '\r\n')]:
        folder = tmp_path / vocab_name
        folder.mkdir()
        (folder / vocab_name).write_text(json.dumps(vocab))
        lines = ['#version: 0.2', *small['merges'], '']
        (folder / merges_name).write_bytes(end.join(lines).encode())
        expected = {**small, 'pattern': patterns.PATTERNS['gpt2'], 'special_tokens': {'<|endoftext|>': 600}}
        for path in (folder, folder / vocab_name, folder / merges_name):
            assert formats.read(path) == expected
    (folder / 'vocab.bpe').unlink()
    for path, message in [(folder, 'holds no vocabulary'), (folder / 'encoder.json', 'vocab.bpe, is missing')]:
        with pytest.raises(ValueError, match=message):
            formats.read(path)


def test_content_decides_not_the_name(small, tmp_path):
    formats.write_tokenizer_json(small, tmp_path / 'x.tiktoken')
    assert formats.read(tmp_path / 'x.tiktoken') == small
    formats.write_tiktoken(small, tmp_path / 'tokenizer.json')
    assert formats.read(tmp_path / 'tokenizer.json')['merges'] == small['merges']


def test_writing_is_all_or_nothing(small, tmp_path, monkeypatch):
    path = tmp_path / 'a.json'
    formats.write_tokenizer_json(small, path)
    before = path.read_bytes()
    formats.write_tokenizer_json(small, path)
    assert path.read_bytes() == before

    def full(descriptor):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(ValueError, match='No space'):
        formats.write_tokenizer_json({**small, 'pattern': None}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['a.json']


# ----------------------------------------------------------------------------------------------------------------------
# patterns

@pytest.mark.parametrize('pattern', [
    *patterns.PATTERNS.values(), r'\d|[^\d\s]+|\s++', r'\p{Lu}\p{Ll}*|\P{Lu}', r'[a-zà-ÿ\p{M}]+?|(?:\p{P}|\p{S}){2}|\(|\)',
    r'(?=[A-Z])(?:[A-Z][a-z]*)|[\r\n\t]', r'(?>a|ab)c|.', r'(?i:[sdmt]|ll|ve|re)', r'[^\S\n]+|\S+', r'(a)(b)*',
])
def test_a_portable_pattern_cuts_alike(pattern, tmp_path):
    formats.check_portable('x', pattern)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated')

    @given(nasty_text)
    @settings(max_examples=150)
    def same(text):
        assert patterns.split(text, pattern) == [piece for piece, _ in split.pre_tokenize_str(text)]
    same()
    everything = ''.join(map(chr, [*range(0xd800), *range(0xe000, 0x110000)]))
    if pattern in patterns.PATTERNS.values():
        assert patterns.split(everything, pattern) == [piece for piece, _ in split.pre_tokenize_str(everything)]


@pytest.mark.parametrize('pattern', [
    r'\p{N}{1,3}+', r'a$', r'^a', r'\w+', r'\h', r'\bx', r'(?i:ss)', r'(?i:\p{Lu})', r'(?i)a', r'(?m)a', r'[a-z&&[^b]]',
    r'[[:alpha:]]', r'\p{Han}+', r'(?<=a)b', r'(?P<n>a)(?P=n)', r'\s*', r'\s*(?=a)', r'b(a?(?=c))*', r'\X', r'a\K',
])
def test_other_patterns_are_refused(pattern, small, tmp_path):
    with pytest.raises(ValueError, match='split pattern'):
        formats.write_tokenizer_json({**small, 'pattern': pattern}, tmp_path / 'tokenizer.json')
    assert os.listdir(tmp_path) == []
    file = byte_level_file(['a b'])
    split = {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}
    file['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': [split, file['pre_tokenizer']]}
    with pytest.raises(ValueError, match='tokenizer.json.*split pattern'):
        read_file(tmp_path, file)


def test_why_they_are_refused():
    """Three of those patterns, read in two ways."""
    for pattern, text in [(r'\p{N}{1,3}+', '1234567'), (r'a$', 'a\nb'), (r'\w+', 'a²')]:
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), 'removed', invert=True)
        assert regex.findall(pattern, text) != [piece for piece, _ in split.pre_tokenize_str(text)]


# ----------------------------------------------------------------------------------------------------------------------
# refusals

def with_part(**parts):
    return {**byte_level_file(['a b', 'ab c']), **parts}


def added(**fields):
    return [{'id': 258, 'content': '<x>', 'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False,
             'special': True, **fields}]


BYTE_LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
SPLIT = {'type': 'Split', 'pattern': {'Regex': r'\s+|\S+'}, 'behavior': 'Isolated', 'invert': False}


@pytest.mark.parametrize('content, message', [
    ([], "expected an object with the key 'model'"),
    (with_part(model=3), "expected an object with the key 'model'"),
    (byte_level_file([], type='WordPiece'), 'type is "WordPiece"'),
    (byte_level_file([], type='Unigram'), 'type is "Unigram"'),
    (byte_level_file([], type='WordLevel'), 'type is "WordLevel"'),
    (byte_level_file(['a b'], dropout=0.1), 'dropout is 0.1'),
    (byte_level_file(['a b'], byte_fallback=True), 'byte_fallback is true'),
    (byte_level_file(['a b'], continuing_subword_prefix='##'), 'continuing_subword_prefix is "##"'),
    (byte_level_file(['a b'], end_of_word_suffix='</w>'), 'end_of_word_suffix is "</w>"'),
    (byte_level_file(['a b'], vocab=[1]), r'vocab is \[1\]'),
    (byte_level_file(['a b'], vocab={'a': '1'}), 'vocab is {"a": "1"}'),
    (byte_level_file(['a b'], merges='a b'), 'merges are "a b"'),
    (with_part(normalizer={'type': 'NFKC'}), 'normalizer is {"type": "NFKC"}.*"normalizer": null'),
    (with_part(normalizer={'type': 'NFC'}, added_tokens=added(normalized=True)), "'<x>' is looked for in normalized"),
    (with_part(decoder={'type': 'Metaspace'}), 'decoder is .*Metaspace'),
    (with_part(pre_tokenizer=None), 'pre_tokenizer is null'),
    (with_part(pre_tokenizer={'type': 'Metaspace'}), 'pre_tokenizer is .*Metaspace.*expected ByteLevel'),
    (with_part(pre_tokenizer={'type': 'Sequence', 'pretokenizers': [{'type': 'Digits'}, BYTE_LEVEL]}), 'Digits'),
    (with_part(pre_tokenizer={'type': 'Sequence', 'pretokenizers': 3}), 'pre_tokenizer is'),
    (with_part(pre_tokenizer={**BYTE_LEVEL, 'add_prefix_space': True}), 'add_prefix_space'),
    (with_part(pre_tokenizer={'type': 'Sequence', 'pretokenizers': [SPLIT, BYTE_LEVEL]}), 'pre_tokenizer is'),
    (with_part(pre_tokenizer={'type': 'Sequence', 'pretokenizers': [
        {**SPLIT, 'behavior': 'Removed', 'invert': True}, {**BYTE_LEVEL, 'use_regex': False}]}), 'pre_tokenizer is'),
    (with_part(added_tokens={}), None),
    (with_part(added_tokens=3), 'added_tokens is 3'),
    (with_part(added_tokens=['<x>']), r'added_tokens\[0\] is "<x>"'),
    (with_part(added_tokens=added(lstrip=True)), "'<x>'.* has lstrip"),
    (with_part(added_tokens=added(rstrip=True)), "'<x>'.* has rstrip"),
    (with_part(added_tokens=added(single_word=True)), "'<x>'.* has single_word"),
    (with_part(added_tokens=added(content='   ', special=False)), "'   '.* is not special"),
    (with_part(added_tokens=added(id=300)), 'id 300, but tokenizers gives it 258'),
    (with_part(added_tokens=added(id='258')), "id '258'"),
    (byte_level_file(['a b'], ['▁the']), "'▁the'.*byte alphabet"),
    (byte_level_file(['a b'], ['abc']), "no merges lead to the token 'abc'"),
    (byte_level_file(['a b'], merges=['a b', 'a']), r'merges\[1\]: \["a"\] is no merge'),
    (byte_level_file(['a b'], merges=[['a', 1]]), r'merges\[0\]: \["a", 1\] is no merge'),
    (byte_level_file(['a b'], merges=['a b', 'ab c']), r"merges\[1\]: the merge 'ab c' needs the token 'abc'"),
    (byte_level_file(['a b'], merges=['a b', 'x y']), r"merges\[1\]: the merge 'x y' needs the token 'xy'"),
    (byte_level_file([], vocab={'a': 0, 'b': 1}), '254 of the 256 bytes are no tokens .0x00, .*and 244 more'),
])
def test_what_a_tokenizer_json_is_refused_for(content, message, tmp_path):
    if message is None:
        assert read_file(tmp_path, content)['special_tokens'] == {}
        return
    with pytest.raises(ValueError, match=message) as error:
        read_file(tmp_path, content)
    assert 'tokenizer.json' in str(error.value) and 'expected' in str(error.value)


def test_the_same_id_twice(tmp_path):
    file = byte_level_file(['a b', 'b c'])
    file['model']['vocab']['bc'] = 256
    with pytest.raises(ValueError, match="tokens b'ab' and b'bc' have the same id 256"):
        read_file(tmp_path, file)
    file['model']['vocab']['bc'] = -1
    with pytest.raises(ValueError, match="b'bc' has the id -1"):
        read_file(tmp_path, file)


def test_a_key_twice_and_truncation(small, tmp_path):
    path = tmp_path / 'tokenizer.json'
    formats.write_tokenizer_json(small, path)
    text = path.read_text(encoding='utf-8')
    path.write_text(text.replace('"Ā": 0,', '"Ā": 0, "Ā": 5,'), encoding='utf-8')
    with pytest.raises(ValueError, match='the key "Ā" stands there twice'):
        formats.read(path)
    for size in (1, 100, len(text) // 2, len(text) - 3):
        path.write_text(text[:size], encoding='utf-8')
        with pytest.raises(ValueError, match='tokenizer.json is damaged or truncated.*fetch it again'):
            formats.read(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match='byte 7 is not UTF-8 .0xff'):
        formats.read(path)
    path.write_text('{"a":' + '[' * 100_000)
    with pytest.raises(ValueError, match='damaged'):
        formats.read(path)


def test_truncated_merges(small, tmp_path):
    vocab = {patterns.printable(token): i for token, i in formats.tokens_of(small)[0].items()} | {'<s>': 600}
    (tmp_path / 'vocab.json').write_text(json.dumps(vocab))
    for kept, message in [(small['merges'][:200], 'no merges lead to'), ([*small['merges'][:-1], 'Ġ'], 'line 345')]:
        (tmp_path / 'merges.txt').write_text('\n'.join(['#version: 0.2', *kept]), encoding='utf-8')
        with pytest.raises(ValueError, match=f'merges.txt.*{message}'):
            formats.read(tmp_path)


@pytest.mark.parametrize('damage, message', [
    (lambda lines: [*lines[:300], 'YQ==', *lines[301:]], "line 301: b'YQ=='"),
    (lambda lines: [*lines[:300], 'YQ== 1 2', *lines[301:]], "line 301: b'YQ== 1 2'"),
    (lambda lines: [*lines[:300], 'Y!== 300', *lines[301:]], "line 301: b'Y!== 300'"),
    (lambda lines: [*lines[:300], 'YWI= -3', *lines[301:]], "line 301: b'YWI= -3'"),
    (lambda lines: [*lines[:300], 'YQ== 300', *lines[301:]], "line 301: the token b'a' has rank 300.* already .* 97"),
    (lambda lines: [*lines[:-1], lines[-1][:-1]], 'have the same id 59'),
    (lambda lines: lines[1:], r'1 of the 256 bytes are no tokens \(0x00\)'),
    (lambda lines: lines[:100], r'156 of the 256 bytes'),
])
def test_damaged_tiktoken(damage, message, small, tmp_path):
    path = tmp_path / 'a.tiktoken'
    formats.write_tiktoken(small, path)
    path.write_text('\n'.join(damage(path.read_text().splitlines())))
    with pytest.raises(ValueError, match=message) as error:
        formats.read_tiktoken(path)
    assert 'a.tiktoken' in str(error.value)


def test_damaged_published_file(small, tmp_path):
    path = tmp_path / 'cl100k_base.tiktoken'
    formats.write_tiktoken(small, path)
    with pytest.raises(ValueError, match='not the published cl100k_base: its SHA-256 is .{64}, expected 223921b'):
        formats.read(path)


def test_tiktoken_options(small, tmp_path):
    path = tmp_path / 'a.tiktoken'
    formats.write_tiktoken(small, path)
    assert formats.read(path, pattern=r'\s+|\S+')['pattern'] == r'\s+|\S+'
    for options, message in [({'pattern': 'gtp4'}, "unknown split pattern 'gtp4'"),
                             ({'pattern': '(a'}, 'not a regular expression'),
                             ({'special_tokens': {'<x>': 300}}, 'and <x> have the same id 300')]:
        with pytest.raises(ValueError, match=message):
            formats.read(path, **options)


def test_what_tiktoken_cannot_do(tmp_path):
    path = tmp_path / 'a.tiktoken'
    falling = {**read_file(tmp_path, byte_level_file(['a b', 'c d'])), 'merge_ids': [257, 256]}
    with pytest.raises(ValueError, match=r"'ab' \(id 257\) is merged before 'cd' \(id 256\)"):
        formats.write_tiktoken(falling, path)
    # abc is b + c first, then a + bc, which is no merge here; tiktoken would join a and bc too
    other = read_file(tmp_path, byte_level_file(['b c', 'a b', 'ab c']))
    with pytest.raises(ValueError, match=r"would make b'abc' \(id 258\)"):
        formats.write_tiktoken(other, path)
    with pytest.raises(ValueError, match="kind 'byte'"):
        formats.write_tiktoken({'kind': 'byte'}, path)
    assert not path.exists()


def test_a_special_token_that_reads_like_another(small, tmp_path):
    with pytest.raises(ValueError, match="special token 'a' .id 600. has the name of the token b'a' .id 97"):
        formats.write_tokenizer_json({**small, 'special_tokens': {'a': 600}}, tmp_path / 'tokenizer.json')


@pytest.mark.parametrize('name, content, message', [
    ('x', b'', 'unknown content'), ('x', b'hello world, this is text', 'unknown content'),
    ('x', b'{"a": []}', 'unknown content'), ('tokenizer.pkl', b'\x80\x04\x95', 'a pickle'),
    ('tokenizer.model', b'\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02', 'a SentencePiece model'),
    ('own.json', b'{"kind": "bpe", "version": 1}', "own format, of kind \"bpe\""),
    ('a.json', b'{"a": 1}', "name does not say what the other is called"),
])
def test_unknown_content(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        formats.read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match='absent does not exist; expected tiktoken'):
        formats.read(tmp_path / 'absent')
    with pytest.raises(ValueError, match='holds no vocabulary .it is empty.'):
        formats.read(tmp_path)
