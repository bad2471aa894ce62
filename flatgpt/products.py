"""
Multiply few rows by a matrix, and attend to cached keys, by products.cpp.

    if products.load() is not None and Product.fits(weight): y = Product(weight)(x)

The time is that of reading the matrix, and libraries take up to four times as long for one row. The
C++ compiler takes a second. It needs Linux, whose OpenMP is torch's.
"""

import ctypes
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

MOST_ROWS = 64  # products.cpp keeps their sums
# what -ffast-math allows but for infinite numbers; that flag would also link code that makes the
# whole process round denormal numbers to 0
FLAGS = ['-O3', '-march=native', '-fno-math-errno', '-fno-trapping-math', '-fno-signed-zeros',
         '-fassociative-math', '-freciprocal-math', '-fopenmp', '-shared', '-fPIC']


@functools.cache
def load():
    """Compile and load products.cpp; -> the library, or None with a warning."""
    if sys.platform != 'linux':
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'products.so')
        source = Path(__file__).with_suffix('.cpp')
        try:
            subprocess.run([os.environ.get('CXX') or 'g++', *FLAGS, source, '-o', path], check=True,
                           capture_output=True, text=True)
            library = ctypes.CDLL(path)
        except (OSError, subprocess.CalledProcessError) as error:
            why = (getattr(error, 'stderr', '') or str(error)).strip().splitlines()[0]
            print(f'WARNING: {source.name} was not compiled ({why}); continuing without it, '
                  f'slower. --compile=False silences this', file=sys.stderr, flush=True)
            return None
    address = ctypes.c_void_p
    for dtype in ('float32', 'bfloat16', 'int8'):
        multiply = getattr(library, f'multiply_{dtype}')
        multiply.argtypes = *[address] * 3, *[ctypes.c_ssize_t] * 3, address, address
    for attend in (library.attend_float32, library.attend_bfloat16):
        attend.argtypes = [address] * 6
    library.run_block.argtypes = [address] * 2
    return library


class Product:
    """Multiply x (..., K) by a weight (N, K): scale * x weight^T + bias, (..., N).

    scale, bias: (N,) in fp32, or None. x has up to MOST_ROWS rows; y is in fp32. The weight's
    address is looked up once, since a step of one token makes dozens of these calls.
    """

    def __init__(self, weight, scale=None, bias=None):
        self.kept = weight, scale, bias  # the addresses hold as long as these do
        name = f'multiply_{weight.dtype}'.replace('torch.', '')
        self.multiply, (self.N, self.K) = getattr(load(), name), weight.shape
        self.addresses = [address_of(part) for part in self.kept]

    @staticmethod
    def fits(weight):
        """Return whether there are loops for a weight."""
        return (weight.device.type == 'cpu' and weight.size(1) % 64 == 0 and weight.is_contiguous()
                and weight.dtype in (torch.float32, torch.bfloat16, torch.int8))

    def __call__(self, x):
        if x.dtype != torch.float32 or not x.is_contiguous():
            x = x.float().contiguous()
        y, (weight, scale, bias) = torch.empty(*x.shape[:-1], self.N), self.addresses
        n = x.numel() // self.K
        self.multiply(x.data_ptr(), weight, y.data_ptr(), n, self.N, self.K, scale, bias)
        return y


def address_of(tensor):
    """Return where a tensor's numbers lie; None for None."""
    return None if tensor is None else tensor.data_ptr()


class FewQueries:
    """Attend like ops.attention() from one query of each row, or a few of one row.

    seen: (B or 1, 1, T, S) of bool. q: (B, H, T, D). k, v: (B, G, S, D), in a KVCache's memory.
    """

    def __init__(self, seen):
        self.seen, self.sizes = seen.contiguous(), None

    @staticmethod
    def fits(k, B=1, T=1):
        """Return whether T queries of B rows can attend to keys, (..., S, D).

        load() must have been called: what decodes without compilation never compiles.
        """
        return ((T == 1 or B == 1 and T <= MOST_ROWS)
                and bool(load.cache_info().currsize) and load() is not None
                and k.device.type == 'cpu' and k.dtype in (torch.float32, torch.bfloat16)
                and k.size(-1) % 32 == 0 and not torch.is_grad_enabled())

    def __call__(self, q, k, v):
        q = q.float().transpose(1, 2).contiguous()  # (B, T, H, D)
        y, library = torch.empty(q.shape), load()
        attend = library.attend_float32 if k.dtype == torch.float32 else library.attend_bfloat16
        attend(q.data_ptr(), k.data_ptr(), v.data_ptr(), self.seen.data_ptr(), y.data_ptr(),
               self.sizes_of(q.size(2), k))
        return y.transpose(1, 2)

    def sizes_of(self, H, k):
        """Return attend()'s sizes, the same for all layers.

        To products.cpp the queries of one row are rows with the same keys.
        """
        if self.sizes is None:
            (B, G, S, D), T = k.shape, self.seen.size(2)
            row_step, head_step = k.stride()[:2]
            self.sizes = (ctypes.c_ssize_t * 8)(
                B * T, H, G, S, D, row_step if T == 1 else 0, head_step,
                S if len(self.seen) * T > 1 else 0)
        return self.sizes
