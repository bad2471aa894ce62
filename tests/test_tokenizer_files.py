"""tokenizer/: saved files, refusals, nanoGPT's meta.pkl. Run: pytest
tests/test_tokenizer_files.py"""

import hashlib
import json
import os
import pickle
import subprocess
import sys

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import (
    EOT,
    MIXED,
    USER,
    make_trained,
)

import tokenizer
from configurator import UserError
from tokenizer import BPETokenizer, WordTokenizer, base, bytepair


@pytest.fixture(scope='module')
def trained():
    return make_trained()


# Files --------------------------------------------------------------------------------------------

def of_every_kind(trained):
    return [tokenizer.CharTokenizer('\n\x00"zaé🙂'), tokenizer.ByteTokenizer(),
            WordTokenizer(['the', ' cat', '\n', '🙂']), *trained.values()]


def test_saved_tokenizers_are_the_same(tmp_path, gpt2, trained):
    for i, tok in enumerate([gpt2, *of_every_kind(trained)]):
        path = tmp_path / f'{i}.json'
        tok.save(path)
        tok.save(path)  # over what there is
        for copy in (tokenizer.load(path), tokenizer.load(str(path)),
                     tokenizer.from_dict(tok.to_dict()),
                     tokenizer.from_dict(json.loads(json.dumps(tok.to_dict())))):
            assert type(copy) is type(tok) and copy.to_dict() == tok.to_dict()
            assert ((copy.vocab_size, copy.eot, copy.special_tokens)
                    == (tok.vocab_size, tok.eot, tok.special_tokens))
            assert copy.pattern == tok.pattern
        if not isinstance(tok, tokenizer.CharTokenizer):
            assert copy.encode(MIXED, 'all') == tok.encode(MIXED, 'all')
    # nothing temporary is left
    assert sorted(os.listdir(tmp_path)) == sorted(f'{n}.json' for n in range(i + 1))


def test_a_pattern_of_ones_own_is_saved(tmp_path):
    tok = BPETokenizer.train('the cat, the hat ' * 3, 262, r'\w\w|"|\s\p{Lu}', ['<|x|>'])
    tok.save(tmp_path / 'my.json')
    copy = tokenizer.load(tmp_path / 'my.json')
    assert copy.pattern == r'\w\w|"|\s\p{Lu}' and copy.merges == tok.merges
    assert copy.encode('that cat<|x|>', 'all') == tok.encode('that cat<|x|>', 'all')


