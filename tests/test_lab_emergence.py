"""lab/emergence.py: whole answers come in a jump, the log-likelihood of their letters does not."""

import json

import pytest
import torch
from conftest import load_lab
from torch.nn import functional as F


def test_strings():
    lab = load_lab('emergence', '--length=5', '--n_letters=4')
    x, y = lab.strings(50, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (50, 10)
    for question, target in zip(x.tolist(), y.tolist(), strict=True):
        answer = sorted(question[:5])
        assert question[5] == 4 and question[6:] == answer[:-1]
        assert target == [-1] * 5 + answer
    assert len(set(map(tuple, x.tolist()))) > 40 and set(x[:, :5].flatten().tolist()) == {0, 1, 2, 3}


def test_measure_by_hand():
    lab = load_lab('emergence', '--length=2', '--n_letters=3')
    y = torch.tensor([[-1, -1, 0, 1], [-1, -1, 2, 2], [-1, -1, 0, 2]])
    logits = torch.zeros(3, 4, 4)
    logits[[0, 0, 1, 1, 2, 2], [2, 3] * 3, [0, 1, 2, 1, 0, 2]] = 1.0  # only the fourth answer's last letter is wrong

    class Model(torch.nn.Module):
        def forward(self, x, y):
            return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)

    right, wrong = torch.log_softmax(torch.tensor([1.0, 0.0, 0.0, 0.0]), dim=0)[:2].tolist()
    measured = lab.measure(Model(), y, y)
    assert measured['log_likelihood'] == pytest.approx((5 * right + wrong) / 6)
    assert measured['letters'] == pytest.approx(5 / 6)
    assert measured['exact'] == pytest.approx(2 / 3)


def test_largest_step():
    lab = load_lab('emergence')
    assert lab.largest_step([0.0, 0.1, 0.9, 1.0]) == pytest.approx(0.8)
    assert lab.largest_step([-3.0, -2.0, -1.0]) == pytest.approx(0.5)


def test_widest_gap():
    lab = load_lab('emergence')
    measured = {'log_likelihood': [-3.0, -2.0, -1.0, 0.0, 0.0], 'exact': [0.0, 0.0, 0.1, 0.7, 0.8]}
    assert lab.risen(measured['log_likelihood']) == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    assert lab.widest_gap(measured) == 2
    assert lab.risen([0.0, 0.0]) == [0.0, 0.0]


@pytest.mark.slow
def test_whole_answers_jump_and_their_likelihood_does_not(folder):
    run = folder.start('lab.emergence', widths='3,4,6,8,12', length=12, seeds=1, steps=200, batch_size=64,
                       n_test=500).ok()
    assert 'whole answers' in run.out
    assert (folder.path / 'out-lab' / 'emergence.png').stat().st_size > 10_000
    found = json.loads((folder.path / 'out-lab' / 'emergence.json').read_text())
    likelihood, exact = found['log_likelihood'], found['exact']
    assert found['parameters'] == sorted(found['parameters'])
    assert all(after > before - 0.05 for before, after in zip(likelihood, likelihood[1:], strict=False))
    assert max(exact[:3]) < 0.05 and exact[-1] > 0.2
    assert likelihood[2] - likelihood[0] > 0.3 * (likelihood[-1] - likelihood[0])
    assert found['ahead'] - found['behind'] > 0.4
    assert found['largest_step']['exact'] > 1.3 * found['largest_step']['log_likelihood']


@pytest.mark.parametrize('setting, said', [
    ({'widths': '4,many'}, "widths='4,many': expected two or more"), ({'widths': '8'}, 'such as 4,8,16'),
    ({'widths': '8,8'}, 'different numbers'), ({'length': 0}, 'length=0: expected 1 or more'),
    ({'seeds': 0}, 'seeds=0'),
])
def test_refuses(folder, setting, said):
    folder.start('lab.emergence', **setting).wait().refused(said)
