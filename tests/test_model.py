"""model.py against transformers, torch and arithmetic by hand. Run: pytest tests/test_model.py"""

import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

import ops
from config.presets import PRESETS
from flatgpt import flops
from flatgpt.generate import KVCache
from model import GPT, CausalSelfAttention, GPTConfig, padded_vocab_size, rotate
from ops import GELU, Dropout, window_mask

transformers = pytest.importorskip('transformers')
safetensors_torch = pytest.importorskip('safetensors.torch')


def tiny(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{'block_size': 16, 'vocab_size': 40, 'n_layer': 2, 'n_head': 2, 'n_embd': 16, **changes}))


def sharpened(model):
    """The model with larger random weights: attention that attends, logits that differ, biases that are not 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def huggingface(**changes):
    torch.manual_seed(2)
    config = transformers.GPT2Config(**{
        'vocab_size': 41, 'n_positions': 16, 'n_embd': 24, 'n_layer': 2, 'n_head': 3, 'resid_pdrop': 0.0,
        'embd_pdrop': 0.0, 'attn_pdrop': 0.0, 'initializer_range': 0.2, 'bos_token_id': 0, 'eos_token_id': 0,
        **changes})
    return sharpened(transformers.GPT2LMHeadModel(config)).eval()


# GPT-2 ----------------------------------------------------------------------------------------------------------------

def test_state_dict_names_are_gpt2s():
    theirs, ours = huggingface(), tiny(n_embd=24, n_head=3)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    without = {name for name in theirs.state_dict() if not name.endswith('.bias')}
    assert set(tiny(bias=False).state_dict()) == without


# causality ------------------------------------------------------------------------------------------------------------

def gradients_to_the_future(function, x):
    """For x (B, T, C): the largest gradient of any output position with respect to any later input position."""
    x = x.requires_grad_()
    y = function(x)
    largest = 0.0
    for t in range(x.size(1) - 1):
        grad, = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert grad[:, : t + 1].abs().max() > 0  # the test would otherwise pass on a function of nothing
        largest = max(largest, grad[:, t + 1 :].abs().max().item())
    return largest


@pytest.mark.parametrize('n', [2, 5, 16])
def test_no_gradient_to_later_inputs(n):
    model = sharpened(tiny())
    for block in model.transformer.h:
        assert gradients_to_the_future(block, torch.randn(2, n, 16)) == 0


def test_no_gradient_to_later_tokens_of_the_whole_model():
    model = sharpened(tiny())
    seen = []
    model.transformer.drop.register_forward_hook(lambda module, args, x: seen.append(x) or x.requires_grad_())
    logits, _ = model(torch.randint(40, (1, 16)), torch.randint(40, (1, 16)))
    for t in range(15):
        grad, = torch.autograd.grad(logits[:, t].sum(), seen[0], retain_graph=True)
        assert grad[:, : t + 1].abs().max() > 0 and grad[:, t + 1 :].abs().max() == 0


def in_blocks(attention, x):
    """A CausalSelfAttention by the path that compiled code takes on the CPU, but run eagerly."""
    B, T, C = x.shape
    q, k, v = attention.c_attn(x).view(B, T, 3, attention.n_head, -1).permute(2, 0, 3, 1, 4)
    return attention.attend_in_blocks(q, k, v).transpose(1, 2).reshape(B, T, C)


@pytest.mark.parametrize('n', [1, 2, 63, 64, 65, 127, 128, 130])  # blocks of 64 queries, the last shorter
def test_attention_in_blocks(n):
    torch.manual_seed(0)
    attention = CausalSelfAttention(GPTConfig(n_head=2, n_embd=8, block_size=256))
    q, k, v = torch.randn(3, 2, 2, n, 4)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attention.attend_in_blocks(q, k, v), expected, atol=1e-5, rtol=1e-5)
    if n in (2, 65, 130):
        assert gradients_to_the_future(lambda x: in_blocks(attention, x), torch.randn(1, n, 8)) == 0


def test_attention_in_blocks_gradients():
    torch.manual_seed(0)
    attention = CausalSelfAttention(GPTConfig(n_head=2, n_embd=8, block_size=256))
    grads = []
    for attend in (attention.attend_in_blocks, lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True)):
        qkv = torch.randn(3, 2, 2, 600, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        attend(*qkv).square().sum().backward()
        grads.append(qkv.grad)
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('past, n', [(1, 2), (3, 5), (7, 9)])
def test_no_gradient_to_later_inputs_behind_a_cache(past, n):
    """Several new tokens at once, behind others: the path with an explicit mask."""
    attention = sharpened(CausalSelfAttention(GPTConfig(n_head=2, n_embd=16, block_size=16)))

    def attend(x):
        k, v = torch.randn(2, 2, 2, 16, 8, generator=torch.Generator().manual_seed(0))
        k, v, slots = k[:, :, : past + n].clone(), v[:, :, : past + n].clone(), torch.arange(past, past + n)
        return attention(x, (k, v, slots, None))

    assert gradients_to_the_future(attend, torch.randn(2, n, 16)) == 0


@pytest.mark.filterwarnings('ignore')  # of torch.compile's own modules
@pytest.mark.parametrize('options', [
    {'n_head': 2}, {**PRESETS['modern'], 'n_head': 4, 'n_kv_head': 2, 'window': 40, 'residual_lambdas': True}])
def test_compiled_block(options):
    """Compiled as train.py does on the CPU: same numbers as eager, no gradient to later inputs."""
    torch._dynamo.reset()
    models = [sharpened(tiny(block_size=128, **options)) for _ in range(2)]
    eager, compiled = (model.transformer.h[0] for model in models)
    compiled.compile(dynamic=False, options={'fallback_random': True})
    x0 = embedding = rotation = None
    if models[0].config.pos == 'rope':
        x0, embedding, rotation = torch.randn(2, 65, 16), torch.randn(2, 65, 8), models[0].rotation(torch.arange(65))
    blocks = [lambda x, block=block: block(x, None, rotation, embedding, x0) for block in (eager, compiled)]
    x = torch.randn(2, 65, 16, requires_grad=True)
    torch.testing.assert_close(blocks[1](x), blocks[0](x), atol=1e-4, rtol=1e-4)
    assert gradients_to_the_future(blocks[1], x) == 0
    for block in blocks:
        block(x).square().mean().backward()
    for (name, p), q in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f'{name}: {m}')


# the cache ------------------------------------------------------------------------------------------------------------

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


# all options, in combination ------------------------------------------------------------------------------------------

def possible(options):
    """Without what another option excludes."""
    return {**options, 'rope_scaling': options['rope_scaling'] if options['pos'] == 'rope' else None,
            'qk_norm_weight': options['qk_norm_weight'] and options['qk_norm']}


CHOICES = {
    'n_layer': st.integers(1, 3), 'n_head': st.just(4), 'bias': st.booleans(),
    'n_kv_head': st.sampled_from([None, 1, 2, 4]), 'norm': st.sampled_from(['layernorm', 'rmsnorm']),
    'pos': st.sampled_from(['learned', 'rope']), 'rope_base': st.sampled_from([100.0, 10000.0]),
    'mlp': st.sampled_from(['gelu', 'gelu_erf', 'swiglu', 'relu2']), 'qk_norm': st.booleans(),
    'tie_embeddings': st.booleans(), 'window': st.sampled_from([0, 1, 3, 7, 100]),
    'window_pattern': st.sampled_from(['S', 'SL', 'LS', 'SSL']), 'logit_softcap': st.sampled_from([0.0, 3.0]),
    'zero_init': st.booleans(), 'residual_lambdas': st.booleans(), 'value_embeddings': st.booleans(),
    'head_dim': st.sampled_from([None, 2, 10]), 'n_inner': st.sampled_from([None, 24]),
    'norm_eps': st.sampled_from([1e-5, 1e-2]), 'qk_norm_weight': st.booleans(),
    'qkv_bias': st.sampled_from([None, True, False]),
    'rope_scaling': st.sampled_from([None, {'rope_type': 'linear', 'factor': 2.0}, {
        'rope_type': 'llama3', 'factor': 4.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
        'original_max_position_embeddings': 8}])}
OPTIONS = st.fixed_dictionaries(CHOICES).map(possible)


def test_the_options_are_all_options():
    """A field added to GPTConfig is missed here, until the tests below combine it with the others."""
    assert set(CHOICES) | {'block_size', 'vocab_size', 'n_embd', 'dropout'} == set(asdict(GPTConfig()))


@settings(max_examples=30)
@given(options=OPTIONS)
def test_options_are_causal(options):
    """No logit has a gradient to a later position, or changes when a later token does; each to its own and the first
    tokens, unless its windows are too short for that."""
    model = sharpened(tiny(**options)).eval()
    seen = []
    model.transformer.drop.register_forward_hook(lambda module, args, x: seen.append(x) or x.requires_grad_())
    idx = torch.randint(40, (1, 16), generator=torch.Generator().manual_seed(0))
    logits, _ = model(idx, idx)
    for t in range(15):
        grad, = torch.autograd.grad(logits[:, t].sum(), seen[0], retain_graph=True)
        assert grad[:, t + 1 :].abs().max() == 0
        assert grad[:, t].abs().max() > 0 and grad[:, 0].abs().max() > 0  # the last layer sees all
    for t in (1, 8, 15):
        other = idx.clone()
        other[:, t] = (idx[:, t] + 1) % 40
        changed = (model(other, idx)[0] - logits).abs().amax(dim=(0, 2)) > 0
        assert not changed[:t].any() and changed[t]


@settings(max_examples=30)
@given(options=OPTIONS, cuts=st.lists(st.integers(1, 15), max_size=4))
def test_options_cached_equal_uncached(options, cuts):
    model = sharpened(tiny(**options)).eval()
    idx = torch.randint(40, (2, 16), generator=torch.Generator().manual_seed(3))
    cache = KVCache(model.config, 2)
    ends = sorted({*cuts, 16})
    with torch.no_grad():
        whole = model(idx, idx)[0]
        for start, end in zip([0, *ends], ends, strict=False):
            logits = model(idx[:, start:end], cache=cache)[0]
            torch.testing.assert_close(logits[:, 0], whole[:, end - 1], atol=1e-4, rtol=1e-4)


def parameters_by_hand(c):
    """Number of parameters that a config asks for, counted from the papers' descriptions."""
    norm = c['n_embd'] * (2 if c['norm'] == 'layernorm' and c['bias'] else 1)
    width, head = c['n_embd'], c['head_dim'] or c['n_embd'] // c['n_head']
    q, kv = c['n_head'] * head, (c['n_kv_head'] or c['n_head']) * head
    inner = c['n_inner'] or (64 if c['mlp'] == 'swiglu' else 4 * width)
    qkv_bias = c['bias'] if c['qkv_bias'] is None else c['qkv_bias']
    linears = [(width, q + 2 * kv, qkv_bias), (q, width, c['bias']), (inner, width, c['bias']),
               (width, inner * (2 if c['mlp'] == 'swiglu' else 1), c['bias'])]
    block = 2 * norm + sum(i * o + o * bias for i, o, bias in linears) + 2 * c['residual_lambdas']
    block += 2 * head * c['qk_norm_weight']
    tables = 40 * width * (1 if c['tie_embeddings'] else 2) + 16 * width * (c['pos'] == 'learned')
    return c['n_layer'] * block + norm + tables + c['value_embeddings'] * 40 * kv * ((c['n_layer'] + 1) // 2)


@settings(max_examples=30)
@given(options=OPTIONS)
def test_options_train_and_reload(options):
    """Finite loss, a gradient for every parameter, as many parameters as by hand, and a state_dict that is complete."""
    model = tiny(**options)
    idx, targets = torch.randint(40, (2, 2, 16), generator=torch.Generator().manual_seed(0))
    assert model(idx, targets)[1].item() == pytest.approx(math.log(40), abs=0.1)
    sharpened(model)(idx, targets)[1].backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())
    assert model.get_num_params(non_embedding=False) == parameters_by_hand({'n_embd': 16, **options})
    again = GPT(GPTConfig(**asdict(model.config)))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(idx, idx)[0], model(idx, idx)[0])
    assert {name for name in model.state_dict() if name.endswith('c_proj.weight')} == {
        f'transformer.h.{i}.{part}.c_proj.weight' for i in range(options['n_layer']) for part in ('attn', 'mlp')}


