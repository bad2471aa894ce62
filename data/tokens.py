"""
Token files and the batches drawn from them.

A dataset is a folder under data/: train.bin and val.bin, headerless arrays of token ids, and meta.json, which says how
to read them. Splits of more than a shard's size go on in train-00001.bin, ... and read as one array. A folder that
nanoGPT prepared (uint16 files, perhaps meta.pkl) reads the same.

Training batches are a pure function of (seed, step). There is no loader state to save, so a resumed run sees the
batches it would have seen; and the global batch is cut among the processes, so their number does not change the data.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
import numpy as np
import torch
import tokenizer
from configurator import UserError


def load_meta(data_dir):
    """
    -> {'dtype', 'vocab_size', 'tokenizer', 'tokens', 'files', 'row', 'chat_template'} of a dataset; all but dtype are
    None where the folder doesn't say.

    'tokens' is {'train': count, 'val': count}, 'files' {'train': [[name, count], ...], 'val': ...}; 'tokenizer' is what
    tokenizer.from_dict() takes, not built here because training needs none. 'row' and 'chat_template' are those of
    conversations, see Rows. Raises ValueError on a damaged file.
    """
    path = os.path.join(data_dir, 'meta.json')
    if os.path.exists(path):
        try:
            with open(path, encoding='utf-8') as f:
                meta = json.load(f)
            tokens = {split: int(meta['tokens'][split]) for split in ('train', 'val')}
            one_each = {split: [[f'{split}.bin', tokens[split]]] for split in tokens}  # before there were shards
            files = {split: [[os.path.basename(name), int(n)] for name, n in meta.get('files', one_each)[split]]
                     for split in tokens}
            for split in tokens:
                if not files[split] or sum(n for _, n in files[split]) != tokens[split]:
                    raise UserError(f'the files of {split} do not add up to {tokens[split]:,} tokens')
            return {'dtype': np.dtype(meta['dtype']), 'vocab_size': int(meta['vocab_size']),
                    'tokenizer': dict(meta['tokenizer']), 'tokens': tokens, 'files': files,
                    'row': int(meta['row']) if 'row' in meta else None, 'chat_template': meta.get('chat_template')}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f'{path} is damaged ({type(error).__name__}: {error}); '
                             f'prepare the dataset again: {prepare_command(data_dir)}') from error
    meta = {'dtype': np.dtype(np.uint16), 'vocab_size': None, 'tokens': None, 'tokenizer': None, 'files': None,
            'row': None, 'chat_template': None}
    path = os.path.join(data_dir, 'meta.pkl')
    if os.path.exists(path):
        char_tokenizer = tokenizer.from_meta_pkl(path)
        meta['tokenizer'], meta['vocab_size'] = char_tokenizer.to_dict(), char_tokenizer.vocab_size
    return meta


def folder_of(dataset):
    """
    data/<dataset> here, or else beside this file, where prepare.py of a dataset writes; or a path, ./mine or runs/mine.
    """
    if os.path.basename(dataset) != dataset and os.path.isdir(dataset):
        return dataset
    here = os.path.join('data', dataset)
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), dataset)
    return beside if os.path.isdir(beside) and not os.path.isdir(here) else here


def prepare_command(data_dir, kind='text'):
    """The command that makes a dataset anew, of kind 'text' or 'chat'."""
    data_dir = os.path.normpath(data_dir)
    script = os.path.join(data_dir, 'prepare.py')
    if os.path.exists(script):
        return f'python {script}'
    folder, name = os.path.split(data_dir)
    beside = os.path.dirname(os.path.abspath(__file__))
    # with a name it is made beside this file, where folder_of() looks if there is none here
    is_named = os.path.abspath(folder) == beside or folder == 'data' and not os.path.isdir(data_dir)
    where = f'--name={name}' if is_named else shlex.quote(f'--out_dir={data_dir}')
    return f'python data/{kind}/prepare.py --input=FILE {where}'


class Shards:
    """Arrays end to end as one: its length, and the ids at an array of positions, as an array has them."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.ends = np.cumsum([len(array) for array in arrays])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, index):
        shard = np.searchsorted(self.ends, index, side='right')
        ids = np.empty(index.shape, self.arrays[0].dtype)
        for i in np.unique(shard):
            here = shard == i
            ids[here] = self.arrays[i][index[here] - (self.ends[i] - len(self.arrays[i]))]
        return ids


