"""Inputs that would take hours or all memory: bounded, or refused. Run: pytest tests/test_sizes.py"""

import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configurator import UserError
from tokenizer import patterns

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