@pytest.mark.filterwarnings('ignore')
@settings(max_examples=10)
@given(options=OPTIONS, window=st.sampled_from([0, 1, 50, 70, 200]))
def test_options_compiled_equal_eager(options, window):
    """The path that compiled blocks take on the CPU, traced but not translated: same loss and gradients as eager."""
    torch._dynamo.reset()
    models = [sharpened(tiny(**{**options, 'block_size': 130, 'window': window})) for _ in range(2)]
    for block in models[1].transformer.h:
        block.compile(dynamic=False, fullgraph=True, backend='eager')
    idx = torch.randint(40, (2, 130), generator=torch.Generator().manual_seed(0))
    losses = [model(idx, idx)[1] for model in models]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-5, rtol=1e-3, msg=lambda m, name=name: f'{name}: {m}')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('preset', PRESETS)
def test_the_whole_model_is_one_graph(preset, monkeypatch):
    """As a GPU takes it, its loss in chunks: traced without a break, the loss and gradients of the model itself."""
    torch._dynamo.reset()
    monkeypatch.setattr(ops, 'CHUNK', 300)
    idx = torch.randint(40, (2, 16), generator=torch.Generator().manual_seed(0))
    model = sharpened(tiny(**{**PRESETS[preset], 'dropout': 0.2, 'window': 5, 'n_kv_head': 1,
                              'residual_lambdas': True, 'value_embeddings': True}))
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend='eager')
    assert compiled(idx, idx, return_logits=False)[1].isfinite()
    model.eval()  # compiled dropout draws other numbers
    expected, found = gradients(model, lambda: model(idx, idx)[1],
                                lambda: compiled(idx, idx, return_logits=False)[1])
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize('preset', PRESETS)
def test_bf16_is_close_to_fp32(preset):
    """Kernels for bf16 were wrong before, in torch's flash attention on AMX (pytorch issue 123503)."""
    model = tiny(**{**PRESETS[preset], 'block_size': 128, 'n_head': 4, 'n_embd': 64})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    idx, targets = torch.randint(40, (2, 4, 128), generator=torch.Generator().manual_seed(0))

    def in_bf16():
        with torch.autocast('cpu', torch.bfloat16):
            return model(idx, targets)[1]

    exact, rounded = gradients(model, lambda: model(idx, targets)[1], in_bf16)
    assert rounded.pop('loss') == pytest.approx(exact.pop('loss').item(), rel=1e-3)
    for name in exact:
        assert (rounded[name] - exact[name]).norm() < 0.05 * exact[name].norm(), name


