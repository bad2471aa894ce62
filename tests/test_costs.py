"""Test flatgpt/costs.py against what torch counts, allocates and keeps. Run: pytest tests/test_costs.py"""

from contextlib import nullcontext

import pytest
import torch

from flatgpt import costs, optim
from flatgpt.generate import KVCache
from lab import common
from model import GPT, Context, GPTConfig
from ops import CHUNK

SMALL = {'n_layer': 3, 'n_head': 4, 'n_embd': 128, 'block_size': 96, 'vocab_size': 300}
CONFIGS = {
    'gpt2': GPTConfig(**SMALL),
    'gpt2 without biases': GPTConfig(**SMALL, bias=False, mlp='gelu_erf'),
    'llama': common.gpt_config('llama', **SMALL, n_kv_head=2),
    'modern': common.gpt_config(**SMALL, n_kv_head=1),
    'relu2': common.gpt_config(**SMALL, mlp='relu2', head_dim=16),
    'Qwen': common.gpt_config('llama', **SMALL, qkv_bias=True, qk_norm=True, qk_norm_weight=True,
                              value_embeddings=True, residual_lambdas=True, head_gates=True,
                              value_gates=True, n_inner=200),
}
each_config = pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)


@pytest.mark.parametrize('config', [GPTConfig(), *CONFIGS.values()], ids=['124M', *CONFIGS])
def test_flops_are_torchs_count(config):
    T = config.block_size
    total = sum(costs.flops(config, T).values()) * 2 * T
    assert costs.counted(config, 2, T) == (pytest.approx(total, rel=0.01), pytest.approx(2 * total, rel=0.01))


@each_config
def test_flops_are_those_of_the_model(config):
    # which counts parameters, those of norms and biases too, where these are products
    total = 3 * sum(costs.flops(config, config.block_size).values())
    assert total == pytest.approx(GPT(config).flops_per_token(), rel=0.01)


def test_flops_of_a_window():
    near, far = (common.gpt_config('llama', **SMALL, window=window, window_pattern='SL')
                 for window in (16, 0))
    missing = costs.flops(far, 96)['scores'] - costs.flops(near, 96)['scores']
    assert missing == 4 * 128 * (96 - 16)  # the first layer alone is S, the last always L
    assert 3 * missing == GPT(far).flops_per_token() - GPT(near).flops_per_token()


@each_config
def test_parameters_are_the_models(config):
    model, n = GPT(config), costs.parameters(config)
    assert sum(n.values()) == model.get_num_params(non_embedding=False)
    assert n['MLP'] == sum(p.numel() for name, p in model.named_parameters() if '.mlp.' in name)
    assert n['head'] == (0 if config.tie_embeddings else model.lm_head.weight.numel())


@each_config
def test_kv_cache_is_the_models(config):
    cache = KVCache(config, 3, dtype=torch.bfloat16)
    cache.make_room(3, config.block_size)
    assert costs.kv_cache(config, 3, 96) == cache.k.nbytes + cache.v.nbytes


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('config', list(CONFIGS.values())[:-1], ids=list(CONFIGS)[:-1])
def test_activations_are_what_autograd_keeps(config, dtype, monkeypatch):
    for module in ('ops', 'model'):
        monkeypatch.setattr(f'{module}.SHORT', 0, raising=False)  # bf16 throughout, as on a GPU
    model, (x, y) = GPT(config), torch.randint(config.vocab_size, (2, 3, 70))
    weights = {tuple(sorted(p.shape)) for p in model.parameters()}  # no activations, nor are autocast's copies
    kept = []
    autocast = torch.autocast('cpu', dtype) if dtype == torch.bfloat16 else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), autocast:
        model(x, y, return_logits=False)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept
                if tuple(sorted(t.shape)) not in weights}
    layer, rest = costs.activations(config, 3, 70, costs.How(dtype.itemsize, on_gpu=False))
    assert 3 * layer + rest == pytest.approx(sum(storages.values()), rel=0.03)


def test_activations_of_a_large_vocabulary():
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=64, vocab_size=CHUNK // 63)
    _, few = costs.activations(config, 1, 62)
    _, many = costs.activations(config, 1, 64)
    assert few > 1e6 * 62 and many < 1e3 * 64  # logits of 62 positions; of 64 they are computed in chunks


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
@each_config
def test_moments_are_the_optimizers(config, kind):
    model = GPT(config)
    if kind == 'adamw':
        optimizer = optim.adamw(model, 0.1, 1e-3, (0.9, 0.95))
    else:
        optimizer = common.muon(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert costs.memory(config, 1, 96, kind)['moments'] == sum(t.nbytes for t in moments)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('preset', ['gpt2', 'llama', 'modern'])
@pytest.mark.parametrize('T', [256, 576], ids=['blocked', 'flash'])
def test_activations_of_a_compiled_block(preset, dtype, T):
    """What the compiler's partition keeps, on the CPU: attention by blocks, and by torch's kernel."""
    torch._dynamo.reset()
    config = common.gpt_config(preset, **{**SMALL, 'block_size': T, 'n_head': 4, 'bias': False})
    model, x = GPT(config), torch.randn(3, T, 128, requires_grad=True)  # no shape is that of a weight
    block = torch.compile(model.transformer.h[0], dynamic=False)
    context = Context(model.rotation(torch.arange(T)) if config.pos == 'rope' else None)
    weights = {tuple(sorted(p.shape)) for p in model.parameters()}
    autocast = torch.autocast('cpu', dtype) if dtype == torch.bfloat16 else nullcontext()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), autocast:
        block(x, context)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept
                if tuple(sorted(t.shape)) not in weights}
    layer, _ = costs.activations(config, 3, T, costs.How(dtype.itemsize, compiled=True, on_gpu=False))
    assert layer == pytest.approx(sum(storages.values()), rel=0.05)
