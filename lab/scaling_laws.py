"""
Scaling laws from a grid of small runs: what loss a model of N parameters reaches on D tokens, and what to train next.

    $ python -m lab.scaling_laws                        # 12 minutes on two cores; killed, it goes on where it was
    $ python -m lab.scaling_laws --table=FILE.csv       # seconds: fits other people's runs, columns N, D and loss

Models of several sizes learn the bytes of Python's standard library (data/python_stdlib), each size with several
budgets of compute C = 6 N D ("IsoFLOP"). Their losses are fitted by L(N, D) = E + A / N^alpha + B / D^beta; bootstrap
over the runs says how sure that is. It predicts how large the best model for a larger budget is, and its loss; only
then is that model trained.

N are the FLOPs of a token's forward and backward pass over 6, attention and head included, after "DeepSeek LLM" (Bi et
al. 2024), so that C is 6 N D exactly; in models this small the embeddings, which are only looked up, are many of the
parameters, and would bend the curves (Pearce & Song 2024). Each run has a learning rate of its own that falls to 0 at
its end: a longer run looked at on the way is worse than one that was to end there, which is why earlier laws (Kaplan et
al. 2020) wanted larger models and fewer tokens.

Expect (AMD EPYC): E = 0.93, alpha = 0.51, beta = 0.39; the best N grows as C^0.43 by the law, as C^0.47 by the valleys;
for 6e12 FLOPs, three times the grid's largest budget, a loss of 1.300 predicted, and 1.288 and 1.294 reached.

Source: "Training Compute-Optimal Large Language Models", Hoffmann et al. 2022, approaches 2 and 3; "Chinchilla Scaling:
A replication attempt", Besiroglu et al. 2024. Needs '.[lab]'.
"""

import math
import os
import sys
import time
from functools import cache
from itertools import product

import numpy as np
import torch

from bench.common import table as aligned
from config.presets import PRESETS
from configurator import explain_errors, override
from data.datasets import folder_of, load_meta, prepare_if_missing
from data.tokens import even_windows, gather, open_tokens, train_windows
from flatgpt import jsonl
from flatgpt.files import lock_folder, unlock
from lab import common, law
from model import GPT, GPTConfig
from tokenizer.workers import Workers, core_count

# settings ------------------------------------------------------------------------------------------------------------
seed = 1337
out = 'out-lab'  # folder of the picture and the numbers; of the finished runs, too
table = ''  # a CSV of runs to fit instead of own ones: columns N, loss, and D (tokens) or C (FLOPs)
leave_out = 0  # rows of it with the highest losses that are left out
dataset = 'python_stdlib'  # in data/, of more tokens than a run sees
budgets = '1.25e11,2.5e11,5e11,1e12,2e12'  # FLOPs of the grid's runs
widths = '16,32,48,64,80,96'  # channels of their models, in heads of 16
ratios = '1.5,120'  # fewest and most tokens for each of N that a run of the grid may have
larger = 3.0  # FLOPs of the held-out run, in those of the largest budget; 0: no such run
seeds = 2  # of the held-out run
n_layer = 3
block_size = 64
batch_size = 8
val_windows = 2048  # windows of the val split on which all are compared
bootstraps = 400
processes = 0  # runs at a time, each on a core of its own; 0: as many as there are cores
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------


# runs -----------------------------------------------------------------------------------------------------------------


@cache
def data():
    """-> tokens of train and val, mapped from disk, and how many ids there are."""
    folder = folder_of(dataset)
    meta = load_meta(folder)
    if meta['vocab_size'] is None:
        raise SystemExit(f'--dataset={dataset}: its meta.json, which says the vocabulary, is missing; expected one of '
                         f'prepare.py')
    return *(open_tokens(folder, split, meta, block_size) for split in ('train', 'val')), meta['vocab_size']