# the loss in chunks ---------------------------------------------------------------------------------------------------

def gradients(model, *losses):
    """For each function that computes a loss: the loss and {name: gradient}."""
    found = []
    for loss_of in losses:
        model.zero_grad()
        loss = loss_of()
        (3 * loss).backward()
        found.append({'loss': loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}})
    return found


@settings(max_examples=30)
@given(tied=st.booleans(), softcap=st.sampled_from([0.0, 1.0, 15.0]), vocab=st.integers(2, 70), n=st.integers(1, 4),
       chunk=st.sampled_from([1, 10, 31]), seed=st.integers(0, 2**31), missing=st.sampled_from([0.0, 0.3, 0.9]))
def test_loss_in_chunks(tied, softcap, vocab, n, chunk, seed, missing):
    """The loss and all gradients of F.cross_entropy, wherever targets are missing and however many rows a chunk has."""
    model = sharpened(tiny(vocab_size=vocab, tie_embeddings=tied, logit_softcap=softcap))
    generator = torch.Generator().manual_seed(seed)
    idx, targets = torch.randint(vocab, (2, n, 16), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < missing] = -1
    targets[0, 0] = 0  # one is there
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, 'CHUNK', chunk)

        def in_chunks():
            logits, loss = model(idx, targets, return_logits=False)
            assert logits is None and loss.grad_fn.next_functions[0][0].name().startswith('ChunkedCrossEntropy')
            return loss

        direct, chunked = gradients(model, lambda: F.cross_entropy(
            model(idx, targets)[0].flatten(0, 1), targets.flatten(), ignore_index=-1), in_chunks)
        for name, expected in direct.items():
            error = (chunked[name] - expected).abs().max()
            # further down the differences of single roundings are multiplied
            tolerance = 1e-6 if name in ('loss', 'lm_head.weight') else 1e-5
            assert error <= tolerance * max(1.0, expected.abs().max()), f'{name}: {error}'
        with torch.no_grad():
            any_negative = targets.masked_fill(targets < 0, -100)
            for return_logits in (True, False):
                torch.testing.assert_close(model(idx, any_negative, return_logits=return_logits)[1], direct['loss'])
        for return_logits in (True, False):  # nothing to learn from teaches nothing
            nothing = model(idx, torch.full_like(targets, -1), return_logits=return_logits)[1]
            nothing.backward()
            assert nothing == 0 and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_loss_in_fp16_is_not_in_chunks(monkeypatch):
    """There small gradients are kept by a GradScaler, whose factor comes after a chunk's have been rounded."""
    monkeypatch.setattr(ops, 'CHUNK', 500)
    idx = torch.randint(40, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.autocast('cpu', torch.float16):
        loss = tiny()(idx, idx, return_logits=False)[1]
    assert 'ChunkedCrossEntropy' not in str(loss.grad_fn.next_functions)


def test_loss_in_chunks_in_bf16(monkeypatch):
    """As close to fp32 as the loss of all logits in bf16 is."""
    monkeypatch.setattr(ops, 'CHUNK', 500)
    model = sharpened(tiny(logit_softcap=15.0, tie_embeddings=False))
    idx = torch.randint(40, (4, 16), generator=torch.Generator().manual_seed(0))

    def in_bf16(return_logits):
        with torch.autocast('cpu', torch.bfloat16):
            loss = model(idx, idx, return_logits=return_logits)[1]
        assert loss.dtype == torch.float32
        return loss

    exact, direct, chunked = gradients(model, lambda: model(idx, idx)[1], lambda: in_bf16(True), lambda: in_bf16(False))
    errors = [sum((found[name] - of).norm() ** 2 / of.norm() ** 2 for name, of in exact.items()) ** 0.5
              for found in (direct, chunked)]
    assert 0 < errors[1] < 1.2 * errors[0], errors


class LargestTensor(TorchDispatchMode):
    """Watches how many numbers the largest tensor has that torch makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize('training', [True, False])
def test_loss_in_chunks_never_holds_all_logits(training, monkeypatch):
    """Nothing forward or backward is larger than a chunk of the logits; small ones are not cut."""
    model = tiny(vocab_size=2000, n_embd=4, logit_softcap=15.0).train(training)
    idx = torch.randint(2000, (8, 16))
    found = {}
    for chunk in (8 * 16 * 2000, 8 * 16 * 2000 // 8):
        monkeypatch.setattr(ops, 'CHUNK', chunk)
        with LargestTensor() as largest, torch.set_grad_enabled(training):
            loss = model(idx, idx, return_logits=False)[1]
            if training:
                loss.backward()
        found[chunk] = largest.numel
    assert found == {chunk: chunk for chunk in found}


def test_padded_vocab_size():
    assert padded_vocab_size(50257) == padded_vocab_size(50304) == 50304
    assert [padded_vocab_size(n) for n in (1, 65, 256, 1023, 1024, 1025, 65_536)] == [
        1, 65, 256, 1023, 1024, 1088, 65_536]


# each option ----------------------------------------------------------------------------------------------------------

@settings(max_examples=8)
@given(heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]), half=st.integers(1, 4), layers=st.integers(1, 2),
       base=st.sampled_from([50.0, 10000.0]), tied=st.booleans())
def test_llama_equals_transformers(heads, half, layers, base, tied):
    n_head, n_kv_head = heads
    ours = sharpened(GPT(GPTConfig(**{**PRESETS['llama'], 'block_size': 16, 'vocab_size': 40, 'n_layer': layers,
                                      'n_head': n_head, 'n_kv_head': n_kv_head, 'n_embd': n_head * 2 * half,
                                      'rope_base': base, 'tie_embeddings': tied}))).eval()
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=40, hidden_size=n_head * 2 * half, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=n_head, num_key_value_heads=n_kv_head, max_position_embeddings=16, rms_norm_eps=1e-5,
        rope_theta=base, rope_parameters={'rope_type': 'default', 'rope_theta': base}, tie_word_embeddings=tied)).eval()
    state = {'model.embed_tokens.weight': ours.transformer.wte.weight, 'lm_head.weight': ours.lm_head.weight,
             'model.norm.weight': ours.transformer.ln_f.weight}
    kv = n_kv_head * 2 * half
    for i, block in enumerate(ours.transformer.h):
        q, k, v = block.attn.c_attn.weight.split((n_head * 2 * half, kv, kv))
        gate, up = block.mlp.c_fc.weight.chunk(2)
        state.update({f'model.layers.{i}.{name}.weight': tensor for name, tensor in (
            ('input_layernorm', block.ln_1.weight), ('post_attention_layernorm', block.ln_2.weight),
            ('self_attn.q_proj', q), ('self_attn.k_proj', k), ('self_attn.v_proj', v),
            ('self_attn.o_proj', block.attn.c_proj.weight), ('mlp.gate_proj', gate), ('mlp.up_proj', up),
            ('mlp.down_proj', block.mlp.c_proj.weight))})
    theirs.load_state_dict(state)
    idx = torch.randint(40, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx, idx)[0], theirs(idx).logits, atol=1e-4, rtol=1e-4)


def test_rotation_is_that_of_complex_numbers():
    model = tiny(pos='rope', n_head=2, n_embd=16, rope_base=50.0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    got = rotate(x, model.rotation(torch.arange(7, 12)).double())
    for t in range(5):
        for i in range(4):
            turned = torch.complex(x[:, t, :, i], x[:, t, :, i + 4]) * torch.polar(
                torch.tensor(1.0).double(), torch.tensor((7 + t) * 50.0 ** (-i / 4)).double())
            torch.testing.assert_close(got[:, t, :, i], turned.real, atol=1e-5, rtol=0)
            torch.testing.assert_close(got[:, t, :, i + 4], turned.imag, atol=1e-5, rtol=0)


def test_scores_under_rope_depend_on_distance_alone():
    model = tiny(pos='rope', block_size=64)
    q, k = torch.randn(2, 1, 1, 1, 8)
    at = [model.rotation(torch.tensor([position])) for position in range(60)]
    scores = [(rotate(q, at[s + 9]) * rotate(k, at[s])).sum().item() for s in (0, 3, 50)]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-4)
    other = (rotate(q, model.rotation(torch.tensor([8]))) * rotate(k, model.rotation(torch.tensor([0])))).sum().item()
    assert abs(other - scores[0]) > 1e-3


@pytest.mark.parametrize('window', [1, 2, 60, 64, 65, 100, 129, 130, 500])
def test_window_against_a_dense_mask(window):
    """Both paths, of one query block and of several; and the masked scores written out in float64."""
    torch.manual_seed(0)
    config = GPTConfig(n_head=4, n_kv_head=2, n_embd=16, block_size=256)
    attention = CausalSelfAttention(config, window)
    for T in (3, 130):
        q, k, v = torch.randn(2, 4, T, 4), torch.randn(2, 2, T, 4), torch.randn(2, 2, T, 4)
        distance = torch.arange(T)[:, None] - torch.arange(T)
        for h in range(4):
            scores = q[:, h].double() @ k[:, h // 2].double().mT / 2  # the root of 4 channels
            scores[:, (distance < 0) | (distance >= window)] = -math.inf
            expected = (scores.softmax(-1) @ v[:, h // 2].double()).float()
            for attend in (attention.attend, attention.attend_in_blocks):
                torch.testing.assert_close(attend(q, k, v)[:, h], expected, atol=1e-5, rtol=1e-5)


def test_which_layers_have_windows():
    def windows(**options):
        config = GPTConfig(n_layer=6, **options)
        return [config.window_of(layer) for layer in range(6)]

    assert windows() == [0] * 6
    assert windows(window=5) == [5, 5, 5, 5, 5, 0]
    assert windows(window=5, window_pattern='SSL') == [5, 5, 0, 5, 5, 0]
    assert windows(window=5, window_pattern='LS') == [0, 5, 0, 5, 0, 0]
    assert windows(window=0, window_pattern='SSL') == [0] * 6


def test_grouped_queries_are_shared_keys():
    """The same as all heads having keys and values of their own that happen to be equal."""
    shared, full = (sharpened(tiny(n_head=4, n_kv_head=n)) for n in (2, None))
    full.load_state_dict({name: t if 'c_attn' not in name else full.state_dict()[name]
                          for name, t in shared.state_dict().items()})
    for few, many in zip(shared.transformer.h, full.transformer.h, strict=True):
        for few_p, many_p in zip(few.attn.c_attn.parameters(), many.attn.c_attn.parameters(), strict=True):
            q, k, v = few_p.data.split((16, 8, 8))
            k, v = (x.unflatten(0, (2, 4)).repeat_interleave(2, dim=0).flatten(0, 1) for x in (k, v))
            many_p.data = torch.cat((q, k, v))
    idx = torch.randint(40, (2, 16))
    torch.testing.assert_close(shared(idx, idx)[0], full(idx, idx)[0], atol=1e-5, rtol=1e-5)


def test_qk_norm():
    """Makes the scale of queries and keys meaningless, and only that."""
    for qk_norm in (True, False):
        attention = sharpened(CausalSelfAttention(GPTConfig(n_head=2, n_embd=16, qk_norm=qk_norm, bias=False)))
        x = torch.randn(1, 5, 16)
        before = attention(x)
        attention.c_attn.weight.data[:32] *= 10
        assert torch.allclose(attention(x), before, atol=1e-4) == qk_norm
        attention.c_attn.weight.data[32:] *= 10
        assert not torch.allclose(attention(x), before, atol=1e-4)


def test_softcap():
    models = [sharpened(tiny(logit_softcap=cap)) for cap in (0.0, 2.0)]
    idx = torch.randint(40, (2, 16))
    plain, capped = (model(idx, idx)[0] for model in models)
    assert plain.abs().max() > 2.5
    torch.testing.assert_close(capped, 2 * torch.tanh(plain / 2))
    torch.testing.assert_close(models[1](idx)[0][:, 0], capped[:, -1])
    torch.testing.assert_close(models[1](idx, idx)[1], F.cross_entropy(capped.flatten(0, 1), idx.flatten()))


def test_zero_init():
    """Every block is the identity, and the untied head knows nothing; the rest is as it was."""
    model = tiny(zero_init=True, tie_embeddings=False)
    idx, x = torch.randint(40, (2, 16)), torch.randn(2, 16, 16)
    assert all(torch.equal(block(x), x) for block in model.transformer.h)
    assert model(idx, idx)[1].item() == pytest.approx(math.log(40), abs=1e-6)
    assert tiny(zero_init=True).lm_head.weight.std() > 0.01  # tied, it is the embedding


def test_residual_lambdas_by_hand():
    model = tiny(residual_lambdas=True, zero_init=True, n_layer=2, pos='rope')  # blocks add nothing of their own
    for block, (l0, l1) in zip(model.transformer.h, ((0.5, 2.0), (3.0, -1.0)), strict=True):
        assert block.lambdas.tolist() == [1.0, 0.0]
        block.lambdas.data = torch.tensor([l0, l1])
    idx = torch.randint(40, (1, 16))
    x0 = model.transformer.wte(idx)
    x = 3 * (0.5 * x0 + 2 * x0) - x0
    torch.testing.assert_close(model(idx, idx)[0], model.lm_head(model.transformer.ln_f(x)))


def test_value_embeddings_by_hand():
    """A layer that sees one position mixes nothing: it projects its value, and the token's embedding in it."""
    torch.manual_seed(0)
    attention = CausalSelfAttention(GPTConfig(n_head=4, n_kv_head=2, n_embd=16, bias=False), window=1)
    x, embedding = torch.randn(2, 5, 16), torch.randn(2, 5, 8)
    v = (x @ attention.c_attn.weight[24:].T + embedding).unflatten(2, (2, 4)).repeat_interleave(2, dim=2).flatten(2)
    torch.testing.assert_close(attention(x, value_embedding=embedding), v @ attention.c_proj.weight.T)
    model = tiny(n_layer=5, value_embeddings=True, n_kv_head=1)
    assert {name: tuple(p.shape) for name, p in model.named_parameters() if 'vte' in name} == {
        f'transformer.vte.{layer}.weight': (40, 8) for layer in (0, 2, 4)}


@pytest.mark.parametrize('mlp', ['swiglu', 'relu2'])
def test_mlp_by_hand(mlp):
    model = sharpened(tiny(mlp=mlp, bias=False))
    x, part = torch.randn(3, 16), model.transformer.h[0].mlp
    if mlp == 'relu2':
        hidden = (x @ part.c_fc.weight.T).clamp(min=0) ** 2
    else:
        gate, up = x @ part.c_fc.weight[:64].T, x @ part.c_fc.weight[64:].T
        hidden = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(part(x), hidden @ part.c_proj.weight.T)


def test_widths_of_mlps():
    """SwiGLU's three matrices have as many parameters as the others' two, within what 64 rounds away."""
    for n_embd in (384, 768, 1024, 4096):
        width = GPTConfig(n_embd=n_embd, n_head=1, mlp='swiglu').mlp_width
        assert width % 64 == 0 and abs(3 * n_embd * width - 8 * n_embd**2) <= 3 * n_embd * 32
    assert GPTConfig(mlp='relu2').mlp_width == GPTConfig(mlp='gelu').mlp_width == 3072


def test_rope_has_no_end():
    """Nothing is learnt of positions, so the context can be shortened, and lengthened again."""
    model = sharpened(tiny(pos='rope')).eval()
    idx = torch.randint(40, (2, 16))
    expected = model(idx, idx)[0]
    model.crop_block_size(5)
    torch.testing.assert_close(model(idx[:, :5], idx[:, :5])[0], expected[:, :5])
    with pytest.raises(ValueError, match='6 tokens is longer than block_size=5'):
        model(idx[:, :6])
    model.crop_block_size(40)
    torch.testing.assert_close(model(idx, idx)[0], expected)
    assert model(torch.randint(40, (1, 40)))[0].isfinite().all()
    with pytest.raises(ValueError, match='block_size=0'):
        model.crop_block_size(0)


def test_configs_of_before_the_options():
    """What an older checkpoint says of its model still is a GPT-2."""
    old = {'block_size': 16, 'vocab_size': 40, 'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'dropout': 0.0, 'bias': True}
    torch.manual_seed(0)
    assert {**old, 'mlp': 'gelu'}.items() <= asdict(GPT(GPTConfig(**old)).config).items()
    assert set(tiny().state_dict()) == set(huggingface().state_dict())


def test_presets():
    for name, options in PRESETS.items():
        config = GPTConfig(**options)
        assert {field: getattr(config, field) for field in options} == options, name
    assert GPTConfig(**PRESETS['gpt2']) == GPTConfig()


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('T, window, n_kv_head', [(300, 70, 2), (256, 200, 4), (130, 1, 1)])
def test_flex_attention_equals_masked_attention(T, window, n_kv_head):
    """What a GPU computes with a map of blocks, by FlexAttention's plain definition, which any device has."""
    model = sharpened(tiny(n_embd=64, n_head=4, n_kv_head=n_kv_head, block_size=T, window=window))
    attention, x = model.transformer.h[0].attn, torch.randn(2, T, 64)
    assert model.window_blocks(T, x.device) is None  # it is no kernel here
    with torch.no_grad():
        blocks = create_block_mask(window_mask(window), None, None, T, T, 'cpu')
        torch.testing.assert_close(attention(x, window_blocks=blocks), attention(x), atol=1e-5, rtol=1e-4)


# dropout --------------------------------------------------------------------------------------------------------------

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


@pytest.mark.filterwarnings('ignore')
def test_compiled_dropout():
    """The hashed numbers of compiled dropout have the statistics of random ones."""
    torch._dynamo.reset()
    p, shape = 0.2, (64, 4096)
    drop = Dropout(p)
    compiled = torch.compile(lambda x: drop(x), dynamic=False, options={'fallback_random': True})

    def masks(seed, n):
        torch.manual_seed(seed)
        return torch.stack([compiled(torch.ones(shape)) for _ in range(n)])

    y = masks(0, 20)
    assert torch.equal(masks(0, 2), y[:2])  # a function of the seed
    assert not torch.equal(masks(1, 2), y[:2])
    assert set(y.unique().tolist()) == {0.0, 1.25}  # dropped, or scaled so that the expectation stays
    dropped = (y == 0).double()
    n = dropped.numel()

    def agrees(observed, expected, count, what):
        sigma = math.sqrt(expected * (1 - expected) / count)
        assert abs(observed - expected) < 5 * sigma, f'{what}: {observed}, expected {expected} +- {sigma}'

    agrees(dropped.mean().item(), p, n, 'rate')
    for call in dropped:
        agrees(call.mean().item(), p, call.numel(), 'rate in one call')
    assert (dropped.mean((0, 2)) - p).abs().max() < 5 * math.sqrt(p * (1 - p) / (n / shape[0]))  # every row
    assert (dropped.mean((0, 1)) - p).abs().max() < 5.5 * math.sqrt(p * (1 - p) / (n / shape[1]))  # every column
    # two dropped together as often as chance has it: neighbours, power-of-two distances, rows, calls
    for shift in (1, 2, 3, 4, 7, 8, 16, 64, 256, 1024):
        both = (dropped[..., shift:] * dropped[..., :-shift]).mean().item()
        agrees(both, p * p, n, f'both at distance {shift}')
    agrees((dropped[:, 1:] * dropped[:, :-1]).mean().item(), p * p, n, 'both in neighbouring rows')
    agrees((dropped[1:] * dropped[:-1]).mean().item(), p * p, n, 'both in consecutive calls')
    drop.eval()
    assert torch.equal(drop(torch.ones(9)), torch.ones(9))


def test_eager_dropout_is_torchs():
    x = torch.randn(100)
    torch.manual_seed(0)
    ours = Dropout(0.3)(x)
    torch.manual_seed(0)
    assert torch.equal(ours, F.dropout(x, 0.3))


@pytest.mark.filterwarnings('ignore')
def test_compiled_gelu_is_the_tanh_gelu():
    torch._dynamo.reset()
    gelu = GELU(approximate='tanh')
    compiled = torch.compile(lambda x: gelu(x), dynamic=False)
    x = torch.cat((torch.linspace(-12, 12, 10_001), torch.tensor([0.0, -100.0, 100.0, 1e4, -1e4])))
    expected = F.gelu(x.double(), approximate='tanh')
    torch.testing.assert_close(compiled(x).double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(gelu(x), F.gelu(x, approximate='tanh'))
    assert torch.equal(GELU(approximate='none')(x), F.gelu(x))


# the rest -------------------------------------------------------------------------------------------------------------

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
    ({'n_embd': 18, 'n_head': 4}, 'n_embd=18 is not divisible by n_head=4; the nearest n_embd that is: 16'),
    ({'n_embd': 3, 'n_head': 8}, 'is: 8'), ({'dropout': 1.0}, 'dropout=1.0'), ({'dropout': -0.1}, 'dropout=-0.1'),
    ({'n_layer': 0}, 'n_layer=0: expected 1 or more'), ({'vocab_size': None}, 'vocab_size=None'),
    ({'block_size': -4}, 'block_size=-4'), ({'n_head': 0}, 'n_head=0'), ({'n_embd': 0}, 'n_embd=0'),
    ({'mlp': 'swish'}, "mlp='swish': expected 'gelu' or 'gelu_erf' or 'swiglu' or 'relu2'"),
    ({'norm': 'none'}, "norm='none'"), ({'pos': 'alibi'}, "pos='alibi'"),
    ({'n_kv_head': 5}, 'n_kv_head=5: expected a divisor of n_head=12: 1, 2, 3, 4, 6, 12'),
    ({'n_kv_head': 0}, 'n_kv_head=0'), ({'pos': 'rope', 'n_embd': 36}, 'heads of 3; expected an even number'),
    ({'rope_base': 1.0}, 'rope_base=1.0'), ({'rope_base': math.nan}, 'rope_base=nan'), ({'window': -1}, 'window=-1'),
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
        with pytest.raises(ValueError, match=f'block_size={size}: expected 1 or more, and of this model, .* at most 6'):
            model.crop_block_size(size)


def test_padding_is_not_drawn():
    """A vocabulary of 37 ids, padded to 40 of which the last three are likeliest."""
    model = tiny(tie_embeddings=False).eval()
    with torch.no_grad():
        model.lm_head.weight[37:] = 100 * model.transformer.ln_f(model.transformer.wte.weight[:1])
    idx = torch.zeros(2, 1, dtype=torch.long)
    torch.manual_seed(0)
    assert model.generate(idx, 20).max() >= 37
    assert model.generate(idx, 20, vocab_size=37).max() < 37 > model.generate(idx, 20, 0, 3, vocab_size=37).max()


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
    {}, PRESETS['llama'], PRESETS['modern'], {'n_kv_head': 1}, {'n_kv_head': 2, 'mlp': 'swiglu'},
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
    assert flops.mfu_of(model, 8, 0.1) is None  # the CPU's peak is not known
    monkeypatch.setattr(flops, 'peak_flops', lambda device: 1e9)
    assert flops.mfu_of(model, 8, 0.1) == pytest.approx(model.flops_per_token() * 16 * 8 / 0.1 / 1e9)


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
