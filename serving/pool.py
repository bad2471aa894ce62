"""
Keep the keys and values of many sequences in one pool of rows.

    pool = Pool(model.config, n_rows=8, context=1024)
    x = model.hidden(ids, cache=pool.batch([(0, 5), (3, 1)]))  # 5 tokens of row 0, 1 of row 3

The tokens of a batch stand side by side, ids (1, N), so that the linear layers read each weight
once for all ("Orca", Yu et al. 2022). Attention runs for each row on its own. So a sequence's
result does not depend on the others, and any row may join or leave between two batches.
"""

from typing import NamedTuple

import torch

from ops import InPieces


class PoolLayer(NamedTuple):
    """Hold k and v of one layer, (rows, G, S, D), and the places (N,) of new tokens."""

    k: torch.Tensor
    v: torch.Tensor
    rows: torch.Tensor
    slots: torch.Tensor

    def update(self, k, v):
        """Write the new tokens' (1, G, N, D); -> those of all rows, (rows, G, S, D)."""
        for whole, new in ((self.k, k), (self.v, v)):
            whole[self.rows, :, self.slots] = new[0].transpose(0, 1).to(whole.dtype)
        return self.k, self.v


class Pool:
    """Hold n_rows sequences of up to `context` tokens.

    ids: for each row, the ids whose keys and values it holds. Memory: bytes_of() a row.
    """

    def __init__(self, config, n_rows, context, device=None, dtype=None):
        shape = config.n_layer, n_rows, config.kv_heads, context, config.head_size
        self.k, self.v = torch.zeros(2, *shape, device=device, dtype=dtype)
        self.context, self.ids = context, [[] for _ in range(n_rows)]

    def batch(self, counts):
        """Return the cache for model.hidden() of new tokens. counts: (row, n tokens) each."""
        return Batch(self, counts)

    def copy(self, source, row, n):
        """Make the first n tokens of `source` the content of a row."""
        if source != row:
            for part in (self.k, self.v):
                part[:, row, :, :n] = part[:, source, :, :n]
        self.ids[row] = self.ids[source][:n]


def bytes_of(config, context, dtype):
    """Return the memory of a row of `context` tokens, in bytes."""
    return 2 * config.n_layer * config.kv_heads * config.head_size * context * dtype.itemsize


class Batch:
    """Be the cache of one forward pass over new tokens of several rows, see Pool."""

    def __init__(self, pool, counts):
        self.pool, self.pieces, rows, slots, start = pool, [], [], [], 0
        for row, n in counts:
            end = len(pool.ids[row]) + n
            self.pieces.append((start, start + n, row, end))
            rows += [row] * n
            slots += range(end - n, end)
            start += n
        # the model adds the number of new tokens, and compares with its context
        self.length = max(end for *_, end in self.pieces) - start
        self.rows, self.slots = torch.tensor([rows, slots], device=pool.k.device)

    def start(self, B, T):
        """Return the positions of the new tokens, (T,)."""
        return self.slots

    def mask(self, T, window):
        """Return the mask for ops.attention()."""
        return InPieces(window, self.pieces)

    def layer(self, layer, T):
        """Return the PoolLayer of a layer."""
        return PoolLayer(self.pool.k[layer], self.pool.v[layer], self.rows, self.slots)

    def advance(self, T):
        """Do nothing: the caller knows the ids, and adds them to pool.ids."""
