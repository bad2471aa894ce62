"""The rules of data/clean.py, each just below and above its threshold; near duplicates.

Run: pytest tests/test_clean.py
"""

import os
import random
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from corpora import SENTENCES, distinct_words, prose
from hypothesis import given
from hypothesis import strategies as st

from data import clean, gopher, minhash

ROOT = Path(__file__).resolve().parent.parent
POSIX = pytest.mark.skipif(os.name != 'posix', reason='needs signals')
WIKITEXT = ROOT.parent / 'shared' / 'data' / 'wikitext2' / 'valid.txt'


# normalize ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('text, expected', [
    ('cafe\u0301', 'caf\xe9'),
    ('a\r\nb\rc\fd\x85e\u2028f', 'a\nb\nc\nd\ne\nf'),
    ('\ufeffa\x00b\x1b[0m\u200bc\td', 'ab[0mc\td'),
    ('\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645',
     '\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645'),  # Persian
])
def test_normalize(text, expected):
    assert clean.normalize(text) == expected


@given(st.text())
def test_a_normalized_text_stays_as_it_is_and_holds_no_control_characters(text):
    once = clean.normalize(text)
    assert clean.normalize(once) == once
    assert unicodedata.is_normalized('NFC', once)
    assert {char for char in once if unicodedata.category(char) == 'Cc'} <= {'\n', '\t'}


# language ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('language', SENTENCES)
def test_languages(language):
    pytest.importorskip('py3langid')
    found, probability = clean.find_language(SENTENCES[language])
    assert found == language and probability > 0.8
    # most of a long text decides, wherever its odd part is
    for parts in ([2, 98], [50, 50, 2], [98, 2]):
        other = SENTENCES['pl' if language == 'de' else 'de']
        long = ' '.join((other if count == 2 else SENTENCES[language] + ' ') * count
                        for count in parts)
        assert clean.find_language(long)[0] == language


def test_numbers_are_no_language():
    pytest.importorskip('py3langid')
    assert clean.find_language('3.14 2.71 1.41 1.73 ' * 20)[0] not in SENTENCES


# gopher ------------------------------------------------------------------------------------------

def only(rule, text):
    """What gopher says of the text by this rule alone."""
    return clean.gopher(text, set(clean.GOPHER) - {rule})


def lines_of(count, per_line=6, start=0):
    return [' '.join(distinct_words(per_line, start=start + i * per_line)) for i in range(count)]


def marked(count, mark, of=50):
    """`of` words, `count` of which carry the mark; none ends the line."""
    return ' '.join(word + mark * (i < count) for i, word in enumerate(distinct_words(of)))


def copies(count, line, others):
    """The lines `others`, and `line` count + 1 times."""
    return '\n'.join([line] * (count + 1) + others)


def often(gram, count, of=50):
    """`of` words of five letters, in which the words `gram` follow each other `count` times and
    nothing else repeats"""
    rest = distinct_words(of - count * len(gram), start=1000)
    runs = [' '.join([*gram, rest.pop()]) for _ in range(count)]
    return ' '.join(runs + rest)


def again(count, of=100):
    """`of` words of five letters, the last `count` of which are also the first ones; nothing else
    repeats."""
    first = distinct_words(of - count)
    return ' '.join(first + first[:count])


