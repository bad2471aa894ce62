"""Test optim.py against update rules and schedules written out by hand."""

import copy
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES

import flatgpt.muon
from flatgpt import entries, optim, pretrained
from flatgpt.parallel import World
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
    entries.load_optimizer(new, old.state_dict())
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
    entries.load_optimizer(new, saved)
    backward(gpt, seed=1)
    new.step()
    for name, p in gpt.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], atol=1e-6, rtol=0)


def test_load_optimizer_of_another_model(gpt):
    other = GPT(GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=2, n_embd=8))
    with pytest.raises(ValueError, match='another set of parameters'):
        entries.load_optimizer(optim.adamw(gpt, 0.1, 1e-3, (0.9, 0.95)),
                             optim.adamw(other, 0.1, 1e-3, (0.9, 0.95)).state_dict())


# Muon -----------------------------------------------------------------------------------------------------------------

ALONE = World(0, 0, 1)


def modern(**changes):
    """A model with a kind of everything, all of its weights away from 0."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**ARCHITECTURES['modern'], 'block_size': 8, 'vocab_size': 10, 'n_layer': 2, 'n_head': 4,
                             'n_kv_head': 2, 'n_embd': 16, 'mlp': 'swiglu', 'value_embeddings': True,
                             'residual_lambdas': True, 'head_gates': True, 'value_gates': True, **changes}))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def muon(model, weight_decay=0.0, dtype=torch.float32, momentum=0.85, world=ALONE, cautious=False):
    config = {'weight_decay': weight_decay, 'learning_rate': 1e-3, 'muon_lr': 2e-2, 'embedding_lr': 5e-3,
              'beta1': 0.9, 'beta2': 0.95, 'momentum': momentum, 'cautious_decay': cautious}
    return flatgpt.muon.create(model, config, dtype, world)


@pytest.mark.parametrize('shape', [(3, 8, 8), (2, 6, 20), (1, 1, 5), (4, 16, 16), (2, 30, 8), (1, 200, 210), (1, 195, 400)])
def test_orthogonalize_against_the_svd(shape):
    """The singular vectors stay, and a singular value becomes what the polynomials make of it."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 37
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    got = flatgpt.muon.orthogonalize(x, torch.float64)
    expected = s / s.pow(8).sum(-1, keepdim=True).pow(1 / 8)
    is_large = expected > 0.01
    for a, b, c in flatgpt.muon.QUINTICS:
        expected = a * expected + b * expected**3 + c * expected**5
    torch.testing.assert_close(u.mT @ got @ vt.mT, torch.diag_embed(expected), atol=1e-5, rtol=0)
    assert 0.71 < expected[is_large].min() and expected.max() < 1.29


def test_quintics_are_the_best():
    """Their errors from 1 have four extremes of equal size and alternating sign, which Chebyshev proves to be the best."""
    low, high = 0.01, 1.0
    for a, b, c in flatgpt.muon.QUINTICS:
        x = torch.linspace(low / 1.01, high * 1.01, 200_001, dtype=torch.float64)
        error = a * x + b * x**3 + c * x**5 - 1
        turns = (error[1:-1] - error[:-2]) * (error[2:] - error[1:-1]) < 0
        extremes = torch.cat((error[:1], error[1:-1][turns], error[-1:]))
        size = -error[0]
        torch.testing.assert_close(extremes, size * torch.tensor([-1.0, 1.0, -1.0, 1.0]).double(), atol=1e-3, rtol=0)
        low, high = 1 - size, 1 + size
    assert (low, high) == pytest.approx((0.711, 1.289), abs=1e-3)


def test_symmetric_products():
    """By blocks, of odd sizes too, as torch multiplies them whole."""
    x = torch.randn(2, 389, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gram = flatgpt.muon.symmetric(x, x.mT)
    torch.testing.assert_close(gram, x @ x.mT)
    torch.testing.assert_close(flatgpt.muon.symmetric(gram, gram), x @ x.mT @ x @ x.mT)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-3), (torch.bfloat16, 0.25)])
