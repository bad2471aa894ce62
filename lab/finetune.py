"""
Pretrain on a large corpus, finetune on a small one: what it is worth to have read something else before.

    $ python -m lab.finetune                                   # 7 minutes on two cores
    $ python -m lab.finetune --part=0.01 --pretrain_steps=300  # 10 kB of Shakespeare, a shorter school
    $ python -m lab.finetune --corpus=NAME                     # of python data/text/prepare.py --input=FILE --name=NAME

A GPT of 0.8M parameters learns the bytes of Python's standard library, 31 MB, of which it reads a tenth and nothing
twice: train and val loss stay within 0.07 nats of each other. Then 150 steps of Shakespeare at half the rate, against
the same model from scratch: same batches, steps and evaluations, the lowest val loss (16 kB of it) counts. Measured on
two cores of an AMD EPYC: with all of the training text 1.763 nats a byte pretrained, 1.817 from scratch. With 50 kB of
it 2.049 after 75 steps against 2.218 after 120; from there on both learn it by heart. What pretraining costs is not
in that: scratch with all of the text and as many steps as both together gets to 1.488.

Sources: "Universal Language Model Fine-tuning for Text Classification", Howard & Ruder 2018; "Language Models are
Unsupervised Multitask Learners", Radford et al. 2019. Needs '.[lab]'.
"""

import sys
import time

import numpy as np
import torch

from bench.common import table
from config.presets import PRESETS
from configurator import check, explain_errors, override
from data import download
from data.datasets import folder_of, load_meta, prepare_command, prepare_if_missing
from data.tokens import even_windows, gather, open_tokens, train_windows
from flatgpt import runtime
from lab import common
from model import GPT, GPTConfig

# settings ------------------------------------------------------------------------------------------------------------
corpus = 'python_stdlib'  # to pretrain on: a dataset of bytes under data/
input = ''  # a text file to finetune on; '': tiny Shakespeare, downloaded if it is not here
pretrain_steps = 1500
steps = 150  # on Shakespeare, from scratch as from the pretrained weights
part = 0.05  # how much of Shakespeare's training split the runs with little text may see
scratch_rate = 1.0  # learning rates, as multiples of train.py's for preset=modern, which pretraining has
finetune_rate = 0.5
n_layer = 4
n_head = 4
n_embd = 128
block_size = 128  # bytes of context
batch_size = 16  # sequences a step
compile: bool | str = 'auto'
seed = 1337
out = 'out-lab'  # folder of the picture and the numbers
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

VOCAB_SIZE = 256  # bytes
EVALUATIONS, EVAL_BATCHES = 10, 8  # of a run; of an evaluation


def open_corpus():
    """-> the training and the validation bytes to pretrain on. SystemExit for a dataset that is not of bytes."""
    folder = folder_of(corpus)
    prepare_if_missing(folder, is_first=True)
    meta = load_meta(folder)
    if meta['tokenizer'] != {'kind': 'byte'}:
        kind = (meta['tokenizer'] or {}).get('kind', 'unknown')
        raise SystemExit(f'corpus={corpus!r} has tokens of kind {kind!r}, expected bytes, so that one model reads both '
                         f'texts: {prepare_command(folder)} --tokenizer=byte')
    return [open_tokens(folder, split, meta, block_size) for split in ('train', 'val')]


def open_target():
    """-> the bytes to finetune on, the first nine tenths of the file, and those to validate on, the rest."""
    path = download.get_shakespeare(input or None, folder_of('shakespeare_char'),
                                    'python -m lab.finetune --input=FILE')
    text = np.fromfile(path, np.uint8)
    n_train = len(text) * 9 // 10
    return text[:n_train], text[n_train:]


def batch(tokens, step):
    """The windows of a training step, a function of (tokens, step) and the seed alone. -> x, y: (B, T) ids"""
    starts = train_windows(step, batch_size, len(tokens), block_size, seed)
    return gather(tokens, starts, block_size, VOCAB_SIZE)


@torch.no_grad()
def mean_loss(model, batches):
    """Mean loss over batches of one size, in nats a byte."""
    model.eval()
    with torch.compiler.set_stance('force_eager'):  # or the model would be compiled a second time, without gradients
        return sum(model(x, y)[1].item() for x, y in batches) / len(batches)


def learn(model, train, val, steps, rate, compiled):
    """
    Train the model; -> its curve, [[step, train loss, val loss], ...], and seconds without evaluations. The train loss
    is of text it has read: batches evenly spaced over those so far; that of val always of the same windows.
    """
    starts = even_windows(EVAL_BATCHES * batch_size, len(val), block_size)
    val_batches = [gather(val, some, block_size, VOCAB_SIZE) for some in np.split(starts, EVAL_BATCHES)]
    when = set(np.linspace(0, steps, EVALUATIONS + 1).astype(int).tolist())
    curve, seconds = [], 0.0

    def evaluate(step):
        read = np.linspace(0, max(0, step - 1), EVAL_BATCHES).astype(int).tolist()
        curve.append([step, mean_loss(model, [batch(train, s) for s in read]), mean_loss(model, val_batches)])
        print(f'  step {step:>5}: train loss {curve[-1][1]:.3f}, val loss {curve[-1][2]:.3f}', flush=True)

    evaluate(0)
    optimizer, learning_rate = common.muon(model, rate)
    started = time.perf_counter()
    for step, _ in common.train(model, lambda step: batch(train, step), steps, optimizer, learning_rate,
                                compile=compiled):
        if step + 1 in when:
            seconds += time.perf_counter() - started
            evaluate(step + 1)
            started = time.perf_counter()
    return curve, seconds