CASES = [  # rule, a text that just passes, its value, one that just does not, its value
    ('words', ' '.join(distinct_words(50)), 50, ' '.join(distinct_words(49)), 49),
    ('words', ' '.join(distinct_words(100_000)), 100_000, ' '.join(distinct_words(100_001)),
     100_001),
    ('word_length', ' '.join(distinct_words(50, 3)), 3, ' '.join(distinct_words(49, 3) + ['xx']),
     149 / 50),
    ('word_length', ' '.join(distinct_words(50, 10)), 10,
     ' '.join(distinct_words(49, 10) + ['x' * 11]), 501 / 50),
    ('hashes', marked(5, '#'), 0.1, marked(6, '#'), 0.12),
    ('ellipses', marked(5, '...'), 0.1, marked(6, '...'), 0.12),
    ('ellipses', marked(5, '…'), 0.1, marked(6, '…'), 0.12),
    ('bullet_lines', '\n'.join(['  • ' + line for line in lines_of(9)] + lines_of(1, start=60)),
     0.9,
     '\n'.join('- ' + line for line in lines_of(10)), 1),
    ('ellipsis_lines', '\n\n'.join([line + '… ' for line in lines_of(3)] + lines_of(7, start=60)),
     0.3,
     '\n\n'.join([line + '...' for line in lines_of(4)] + lines_of(6, start=60)), 0.4),
    ('alphabetic_words', ' '.join(distinct_words(40) + [str(i) for i in range(10)]), 0.8,
     ' '.join(distinct_words(39) + [f'{i}%' for i in range(11)]), 0.78),
    ('alphabetic_words', ' '.join(['1a'] * 4 + ['11']), 0.8, ' '.join(['1a'] * 3 + ['11'] * 2),
     0.6),
    ('stop_words', 'The cat, of all things', 2,
     'the cat and the dog, the mother bed'.replace('and ', ''), 1),
    ('stop_words', 'That, with it', 2, 'other andes tobe beof', 0),
    ('duplicate_lines', copies(3, 'b', lines_of(6)), 0.3, copies(4, 'b', lines_of(5)), 0.4),
    # 20 of 100 characters: copies of ten letters among lines of ten letters
    ('duplicate_line_chars', copies(2, 'q' * 10, distinct_words(7, 10)), 0.2,
     copies(3, 'q' * 10, distinct_words(6, 10)), 0.3),
    ('duplicate_paragraphs', '\n\n'.join(['b\nc'] * 4 + lines_of(6)), 0.3,
     '\n \n'.join(['b\nc'] * 5 + lines_of(5)), 0.4),
    ('duplicate_paragraph_chars', '\n\n'.join(['q' * 10] * 3 + distinct_words(7, 10)), 0.2,
     '\n\n\n'.join(['q' * 10] * 4 + distinct_words(6, 10)), 0.3),
    ('top_2gram', often(['qqqqq', 'rrrrr'], 5), 0.2, often(['qqqqq', 'rrrrr'], 6), 0.24),
    ('top_3gram', often(['qqqqq', 'rrrrr', 'sssss'], 3), 0.18,
     often(['qqqqq', 'rrrrr', 'sssss'], 4), 0.24),
    ('top_4gram', often(['qqqqq', 'rrrrr', 'sssss', 'ttttt'], 2), 0.16,
     often(['qqqqq', 'rrrrr', 'sssss', 'ttttt'], 3), 0.24),
    *((f'duplicate_{n}gram', again(most), most / 100, again(most + 1), (most + 1) / 100)
      for n, most in ((5, 15), (6, 14), (7, 13), (8, 12), (9, 11), (10, 10))),
]


@pytest.mark.parametrize('rule, fine, value, bad, bad_value', CASES,
                         ids=[f'{i}-{case[0]}' for i, case in enumerate(CASES)])
def test_gopher_thresholds(rule, fine, value, bad, bad_value):
    measure = gopher.quality if rule in gopher.quality(fine) else gopher.repetition
    assert measure(fine)[rule] == pytest.approx(value, rel=1e-12)
    assert only(rule, fine) is None
    assert only(rule, bad) == (rule, pytest.approx(bad_value, rel=1e-12))


def test_every_rule_has_its_case():
    assert {case[0] for case in CASES} == set(clean.GOPHER)
    text = prose(100, seed=0)
    assert {*gopher.quality(text), *gopher.repetition(text)} == set(clean.GOPHER)


def test_gopher_names_the_first_rule_that_is_not_skipped():
    text = '# # #'
    assert clean.gopher(text)[0] == 'words'
    assert clean.gopher(text, ['words'])[0] == 'word_length'
    assert clean.gopher(text, ['words', 'word_length']) == ('hashes', 1)
    assert clean.gopher(text, clean.GOPHER) is None
    assert clean.gopher(prose(400, seed=1)) is None


