"""Test step.py: a block by one call of products.cpp against the model. Run: pytest tests/test_step.py"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import OPTIONS, tiny

from flatgpt import products
from flatgpt.generate import generate
from flatgpt.quantize import for_decoding
from flatgpt.sampling import Sampling

SIZES = {'n_embd': 128, 'n_inner': 192, 'head_dim': None}


def model_of(options):
    """A model whose biases, norms and lambdas are not those of the start."""
    model = tiny(**options, **SIZES)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.fixture(scope='module', autouse=True)
def library():
    if products.load() is None:
        pytest.skip('no C++ compiler for products.cpp')


@settings(max_examples=15)
@given(options=OPTIONS, lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
       cache_dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_step_equals_uncached(options, lengths, cache_dtype):
    """Every option of the model, prompts of different lengths in a batch; torch computes the prompts alone."""
    options = {key: value for key, value in options.items() if key not in SIZES}
    plain, model = model_of(options), for_decoding(model_of(options), torch.float32, compile=True)
    calls = []
    for block in model.transformer.h:
        block.mlp.register_forward_hook(lambda module, args, x: calls.append(len(args[0])))
    prompts = [torch.randint(40, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    u = torch.rand(len(prompts), 7, generator=torch.Generator().manual_seed(0))
    steps = list(generate(model, prompts, Sampling(7, cache_dtype=cache_dtype), u))
    n_gated = sum(block.attn.head_gate is not None or block.attn.value_gate is not None for block in model.transformer.h)
    # torch computes the pass of several prompts, and all passes where there are gates
    n_plain = len(model.transformer.h) - n_gated
    assert len(calls) == 7 * n_gated + (max(lengths) > 1 and len(lengths) > 1) * n_plain
    new, logprobs = (torch.cat([step[i] for step in steps], dim=1) for i in (0, 1))
    for row, prompt in enumerate(prompts):
        idx = torch.tensor([prompt + new[row].tolist()])
        expected = plain(idx, idx)[0][0].log_softmax(-1)[len(prompt) - 1 : -1].gather(1, new[row][:, None])[:, 0]
        tolerance = 1e-3 if cache_dtype == torch.float32 else 0.1
        torch.testing.assert_close(logprobs[row], expected, atol=tolerance, rtol=tolerance)


@settings(max_examples=15)
@given(options=OPTIONS, prompt=st.lists(st.integers(0, 2), min_size=1, max_size=14), most=st.integers(1, 8))
def test_lookup(options, prompt, most):
    """A pass over guesses, also by products.cpp, has the log-probabilities of the plain model."""
    options = {key: value for key, value in options.items() if key not in SIZES}
    plain, model = model_of(options), for_decoding(model_of(options), torch.float32, compile=True)
    u = torch.rand(1, 12, generator=torch.Generator().manual_seed(most))
    steps = list(generate(model, [prompt], Sampling(12, n_ids=3, temperature=0.5, lookup=most), u))
    new, logprobs = (torch.cat([step[i] for step in steps], dim=1)[0] for i in (0, 1))
    for n in range(12):
        idx = torch.tensor([prompt + new[:n].tolist()])[:, -16:]
        expected = plain(idx)[0][0, -1, :3].log_softmax(-1)[new[n]]
        torch.testing.assert_close(logprobs[n], expected, atol=1e-3, rtol=1e-3)


def test_rows_beyond_the_loops_go_to_the_block():
    """products.cpp takes 64 rows; more give the same."""
    plain, model = model_of({}), for_decoding(model_of({}), torch.float32, compile=True)
    idx = torch.randint(40, (70, 3), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([ids for ids, _, _ in generate(model, idx, Sampling(5, 0))], dim=1)
    assert torch.equal(ids, plain.generate(idx, 5, temperature=0)[:, 3:])
