"""
Order documents for training: in a new order every epoch, or one at the start of each row.

    ends = document_ends(tokens, eot)   # the last position of each document
    Shuffled(tokens, ends, n_ids)       # draw() and gather() windows of an epoch's order
    Aligned(tokens, ends, n_ids, T)     # rows of T + 1 tokens that begin at a document

Both are drawn from like token files (data/tokens.py): which tokens a window has is a function of
(seed, number of the window).
"""

import numpy as np
import torch

from configurator import UserError
from data.conversations import pack
from data.shuffle import mix
from data.tokens import Shards, ids_at, per_epoch, train_items, train_windows

SCANNED = 2**24  # tokens that are compared at once
STARTS = 44  # bits of a window's start; an epoch's number comes above


def document_ends(tokens, eot, folder):
    """Return the positions of the id that ends documents, int64. Raises UserError without any."""
    arrays = tokens.arrays if isinstance(tokens, Shards) else [tokens]
    ends, first = [], 0
    for array in arrays:
        for i in range(0, len(array), SCANNED):
            ends.append(np.flatnonzero(array[i : i + SCANNED] == eot) + first + i)
        first += len(array)
    ends = np.concatenate(ends)
    if not len(ends):
        raise UserError(f'{folder} has no document that ends with the id {eot}: it is one running '
                        f'text; prepare a folder of texts, or use --documents=flat')
    if ends[-1] < first - 1:
        ends = np.append(ends, first - 1)
    return ends.astype(np.int64)


class Shuffled:
    """Pack documents end to end, in a new order every epoch."""

    def __init__(self, tokens, ends, n_ids):
        self.tokens, self.ends, self.n_ids = tokens, ends, n_ids
        self.starts = np.concatenate(([0], ends[:-1] + 1))
        self.orders = {}  # of the last epochs: documents in order, and their ends in the stream

    def __len__(self):
        return len(self.tokens)

    def draw(self, first, n, block_size, seed):
        """Return the codes of the next n windows, (n,): epoch and start in its stream."""
        self.seed = seed
        starts = train_windows(first, n, len(self), block_size, seed)
        epochs = (first + np.arange(n)) // per_epoch(len(self), block_size)
        return epochs << STARTS | starts

    def order(self, epoch):
        """Return an epoch's documents in order, and where each ends in the stream."""
        if epoch not in self.orders:
            key = mix(np.uint64([epoch]), np.uint64([self.seed % 2**64]))
            keys = mix(np.arange(len(self.ends), dtype=np.uint64), key)
            documents = np.argsort(keys, kind='stable')
            lengths = self.ends - self.starts + 1
            self.orders = {**dict(list(self.orders.items())[-1:]),
                           epoch: (documents, np.cumsum(lengths[documents]))}
        return self.orders[epoch]

    def gather(self, codes, block_size):
        """Return inputs and targets, (windows, block_size)."""
        ids = np.empty((len(codes), block_size + 1), np.int64)
        epochs, starts = codes >> STARTS, codes & (1 << STARTS) - 1
        for epoch in np.unique(epochs):
            rows = np.flatnonzero(epochs == epoch)
            documents, stream_ends = self.order(int(epoch))
            places = starts[rows, None] + np.arange(block_size + 1)
            numbers = np.searchsorted(stream_ends, places, side='right')
            index = self.ends[documents[numbers]] - (stream_ends[numbers] - 1 - places)
            ids[rows] = ids_at(self.tokens, index, self.n_ids)
        return torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())

    def count_targets(self, codes, block_size):
        """Return the number of targets in windows."""
        return len(codes) * block_size


class Aligned:
    """Pack documents into rows that begin with one, the best fit first.

    A document longer than a row loses its end, see lost. Rows are drawn in shuffled epochs.
    """

    def __init__(self, tokens, ends, n_ids, block_size):
        self.tokens, self.n_ids, row = tokens, n_ids, block_size + 1
        starts = np.concatenate(([0], ends[:-1] + 1))
        lengths = np.minimum(ends - starts + 1, row)
        rows = pack(lengths.tolist(), row)
        self.members = [(starts[members], lengths[members]) for members in map(sorted, rows)]
        self.lost = 1 - int(lengths.sum()) / len(tokens)  # share of the tokens

    def __len__(self):
        return len(self.tokens)

    def draw(self, first, n, block_size, seed):
        """Return the numbers of the next n rows, (n,)."""
        return train_items(first, n, len(self.members), seed)

    def gather(self, rows, block_size):
        """Return inputs and targets, (rows, block_size); past a row's end 0 and -1."""
        x = np.zeros((len(rows), block_size), np.int64)
        y = np.full((len(rows), block_size), -1)
        for i, row in enumerate(rows):
            index = np.concatenate([start + np.arange(n) for start, n in zip(*self.members[row],
                                                                            strict=True)])
            ids = ids_at(self.tokens, index, self.n_ids)
            n = min(len(ids), block_size)
            x[i, :n], y[i, : len(ids) - 1] = ids[:n], ids[1:]
        return torch.from_numpy(x), torch.from_numpy(y)

    def count_targets(self, rows, block_size):
        """Return the number of targets in rows."""
        return sum(int(self.members[row][1].sum()) - 1 for row in rows)