@given(st.lists(st.sampled_from(['a', 'bb', 'ccc', 'dddd']), min_size=1, max_size=60))
def test_repeated_runs_of_words_against_counting_by_hand(text):
    found = gopher.repetition(' '.join(text))
    chars = sum(map(len, text))
    for n in range(2, 11):
        runs = [tuple(text[i:i + n]) for i in range(len(text) - n + 1)]
        if n <= 4:
            most = max([runs.count(run) for run in runs], default=0)
            expected = max([most * len(''.join(run)) for run in runs
                            if runs.count(run) == most > 1], default=0)
            assert found[f'top_{n}gram'] == pytest.approx(expected / chars)
        else:
            covered = {j for i, run in enumerate(runs) if run in runs[:i] for j in range(i, i + n)}
            expected = sum(len(text[j]) for j in covered)
            assert found[f'duplicate_{n}gram'] == pytest.approx(expected / chars)


@pytest.mark.skipif(not WIKITEXT.exists(), reason='needs WikiText-2')
def test_articles_of_wikipedia_pass():
    # the benchmark's traces of tokenization undone: " @-@ " and spaces before punctuation count as
    # words
    text = WIKITEXT.read_text(encoding='utf-8')
    text = text.replace(' @-@ ', '-').replace(' ,', ',').replace(' .', '.')
    articles = [part for part in text.split('\n = ') if len(part) > 3000]
    passed = sum(clean.gopher(article) is None for article in articles)
    assert len(articles) > 20 and passed > 0.8 * len(articles), f'{passed} of {len(articles)}'


# exact -------------------------------------------------------------------------------------------

@given(st.text(), st.text())
def test_texts_share_a_digest_when_they_differ_in_white_space_alone(one, two):
    assert (clean.digest(one) == clean.digest(two)) == (one.split() == two.split())
    assert clean.digest(one) == clean.digest('\n ' + '\t '.join(one.split()) + '\r\n')


# near --------------------------------------------------------------------------------------------

def variant(text, changes, rng):
    """The words with `changes` of them, at places of their own, replaced by new ones."""
    text = list(text)
    for i in rng.sample(range(len(text)), changes):
        text[i] = f'new{rng.randrange(10**9)}'
    return text


def jaccard(one, two):
    one, two = ({tuple(text[i:i + 5]) for i in range(len(text) - 4)} for text in (one, two))
    return len(one & two) / len(one | two)


def pairs(count, seed):
    """Pairs of made-up texts (lists of words) of every similarity."""
    rng = random.Random(seed)
    for _ in range(count):
        text = [f'w{rng.randrange(5000)}' for _ in range(rng.randrange(60, 600))]
        yield text, variant(text, rng.choice([0, 1, 2, 5, 10, 40, 60]), rng)


@pytest.mark.parametrize('threshold, bands, rows', [(0.8, 14, 8), (0.5, 37, 3), (1, 1, 112)])
def test_buckets(threshold, bands, rows):
    pytest.importorskip('datasketch')
    near = minhash.NearDuplicates(threshold)
    assert (near.bands, near.rows) == (bands, rows)  # 14 of 8 are FineWeb's
    assert 1 - (1 - threshold**rows)**bands >= 0.9
    text = ' '.join(distinct_words(100))
    assert near.find(minhash.signature(text), 7) is None
    assert near.find(minhash.signature(text.upper().replace(' ', ', ')), 8) == (7, 1.0)


def test_similar_documents_are_found_and_others_are_not():
    pytest.importorskip('datasketch')
    found, errors = [], []
    for one, two in pairs(400, seed=3):
        near = minhash.NearDuplicates(0.8)
        new = [minhash.signature(' '.join(text)) for text in (one, two)]
        near.find(new[0], 1)
        exact = jaccard(one, two)
        errors.append(np.mean(new[0] == new[1]) - exact)
        found.append((exact, near.find(new[1], 2) is not None))
    high = [hit for exact, hit in found if exact >= 0.95]
    low = [hit for exact, hit in found if exact <= 0.3]
    assert len(high) > 50 and all(high)
    assert len(low) > 50 and not any(low)
    # the estimate is a mean of 112 draws, so its error is that of a coin: at most 0.5 / sqrt(112) =
    # 0.047
    assert abs(np.mean(errors)) < 0.01 and np.std(errors) < 0.047


