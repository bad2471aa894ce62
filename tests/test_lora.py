"""Test lora.py: adapters beside frozen weights, alone and through train.py."""

import json

import pytest
import torch
from conftest import same_state, same_tensors
from tiny_models import ARCHITECTURES
from torch import nn

import ops
from config.presets import PRESETS
from flatgpt import lora, pretrained, quantize
from model import GPT, GPTConfig

IDX = torch.randint(40, (2, 16), generator=torch.Generator().manual_seed(0))


def tiny(preset='llama', **changes):
    torch.manual_seed(0)
    sizes = {'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'block_size': 16, 'vocab_size': 40}
    return GPT(GPTConfig(**{**ARCHITECTURES[preset], **sizes, **changes}))


def adapt(model, targets=('c_attn', 'c_fc', 'c_proj'), bits=32):
    """Adapters that do something, as after training."""
    lora.add(model, 4, 8.0, targets, bits)
    for name, p in model.named_parameters():
        if name.endswith('lora_b'):
            nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize('preset', PRESETS)
def test_starts_as_the_model_and_trains_the_adapters_alone(preset):
    model = tiny(preset)
    before, names = model(IDX, IDX)[0], set(model.state_dict())
    lora.add(model, 4, 16.0, ['c_attn', 'mlp.c_proj'])
    assert torch.equal(model(IDX, IDX)[0], before)
    assert names < set(model.state_dict())  # what there was keeps its name
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == set(lora.adapters(model)) == {
        f'transformer.h.{layer}.{name}.lora_{part}' for layer in range(2) for name in ('attn.c_attn', 'mlp.c_proj')
        for part in 'ab'}
    width = model.config.mlp_width
    assert sum(p.numel() for p in trained.values()) == 2 * 4 * ((16 + 48) + (16 + width))  # rank * (inputs + outputs)
    model(IDX, IDX)[1].backward()
    assert all((p.grad is not None) == (name in trained) for name, p in model.named_parameters())


def test_formula():
    """W x + (alpha / rank) B A x + b, and its gradients, as autograd finds them for a dense matrix."""
    torch.manual_seed(0)
    linear = nn.Linear(5, 7)
    layer = lora.LoRALinear(linear, 3, 6.0)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(4, 5)
    dense = linear.weight + 2.0 * layer.lora_b @ layer.lora_a
    expected = x @ dense.T + linear.bias
    torch.testing.assert_close(layer(x), expected)
    ours = torch.autograd.grad(layer(x).square().sum(), [layer.lora_a, layer.lora_b])
    theirs = torch.autograd.grad(expected.square().sum(), [layer.lora_a, layer.lora_b])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('bits', [32, 8, 4])
def test_merged_is_the_same_model(preset, bits):
    model = adapt(tiny(preset), bits=bits)
    expected = model(IDX, IDX)[0]
    plain = tiny(preset)
    lora.merge(model)
    assert not any(isinstance(module, lora.LoRALinear) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(model(IDX, IDX)[0], expected, rtol=1e-4, atol=1e-5)
    assert (plain(IDX, IDX)[0] - expected).abs().max() > 0.1  # the adapters did something


@pytest.mark.parametrize('bits, step', [(8, 1 / 127), (4, 0.3039)])  # NF4's widest gap is at its end
def test_few_bits_keep_weights_and_gradients(bits, step):
    torch.manual_seed(0)
    linear = nn.Linear(33, 24)  # 792 weights, the last block of NF4 is not full
    layer = lora.LoRALinear(linear, 2, 2.0, bits)
    assert layer.weight.nbytes == {8: 792, 4: 416}[bits]
    x = torch.randn(6, 33, requires_grad=True)
    dense = lora.restored(layer.weight, layer.scale, (24, 33))
    assert (dense - linear.weight).abs().max() <= linear.weight.abs().max() * step / 2 * 1.001
    ours, theirs = layer(x), x @ dense.T + linear.bias
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x) for y in (ours, theirs))
    torch.testing.assert_close(ours, theirs)