class Rows:
    """
    Conversations packed into rows of `row` tokens, the context and one: ids, and mask, which is 1 for what the
    assistant says. Only there is a target; a window is a row, so that no conversation is cut. See data/chat/prepare.py.
    """

    def __init__(self, ids, mask, row):
        self.ids, self.mask, self.row = ids, mask, row

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return self.ids[index]


def row_of(tokens):
    """Tokens of a row of conversations; None for running text."""
    return tokens.row if isinstance(tokens, Rows) else None


def arrays_of(tokens):
    """The arrays that tokens are made of, end to end."""
    return tokens.arrays if isinstance(tokens, Shards) else [tokens]


def open_tokens(data_dir, split, meta, block_size):
    """
    -> read-only array of the ids of a split ('train' or 'val'), mapped from disk, not read; Shards where it has several
    files, Rows of conversations. Raises ValueError if a file is missing, truncated, other than meta.json says, or all
    of them are too short for one window of block_size tokens and its targets; and if rows are of another length.
    """
    again = f"prepare the dataset again: {prepare_command(data_dir, 'chat' if meta['row'] else 'text')}"

    def mapped(name, dtype, n_tokens):
        path = os.path.join(data_dir, name)
        if not os.path.exists(path):
            raise UserError(f'{path} is missing; {again}')
        size = os.path.getsize(path)
        expected = size - size % dtype.itemsize if n_tokens is None else n_tokens * dtype.itemsize
        if size != expected:
            raise UserError(f'{path} has {size:,} bytes, expected {expected:,}: it is truncated or of another '
                             f'preparation; {again}')
        array = np.memmap(path, dtype, mode='r') if size else np.empty(0, dtype)  # it needs a byte
        return np.asarray(array)  # plain array: np.memmap indexes slower

    arrays = [mapped(name, meta['dtype'], n_tokens)
              for name, n_tokens in (meta['files'][split] if meta['files'] else [[f'{split}.bin', None]])]
    tokens = arrays[0] if len(arrays) == 1 else Shards(arrays)
    if meta['row']:
        if block_size != meta['row'] - 1:
            raise UserError(f'block_size={block_size}, but the conversations in {data_dir} are packed for a context '
                             f'of {meta["row"] - 1} tokens; use --block_size={meta["row"] - 1}, or prepare them again '
                             f'with --block_size={block_size}')
        return Rows(tokens, mapped(f'{split}_mask.bin', np.dtype(np.uint8), len(tokens)), meta['row'])
    if len(tokens) <= block_size:
        shorter = f', or --block_size={len(tokens) - 1}' if len(tokens) > 1 else ''
        raise UserError(f'{os.path.join(data_dir, split)}.bin has {len(tokens):,} tokens, fewer than block_size + 1 = '
                         f'{block_size + 1:,}; prepare more text or another --val_fraction{shorter}')
    return tokens


def prepare_if_missing(data_dir, is_first):
    """
    Run the dataset's prepare.py where its .bin files are missing; under torchrun one process a machine (is_first) does,
    and the others wait. Raises ValueError if there is nothing to run or it fails.
    """
    def is_missing():
        return not all(os.path.exists(os.path.join(data_dir, f'{split}.bin')) for split in ('train', 'val'))

    script = os.path.join(data_dir, 'prepare.py')
    if is_missing() and not os.path.exists(script):
        there = sorted(d for d in os.listdir('data') if os.path.isdir(os.path.join('data', d))) \
            if os.path.isdir('data') else []
        home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        elsewhere = '' if os.path.realpath(home) == os.path.realpath(os.getcwd()) else (
            f' Datasets are looked for in the current folder, {os.getcwd()}; for those beside train.py: cd {home}.')
        raise UserError(f'no dataset in {data_dir}: expected train.bin and val.bin, or a prepare.py that makes them. '
                         f'Datasets here: {", ".join(there) or "none"}.{elsewhere} '
                         f'Your own text: {prepare_command(data_dir)}')
    while is_missing():
        if is_first:
            print(f'{data_dir} is not prepared yet; running: python {script}', flush=True)
            code = subprocess.run([sys.executable, script]).returncode
            if code == 0 and is_missing():
                raise UserError(f'python {script} ended without writing train.bin and val.bin to {data_dir}')
            if code not in (0, 75):  # 75, EX_TEMPFAIL: another machine on this disk is at it
                raise UserError(f'python {script} failed; what it said is above')
        time.sleep(1 if is_missing() else 0)


