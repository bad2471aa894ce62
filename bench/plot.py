"""
Draw the loss curves of one or more runs into a PNG; bench.runs makes a page.

    $ python -m bench.plot out-shakespeare-char                        # writes loss.png
    $ python -m bench.plot out-a out-b --out=ab.png --x=time           # compare two runs by time

Reads out_dir/log.jsonl. Thin lines are the logged training loss, thick lines
its moving average; markers are evaluations on the val split. Each run's lowest
val loss is marked and named. Prints the lowest val loss of each run, then a
JSON line. Needs matplotlib: pip install -c constraints.txt -e '.[plot]'
"""

import json
import sys

from configurator import UserError, explain_errors
from data.encode import make_parser
from flatgpt import output
from flatgpt.logs import names_of, read_log

# the palette of Okabe and Ito, which colour-blind readers can tell apart; markers for grey prints
STYLES = [('#0072B2', 'o'), ('#D55E00', 's'), ('#009E73', '^'), ('#CC79A7', 'D'), ('#E69F00', 'v'),
          ('#56B4E9', 'P'), ('#000000', 'X')]
AXES = {'step': 'step', 'time': 'training time, without evaluations', 'tokens': 'tokens'}
SCALES = {'time': [(1, 's'), (60, 'min'), (3600, 'h')],
          'tokens': [(1, ''), (1e3, 'thousand'), (1e6, 'M'), (1e9, 'B')]}


def positions(train, val, axis):
    """Return the x of training records and of evaluations; these precede updates."""
    if axis == 'step':
        return [r['step'] for r in train], [r['step'] for r in val]
    if axis == 'time':
        return [r['train_time'] for r in train], [r['train_time'] for r in val]
    per_step = train[-1]['tokens'] / (train[-1]['step'] + 1) if train else 0
    return [r['tokens'] for r in train], [r['step'] * per_step for r in val]


def smooth(values, window):
    """Return a centred moving average of `window` values, of fewer near the ends."""
    half, sums = window // 2, [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    averages = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        averages.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return averages


def unit_of(runs, axis):
    """Return the size and the name of the unit of the x axis."""
    if axis not in SCALES:
        return 1, ''
    longest = max(x for _, train, val in runs for xs in positions(train, val, axis) for x in xs)
    return [scale for scale in SCALES[axis] if scale[0] * 3 <= longest or scale[0] == 1][-1]


def draw(folders, out, axis='step', ymax=None):
    """Draw the runs into `out`; return [{'run', 'steps', 'val_loss', 'step'}]."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is not installed: pip install -c constraints.txt -e '.[plot]'"
                        ) from None
    matplotlib.use('Agg')  # draws into files, needs no display
    from matplotlib import pyplot as plt

    names = names_of(folders)
    runs = [(name, *read_log(folder)) for name, folder in zip(names, folders, strict=True)]
    unit, unit_name = unit_of(runs, axis)
    figure, ax = plt.subplots(figsize=(9, 5.5), layout='constrained')
    summary, tops, lowest = [], [], []
    for i, (name, train, val) in enumerate(runs):
        color, marker = STYLES[i % len(STYLES)]
        train_x, val_x = ([x / unit for x in xs] for xs in positions(train, val, axis))
        losses = [r['loss'] for r in train]
        averaged = smooth(losses, max(1, len(losses) // 50))
        if train:
            ax.plot(train_x, losses, color=color, alpha=0.25, linewidth=0.6, zorder=1)
            ax.plot(train_x, averaged, color=color, linewidth=1.4, alpha=0.8, zorder=2,
                    label=f'{name}: train')
            tops.append(max(averaged[len(averaged) // 25 :]))  # the first steps may be cut off
        best = min(val, key=lambda r: r['val_loss']) if val else None
        if val:
            val_losses = [r['val_loss'] for r in val]
            every = max(1, len(val) // 40)  # overlapping markers would look like a thick line
            ax.plot(val_x, val_losses, color=color, linestyle='--', linewidth=1.4, marker=marker,
                    markersize=5, markevery=every, markeredgecolor='white', markeredgewidth=0.6,
                    zorder=3, label=f'{name}: val, lowest {best["val_loss"]:.4f}')
            tops.append(max(val_losses[1:] or val_losses))
            best_x = val_x[val.index(best)]
            ax.plot(best_x, best['val_loss'], marker=marker, markersize=10, color=color,
                    markeredgecolor='black', zorder=4)
            lowest.append((best['val_loss'], best_x, color))
        steps = max(r['step'] for r in train) + 1 if train else best['step']
        summary.append({'run': name, 'steps': steps, 'val_loss': best and best['val_loss'],
                        'step': best and best['step']})

    if lowest:  # label the lowest of all runs; the others, which may be close, are in the legend
        loss, x, color = min(lowest)
        ax.annotate(f'{loss:.4f}', (x, loss), xytext=(0, -12), textcoords='offset points',
                    ha='center', va='top', color=color, fontsize=12, fontweight='bold', zorder=5,
                    bbox={'facecolor': 'white', 'edgecolor': 'none', 'alpha': 0.8, 'pad': 1})
    bottom = min([r['loss'] for _, train, _ in runs for r in train] + [loss for loss, *_ in lowest])
    top = max(tops) if ymax is None else ymax
    if top > bottom:
        ax.set_ylim(bottom - 0.08 * (top - bottom), top + 0.04 * (top - bottom))
    ax.margins(x=0.02)
    ax.set_xlabel(f'{AXES[axis]} ({unit_name})' if unit_name else AXES[axis], fontsize=12)
    ax.set_ylabel('loss (nats a token)', fontsize=12)
    ax.tick_params(labelsize=11)
    ax.grid(alpha=0.25)
    ax.spines[['top', 'right']].set_visible(False)
    ax.legend(frameon=False, fontsize=11)
    try:
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:  # ValueError: an unknown suffix
        raise UserError(f'--out={out}: {error}') from None
    plt.close(figure)
    return summary


def main():
    sys.excepthook = explain_errors
    output.protect()
    parser = make_parser(__doc__)
    parser.add_argument('folders', nargs='+', help='out_dir of each run')
    parser.add_argument('--out', default='loss.png', help='the picture to write (loss.png)')
    parser.add_argument('--x', default='step', choices=AXES, help='horizontal axis (step)')
    parser.add_argument('--ymax', type=float, help='top of the picture (without the first steps)')
    args = parser.parse_args()

    summary = draw(args.folders, args.out, args.x, args.ymax)
    for run in summary:
        lowest = 'not evaluated'
        if run['val_loss']:
            lowest = f'lowest val loss {run["val_loss"]:.4f} at step {run["step"]}'
        print(f'{run["run"]}: {run["steps"]} steps, {lowest}')
    print(f'wrote {args.out}')
    print(json.dumps({'bench': 'plot', 'out': args.out, 'x': args.x, 'runs': summary}))


if __name__ == '__main__':
    main()