@pytest.mark.parametrize('n', [64, 96])
def test_orthogonalize_in_less_than_float64(dtype, tolerance, n):
    """Over singular values from 1 to 1e-4: the distance is the largest singular value of the difference."""
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(k, 64, generator=generator, dtype=torch.float64))[0] for k in (64, n))
    x = (u * torch.logspace(-4, -8, 64, dtype=torch.float64) @ v.T)[None]
    got = flatgpt.muon.orthogonalize(x.float(), dtype)
    assert got.dtype == dtype
    expected = flatgpt.muon.orthogonalize(x, torch.float64)
    assert torch.linalg.matrix_norm(got.double() - expected, 2) < tolerance
    assert torch.equal(flatgpt.muon.orthogonalize(torch.zeros(2, 3, 4), dtype), torch.zeros(2, 3, 4, dtype=dtype))


def test_what_muon_updates():
    """Matrices of the blocks, in the parts that are meant; every other parameter is in one group of AdamW's."""
    for tied in (False, True):
        model = modern(tie_embeddings=tied, pos='learned')
        names = {id(p): name for name, p in model.named_parameters()}
        matrices, tables, rest = muon(model, 0.3).param_groups
        parts = {names[id(p)]: rows for p, rows in zip(matrices['params'], matrices['parts'], strict=True)}
        assert parts == {f'transformer.h.{i}.{name}.weight': rows for i in range(2) for name, rows in (
            ('attn.c_attn', [16, 8, 8]), ('attn.c_proj', [16]), ('mlp.c_fc', [64, 64]), ('mlp.c_proj', [16]))}
        assert [names[id(p)] for p in tables['params']] == [
            *(['transformer.wte.weight'] if not tied else []), 'transformer.wpe.weight', 'transformer.vte.1.weight']
        heads = {'transformer.wte.weight'} if tied else {'lm_head.weight'}
        gates = {'transformer.h.1.attn.head_gate', 'transformer.h.1.attn.value_gate'}
        assert heads | gates < {names[id(p)] for p in rest['params']}
        assert sorted(names.values()) == sorted(names[id(p)] for g in (matrices, tables, rest) for p in g['params'])
        assert [g['weight_decay'] for g in (matrices, tables, rest)] == [0.3, 0.0, 0.0]
        assert [g['lr_scale'] for g in (matrices, tables, rest)] == pytest.approx([20.0, 5.0, 1.0])


@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='torch before 2.9 has no Muon')
def test_updates_are_torchs(monkeypatch):
    """Each matrix, q, k, v, gate and up for themselves, as by torch.optim.Muon; all else as by torch.optim.AdamW.

    torch orthogonalizes by other polynomials; here both do it exactly.
    """
    def exact(x, *_):
        u, _, vt = torch.linalg.svd(x, full_matrices=False)
        return u @ vt

    monkeypatch.setattr(flatgpt.muon, 'orthogonalize', exact)
    monkeypatch.setattr('torch.optim._muon._zeropower_via_newtonschulz', exact)
    model = modern()
    ours = muon(model, weight_decay=0.1)
    matrices, tables, rest = ours.param_groups
    copies = {p: [part.detach().clone().requires_grad_() for part in p.split(rows)]
              for p, rows in zip(matrices['params'], matrices['parts'], strict=True)}
    copies |= {p: [p.detach().clone().requires_grad_()] for p in tables['params'] + rest['params']}

    def of(group):
        return [copy for p in group['params'] for copy in copies[p]]

    theirs = [torch.optim.Muon(of(matrices), weight_decay=0.1, momentum=0.85),
              torch.optim.AdamW([{'params': of(tables)}, {'params': of(rest)}], betas=(0.9, 0.95), weight_decay=0.0)]
    start = {p: p.detach().clone() for p in copies}
    for step in range(3):
        lr = 1e-3 / (step + 1)
        for p, parts in copies.items():
            for part in parts:  # far from singular, or rounding would decide over the weakest directions
                part.grad = torch.randn_like(part)
                if part.dim() == 2:
                    u, s, vt = torch.linalg.svd(part.grad, full_matrices=False)
                    part.grad = u @ torch.diag(torch.linspace(2, 1, len(s))) @ vt
            p.grad = torch.cat([part.grad for part in parts])
        optim.set_rates(ours, lr)
        theirs[0].param_groups[0]['lr'] = 20 * lr
        theirs[1].param_groups[0]['lr'], theirs[1].param_groups[1]['lr'] = 5 * lr, lr
        for optimizer in (ours, *theirs):
            optimizer.step()
    for p, parts in copies.items():
        step_size = (p - start[p]).abs().max()
        assert step_size > 1e-3
        torch.testing.assert_close(p.detach(), torch.cat(parts).detach(), atol=1e-4 * step_size.item(), rtol=0)


