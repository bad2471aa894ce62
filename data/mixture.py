"""
Mix datasets by share, as a function of the sequence's number.

    shares = parse('web:0.7,code:0.2,books:0.1')  # {'web': 0.7, ...}; a plain name: {name: 1.0}
    mixture = Mixture(shares, sequences=512)
    mixture.sources(first, n)                     # (n,), the number of each sequence's dataset

A pattern of 100 steps repeats, so the shares of any 100 steps are exact to one sequence. In it
each dataset's sequences lie evenly. Each dataset is visited in shuffled epochs of its own.
"""

import hashlib
import math
import os
import re
from dataclasses import dataclass, field

import numpy as np
import torch

import tokenizer
from configurator import UserError
from data import datasets, order
from data.device import open_splits
from data.tokens import (
    count_targets,
    draw,
    eval_windows,
    gather,
    open_tokens,
    share_of,
    sum_losses,
)
from flatgpt import huggingface, pretrained
from flatgpt.cut import cut_step

STEPS = 100  # of the pattern
BLOCK = 4096  # windows that are drawn at once
SOURCE = 57  # bits of a window in its source; the source's number comes above
# dropout='auto': {passes over the text: dropout} (bench/results/2026-12-01-learning.md)
DROPOUT = {3: 0.0, 10: 0.1, 30: 0.2, 90: 0.3}
MOST_EPOCHS = 4  # more repeat a text too often ("Scaling Data-Constrained ...", Muennighoff 2023)


def parse(dataset):
    """Return {name or path: share of the sequences}, the shares together 1.

    A plain name, or a path that exists, has share 1. Raises UserError for a share that is no
    number or negative, for shares that are all 0, and for a name given twice.
    """
    is_mixture = ',' in dataset or re.fullmatch(r'.+:[^/\\]*', dataset)
    if not is_mixture or any(map(os.path.exists, (dataset, datasets.folder_of(dataset)))):
        return {dataset: 1.0}
    shares = {}
    for part in dataset.split(','):
        name, _, share = part.strip().rpartition(':')
        try:
            shares[name], is_twice = float(share), name in shares
        except ValueError:
            name = ''
        if not name:
            raise UserError(f'dataset={dataset!r}: {part.strip()!r} has no share; expected '
                            f'NAME:SHARE, as in web:0.7,code:0.3')
        if is_twice:
            raise UserError(f'dataset={dataset!r} names {name} twice; expected each dataset once')
        if not 0 <= shares[name] < math.inf:
            raise UserError(f'dataset={dataset!r}: the share of {name} is {share}; expected 0 or '
                            f'more')
    total = sum(shares.values())
    if not total:
        raise UserError(f'dataset={dataset!r}: all shares are 0; expected one above 0')
    return {name: share / total for name, share in shares.items() if share}


def apportion(shares, n):
    """Divide n seats by the method of largest remainders; -> counts, (len(shares),)."""
    quotas = np.array(shares) * n
    counts = np.floor(quotas).astype(np.int64)
    order = np.argsort(counts - quotas, kind='stable')  # the largest remainder first
    counts[order[: n - counts.sum()]] += 1
    return counts


class Mixture:
    """Assign sequences to sources.

    sequences: of a step. Raises UserError for a share that gets none in STEPS steps.
    """

    def __init__(self, shares, sequences):
        self.period = STEPS * sequences
        self.counts = apportion(shares, self.period)
        for share, count in zip(shares, self.counts, strict=True):
            if share > 0 and count == 0:
                raise UserError(f'dataset: a share of {share:.3g} has no sequence in {STEPS} steps '
                                f'of {sequences}; expected at least {1 / self.period:.2g}')
        # the k-th of c sequences is at (k + 1/2) / c of the pattern, or the next free place
        places = np.concatenate([(np.arange(c) + 0.5) / c for c in self.counts])
        owners = np.repeat(np.arange(len(shares)), self.counts)
        self.pattern = owners[np.argsort(places, kind='stable')]
        before = np.cumsum(self.pattern[:, None] == np.arange(len(shares)), axis=0)
        self.before = np.concatenate([np.zeros_like(before[:1]), before])  # (period + 1, sources)

    def sources(self, first, n):
        """Return the source of each of n sequences, (n,)."""
        return self.pattern[(first + np.arange(n)) % self.period]

    def drawn(self, n):
        """Return how many of the first n sequences are of each source."""
        return n // self.period * self.counts + self.before[n % self.period]


@dataclass
class Annealed:
    """Assign sequences by one Mixture, and from sequence `start` on by another."""

    early: Mixture
    late: Mixture
    start: int

    def sources(self, first, n):
        """Return the source of each of n sequences, (n,)."""
        n_early = min(n, max(0, self.start - first))
        return np.concatenate((self.early.sources(first, n_early), self.late.sources(
            max(0, first - self.start), n - n_early)))

    def drawn(self, n):
        """Return how many of the first n sequences are of each source."""
        return self.early.drawn(min(n, self.start)) + self.late.drawn(max(0, n - self.start))