def test_of_alike_documents_the_first_stays_and_every_removed_one_is_like_a_kept_one():
    pytest.importorskip('datasketch')
    rng = random.Random(5)
    clusters = [distinct_words(300, start=1000 * i) for i in range(40)]
    texts = [(i, variant(text, rng.choice([0, 1, 2]), rng)) for _ in range(4) for i,
             text in enumerate(clusters)]
    rng.shuffle(texts)
    near, kept = minhash.NearDuplicates(0.8), {}
    for number, (cluster, text) in enumerate(texts):
        like = near.find(minhash.signature(' '.join(text)), number)
        assert (like is None) == (cluster not in kept)
        if like is not None:
            assert like[0] == kept[cluster]
        kept.setdefault(cluster, number)
    assert near.numbers == list(kept.values())


def test_ends_of_a_chain_that_are_unlike_both_stay():
    pytest.importorskip('datasketch')
    first = distinct_words(400)
    middle = first[20:] + distinct_words(20, start=5000)
    last = first[120:] + distinct_words(120, start=5000)
    assert jaccard(first, middle) > 0.88 > 0.6 > jaccard(middle, last) > jaccard(first, last)
    near = minhash.NearDuplicates(0.8)
    got = [near.find(minhash.signature(' '.join(text)), i) for i,
           text in enumerate([first, middle, last])]
    assert got[0] is None and got[1][0] == 0 and got[2] is None


def test_short_texts_texts_without_words_and_scripts_without_spaces():
    pytest.importorskip('datasketch')
    assert minhash.signature('?! ...') is None
    one, two = minhash.signature('Only three words'), minhash.signature('only three words!')
    assert np.array_equal(one, two) and not np.array_equal(one, minhash.signature('only three'))
    text = ''.join(chr(0x4e00 + i * 7) for i in range(300))
    changed = text[:150] + '東' + text[151:]
    assert np.mean(minhash.signature(text) == minhash.signature(changed)) > 0.9


def test_long_texts_are_hashed_in_slices():
    pytest.importorskip('datasketch')
    text = distinct_words(9000)
    whole = minhash.signature(' '.join(text))
    parts = [minhash.signature(' '.join(text[i:i + 1004])) for i in range(0, 9000, 1000)]
    assert np.array_equal(whole, np.min(parts, axis=0))


def test_pages_of_one_template_are_not_all_compared_with_one_another(monkeypatch):
    """Twice as many pages take twice the comparisons, not four times; copies are still found.

    Pairs share 64% of their signatures, so none of them is removed.
    """
    monkeypatch.setattr(minhash, 'BUCKET_SIZE', 20)
    rng = np.random.default_rng(0)
    template = rng.integers(0, 2**32, minhash.HASHES, dtype=np.uint32)
    near, compared = minhash.NearDuplicates(0.8), []
    candidates = near.candidates

    def counted(keys):
        compared.append(len(candidates(keys)))
        return candidates(keys)

    near.candidates = counted

    def changed(page, share):
        other = rng.integers(0, 2**32, minhash.HASHES, dtype=np.uint32)
        return np.where(rng.random(minhash.HASHES) < share, other, page)

    pages = [changed(template, 0.2) for _ in range(2400)]
    kept = [number for number, page in enumerate(pages) if near.find(page, number) is None]
    assert len(kept) > 0.95 * len(pages)  # some are alike by chance
    assert max(compared) <= near.bands * 20
    assert 10 * len(pages) < sum(compared) < 2.5 * sum(compared[:1200])
    found = [near.find(changed(pages[number], 0.05), 10**6) for number in kept[::20]]
    assert sum(like is not None for like in found) > 0.95 * len(found)


@pytest.mark.parametrize('threshold, kilobytes', [(0.8, 2.2), (0.5, 5)])
def test_memory_per_document(threshold, kilobytes):
    rng, count = np.random.default_rng(0), 5000
    near, seen = minhash.NearDuplicates(threshold), set()
    tracemalloc.start()
    for number in range(count):
        near.find(rng.integers(0, 2**32, minhash.HASHES, dtype=np.uint32), number)
    used = tracemalloc.get_traced_memory()[0]
    for number in range(count):
        seen.add(clean.digest(str(number)))
    exact = tracemalloc.get_traced_memory()[0] - used
    tracemalloc.stop()
    assert len(near.numbers) == count
    assert used / count < 1000 * kilobytes and exact / count < 200
