"""
Keep the keys and values of many sequences in one pool of rows.

    pool = Pool(model.config, n_rows=8, context=1024)
    x = model.hidden(ids, cache=pool.pieces([5, 0, 1]))  # 5 tokens of row 0, 1 of row 2
    logits, _ = model(ids, cache=pool.first_rows(3))     # a token of each of rows 0, 1, 2

In pieces() tokens of all rows stand side by side, ids (1, N): the linear layers read each weight
once for all of them ("Orca", Yu et al. 2022), and attention runs for each row on its own. In
first_rows() they are a batch, ids (B, 1), which can be compiled, and attention reads the rows up to
the longest one.
"""

from typing import NamedTuple

import torch
from torch._dynamo import maybe_mark_dynamic

from flatgpt.products import FewQueries
from ops import InPieces, visible


class PoolLayer(NamedTuple):
    """Hold k and v of one layer, (rows, G, S, D), and the places (N,) of new tokens."""

    k: torch.Tensor
    v: torch.Tensor
    rows: torch.Tensor
    slots: torch.Tensor

    def update(self, k, v):
        """Write the new tokens' (1, G, N, D) or (N, G, 1, D); -> those of all rows."""
        for whole, new in ((self.k, k), (self.v, v)):
            new = new[0].transpose(0, 1) if new.size(0) == 1 else new[:, :, 0]  # (N, G, D)
            whole[self.rows, :, self.slots] = new.to(whole.dtype)
        return self.k, self.v


class Pool:
    """Hold n_rows sequences of up to `context` tokens.

    ids: for each row, the ids whose keys and values it holds. Memory: bytes_of() a row.
    """

    def __init__(self, config, n_rows, context, device=None, dtype=None):
        shape = config.n_layer, n_rows, config.kv_heads, context, config.head_size
        self.k, self.v = torch.zeros(2, *shape, device=device, dtype=dtype)
        self.ids = [[] for _ in range(n_rows)]

    def pieces(self, counts):
        """Return the cache for model.hidden() of counts[row] new tokens of each row."""
        return Pieces(self, counts)

    def first_rows(self, n):
        """Return the cache for model() of one new token of each of the first n rows."""
        return FirstRows(self, n)

    def copy(self, source, row, n):
        """Make the first n tokens of `source` the content of a row."""
        if source != row:
            for part in (self.k, self.v):
                part[:, row, :, :n] = part[:, source, :, :n]
        self.ids[row] = self.ids[source][:n]

    def swap(self, a, b):
        """Exchange the contents of two rows."""
        if a == b:
            return
        n = max(len(self.ids[a]), len(self.ids[b]))
        for part in (self.k, self.v):
            part[:, [a, b], :, :n] = part[:, [b, a], :, :n]
        self.ids[a], self.ids[b] = self.ids[b], self.ids[a]


def bytes_of(config, context, dtype):
    """Return the memory of a row of `context` tokens, in bytes."""
    return 2 * config.n_layer * config.kv_heads * config.head_size * context * dtype.itemsize


class Pieces:
    """Be the cache of one forward pass over pieces of rows, see Pool."""

    def __init__(self, pool, counts):
        self.pool, self.spans, rows, slots, start = pool, [], [], [], 0
        for row, n in enumerate(counts):
            if n:
                end = len(pool.ids[row]) + n
                self.spans.append((start, start + n, row, end))
                rows += [row] * n
                slots += range(end - n, end)
                start += n
        # the model adds the number of new tokens, and compares with its context
        self.length = max(end for *_, end in self.spans) - start
        self.rows, self.slots = torch.tensor([rows, slots], device=pool.k.device)
        self.are_few = FewQueries.fits(pool.k, len(self.spans), start)  # of a single row

    def start(self, B, T):
        """Return the positions of the new tokens, (T,)."""
        return self.slots

    def mask(self, T, window):
        """Return the mask for ops.attention()."""
        if self.are_few:
            keys = torch.arange(self.spans[0][-1])
            return FewQueries(visible(self.slots[:, None], keys, window)[None, None])
        return InPieces(window, self.spans)

    def layer(self, layer, T):
        """Return the PoolLayer of a layer."""
        k, v, rows = self.pool.k[layer], self.pool.v[layer], self.rows
        if self.are_few:
            (_, _, row, end), = self.spans
            k, v, rows = k[row, None, :, :end], v[row, None, :, :end], torch.zeros_like(rows)
        return PoolLayer(k, v, rows, self.slots)

    def advance(self, T):
        """Do nothing: the caller adds the ids to pool.ids."""


class FirstRows:
    """Be the cache of one forward pass over a token of each of the first n rows, see Pool.

    The numbers of rows and of slots are dynamic to the compiler, so that one row and several are
    compiled once each.
    """

    def __init__(self, pool, n):
        lengths = [len(ids) for ids in pool.ids[:n]]
        self.pool, self.length = pool, max(lengths)
        self.slots = torch.tensor(lengths, device=pool.k.device)
        self.rows = torch.arange(n, device=pool.k.device)

    def start(self, B, T):
        """Return the positions of the new tokens, (B, 1)."""
        return self.slots[:, None]

    def mask(self, T, window):
        """Return the mask of the keys that each row sees, for ops.attention()."""
        slots = torch.arange(self.length + 1, device=self.slots.device)
        seen = visible(self.slots[:, None], slots, window)[:, None, None]
        return FewQueries(seen) if FewQueries.fits(self.pool.k) else dynamic(seen, 0, 3)

    def layer(self, layer, T):
        """Return the PoolLayer of a layer."""
        k, v = (dynamic(part[layer, : len(self.rows), :, : self.length + 1], 0, 2)
                for part in (self.pool.k, self.pool.v))
        return PoolLayer(k, v, dynamic(self.rows, 0), dynamic(self.slots, 0))

    def advance(self, T):
        """Do nothing: the caller adds the ids to pool.ids."""


def dynamic(tensor, *dims):
    """Mark dimensions that differ from call to call for the compiler; -> the tensor."""
    for dim in dims:
        maybe_mark_dynamic(tensor, dim)
    return tensor
