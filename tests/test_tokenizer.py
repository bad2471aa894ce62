"""tokenizer.py against plain Python, tiktoken itself, and files made to do harm. Run: pytest tests/test_tokenizer.py"""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if (ROOT.parent / 'shared' / 'tiktoken').is_dir():
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', str(ROOT.parent / 'shared' / 'tiktoken'))

import tokenizer  # noqa: E402

MIXED = 'Hello, wörld!\n\t日本語 🙂 e\u0301 <|endoftext|> \x00 end'


@pytest.fixture(scope='module')
def gpt2():
    try:
        return tokenizer.load('gpt2')
    except ValueError as error:
        pytest.skip(f"GPT-2's vocabulary cannot be had here: {str(error)[:60]}")


def same_everywhere(tok, text):
    """encode, encode_array and both decodes agree with each other, and with the text."""
    ids = tok.encode(text)
    assert isinstance(ids, list) and all(type(i) is int and 0 <= i < tok.vocab_size for i in ids)
    array = tok.encode_array(text)
    assert array.dtype == tokenizer.id_dtype(tok.vocab_size)
    assert array.tolist() == ids
    assert tok.decode(ids) == tok.decode(array) == text
    assert tok.decode_bytes(ids) == text.encode()


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


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_gpt2_round_trip(gpt2, text):
    same_everywhere(gpt2, text)


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


def test_special_token_in_text_is_text(gpt2):
    assert 50256 not in gpt2.encode('a<|endoftext|>b')
    assert 50256 not in gpt2.encode_array('a<|endoftext|>b')


def test_cl100k_needs_uint32_and_has_gaps():
    try:
        tok = tokenizer.load('cl100k_base')
    except ValueError as error:
        pytest.skip(f'cl100k_base cannot be had here: {str(error)[:60]}')
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
    with pytest.raises(ValueError, match='from_text'):
        tokenizer.load('char')
    with pytest.raises(ValueError, match='did you mean gpt2'):
        tokenizer.load('gtp2')


@pytest.mark.parametrize('values, message', [
    ({'kind': 'bytes'}, 'did you mean byte'),
    ({'kind': 'char'}, "lacks 'chars'"),
    ({'kind': 'tiktoken', 'name': 'gpt3'}, 'gpt2'),
    ({'chars': 'abc'}, "the key 'kind'"),
    (None, "the key 'kind'"),
])
def test_from_dict_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.from_dict(values)


def test_dict_round_trip(gpt2):
    for tok in (tokenizer.CharTokenizer('\n\x00"zaé🙂'), tokenizer.ByteTokenizer(), gpt2):
        copy = tokenizer.from_dict(json.loads(json.dumps(tok.to_dict())))
        assert type(copy) is type(tok) and copy.vocab_size == tok.vocab_size
        assert copy.decode(range(7)) == tok.decode(range(7))


def test_no_network_says_what_to_do(tmp_path):
    # A proxy that nobody listens at makes every machine one without a network.
    environment = {**os.environ, 'TIKTOKEN_CACHE_DIR': str(tmp_path), 'https_proxy': 'http://127.0.0.1:9',
                   'HTTPS_PROXY': 'http://127.0.0.1:9', 'no_proxy': '', 'NO_PROXY': ''}
    code = 'import tokenizer\ntry: tokenizer.load("gpt2")\nexcept ValueError as error: print(error)'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=environment, capture_output=True, text=True)
    said = done.stdout
    for part in ('TIKTOKEN_CACHE_DIR', 'vocab.bpe', 'encoder.json', '--tokenizer=byte', str(tmp_path)):
        assert part in said
    for url in tokenizer.TIKTOKEN_FILES['gpt2']:
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