def test_cautious_decay_by_hand():
    """Only weights whose sign is the step's decay, at a rate that falls with the square of the learning rate."""
    p, step = torch.tensor([2.0, -2.0, 2.0, -2.0, 4.0]), torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0])
    flatgpt.muon.update([p], [step], {'lr': 0.1, 'weight_decay': 0.5, 'cautious': True, 'highest': 0.4})
    shrunk = 1 - 0.1 * 0.5 * 0.25
    assert p.tolist() == pytest.approx([2 * shrunk - 0.1, -2 - 0.1, 2 + 0.1, -2 * shrunk + 0.1, 4 * shrunk])


def test_cautious_decay_of_a_step():
    """A whole step, tall matrices too, is that without decay minus the decay of the weights that it shrank."""
    plain, cautious = modern(), modern()
    optimizers = muon(plain), muon(cautious, 0.3, cautious=True)
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for model, optimizer in zip((plain, cautious), optimizers, strict=True):
        backward(model)
        optim.set_rates(optimizer, 5e-4)  # half of the highest
        optimizer.step()
    matrices = set(map(id, optimizers[0].param_groups[0]['params']))
    for (name, p), q in zip(plain.named_parameters(), cautious.parameters(), strict=True):
        old, decay = before[name], 1e-2 * 0.3 / 2 * (id(p) in matrices)
        torch.testing.assert_close(q.detach(), p - decay * old * ((old - p) * old >= 0), atol=1e-6, rtol=1e-5)


def test_rates_of_matrices_apart():
    optimizer = muon(modern())
    optim.set_rates(optimizer, 4e-4, 1e-4)
    assert [group['lr'] for group in optimizer.param_groups] == pytest.approx([2e-3, 2e-3, 4e-4])


@pytest.mark.parametrize('changes, message', [
    ({'cautious_decay': True}, "cautious_decay=True: expected optimizer='muon' and weight_decay above 0, not 'adamw'"),
    ({'cautious_decay': True, 'optimizer': 'muon', 'weight_decay': 0.0}, "not 'muon' and 0.0"),
    ({'muon_decay_fraction': 0.8}, "muon_decay_fraction=0.8: expected optimizer='muon' and lr_schedule='wsd'"),
    ({'muon_decay_fraction': 0.8, 'optimizer': 'muon', 'lr_schedule': 'cosine'}, "not 'muon' and 'cosine'")])
def test_settings_without_an_effect_are_refused(changes, message):
    config = {'optimizer': 'adamw', 'decay_lr': True, 'learning_rate': 1.0, 'warmup_iters': 4, 'lr_decay_iters': 20,
              'max_iters': 20, 'min_lr': 0.1, 'lr_schedule': 'wsd', 'decay_fraction': 0.2, 'weight_decay': 0.1}
    with pytest.raises(ValueError, match=re.escape(message)):
        optim.schedule({**config, **changes})


