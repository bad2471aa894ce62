"""Test lab/flops.py. Run: pytest tests/test_lab_flops.py"""

import json

import pytest
from conftest import load_lab

# parameters of the published weights on the Hugging Face hub
WEIGHTS = {
    'GPT-2 124M': 124_439_808, 'GPT-2 355M': 354_823_168, 'GPT-2 774M': 774_030_080, 'GPT-2 1.5B': 1_557_611_200,
    'LLaMA 7B': 6_738_415_616, 'LLaMA 13B': 13_015_864_320, 'LLaMA 33B': 32_528_943_616, 'LLaMA 65B': 65_285_660_672,
    'Llama 2 70B': 68_976_648_192, 'Llama 3 405B': 405_853_388_800}
# parameters in millions and FLOPs of 300 billion tokens, GPT-3's table D.1
TABLE_D1 = {'GPT-3 125M': (125, 2.25e20), 'GPT-3 350M': (356, 6.41e20), 'GPT-3 760M': (760, 1.37e21),
            'GPT-3 1.3B': (1320, 2.38e21), 'GPT-3 2.7B': (2650, 4.77e21), 'GPT-3 6.7B': (6660, 1.20e22),
            'GPT-3 13B': (12850, 2.31e22), 'GPT-3 175B': (174600, 3.14e23)}


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
    assert figures['published_parameters'].items() >= WEIGHTS.items()
    assert figures['published_costs']['GPT-3 175B']['pf_days'] == pytest.approx(3640, rel=0.03)
    assert (folder.path / 'out' / 'flops.png').exists() and (folder.path / 'out' / 'flops_memory.png').exists()
    assert max(map(len, run.out.splitlines())) <= 80


def test_costs_are_the_published_ones():
    lab = load_lab('flops', '--gpu=A100', '--utilisation=0.5', '--price=4')
    costs = {name: lab.cost(model) for name, model in lab.PUBLISHED.items() if model.tokens}
    n = {name: sum(lab.costs.parameters(model.config).values()) for name, model in lab.PUBLISHED.items()}
    for name, (millions, n_flops) in TABLE_D1.items():
        assert n[name] / 1e6 == pytest.approx(millions, rel=0.004)
        assert costs[name]['pf_days_by_6ND'] == pytest.approx(n_flops / 86400e15, rel=0.006)
    shares = [1 - costs[name]['pf_days_by_6ND'] / costs[name]['pf_days'] for name in TABLE_D1]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.2 > 0.03 > shares[-1]  # scores vanish

    llama = lab.PUBLISHED['LLaMA 65B']
    assert llama.tokens / llama.gpu_hours / 3600 == pytest.approx(380, rel=0.002)  # tokens a second, by its section 2.4
    assert costs['LLaMA 65B']['gpu_days'] / 2048 == pytest.approx(21, rel=0.03)  # days on 2,048 A100, the same
    assert costs['LLaMA 65B']['dollars'] == pytest.approx(4 * 24 * 2048 * 21, rel=0.03)
    assert costs['GPT-3 175B']['mfu'] * 125 == pytest.approx(24.6, rel=0.04)  # TFLOP/s of a V100, Patterson et al.
    assert 0.35 < costs['Llama 3 405B']['mfu'] < 0.43  # by the paper 38 to 43% without interruptions

    # 5.4B of Chinchilla's parameters are Transformer-XL's, a matrix of positions per layer
    assert n['Chinchilla'] + 80 * 8192**2 == pytest.approx(70e9, rel=0.001)
    differing = [name for name, model in lab.PUBLISHED.items()
                 if lab.as_printed(n[name], model.parameters) != model.parameters]
    assert differing == ['GPT-2 124M', 'GPT-2 355M', 'GPT-2 774M', 'GPT-2 1.5B', 'Chinchilla', 'LLaMA 65B',
                         'Llama 2 70B', 'Llama 3 405B']


@pytest.mark.parametrize('value, text', [(2.604, '2.60'), (27.41, '27.4'), (3638, '3,640'), (999.6, '1,000'),
                                         (0.5, '0.500')])
def test_three_digits(value, text):
    assert load_lab('flops').rounded(value) == text


@pytest.mark.slow
def test_a_step_takes_what_was_predicted():
    parts, measured, _ = load_lab('flops').check_step(rounds=1)
    assert 0.75 < sum(parts.values()) / measured < 1.25
    assert max(parts, key=parts.get) == 'products'


@pytest.mark.parametrize('changes, said', [
    ({'size': '125M'}, '--size=125M: '), ({'preset': 'gpt4'}, '--preset=gpt4: '),
    ({'optimizer': 'sgd'}, '--optimizer=sgd: '),
    ({'batch_size': 0}, 'expected 1 or more'), ({'utilisation': 40.0}, 'above 0 and at most 1'),
    ({'price': 0.0}, 'price=0.0: expected above 0'), ({'gpu': 'TPU'}, '--gpu=TPU: '),
    ({'n_head': 7}, 'n_embd=768 is not divisible by n_head=7')])
def test_settings_that_can_not_be(folder, changes, said):
    folder.start('lab.flops', measure=False, out='out', **changes).refused(said)
