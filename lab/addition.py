"""
Teach a small GPT to add: digits of the answer as we write them, or units first.

    $ python -m lab.addition                             # 80 seconds on one core
    $ python -m lab.addition --steps=1000 --seeds=1      # by then both orders add correctly
    $ python -m lab.addition --n_train=3000 --seeds=1    # train on a third of a percent of the sums

Both orders train the same 21,824 parameters from the same initial weights on the same sums. Only
the digits of the answer are reversed: 123+456=0579 or 123+456=9750. The loss covers the answer
alone. With units first, each digit depends on one place of the two numbers and on the digits just
written. In the usual order the first digit depends on all carries.

Measured on an AMD EPYC: after 240 steps, three runs with units first get all 99,993 held-out sums
right; the usual order gets 97.7%, 99.7%, and 9.0% (the units were not learnt yet). The middle
run's errors depend on places whose digits add up to 9, which carry only if they receive a carry:
1.0% wrong without such a place, 7.6% with one, 10.7% with two. By number of carries: 1.8, 1.7,
1.9, 5.0%.

Source: "Teaching Arithmetic to Small Transformers" (Lee et al. 2023); an exercise of Karpathy's
lecture "Let's build GPT" (2023). Needs '.[lab]'.
"""

import numpy as np
import torch

from bench.common import table
from configurator import Count, Natural, Seed, UserError, override
from data import datasets
from data import tokens as data
from lab import common
from model import GPT

# Settings -----------------------------------------------------------------------------------------
dataset = 'addition'  # written by data/addition/prepare.py, which runs if the folder is missing
n_train: Natural = 0  # sums to train on; 0: all of train
n_layer: Count = 2
n_head: Count = 4
n_embd: Count = 32
batch_size: Count = 256  # sums
steps: Count = 240  # of each run
seeds: Count = 3  # runs of each order, with the seeds from `seed` on
seed: Seed = 1337
out = 'out-lab'  # folder of the picture and the numbers
config = override(globals())
# --------------------------------------------------------------------------------------------------

CHARS = '\n+0123456789='  # of data/addition, by id
ORDERS, PLACES = ('plain', 'reversed'), ('units', 'tens', 'hundreds', 'thousands')
POINTS, POINT_SUMS = 20, 2000  # of the curve; the final numbers use all held-out sums


