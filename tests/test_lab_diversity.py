"""lab/diversity.py: lists, counts and entropies by hand, and what a run writes."""

import json
import math
import random

import numpy as np
import pytest
import torch
from chat_models import TOKENIZER, tiny
from conftest import load_lab

from lab import common
from posttrain.tasks import tiny_chat

TINY = {'share': 0.01, 'lists': 3, 'names': 4, 'questions': 7, 'answers': 2, 'out': 'out'}


def test_lists_have_made_up_words():
    drawn = load_lab('diversity').draw_lists(20, random.Random(0))
    assert len(drawn) == 20 and all(len(set(words)) == 7 for words in drawn)
    assert not {word for words in drawn for word in words} & set(tiny_chat.WORDS)


def test_distinct_by_hand():
    """Of two of a, a, b: the pairs aa, ab, ab have 1, 2, 2 different ones, 5/6 of two."""
    lab = load_lab('diversity')
    assert lab.distinct_of(['a', 'a', 'b'], 2) == pytest.approx(5 / 6)
    assert lab.distinct_of(['a'] * 9, 8) == pytest.approx(1 / 8) and lab.distinct_of(list('abcdefgh'), 8) == 1
    assert math.isnan(lab.distinct_of(['a'], 2))
    assert [lab.is_name(text) for text in ('ab', 'a', 'a b', 'Ab', '', 'a' * 14)] == [True] + [False] * 5


def test_measures_of_a_list_by_hand():
    lab = load_lab('diversity')
    drawn = [('kelit', 2.0), ('kelit', 2.0), ('tone', 3.0), ('bado', 4.0), ('|', 1.0)]
    numbers = dict(zip(lab.NAMES, lab.measure_names(['bado'], drawn), strict=True))
    assert (numbers['names, %'], numbers['distinct, %'], numbers['new, %']) == (0.8, 0.6, 0.4)
    assert numbers['entropy'] == pytest.approx(2.4)
    assert lab.self_bleu(['abcde'] * 3) == pytest.approx(100) and lab.self_bleu(['abcde', 'fghij']) < 1
    assert math.isnan(lab.self_bleu(['abcde']))


def test_intervals_leave_out_what_is_no_number():
    mean, low, high = common.interval(np.array([1.0, 2, 3, np.nan]))
    assert 1 <= low < mean == 2 < high <= 3


def test_the_entropy_is_the_models_own():
    """Of a model whose tokens are equally likely, log(n) a token; the draws depend on prompt and sample alone."""
    lab = load_lab('diversity')
    model = tiny(vocab_size=TOKENIZER.vocab_size)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    prompts, stop_ids = [list(b'ab\n'), list(b'abcd\n')], set(range(200, 266))
    drawn = lab.draw(model, TOKENIZER, prompts, stop_ids, (40, 6))
    assert [len(part) for part in drawn] == [40, 40]
    per_token = math.log(TOKENIZER.vocab_size)
    counts = [entropy / per_token for part in drawn for _, entropy in part]
    assert counts == pytest.approx(np.round(counts), abs=1e-3) and {round(c) for c in counts} == set(range(1, 7))
    alone, = lab.draw(model, TOKENIZER, prompts[:1], stop_ids, (40, 6))
    assert [text for text, _ in alone] == [text for text, _ in drawn[0]]


@pytest.mark.slow
def test_a_run(course):
    run = course.start('lab.diversity', **TINY).ok()
    figures = json.loads((course.path / 'out' / 'diversity.json').read_text())
    assert set(figures['results']) == {'base', 'sft', 'ppo', 'grpo'}
    assert figures['against']['base']['base']['entropy'] == [0, 0, 0]
    assert (course.path / 'out' / 'diversity.png').stat().st_size > 10_000
    *_, printed = run.out.partition('against base, paired')
    assert max(map(len, printed.splitlines())) <= 80
