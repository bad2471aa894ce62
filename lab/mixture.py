"""
Train on two texts at several shares: each val loss follows its text's share.

    $ python -m lab.mixture                     # 80 s on two cores
    $ python -m lab.mixture --input=novel.txt   # another text in place of Shakespeare

GPTs of 0.8M parameters take the same number of steps on bytes of Python's standard library and
Shakespeare. data/mixture.py mixes them, as `--dataset=A:0.25,B:0.75` of train.py does.
The picture shows both val losses along the share. A share of a tenth already gains most of what
the whole would, since the texts have letters and words in common and small shares are read fresh.

Source: the tables of sampling proportions in "Language Models are Few-Shot Learners" (Brown et al.
2020) and "LLaMA" (Touvron et al. 2023). Needs '.[lab]'.
"""

import time

import numpy as np
import torch

from bench.common import table
from configurator import Count, Seed, UserError, override
from data import tokens as data
from data.mixture import Mixture, Sources
from flatgpt import runtime
from lab import common, texts
from model import GPT

# Settings -----------------------------------------------------------------------------------------
corpus = 'python_stdlib'  # a dataset of bytes under data/
input = ''  # the other text; '': tiny Shakespeare, downloaded if missing
shares = '0,0.1,0.25,0.5,0.75,1'  # of the other text
steps: Count = 250
n_layer: Count = 4
n_head: Count = 4
n_embd: Count = 128
block_size: Count = 128  # bytes of context
batch_size: Count = 16  # sequences per step
seed: Seed = 1337
out = 'out-lab'  # folder of the picture and the numbers
config = override(globals())
# --------------------------------------------------------------------------------------------------

VOCAB_SIZE, EVAL_BATCHES = 256, 8  # bytes


@torch.no_grad()
def loss_on(model, tokens):
    """Return the mean loss on fixed windows of a val text, nats per byte."""
    model.eval()
    starts = data.even_windows(EVAL_BATCHES * batch_size, len(tokens), block_size)
    with torch.compiler.set_stance('force_eager'):
        return np.mean([model(*data.gather(tokens, part, block_size, VOCAB_SIZE))[1].item()
                        for part in np.split(starts, EVAL_BATCHES)])


def learn(share, trains, compiled):
    """Train a model at a share of the first text; -> the model."""
    torch.manual_seed(seed)
    model = GPT(common.gpt_config(vocab_size=VOCAB_SIZE, block_size=block_size, n_layer=n_layer,
                                  n_head=n_head, n_embd=n_embd))
    sources = Sources(trains, ['1' * 64, '2' * 64], Mixture([share, 1 - share], batch_size),
                      np.zeros(2, np.int64), VOCAB_SIZE)

    def batch(step):
        starts = data.draw(sources, step * batch_size, batch_size, block_size, seed)
        return data.gather(sources, starts, block_size, VOCAB_SIZE)

    for _ in common.train(model, batch, steps, compile=compiled):
        pass
    return model


def read_shares():
    """Return the numbers of --shares. Raises UserError for others than 0 to 1."""
    try:
        values = [float(share) for share in shares.split(',')]
    except ValueError:
        values = []
    if not values or not all(0 <= share <= 1 for share in values):
        raise UserError(f'shares={shares!r}: expected numbers from 0 to 1, such as 0,0.5,1')
    return values


def draw(points):
    """Draw both val losses along the share."""
    figure, ax = common.pyplot().subplots(figsize=(6, 4))
    x, *losses = np.array(points).T
    for loss, label, color, place in zip(losses, ('the text', corpus), (common.RED, common.BLUE),
                                         (1, 2), strict=True):
        place = min(place, len(x) - 1)
        ax.plot(100 * x, loss, 'o-', color=color)
        ax.annotate(label, (100 * x[place], loss[place]), (4, 8), color=color,
                    textcoords='offset points')
    ax.set(xlabel='share of the text, %', ylabel='val loss, nats a byte',
           title=f'{steps} steps on two texts')
    return figure


def main():
    common.start(out)
    text_train, text_val = texts.open_text(input, 'python -m lab.mixture --input=FILE')
    corpus_train, corpus_val = texts.open_corpus(corpus, block_size)
    values = read_shares()
    n_steps = steps * len(values) * batch_size * block_size
    compiled, _ = runtime.choose_compile('auto', torch.device('cpu'), 6 * 8e5 * n_steps)
    points, started = [], time.perf_counter()
    for share in values:
        model = learn(share, [text_train, corpus_train], compiled)
        points.append([share, loss_on(model, text_val), loss_on(model, corpus_val)])
        print(f'share {share:g}: {points[-1][1]:.3f} on the text, {points[-1][2]:.3f} on {corpus}',
              flush=True)
    rows = [['share of the text', 'val loss, text', f'val loss, {corpus}']]
    rows += [[f'{share:g}', f'{text:.3f}', f'{other:.3f}'] for share, text, other in points]
    print('\n' + table(rows) + f'\n\n{time.perf_counter() - started:.0f} s')
    common.save(draw(points), out, 'mixture')
    common.record(out, 'mixture', corpus=corpus, points=points)


if __name__ == '__main__':
    main()