def read_sums(data_dir, split):
    """Return the ids of a split's lines, (n, 3 digits + 4), and both summands."""
    meta = datasets.load_meta(data_dir)
    ids = np.asarray(data.open_tokens(data_dir, split, meta, block_size=1))
    if (meta['tokenizer'] or {}).get('chars') == CHARS:
        length = int((ids == CHARS.index('\n')).argmax()) + 1
        lines, digits = ids[: len(ids) // length * length].reshape(-1, length), (length - 4) // 3
        starts = ((0, digits), (digits + 1, digits), (2 * digits + 2, digits + 1))
        a, b, answer = (number(lines[:, start : start + n]) for start, n in starts)
        if (a + b == answer).all():
            return lines, a, b
    raise UserError(f'{data_dir}: expected sums such as 123+456=0579 (this script reverses the '
                    f'answers itself); make them: python data/addition/prepare.py, and leave out '
                    f'--dataset')


def number(ids):
    """Return the numbers (n,) whose digits have the ids (n, digits)."""
    return (ids.astype(np.int64) - CHARS.index('0')) @ 10 ** np.arange(ids.shape[1])[::-1]


def sequences(lines, order):
    """Turn lines of ids into x and y, (n, 3 digits + 2); y is -1 before the answer."""
    lines = lines.astype(np.int64)
    start = 2 * (lines.shape[1] - 4) // 3 + 2  # of the answer
    if order == 'reversed':
        lines[:, start:-1] = lines[:, start:-1][:, ::-1].copy()
    x, y = lines[:, :-2], lines[:, 1:-1].copy()  # the line end carries no information
    y[:, : start - 1] = -1  # the summands are random: no model can predict them
    return torch.from_numpy(x), torch.from_numpy(y)


def carries(a, b, digits):
    """Return (n, digits) of bool: whether units, tens, ... carry into the next place."""
    place = 10 ** np.arange(1, digits + 1)
    return a[:, None] % place + b[:, None] % place >= place


def nines(a, b, digits):
    """Count the places above the units whose digits add up to 9; return (n,)."""
    place = 10 ** np.arange(1, digits)
    return (a[:, None] // place % 10 + b[:, None] // place % 10 == 9).sum(axis=1)


def new_model(block_size):
    """Return a model with absolute positions, since digits stand at fixed places."""
    return GPT(common.gpt_config(pos='learned', n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                                 vocab_size=len(CHARS), block_size=block_size))


@torch.inference_mode()
def right_digits(model, lines, order):
    """Return whether each likeliest digit is right, (n, digits + 1), units first.

    The model reads the question and the right digits before each digit. Greedy decoding writes the
    right answer exactly where all digits are right.
    """
    model.eval()
    right = []
    for chunk in np.array_split(lines, -(-len(lines) // 5000)):
        x, y = sequences(chunk, order)
        right.append((model(x, y)[0].argmax(dim=-1) == y)[:, y[0] >= 0])
    right = torch.cat(right).numpy()
    return right if order == 'reversed' else right[:, ::-1]


def learn(order, run_seed, train_lines, val_lines):
    """Train on one order; return [(step, exact match), ...] and right_digits()."""
    torch.manual_seed(run_seed)  # both orders get the same initial weights and the same sums
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
    """Draw curves {order: [curve, ...]} and error shares {order: {group: share}}."""
    plt = common.pyplot()
    figure, (left, bars) = plt.subplots(1, 2, figsize=(9, 4.5), width_ratios=(5, 4))
    for order, color, label, place, shift in (
            ('plain', common.RED, '0579\nas we write it', (0.64, 0.25), -0.2),
            ('reversed', common.BLUE, '9750\nunits first', (0.17, 0.85), 0.2)):
        for curve in curves[order]:
            left.plot(*zip(*curve, strict=True), color=color, marker='.', alpha=0.8)
        shares = [wrong[order][name] for name in groups]
        drawn = bars.barh([i + shift for i in range(len(groups))], shares, 0.4, color=color)
        bars.bar_label(drawn, [f'{share:.1%}' for share in shares], color=color, fontsize=9,
                       padding=2)
        left.text(*place, f'123+456={label}', color=color, transform=left.transAxes)
    left.set(title='held-out sums answered right', xlabel='training step', ylim=(-0.03, 1.03))
    bars.set(title='wrong at the end (middle run)', yticks=range(len(groups)), yticklabels=groups)
    bars.invert_yaxis()
    bars.margins(x=0.15)
    bars.grid(visible=False, axis='y')
    for axis in (left.yaxis, bars.xaxis):
        axis.set_major_formatter(lambda value, _: f'{value:.0%}')
    return figure


def main():
    # read the sums
    common.start(out, threads=1)
    data_dir = datasets.folder_of(dataset)
    datasets.prepare_if_missing(data_dir, is_first=True)
    train_lines = read_sums(data_dir, 'train')[0]
    val_lines, a, b = read_sums(data_dir, 'val')
    digits = (val_lines.shape[1] - 4) // 3
    if n_train > len(train_lines):
        raise UserError(f'n_train={n_train}: expected 1 to {len(train_lines)}, the sums in train, '
                        f'or 0 for all')
    train_lines = train_lines[: n_train or None]
    print(f'{len(train_lines):,} sums to learn from, {len(val_lines):,} held out; '
          f'{sum(p.numel() for p in new_model(3 * digits + 2).parameters()):,} parameters')

    # train both orders
    curves, right = ({order: [] for order in ORDERS} for _ in range(2))
    for run_seed in range(seed, seed + seeds):
        for order in ORDERS:
            curve, digits_right = learn(order, run_seed, train_lines, val_lines)
            curves[order].append(curve)
            right[order].append(digits_right)
    exact = {order: [float(run.all(axis=1).mean()) for run in runs]
             for order, runs in right.items()}

    # sort the errors of the middle run by carries; a run that failed would hide the pattern
    middle = {order: right[order][np.argsort(exact[order])[seeds // 2]] for order in ORDERS}
    n_carries, n_nines = carries(a, b, digits).sum(axis=1), nines(a, b, digits)
    groups = {'all': n_carries >= 0}
    groups |= {f'{n} carr{"y" if n == 1 else "ies"}': n_carries == n for n in range(digits + 1)}
    groups |= {f'9 in {n or "no"} place{"s" * (n > 1)}': n_nines == n for n in range(digits)}
    wrong = {order: {name: float(1 - digits_right[members].all(axis=1).mean())
                     for name, members in groups.items()}
             for order, digits_right in middle.items()}
    by_place = {order: (1 - digits_right.mean(axis=0)).tolist()
                for order, digits_right in middle.items()}

    # report
    print('\nheld-out sums answered wrongly (middle run)')
    print(table([('', 'sums', *ORDERS),
                 *((name, f'{members.sum():,}', *(f'{wrong[order][name]:.3%}' for order in ORDERS))
                   for name, members in groups.items())]))
    print('\nwrong digits of its answers, given the right digits before them')
    print(table([('', *ORDERS), *((PLACES[i], *(f'{by_place[order][i]:.3%}' for order in ORDERS))
                                  for i in reversed(range(digits + 1)))]))
    common.save(draw(curves, wrong, list(groups)[1:]), out, 'addition')
    common.record(out, 'addition', exact=exact, curves=curves, wrong=wrong,
                  wrong_by_place=by_place)


if __name__ == '__main__':
    main()
