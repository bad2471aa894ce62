"""
Test model.py: causality, the KV cache, dropout, initialisation, checks, counts. model.py's options are
tested in test_model_options.py, the faster forms of its operations in test_ops.py.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, gradients_to_the_future, sharpened, tiny
from torch.nn import functional as F

from flatgpt import flops
from flatgpt.cache import KVCache, LayerCache
from model import GPT, CausalSelfAttention, Context, GPTConfig, padded_vocab_size

transformers = pytest.importorskip('transformers')


def huggingface(**changes):
    torch.manual_seed(2)
    config = transformers.GPT2Config(**{
        'vocab_size': 41, 'n_positions': 16, 'n_embd': 24, 'n_layer': 2, 'n_head': 3, 'resid_pdrop': 0.0,
        'embd_pdrop': 0.0, 'attn_pdrop': 0.0, 'initializer_range': 0.2, 'bos_token_id': 0, 'eos_token_id': 0,
        **changes})
    return sharpened(transformers.GPT2LMHeadModel(config)).eval()


# GPT-2 --------------------------------------------------------------------------------------------

def test_state_dict_names_are_gpt2s():
    theirs, ours = huggingface(), tiny(n_embd=24, n_head=3)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    without = {name for name in theirs.state_dict() if not name.endswith('.bias')}
    assert set(tiny(bias=False).state_dict()) == without


# causality ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('n', [2, 5, 16])
def test_no_gradient_to_later_inputs(n):
    model = sharpened(tiny())
    for block in model.transformer.h:
        assert gradients_to_the_future(lambda x, block=block: block(x, Context()), torch.randn(2, n, 16)) == 0


def test_no_gradient_to_later_tokens_of_the_whole_model():
    model = sharpened(tiny())
    seen = []
    model.transformer.drop.register_forward_hook(lambda module, args, x: seen.append(x) or x.requires_grad_())
    logits, _ = model(torch.randint(40, (1, 16)), torch.randint(40, (1, 16)))
    for t in range(15):
        grad, = torch.autograd.grad(logits[:, t].sum(), seen[0], retain_graph=True)
        assert grad[:, : t + 1].abs().max() > 0 and grad[:, t + 1 :].abs().max() == 0


@pytest.mark.parametrize('past, n', [(1, 2), (3, 5), (7, 9)])
def test_no_gradient_to_later_inputs_behind_a_cache(past, n):
    """Several new tokens at once, behind others: the path with an explicit mask."""
    attention = sharpened(CausalSelfAttention(GPTConfig(n_head=2, n_embd=16, block_size=16)))

    def attend(x):
        k, v = torch.randn(2, 2, 2, 16, 8, generator=torch.Generator().manual_seed(0))[..., : past + n, :]
        return attention(x, Context(past=LayerCache(k.clone(), v.clone(), torch.arange(past, past + n))))

    assert gradients_to_the_future(attend, torch.randn(2, n, 16)) == 0


@pytest.mark.slow  # compiling takes a minute where nothing is compiled yet
@pytest.mark.filterwarnings('ignore')  # of torch.compile's own modules
@pytest.mark.parametrize('options', [
    {'n_head': 2},
    {**ARCHITECTURES['modern'], 'n_head': 4, 'n_kv_head': 2, 'window': 40, 'residual_lambdas': True}])
def test_compiled_block(options):
    """Compiled as train.py does on the CPU: same numbers as eager, no gradient to later inputs."""
    torch._dynamo.reset()
    models = [sharpened(tiny(block_size=128, **options)) for _ in range(2)]
    eager, compiled = (model.transformer.h[0] for model in models)
    compiled.compile(dynamic=False, options={'fallback_random': True})
    context = Context()
    if models[0].config.pos == 'rope':
        context = Context(models[0].rotation(torch.arange(65)), torch.randn(2, 65, 8), torch.randn(2, 65, 16))
    blocks = [lambda x, block=block: block(x, context) for block in (eager, compiled)]
    x = torch.randn(2, 65, 16, requires_grad=True)
    torch.testing.assert_close(blocks[1](x), blocks[0](x), atol=1e-4, rtol=1e-4)
    assert gradients_to_the_future(blocks[1], x) == 0
    for block in blocks:
        block(x).square().mean().backward()
    for (name, p), q in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f'{name}: {m}')


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_recomputed_blocks(name):
    """The same gradients, bit for bit, while the backward pass keeps a fraction of the tensors."""
    model = tiny(**{**ARCHITECTURES[name], 'n_layer': 6, 'n_head': 2, 'dropout': 0.1, 'residual_lambdas': True}).train()
    idx = torch.randint(40, (2, 16), generator=torch.Generator().manual_seed(0))
    kept, gradients = [], []
    for model.recompute in (False, True):
        sizes = {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(idx, idx)[1]
        loss.backward()
        kept.append(sum(sizes.values()))
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 2, kept


# the cache ----------------------------------------------------------------------------------------

@settings(max_examples=20)
@given(cuts=st.lists(st.integers(1, 15), max_size=5))
def test_cached_logits_equal_uncached(cuts):
    """However a context is cut into calls, the logits at its cuts are those of the whole."""
    model = sharpened(tiny()).eval()
    idx = torch.randint(40, (3, 16), generator=torch.Generator().manual_seed(3))
    cache = KVCache(model.config, 3)
    with torch.no_grad():
        whole = model(idx, idx)[0]
        ends = sorted({*cuts, 16})
        for start, end in zip([0, *ends], ends, strict=False):
            logits = model(idx[:, start:end], cache=cache)[0]
            assert cache.length == end
            torch.testing.assert_close(logits[:, 0], whole[:, end - 1], atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match='17 tokens is longer than block_size=16'):
            model(idx[:, :1], cache=cache)


def test_cache_shapes():
    """Grows with the tokens, up to max_length; or at once, as a compiled step needs it."""
    config = GPTConfig(block_size=300, vocab_size=7, n_layer=3, n_head=2, n_embd=10)
    cache = KVCache(config, 4, dtype=torch.bfloat16)
    assert cache.k.shape == cache.v.shape == (3, 4, 2, 0, 5) and cache.k.dtype == torch.bfloat16 and cache.length == 0
    model = GPT(config).eval()
    for length, slots in ((1, 128), (128, 128), (129, 256), (257, 300), (300, 300)):
        with torch.no_grad():
            model(torch.zeros(4, length - cache.length, dtype=torch.long), cache=cache)
        assert cache.length == cache.next_slot.item() == length and cache.k.shape == (3, 4, 2, slots, 5)
    cache = KVCache(config, 4, max_length=17)
    cache.make_room(4, 17)
    assert cache.k.size(3) == 17 and cache.length == 0


def test_a_cache_of_another_size():
    model = tiny()
    cache = KVCache(model.config, 2, max_length=5)
    with pytest.raises(ValueError, match='made for a batch of 2, but the tokens are a batch of 3'):
        model(torch.zeros(3, 1, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match=r'room for 5 tokens, but 0 \+ 6 .* max_length=6'):
        model(torch.zeros(2, 6, dtype=torch.long), cache=cache)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_a_cache_of_another_precision(dtype):
    """Keys and values are rounded to it, the model stays as it is."""
    model = sharpened(tiny(pos='rope', n_kv_head=2, n_head=4)).eval()
    idx = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.config, 2, dtype=dtype)
    with torch.no_grad():
        got = [model(part, cache=cache)[0] for part in idx.split((5, 1, 6), dim=1)]
        want = [model(idx[:, :end])[0] for end in (5, 6, 12)]
    assert got[0].dtype == torch.float32 and cache.k.dtype == dtype
    error = max((a - b).abs().max() / b.std() for a, b in zip(got, want, strict=True))
    assert error < (1e-5 if dtype == torch.float64 else 0.1)


# dropout ------------------------------------------------------------------------------------------

def test_eval_loss_is_independent_of_dropout():
    losses = []
    for dropout in (0.0, 0.5):
        model = sharpened(tiny(dropout=dropout)).eval()
        idx = torch.randint(40, (2, 16), generator=torch.Generator().manual_seed(0))
        losses += [model(idx, idx)[1].item(), model(idx, idx)[1].item()]
    assert len(set(losses)) == 1
    model.train()
    assert model(idx, idx)[1].item() != losses[0] and model(idx, idx)[1].item() != model(idx, idx)[1].item()


@pytest.mark.parametrize('where', ['transformer.drop', 'transformer.h.0.attn.resid_dropout',
                                   'transformer.h.0.attn.attn_dropout', 'transformer.h.0.mlp.dropout'])
def test_every_dropout_drops(where):
    model = sharpened(tiny(dropout=0.0)).train()
    idx = torch.randint(40, (2, 16))
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.get_submodule(where).p = 0.5
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_padded_vocab_size():
    assert padded_vocab_size(50257) == padded_vocab_size(50304) == 50304
    assert [padded_vocab_size(n) for n in (1, 65, 256, 1023, 1024, 1025, 65_536)] == [
        1, 65, 256, 1023, 1024, 1088, 65_536]


# the rest -----------------------------------------------------------------------------------------

def test_init_statistics():
    model = tiny(n_layer=8, n_embd=128, n_head=4, block_size=64, vocab_size=200)
    for name, p in model.named_parameters():
        if name.endswith('c_proj.weight'):
            expected = 0.02 / math.sqrt(16)
        elif p.dim() == 2:
            expected = 0.02
        else:
            value = 1.0 if name.endswith('weight') else 0.0
            assert torch.equal(p, torch.full_like(p, value)), name
            continue
        assert abs(p.std().item() / expected - 1) < 0.05, name
        assert abs(p.mean().item()) < 5 * expected / math.sqrt(p.numel()), name
    loss = model(torch.randint(200, (8, 64)), torch.randint(200, (8, 64)))[1]
    assert abs(loss.item() - math.log(200)) < 0.1  # knows nothing yet


def test_every_parameter_is_initialised():
    """init_weights leaves none of the values that were there before."""
    model = tiny()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    model.odd = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(AssertionError, match='odd'):
        model.init_weights()


def test_head_is_tied():
    model = tiny()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert len(list(model.parameters())) == 2 + 2 * 12 + 2


def test_loss_ignores_missing_targets_and_is_fp32():
    model = sharpened(tiny()).eval()
    idx, targets = torch.randint(40, (2, 16)), torch.randint(40, (2, 16))
    targets[0, 3:] = -1
    logits, loss = model(idx, targets)
    rows = [-F.log_softmax(logits[b, t].double(), -1)[targets[b, t]] for b, t in (targets >= 0).nonzero().tolist()]
    assert abs(loss.item() - torch.stack(rows).mean().item()) < 1e-5
    with torch.autocast('cpu', torch.bfloat16):
        logits, loss = model(idx, targets)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32


def test_context_too_long():
    with pytest.raises(ValueError, match='17 tokens is longer than block_size=16'):
        tiny()(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize('changes, said', [
    ({'n_embd': 18, 'n_head': 4}, 'n_embd=18 is not divisible by n_head=4; expected, for example, 16'),
    ({'n_embd': 3, 'n_head': 8}, 'for example, 8'),
    ({'dropout': 1.0}, 'dropout=1.0'), ({'dropout': -0.1}, 'dropout=-0.1'),
    ({'n_layer': 0}, 'n_layer=0: expected 1 or more'), ({'vocab_size': None}, 'vocab_size=None'),
    ({'block_size': -4}, 'block_size=-4'), ({'n_head': 0}, 'n_head=0'), ({'n_embd': 0}, 'n_embd=0'),
    ({'mlp': 'swish'}, "mlp='swish': expected 'gelu', 'gelu_erf', 'swiglu' or 'relu2'"),
    ({'norm': 'none'}, "norm='none'"), ({'pos': 'alibi'}, "pos='alibi'"),
    ({'n_kv_head': 5}, 'n_kv_head=5: expected a divisor of n_head=12'),
    ({'n_kv_head': 0}, 'n_kv_head=0'), ({'pos': 'rope', 'n_embd': 36}, 'n_embd=36 and n_head=12 give 3'),
    ({'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}}, "beside pos='rope'"),
    ({'pos': 'rope', 'rope_scaling': {'rope_type': 'linear', 'factor': 0}}, 'factor is 0, expected a number above 0'),
    ({'pos': 'rope', 'rope_scaling': {'rope_type': 'dynamic', 'factor': 2.0}}, "rope_type is 'dynamic'"),
    ({'qk_norm_weight': True}, 'expected qk_norm=True'), ({'norm_eps': 0.0}, 'norm_eps=0.0'),
    ({'rope_base': 0.0}, 'rope_base=0.0'), ({'rope_base': math.nan}, 'rope_base=nan'), ({'window': -1}, 'window=-1'),
    ({'window_pattern': 'SXL'}, "window_pattern='SXL'"), ({'window_pattern': ''}, "window_pattern=''"),
    ({'logit_softcap': -1.0}, 'logit_softcap=-1.0'), ({'logit_softcap': math.inf}, 'logit_softcap=inf')])
def test_config_errors(changes, said):
    with pytest.raises(ValueError) as error:
        GPTConfig(**changes)
    assert said in str(error.value)


def test_config_suggestion_works():
    with pytest.raises(ValueError) as error:
        GPTConfig(n_embd=100, n_head=16)
    GPTConfig(n_embd=int(str(error.value).split()[-1]), n_head=16)


def test_crop_block_size():
    model = sharpened(tiny()).eval()
    idx = torch.randint(40, (2, 6))
    before, wpe = model(idx, idx)[0].detach(), model.transformer.wpe.weight
    model(idx, idx)[1].backward()
    model.crop_block_size(6)
    assert torch.equal(model(idx, idx)[0], before)
    assert model.config.block_size == 6 and model.transformer.wpe.weight is wpe and wpe.shape == (6, 16)
    assert model.transformer.wpe.num_embeddings == 6
    model.zero_grad()
    model(idx, idx)[1].backward()
    assert wpe.grad.shape == (6, 16)
    with pytest.raises(ValueError, match='longer than block_size=6'):
        model(torch.zeros(1, 7, dtype=torch.long))
    for size in (0, 7):
        with pytest.raises(ValueError, match=f'block_size={size}: expected 1 to 6 positions'):
            model.crop_block_size(size)


@pytest.mark.parametrize('field, value', [('n_layer', 1.5), ('vocab_size', '40'), ('window', None), ('dropout', None),
                                          ('qk_norm', 'yes'), ('n_kv_head', True), ('norm', 1), ('n_head', True)])
def test_what_kind_a_field_is_of(field, value):
    with pytest.raises(ValueError, match=rf'^{field}={value!r}: expected'):
        tiny(**{field: value})


def test_counts_by_hand():
    # one block of width 16: ln 2*16, c_attn 16*48 + 48, c_proj 16*16 + 16, ln 2*16, c_fc 16*64 + 64, c_proj 64*16 + 16
    block = 32 + 816 + 272 + 32 + 1088 + 1040
    model = tiny()
    assert model.get_num_params() == 40 * 16 + 2 * block + 32
    assert model.get_num_params(non_embedding=False) == model.get_num_params() + 16 * 16
    assert model.flops_per_token() == 6 * model.get_num_params() + 12 * 2 * 16 * 16
    with torch.device('meta'):
        gpt2 = GPT(GPTConfig(vocab_size=50257))
    assert gpt2.get_num_params(non_embedding=False) == 124_439_808  # what GPT-2 (124M) has


@pytest.mark.parametrize('options', [
    {}, ARCHITECTURES['llama'], ARCHITECTURES['modern'], {'n_kv_head': 1}, {'n_kv_head': 2, 'mlp': 'swiglu'},
    {'tie_embeddings': False}, {'value_embeddings': True}])
def test_flops_are_those_of_the_matmuls(options):
    """Of a model so wide that all but matrix products is small, torch counts the same in forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny(n_embd=256, n_head=4, block_size=32, vocab_size=256, **options)
    idx = torch.randint(256, (2, 32))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(idx, idx)[1].backward()
    assert abs(counter.get_total_flops() / 64 / model.flops_per_token() - 1) < 0.03


