"""tokenizer/formats.py: round trips, patterns, refusals. Run: pytest
tests/test_formats_refusals.py"""

import json
import os
import random

import pytest
import regex
from format_cases import (
    TEXTS,
    byte_level_file,
    encode_plainly,
    hf_ids,
    make_small,
    nasty_text,
    read_file,
    tiktoken_of,
)
from hypothesis import given, settings

from tokenizer import formats, patterns, tokenizer_json, vocabulary

tokenizers = pytest.importorskip('tokenizers')
transformers = pytest.importorskip('transformers')


@pytest.fixture(scope='module')
def small():
    return make_small()


# Round trips --------------------------------------------------------------------------------------

def test_round_trips(small, tmp_path):
    # ids with gaps
    values = {**small, 'special_tokens': {'<|b|>': 600, '<|endoftext|>': 700, '<|a|>': 1000}}
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
    assert formats.read_tiktoken(tmp_path / 'a.tiktoken', 'gpt4', {'<|endoftext|>': 700}) == small
    encoding = tiktoken_of(tmp_path / 'a.tiktoken', patterns.PATTERNS['gpt4'])
    for text in TEXTS:
        assert encoding.encode_ordinary(text) == encode_plainly(small, text)


def test_no_endoftext(small, tmp_path):
    formats.write_hf_folder({**small, 'special_tokens': {}}, tmp_path)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert fast.eos_token is None and fast.bos_token is None
    assert fast('def f(x):')['input_ids'] == encode_plainly(small, 'def f(x):')


def test_gpt2s_files_from_a_folder(small, tmp_path):
    vocab = {patterns.printable(token): i
             for token, i in vocabulary.tokens_of(small)[0].items()} | {'<|endoftext|>': 600}
    for vocab_name, merges_name, end in [('vocab.json', 'merges.txt', '\n'),
                                         ('encoder.json', 'vocab.bpe', '\r\n')]:
        folder = tmp_path / vocab_name
        folder.mkdir()
        (folder / vocab_name).write_text(json.dumps(vocab))
        lines = ['#version: 0.2', *small['merges'], '']
        (folder / merges_name).write_bytes(end.join(lines).encode())
        expected = {**small, 'pattern': patterns.PATTERNS['gpt2'],
                    'special_tokens': {'<|endoftext|>': 600}}
        for path in (folder, folder / vocab_name, folder / merges_name):
            assert formats.read(path) == expected
    (folder / 'vocab.bpe').unlink()
    for path, message in [(folder, 'holds no vocabulary'),
                          (folder / 'encoder.json', 'copy the other, .*vocab.bpe')]:
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


# Patterns -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('pattern', [
    *patterns.PATTERNS.values(), r'\d|[^\d\s]+|\s++', r'\p{Lu}\p{Ll}*|\P{Lu}',
    r'[a-zà-ÿ\p{M}]+?|(?:\p{P}|\p{S}){2}|\(|\)',
    r'(?=[A-Z])(?:[A-Z][a-z]*)|[\r\n\t]', r'(?>a|ab)c|.', r'(?i:[sdmt]|ll|ve|re)', r'[^\S\n]+|\S+',
    r'(a)(b)*',
])
def test_a_portable_pattern_cuts_alike(pattern, tmp_path):
    tokenizer_json.check_portable('x', pattern)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated')

    @given(nasty_text)
    @settings(max_examples=150)
    def same(text):
        assert patterns.split(text, pattern) == [piece for piece, _ in split.pre_tokenize_str(text)]
    same()
    everything = ''.join(map(chr, [*range(0xd800), *range(0xe000, 0x110000)]))
    if pattern in patterns.PATTERNS.values():
        assert (patterns.split(everything, pattern)
                == [piece for piece, _ in split.pre_tokenize_str(everything)])


