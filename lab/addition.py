"""
Which way a small GPT learns to add: answers as we write them, or units first.

    $ python -m lab.addition                             # 80 seconds on one core
    $ python -m lab.addition --steps=1000 --seeds=1      # by then the other order has caught up
    $ python -m lab.addition --n_train=3000 --seeds=1    # learn from a third of a percent of the sums

The same 21,824 parameters, the same weights to start from, the same sums at every step; only the digits of the answer
are turned round, 123+456=0579 or 123+456=9750. The loss is that of the answer alone. Units first, every digit needs one
place of the two numbers and what has just been written; the other way the first digit needs all the carries. On an AMD
EPYC three runs of 240 steps got all 99,993 held-out sums right, units first; the other way 97.7%, 99.7%, and 9.0% where
the units were not learnt yet. What the middle run got wrong is told by places whose digits make 9, which carry only if
one is carried to them: 1.0% wrong without, 7.6% with one, 10.7% with two; by number of carries 1.8, 1.7, 1.9, 5.0%.

Source: "Teaching Arithmetic to Small Transformers" (Lee et al. 2023); an exercise of Karpathy's lecture "Let's build
GPT" (2023). Needs '.[lab]'.
"""

import sys

import numpy as np
import torch

from bench.common import table
from config.presets import PRESETS
from configurator import check, explain_errors, override
from data.datasets import folder_of, load_meta, prepare_if_missing
from data.tokens import open_tokens
from lab import common
from model import GPT, GPTConfig

# settings ------------------------------------------------------------------------------------------------------------
dataset = 'addition'  # folder under data/ that data/addition/prepare.py wrote; prepared now where it is missing
n_train = 0  # sums to learn from; 0: all of train
n_layer = 2
n_head = 4
n_embd = 32
batch_size = 256  # sums
steps = 240  # of each run
seeds = 3  # runs of each order, from this one on:
seed = 1337
out = 'out-lab'  # folder of the picture and the numbers
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

CHARS = '\n+0123456789='  # of data/addition, by id
ORDERS, PLACES = ('plain', 'reversed'), ('units', 'tens', 'hundreds', 'thousands')
POINTS, POINT_SUMS = 20, 2000  # of the curve; the numbers at the end are of all held-out sums


