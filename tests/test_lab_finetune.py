"""lab/finetune.py: a pretrained start wins at equal data and steps, and they are equal."""

import json

import pytest
import torch
from conftest import load_lab

from lab import common

TINY = {'corpus': 'bytes', 'input': 'target.txt', 'pretrain_steps': 60, 'steps': 20, 'part': 0.2, 'n_layer': 1,
        'n_head': 2, 'n_embd': 32, 'block_size': 16, 'batch_size': 8, 'compile': False, 'out': 'out'}


@pytest.mark.slow
def test_the_pretrained_start_wins(texts):
    run = texts.start('lab.finetune', **TINY).ok()
    figures = json.loads((texts.path / 'out' / 'finetune.json').read_text())
    last = {name: curve[-1] for name, curve in figures['curves'].items()}
    for text in ('all', 'part'):
        assert last[f'pretrained, {text}'][0] == last[f'scratch, {text}'][0] == TINY['steps']
        assert last[f'pretrained, {text}'][2] < last[f'scratch, {text}'][2] - 0.1, last
    assert abs(last['pretraining'][1] - last['pretraining'][2]) < 0.1, last  # train and val do not part
    assert last['scratch, long'][0] == TINY['pretrain_steps'] + TINY['steps']
    assert (texts.path / 'out' / 'finetune.png').stat().st_size > 10_000
    assert all(len(line) <= 80 for line in run.out.splitlines() if not line.startswith('note:'))


def test_both_starts_see_the_same_data_for_as_many_steps(texts, monkeypatch):
    monkeypatch.chdir(texts.path)
    settings = {**TINY, 'steps': 7, 'pretrain_steps': 5}
    lab = load_lab('finetune', *(f'--{key}={value}' for key, value in settings.items()))
    runs = []  # what every model started from, and the batches it was given

    def train(model, get_batch, steps, *arguments, **settings):
        runs.append((model.lm_head.weight.clone(), [get_batch(step) for step in range(steps)]))
        with torch.no_grad():
            model.lm_head.weight += 1  # as if it learnt
        yield from ((step, 0.0) for step in range(steps))

    monkeypatch.setattr(common, 'train', train)
    lab.main()
    (start, pretraining_data), *rest = runs
    assert [len(data) for _, data in runs] == [5, 7, 7, 7, 7, 12]
    for (weight, data), (pretrained_weight, same_data) in (rest[:2], rest[2:4]):
        assert torch.equal(weight, start)  # scratch starts from what pretraining started from
        torch.testing.assert_close(pretrained_weight, start + 1)  # and this one from where that ended
        assert all(torch.equal(a, b) for batch, same in zip(data, same_data, strict=True)
                   for a, b in zip(batch, same, strict=True))
    long_weight, long_data = rest[4]
    assert torch.equal(long_weight, start)
    assert all(torch.equal(x, same_x) for (x, _), (same_x, _) in zip(rest[0][1], long_data, strict=False))

    text = (texts.path / 'target.txt').read_bytes()  # 3,000 bytes: 2,700 to train on, a fifth of them for the part
    for (_, data), end in ((rest[0], 2700), (rest[2], 540)):
        places = [text.find(bytes(row.tolist())) for x, _ in data for row in x]
        assert min(places) >= 0 and end / 2 < max(places) <= end - settings['block_size']


@pytest.mark.parametrize('changes, said', [
    ({'steps': 0}, 'steps=0: expected 1 or more'), ({'part': 1.5}, 'part=1.5: expected above 0 and at most 1'),
    ({'part': 0.001}, 'has 2 bytes, expected more than block_size=16'), ({'finetune_rate': 0.0}, 'finetune_rate=0.0'),
    ({'corpus': 'tiny'}, "tokens of kind 'char', expected bytes"), ({'input': 'nothing.txt'}, 'nothing.txt'),
    ({'corpus': 'nothing'}, 'no dataset in data/nothing'), ({'n_embd': 33}, 'n_embd=33 is not divisible')])
def test_bad_settings_are_refused(texts, changes, said):
    texts.start('lab.finetune', **{**TINY, **changes}).wait().refused(said)