@pytest.mark.parametrize('pattern', [
    r'\p{N}{1,3}+', r'a$', r'^a', r'\w+', r'\h', r'\bx', r'(?i:ss)', r'(?i:\p{Lu})', r'(?i)a',
    r'(?m)a', r'[a-z&&[^b]]',
    r'[[:alpha:]]', r'\p{Han}+', r'(?<=a)b', r'(?P<n>a)(?P=n)', r'\s*', r'\s*(?=a)', r'b(a?(?=c))*',
    r'\X', r'a\K',
])
def test_other_patterns_are_refused(pattern, small, tmp_path):
    with pytest.raises(ValueError, match='split pattern'):
        formats.write_tokenizer_json({**small, 'pattern': pattern}, tmp_path / 'tokenizer.json')
    assert os.listdir(tmp_path) == []
    file = byte_level_file(['a b'])
    split = {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated',
             'invert': False}
    file['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': [split, file['pre_tokenizer']]}
    with pytest.raises(ValueError, match='tokenizer.json.*split pattern'):
        read_file(tmp_path, file)


def test_why_they_are_refused():
    """Three of those patterns, read in two ways."""
    for pattern, text in [(r'\p{N}{1,3}+', '1234567'), (r'a$', 'a\nb'), (r'\w+', 'a²')]:
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), 'removed', invert=True)
        assert regex.findall(pattern, text) != [piece for piece, _ in split.pre_tokenize_str(text)]


# Refusals -----------------------------------------------------------------------------------------

def with_part(**parts):
    return {**byte_level_file(['a b', 'ab c']), **parts}


def added(**fields):
    return [{'id': 258, 'content': '<x>', 'single_word': False, 'lstrip': False, 'rstrip': False,
             'normalized': False,
             'special': True, **fields}]


BYTE_LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True,
              'use_regex': True}
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
    (with_part(decoder={'type': 'Metaspace'}), 'decoder is .*Metaspace'),
    (with_part(pre_tokenizer=None), 'pre_tokenizer is null'),
    (with_part(pre_tokenizer={'type': 'Metaspace'}),
     'pre_tokenizer is .*Metaspace.*expected ByteLevel'),
    (with_part(pre_tokenizer={'type': 'Sequence',
                              'pretokenizers': [{'type': 'Digits'}, BYTE_LEVEL]}), 'Digits'),
    (with_part(pre_tokenizer={'type': 'Sequence', 'pretokenizers': 3}), 'pre_tokenizer is'),
    (with_part(pre_tokenizer={**BYTE_LEVEL, 'add_prefix_space': True}), 'add_prefix_space'),
    (with_part(pre_tokenizer={'type': 'Sequence', 'pretokenizers': [SPLIT, BYTE_LEVEL]}),
     'pre_tokenizer is'),
    (with_part(pre_tokenizer={'type': 'Sequence', 'pretokenizers': [
        {**SPLIT, 'behavior': 'Removed', 'invert': True}, {**BYTE_LEVEL, 'use_regex': False}]}),
        'pre_tokenizer is'),
    (with_part(added_tokens={}), None),
    (with_part(added_tokens=3), 'added_tokens is 3'),
    (with_part(added_tokens=['<x>']), r'added_tokens\[0\] is "<x>"'),
    (with_part(added_tokens=added(content='à', special=False, id=224)), "'à' has the id of the bytes b'.xe0'"),
    (with_part(added_tokens=added(id=300)), 'id 300, but tokenizers gives it 258'),
    (with_part(added_tokens=added(id='258')), "id '258'"),
    (byte_level_file(['a b'], ['▁the']), "'▁the'.*byte alphabet"),
    (byte_level_file(['a b'], ['abc']), "no merges lead to the token 'abc'"),
    (byte_level_file(['a b'], merges=['a b', 'a']), r'merges\[1\]: \["a"\] is no merge'),
    (byte_level_file(['a b'], merges=[['a', 1]]), r'merges\[0\]: \["a", 1\] is no merge'),
    (byte_level_file(['a b'], merges=['a b', 'ab c']),
     r"merges\[1\]: the merge 'ab c' needs the token 'abc'"),
    (byte_level_file(['a b'], merges=['a b', 'x y']),
     r"merges\[1\]: the merge 'x y' needs the token 'xy'"),
    (byte_level_file([], vocab={'a': 0, 'b': 1}),
     '254 of the 256 bytes are no tokens .0x00, .*and 244 more'),
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
        with pytest.raises(ValueError,
                           match='tokenizer.json is damaged or truncated.*fetch it again'):
            formats.read(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match='byte 7 is not UTF-8 .0xff'):
        formats.read(path)
    path.write_text('{"a":' + '[' * 100_000)
    with pytest.raises(ValueError, match='damaged'):
        formats.read(path)


