"""lab/own_samples.py: intervals by hand, and rounds that are made once."""

import json

import numpy as np
import pytest
from conftest import load_lab

TINY = {'share': 0.01, 'seeds': 2, 'prompts': 14, 'num_samples': 2, 'max_iters': 200, 'n': 7,
        'out': 'out'}


def test_intervals_by_hand():
    """Of 1, 2, 3: mean 2, sd 1, and t of two degrees of freedom is 4.3027."""
    lab = load_lab('own_samples')
    assert lab.over_seeds([1, 2, 3]) == pytest.approx([2, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5], abs=1e-3)
    assert np.isnan(lab.over_seeds([1])[1])
    rng = np.random.default_rng(0)
    low, high = lab.bootstrap((rng.random((3, 700)) < 0.1) * 1.0)
    assert 0.07 < low < 0.1 < high < 0.14
    assert lab.bootstrap(np.ones((3, 7))) == [1, 1]


def test_the_commands(tmp_path, monkeypatch):
    """Each round has its own questions; the answers are cached as the models are; hard questions alone are kept."""
    monkeypatch.chdir(tmp_path)
    lab, ran = load_lab('own_samples', '--keep=hard'), []

    def run(name, command, can_resume):
        ran.append((name, command))
        outs = [part.removeprefix('--out=') for part in command if part.startswith('--out=')]
        for path in outs:
            with open(path, 'w') as file:
                file.write('{"messages": []}\n')

    monkeypatch.setattr('lab.course.run', run)
    course = lab.Course(out='.')
    for number in (1, 2, 2):
        folder, n_talks = lab.make(course, number)
    assert (folder, n_talks) == ('./state_of_gpt/own-2', 1)
    assert [name for name, _ in ran] == ['data', 'texts', 'base', 'sft', *(
        f'own-{number}{part}' for number in (1, 2) for part in ('-answers', '-data', ''))]
    commands = dict(ran)
    assert {'--skip_equal=True', '--write=sft', '--seed=1001'} < set(commands['own-1-answers'])
    assert '--seed=2001' in commands['own-2-answers'] and '--muon_lr=0.005' in commands['own-1']


@pytest.mark.slow
def test_a_run(course):
    run = course.start('lab.own_samples', **TINY).wait()
    if 'the answers make no conversations' in run.out:
        pytest.skip('the tiny model answered no question')
    assert run.code == 0, run.out
    figures = json.loads((course.path / 'out' / 'own_samples.json').read_text())
    assert len(figures['conversations']) == 2 and figures['gain'][1] <= figures['gain'][0] <= figures['gain'][2]
    assert (course.path / 'out' / 'own_samples.png').stat().st_size > 5_000
