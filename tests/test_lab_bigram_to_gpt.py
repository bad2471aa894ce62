"""lab/bigram_to_gpt.py: the parts are what they say, and each is worth what the ladder claims."""

import json

import pytest
import torch
from conftest import load_lab
from hypothesis import given, settings
from hypothesis import strategies as st

from flatgpt import optim
from lab import common

ladder = load_lab('bigram_to_gpt', '--n_embd=16', '--block_size=8')


def test_heads_as_a_dimension_of_the_batch_are_separate_heads_gradients_too():
    multi, x = ladder.MultiHead(4, 16, 0.0), torch.randn(3, 8, 16, requires_grad=True)
    towards = torch.randn(3, 8, 16)
    together, one_by_one = multi.heads(x), multi.heads_one_by_one(x)
    torch.testing.assert_close(together, one_by_one)
    for a, b in zip(*(torch.autograd.grad((y * towards).sum(), [x, multi.c_attn.weight])
                      for y in (together, one_by_one)), strict=True):
        assert a.abs().max() > 0.01
        torch.testing.assert_close(a, b)
    one_head = ladder.MultiHead(1, 16, 0.0)
    one_head.load_state_dict(multi.state_dict())
    assert not torch.allclose(one_head.heads(x), together, atol=1e-3)  # four do look at four things


def test_attention_averages_the_values_up_to_here():
    q, k, v = torch.zeros(5, 2), torch.randn(5, 2), torch.arange(5.0)[:, None]  # a query of 0 weighs all alike
    assert ladder.attend(q, k, v, torch.nn.Identity())[:, 0].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_checks_pass_and_catch_another_model(monkeypatch, capsys):
    ladder.check(vocab_size=11)
    assert capsys.readouterr().out.count('off by') == 2
    monkeypatch.setattr(ladder.MultiHead, 'heads_one_by_one', lambda self, x: self.heads(x).flip(-1))
    with pytest.raises(AssertionError, match='from separate heads'):
        ladder.check(vocab_size=11)
    monkeypatch.undo()
    monkeypatch.setattr(ladder.Block, 'forward', lambda self, x: x + self.attn(self.ln_1(x)))  # forgot the MLP
    with pytest.raises(AssertionError, match='from those of model.GPT'):
        ladder.check(vocab_size=11)


@pytest.mark.parametrize('rung', ladder.RUNGS)
def test_no_position_sees_a_later_one(rung):
    model, embedded = ladder.build(rung, vocab_size=11).eval(), []

    def keep(module, arguments, output):
        embedded.append(output)
        output.retain_grad()

    model.transformer.wte.register_forward_hook(keep)
    x = torch.randint(11, (2, 8))
    model(x, x)[0][:, 4].square().sum().backward()
    reach = embedded[0].grad.abs().sum((0, 2)) > 0  # (T,)
    assert reach.tolist() == [rung != 'bigram'] * 4 + [True] + [False] * 3


def test_each_rung_adds_to_the_one_before():
    names = [set(dict(ladder.build(rung, vocab_size=11).named_modules())) for rung in ladder.RUNGS]
    norms = [sum(isinstance(m, torch.nn.LayerNorm) for m in ladder.build(rung, 11).modules()) for rung in ladder.RUNGS]
    drops = [max((m.p for m in ladder.build(rung, 11).modules() if isinstance(m, torch.nn.Dropout)), default=0)
             for rung in ladder.RUNGS]
    assert norms == [0, 0, 0, 0, 0, 0, 5, 5, 9]
    assert drops == [0, 0, 0, 0, 0, 0, 0, 0.1, 0]
    blocks = [sum(name.count('.') == 2 and name.startswith('transformer.h.') for name in rung) for rung in names]
    assert blocks == [0, 1, 1, 1, 2, 2, 2, 2, 4]
    assert ['transformer.h.0.mlp' in rung for rung in names] == [False] * 3 + [True] * 6
    heads = [ladder.build(rung, 11).transformer.h[0].attn.n_head for rung in list(ladder.RUNGS)[1:]]
    assert heads == [1] + [4] * 6 + [8]


@settings(max_examples=8)
@given(st.lists(st.integers(0, 3), min_size=30, max_size=60))
def test_bigram_learns_the_counts_of_the_pairs(ids):
    text = torch.tensor([ids])
    torch.manual_seed(0)
    model = ladder.build('bigram', vocab_size=4)
    for _ in common.train(model, lambda step: (text[:, :-1], text[:, 1:]), 400,
                          optim.adamw(model, 0.0, 0.3, (0.9, 0.99))):
        pass
    counts = torch.zeros(4, 4)
    for a, b in zip(ids, ids[1:], strict=False):
        counts[a, b] += 1
    p, n = model(torch.arange(4)[None])[0][0].softmax(-1), counts.sum(-1, keepdim=True)
    torch.testing.assert_close(torch.where(n > 0, p, 0), counts / n.clamp(min=1), atol=0.02, rtol=0)


@pytest.mark.slow
def test_the_ladder_descends(folder):
    run = folder.start('lab.bigram_to_gpt', dataset='tiny', steps=200, batch_size=4, block_size=16, n_embd=32,
                       out='out').ok()
    rungs = json.loads((folder.path / 'out' / 'bigram_to_gpt.json').read_text())['rungs']
    loss = {name: rung['val_loss'] for name, rung in rungs.items()}
    assert list(rungs) == list(ladder.RUNGS)
    assert loss['bigram'] > loss['one head'] + 0.05, str(loss)
    assert loss['one head'] > loss['multi-head'] + 0.05, str(loss)
    assert loss['multi-head'] > loss['feed-forward'] + 0.02, str(loss)
    assert loss['deeper'] > loss['feed-forward'] + 0.1, str(loss)  # the lecture's case for residual connections
    assert loss['deeper'] > loss['residual'] + 0.1, str(loss)
    assert loss['residual'] > loss['norm'] - 0.05, str(loss)
    assert loss['dropout'] > loss['norm'] + 0.02, str(loss)  # nothing is read often enough to be learnt by heart
    assert loss['multi-head'] > loss['scaled up'], str(loss)
    assert 'heads as a dimension of the batch = 4 separate heads' in run.out
    assert 'the last rung = model.GPT' in run.out
    assert all(len(rung['sample'].replace('\\n', 'n')) == 60 for rung in rungs.values())
    assert max(map(len, run.out.splitlines())) <= 85, run.out  # a sample's line ends take two columns each


@pytest.mark.parametrize('settings, said', [
    ({'steps': 0}, 'steps=0: expected 1 or more'), ({'n_embd': 18}, 'n_embd=18 is not divisible by n_head=4'),
    ({'dropout': 1.0}, 'dropout=1.0: expected at least 0 and below 1'), ({'block_size': 400}, '--block_size=332'),
    ({'dataset': 'nothing'}, 'no dataset in data/nothing')])
def test_bad_settings_are_refused(folder, settings, said):
    folder.start('lab.bigram_to_gpt', dataset=settings.pop('dataset', 'tiny'), **settings).wait().refused(said)
