"""optim.py against update rules and schedules written out by hand. Run: pytest tests/test_optim.py"""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import optim
from model import GPT, GPTConfig


@pytest.fixture
def gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=10, n_layer=2, n_head=2, n_embd=8))


def backward(model, seed=0):
    idx = torch.randint(10, (2, 8), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(idx, idx)[1].backward()


def test_what_decays(gpt):
    """nanoGPT's groups: matrices and embeddings decay, biases and norms do not; every parameter is in one of them."""
    optimizer = optim.adamw(gpt, 0.1, 1e-3, (0.9, 0.95))
    names = {id(p): name for name, p in gpt.named_parameters()}
    decay, no_decay = ([names[id(p)] for p in group['params']] for group in optimizer.param_groups)
    assert [group['weight_decay'] for group in optimizer.param_groups] == [0.1, 0.0]
    assert decay == ['transformer.wte.weight', 'transformer.wpe.weight'] + [
        f'transformer.h.{i}.{name}.weight' for i in range(2)
        for name in ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')]
    assert sorted(decay + no_decay) == sorted(names.values())
    assert all('.ln_' in name or name.endswith('.bias') for name in no_decay)


def test_frozen_parameters_stay_out(gpt):
    for name, p in gpt.named_parameters():
        p.requires_grad_(name.endswith('c_fc.weight'))
    optimizer = optim.adamw(gpt, 0.1, 1e-3, (0.9, 0.95))
    assert [len(group['params']) for group in optimizer.param_groups] == [2]


def test_updates_by_hand(gpt):
    """Three steps of decoupled AdamW in float64, from the paper's formulas."""
    lr, decay, betas = 1e-2, 0.1, (0.9, 0.95)
    optimizer = optim.adamw(gpt, decay, lr, betas)
    expected = {name: p.detach().double() for name, p in gpt.named_parameters()}
    m = {name: torch.zeros_like(p) for name, p in expected.items()}
    v = {name: torch.zeros_like(p) for name, p in expected.items()}
    for t in range(1, 4):
        backward(gpt, seed=t)
        for name, p in gpt.named_parameters():
            g = p.grad.double()
            m[name] = betas[0] * m[name] + (1 - betas[0]) * g
            v[name] = betas[1] * v[name] + (1 - betas[1]) * g * g
            step = m[name] / (1 - betas[0] ** t) / ((v[name] / (1 - betas[1] ** t)).sqrt() + 1e-8)
            expected[name] = expected[name] * (1 - lr * decay * (p.dim() >= 2)) - lr * step
        optimizer.step()
        for name, p in gpt.named_parameters():
            torch.testing.assert_close(p.detach().double(), expected[name], atol=3e-6, rtol=0)


def test_load_optimizer_takes_moments_not_hyperparameters(gpt):
    old = optim.adamw(gpt, 0.1, 1e-3, (0.9, 0.95))
    backward(gpt)
    old.step()
    new = optim.adamw(gpt, 0.2, 5e-3, (0.8, 0.9))
    optim.load_optimizer(new, old.state_dict())
    assert [(g['lr'], g['betas'], g['weight_decay']) for g in new.param_groups] == [
        (5e-3, (0.8, 0.9), 0.2), (5e-3, (0.8, 0.9), 0.0)]
    for p in gpt.parameters():
        assert torch.equal(new.state[p]['exp_avg'], old.state[p]['exp_avg'])
        assert torch.equal(new.state[p]['exp_avg_sq'], old.state[p]['exp_avg_sq']) and new.state[p]['step'] == 1


def test_load_optimizer_of_plain_adamw(gpt):
    """nanoGPT's state without the fused kernel, whose step may be a number: the next update equals torch's own."""
    groups = [{'params': [p for p in gpt.parameters() if p.dim() >= 2], 'weight_decay': 0.1},
              {'params': [p for p in gpt.parameters() if p.dim() < 2], 'weight_decay': 0.0}]
    old = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    backward(gpt)
    old.step()
    before = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    saved = copy.deepcopy(old.state_dict())
    saved['state'] = {i: {**s, 'step': float(s['step'])} for i, s in saved['state'].items()}
    backward(gpt, seed=1)
    old.step()
    expected = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    gpt.load_state_dict(before, strict=False)
    new = optim.adamw(gpt, 0.1, 1e-3, (0.9, 0.95))
    optim.load_optimizer(new, saved)
    backward(gpt, seed=1)
    new.step()
    for name, p in gpt.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], atol=1e-6, rtol=0)


def test_load_optimizer_of_another_model(gpt):
    other = GPT(GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=2, n_embd=8))
    with pytest.raises(ValueError, match='another set of parameters'):
        optim.load_optimizer(optim.adamw(gpt, 0.1, 1e-3, (0.9, 0.95)),
                             optim.adamw(other, 0.1, 1e-3, (0.9, 0.95)).state_dict())


# schedules ------------------------------------------------------------------------------------------------------------

def test_cosine_by_hand():
    lr = [optim.cosine(step, 1.0, 4, 12, 0.1) for step in range(15)]
    assert lr[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert lr[4] == 1.0 and lr[12:] == [0.1, 0.1, 0.1]
    assert lr[8] == pytest.approx(0.55)  # half way
    assert lr[6] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)  # cos 45 degrees
    assert optim.cosine(0, 1.0, 0, 0, 0.1) == 0.1 and optim.cosine(5, 1.0, 10, 10, 0.1) == pytest.approx(6 / 11)


def test_wsd_by_hand():
    lr = [optim.wsd(step, 1.0, 4, 20, 0.1, 0.25) for step in range(24)]
    assert lr[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert lr[4:16] == [1.0] * 12
    assert lr[15:21] == pytest.approx([1.0, 0.82, 0.64, 0.46, 0.28, 0.1])
    assert lr[20:] == pytest.approx([0.1] * 4)


def test_wsd_can_be_prolonged():
    """Until a run of 100 steps decays, its rate is that of a run of 1000."""
    for step in range(80):
        assert optim.wsd(step, 1.0, 10, 100, 0.1, 0.2) == optim.wsd(step, 1.0, 10, 1000, 0.1, 0.2)


@given(warmup=st.integers(0, 50), decay=st.integers(0, 200), fraction=st.floats(0, 1))
def test_schedules_are_sane(warmup, decay, fraction):
    decay += warmup
    for schedule, extra in ((optim.cosine, ()), (optim.wsd, (fraction,))):
        lr = [schedule(step, 1.0, warmup, decay, 0.1, *extra) for step in range(decay + 5)]
        assert all(0 < rate <= 1.0 for rate in lr) and lr[-1] == pytest.approx(0.1)
        assert all(a < b for a, b in zip(lr[:warmup], lr[1:warmup], strict=False))  # rises,
        assert all(a >= b for a, b in zip(lr[warmup:], lr[warmup + 1 :], strict=False))  # then never again