def test_flops_of_windows():
    """Only attention gets cheaper, and only in the layers that have one: 12 C for each position that is not seen."""
    full, short, long = (tiny(n_layer=3, window=window).flops_per_token() for window in (0, 4, 100))
    assert full == long and full - short == 12 * 16 * 2 * (16 - 4)


def test_mfu(monkeypatch):
    model = tiny()
    assert flops.mfu_of(model, 8 * 16 / 0.1) is None  # the CPU's peak is not known
    monkeypatch.setattr(flops, 'peak_flops', lambda device: 1e9)
    assert flops.mfu_of(model, 8 * 16 / 0.1) == pytest.approx(model.flops_per_token() * 16 * 8 / 0.1 / 1e9)


@pytest.mark.parametrize('name, peak', [
    ('NVIDIA H200', 989e12), ('NVIDIA H100 PCIe', 756e12), ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H20', 148e12),
    ('NVIDIA A100-SXM4-80GB', 312e12), ('NVIDIA A10G', 70e12), ('NVIDIA A10', 125e12), ('NVIDIA L4', 121e12),
    ('NVIDIA L40S', 362e12), ('NVIDIA L40', 181e12), ('Tesla T4', 65e12), ('Tesla V100-SXM2-16GB', 125e12),
    ('NVIDIA GeForce RTX 4090', 165e12), ('NVIDIA RTX 6000 Ada Generation', 364e12), ('NVIDIA A40', 150e12),
    ('NVIDIA GeForce GTX 1080', None), ('NVIDIA RTX A4000', None), ('NVIDIA T400', None), ('NVIDIA A2', None)])
def test_peak_flops(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    assert flops.peak_flops(torch.device('cuda')) == peak
    assert flops.peak_flops(torch.device('cpu')) is None


def test_generate_of_the_model():
    """The plain definition: greedy is the argmax of the logits; top_k=1 too; the same seed, the same text."""
    model = sharpened(tiny()).eval()
    idx = torch.randint(40, (2, 3))
    out = model.generate(idx, 20, temperature=0)
    assert out.shape == (2, 23) and torch.equal(out[:, :3], idx)
    for t in range(3, 23):
        expected = model(out[:, max(0, t - 16) : t], out[:, max(0, t - 16) : t])[0][:, -1].argmax(-1)
        assert torch.equal(out[:, t], expected)
    assert torch.equal(model.generate(idx, 20, top_k=1), out)
    torch.manual_seed(5)
    first = model.generate(idx, 20, temperature=1.5, top_k=100)
    torch.manual_seed(5)
    assert torch.equal(model.generate(idx, 20, temperature=1.5, top_k=100), first)
    assert not torch.equal(model.generate(idx, 20, temperature=1.5), first)