def config_of(width):
    """A model of the family: one depth for all, since in models so flat another layer would be a jump."""
    return GPTConfig(**{**PRESETS['modern'], 'mlp': 'relu2', 'n_layer': n_layer, 'n_head': width // 16,
                        'n_embd': width, 'block_size': block_size, 'vocab_size': data()[2]})


@cache
def size_of(width):
    """-> N: FLOPs to train on a token, over 6."""
    with torch.device('meta'):
        return GPT(config_of(width)).flops_per_token() / 6


def job_of(width, C, seed):
    """A run of about C FLOPs: all that its loss depends on, and what it costs."""
    N = size_of(width)
    steps = max(1, round(C / 6 / N / batch_size / block_size))
    return {'dataset': dataset, 'n_layer': n_layer, 'width': width, 'steps': steps, 'batch_size': batch_size,
            'block_size': block_size, 'val_windows': val_windows, 'seed': seed, 'N': N,
            'D': steps * batch_size * block_size, 'C': C}


def learn(job):
    """Train a model on one core, and append its run with the loss on val to the file of runs as soon as it is done."""
    common.start(out, seed)
    torch.set_num_threads(1)
    torch.manual_seed(job['seed'])
    train, val, n_ids = data()
    model = GPT(config_of(job['width']))
    started = said = time.perf_counter()
    name = f"width {job['width']:>3}, N {job['N']:>9,.0f}, D {job['D']:>10,}"

    def get_batch(step):
        starts = train_windows(step, batch_size, len(train), block_size, job['seed'])
        return gather(train, starts, block_size, n_ids)

    for step, loss in common.train(model, get_batch, job['steps']):
        if time.perf_counter() - said > 30:
            said = time.perf_counter()
            print(f'{name}: step {step:,} of {job["steps"]:,}, loss {loss:.3f}', flush=True)
    model.eval()
    losses = []
    with torch.no_grad():
        for window in even_windows(val_windows, len(val), block_size).reshape(-1, 64):
            losses.append(model(*gather(val, window, block_size, n_ids))[1].item())
    run = {**job, 'loss': float(np.mean(losses)), 'seconds': round(time.perf_counter() - started, 1)}
    with open(runs_file(), 'ab') as f:
        f.write(jsonl.to_line(run))  # one write, so that the lines of two processes do not mix
    print(f'{name}: loss {run["loss"]:.4f}, {run["seconds"]:.0f} s', flush=True)


def runs_file():
    return os.path.join(out, 'scaling_laws.jsonl')


def finished(jobs):
    """-> of each job the run with its loss, or None; a line that was only half written is cut off the file."""
    with open(runs_file(), 'r+b') as f:
        lines = f.read().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b'\n')]
        f.truncate(sum(map(len, whole)))
    runs = jsonl.read_objects(runs_file()).values()
    return [next((run for run in runs if job.items() <= run.items()), None) for job in jobs]


def complete(jobs):
    """-> the runs of the jobs; those that are not in the file of runs yet are trained, the longest first."""
    missing = [job for job, run in zip(jobs, finished(jobs), strict=True) if run is None]
    missing.sort(key=lambda job: -job['D'] * job['N'] ** 0.5)  # about the time
    count = min(processes or core_count(), len(missing))
    flops = sum(job['C'] for job in missing)
    minutes = flops / max(1, count) / 1.9e10 / 60  # FLOP/s of a core of an AMD EPYC, with models as small as these
    print(f'{len(jobs)} runs, {len(missing)} to do: {power(flops)} FLOPs, about {minutes:.0f} minutes', flush=True)
    if count > 1:
        with Workers(count) as pool:
            for _ in pool.map(learn, missing):
                pass
    else:
        for job in missing:
            learn(job)
    return finished(jobs)


