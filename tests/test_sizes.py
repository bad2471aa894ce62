"""Inputs that would take hours or all memory: bounded, or refused. Run: pytest tests/test_sizes.py"""

import base64
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tokenizer
from configurator import UserError
from flatgpt.constrain import Constraint
from flatgpt.sampling import Sampling
from tokenizer import BPETokenizer, base, patterns

# Normal forms -------------------------------------------------------------------------------------
MARKS = [*map(chr, range(0x300, 0x370)), *'़゙ְًཱཱི〪𑄧\u3099\u09be\u0903']
MARKED = st.lists(st.tuples(st.sampled_from([*'aouùäǖ각가각о', '\u09c7', 'か']), st.integers(0, 2**32),
                            st.sampled_from([0, 1, 2, 5, 99, 100, 101, 300])), max_size=6)


@given(MARKED)
def test_nfc_is_that_of_unicodedata(letters):
    text = ''.join(letter + ''.join(MARKS[(seed * (i + 7) >> 5) % len(MARKS)] for i in range(n))
                   for letter, seed, n in letters)
    assert patterns.nfc(text) == unicodedata.normalize('NFC', text)


def test_nfc_of_a_long_run_of_marks():
    """30,000 marks took 1 to 7 seconds, and twice as many four times that."""
    text = 'a' + '\u0301\u0316\u0345' * 100_000
    started = time.perf_counter()
    normal = patterns.normalize(text, 'NFC')
    assert time.perf_counter() - started < 3
    assert normal == 'á' + '\u0316' * 100_000 + '\u0301' * 99_999 + '\u0345' * 100_000


# Split patterns -----------------------------------------------------------------------------------

@pytest.mark.parametrize('pattern', ['(a|a)*b', '(?:a|a|a)+?b', 'a*a*a*a*b', r'(\w|\w\w)*\d'])
def test_patterns_of_exponential_time(pattern, monkeypatch):
    """They took 40 seconds for 30 characters, and twice as long for each more."""
    monkeypatch.setattr(patterns, 'PATIENCE', 0.5)
    text = 'a' * 5000 + '-b7'
    started = time.perf_counter()
    with pytest.raises(UserError, match=r'split pattern .* took over 0.51 s to cut 5,003 characters'):
        patterns.split(text, pattern)
    assert time.perf_counter() - started < 10
    assert patterns.split('xaab', pattern)[0][0] == 'x'


@pytest.mark.parametrize('pattern, said', [
    ('a{1000000}', r'takes 10,000,000 characters'), ('(((a{100}){100}){100}){100}', '2,700,000,000'),
    ('(?:(?:(?:a|a){100}){100}){100}', '30,000,000'), ('a{2000000000}', '2,600,000,000'),
    ('a{' + '9' * 5000 + '}', 'characters'), ('(?:a|b)' * 20_000, 'takes 140,000 characters'),
    ('a(?R)?b', 'calls itself'), ('(a(?1)?b)', 'calls'), ('(?<x>a(?&x)?b)', 'calls'),
    ('(?:' * 3000 + 'a' + ')' * 3000, 'recursion')])
def test_patterns_of_much_memory(pattern, said):
    with pytest.raises(UserError, match=said) as refused:
        patterns.find_pattern(pattern)
    assert len(str(refused.value)) < 700


# Long tokens --------------------------------------------------------------------------------------

@given(st.lists(st.text('ab<', min_size=1, max_size=5), max_size=6, unique=True))
def test_overlaps_are_those_of_all_pairs(tokens):
    def overlap(a, b):
        return a in b or any(a.startswith(b[i:]) for i in range(1, len(b)))

    expected = any(overlap(a, b) for a in tokens for b in tokens if a != b)
    assert (base.find_overlap(tokens) is not None) == expected


def test_long_special_tokens():
    """One of 8,000 characters took hours to be compared with the others."""
    started = time.perf_counter()
    tok = BPETokenizer([], 'gpt4', {f'<|{"x" * 8000}|>': 256, '<|a|>': 257})
    assert tok.encode(f'a<|{"x" * 8000}|>b', 'all') == [97, 256, 98]
    assert len(list(tok.encode_iterable(['a <|xx '] * 100_000, 'all'))) == 700_000
    with pytest.raises(UserError, match='have 100,001 characters; expected 100,000 or fewer'):
        BPETokenizer([], None, {'x' * 100_001: 256})
    with pytest.raises(UserError, match='overlap') as refused:
        BPETokenizer.train('a', 259, None, ['x' * 8000, 'x' * 8001])
    assert len(str(refused.value)) < 400
    assert time.perf_counter() - started < 5


def ranks_file(path, tokens):
    path.write_bytes(b''.join(b'%s %d\n' % (base64.b64encode(token), i)
                              for i, token in enumerate(tokens)))
    return path


def test_long_tokens(tmp_path):
    """One of 16 kB took minutes to be read; in a tokenizer of one's own it is slow at most."""
    powers = [bytes([97]) * 2**k for k in range(1, 15)]
    path = ranks_file(tmp_path / 'a.tiktoken', [*(bytes([byte]) for byte in range(256)), *powers])
    with pytest.raises(UserError, match='longest of 270 tokens has 16,384 bytes.*100,000,000 or'):
        tokenizer.load(path)
    tok = BPETokenizer([(token[::2], token[::2]) for token in powers])
    started = time.perf_counter()
    assert tok.decode(tok.encode_array('a' * 100_000)) == 'a' * 100_000
    assert time.perf_counter() - started < 5
    path = ranks_file(path, [*(bytes([byte]) for byte in range(256)), *powers[:9]])
    assert tokenizer.load(path).encode('a' * 512) == [264]


# Samples ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('lengths', [{'max_new_tokens': 10**12}, {'num_samples': 10**9},
                                     {'num_samples': 10**9, 'max_new_tokens': 0},
                                     {'num_samples': 10**4, 'max_new_tokens': 1001}])
def test_samples_of_much_memory(lengths):
    with pytest.raises(UserError, match='tokens; expected 10,000,000 or fewer'):
        Sampling(**lengths)


def test_many_choices():
    pytest.importorskip('llguidance')
    with pytest.raises(UserError, match='10,001 texts; expected 10,000 or fewer'):
        Constraint(tokenizer.ByteTokenizer(), choices=[f'c{i}' for i in range(10_001)])
