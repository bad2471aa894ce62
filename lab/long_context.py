"""
Extend the context of a trained model fourfold; look at the loss of each position.

    $ python -m lab.long_context                 # 3 minutes on two cores
    $ python -m lab.long_context --factor=8 --finetune_steps=200
    $ python train.py config/quickstart.py --init_from=out-quickstart --extend_context=512 \\
        --max_iters=50 --out_dir=out-long       # the same for a model of yours

A GPT with RoPE learns Python's standard library in contexts of 128 bytes. A longer text turns its
queries and keys by angles that it has never met. Three ways to read on are compared: the rotation
as it is, position interpolation, which slows all of it down, and YaRN, which slows down only the
channels that turn less than once in the old context. Each is measured at once and after a short
finetuning on long contexts, a few percent of the steps of training.

Sources: "RoFormer", Su et al. 2021; "Extending Context Window of Large Language Models via Position
Interpolation", Chen et al. 2023; "YaRN", Peng et al. 2023. Needs '.[lab]'.
"""

import copy
from typing import Annotated

import numpy as np
import torch

from bench.common import table
from configurator import Count, Positive, Range, Seed, UserError, override
from data import tokens as data
from flatgpt.pretrained import slow_rotation
from lab import common, texts
from model import GPT

# Settings -----------------------------------------------------------------------------------------
corpus = 'python_stdlib'  # a dataset of bytes under data/
steps: Count = 1000  # of training in the short context
block_size: Count = 128  # the short context, bytes
factor: Annotated[int, Range(least=2, most=16)] = 4  # of the long context
finetune_steps: Count = 60
finetune_rate: Positive = 0.3  # learning rates, as multiples of those of preset=modern
batch_tokens: Count = 2048  # bytes in a step
windows: Count = 256  # long contexts of val to measure on
n_layer: Count = 4
n_head: Count = 4
n_embd: Count = 128
seed: Seed = 1337
out = 'out-lab'  # folder of the picture and the numbers
config = override(globals())
# --------------------------------------------------------------------------------------------------

VOCAB_SIZE = 256  # bytes
WAYS = {'as it is': common.RED, 'interpolation': common.ORANGE, 'YaRN': common.BLUE}


def batches(text, context):
    """Return the function step -> x, y of batch_tokens in contexts of this length."""
    n = max(1, batch_tokens // context)

    def get_batch(step):
        starts = data.train_windows(step * n, n, len(text), context, seed)
        return data.gather(text, starts, context, VOCAB_SIZE)
    return get_batch


def extended(model, way):
    """Return a copy of the model with the long context."""
    model, n = copy.deepcopy(model), factor * block_size
    if way == 'YaRN':
        slow_rotation(model, n, 'lab')
    elif way == 'interpolation':
        model.config.rope_scaling = {'rope_type': 'linear', 'factor': float(factor)}
    model.crop_block_size(n)
    return model


@torch.no_grad()
def losses_of(model, text):
    """Return the loss at each position, in nats a byte: (windows, T)."""
    context, losses = model.config.block_size, []
    starts = data.even_windows(windows, len(text), context)
    for part in np.array_split(starts, max(1, len(starts) // 8)):
        x, y = data.gather(text, part, context, VOCAB_SIZE)
        logits = model.eval()(x, y)[0].float()
        losses.append(torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), y.flatten(), reduction='none').view(y.shape))
    return torch.cat(losses).numpy()


def summary(losses):
    """Return the mean losses in the old context and beyond, and its standard error."""
    beyond = losses[:, block_size:].mean(1)
    return losses[:, :block_size].mean(), beyond.mean(), beyond.std() / len(beyond)**0.5


def picture(curves):
    """Draw the loss along the position: at once, and after finetuning."""
    figure, axes = common.pyplot().subplots(1, 2, figsize=(10, 4.2), sharey=True)
    edges = np.unique(np.geomspace(4, factor * block_size, 28).astype(int))
    top = 0.0
    for ax, moment in zip(axes, ('at once', 'after finetuning'), strict=True):
        for way, color in WAYS.items():
            mean = curves[way, moment].mean(0)
            values = [mean[a:b].mean() for a, b in zip(edges, edges[1:], strict=False)]
            ax.plot((edges[1:] * edges[:-1])**0.5, values, color=color, label=way)
            top = max(top, values[0])
        ax.axvline(block_size, color='gray', linestyle=':')
        ax.set(xscale='log', title=moment, xlabel='position in the context, bytes')
        ax.set_xticks([4, 16, 64, block_size, factor * block_size],
                      ['4', '16', '64', str(block_size), str(factor * block_size)])
        ax.minorticks_off()
    axes[0].set(ylabel='loss, nats a byte', ylim=(None, top + 0.3))
    axes[0].legend(loc='upper right')
    return figure


def main():
    # train in the short context
    common.pyplot()
    common.start(out)
    train, val = texts.open_corpus(corpus, factor * block_size)
    if len(val) <= factor * block_size:
        raise UserError(f'factor={factor}: expected a context shorter than the {len(val):,} bytes '
                        f'of val')
    torch.manual_seed(seed)
    model = GPT(common.gpt_config(vocab_size=VOCAB_SIZE, block_size=block_size, n_layer=n_layer,
                                  n_head=n_head, n_embd=n_embd))
    print(f'{model.get_num_params():,} parameters, context {block_size}, then '
          f'{factor * block_size}')
    for step, loss in common.train(model, batches(train, block_size), steps):
        if (step + 1) % 100 == 0:
            print(f'step {step + 1:4} of {steps}: loss {loss:.3f}', flush=True)

    # extend it
    rows, curves = [['', 'moment', f'to {block_size}', f'{block_size} to {factor * block_size}',
                     'standard error']], {}
    for way in WAYS:
        longer = extended(model, way)
        curves[way, 'at once'] = losses_of(longer, val)
        optimizer = common.muon(longer, finetune_rate)
        for _ in common.train(longer, batches(train, factor * block_size), finetune_steps,
                              optimizer):
            pass
        curves[way, 'after finetuning'] = losses_of(longer, val)
        for moment in ('at once', 'after finetuning'):
            rows.append([way, moment, *(f'{value:.3f}' for value in summary(curves[way, moment]))])
            print(*rows[-1], flush=True)
    print(f'\nloss in nats a byte, by position\n\n{table(rows)}\n')
    common.save(picture(curves), out, 'long_context')
    common.record(out, 'long_context', rows=rows,
                  curves={' '.join(key): curve.mean(0).tolist() for key, curve in curves.items()})


if __name__ == '__main__':
    main()