def test_truncated_merges(small, tmp_path):
    vocab = {patterns.printable(token): i
             for token, i in vocabulary.tokens_of(small)[0].items()} | {'<s>': 600}
    (tmp_path / 'vocab.json').write_text(json.dumps(vocab))
    for kept, message in [(small['merges'][:200], 'no merges lead to'),
                          ([*small['merges'][:-1], 'Ġ'], 'line 345')]:
        (tmp_path / 'merges.txt').write_text('\n'.join(['#version: 0.2', *kept]), encoding='utf-8')
        with pytest.raises(ValueError, match=f'merges.txt.*{message}'):
            formats.read(tmp_path)


@pytest.mark.parametrize('damage, message', [
    (lambda lines: [*lines[:300], 'YQ==', *lines[301:]], "line 301: b'YQ=='"),
    (lambda lines: [*lines[:300], 'YQ== 1 2', *lines[301:]], "line 301: b'YQ== 1 2'"),
    (lambda lines: [*lines[:300], 'Y!== 300', *lines[301:]], "line 301: b'Y!== 300'"),
    (lambda lines: [*lines[:300], 'YWI= -3', *lines[301:]], "line 301: b'YWI= -3'"),
    (lambda lines: [*lines[:300], 'YQ== 300', *lines[301:]],
     "line 301: the token b'a' has rank 300.* already .* 97"),
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
    with pytest.raises(ValueError, match='not the published cl100k_base.* .{64}, expected 223921b'):
        formats.read(path)


def test_tiktoken_options(small, tmp_path):
    path = tmp_path / 'a.tiktoken'
    formats.write_tiktoken(small, path)
    assert formats.read_tiktoken(path, r'\s+|\S+')['pattern'] == r'\s+|\S+'
    for options, message in [({'pattern': 'gtp4'}, "unknown split pattern 'gtp4'"),
                             ({'pattern': '(a'}, 'not a regular expression'),
                             ({'special_tokens': {'<x>': 300}}, 'and <x> have the same id 300')]:
        with pytest.raises(ValueError, match=message):
            formats.read_tiktoken(path, **options)


def test_what_tiktoken_cannot_do(tmp_path):
    path = tmp_path / 'a.tiktoken'
    falling = {**read_file(tmp_path, byte_level_file(['a b', 'c d'])), 'merge_ids': [257, 256]}
    with pytest.raises(ValueError, match=r"would use b'ab' \(id 257\) elsewhere"):
        formats.write_tiktoken(falling, path)
    # abc is b + c first, then a + bc, which is no merge here; tiktoken would join a and bc too
    other = read_file(tmp_path, byte_level_file(['b c', 'a b', 'ab c']))
    with pytest.raises(ValueError, match=r"would use b'abc' \(id 258\)"):
        formats.write_tiktoken(other, path)
    with pytest.raises(ValueError, match="kind 'byte'"):
        formats.write_tiktoken({'kind': 'byte'}, path)
    assert not path.exists()


def test_a_special_token_that_reads_like_another(small, tmp_path):
    with pytest.raises(ValueError,
                       match="added token 'a' .id 600. has the name of the token b'a' .id 97"):
        formats.write_tokenizer_json({**small, 'special_tokens': {'a': 600}},
                                     tmp_path / 'tokenizer.json')


@pytest.mark.parametrize('name, content, message', [
    ('x', b'', 'unknown content'), ('x', b'hello world, this is text', 'unknown content'),
    ('x', b'{"a": []}', 'unknown content'), ('tokenizer.pkl', b'\x80\x04\x95', 'a pickle'),
    ('tokenizer.model', b'\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02', 'a SentencePiece model'),
    ('own.json', b'{"kind": "bpe", "version": 1}', "own format, of kind \"bpe\""),
    ('a.json', b'{"a": 1}', 'rename it to vocab.json or encoder.json'),
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
