"""lab/reflection.py: conversations that judge drafts, what is counted, and what a run writes."""

import itertools
import json
import random

import numpy as np
import pytest
from conftest import load_lab

from lab import common
from posttrain.tasks import tiny_chat
from tokenizer import BPETokenizer, chat

TINY = {'questions': 14, 'drafts': 60, 'max_iters': 100, 'share': 0.01, 'out': 'out'}


@pytest.fixture(scope='module')
def lab():
    return load_lab('reflection')


def test_conversations_judge_rightly_and_revise(lab):
    examples = tiny_chat.examples('train', 1400)
    talks = list(lab.make_talks(examples, [example['solution'] for example in examples]))
    verdicts = []
    for example, talk in zip(examples, talks, strict=True):
        _, draft, request, reply = talk['messages']
        assert draft['weight'] == 0 and request['content'] == lab.ASK
        verdicts.append(reply['content'] == 'Yes.')
        assert verdicts[-1] == tiny_chat.evaluate(example, draft['content'])
        if not verdicts[-1]:
            assert reply['content'].startswith('No. ') and tiny_chat.evaluate(example, reply['content'])
            assert (example['steps'] or '') in reply['content']
    assert abs(np.mean(verdicts) - (1 - lab.invented)) < 0.05


def test_only_the_judgement_carries_loss(lab):
    example = tiny_chat.examples('train', 1)[0]
    talk = next(lab.make_talks([example], ['The answer is nothing.']))
    words = BPETokenizer([], None, {token: 256 + i for i, token in enumerate(chat.SPECIAL_TOKENS)})
    ids, mask = chat.render_conversation(talk['messages'], chat.TEMPLATE, words)
    learnt = words.decode([i for i, is_learnt in zip(ids, mask, strict=True) if is_learnt])
    assert learnt.startswith(talk['messages'][-1]['content'])
    assert 'nothing' not in learnt and 'nothing' in words.decode(ids)


def test_a_mistake_is_never_right(lab):
    rng = random.Random(0)
    assert not any(tiny_chat.evaluate(example, lab.mistake(example, rng)) for example in tiny_chat.examples('train', 700))


def test_what_counts_after_a_reply(lab):
    draft = 'The answer is 3.'
    assert lab.revised(draft, 'Yes.') == lab.revised(draft, 'No.') == lab.revised(draft, 'Hello!') == draft
    assert lab.revised(draft, 'Yes. The answer is 4.') == draft
    assert lab.revised(draft, 'No. 2+2=4. The answer is 4.') == 'No. 2+2=4. The answer is 4.'


def test_outcomes_by_hand(lab):
    before = np.array([True, True, True, False, False])
    after = np.array([True, False, True, True, False])
    replies = ['Yes.', 'No. The answer is 1.', 'No. The answer is 2.', 'No. The answer is 3.', 'Yes.']
    assert lab.outcomes(before, after, replies) == {
        'noticed': (1, 2), 'mended': (1, 2), 'doubted': (2, 3), 'spoilt': (1, 3)}


def test_separation_counts_pairs(lab):
    rng = np.random.default_rng(0)
    scores, rights = rng.integers(0, 5, 60) / 5, rng.random(60) < 0.6
    pairs = list(itertools.product(scores[rights], scores[~rights]))
    assert lab.separation(scores, rights) == pytest.approx(np.mean([(a > b) + (a == b) / 2 for a, b in pairs]))
    assert lab.separation(scores, np.ones(60, bool)) is None


def test_compare_by_hand():
    after, before = np.ones(10, bool), np.array([False] * 5 + [True] * 5)
    mean, low, high, p = common.compare(after, before)
    assert mean == 50 and p == pytest.approx(2 * 0.5**5)  # five of five changes are gains
    assert low == pytest.approx(50 - 196 * (10 / 36) ** 0.5 / 10**0.5) and high == pytest.approx(100 - low)
    assert common.compare(before, before) == [0, 0, 0, 1]


@pytest.mark.slow
def test_a_small_run(course):
    run = course.start('lab.reflection', **TINY).wait(timeout=900)
    assert run.code == 0, run.out
    figures = json.loads((course.path / 'out' / 'reflection.json').read_text())
    assert len(figures['rows']) == 10
    assert all(0 <= right <= 14 and tokens > 0 for right, tokens in figures['rows'].values())
    counts = figures['by_kind']['all']
    assert counts['noticed'][1] + counts['spoilt'][1] == 14
    *_, report = run.out.partition('14 held-out questions')
    assert max(map(len, report.splitlines())) <= 80
    assert (course.path / 'out' / 'reflection.png').stat().st_size > 10_000
    again = course.start('lab.reflection', **TINY).wait(timeout=900)
    assert again.code == 0 and 'the SFT model drafts 60' in run.out and 'the SFT model drafts' not in again.out
    assert json.loads((course.path / 'out' / 'reflection.json').read_text()) == figures


@pytest.mark.parametrize('changes, said', [
    ({'questions': 6}, 'questions=6: expected 7 or more'), ({'invented': 2.0}, 'invented=2.0: expected')])
def test_bad_settings_are_refused(folder, changes, said):
    folder.start('lab.reflection', **{**TINY, **changes}).wait().refused(said)
