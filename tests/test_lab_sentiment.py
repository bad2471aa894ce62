"""lab/sentiment.py: fair reviews, a base model that is kept, and what a run writes."""

import json
import random

import numpy as np
import pytest
from conftest import load_lab

from lab import reviews

TINY = {'labels': '50,20', 'seeds': 2, 'tests': 30, 'documents': 300, 'pretrain_steps': 4, 'n_layer': 1, 'n_head': 2,
        'n_embd': 16, 'least_steps': 3, 'epochs': 0.1, 'out': 'out'}


def test_opinion_words_do_not_give_the_label_away():
    """Both kinds occur in reviews of both labels, and the labels are equally frequent."""
    rng = random.Random(0)
    drawn = [reviews.write(rng) for _ in range(4000)]
    assert len(reviews.GOOD) == len(reviews.BAD) == len({*reviews.GOOD, *reviews.BAD}) / 2
    assert 0.47 < np.mean([is_good for _, is_good in drawn]) < 0.53
    for words, label in ((reviews.GOOD, True), (reviews.BAD, False)):
        here, there = (np.mean([sum(f'{word}' in text.replace('.', ' ').split() for word in words)
                                for text, is_good in drawn if is_good == which]) for which in (label, not label))
        assert 0.3 * here < there < here


@pytest.mark.slow
def test_a_run_and_its_base_model(folder):
    run = folder.start('lab.sentiment', **TINY).ok()
    figures = json.loads((folder.path / 'out' / 'sentiment.json').read_text())
    assert set(figures['curves']) == {'pretrained', 'scratch', 'words and pairs'}
    for points in figures['curves'].values():
        assert [size for size, *_ in points] == [20, 50]
        assert all(0 <= low <= mean <= high <= 1 for _, mean, low, high in points)
    assert set(figures['prompts']) == {'0', '2', '4'} and set(figures['gains']) == {'20', '50'}
    assert (folder.path / 'out' / 'sentiment.png').stat().st_size > 5_000
    assert all(len(line) <= 80 for line in run.out.splitlines() if not line.startswith('--'))
    again = folder.start('lab.sentiment', **TINY).ok()
    assert 'pretraining on' in run.out and 'pretraining on' not in again.out
    assert json.loads((folder.path / 'out' / 'sentiment.json').read_text()) == figures
    assert 'pretraining on' in folder.start('lab.sentiment', **{**TINY, 'seed': 2}).ok().out
    folder.start('posttrain.classify', init_from='out/sentiment/base', data='out/sentiment/labelled.jsonl',
                 out_dir='out/finetuned', max_iters=1, device='cpu').ok()


def test_starts_differ_in_the_trunk_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lab = load_lab('sentiment', '--documents=50', '--pretrain_steps=2', '--n_embd=16', '--n_layer=1')
    base, words = lab.open_base('home')
    pretrained, scratch = (lab.new_classifier(base, start) for start in ('pretrained', 'scratch'))
    for name, weight in base.state_dict().items():
        assert pretrained.state_dict()[name].equal(weight) and weight.shape == scratch.state_dict()[name].shape
    assert not scratch.lm_head.weight.equal(base.lm_head.weight)
    assert not pretrained.value_head.weight.any() and not scratch.value_head.weight.any()
    texts, tests = ([{text for text, _ in lab.draw(200, name)} for name in ('texts', 'tests')])
    assert len(texts & tests) < 2  # drawn apart


def test_the_interval_is_of_draws_and_reviews():
    lab = load_lab('sentiment')
    rng = np.random.default_rng(0)
    right = rng.random((3, 400)) < 0.8
    mean, low, high = lab.interval(right)
    assert low < mean == right.mean() < high and 0.02 < high - low < 0.1
    apart = np.array([[1.0] * 400, [0.0] * 400, [1.0] * 400])  # draws that differ by far more than reviews
    assert np.subtract(*lab.interval(apart)[:0:-1]) > 0.9


@pytest.mark.parametrize('changes, said', [
    ({'labels': '50,x'}, "labels='50,x': expected numbers of 10 or more"), ({'labels': '5'}, 'expected numbers of 10'),
    ({'tests': 0}, 'tests=0: expected 1 or more'), ({'rate': 0.0}, 'rate=0.0: expected above 0')])
def test_bad_settings_are_refused(folder, changes, said):
    folder.start('lab.sentiment', **{**TINY, **changes}).wait().refused(said)
