"""
Pretrain on a large corpus, finetune on a small one, compare with scratch.

    $ python -m lab.finetune                                   # 7 minutes on two cores
    $ python -m lab.finetune --part=0.01 --pretrain_steps=300  # 10 kB of Shakespeare
    $ python -m lab.finetune --corpus=NAME      # after: python data/text/prepare.py --name=NAME ...

A GPT of 0.8M parameters reads a tenth of Python's standard library, 31 MB as bytes. It reads
nothing twice, so train and val loss stay within 0.07 nats. Then it trains for 150 steps on
Shakespeare at half the learning rate. The same model from scratch gets the same batches, steps and
evaluations. The lowest val loss (16 kB of text) counts.

Measured on two cores of an AMD EPYC, nats per byte: with all of the training text 1.763
pretrained, 1.817 from scratch. With 50 kB of it 2.049 after 75 steps, 2.218 after 120; then both
overfit. The cost of pretraining is not included: from scratch on all of the text with the same
number of steps in total reaches 1.488.

Sources: "Universal Language Model Fine-tuning for Text Classification", Howard & Ruder 2018;
"Language Models are Unsupervised Multitask Learners", Radford et al. 2019. Needs '.[lab]'.
"""

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from bench.common import table
from configurator import Count, Positive, Seed, Share, UserError, override
from data import tokens as data
from flatgpt import runtime
from lab import common, texts
from model import GPT

# Settings -----------------------------------------------------------------------------------------
corpus = 'python_stdlib'  # to pretrain on: a dataset of bytes under data/
input = ''  # text file to finetune on; '': tiny Shakespeare, downloaded if missing
pretrain_steps: Count = 1500
steps: Count = 150  # on Shakespeare, from scratch and from the pretrained weights
part: Share = 0.05  # share of Shakespeare's training text in the runs with little text
scratch_rate: Positive = 1.0  # learning rates, as multiples of those of preset=modern
finetune_rate: Positive = 0.5
n_layer: Count = 4
n_head: Count = 4
n_embd: Count = 128
block_size: Count = 128  # bytes of context
batch_size: Count = 16  # sequences per step
compile: bool | Literal['auto'] = 'auto'
seed: Seed = 1337
out = 'out-lab'  # folder of the picture and the numbers
config = override(globals())
# --------------------------------------------------------------------------------------------------

VOCAB_SIZE = 256  # bytes
EVALUATIONS, EVAL_BATCHES = 10, 8  # evaluations per run; batches per evaluation


@dataclass
class Run:
    """A training run: its name, its two texts as ids, its steps and its learning rate."""

    name: str
    train: np.ndarray
    val: np.ndarray
    steps: int
    rate: float = 1.0


def batch(tokens, step):
    """Return x and y, (B, T), of a step: a function of tokens, step and seed."""
    starts = data.train_windows(step * batch_size, batch_size, len(tokens), block_size, seed)
    return data.gather(tokens, starts, block_size, VOCAB_SIZE)


@torch.no_grad()
def mean_loss(model, batches):
    """Return the mean loss over batches of one size, in nats per byte."""
    model.eval()
    with torch.compiler.set_stance('force_eager'):  # compiling once more would cost more
        return sum(model(x, y)[1].item() for x, y in batches) / len(batches)


def learn(model, run, compiled):
    """Train the model; return [[step, train loss, val loss], ...] and the seconds.

    The train loss is measured on batches that were read, evenly spaced over the steps so far. The
    val loss is always measured on the same windows.
    """
    starts = data.even_windows(EVAL_BATCHES * batch_size, len(run.val), block_size)
    val_batches = [data.gather(run.val, part, block_size, VOCAB_SIZE)
                   for part in np.split(starts, EVAL_BATCHES)]
    when = set(np.linspace(0, run.steps, EVALUATIONS + 1).astype(int).tolist())
    curve, seconds = [], 0.0

    def evaluate(step):
        read = np.linspace(0, max(0, step - 1), EVAL_BATCHES).astype(int).tolist()
        train_loss = mean_loss(model, [batch(run.train, s) for s in read])
        val_loss = mean_loss(model, val_batches)
        curve.append([step, train_loss, val_loss])
        print(f'  step {step:>5}: train loss {train_loss:.3f}, val loss {val_loss:.3f}', flush=True)

    evaluate(0)
    optimizer, started = common.muon(model, run.rate), time.perf_counter()
    for step, _ in common.train(model, lambda step: batch(run.train, step), run.steps, optimizer,
                                compile=compiled):
        if step + 1 in when:
            seconds += time.perf_counter() - started
            evaluate(step + 1)
            started = time.perf_counter()
    return curve, seconds


