"""Test products.py: the loops of products.cpp against torch. Run: pytest tests/test_products.py"""

import numpy as np
import pytest
import torch

import ops
from flatgpt import products
from flatgpt.quantize import quantize_rows

DTYPES = [torch.float32, torch.bfloat16, torch.int8]


@pytest.fixture(scope='module', autouse=True)
def library():
    if products.load() is None:
        pytest.skip('no C++ compiler for products.cpp')
    with torch.no_grad():
        yield


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('n', [1, 2, 3, 4, 7, 16, 64])
@pytest.mark.parametrize('N, K', [(1, 64), (2, 128), (7, 576), (50, 1088), (300, 768)])
def test_multiply(dtype, n, N, K):
    """Every number of rows, also columns that fill no tile, and channels that fill no block."""
    x, weight = normal(n, K), normal(N, K, seed=1)
    scale, bias = normal(N, seed=2), normal(N, seed=3)
    weight = (30 * weight).clamp(-127, 127).to(dtype)
    expected = x.double() @ weight.double().T
    got = products.Product(weight)(x)
    # sums of rounding errors: int8 rounds one row of x to half of 2^-14 of its largest number
    error = x.abs().max() * 2**-15 * weight.float().norm(dim=1).max() if dtype == torch.int8 and n == 1 else 0
    assert (got - expected).abs().max() < 4 * error + 2e-6 * K**0.5 * 30 * 6
    whole = products.Product(weight, scale, bias)(x)
    torch.testing.assert_close(whole, got * scale + bias)


def test_denormal_numbers_stay():
    """Code that a compiler links for fast mathematics would round them to 0 in the whole process."""
    assert np.float32(1e-40) * np.float32(0.5) > 0


def test_integers_do_not_overflow():
    """Where all channels are at their largest a sum holds 24 bits of x."""
    x, weight = torch.full((1, 4096), 3.0), torch.full((4, 4096), -127, dtype=torch.int8)
    torch.testing.assert_close(products.Product(weight)(x), torch.full((1, 4), -3.0 * 127 * 4096), rtol=1e-3, atol=0)
    assert (products.Product(weight)(torch.zeros(1, 4096)) == 0).all()


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_damaged_numbers_are_shown(dtype, value):
    x = normal(1, 128)
    x[0, 70] = value
    assert not products.Product(torch.ones(5, 128, dtype=dtype))(x).isfinite().any()


def test_a_row_is_rounded_like_a_weight():
    """Of int8: what rounding x adds is far below what rounding the weights does."""
    x, weight = normal(1, 768), normal(400, 768, seed=1)
    q, scale = quantize_rows(weight)
    exact, got = x @ weight.T, products.Product(q, scale)(x)
    of_weights = (x @ (q * scale[:, None]).T - exact).std()
    assert (got - x @ (q * scale[:, None]).T).std() < 0.05 * of_weights


@pytest.mark.parametrize('dtype', DTYPES[:2])
@pytest.mark.parametrize('B, G, D', [(1, 4, 32), (3, 2, 64), (2, 1, 96)])
@pytest.mark.parametrize('own_mask', [False, True])
def test_one_query(dtype, B, G, D, own_mask):
    """Grouped heads, keys inside a longer cache, hidden keys; values that are not numbers are behind the mask."""
    cache = normal(2, B + 1, G, 150, D).to(dtype)
    cache[:, :, :, 140:] = torch.nan
    k, v = cache[:, :B, :, :145]
    seen = normal(B if own_mask else 1, 1, 1, 145, seed=4) > 0
    seen[..., 3], seen[..., 140:] = True, False
    q = 3 * normal(B, 4, 1, D, seed=5)
    assert products.FewQueries.fits(k)
    got = ops.attention(q, k, v, products.FewQueries(seen))
    finite = [part.nan_to_num() for part in (k.float(), v.float())]
    torch.testing.assert_close(got, ops.plain_attention(q, *finite, seen, 0.0), rtol=1e-5, atol=1e-5)


def test_without_a_compiler(monkeypatch, capsys):
    """One warning, and the step goes on without."""
    monkeypatch.setenv('CXX', 'no-such-compiler')
    assert products.load.__wrapped__() is None
    assert 'products.cpp was not compiled' in capsys.readouterr().err
