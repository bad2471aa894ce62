"""
Draw the loss curves of one or more runs into a PNG.

    $ python -m bench.plot out-shakespeare-char                        # writes loss.png
    $ python -m bench.plot out-a out-b --out=ab.png --x=time           # compare two runs by training time

Reads out_dir/log.jsonl. Thin lines are the training loss as it was logged, thick ones its moving average; markers are
evaluations on the val split, and each run's lowest is marked and named. Prints the lowest val loss of each run, then
a JSON line. Needs matplotlib: pip install -c constraints.txt -e '.[plot]'
"""

import argparse
import json
import math
import os

# Okabe and Ito's colours, told apart by colour-blind readers too; the markers differ for those who print in grey
STYLES = [('#0072B2', 'o'), ('#D55E00', 's'), ('#009E73', '^'), ('#CC79A7', 'D'), ('#E69F00', 'v'), ('#56B4E9', 'P'),
          ('#000000', 'X')]
AXES = {'step': 'step', 'time': 'training time, without evaluations', 'tokens': 'tokens'}
SCALES = {'time': [(1, 's'), (60, 'min'), (3600, 'h')], 'tokens': [(1, ''), (1e3, 'thousand'), (1e6, 'M'), (1e9, 'B')]}


def read_log(folder):
    """
    out_dir -> (training records, evaluations), each a list of dicts, from its log.jsonl. Half a line at the end, which
    a killed run leaves, is dropped as train.py does. SystemExit for a log that is missing, damaged or empty.
    """
    path = os.path.join(folder, 'log.jsonl')
    if not os.path.isfile(path):
        raise SystemExit(f'{path} does not exist; expected the out_dir of a run of train.py')
    train, val = [], []
    with open(path, encoding='utf-8', errors='replace') as f:
        for number, line in enumerate(f, start=1):
            if not line.endswith('\n'):
                break
            try:
                record = json.loads(line)
                finite = math.isfinite(record['step'] + record['val_loss' if 'val_loss' in record else 'loss'])
            except (ValueError, KeyError, TypeError) as error:
                raise SystemExit(f'{path}, line {number} is damaged ({type(error).__name__}: {error}): {line[:60]!r}. '
                                 f'Remove that line to draw the rest') from None
            if finite:
                (val if 'val_loss' in record else train).append(record)
    if not train and not val:
        raise SystemExit(f'{path} holds no losses yet')
    return train, val


def positions(train, val, axis):
    """-> x of the training records, x of the evaluations. An evaluation at step n stands before update n."""
    if axis == 'step':
        return [r['step'] for r in train], [r['step'] for r in val]
    if axis == 'time':
        return [r['train_time'] for r in train], [r['train_time'] for r in val]
    per_step = train[-1]['tokens'] / (train[-1]['step'] + 1) if train else 0
    return [r['tokens'] for r in train], [r['step'] * per_step for r in val]


def smooth(values, window):
    """Centred moving average over `window` values, fewer towards the ends so that it lags nowhere."""
    half, sums = window // 2, [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    averages = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        averages.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return averages


def names_of(folders):
    """Legend names: the folders' own names, or the paths as given where two would be the same."""
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    return names if len(set(names)) == len(names) else folders


def draw(folders, out, axis='step', ymax=None):
    """Draw the runs into the file `out`; -> [{'run', 'steps', 'val_loss', 'step'}], the lowest val loss of each."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("matplotlib is not installed: pip install -c constraints.txt -e '.[plot]'") from None
    matplotlib.use('Agg')  # writes files, needs no display
    from matplotlib import pyplot as plt

    runs = [(name, *read_log(folder)) for name, folder in zip(names_of(folders), folders, strict=True)]
    unit, unit_name = 1, ''
    if axis in SCALES:
        longest = max(x for _, train, val in runs for xs in positions(train, val, axis) for x in xs)
        unit, unit_name = [scale for scale in SCALES[axis] if scale[0] * 3 <= longest or scale[0] == 1][-1]

    figure, ax = plt.subplots(figsize=(9, 5.5), layout='constrained')
    summary, tops, lowest = [], [], []
    for i, (name, train, val) in enumerate(runs):
        color, marker = STYLES[i % len(STYLES)]
        train_x, val_x = ([x / unit for x in xs] for xs in positions(train, val, axis))
        losses = [r['loss'] for r in train]
        averaged = smooth(losses, max(1, len(losses) // 50))
        if train:
            ax.plot(train_x, losses, color=color, alpha=0.25, linewidth=0.6, zorder=1)
            ax.plot(train_x, averaged, color=color, linewidth=1.4, alpha=0.8, zorder=2, label=f'{name}: train')
            tops.append(max(averaged[len(averaged) // 25 :]))  # the plunge of the first steps may leave the picture
        best = min(val, key=lambda r: r['val_loss']) if val else None
        if val:
            val_losses = [r['val_loss'] for r in val]
            every = max(1, len(val) // 40)  # markers that touch would read as a thick line
            ax.plot(val_x, val_losses, color=color, linestyle='--', linewidth=1.4, marker=marker, markersize=5,
                    markevery=every, markeredgecolor='white', markeredgewidth=0.6, zorder=3,
                    label=f'{name}: val, lowest {best["val_loss"]:.4f}')
            tops.append(max(val_losses[1:] or val_losses))
            ax.plot(val_x[val.index(best)], best['val_loss'], marker=marker, markersize=10, color=color,
                    markeredgecolor='black', zorder=4)
        steps = max(r['step'] for r in train) + 1 if train else best['step']
        summary.append({'run': name, 'steps': steps, 'val_loss': best and best['val_loss'],
                        'step': best and best['step']})
        if best:
            lowest.append((best['val_loss'], val_x[val.index(best)], color))

    if lowest:  # the lowest of all runs has its number beside it, the others theirs in the legend: those may be close
        loss, x, color = min(lowest)
        ax.annotate(f'{loss:.4f}', (x, loss), xytext=(0, -12), textcoords='offset points', ha='center', va='top',
                    color=color, fontsize=12, fontweight='bold', zorder=5,
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
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no picture's
        raise SystemExit(f'--out={out}: {error}') from None
    plt.close(figure)
    return summary


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('folders', nargs='+', help='out_dir of a run; several are drawn into one picture')
    parser.add_argument('--out', default='loss.png', help='the picture to write (loss.png)')
    parser.add_argument('--x', default='step', choices=AXES, help='horizontal axis (step)')
    parser.add_argument('--ymax', type=float, help='top of the picture; else the first few percent may leave it')
    args = parser.parse_args()

    summary = draw(args.folders, args.out, args.x, args.ymax)
    for run in summary:
        lowest = f'lowest val loss {run["val_loss"]:.4f} at step {run["step"]}' if run['val_loss'] else 'not evaluated'
        print(f'{run["run"]}: {run["steps"]} steps, {lowest}')
    print(f'wrote {args.out}')
    print(json.dumps({'bench': 'plot', 'out': args.out, 'x': args.x, 'runs': summary}))


if __name__ == '__main__':
    main()
