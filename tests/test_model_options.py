"""Test the options of model.py, in combination and one by one, against arithmetic by hand and transformers."""

import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, CHOICES, OPTIONS, gradients, sharpened, tiny
from torch.nn import functional as F

import ops
from config.presets import PRESETS
from flatgpt.generate import KVCache
from model import GPT, CausalSelfAttention, Context, GPTConfig, rotate

# all options, in combination ----------------------------------------------------------------------

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
    block += 2 * head * c['qk_norm_weight'] + 12 * c['n_head'] * c['head_gates']
    tables_of_values = 40 * kv + 12 * (kv // head) * c['value_gates']
    tables = 40 * width * (1 if c['tie_embeddings'] else 2) + 16 * width * (c['pos'] == 'learned')
    return c['n_layer'] * block + norm + tables + c['value_embeddings'] * tables_of_values * ((c['n_layer'] + 1) // 2)


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


@pytest.mark.slow
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
    model = sharpened(tiny(**{**ARCHITECTURES[preset], 'dropout': 0.2, 'window': 5, 'n_kv_head': 1,
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
    model = tiny(**{**ARCHITECTURES[preset], 'block_size': 128, 'n_head': 4, 'n_embd': 64})
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


# each option --------------------------------------------------------------------------------------

@settings(max_examples=8)
@given(heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]), half=st.integers(1, 4), layers=st.integers(1, 2),
       base=st.sampled_from([50.0, 10000.0]), tied=st.booleans())
def test_llama_equals_transformers(heads, half, layers, base, tied):
    n_head, n_kv_head = heads
    ours = sharpened(GPT(GPTConfig(**{**ARCHITECTURES['llama'], 'block_size': 16, 'vocab_size': 40, 'n_layer': layers,
                                      'n_head': n_head, 'n_kv_head': n_kv_head, 'n_embd': n_head * 2 * half,
                                      'rope_base': base, 'tie_embeddings': tied}))).eval()
    transformers = pytest.importorskip('transformers')
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
        before = attention(x, Context())
        attention.c_attn.weight.data[:32] *= 10
        assert torch.allclose(attention(x, Context()), before, atol=1e-4) == qk_norm
        attention.c_attn.weight.data[32:] *= 10
        assert not torch.allclose(attention(x, Context()), before, atol=1e-4)


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
    assert all(torch.equal(block(x, Context()), x) for block in model.transformer.h)
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
    torch.testing.assert_close(attention(x, Context(value_embedding=embedding)), v @ attention.c_proj.weight.T)
    model = tiny(n_layer=5, value_embeddings=True, n_kv_head=1)
    assert {name: tuple(p.shape) for name, p in model.named_parameters() if 'vte' in name} == {
        f'transformer.vte.{layer}.weight': (40, 8) for layer in (0, 2, 4)}


def test_gates_by_hand():
    """Each head and each value embedding is scaled by twice the sigmoid of a product with the first 12 channels."""
    torch.manual_seed(0)
    config = GPTConfig(n_head=4, n_kv_head=2, n_embd=16, bias=False, value_embeddings=True, value_gates=True, head_gates=True)
    attention = CausalSelfAttention(config, window=1, has_values=True)
    assert attention.head_gate.shape == (4, 12) and attention.value_gate.shape == (2, 12)
    for gate in (attention.head_gate, attention.value_gate):
        torch.nn.init.normal_(gate)
    x, embedding = torch.randn(2, 5, 16), torch.randn(2, 5, 8)
    of_heads, of_values = (2 / (1 + torch.exp(-(x[..., :12] @ gate.T))) for gate in (
        attention.head_gate, attention.value_gate))
    v = (x @ attention.c_attn.weight[24:].T).unflatten(2, (2, 4)) + of_values[..., None] * embedding.unflatten(2, (2, 4))
    y = (v.repeat_interleave(2, dim=2) * of_heads[..., None]).flatten(2)
    torch.testing.assert_close(attention(x, Context(value_embedding=embedding)), y @ attention.c_proj.weight.T)


def test_gates_begin_at_one():
    """Added to a model, they change nothing; value gates are where value embeddings are."""
    plain, gated = (tiny(n_layer=3, value_embeddings=True, **gates) for gates in (
        {}, {'head_gates': True, 'value_gates': True}))
    fresh = {name for name, _ in gated.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert fresh == {f'transformer.h.{i}.attn.{name}' for i, name in (
        (0, 'head_gate'), (1, 'head_gate'), (2, 'head_gate'), (0, 'value_gate'), (2, 'value_gate'))}
    gated.load_state_dict(plain.state_dict(), strict=False)
    idx = torch.randint(40, (2, 16))
    assert torch.equal(gated(idx, idx)[0], plain(idx, idx)[0])
    with pytest.raises(ValueError, match='value_gates=True: expected value_embeddings=True too'):
        GPTConfig(value_gates=True)


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


def test_presets():
    for name, options in ARCHITECTURES.items():
        config = GPTConfig(**options)
        assert {field: getattr(config, field) for field in options} == options, name
    assert GPTConfig(**ARCHITECTURES['gpt2']) == GPTConfig()