def test_momentum_by_hand():
    assert [flatgpt.muon.momentum_at(step, 0.95) for step in (0, 150, 300, 9999)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert [flatgpt.muon.momentum_at(step, 0.5) for step in (0, 150, 300)] == [0.5] * 3
    model = modern()
    optimizer = muon(model, momentum=0.95)
    p = optimizer.param_groups[0]['params'][0]
    expected = torch.zeros_like(p)
    for step in range(3):
        backward(model, seed=step)
        m = 0.85 + step / 3000
        expected = m * expected + (1 - m) * p.grad
        optimizer.step()
        torch.testing.assert_close(optimizer.state[p]['momentum_buffer'], expected)
        assert p.grad is None and optimizer.state[p]['step'] == step + 1


def test_muon_in_batches_and_with_a_closure(monkeypatch):
    """However many matrices are orthogonalized at once, the steps are the same; step() returns the closure's loss."""
    models = [modern(), modern()]
    optimizers = list(map(muon, models))
    backward(models[0])
    optimizers[0].step()
    monkeypatch.setattr(flatgpt.muon, 'BATCH', 1)
    sizes = []
    monkeypatch.setattr(flatgpt.muon, 'orthogonalize', lambda x, dtype, f=flatgpt.muon.orthogonalize: sizes.append(len(x)) or f(x, dtype))

    def closure():
        assert torch.is_grad_enabled()
        backward(models[1])
        return 1.5

    assert optimizers[1].step(closure) == 1.5 and set(sizes) == {1}
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('decay, cautious', [(0.0, False), (0.1, True)])
def test_muon_goes_on_where_it_was(decay, cautious):
    """Through a checkpoint, bit for bit; the rates are those of the new settings."""
    models = [modern(), modern()]
    whole, half = (muon(model, decay, cautious=cautious) for model in models)
    for step in range(4):
        if step == 2:
            saved = copy.deepcopy(half.state_dict())
            half = muon(models[1], decay, cautious=cautious)
            entries.load_optimizer(half, saved)
        for model, optimizer in zip(models, (whole, half), strict=True):
            backward(model, seed=step)
            optim.set_rates(optimizer, 1e-3)
            optimizer.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(ValueError, match='another set of parameters'):
        entries.load_optimizer(muon(models[0]), optim.adamw(models[1], 0.1, 1e-3, (0.9, 0.95)).state_dict())


def test_muon_leaves_overflowing_steps_out():
    """With float16's gradient scaler: a gradient that is infinite anywhere changes nothing."""
    model = modern()
    optimizer, scaler = muon(model), torch.amp.GradScaler('cpu', init_scale=4.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for infinite in (True, False):
        backward(model)
        for p in model.parameters():
            p.grad *= 4
        if infinite:
            model.lm_head.weight.grad[0, 0] = torch.inf
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update(4.0)
        same = [torch.equal(p, before[name]) for name, p in model.named_parameters()]
        assert all(same) if infinite else not any(same)


def test_frozen_matrices_stay_out_of_muon():
    model = modern()
    for name, p in model.named_parameters():
        p.requires_grad_('h.1.' not in name)
    optimizer = muon(model)
    before = model.transformer.h[1].attn.c_attn.weight.detach().clone()
    backward(model)
    optimizer.step()
    assert len(optimizer.param_groups[0]['params']) == 4
    assert torch.equal(model.transformer.h[1].attn.c_attn.weight, before)


@pytest.mark.parametrize('precision, dtype', [('bfloat16', torch.bfloat16), ('float16', torch.float32)])
def test_create(precision, dtype):
    """Settings of train.py give the same optimizer as its parts."""
    config = {'weight_decay': 0.1, 'learning_rate': 1e-3, 'muon_lr': 2e-2, 'embedding_lr': 5e-3, 'beta1': 0.9,
              'beta2': 0.95}
    ours = optim.create(modern(), {**config, 'optimizer': 'muon'}, precision, ALONE)
    assert isinstance(ours, flatgpt.muon.Muon) and ours.dtype == dtype and ours.param_groups[0]['momentum'] == 0.95
    ours, theirs = optim.create(modern(), {**config, 'optimizer': 'adamw'}, precision, ALONE), optim.adamw(
        modern(), 0.1, 1e-3, (0.9, 0.95))
    for a, b in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert {key: a[key] for key in a if key != 'params'} == {key: b[key] for key in b if key != 'params'}


def test_check_same():
    pretrained.check_same('muon', {'optimizer': 'muon'}, 'ckpt.pt')
    pretrained.check_same('adamw', {}, 'ckpt.pt')  # nanoGPT's settings do not name one
    with pytest.raises(ValueError, match="'adamw', but the state in ckpt.pt is that of 'muon'"):
        pretrained.check_same('adamw', {'optimizer': 'muon'}, 'ckpt.pt')


# schedules --------------------------------------------------------------------------------------------

def test_cosine_by_hand():
    lr = [optim.Schedule(1.0, 4, 12, 0.1).cosine(step) for step in range(15)]
    assert lr[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert lr[4] == 1.0 and lr[12:] == [0.1, 0.1, 0.1]
    assert lr[8] == pytest.approx(0.55)  # half way
    assert lr[6] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)  # cos 45 degrees
    assert optim.Schedule(1.0, 0, 0, 0.1).cosine(0) == 0.1
    assert optim.Schedule(1.0, 10, 10, 0.1).cosine(5) == pytest.approx(6 / 11)


def test_wsd_by_hand():
    lr = [optim.Schedule(1.0, 4, 20, 0.1, 0.25).wsd(step) for step in range(24)]
    assert lr[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert lr[4:16] == [1.0] * 12
    assert lr[15:21] == pytest.approx([1.0, 0.82, 0.64, 0.46, 0.28, 0.1])
    assert lr[20:] == pytest.approx([0.1] * 4)


def test_wsd_rises_to_its_end_before_it_falls():
    """Of 10 steps 6 would decay, but 5 warm up."""
    lr = [optim.Schedule(1.0, 5, 10, 0.0, 0.6).wsd(step) for step in range(11)]
    assert lr == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


def test_wsd_can_be_prolonged():
    """Until a run of 100 steps decays, its rate is that of a run of 1000."""
    short, long = optim.Schedule(1.0, 10, 100, 0.1), optim.Schedule(1.0, 10, 1000, 0.1)
    assert [short.wsd(step) for step in range(80)] == [long.wsd(step) for step in range(80)]


@given(warmup=st.integers(0, 50), decay=st.integers(0, 200), fraction=st.floats(0, 1))
def test_schedules_are_sane(warmup, decay, fraction):
    decay += warmup
    rates = optim.Schedule(1.0, warmup, decay, 0.1, fraction)
    for schedule in (rates.cosine, rates.wsd):
        lr = [schedule(step) for step in range(decay + 5)]
        assert all(0 < rate <= 1.0 for rate in lr) and lr[-1] == pytest.approx(0.1)
        assert all(a < b for a, b in zip(lr[:warmup], lr[1:warmup], strict=False))  # rises,
        assert all(a >= b for a, b in zip(lr[warmup:], lr[warmup + 1 :], strict=False))  # then never again


@pytest.mark.parametrize('changes, step, expected', [
    ({}, 8, 0.55), ({'lr_decay_iters': None}, 12, 0.55), ({'decay_lr': False}, 8, 1.0),
    ({'lr_schedule': 'wsd', 'decay_fraction': 0.5}, 9, 0.55), ({'batch_stages': 4, 'decay_lr': False}, 2, 0.5),
    ({'batch_stages': 4}, 8, 0.55 * 0.75 ** 0.5), ({'batch_stages': 4}, 12, 0.1)])
def test_schedule_of_settings(changes, step, expected):
    config = {'optimizer': 'adamw', 'decay_lr': True, 'learning_rate': 1.0, 'warmup_iters': 4, 'lr_decay_iters': 12, 'max_iters': 20,
              'min_lr': 0.1, 'lr_schedule': 'cosine', 'decay_fraction': 0.2}
    assert optim.schedule({**config, **changes})(step) == pytest.approx([expected] * 2)


def test_matrices_decay_apart():
    """AdamW's rate falls over the last 2 of 10 steps, that of the matrices over the last 5; without a setting alike."""
    config = {'optimizer': 'muon', 'decay_lr': True, 'learning_rate': 1.0, 'warmup_iters': 0, 'lr_decay_iters': 10,
              'max_iters': 10, 'min_lr': 0.0, 'lr_schedule': 'wsd', 'decay_fraction': 0.2}
    for share, expected in ((0.5, {5: [1.0, 1.0], 8: [1.0, 0.4], 9: [0.5, 0.2]}), (None, {8: [1.0, 1.0], 9: [0.5, 0.5]})):
        rates_at = optim.schedule({**config, 'muon_decay_fraction': share})
        for step, rates in expected.items():
            assert rates_at(step) == pytest.approx(rates)
