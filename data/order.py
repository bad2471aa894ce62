"""
Order documents anew every epoch, align rows with them, or mark them for a mask.

    ends = document_ends(folder, 'train', tokens, eot)  # the last position of each document
    Shuffled(tokens, ends, n_ids)    # windows of documents in an order of the epoch
    Aligned(tokens, ends, n_ids, T)  # rows of T + 1 tokens that begin at a document
    Marked(tokens, ends, n_ids)      # ids that carry the number of their document

All are drawn from like token files (data/tokens.py): which tokens a window has is a function of
(seed, number of the window).
"""

import os
import re

import numpy as np
import torch

from configurator import UserError
from data.conversations import pack
from data.shuffle import mix
from data.tokens import Shards, gather, ids_at, per_epoch, train_items, train_windows
from ops import DOCUMENT

SCANNED = 2**24  # tokens that are compared at once
STARTS = 44  # bits of a window's start; an epoch's number comes above


def document_ends(folder, split, tokens, eot):
    """Return the last position of each document, int64.

    From the lengths that prepare wrote; in older folders, and nanoGPT's, from the id that ends
    documents, which may be None. Raises UserError if neither is there.
    """
    names = sorted((name for name in os.listdir(folder)
                    if re.fullmatch(rf'{split}_documents(-\d{{5}})?\.bin', name)),
                   key=lambda name: (len(name), name))  # the first shard has no number
    if names:
        lengths = np.concatenate([np.fromfile(os.path.join(folder, name), '<u4')
                                  for name in names]).astype(np.int64)
        if lengths.sum() != len(tokens) or not lengths.all():
            raise UserError(f'{os.path.join(folder, names[0])} has documents of '
                            f'{lengths.sum():,} tokens, expected {len(tokens):,} as in '
                            f'{split}.bin; prepare the dataset again')
        return np.cumsum(lengths) - 1
    ends, first = [], 0
    for array in tokens.arrays if isinstance(tokens, Shards) else [tokens]:
        for i in range(0, len(array) if eot is not None else 0, SCANNED):
            ends.append(np.flatnonzero(array[i : i + SCANNED] == eot) + first + i)
        first += len(array)
    ends = np.concatenate(ends or [np.empty(0)]).astype(np.int64)
    if not len(ends):
        raise UserError(f'{folder} does not say where its documents end: expected '
                        f'{split}_documents.bin, which prepare writes for a folder or a table of '
                        f'texts; prepare it again, or use --documents=flat')
    return ends if ends[-1] == first - 1 else np.append(ends, first - 1)


class Marked:
    """Give each id the number of its document, in the bits above DOCUMENT."""

    def __init__(self, tokens, ends, n_ids):
        self.tokens, self.ends, self.n_ids = tokens, ends, n_ids

    def __len__(self):
        return len(self.tokens)

    def gather(self, starts, block_size):
        """Return inputs with numbers, and targets without, (windows, block_size)."""
        x, y = gather(self.tokens, starts, block_size, self.n_ids)
        places = np.asarray(starts)[:, None] + np.arange(block_size)
        return x | torch.from_numpy(np.searchsorted(self.ends, places)) << DOCUMENT, y


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