def grid():
    """-> the jobs of all budgets and sizes with a sensible number of tokens for the size."""
    prepare_if_missing(folder_of(dataset), True)
    os.makedirs(out, exist_ok=True)
    open(runs_file(), 'ab').close()
    fewest, most = numbers('ratios')
    jobs = [job_of(width, C, seed) for C, width in product(numbers('budgets'), numbers('widths', int))]
    jobs = [job for job in jobs if fewest <= job['D'] / job['N'] <= most]
    if len(jobs) < 6:
        raise SystemExit(f'--budgets={budgets} --widths={widths} --ratios={ratios}: {len(jobs)} runs; five '
                         f'coefficients need 6 or more')
    if max(job['D'] for job in jobs) > len(data()[0]):
        print(f'note: {dataset} has {len(data()[0]):,} tokens; runs that repeat them are worse than the law says')
    return jobs


# fits and pictures ----------------------------------------------------------------------------------------------------


def report(best, samples, others=()):
    """Print the coefficients, the range of 95% of the bootstraps, and others' [(name, values)]; -> figures."""
    low, high = np.percentile(samples, [2.5, 97.5], axis=0)
    rows = [['', 'fit', '95% of bootstraps', *(name for name, _ in others)]]
    rows += [[name, f'{best[i]:.4g}', f'{low[i]:.4g} to {high[i]:.4g}', *(f'{values[i]:g}' for _, values in others)]
             for i, name in enumerate(law.NAMES)]
    print(f'\nL(N, D) = E + A / N^alpha + B / D^beta\n\n{aligned(rows)}')
    return {key: dict(zip(law.NAMES, map(float, values), strict=True))
            for key, values in (('fit', best), ('low', low), ('high', high))}


def fit_table(plt):
    """Fit the runs of a CSV and set what comes of it beside the published coefficients."""
    N, D, loss = law.read_table(table, leave_out)
    best = law.fit(N, D, loss)
    samples = law.bootstrap(N, D, loss, best, bootstraps, seed)
    others = [('Hoffmann 2022', law.HOFFMANN), ('Besiroglu 2024', law.BESIROGLU)]
    figures = report(best, samples, others)
    off = (np.array(best) - law.BESIROGLU) / law.BESIROGLU_ERRORS
    print(f'\n{len(N)} runs; away from Besiroglu et al., in their standard errors:\n'
          + ', '.join(f'{name} {value:+.2f}' for name, value in zip(law.NAMES, off, strict=True)))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5))
    C = np.geomspace(6 * (N * D).min(), 1000 * 6 * (N * D).max(), 60)
    dots = left.scatter(6 * N * D, loss, c=N, cmap='viridis', norm='log', s=12)
    figure.colorbar(dots, ax=left, label='parameters N')
    left.plot(C, law.loss_of(best, *law.best_size(best, C)), color=common.BLACK)
    left.set(xscale='log', xlabel='compute C, FLOPs', ylabel='loss, nats a token', title='Runs, and the best loss by '
             'the fit', ylim=(0.9 * loss.min(), 1.02 * np.percentile(loss, 99)))

    def ratio(coefficients):
        n, d = law.best_size(coefficients, C)
        return d / n

    right.fill_between(C, *np.percentile([ratio(c) for c in samples], [2.5, 97.5], axis=0), color=common.BLUE,
                       alpha=0.2, linewidth=0)
    for (name, values), color in zip([('this fit', best), *others], common.COLORS, strict=False):
        right.plot(C, ratio(values), color=color, linestyle='-' if name == 'this fit' else '--', label=name)
    right.set(xscale='log', yscale='log', xlabel='compute C, FLOPs', title='Best tokens for each parameter, D / N')
    right.legend()
    common.save(figure, out, 'scaling_laws_table')
    common.record(out, 'scaling_laws_table', runs=len(N), **figures)


def thousands(n):
    """57568 -> '58k', 3000000 -> '3,000k'"""
    return f'{n / 1e3:,.0f}k'


def power(C):
    """2000000000000.0 -> '2e12'"""
    return f'{C:.3g}'.replace('e+', 'e')