def new_model(weights=None):
    """A GPT with the weights given, or with those it starts from, the same each time."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**PRESETS['modern'], 'vocab_size': VOCAB_SIZE, 'block_size': block_size,
                             'n_layer': n_layer, 'n_head': n_head, 'n_embd': n_embd}))
    if weights is not None:
        model.load_state_dict(weights)
    return model


def draw(curves):
    """Pretraining; then scratch against pretrained with all of the text, and with a part of it."""
    figure, axes = common.pyplot().subplots(1, 3, figsize=(10, 4.5))
    middle, right = axes[1:]
    lines = [(axes[0], 'pretraining', 1, 'train', common.GREEN, -1), (axes[0], 'pretraining', 2, 'val', common.BLUE, 1)]
    for ax, text in ((middle, 'all'), (right, 'part')):
        lines += [(ax, f'scratch, {text}', 2, 'scratch', common.RED, 2),
                  (ax, f'pretrained, {text}', 2, 'pretrained', common.BLUE, -1)]
    for ax, name, column, label, color, side in lines:
        points = np.array(curves[name])
        step, loss = points[points[:, column].argmin(), [0, column]]
        ax.plot(points[:, 0], points[:, column], color=color)
        ax.plot(step, loss, 'o', color=color)
        ax.annotate(f'{label} {loss:.2f}', (step, loss), (6, 11 * side), textcoords='offset points', color=color,
                    ha='right', va='center')
        ax.set(xlabel='steps', ylim=(min(p[2] for c in curves.values() for p in c) - 0.25, 3.2))
    long_loss = min(loss for _, _, loss in curves['scratch, long'])
    middle.axhline(long_loss, color=common.RED, linestyle=':')
    middle.annotate(f'scratch, {pretrain_steps + steps:,} steps: {long_loss:.2f}', (0, long_loss), (0, -11),
                    textcoords='offset points', color=common.RED, va='center')
    axes[0].set(title=f'pretraining on {corpus}', ylabel='loss, nats a byte')
    middle.set(title='all of Shakespeare, val loss')
    right.set(title=f'{100 * part:g}% of Shakespeare, val loss')
    return figure


def main():
    sys.excepthook = explain_errors
    check(config, (
        ('pretrain_steps steps batch_size scratch_rate finetune_rate', lambda value: value > 0, 'more than 0'),
        ('part', lambda value: 0 < value <= 1, 'a fraction, 0 < part <= 1'),
    ))
    common.start(out, seed)
    corpus_train, corpus_val = open_corpus()
    train, val = open_target()
    texts = {'all': train, 'part': train[:int(part * len(train))]}
    for name, text in (('validation part', val), (f'part={part}', texts['part'])):
        if len(text) <= block_size:
            raise SystemExit(f'the {name} of the text to finetune on has {len(text):,} bytes, expected more than '
                             f'block_size={block_size}; take more text, a larger --part or a smaller --block_size')
    model, n_steps = new_model(), 2 * pretrain_steps + 5 * steps
    flops = model.flops_per_token() * n_steps * batch_size * block_size
    compiled, why = runtime.choose_compile(compile, torch.device('cpu'), flops)
    print(f'{model.get_num_params():,} parameters; {n_steps:,} steps in all; compile {compiled} ({why})')
    curves, rows = {}, [['bytes', 'start', 'steps', 'best val loss', 'at step', 'train loss', 'seconds']]

    def run(name, model, train, val, steps, rate):
        print(f'{name}: {steps:,} steps of {batch_size} x {block_size} bytes, rate {rate:g}')
        curve, seconds = learn(model, train, val, steps, rate, compiled)
        step, train_loss, val_loss = min(curve, key=lambda point: point[2])  # where early stopping would stop
        rows.append([f'{len(train):,}', name.split(',')[0], f'{steps:,}', f'{val_loss:.3f}', f'{step:,}',
                     f'{train_loss:.3f}', f'{seconds:.0f}'])
        curves[name] = curve

    run('pretraining', model, corpus_train, corpus_val, pretrain_steps, 1.0)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for name, text in texts.items():
        run(f'scratch, {name}', new_model(), text, val, steps, scratch_rate)
        run(f'pretrained, {name}', new_model(weights), text, val, steps, finetune_rate)
    run('scratch, long', new_model(), train, val, pretrain_steps + steps, scratch_rate)
    print('\n' + table(rows) + '\n')
    common.save(draw(curves), out, 'finetune')
    common.record(out, 'finetune', corpus=corpus, curves=curves)


if __name__ == '__main__':
    main()
