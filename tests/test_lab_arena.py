"""lab/arena.py: Bradley-Terry scores against known odds, judges with and without bias, a person's pairs."""

import json

import numpy as np
import pytest
from conftest import load_lab

from data.documents import read_records
from posttrain.preferences import to_pair

TINY = {'share': 0.01, 'questions': 14, 'battles': 60, 'gpt_battles': 8, 'num_samples': 2, 'bootstraps': 5,
        'out': 'out'}


def test_two_contestants_by_hand():
    """Three wins to one are odds of 3, 400 log10(3) points; a win for each order and ties are equal."""
    lab = load_lab('arena')
    scores = lab.bradley_terry(np.array([[0, 3.0], [1, 0]]))
    assert scores[0] - scores[1] == pytest.approx(400 * np.log10(3), abs=0.1) and scores.mean() == pytest.approx(1000)
    assert lab.bradley_terry(np.array([[0, 2.5], [2.5, 0]])) == pytest.approx([1000, 1000])
    assert lab.bradley_terry(np.array([[0, 4.0], [0, 0]]))[0] == pytest.approx(2000, abs=1)  # infinite without limit


def test_scores_are_those_that_made_the_battles():
    lab = load_lab('arena')
    rng, truth = np.random.default_rng(0), np.array([1300.0, 1000, 950, 750])
    played = lab.draw_battles(20_000, 50, 4, rng)
    assert (played[:, 1] != played[:, 2]).all()
    odds = 1 / (1 + 10 ** ((truth[played[:, 2]] - truth[played[:, 1]]) / 400))
    points = (rng.random(len(played)) < odds).astype(float)
    rows = lab.scores_of(played, points, 4)
    assert rows[:, 0] == pytest.approx(truth, abs=12)
    assert (rows[:, 1] <= truth).all() and (truth <= rows[:, 2]).all() and (rows[:, 2] - rows[:, 1] < 40).all()


def test_a_biased_judge_is_found():
    """One that always prefers the first has bias 1, and flips; one with scores has none."""
    lab = load_lab('arena')
    truth = np.array([1, 0, 0.5, 1])
    always_first = lab.measure_judge(np.ones(4), np.zeros(4), truth)
    assert always_first['first'][0] == always_first['flips'] == 1 and always_first['agrees'][0] == 0.5
    fair = lab.measure_judge(truth, truth, truth)
    assert fair['first'][0] == 0.5 and fair['flips'] == 0 and fair['agrees'][0] == 1
    margins = lab.by_scores({(0, 'a'): 2.0, (0, 'b'): 1.0, (1, 'a'): -np.inf})
    assert lab.points_of(margins([0, 0, 1], ['a', 'b', 'a'], ['b', 'a', 'a'])).tolist() == [1, 0, 0.5]


@pytest.mark.slow
def test_a_run_and_a_person(course):
    run = course.start('lab.arena', **TINY).ok()
    figures = json.loads((course.path / 'out' / 'arena.json').read_text())
    assert len(figures['accuracy']) == 8 and set(figures['scores']) == {
        'checker', 'reward', 'GPT', 'GPT, both orders'}
    assert figures['measures']['checker']['first'][0] == figures['measures']['reward']['first'][0] == 0.5
    assert (course.path / 'out' / 'arena.png').stat().st_size > 10_000
    table = run.out.partition('scores by judge')[2]
    assert max(map(len, table.splitlines())) <= 80
    run = course.start('lab.arena', **TINY, judge='person', typed='1\n=\n2\nq\n').ok()
    assert 'out/arena_pairs.jsonl: 2 pairs; the same command goes on' in run.out and '\nperson: ' in run.out
    course.start('lab.arena', **TINY, judge='person', typed='1\nq\n').ok()
    pairs = [to_pair(record) for _, record in read_records(course.path / 'out' / 'arena_pairs.jsonl')]
    assert len(pairs) == 3 and all(pair['chosen'] != pair['rejected'] for pair in pairs)


@pytest.mark.parametrize('changes, said', [
    ({'questions': 3}, 'questions=3: expected 7 or more'), ({'judge': 'GPT'}, "judge=GPT: expected 'models' or 'person'")])
def test_refused(folder, changes, said):
    folder.start('lab.arena', **{**TINY, **changes}).refused(said)
