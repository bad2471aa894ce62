"""data/lines.py: lines that many documents have stay once. Run: pytest tests/test_lines.py"""

import collections
import json
import random

import numpy as np
import pytest
from corpora import distinct_words
from hypothesis import given, settings
from hypothesis import strategies as st

from data import clean, lines

BOILERPLATE = ['Accept cookies', 'Share this on the web', 'All rights reserved, 2024']


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(lines, 'CELLS_BITS', 14)


def pages(count, seed=0):
    """Texts with lines of their own, and with boilerplate in every second one."""
    rng = random.Random(seed)
    words = distinct_words(4000)
    for number in range(count):
        own = [' '.join([f'w{number}', *rng.choices(words, k=6)]) for _ in range(5)]
        extra = rng.sample(BOILERPLATE, 2) if number % 2 else []
        yield '\n'.join([*extra[:1], *own[:3], '---', '', *own[3:], *extra[1:]])


def by_hand(texts, least):
    """Drop frequent lines by exact counts."""
    def key(line):
        return ' '.join(line.lower().split())
    counts = collections.Counter(line for text in texts for line in set(map(key, text.split('\n'))))
    seen, result = set(), []
    for text in texts:
        kept = []
        for line in text.split('\n'):
            if any(map(str.isalpha, line)) and counts[key(line)] >= least:
                if key(line) in seen:
                    continue
                seen.add(key(line))
            kept.append(line)
        result.append('\n'.join(kept))
    return result


def by_sketch(texts, least):
    counts = lines.LineCounts(least)
    for text in texts:
        counts.add(lines.unique_keys(text))
    counts.check()
    dropped = [counts.drop(text, lines.line_keys(text)) for text in texts]
    return [text if new is None else new for text, new in zip(texts, dropped, strict=True)], counts


def test_the_sketch_drops_what_exact_counts_drop():
    texts = list(pages(300))
    for least in (2, 50, 110, 200):
        got, counts = by_sketch(texts, least)
        assert got == by_hand(texts, least)
        n_lines = sum(text.count('\n') + 1 for text in texts)
        assert counts.dropped == n_lines - sum(text.count('\n') + 1 for text in got)
    assert by_sketch(texts, 50)[1].kept == 3 and by_sketch(texts, 200)[1].dropped == 0


@settings(max_examples=50)
@given(st.lists(st.lists(st.sampled_from(['a', 'A ', 'b  c', 'b c', '', '1', '--', 'd'])), max_size=12),
       st.integers(2, 5))
def test_any_documents_against_exact_counts(documents, least):
    texts = ['\n'.join(document) for document in documents]
    assert by_sketch(texts, least)[0] == by_hand(texts, least)


def test_too_many_lines_for_the_threshold_are_refused(monkeypatch):
    monkeypatch.setattr(lines, 'CHECK_LINES', 10_000)
    counts, rng = lines.LineCounts(10), np.random.default_rng(0)
    with pytest.raises(ValueError, match='--lines=10 is too low for this many lines: .* such as --lines='):
        for _ in range(200):
            counts.add(rng.integers(1, 2**63, 1000, dtype=np.uint64))
    assert counts.wrong() < 0.01  # it stops early
    enough = lines.LineCounts(int(3 * counts.counts[0].mean() + 30))
    for _ in range(150):
        enough.add(rng.integers(1, 2**63, 1000, dtype=np.uint64))
    enough.check()


@pytest.mark.parametrize('num_proc', [1, 2])
def test_a_run_drops_lines_before_it_judges(num_proc, tmp_path, monkeypatch):
    monkeypatch.setattr(clean, 'BATCH_CHARS', 3000)
    texts = [*pages(60), 'Accept cookies\n\x00', 'Accept\tCookies\n<x>', '\x00', 'Accept cookies', *pages(60)]
    (tmp_path / 'in.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts))
    steps = clean.Steps(normalize=True, lines=5, mask=('email',), exact=True)
    report = clean.clean_to(tmp_path / 'out.jsonl', tmp_path / 'in.jsonl', steps, num_proc=num_proc)
    got = [json.loads(line)['text'] for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
    # pages come twice: without boilerplate, all but the three that keep it are exact copies
    without = [text for text in by_hand([clean.normalize(text) for text in texts], 5) if text.strip()]
    assert got == list(dict.fromkeys(without))
    assert report['removed']['lines: blank']['documents'] == 2
    assert report['removed']['normalize: blank']['documents'] == 1
    assert report['documents']['changed by lines'] > 20
    assert report['lines']['kept once'] == 3 and 'Accept cookies' in report['lines']['examples']
    assert report['lines']['chance that a rare line counts as frequent'] < 1e-6