def new_model(weights=None):
    """Return a GPT with these weights, or with the initial ones, the same each time."""
    torch.manual_seed(seed)
    model = GPT(common.gpt_config(vocab_size=VOCAB_SIZE, block_size=block_size, n_layer=n_layer,
                                  n_head=n_head, n_embd=n_embd))
    if weights is not None:
        model.load_state_dict(weights)
    return model


def draw(curves):
    """Draw pretraining, then scratch against pretrained on all and on a part."""
    figure, axes = common.pyplot().subplots(1, 3, figsize=(10, 4.5))
    left, middle, right = axes
    lines = [(left, 'pretraining', 1, 'train', common.GREEN, -1),
             (left, 'pretraining', 2, 'val', common.BLUE, 1)]
    for ax, text in ((middle, 'all'), (right, 'part')):
        lines += [(ax, f'scratch, {text}', 2, 'scratch', common.RED, 2),
                  (ax, f'pretrained, {text}', 2, 'pretrained', common.BLUE, -1)]
    bottom = min(point[2] for curve in curves.values() for point in curve) - 0.25
    for ax, name, column, label, color, side in lines:
        points = np.array(curves[name])
        step, loss = points[points[:, column].argmin(), [0, column]]
        ax.plot(points[:, 0], points[:, column], color=color)
        ax.plot(step, loss, 'o', color=color)
        ax.annotate(f'{label} {loss:.2f}', (step, loss), (6, 11 * side), color=color, ha='right',
                    textcoords='offset points', va='center')
        ax.set(xlabel='steps', ylim=(bottom, 3.2))
    long_loss = min(loss for _, _, loss in curves['scratch, long'])
    middle.axhline(long_loss, color=common.RED, linestyle=':')
    middle.annotate(f'scratch, {pretrain_steps + steps:,} steps: {long_loss:.2f}', (0, long_loss),
                    (0, -11), textcoords='offset points', color=common.RED, va='center')
    left.set(title=f'pretraining on {corpus}', ylabel='loss, nats a byte')
    middle.set(title='all of Shakespeare, val loss')
    right.set(title=f'{100 * part:g}% of Shakespeare, val loss')
    return figure


def main():
    # read both texts
    common.start(out)
    corpus_train, corpus_val = texts.open_corpus(corpus, block_size)
    train, val = texts.open_text(input, 'python -m lab.finetune --input=FILE')
    parts = {'all': train, 'part': train[:int(part * len(train))]}
    for name, text in (('validation part', val), (f'part={part}', parts['part'])):
        if len(text) <= block_size:
            raise UserError(f'the {name} of the text to finetune on has {len(text):,} bytes, '
                            f'expected more than block_size={block_size}; take more text, a larger '
                            f'--part or a smaller --block_size')

    # compile if the runs are long enough
    model, n_steps = new_model(), 2 * pretrain_steps + 5 * steps
    flops = model.flops_per_token() * n_steps * batch_size * block_size
    compiled, reason = runtime.choose_compile(compile, torch.device('cpu'), flops)
    print(f'{model.get_num_params():,} parameters; {n_steps:,} steps in all; '
          f'compile {compiled} ({reason})')
    curves = {}
    rows = [['bytes', 'start', 'steps', 'best val loss', 'at step', 'train loss', 'seconds']]

    def measure(model, run):
        print(f'{run.name}: {run.steps:,} steps of {batch_size} x {block_size} bytes, '
              f'rate {run.rate:g}')
        curve, seconds = learn(model, run, compiled)
        step, train_loss, val_loss = min(curve, key=lambda point: point[2])  # early stopping
        rows.append([f'{len(run.train):,}', run.name.split(',')[0], f'{run.steps:,}',
                     f'{val_loss:.3f}', f'{step:,}', f'{train_loss:.3f}', f'{seconds:.0f}'])
        curves[run.name] = curve

    # pretrain; then scratch against pretrained; then scratch with the steps of both
    measure(model, Run('pretraining', corpus_train, corpus_val, pretrain_steps))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for name, text in parts.items():
        measure(new_model(), Run(f'scratch, {name}', text, val, steps, scratch_rate))
        measure(new_model(weights), Run(f'pretrained, {name}', text, val, steps, finetune_rate))
    measure(new_model(), Run('scratch, long', train, val, pretrain_steps + steps, scratch_rate))
    print('\n' + table(rows) + '\n')
    common.save(draw(curves), out, 'finetune')
    common.record(out, 'finetune', corpus=corpus, curves=curves)


if __name__ == '__main__':
    main()