def draw(plt, runs, best, samples, valleys, held_out):
    """Side by side: the law through the runs, the valley of each budget, and the prediction beside what came of it."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.6, 4.5), sharey=True)
    N, D, C, loss = (np.array([run[key] for run in runs]) for key in ('N', 'D', 'C', 'loss'))
    colors = plt.get_cmap('viridis')
    for i, size in enumerate(sizes := np.unique(N)):
        mine, color = N == size, colors(0.9 * i / len(sizes))
        tokens = np.geomspace(D[mine].min(), D[mine].max(), 30)
        left.plot(tokens, law.loss_of(best, size, tokens), color=color)
        left.plot(D[mine], loss[mine], 'o', color=color, markersize=4)
        left.annotate(thousands(size), (D[mine].min(), loss[mine].max()), (-6, -3), color=color, fontsize=8,
                      textcoords='offset points', ha='right')
    left.set(title='The runs of each size N, the law', xlabel='tokens D', ylabel='loss on val, nats a byte')
    for i, budget in enumerate(budgets_of := np.unique(C)):
        mine, color = C == budget, colors(0.9 * i / len(budgets_of))
        middle.plot(N[mine], loss[mine], 'o', color=color, markersize=4)
        if mine.sum() > 2:
            size = np.geomspace(N[mine].min(), N[mine].max(), 30)
            middle.plot(size, np.polyval(np.polyfit(np.log(N[mine]), loss[mine], 2), np.log(size)), color=color)
        middle.annotate(power(budget), (N[mine].max(), loss[mine][N[mine].argmax()]), (5, -3), color=color,
                        fontsize=8, textcoords='offset points')
    for _, size, low in valleys:
        middle.plot(size, low, '*', color=common.RED, markersize=11)
    middle.set(title='The best size for each budget C', xlabel='size N, FLOPs a token / 6')
    compute = np.geomspace(C.min(), 1.5 * max([C.max(), *(run['C'] for run in held_out)]), 40)
    best_losses = [law.loss_of(c, *law.best_size(c, compute)) for c in samples]
    right.fill_between(compute, *np.percentile(best_losses, [2.5, 97.5], axis=0), color=common.BLUE, alpha=0.2,
                       linewidth=0)
    right.plot(compute, law.loss_of(best, *law.best_size(best, compute)), color=common.BLUE)
    right.plot(C, loss, 'o', color='0.7', markersize=4)
    for run in held_out:
        right.plot(run['C'], run['loss'], '*', color=common.RED, markersize=12)
    if held_out:
        predicted = law.loss_of(best, held_out[0]['N'], held_out[0]['D'])
        measured = ', '.join(f'{run["loss"]:.3f}' for run in held_out)
        text = f'predicted {predicted:.3f},\nthen trained:\n{measured}'
        right.annotate(text, (held_out[0]['C'], predicted), (-25, -6), ha='right', va='center',
                       textcoords='offset points', color=common.RED)
    right.set(title='The best loss for a budget', xlabel='compute C, FLOPs')
    for ax, form in ((left, thousands), (middle, thousands), (right, power)):
        ax.set_xscale('log')
        ax.margins(x=0.18)
        low, high = ax.get_xlim()
        ticks = [m * 10**e for e in range(3, 30) for m in (1, 3) if low < m * 10**e < high]
        ax.set_xticks(ticks, [form(tick) for tick in ticks])
        ax.minorticks_off()
    common.save(figure, out, 'scaling_laws')


# ----------------------------------------------------------------------------------------------------------------------


def numbers(name, kind=float):
    """Of a setting such as '1e12,2e12' the numbers; SystemExit for what are no numbers above 0."""
    try:
        values = sorted({kind(part) for part in config[name].split(',')})
    except ValueError:
        values = [0]
    if not 0 < values[0] <= values[-1] < math.inf:
        raise SystemExit(f'--{name}={config[name]}: expected {"whole " if kind is int else ""}numbers above 0 with '
                         f'commas between them')
    return values


def check_settings():
    """SystemExit for a number out of its range."""
    for name, least in (('n_layer', 1), ('block_size', 1), ('batch_size', 1), ('val_windows', 64), ('seeds', 1),
                        ('bootstraps', 20), ('leave_out', 0), ('processes', 0), ('larger', 0)):
        if not least <= config[name] < math.inf:
            raise SystemExit(f'--{name}={config[name]}: expected {least} or more')
    if val_windows % 64:
        raise SystemExit(f'--val_windows={val_windows}: expected a multiple of 64, which are evaluated at once')
    if any(width % 16 for width in numbers('widths', int)):
        raise SystemExit(f'--widths={widths}: expected multiples of 16, the channels of a head')
    if len(numbers('ratios')) != 2:
        raise SystemExit(f'--ratios={ratios}: expected the fewest and the most tokens for each of N, such as 1,120')


def hold_out(best, samples):
    """Predict the best run of a larger budget, say so, and only then train it; -> its runs, the prediction."""
    C = larger * max(numbers('budgets'))
    target = law.best_size(best, C)[0]
    width = min(range(16, 513, 16), key=lambda width: abs(math.log(size_of(width) / target)))
    jobs = [job_of(width, C, seed + i) for i in range(seeds)]
    N, D = jobs[0]['N'], jobs[0]['D']
    predicted = law.loss_of(best, N, D)
    low, high = np.percentile([law.loss_of(c, N, D) for c in samples], [2.5, 97.5])
    print(f'\nBest for {power(C)} FLOPs: N = {target:,.0f}. The nearest model:\n'
          f'width {width}, N = {N:,.0f}, on D = {D:,} tokens. Its predicted loss:\n'
          f'{predicted:.4f}, {low:.4f} to {high:.4f} by 95% of the bootstraps. Now it is trained:', flush=True)
    runs = complete(jobs)
    for run in runs:
        print(f'seed {run["seed"]}: loss {run["loss"]:.4f}, {run["loss"] / predicted - 1:+.2%} beside the prediction')
    return runs, {'predicted': predicted, 'low': float(low), 'high': float(high), 'best_size': target, 'C': C}


def main():
    check_settings()
    common.start(out, seed)
    plt = common.pyplot()
    if table:
        fit_table(plt)
        return
    jobs = grid()
    lock = lock_folder(runs_file(), 'training the runs of')
    runs = complete(jobs)
    N, D, loss = (np.array([run[key] for run in runs]) for key in ('N', 'D', 'loss'))
    best = law.fit(N, D, loss)
    samples = law.bootstrap(N, D, loss, best, bootstraps, seed)
    figures = report(best, samples)
    rows, valleys = [['FLOPs', 'best N: parabola', 'law', 'D / N by the law', 'loss: parabola', 'law']], []
    for C in numbers('budgets'):
        bottom = law.valley(*(np.array([run[key] for run in runs if run['C'] == C]) for key in ('N', 'loss')))
        size, tokens = law.best_size(best, C)
        valleys += [(C, *bottom)] if bottom else []
        rows.append([power(C), f'{bottom[0]:,.0f}' if bottom else '-', f'{size:,.0f}', f'{tokens / size:.1f}',
                     f'{bottom[1]:.4f}' if bottom else '-', f'{law.loss_of(best, size, tokens):.4f}'])
    print(f'\n{aligned(rows)}')
    figures['exponent'] = {'law': best[4] / (best[3] + best[4])}  # of best N over C
    if len(valleys) > 1:
        figures['exponent']['parabolas'] = float(np.polyfit(*np.log([v[:2] for v in valleys]).T, 1)[0])
    print('the best N grows as C to the power of '
          + ' or '.join(f'{power:.2f} ({name})' for name, power in figures['exponent'].items()))
    held_out = []
    if larger:
        held_out, figures['prediction'] = hold_out(best, samples)
    draw(plt, runs, best, samples, valleys, held_out)
    common.record(out, 'scaling_laws', **figures, valleys=valleys, runs=runs, held_out=held_out)
    unlock(lock)


if __name__ == '__main__':
    sys.excepthook = explain_errors
    main()