def small_ones():
    return [tokenizer.CharTokenizer('ab\n"é'), tokenizer.ByteTokenizer(),
            WordTokenizer(['the', ' cat', ',']),
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
    ('{"format": "flatgpt tokenizer", "version": 2}', 'of version 2, .* reads version 1'),
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
    with pytest.raises(ValueError, match="my.json: unknown kind .* 'syllable'; expected .*newer"):
        tokenizer.load(tmp_path / 'my.json')


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'my.json'
    tokenizer.ByteTokenizer().save(path)

    def disk_full(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', disk_full)
    with pytest.raises(ValueError, match='my.json could not .* .No space left .*free some space'):
        tokenizer.CharTokenizer('ab').save(path)
    assert tokenizer.load(path).kind == 'byte'


# What is refused ----------------------------------------------------------------------------------

def test_unknown_characters_are_named():
    tok = tokenizer.CharTokenizer('abc')
    with pytest.raises(ValueError,
                       match=r"'d' \(U\+0064\), 'é' \(U\+00E9\), '🙂' \(U\+1F642\)") as error:
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
    for name, near in (('gtp2', 'gpt2'), ('gpt-4', 'cl100k_base'), ('o200k', 'o200k_base'),
                       ('bytes', 'byte')):
        with pytest.raises(ValueError,
                           match=f"unknown tokenizer '{name}'; expected .*did you mean '{near}'"):
            tokenizer.load(name)


def test_load_names_that_need_a_text(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no char.json lies
    for name in ('char', 'word', 'bpe'):
        with pytest.raises(ValueError, match=rf'a text: python -m tokenizer train --kind={name} '):
            tokenizer.load(name)
    tokenizer.ByteTokenizer().save('mine.json')
    with pytest.raises(ValueError, match="did you mean 'mine.json'"):
        tokenizer.load('mime.json')


@pytest.mark.parametrize('values, message', [
    ({'kind': 'bytes'}, "did you mean 'byte'"),
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
    ({'kind': 'bpe', 'merges': ['ab'], 'pattern': None, 'special_tokens': {}},
     "merge 0 is 'ab'; expected two tokens"),
    ({'kind': 'bpe', 'merges': ['a b', 'a 日'], 'pattern': None, 'special_tokens': {}},
     "merge 1 is 'a 日'"),
    ({'kind': 'bpe', 'merges': ['a b c'], 'pattern': None, 'special_tokens': {}}, "'a b c'"),
    ({'kind': 'bpe', 'merges': [7], 'pattern': None, 'special_tokens': {}}, 'merge 0 is 7'),
    ({'kind': 'bpe', 'merges': ['ab c'], 'pattern': None, 'special_tokens': {}},
     "joins b'ab' and b'c'"),
    ({'kind': 'bpe', 'merges': [], 'pattern': 5, 'special_tokens': {}}, 'pattern'),
    ({'kind': 'bpe', 'merges': [], 'pattern': '(', 'special_tokens': {}}, 'pattern'),
    ({'kind': 'bpe', 'merges': [], 'pattern': None, 'special_tokens': [EOT]}, 'special'),
    ({'kind': 'bpe', 'merges': [], 'pattern': None, 'special_tokens': {EOT: 'x'}}, 'special'),
    ({'kind': 'bpe', 'merges': [], 'pattern': None, 'special_tokens': {}, 'byte_ids': 5},
     'byte_ids'),
], ids=str)
def test_from_dict_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.from_dict(values)


def test_no_network_says_what_to_do(tmp_path):
    # A proxy that nobody listens at makes every machine one without a network.
    environment = {**os.environ, 'TIKTOKEN_CACHE_DIR': str(tmp_path),
                   'https_proxy': 'http://127.0.0.1:9',
                   'HTTPS_PROXY': 'http://127.0.0.1:9', 'no_proxy': '', 'NO_PROXY': ''}
    code = 'import tokenizer\ntry: tokenizer.load("gpt2")\nexcept ValueError as error: print(error)'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    said = done.stdout
    for part in ('TIKTOKEN_CACHE_DIR', 'vocab.bpe', 'encoder.json', '--tokenizer=byte',
                 str(tmp_path)):
        assert part in said
    for url in bytepair.TIKTOKEN_FILES['gpt2']:
        assert hashlib.sha1(url.encode()).hexdigest() in said


# NanoGPT's meta.pkl -------------------------------------------------------------------------------

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
    path.write_bytes(pickle.dumps({'vocab_size': 1, 'stoi': {'a': 0}, 'itos': {0: 'a'},
                                   'x': Harm(str(victim))}))
    with pytest.raises(ValueError, match='refused.*prepare.py'):
        tokenizer.from_meta_pkl(path)
    assert not victim.exists()
    pickle.loads(path.read_bytes())['x'].close()
    assert victim.exists()  # so the file was a real attack


@pytest.mark.parametrize('changes', [
    {'itos': None}, {'vocab_size': 4}, {'vocab_size': True}, {'vocab_size': '3'},
    {'stoi': {'b': 0, 'a': 1, 'c': 1}}, {'stoi': {'b': 0, 'a': 1, 2: 2}},
    {'itos': {0: 'a', 1: 'b', 2: '\n'}}, {'stoi': ['a', 'b', 'c']},
    {'stoi': {'b': 0, 'a': 1, '\n': '2'}},
], ids=str)
def test_meta_pkl_contradictions(tmp_path, changes):
    with pytest.raises(UserError, match='expected vocab_size, stoi'):
        tokenizer.from_meta_pkl(meta_pkl(tmp_path / 'meta.pkl', **changes))


def test_meta_pkl_of_words(tmp_path):
    words = {'stoi': {'b': 0, 'a': 1, 'the': 2}, 'itos': {0: 'b', 1: 'a', 2: 'the'}}
    with pytest.raises(UserError,
                       match="refused: a char vocabulary holds single characters, got 'the'"):
        tokenizer.from_meta_pkl(meta_pkl(tmp_path / 'meta.pkl', **words))


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
    with pytest.raises(ValueError, match='expected vocab_size'):
        tokenizer.from_meta_pkl(tmp_path / 'meta.pkl')