@dataclass
class Sources:
    """Draw the windows of several datasets by a Mixture."""

    tokens: list
    digests: list  # of the texts: each has an order of its own
    mixture: Mixture | Annealed
    offsets: np.ndarray  # (sources,), see Data.open()
    n_ids: int  # see tokens.gather()
    origin: int = 0  # the sequence at which the run began: offsets hold from there
    blocks: dict = field(default_factory=dict)  # the last two: a step is a fraction of one

    def draw(self, first, n, block_size, seed):
        """Return the next n windows, (n,): their sources, and their first positions there."""
        first -= self.origin
        parts, numbers = [], range(first // BLOCK, (first + n - 1) // BLOCK + 1)
        for number in numbers:
            if number not in self.blocks:
                kept = dict(list(self.blocks.items())[-1:])
                windows = self.draw_block(self.origin + number * BLOCK, BLOCK, block_size, seed)
                self.blocks = {**kept, number: windows}
            parts.append(self.blocks[number])
        start = first - numbers[0] * BLOCK
        return np.concatenate(parts)[start : start + n]

    def draw_block(self, first, n, block_size, seed):
        """Return draw()'s windows, computed at once for many steps."""
        sources = self.mixture.sources(first, n)
        before = self.mixture.drawn(first) + self.offsets
        starts = np.empty(n, np.int64)
        for i, (digest, tokens) in enumerate(zip(self.digests, self.tokens, strict=True)):
            chosen = np.flatnonzero(sources == i)
            own_seed = seed ^ int(digest[:15], 16)
            starts[chosen] = i << SOURCE | draw(tokens, int(before[i]), len(chosen), block_size,
                                                own_seed)
        return starts

    def split(self, starts):
        """Yield (places in starts, tokens, first positions there) of each source."""
        sources = starts >> SOURCE
        for i in np.unique(sources):
            places = np.flatnonzero(sources == i)
            yield places, self.tokens[i], starts[places] & (1 << SOURCE) - 1

    def gather(self, starts, block_size):
        """Return tokens.gather()'s x and y, (windows, block_size)."""
        order, parts = [], []
        for places, tokens, own_starts in self.split(starts):
            order.append(places)
            parts.append(gather(tokens, own_starts, block_size, self.n_ids))
        # small datasets may be on a GPU, large ones are not
        device = next((x.device for x, _ in parts if x.is_cuda), torch.device('cpu'))
        back = torch.from_numpy(np.argsort(np.concatenate(order))).to(device)
        return tuple(torch.cat([part.to(device) for part in column])[back]
                     for column in zip(*parts, strict=True))

    def count_targets(self, starts, block_size):
        """Return the number of targets in windows."""
        return sum(count_targets(tokens, own_starts, block_size)
                   for _, tokens, own_starts in self.split(starts))


# Of a run -----------------------------------------------------------------------------------------


class Data:
    """Hold the datasets of a run: {name: share}, folders, and their common meta.

    config: train.py's dataset, anneal_dataset, anneal_fraction and documents. Raises UserError for
    them.
    """

    def __init__(self, config):
        self.shares = parse(config['dataset'])
        self.late = parse(config['anneal_dataset']) if config['anneal_dataset'] else {}
        self.fraction, self.documents = config['anneal_fraction'], config['documents']
        if self.late and not config['decay_lr']:
            raise UserError('anneal_dataset takes over where the learning rate decays, but '
                            'decay_lr=False; leave one out')
        self.names = list({**self.shares, **self.late})
        self.folders = {name: datasets.folder_of(name) for name in self.names}
        self.path = next(iter(self.folders.values()))  # the first: for errors and --plan

    def prepare(self, is_first):
        """Prepare what is missing -> the common meta, see datasets.load_meta()."""
        for folder in self.folders.values():
            datasets.prepare_if_missing(folder, is_first)
        self.metas = {name: datasets.load_meta(folder) for name, folder in self.folders.items()}
        self.stamps = {path: stamp for folder in self.folders.values()
                       for path, stamp in datasets.stamps_of(folder).items()}
        self.meta = {}
        for name, meta in self.metas.items():
            self.add(name, meta)
        # the order in which the names are given changes nothing
        self.names.sort(key=lambda name: self.metas[name]['digest'])
        for name, after in zip(self.names, self.names[1:], strict=False):
            if self.metas[name]['digest'] == self.metas[after]['digest']:
                raise UserError(f'{name} and {after} hold the same text; expected each dataset '
                                f'once')
        if len(self.names) > 1:
            facts = [(self.metas[name]['digest'], self.shares.get(name), self.late.get(name))
                     for name in self.names]
            self.meta['digest'] = hashlib.sha256(repr(facts).encode()).hexdigest()
        return self.meta

    def add(self, name, meta):
        """Add a dataset's meta to the common one. Raises UserError if they differ."""
        if len(self.names) > 1:  # nanoGPT's folders without a meta.pkl have GPT-2's tokens
            meta = {**meta, 'tokenizer': meta['tokenizer'] or pretrained.GPT2_TOKENIZER}
        for key, value in meta.items():
            other = self.meta.get(key)
            if value is None or other is None:
                self.meta[key] = other if value is None else value
            elif key in ('row', 'chat_template') and value != other or (
                    key == 'tokenizer' and not huggingface.same_tokenizer(value, other)):
                raise UserError(f'{name} has another {key} than {self.names[0]}: expected equal '
                                f'ones; prepare both alike')

    def choose_dropout(self, config, world):
        """Return train.py's dropout; for 'auto' by the passes over the text.

        The dataset that is read most often decides.
        """
        if config['dropout'] != 'auto':
            return config['dropout']
        cut = cut_step(config, config['block_size'], world.size)
        n_tokens = cut.tokens_of(0, config['max_iters'])
        passes = max(share * n_tokens / datasets.train_tokens(self.folders[name], self.metas[name])
                     for name, share in self.shares.items())
        log_passes = math.log(max(passes, 1e-9))  # max_iters=0 passes no text
        dropout = np.interp(log_passes, np.log(list(DROPOUT)), list(DROPOUT.values()))
        dropout = round(float(dropout), 3)
        world.print(f'dropout {dropout}: the run passes {passes:.1f} times over its text')
        return dropout

    def open(self, cut, device, vocab_size, state):
        """Open the token files -> the training tokens.

        vocab_size: of the model. state: of the checkpoint that the run resumes, or {}. With other
        settings than before, each dataset and the last steps' datasets go on at the place where
        they were.
        """
        n_ids = min(self.meta['vocab_size'] or math.inf, vocab_size)  # ids of the data are below
        self.splits = {name: open_splits(self.folders[name], self.metas[name], cut.block_size,
                                         device, n_ids) for name in self.names}
        self.n_ids, self.lost = n_ids, {}  # lost: shares of tokens with documents='bos'
        early, late = (Mixture([shares.get(name, 0.0) for name in self.names], cut.sequences)
                       if shares else None for shares in (self.shares, self.late))
        # sequences until the datasets of the last steps take over
        step, before = state.get('iter_num', 0), state.get('mixture', {'drawn': {}})
        first = (state.get('seen') or step * cut.tokens) // cut.block_size
        start_step = cut.stages.end - round(self.fraction * cut.stages.end)
        self.start = first + cut.tokens_of(step, start_step) // cut.block_size
        is_other = cut.tokens_of(0, step) != first * cut.block_size  # another batch or schedule
        if is_other or start_step < step:
            was_reached = before.get('anneal_start', self.start) <= first
            self.start = before.get('anneal_start', first) if was_reached else max(first,
                                                                                   self.start)
        self.mixture = Annealed(early, late, self.start) if late else early
        drawn = self.mixture.drawn(first)
        self.offsets = np.array([before['drawn'].get(self.metas[name]['digest'], n) - n
                                 for name, n in zip(self.names, drawn.tolist(), strict=True)])
        tokens = [self.ordered(name, cut.block_size) for name in self.names]
        if len(tokens) == 1:
            return tokens[0]
        digests = [self.metas[name]['digest'] for name in self.names]
        return Sources(tokens, digests, self.mixture, self.offsets, n_ids, first)

    def state(self, cut, seen):
        """Return an entry of the checkpoint, {} for a single dataset."""
        if len(self.names) == 1:
            return {}
        drawn = self.mixture.drawn(seen // cut.block_size) + self.offsets
        digests = [self.metas[name]['digest'] for name in self.names]
        return {'mixture': {'anneal_start': max(0, self.start),
                            'drawn': dict(zip(digests, drawn.tolist(), strict=True))}}

    def ordered(self, name, block_size):
        """Return a dataset's training tokens by the setting documents.

        'mask' marks the tokens of val too.
        """
        if self.documents == 'flat':
            return self.splits[name]['train']
        if self.meta['row']:
            raise UserError(f'documents={self.documents!r}: conversations are packed in rows; '
                            f'expected documents=flat')
        described = self.meta['tokenizer']
        eot = tokenizer.from_dict(described).eot if described else 50256  # GPT-2's
        texts = {}
        for split in ('train', 'val'):  # in memory of the CPU, which finds the documents
            tokens = open_tokens(self.folders[name], split, self.metas[name], block_size)
            texts[split] = tokens, order.document_ends(self.folders[name], split, tokens, eot)
        if self.documents == 'mask':
            self.splits[name] = {split: order.Marked(*text, self.n_ids)
                                 for split, text in texts.items()}
            return self.splits[name]['train']
        if self.documents == 'shuffle':
            return order.Shuffled(*texts['train'], self.n_ids)
        rows = order.Aligned(*texts['train'], self.n_ids, block_size)
        self.lost[name] = rows.lost
        return rows

    def windows(self, eval_iters, cut, eval_tokens):
        """Return [(split, name, tokens, first positions)], see tokens.eval_windows()."""
        return [(split, name, self.splits[name][split], starts) for name in self.names
                for split, starts in eval_windows(self.splits[name], eval_iters, cut,
                                                  eval_tokens).items()]

    @torch.no_grad()
    def evaluate(self, model, windows, cut, autocast, world):
        """Return the mean losses in nats per token, {'train': {dataset: ...}, 'val': ...}.

        windows: windows(). The processes share the work. Dropout is off, nothing is compiled.
        """
        model.eval()
        losses = {'train': {}, 'val': {}}
        for split, name, tokens, starts in windows:
            with autocast, torch.compiler.set_stance('force_eager'):
                starts = share_of(starts, len(tokens), world)
                totals = sum_losses(model, tokens, starts, cut, self.n_ids)
            loss, count = world.sum(totals)
            if split == 'val' and not count:
                raise UserError(f'{self.folders[name]}: no token of val carries loss; prepare more '
                                f'of it')
            losses[split][name] = loss / max(1, count)
        model.train()
        return losses

    def mean(self, losses):
        """Average {name: loss} by the shares of the datasets."""
        if len(self.shares) == 1:
            return losses[next(iter(self.shares))]
        return sum(share * losses[name] for name, share in self.shares.items())

    def progress(self, cut, seen):
        """Return {name: (tokens drawn, epochs)} after so many tokens."""
        drawn = (self.mixture.drawn(seen // cut.block_size) + self.offsets) * cut.block_size
        return {name: (int(n), n / len(self.splits[name]['train']))
                for name, n in zip(self.names, drawn, strict=True)}

    def bits_per_byte(self, losses):
        """Return a single dataset's val loss in bits per byte, None if unknown."""
        meta = self.metas[self.names[0]]
        if len(self.names) > 1 or not meta.get('bytes', {}).get('val') or meta['row']:
            return None
        return losses[self.names[0]] / math.log(2) * meta['tokens']['val'] / meta['bytes']['val']

    def line(self, losses):
        """Return {name: val loss} as the rest of a line, or a dataset's bits per byte."""
        if bits := self.bits_per_byte(losses):
            return f' ({bits:.3f} bits a byte)'
        parts = (f'{os.path.basename(os.path.normpath(name))} {loss:.4f}'
                 for name, loss in losses.items())
        return f' ({", ".join(parts)})' * (len(self.names) > 1)

    def record(self, losses, cut, seen):
        """Return an evaluation's entry for the log.

        losses: {name: val loss}; seen: tokens so far.
        """
        if len(self.names) == 1:
            bits = self.bits_per_byte(losses)
            return {'bits_per_byte': bits} if bits else {}
        return {'sources': {name: {'val_loss': losses[name], 'tokens': n, 'epochs': epochs}
                            for name, (n, epochs) in self.progress(cut, seen).items()}}

    def describe(self, cut, max_iters, eval_tokens, n_processes):
        """Return lines about a run: steps, epochs, and datasets that it reads too often."""
        progress, several = self.progress(cut, cut.tokens_of(0, max_iters)), len(self.names) > 1
        epochs = ', '.join(f'{epochs:.2f} epochs' + f' of {name}' * several
                           for name, (_, epochs) in progress.items())
        lines = [f'{max_iters} steps, {epochs}'
                 + f'; val loss over {eval_tokens:,} tokens of val' * (eval_tokens > 0),
                 f'a step of {cut.tokens:,} tokens = {n_processes} process(es) x '
                 f'{cut.micro_steps} micro-batch(es) x {cut.batch_size} x {cut.block_size}'
                 + f', after {cut.stages.n - 1} stage(s) with fewer' * (cut.stages.n > 1)]
        lines += [f'{lost:.1%} of the tokens of {name} are behind the end of a row, and lost'
                  for name, lost in self.lost.items()]
        return lines + [f'WARNING: {name} is read {epochs:.1f} times in this run, expected at most '
                        f'{MOST_EPOCHS}: lower its share, or add text'
                        for name, (_, epochs) in progress.items()
                        if several and epochs > MOST_EPOCHS]