# Which windows make a batch ------------------------------------------------------------------------------------------


def mix(x, key):
    """Scramble uint64 numbers x under keys of the same type: the finaliser of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over='ignore'):  # arithmetic modulo 2**64 is the point
        x = x + ((key << np.uint64(1)) | np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # an odd multiple each
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def shuffled(i, n, key):
    """
    Places of the indices i in a random order of 0..n-1: a bijection of the range that depends on (n, key) alone.

    i, key: uint64 arrays of one shape, n: int. A Feistel network over the smallest even number of bits that hold n,
    walked again where it leaves the range (Black & Rogaway 2002), so that no permutation of a billion windows is held.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    i, outside = i.copy(), np.ones(len(i), dtype=bool)
    while outside.any():  # the bits hold less than 4 n numbers, so a walk takes less than 4 rounds on average
        left, right = i[outside] >> half, i[outside] & low
        for round in range(4):
            left, right = right, left ^ (mix(right, key[outside] + np.uint64(round)) & low)
        i[outside] = (left << half) | right
        outside = i >= np.uint64(n)
    return i


def train_windows(step, n_sequences, n_tokens, block_size, seed, row=None):
    """
    First positions of the n_sequences windows of the global batch at `step`, shape (n_sequences,).

    Each epoch cuts the tokens into windows end to end, from an offset of its own, and visits them in an order of its
    own, each once. A window spans block_size + 1 tokens: inputs and, one further, targets. row: row_of() the tokens;
    then the windows are the rows.
    """
    index = np.uint64(step) * np.uint64(n_sequences) + np.arange(n_sequences, dtype=np.uint64)
    stride = row or block_size
    per_epoch = n_tokens // row if row else max(1, (n_tokens - block_size) // block_size)
    epoch, place = index // np.uint64(per_epoch), index % np.uint64(per_epoch)
    key = mix(epoch, np.full_like(epoch, seed % 2**64))
    n_offsets = 1 if row else min(block_size, n_tokens - per_epoch * block_size)
    starts = shuffled(place, per_epoch, key) * np.uint64(stride) + key % np.uint64(n_offsets)
    return starts.astype(np.int64)


