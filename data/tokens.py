"""
Read token files, and draw batches from them.

A dataset is a folder with train.bin and val.bin, headerless arrays of token ids, and meta.json
(see datasets.py). Training batches are a pure function of (seed, tokens seen): a resumed run needs
no loader state, and the number of processes does not change the data.
"""

import errno
import os
from dataclasses import dataclass

import numpy as np
import torch

from configurator import UserError
from data.datasets import prepare_command
from data.shuffle import epoch_places, train_items
from flatgpt.cut import Cut
from flatgpt.parallel import World


class Shards:
    """Index several arrays as one: its length, and the ids at an array of positions."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.ends = np.cumsum([len(array) for array in arrays])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, index):
        shards = np.searchsorted(self.ends, index, side='right')
        ids = np.empty(index.shape, self.arrays[0].dtype)
        for i in np.unique(shards):
            in_shard = shards == i
            ids[in_shard] = self.arrays[i][index[in_shard] - (self.ends[i] - len(self.arrays[i]))]
        return ids


@dataclass
class Rows:
    """Hold conversations packed into rows of `row` tokens: the context and one more.

    mask is 1 where a token carries loss. A window is a row, so no conversation is cut.
    """

    ids: np.ndarray | Shards
    mask: np.ndarray
    row: int

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return self.ids[index]


def row_of(tokens):
    """Return the length of a row of conversations; None for running text."""
    return tokens.row if isinstance(tokens, Rows) else None


def open_tokens(data_dir, split, meta, block_size):
    """Map the ids of a split from disk; -> array, Shards, or Rows of conversations.

    Raises UserError if a file is missing or has another size than in meta.json. Raises it too for a
    split below one window of block_size + 1 tokens, and for rows of another length.
    """
    kind = 'chat' if meta['row'] else 'text'
    again = f'prepare the dataset again: {prepare_command(data_dir, kind)}'

    def mapped(name, dtype, n_tokens):
        path = os.path.join(data_dir, name)
        if not os.path.exists(path):
            raise UserError(f'{path} is missing; {again}')
        size = os.path.getsize(path)
        expected = size - size % dtype.itemsize if n_tokens is None else n_tokens * dtype.itemsize
        if size != expected:
            raise UserError(f'{path} has {size:,} bytes, expected {expected:,}: it is truncated or '
                            f'belongs to another preparation; {again}')
        if not size:  # np.memmap needs a byte
            return np.empty(0, dtype)
        try:
            return np.asarray(np.memmap(path, dtype, mode='r'))  # a plain array indexes faster
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            raise UserError(f'{path}: too many open files; each of the {len(files)} files of the '
                            f'split stays open. Raise the limit, ulimit -n {4 * len(files)}, or '
                            f'prepare the dataset again with larger --shard_tokens') from None

    files = meta['files'][split] if meta['files'] else [[f'{split}.bin', None]]
    arrays = [mapped(name, meta['dtype'], n_tokens) for name, n_tokens in files]
    tokens = arrays[0] if len(arrays) == 1 else Shards(arrays)
    if meta['row']:
        context = meta['row'] - 1
        if block_size != context:
            raise UserError(f'block_size={block_size}: the conversations in {data_dir} are packed '
                            f'for {context} tokens; use --block_size={context}, or prepare them '
                            f'again with --block_size={block_size}')
        mask = mapped(f'{split}_mask.bin', np.dtype(np.uint8), len(tokens))
        return Rows(tokens, mask, meta['row'])
    if len(tokens) <= block_size:
        shorter = f', or --block_size={len(tokens) - 1}' if len(tokens) > 1 else ''
        raise UserError(f'{os.path.join(data_dir, split)}.bin has {len(tokens):,} tokens, fewer '
                        f'than block_size + 1 = {block_size + 1:,}; prepare more text or another '
                        f'--val_fraction{shorter}')
    return tokens


# Windows ------------------------------------------------------------------------------------------


def train_windows(first, n_sequences, n_tokens, block_size, seed):
    """Return the first positions of the next windows, (n_sequences,).

    first: how many windows were drawn before. A window spans block_size + 1 tokens: inputs, and
    targets one further. Each epoch cuts the tokens into windows end to end, at places of its own;
    the first and the last window are moved to the ends, so every token but the first is a target.
    """
    last = n_tokens - 1 - block_size  # where the last window begins
    places, key = epoch_places(first, n_sequences, per_epoch(n_tokens, block_size), seed)
    offsets = (key % np.uint64(block_size)).astype(np.int64)
    return np.clip(places.astype(np.int64) * block_size - offsets, 0, last)


def per_epoch(n_tokens, block_size):
    """Return the number of windows of an epoch, enough for the largest offset."""
    return (n_tokens + block_size - 3) // block_size + 1


def whole_windows(n_tokens, block_size, row=None):
    """Return the first positions of windows with every token as a target once."""
    return np.arange(0, n_tokens - 1, row or block_size)


def even_windows(n_windows, n_tokens, block_size, row=None):
    """Return the first positions of n_windows evenly spaced windows, always the same."""
    last, unit = (n_tokens // row - 1, row) if row else (n_tokens - block_size - 1, 1)
    return np.linspace(0, last, n_windows).astype(np.int64) * unit


def evenly(starts, n_tokens, stride):
    """Return evenly spaced `starts`: n_tokens in windows of `stride`.

    At least one, and all of them if n_tokens is 0 or enough for all. starts: a range or an array.
    """
    n_windows = max(1, n_tokens // stride)
    if not n_tokens or n_windows >= len(starts):
        return starts
    return np.array([starts[i] for i in np.linspace(0, len(starts) - 1, n_windows).astype(int)])


def eval_windows(splits, eval_iters, cut, eval_tokens=0):
    """Return an evaluation's first positions of windows, {'train': ..., 'val': ...}.

    'val': the whole split, or eval_tokens of it, see evenly(); 'train': eval_iters batches, at most
    as many windows as val has.
    """
    row = row_of(splits['train'])
    block_size, batch_size = cut.block_size, cut.batch_size
    val = evenly(whole_windows(len(splits['val']), block_size, row), eval_tokens, block_size)
    n_train = min(eval_iters * batch_size, max(len(val), batch_size))
    return {'train': even_windows(n_train, len(splits['train']), block_size, row), 'val': val}


def share_of(starts, n_tokens, world):
    """Return this process's windows of an evaluation, as many as the others'.

    Windows past the end, which have no targets, fill the parts up: shards are gathered together.
    """
    filled = np.append(starts, np.full(-len(starts) % world.size, n_tokens))
    return filled[world.rank :: world.size]


def draw(tokens, first, n, block_size, seed):
    """Return the first positions of the next n training windows, (n,).

    first: how many were drawn before. tokens may be several datasets, see mixture.Sources.
    """
    if hasattr(tokens, 'draw'):
        return tokens.draw(first, n, block_size, seed)
    if row := row_of(tokens):
        return train_items(first, n, len(tokens) // row, seed) * row
    return train_windows(first, n, len(tokens), block_size, seed)


# From windows to tensors --------------------------------------------------------------------------


def gather(tokens, starts, block_size, vocab_size):
    """Return inputs x and targets y, x shifted by one, int64 (windows, block_size).

    Past the end of the tokens x is 0 and y is -1, which the loss ignores; y is -1 also where the
    mask of Rows is 0. Raises UserError on an id that the model has no embedding for.
    """
    if hasattr(tokens, 'gather'):  # device.DeviceTokens, mixture.Sources
        return tokens.gather(starts, block_size)
    index = np.asarray(starts)[:, None] + np.arange(block_size + 1)
    ids = ids_at(tokens, np.minimum(index, len(tokens) - 1), vocab_size)
    is_outside = index >= len(tokens)
    no_target = is_outside[:, 1:]
    if isinstance(tokens, Rows):
        no_target = no_target | (tokens.mask[np.minimum(index[:, 1:], len(tokens) - 1)] == 0)
    x, y = np.where(is_outside[:, :-1], 0, ids[:, :-1]), np.where(no_target, -1, ids[:, 1:])
    return torch.from_numpy(x), torch.from_numpy(y)


def ids_at(tokens, index, vocab_size):
    """Return the ids at positions, int64. Raises UserError on an unknown one."""
    ids = tokens[index].astype(np.int64)
    if ids.max() >= vocab_size:
        place = np.unravel_index(ids.argmax(), ids.shape)
        raise unknown_id(index[place], ids[place], vocab_size)
    return ids


def count_targets(tokens, starts, block_size):
    """Return the number of targets in the training windows at `starts`."""
    if hasattr(tokens, 'count_targets'):
        return tokens.count_targets(starts, block_size)
    if not isinstance(tokens, Rows):
        return len(starts) * block_size
    return int(tokens.mask[starts[:, None] + np.arange(1, block_size + 1)].sum())


def unknown_id(position, id, vocab_size):
    """Return the error for an id of the data that the model has no embedding for."""
    return UserError(f'token {position:,} of the data has id {id}; expected an id below '
                     f'vocab_size={vocab_size}. The data was prepared with another tokenizer than '
                     f'the model or its meta.json has; prepare it again')


def to_device(batch, device):
    """Move tensors to the device; to a GPU from pinned memory, without waiting."""
    if device.type == 'cuda':
        batch = (t if t.is_cuda else t.pin_memory() for t in batch)
    return tuple(t.to(device, non_blocking=device.type == 'cuda') for t in batch)


# Steps --------------------------------------------------------------------------------------------


@dataclass
class Batches:
    """Draw this process's micro-batches -> ([(x, y, share), ...], n_targets).

    seen: tokens that earlier steps than `step` have drawn. x, y: (batch_size, block_size) on the
    device. share: the part of the step's targets that is in the micro-batch, times the number of
    processes, because DDP averages over them. So the loss of a step is the mean over its targets,
    however they fall on micro-batches and processes.
    """

    tokens: object
    cut: Cut
    seed: int
    n_ids: int
    device: torch.device
    world: World

    def __call__(self, seen, step=0):
        cut, world, first = self.cut, self.world, seen // self.cut.block_size
        n_sequences = cut.tokens_of(step, step + 1) // cut.block_size
        starts = draw(self.tokens, first, n_sequences, cut.block_size, self.seed)
        n_targets = count_targets(self.tokens, starts, cut.block_size)
        parts = starts.reshape(world.size, -1, cut.batch_size)[world.rank]
        micro_batches = []
        for chunk in parts:
            x, y = to_device(gather(self.tokens, chunk, cut.block_size, self.n_ids), self.device)
            n_in_chunk = count_targets(self.tokens, chunk, cut.block_size)
            micro_batches.append((x, y, world.size * n_in_chunk / max(1, n_targets)))
        return micro_batches, n_targets


@torch.no_grad()
def sum_losses(model, tokens, starts, cut, n_ids):
    """Sum the loss over the targets of windows; -> [nats, number of targets].

    More windows than cut.batch_size go through at once while their logits stay below 16 MB. n_ids:
    an id of the data at or above it raises UserError.
    """
    device, block_size = model.lm_head.weight.device, cut.block_size
    n_windows = max(cut.batch_size, 2**22 // (block_size * model.config.vocab_size))
    total, count = torch.zeros((), device=device), torch.zeros((), dtype=torch.long, device=device)
    for i in range(0, len(starts), n_windows):
        batch = gather(tokens, starts[i : i + n_windows], block_size, n_ids)
        x, y = to_device(batch, device)
        n_targets = (y >= 0).sum()
        total += model(x, y, return_logits=False)[1] * n_targets
        count += n_targets
    return [total.item(), count.item()]
