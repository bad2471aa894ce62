"""Inputs that would take hours or all memory: bounded, or refused. Run: pytest tests/test_sizes.py"""

import time
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

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
