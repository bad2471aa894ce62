"""Test lab/flops.py. Run: pytest tests/test_lab_flops.py"""

import json

import pytest
from conftest import load_lab


def test_the_script_shows_what_grows(folder):
    run = folder.start('lab.flops', measure=False, out='out').ok()
    figures = json.loads((folder.path / 'out' / 'flops.json').read_text())
    by_size, by_context = figures['shares_by_size'], figures['shares_by_context']
    mlp = [shares['MLP'] for shares in by_size.values()]
    assert mlp == sorted(mlp) and mlp[-1] > 60  # percent
    attention = [shares['projections'] + shares['scores'] for shares in by_context.values()]
    assert attention == sorted(attention) and attention[0] < 30 and attention[-1] > 90
    assert by_size['124M']['head'] > 25 and by_size['175B']['head'] < 1
    assert sum(figures['parameters'].values()) == 124_475_904
    assert figures['step_seconds']['H200'] < figures['step_seconds']['RTX 4090']
    assert (folder.path / 'out' / 'flops.png').exists() and (folder.path / 'out' / 'flops_memory.png').exists()
    assert max(map(len, run.out.splitlines())) <= 80


@pytest.mark.slow
def test_a_step_takes_what_was_predicted():
    parts, measured, _ = load_lab('flops').check_step(rounds=1)
    assert 0.75 < sum(parts.values()) / measured < 1.25
    assert max(parts, key=parts.get) == 'products'


@pytest.mark.parametrize('changes, said', [
    ({'size': '125M'}, '--size=125M: '), ({'preset': 'gpt4'}, '--preset=gpt4: '),
    ({'optimizer': 'sgd'}, '--optimizer=sgd: '),
    ({'batch_size': 0}, 'expected 1 or more'), ({'utilisation': 40.0}, 'above 0 and at most 1'),
    ({'n_head': 7}, 'n_embd=768 is not divisible by n_head=7')])
def test_settings_that_can_not_be(folder, changes, said):
    folder.start('lab.flops', measure=False, out='out', **changes).refused(said)