def test_levels_of_nf4():
    """Quantiles of the normal distribution as in appendix E of the paper: 8 above zero, 7 below, and zero."""
    last = 0.9677083  # the mean of 1 - 1 / 32 and 1 - 1 / 30
    above = torch.special.ndtri(torch.linspace(last, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(last, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((above, below, torch.zeros(1))).sort().values
    torch.testing.assert_close(quantize.NF4, (levels / levels.max()).float(), atol=1e-6, rtol=0)


def test_nf4_by_hand():
    """Each block is scaled by its largest magnitude, and each byte holds two numbers, the first in its high half."""
    weight = torch.zeros(2, 64)
    weight[0, :6] = torch.tensor([2.0, -2.0, 0.1, 0.5, -0.9, 0.04])  # 1, -1, 0.05, 0.25, -0.45, 0.02 of 2
    weight[1, 63] = -1e-3
    codes, absmax = quantize.quantize_nf4(weight)
    assert codes.shape == (2, 32) and absmax.tolist() == [[2.0], [pytest.approx(1e-3)]]
    assert codes[0, :4].tolist() == [0xF0, 0x8A, 0x37, 0x77] and codes[1, 31] == 0x70
    expected = [2.0, -2.0, 2 * 0.07958029955625534, 2 * 0.24611230194568634, -2 * 0.39491748809814453, 0, 0]
    got = quantize.weights_of_nf4(codes, absmax, 128)
    torch.testing.assert_close(got[:7], torch.tensor(expected))
    assert got[127] == -absmax[1] and (got[7:127] == 0).all()
    assert (quantize.weights_of_nf4(*quantize.quantize_nf4(torch.zeros(3, 5)), 15) == 0).all()


def test_head_with_adapters_counts_in_a_loss_in_chunks(monkeypatch):
    model = adapt(tiny(), ['lm_head'])
    expected = model(IDX, IDX)[1]
    monkeypatch.setattr(ops, 'CHUNK', 100)
    torch.testing.assert_close(model(IDX, IDX, return_logits=False)[1], expected)


@pytest.mark.parametrize('rank, targets, changes, said', [
    (0, ['c_attn'], {}, 'lora_rank=0: expected 1 or more'),
    (4, ['q_proj'], {}, "'q_proj' names no linear layer of this model; expected some of c_attn, c_proj, c_fc, lm_head"),
    (4, ['attn'], {}, "'attn' names no linear layer"),
    (4, ['lm_head'], {'tie_embeddings': True}, 'is also the token embedding')])
def test_refused(rank, targets, changes, said):
    with pytest.raises(ValueError, match=said):
        lora.add(tiny(**changes), rank, 8.0, targets)


def test_adapters_of_another_model():
    one, other = adapt(tiny()), adapt(tiny(n_embd=32))
    with pytest.raises(ValueError, match='the adapters are of another model'):
        lora.load_adapters(one, lora.adapters(other))


# through train.py -----------------------------------------------------------------------------------------------------

LORA = {'init_from': 'base', 'lora_rank': 2, 'lora_targets': 'c_attn,mlp.c_proj', 'preset': 'llama', 'block_size': None}


@pytest.fixture
def base(folder):
    folder.train(out_dir='base', preset='llama', max_iters=10).ok()
    return folder


@pytest.mark.parametrize('bits', [32, 4])
def test_run_resumed_bit_for_bit(base, bits):
    run = base.train(**LORA, lora_bits=bits, out_dir='whole').ok()
    assert 'are trained' in run.out
    whole = base.checkpoint('whole')
    assert all(name.endswith(('.lora_a', '.lora_b')) for name in whole['model'])
    assert len(whole['optimizer']['state']) == len(whole['model']) == 2 * 2 * 2
    small, large = ((base.path / out_dir / 'ckpt.pt').stat().st_size for out_dir in ('whole', 'base'))
    assert small < large
    base.train(**LORA, lora_bits=bits, out_dir='half', max_iters=10).ok()
    base.train(**{**LORA, 'init_from': 'resume', 'lora_bits': bits}, out_dir='half').ok()
    same_state(base.checkpoint('half'), whole)


def test_adapters_that_name_int8_load(base, monkeypatch):
    """Checkpoints before 2026-12 have int8 in place of bits."""
    base.train(**LORA, lora_bits=8, out_dir='new', max_iters=2).ok()
    state = base.checkpoint('new')
    assert state['lora'].pop('bits') == 8
    (base.path / 'old').mkdir()
    torch.save({**state, 'lora': {**state['lora'], 'int8': True}}, base.path / 'old' / 'ckpt.pt')
    monkeypatch.chdir(base.path)
    models = [pretrained.open_model('resume', name)[0].state_dict() for name in ('old', 'new')]
    same_tensors(*models)


def test_merged_by_whoever_loads_it(base, monkeypatch):
    base.train(**LORA, out_dir='out', learning_rate=0.05).ok()
    val_loss = base.log()[-1]['val_loss']
    assert val_loss < base.log('base')[-1]['val_loss']
    evaluated = base.start('eval.py', out_dir='out', which='last', device='cpu').ok().out.splitlines()[-1]
    assert json.loads(evaluated)['loss'] == pytest.approx(val_loss, abs=1e-4)
    base.sample(max_new_tokens=5, num_samples=1).ok()
    transformers = pytest.importorskip('transformers')
    base.start('flatgpt.export', out_dir='out', which='last', out='hf').ok()
    monkeypatch.chdir(base.path)
    ours = pretrained.open_model('resume', 'out', 'last')[0]
    idx = torch.randint(ours.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(1))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base.path / 'hf')
    torch.testing.assert_close(ours(idx, idx)[0], theirs(idx).logits, rtol=1e-4, atol=1e-4)
    # and a folder of Hugging Face's can be adapted, and what came of adapters as well
    base.train(**{**LORA, 'init_from': 'hf'}, out_dir='again', max_iters=2).ok()
    base.train(**{**LORA, 'init_from': 'out'}, out_dir='further', max_iters=2).ok()
    first = [base.log(name)[0]['val_loss'] for name in ('again', 'further')]
    assert first == pytest.approx([val_loss, val_loss], abs=1e-3)


def test_both_folders_moved(base):
    """Also where a script starts in another folder than the one that trained: the base is found from the adapters."""
    base.train(**LORA, out_dir='runs/adapted', max_iters=2).ok()
    (base.path / 'elsewhere').mkdir()
    for name in ('base', 'runs'):
        (base.path / name).rename(base.path / 'elsewhere' / name)
    base.sample(out_dir='elsewhere/runs/adapted', max_new_tokens=2, num_samples=1).ok()


def test_a_shorter_context(folder):
    """Of a model with learned positions, which LoRA leaves frozen: the optimizer has nothing of them to shorten."""
    folder.train(out_dir='base', max_iters=2).ok()
    folder.train(init_from='base', lora_rank=2, block_size=8, max_iters=2).ok()
    assert folder.checkpoint()['model_args']['block_size'] == 8
    folder.sample(max_new_tokens=3, num_samples=1).ok()


def test_all_weights_train_on_after_adapters(base):
    """What was frozen beside adapters is not, once they are merged."""
    base.train(**LORA, max_iters=2).ok()
    base.train(init_from='out', out_dir='all', preset='llama', block_size=None, max_iters=2).ok()
    before, after = base.checkpoint('base')['model'], base.checkpoint('all')['model']
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in after)


@pytest.mark.slow
def test_refused_by_train(base):
    base.train(lora_rank=4).refused("lora_rank=4 needs a model to adapt, but init_from='scratch'")
    base.train(lora_rank=4, init_from='auto').refused("needs a model to adapt, but init_from='auto'")
    base.train(**LORA, lora_alpha=0.0).refused('lora_alpha=0.0: expected above 0')
    base.train(lora_alpha=4.0).refused('lora_alpha needs --lora_rank')
    base.train(**LORA, out_dir='base').refused("init_from='base' is out_dir")
    base.train(**{**LORA, 'lora_targets': 'query'}).refused("'query' names no linear layer")
    base.train(**{**LORA, 'optimizer': 'muon'}).refused("optimizer='muon' does not fit LoRA")
    spaced = {**LORA, 'lora_targets': 'c_attn, mlp.c_proj'}
    base.train(**spaced, max_iters=2).ok()
    base.train(**{**spaced, 'init_from': 'resume'}, max_iters=3).ok()
    base.train(**{**LORA, 'init_from': 'resume', 'lora_rank': 3}).refused('trained with lora_rank=2; resume with that')
    base.train(init_from='resume', preset='llama', lora_targets='lm_head').refused('lora_targets=c_attn,mlp.c_proj')
    base.train(init_from='resume', out_dir='base', lora_rank=3, preset='llama').refused('was trained with lora_rank=0')
    base.train(out_dir='base', preset='llama', max_iters=1, seed=5).ok()
    base.sample(max_new_tokens=2).refused('has adapters for the model that was in base', 'has other weights')
    for name in ('ckpt.pt', 'best.pt'):
        (base.path / 'base' / name).unlink(missing_ok=True)
    base.sample(max_new_tokens=2).refused('has adapters for the model in base, which cannot be loaded')
