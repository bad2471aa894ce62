"""Test each faster form of ops.py against the plain one: values, gradients, memory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import gradients, gradients_to_the_future, sharpened, tiny
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ops

# attention ----------------------------------------------------------------------------------------


def random_qkv(n_head, n_kv_head, T, D, S=None):
    """Return q (2, H, T, D) and k, v (2, G, S, D), leaves that need gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = (n_head, T), (n_kv_head, S or T), (n_kv_head, S or T)
    return [torch.randn(2, heads, n, D, generator=generator).requires_grad_() for heads, n in shapes]


def values_and_gradients(form, qkv, mask):
    """Return the output of a form of attention, without dropout, and the gradients of q, k and v."""
    y = form(*qkv, mask, 0.0)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return y, *torch.autograd.grad((y * weights).sum(), qkv)


@pytest.mark.parametrize('n_head, n_kv_head', [(2, 2), (4, 2)])
@pytest.mark.parametrize('window', [0, 1, 2, 60, 64, 65, 100, 129, 130, 500])
def test_attention_against_float64(window, n_head, n_kv_head):
    """The plain form and the blocked one, of one block of queries and of several."""
    for T in (3, 130):
        q, k, v = qkv = random_qkv(n_head, n_kv_head, T, 4)
        distance = torch.arange(T)[:, None] - torch.arange(T)
        keys, values = (x.double().repeat_interleave(n_head // n_kv_head, dim=1) for x in (k, v))
        scores = q.double() @ keys.mT / 2  # the root of 4 channels
        scores = scores.masked_fill((distance < 0) | (distance >= (window or T)), -math.inf)
        expected = (scores.softmax(-1) @ values).float()
        for form in (ops.plain_attention, ops.blocked_attention):
            torch.testing.assert_close(form(*qkv, window, 0.0), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('n', [1, 2, 63, 64, 65, 127, 128, 130, 600])  # the last block of queries is shorter
@pytest.mark.parametrize('window', [0, 50])
def test_blocked_attention_equals_plain(n, window):
    qkv = random_qkv(4, 2, n, 4)
    blocked, plain = (values_and_gradients(form, qkv, window) for form in (ops.blocked_attention, ops.plain_attention))
    torch.testing.assert_close(blocked, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('n', [2, 65, 130])
def test_blocked_attention_is_causal(n):
    heads = torch.randn(1, n, 2, 12, generator=torch.Generator().manual_seed(0))  # q, k and v of 4 channels

    def attend(x):
        q, k, v = x.unflatten(2, (2, 12)).transpose(1, 2).chunk(3, dim=-1)
        return ops.blocked_attention(q, k, v, 0, 0.0).transpose(1, 2).flatten(2)

    assert gradients_to_the_future(attend, heads.flatten(2)) == 0


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('is_compiled', [False, True])
@pytest.mark.parametrize('n_kv_head', [4, 2, 1])
def test_single_query_attention_equals_plain(n_kv_head, is_compiled):
    """Over slots of which a mask hides some, both as written for eager and for compiled code."""
    torch._dynamo.reset()
    form = ops.single_query_attention
    form = torch.compile(form, backend='eager') if is_compiled else form
    qkv = random_qkv(4, n_kv_head, 1, 8, S=20)
    mask = torch.rand(2, 1, 1, 20, generator=torch.Generator().manual_seed(2)) < 0.5
    torch.testing.assert_close(values_and_gradients(form, qkv, mask),
                               values_and_gradients(ops.plain_attention, qkv, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('T, window, n_kv_head', [(300, 70, 2), (256, 200, 4), (130, 1, 1)])
def test_flex_attention_equals_plain(T, window, n_kv_head):
    """By FlexAttention's plain definition, which every device has; its kernel is for compiled code on a GPU."""
    qkv = [x.detach() for x in random_qkv(4, n_kv_head, T, 16)]
    blocks = ops.blocks_in_window(window, T, torch.device('cpu'))
    torch.testing.assert_close(ops.attention(*qkv, blocks), ops.plain_attention(*qkv, window, 0.0), atol=1e-5,
                               rtol=1e-4)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('T, S, mask, dropout, expected', [
    (600, 600, 0, 0.0, 'plain'), (600, 600, 0, 0.1, 'blocked'), (600, 600, 50, 0.0, 'blocked'),
    (512, 512, 0, 0.0, 'blocked'), (1, 8, 'all', 0.0, 'single_query'), (1, 8, 'all', 0.1, 'plain'),
    (2, 8, 0, 0.0, 'plain'), (2, 8, 'all', 0.0, 'plain')])
def test_which_form_is_compiled_on_the_cpu(T, S, mask, dropout, expected, monkeypatch):
    torch._dynamo.reset()
    used = []
    for name in ('plain', 'blocked', 'single_query'):
        monkeypatch.setattr(ops, f'{name}_attention', lambda q, k, v, mask, dropout, name=name: used.append(name) or q)
    mask = torch.ones(1, 1, T, S, dtype=torch.bool) if mask == 'all' else mask
    torch.compile(ops.attention, backend='eager')(*random_qkv(2, 2, T, 4, S), mask, dropout)
    assert used == [expected]
    ops.attention(*random_qkv(2, 2, T, 4, S), mask, dropout)
    assert used[1] == ('single_query' if expected == 'single_query' else 'plain')  # eager


def test_cached_keys_of_fewer_bits():
    """Queries are rounded to the keys' precision, and the output has the queries' own."""
    q, k, v = (x.detach() for x in random_qkv(2, 2, 3, 8))
    y = ops.attention(q, k.bfloat16(), v.bfloat16())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, ops.attention(q, k, v), atol=0.05, rtol=0.05)


# the loss in chunks -------------------------------------------------------------------------------

@settings(max_examples=30)
@given(tied=st.booleans(), softcap=st.sampled_from([0.0, 1.0, 15.0, 100.0]), vocab=st.integers(2, 70), n=st.integers(1, 4),
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
            assert logits is None and loss.grad_fn.next_functions[0][0].name().startswith('GeneratedBackwardFor_flatgpt')
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
    assert 'sum_in_chunks' not in str(loss.grad_fn.next_functions)


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
    """Nothing is larger than a chunk of the logits."""
    x, weight, ids = torch.randn(128, 4), torch.randn(2000, 4), torch.randint(2000, (128,))
    for chunk in (128 * 2000, 128 * 2000 // 8):
        monkeypatch.setattr(ops, 'CHUNK', chunk)
        with LargestTensor() as largest:  # which does not look into sum_cross_entropy
            ops.sum_in_chunks(x, weight, ids, 15.0, [training, training])
        assert largest.numel == chunk


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_compiled_dropout():
    """The hashed numbers of compiled dropout have the statistics of random ones."""
    torch._dynamo.reset()
    p, shape = 0.2, (64, 4096)
    drop = ops.Dropout(p)
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
    ours = ops.Dropout(0.3)(x)
    torch.manual_seed(0)
    assert torch.equal(ours, F.dropout(x, 0.3))


@pytest.mark.filterwarnings('ignore')
def test_compiled_gelu_is_the_tanh_gelu():
    torch._dynamo.reset()
    compiled = torch.compile(ops.tanh_gelu, dynamic=False)
    x = torch.cat((torch.linspace(-12, 12, 10_001), torch.tensor([0.0, -100.0, 100.0, 1e4, -1e4])))
    expected = F.gelu(x.double(), approximate='tanh')
    torch.testing.assert_close(compiled(x).double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(ops.tanh_gelu(x), F.gelu(x, approximate='tanh'))