def read_sums(data_dir, split):
    """-> ids of a split's lines, (n, 3 digits + 4), and the numbers added in them, (n,) each."""
    meta = load_meta(data_dir)
    ids = np.asarray(open_tokens(data_dir, split, meta, block_size=1))
    if (meta['tokenizer'] or {}).get('chars') == CHARS:
        length = int((ids == CHARS.index('\n')).argmax()) + 1
        lines, digits = ids[: len(ids) // length * length].reshape(-1, length), (length - 4) // 3
        a, b, answer = (number(lines[:, start : start + n]) for start, n in
                        ((0, digits), (digits + 1, digits), (2 * digits + 2, digits + 1)))
        if (a + b == answer).all():
            return lines, a, b
    raise SystemExit(f'{data_dir}: expected sums such as 123+456=0579, whose answers this script itself turns round; '
                     f'make them: python data/addition/prepare.py, and leave out --dataset')


def number(ids):
    """The numbers (n,) whose digits have these ids (n, digits)."""
    return (ids.astype(np.int64) - CHARS.index('0')) @ 10 ** np.arange(ids.shape[1])[::-1]


def sequences(lines, order):
    """Lines of ids (n, 3 digits + 4) -> inputs x and targets y, (n, 3 digits + 2) each; y is -1 but for the answer."""
    lines = lines.astype(np.int64)
    start = 2 * (lines.shape[1] - 4) // 3 + 2  # of the answer
    if order == 'reversed':
        lines[:, start:-1] = lines[:, start:-1][:, ::-1].copy()
    x, y = lines[:, :-2], lines[:, 1:-1].copy()  # the line end has nothing to teach
    y[:, : start - 1] = -1  # nor has what is asked: it can't be predicted
    return torch.from_numpy(x), torch.from_numpy(y)


def carries(a, b, digits):
    """Numbers (n,) -> (n, digits) of bool: whether units, tens, ... carry one to the next place."""
    place = 10 ** np.arange(1, digits + 1)
    return a[:, None] % place + b[:, None] % place >= place


def nines(a, b, digits):
    """-> (n,): in how many places above the units the digits make 9, so that those below decide whether it carries."""
    place = 10 ** np.arange(1, digits)
    return (a[:, None] // place % 10 + b[:, None] // place % 10 == 9).sum(axis=1)


def new_model(block_size):
    # absolute positions: what is to be added stands at fixed places
    return GPT(GPTConfig(**{**PRESETS['modern'], 'pos': 'learned', 'n_layer': n_layer, 'n_head': n_head,
                            'n_embd': n_embd, 'vocab_size': len(CHARS), 'block_size': block_size}))


@torch.inference_mode()
def right_digits(model, lines, order):
    """
    -> (n, digits + 1) of bool, units first: whether the likeliest digit is the right one, given the question and the
    right digits written before it. Where all are, greedy decoding writes the answer, and only there.
    """
    model.eval()
    right = []
    for some in np.array_split(lines, -(-len(lines) // 5000)):
        x, y = sequences(some, order)
        right.append((model(x, y)[0].argmax(dim=-1) == y)[:, y[0] >= 0])
    right = torch.cat(right).numpy()
    return right if order == 'reversed' else right[:, ::-1]


def learn(order, run_seed, train_lines, val_lines):
    """Train a model on answers of this order; -> its curve, [(step, exact match)], and right_digits() at the end."""
    torch.manual_seed(run_seed)  # both orders start from the same weights and see the same sums
    rng = np.random.default_rng(run_seed)
    model, curve = new_model(train_lines.shape[1] - 2), [(0, 0.0)]

    def get_batch(step):
        return sequences(train_lines[rng.integers(len(train_lines), size=batch_size)], order)

    for step, _ in common.train(model, get_batch, steps):
        if (step + 1) % max(1, steps // POINTS) == 0 or step + 1 == steps:
            right = right_digits(model, val_lines[:POINT_SUMS], order)
            curve.append((step + 1, float(right.all(axis=1).mean())))
    right = right_digits(model, val_lines, order)
    print(f'{order:8}  seed {run_seed}  right {right.all(axis=1).mean():8.3%}', flush=True)
    return curve, right


def draw(curves, wrong, groups):
    """curves: {order: [[(step, exact match), ...], ...]}. wrong: {order: {group: share}}, drawn for `groups`."""
    plt = common.pyplot()
    figure, (left, bars) = plt.subplots(1, 2, figsize=(9, 4.5), width_ratios=(5, 4))
    for order, color, label, place, shift in (('plain', common.RED, '0579\nas we write it', (0.64, 0.25), -0.2),
                                              ('reversed', common.BLUE, '9750\nunits first', (0.17, 0.85), 0.2)):
        for curve in curves[order]:
            left.plot(*zip(*curve, strict=True), color=color, marker='.', alpha=0.8)
        shares = [wrong[order][name] for name in groups]
        drawn = bars.barh([i + shift for i in range(len(groups))], shares, 0.4, color=color)
        bars.bar_label(drawn, [f'{share:.1%}' for share in shares], color=color, fontsize=9, padding=2)
        left.text(*place, f'123+456={label}', color=color, transform=left.transAxes)
    left.set(title='held-out sums answered right', xlabel='training step', ylim=(-0.03, 1.03))
    left.yaxis.set_major_formatter(lambda value, _: f'{value:.0%}')
    bars.set(title='wrong at the end (middle run)', yticks=range(len(groups)), yticklabels=groups)
    bars.invert_yaxis()
    bars.margins(x=0.15)
    bars.xaxis.set_major_formatter(lambda value, _: f'{value:.0%}')
    bars.grid(visible=False, axis='y')
    return figure


def main():
    check(config, (  # GPTConfig checks the others
        ('batch_size steps seeds', lambda value: value >= 1, '1 or more'),
        ('seed', lambda value: value >= 0, '0 or more'),
    ))
    common.start(out, seed, threads=1)
    data_dir = folder_of(dataset)
    prepare_if_missing(data_dir, is_first=True)
    train_lines = read_sums(data_dir, 'train')[0]
    val_lines, a, b = read_sums(data_dir, 'val')
    digits = (val_lines.shape[1] - 4) // 3
    if not 0 <= n_train <= len(train_lines):
        raise SystemExit(f'n_train={n_train}: expected 1 to {len(train_lines)}, the sums in train, or 0 for all')
    train_lines = train_lines[: n_train or None]
    print(f'{len(train_lines):,} sums to learn from, {len(val_lines):,} held out; '
          f'{sum(p.numel() for p in new_model(3 * digits + 2).parameters()):,} parameters')
    curves, right = ({order: [] for order in ORDERS} for _ in range(2))
    for run_seed in range(seed, seed + seeds):
        for order in ORDERS:
            curve, digits_right = learn(order, run_seed, train_lines, val_lines)
            curves[order].append(curve)
            right[order].append(digits_right)
    exact = {order: [float(run.all(axis=1).mean()) for run in runs] for order, runs in right.items()}
    # a run that got stuck would drown what the others have to say about carries: look into the middle one
    middle = {order: right[order][np.argsort(exact[order])[seeds // 2]] for order in ORDERS}

    n_carries, n_nines = carries(a, b, digits).sum(axis=1), nines(a, b, digits)
    groups = {'all': n_carries >= 0}
    groups |= {f'{n} carr{"y" if n == 1 else "ies"}': n_carries == n for n in range(digits + 1)}
    groups |= {f'9 in {n or "no"} place{"s" * (n > 1)}': n_nines == n for n in range(digits)}
    wrong = {order: {name: float(1 - digits_right[which].all(axis=1).mean()) for name, which in groups.items()}
             for order, digits_right in middle.items()}
    print('\nheld-out sums answered wrongly (middle run)')
    print(table([('', 'sums', *ORDERS), *((name, f'{which.sum():,}', *(f'{wrong[order][name]:.3%}' for order in ORDERS))
                                          for name, which in groups.items())]))
    by_place = {order: (1 - digits_right.mean(axis=0)).tolist() for order, digits_right in middle.items()}
    print('\ndigits of its answers that are wrong, given the right ones before')
    print(table([('', *ORDERS), *((PLACES[i], *(f'{by_place[order][i]:.3%}' for order in ORDERS))
                                  for i in reversed(range(digits + 1)))]))
    common.save(draw(curves, wrong, list(groups)[1:]), out, 'addition')
    common.record(out, 'addition', exact=exact, curves=curves, wrong=wrong, wrong_by_place=by_place)


if __name__ == '__main__':
    sys.excepthook = explain_errors
    main()