def even_windows(n_windows, n_tokens, block_size, row=None):
    """First positions of n_windows windows evenly spaced over the tokens: the same at every evaluation."""
    if row:
        return np.linspace(0, n_tokens // row - 1, n_windows).astype(np.int64) * row
    return np.linspace(0, n_tokens - block_size - 1, n_windows).astype(np.int64)


def whole_windows(n_tokens, block_size, row=None):
    """First positions of the windows that cover every token of a split as a target once; the last may be shorter."""
    return np.arange(0, n_tokens - 1, row or block_size)


def sliding_windows(n_tokens, block_size, stride):
    """
    Windows that overlap, to predict a whole text with context: [(start, end, first), ...]. A window has the tokens
    start ... end - 1 and scores those from `first` on.

    Each starts stride (1 to block_size) tokens after the one before and scores what that did not. So every token but
    the text's first is scored once, past the first window with at least block_size - stride tokens before it. A window
    has block_size tokens, as in transformers' recipe; but with stride = block_size one more, the last one's target,
    since nothing else would predict that: these are whole_windows().
    """
    length = block_size + (stride == block_size)
    windows, start, first = [], 0, 1
    while first < n_tokens:
        end = min(start + length, n_tokens)
        windows.append((start, end, first))
        start, first = start + stride, end
    return windows


# From windows to tensors ---------------------------------------------------------------------------------------------


def gather(tokens, starts, block_size, vocab_size):
    """
    -> inputs x and targets y, int64 tensors (len(starts), block_size); y is x shifted by one token.

    Past the end of the tokens x is 0 and y is -1, which the loss ignores, and so is y in Rows where their mask is 0.
    Raises ValueError on an id that the model has no embedding for. DeviceTokens give tensors on their device, and have
    been checked already.
    """
    if isinstance(tokens, DeviceTokens):
        return tokens.gather(starts, block_size)
    index = np.asarray(starts)[:, None] + np.arange(block_size + 1)
    ids = tokens[np.minimum(index, len(tokens) - 1)].astype(np.int64)
    if ids.max() >= vocab_size:
        place = np.unravel_index(ids.argmax(), ids.shape)
        raise unknown_id(index[place], ids[place], vocab_size)
    no_target = index[:, 1:] >= len(tokens)
    if isinstance(tokens, Rows):
        no_target |= (tokens.mask[np.minimum(index[:, 1:], len(tokens) - 1)] == 0)
    x, y = np.where(index[:, :-1] >= len(tokens), 0, ids[:, :-1]), np.where(no_target, -1, ids[:, 1:])
    return torch.from_numpy(x), torch.from_numpy(y)


def count_targets(tokens, starts, block_size):
    """How many targets the training windows at `starts` have: what the loss of a step is a mean over."""
    if not isinstance(tokens, Rows):
        return len(starts) * block_size
    return int(tokens.mask[starts[:, None] + np.arange(1, block_size + 1)].sum())


def unknown_id(position, id, vocab_size):
    """The error about an id of the data that the model has no embedding for."""
    return UserError(f'token {position:,} of the data has id {id}, but vocab_size is {vocab_size}: the data was '
                      f'prepared with another tokenizer than the model has or than its meta.json says; prepare it '
                      f'again')


def to_device(batch, device):
    """Tensors, such as (x, y), on the device; to a GPU from pinned memory, so that the CPU need not wait for it."""
    if device.type == 'cuda':
        return tuple(t if t.is_cuda else t.pin_memory().to(device, non_blocking=True) for t in batch)
    return tuple(t.to(device) for t in batch)


def fits_on(device, splits):
    """
    Whether DeviceTokens of all these tokens are worth it: on a GPU, if they take less than a tenth of the memory that
    is free there and less than a gigabyte, which would take seconds to read before the first step.
    """
    if device.type != 'cuda' or any(isinstance(tokens, Rows) for tokens in splits):  # whose masks it does not have
        return False
    arrays = [array for tokens in splits for array in arrays_of(tokens)]
    if any(array.dtype not in (np.uint16, np.uint32) for array in arrays):
        return False
    return sum(array.nbytes for array in arrays) < min(2**30, torch.cuda.mem_get_info(device)[0] / 10)


class DeviceTokens:
    """
    The tokens of a split in the memory of a device, which cuts the windows out of them itself. The CPU only says where
    they start, so that it keeps ahead of a GPU that takes a step in a few milliseconds.
    """

    def __init__(self, tokens, device, vocab_size):
        """Raises ValueError on an id that the model has no embedding for, as gather() does."""
        arrays = arrays_of(tokens)
        bits = 8 * arrays[0].itemsize
        self.mask = 2**bits - 1
        # torch can do next to nothing with unsigned numbers, so their bits are kept as signed ones
        self.ids = torch.empty(len(tokens), dtype={16: torch.int16, 32: torch.int32}[bits], device=device)
        position, at_once = 0, 2**24
        for piece in (array[i : i + at_once] for array in arrays for i in range(0, len(array), at_once)):
            if piece.max() >= vocab_size:
                raise unknown_id(position + piece.argmax(), piece.max(), vocab_size)
            self.ids[position : position + len(piece)] = torch.from_numpy(piece.astype(f'int{bits}'))
            position += len(piece)

    def __len__(self):
        return len(self.ids)

    def gather(self, starts, block_size):
        """gather(), on the device."""
        starts, = to_device((torch.from_numpy(starts),), self.ids.device)
        index = starts[:, None] + torch.arange(block_size + 1, device=starts.device)
        ids = self.ids[index.clamp(max=len(self) - 1)].long() & self.mask
        beyond = index >= len(self)
        return ids[:, :-1].masked_fill(beyond[:, :-1], 0), ids[:, 1:].masked_fill(beyond[:, 1:], -1)


# Steps --------------------------------------------------------------------------------------------


@dataclass
class Cut:
    """
    How the tokens of a step are cut: sequences -> processes -> micro-batches.

    tokens, sequences: of a step, over all processes; micro_steps: per process; smaller: the next
    smaller batch_size that divides the step, 0 if there is none.
    """

    tokens: int
    sequences: int
    micro_steps: int
    batch_size: int
    block_size: int
    smaller: int


def cut_step(config, block_size, n_processes):
    """
    Cut a step into micro-batches; -> Cut.

    config: total_batch_size in tokens, or else nanoGPT's gradient_accumulation_steps * batch_size
    * block_size; batch_size. Raises UserError naming a setting that divides evenly.
    """
    tokens = config['total_batch_size'] or (
        config['gradient_accumulation_steps'] * config['batch_size'] * block_size)
    unit = block_size * n_processes
    if tokens % unit:
        raise UserError(f'a step of {tokens:,} tokens is not a whole number of sequences of {block_size} tokens for '
                        f'each of {n_processes} processes; try --total_batch_size={max(1, tokens // unit) * unit}')
    per_process = tokens // unit
    batch_size = min(config['batch_size'], per_process)
    smaller = max((b for b in range(1, batch_size) if per_process % b == 0), default=0)
    if per_process % batch_size:
        raise UserError(f'{per_process} sequences per step and process are not a whole number of micro-batches of '
                        f'batch_size={batch_size}; try --batch_size={smaller}, which keeps the mathematics')
    return Cut(tokens, tokens // block_size, per_process // batch_size, batch_size, block_size, smaller)


@dataclass
class Batches:
    """
    The micro-batches of this process, a function of the step: batches(step) -> (list, n_targets).

    A micro-batch is (x, y, share): x and y (batch_size, block_size) on the device; share: the part of the step's
    n_targets that is in it, times the number of processes, since DDP averages over them. So the loss of a step is the
    mean over its targets, however they fall on micro-batches and processes.
    """

    tokens: object
    cut: Cut
    seed: int
    n_ids: int
    device: torch.device
    world: object

    def __call__(self, step):
        cut, world = self.cut, self.world
        starts = train_windows(step, cut.sequences, len(self.tokens), cut.block_size, self.seed, row_of(self.tokens))
        n_targets = count_targets(self.tokens, starts, cut.block_size)
        ours = starts.reshape(world.size, cut.micro_steps, cut.batch_size)[world.rank]
        micro_batches = []
        for chunk in ours:
            x, y = to_device(gather(self.tokens, chunk, cut.block_size, self.n_ids), self.device)
            share = count_targets(self.tokens, chunk, cut.block_size) / max(1, n_targets)
            micro_batches.append((x, y, world.size * share))
        return micro_batches, n_targets


def open_splits(data_dir, meta, block_size, device, n_ids):
    """Open both splits; -> {'train': tokens, 'val': tokens}, on the device if they fit there."""
    splits = {split: open_tokens(data_dir, split, meta, block_size) for split in ('train', 'val')}
    if fits_on(device, splits.values()):
        splits = {split: DeviceTokens(tokens, device, n_ids) for split, tokens in splits.items()}
    return splits


def eval_windows(splits, eval_iters, batch_size, block_size):
    """
    Return the first positions of the windows of an evaluation, {'train': ..., 'val': ...}.

    'val': the whole split; 'train': eval_iters batches, or as many windows as val has if that is less.
    """
    row = row_of(splits['train'])
    val = whole_windows(len(splits['val']), block_size, row)
    n_train = min(eval_iters * batch_size, max(len(val), batch_size))
    return {'train': even_windows(n_train, len(splits['train']), block_size, row), 'val': val}


@torch.no_grad()
def loss_sum(model, tokens, starts, block_size, batch_size):
    """
    Sum the loss over the targets of windows; -> [nats, number of targets].

    More than batch_size windows go through the model at once while their logits stay below 16 MB.
    """
    config, device = model.config, model.lm_head.weight.device
    n_windows = max(batch_size, 2**22 // (block_size * config.vocab_size))
    total, count = torch.zeros((), device=device), torch.zeros((), dtype=torch.long, device=device)
    for i in range(0, len(starts), n_windows):
        x, y = to_device(gather(tokens, starts[i : i + n_windows], block_size, config.vocab_size), device)
        n_targets = (y >= 0).sum()
        total += model(x, y, return_logits=False)[1] * n_targets
        count += n_targets
    return [total.item(), count.item()]
