"""
Fit a scaling law to a grid of small runs, predict a larger run, and train it.

    $ python -m lab.scaling_laws                        # 12 minutes on two cores; resumes if killed
    $ python -m lab.scaling_laws --table=FILE.csv       # fit published runs: columns N, D and loss

Models of several sizes train on the bytes of Python's standard library (data/python_stdlib), each
size with several budgets of compute C = 6 N D ("IsoFLOP"). The losses are fitted by L(N, D) = E +
A / N^alpha + B / D^beta; a bootstrap over the runs gives the uncertainty. The law predicts the
best size for a larger budget, and its loss. Only then that model is trained.

N is the FLOPs of a token's forward and backward pass divided by 6, attention and head included,
after "DeepSeek LLM" (Bi et al. 2024). So C is 6 N D exactly. In models this small many parameters
are embeddings, which cost no FLOPs and would bend the curves (Pearce & Song 2024). Each run has
its own learning-rate schedule that ends at 0: an intermediate loss of a longer run would be
worse. For this reason earlier laws (Kaplan et al. 2020) recommended larger models and fewer
tokens.

Expected (AMD EPYC): E = 0.93, alpha = 0.51, beta = 0.39. The best N grows as C^0.43 by the law,
as C^0.47 by the parabolas. For 6e12 FLOPs, three times the largest budget of the grid, the law
predicts a loss of 1.300; the runs reached 1.288 and 1.294.

Source: "Training Compute-Optimal Large Language Models", Hoffmann et al. 2022, approaches 2 and 3;
"Chinchilla Scaling: A replication attempt", Besiroglu et al. 2024. Needs '.[lab]'.
"""

import math
import os
import time
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch

from bench.common import cut_half_line
from bench.common import table as aligned
from configurator import Count, Natural, NonNegative, Seed, UserError, override
from data import datasets
from data import tokens as data
from flatgpt import jsonl
from flatgpt.files import lock_folder, unlock
from lab import common, law
from model import GPT
from tokenizer.workers import Workers, core_count

# Settings -----------------------------------------------------------------------------------------
seed: Seed = 1337
out = 'out-lab'  # folder of the picture, the numbers and the finished runs
table = ''  # a CSV of runs to fit instead: columns N, loss, and D (tokens) or C (FLOPs)
leave_out: Natural = 0  # rows of it with the highest losses to leave out
dataset = 'python_stdlib'  # in data/, with more tokens than a run reads
budgets = '1.25e11,2.5e11,5e11,1e12,2e12'  # FLOPs of the grid's runs
widths = '16,32,48,64,80,96'  # channels of their models, in heads of 16
ratios = '1.5,120'  # fewest and most tokens per N of a run in the grid
larger: NonNegative = 3.0  # FLOPs of the held-out run, in largest budgets; 0: no such run
seeds: Count = 2  # of the held-out run
n_layer: Count = 3
block_size: Count = 64
batch_size: Count = 8
val_windows: Count = 2048  # windows of the val split in each evaluation, a multiple of 64
bootstraps: Count = 400
processes: Natural = 0  # runs in parallel, one core each; 0: one per core
config = override(globals())
# --------------------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """The coefficients of the law: the best fit, and (n, 5) of bootstraps."""

    best: tuple
    samples: np.ndarray

    def interval(self, f):
        """Return the range that holds f(coefficients) in 95% of the bootstraps."""
        return np.percentile([f(c) for c in self.samples], [2.5, 97.5], axis=0)


def fit(runs):
    best = law.fit(runs)
    return Fit(best, law.bootstrap(runs, best, bootstraps, seed))


def columns(runs):
    """Return the law.Runs of a list of run records."""
    return law.Runs(*(np.array([run[key] for run in runs]) for key in ('N', 'D', 'loss')))


# Runs ---------------------------------------------------------------------------------------------


@cache
def splits():
    """Return the tokens of train and of val, and the vocabulary size."""
    folder = datasets.folder_of(dataset)
    meta = datasets.load_meta(folder)
    if meta['vocab_size'] is None:
        raise UserError(f'--dataset={dataset}: meta.json with the vocabulary size is missing; '
                        f'expected a dataset of a prepare.py')
    train, val = (data.open_tokens(folder, split, meta, block_size) for split in ('train', 'val'))
    return train, val, meta['vocab_size']


def config_of(width):
    """Return the GPTConfig of a width; one depth for all keeps size steps small."""
    return common.gpt_config(mlp='relu2', n_layer=n_layer, n_head=width // 16, n_embd=width,
                             block_size=block_size, vocab_size=splits()[2])


@cache
def size_of(width):
    """Return N: the training FLOPs of a token, divided by 6."""
    with torch.device('meta'):
        return GPT(config_of(width)).flops_per_token() / 6


def job_of(width, C, seed):
    """Describe a run of about C FLOPs: what its loss depends on, and its cost."""
    N = size_of(width)
    steps = max(1, round(C / 6 / N / batch_size / block_size))
    return {'dataset': dataset, 'n_layer': n_layer, 'width': width, 'steps': steps,
            'batch_size': batch_size, 'block_size': block_size, 'val_windows': val_windows,
            'seed': seed, 'N': N, 'D': steps * batch_size * block_size, 'C': C}


def learn(job):
    """Train a model on one core, and append its run to the file of runs."""
    common.start(out, threads=1)
    torch.manual_seed(job['seed'])
    train, val, n_ids = splits()
    model = GPT(config_of(job['width']))
    started = reported = time.perf_counter()
    name = f"width {job['width']:>3}, N {job['N']:>9,.0f}, D {job['D']:>10,}"

    def get_batch(step):
        first = step * batch_size
        starts = data.train_windows(first, batch_size, len(train), block_size, job['seed'])
        return data.gather(train, starts, block_size, n_ids)

    for step, loss in common.train(model, get_batch, job['steps']):
        if time.perf_counter() - reported > 30:
            reported = time.perf_counter()
            print(f'{name}: step {step:,} of {job["steps"]:,}, loss {loss:.3f}', flush=True)
    model.eval()
    losses = []
    with torch.no_grad():
        for window in data.even_windows(val_windows, len(val), block_size).reshape(-1, 64):
            losses.append(model(*data.gather(val, window, block_size, n_ids))[1].item())
    seconds = time.perf_counter() - started
    run = {**job, 'loss': float(np.mean(losses)), 'seconds': round(seconds, 1)}
    with open(runs_file(), 'ab') as f:
        f.write(jsonl.to_line(run))  # one write: lines of two processes do not mix
    print(f'{name}: loss {run["loss"]:.4f}, {run["seconds"]:.0f} s', flush=True)


def runs_file():
    return os.path.join(out, 'scaling_laws.jsonl')


def finished(jobs):
    """Return each job's run with its loss, or None; cut off half a line at the end."""
    cut_half_line(runs_file())
    runs = jsonl.read_objects(runs_file()).values()
    return [next((run for run in runs if job.items() <= run.items()), None) for job in jobs]


def complete(jobs):
    """Train the missing jobs, the longest first; return the runs of all jobs."""
    missing = [job for job, run in zip(jobs, finished(jobs), strict=True) if run is None]
    missing.sort(key=lambda job: -job['D'] * job['N'] ** 0.5)  # about the time
    count = min(processes or core_count(), len(missing))
    flops = sum(job['C'] for job in missing)
    minutes = flops / max(1, count) / 1.9e10 / 60  # FLOP/s of an EPYC core with such small models
    print(f'{len(jobs)} runs, {len(missing)} to do: {power(flops)} FLOPs, '
          f'about {minutes:.0f} minutes', flush=True)
    if count > 1:
        with Workers(count) as pool:
            for _ in pool.map(learn, missing):
                pass
    else:
        for job in missing:
            learn(job)
    return finished(jobs)


def grid():
    """Return the jobs of all budgets and sizes whose tokens per N are within `ratios`."""
    datasets.prepare_if_missing(datasets.folder_of(dataset), True)
    open(runs_file(), 'ab').close()
    fewest, most = numbers('ratios')
    pairs = product(numbers('budgets'), numbers('widths', int))
    jobs = [job_of(width, C, seed) for C, width in pairs]
    jobs = [job for job in jobs if fewest <= job['D'] / job['N'] <= most]
    if len(jobs) < 6:
        raise UserError(f'--budgets={budgets} --widths={widths} --ratios={ratios}: {len(jobs)} '
                        f'runs; five coefficients need 6 or more')
    if max(job['D'] for job in jobs) > len(splits()[0]):
        print(f'note: {dataset} has {len(splits()[0]):,} tokens; runs that repeat tokens are worse '
              f'than the law predicts')
    return jobs


def hold_out(law_fit):
    """Print a prediction for a larger budget, and only then train that run."""
    C = larger * max(numbers('budgets'))
    target = law.best_size(law_fit.best, C)[0]
    width = min(range(16, 513, 16), key=lambda width: abs(math.log(size_of(width) / target)))
    jobs = [job_of(width, C, seed + i) for i in range(seeds)]
    N, D = jobs[0]['N'], jobs[0]['D']
    predicted = law.loss_of(law_fit.best, N, D)
    low, high = law_fit.interval(lambda c: law.loss_of(c, N, D))
    print(f'\nBest for {power(C)} FLOPs: N = {target:,.0f}. The nearest model:\n'
          f'width {width}, N = {N:,.0f}, on D = {D:,} tokens. Its predicted loss:\n'
          f'{predicted:.4f}, {low:.4f} to {high:.4f} by 95% of the bootstraps. Now it is trained:',
          flush=True)
    runs = complete(jobs)
    for run in runs:
        print(f'seed {run["seed"]}: loss {run["loss"]:.4f}, {run["loss"] / predicted - 1:+.2%} '
              f'against the prediction')
    return runs, {'predicted': predicted, 'low': float(low), 'high': float(high),
                  'best_size': target, 'C': C}


# Reports and pictures -----------------------------------------------------------------------------


def report(law_fit, others=()):
    """Print the coefficients, and others' [(name, values)]; return figures."""
    low, high = law_fit.interval(lambda c: c)
    rows = [['', 'fit', '95% of bootstraps', *(name for name, _ in others)]]
    rows += [[name, f'{law_fit.best[i]:.4g}', f'{low[i]:.4g} to {high[i]:.4g}',
              *(f'{values[i]:g}' for _, values in others)] for i, name in enumerate(law.NAMES)]
    print(f'\nL(N, D) = E + A / N^alpha + B / D^beta\n\n{aligned(rows)}')
    return {key: dict(zip(law.NAMES, map(float, values), strict=True))
            for key, values in (('fit', law_fit.best), ('low', low), ('high', high))}


def report_sizes(law_fit, runs):
    """Print best sizes by law and parabola; return the parabolas' bottoms, figures."""
    rows = [['FLOPs', 'best N: parabola', 'law', 'D / N by the law', 'loss: parabola', 'law']]
    valleys = []
    for C in numbers('budgets'):
        of_budget = columns([run for run in runs if run['C'] == C])
        bottom = law.valley(of_budget.N, of_budget.loss)
        size, tokens = law.best_size(law_fit.best, C)
        valleys += [(C, *bottom)] if bottom else []
        rows.append([power(C), f'{bottom[0]:,.0f}' if bottom else '-', f'{size:,.0f}',
                     f'{tokens / size:.1f}', f'{bottom[1]:.4f}' if bottom else '-',
                     f'{law.loss_of(law_fit.best, size, tokens):.4f}'])
    alpha, beta = law_fit.best[3:]
    exponents = {'law': beta / (alpha + beta)}  # of best N over C
    if len(valleys) > 1:
        log_C, log_N = np.log([valley[:2] for valley in valleys]).T
        exponents['parabolas'] = float(np.polyfit(log_C, log_N, 1)[0])
    print(f'\n{aligned(rows)}\nthe best N grows as C to the power of '
          + ' or '.join(f'{value:.2f} ({name})' for name, value in exponents.items()))
    return valleys, {'exponent': exponents}


def fit_table(plt):
    """Fit the runs of a CSV, and compare with the published coefficients."""
    runs = law.read_table(table, leave_out)
    law_fit = fit(runs)
    others = [('Hoffmann 2022', law.HOFFMANN), ('Besiroglu 2024', law.BESIROGLU)]
    figures = report(law_fit, others)
    off = (np.array(law_fit.best) - law.BESIROGLU) / law.BESIROGLU_ERRORS
    print(f'\n{len(runs.N)} runs; difference to Besiroglu et al., in their standard errors:\n'
          + ', '.join(f'{name} {value:+.2f}' for name, value in zip(law.NAMES, off, strict=True)))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5))
    N, D, loss = runs
    C = np.geomspace(6 * (N * D).min(), 1000 * 6 * (N * D).max(), 60)
    dots = left.scatter(6 * N * D, loss, c=N, cmap='viridis', norm='log', s=12)
    figure.colorbar(dots, ax=left, label='parameters N')
    left.plot(C, law.loss_of(law_fit.best, *law.best_size(law_fit.best, C)), color=common.BLACK)
    left.set(xscale='log', xlabel='compute C, FLOPs', ylabel='loss, nats a token',
             title='Runs, and the best loss by the fit',
             ylim=(0.9 * loss.min(), 1.02 * np.percentile(loss, 99)))

    def ratio(coefficients):
        n, d = law.best_size(coefficients, C)
        return d / n

    right.fill_between(C, *law_fit.interval(ratio), color=common.BLUE, alpha=0.2, linewidth=0)
    laws = [('this fit', law_fit.best), *others]
    for (name, values), color in zip(laws, common.COLORS, strict=False):
        right.plot(C, ratio(values), color=color, linestyle='-' if name == 'this fit' else '--',
                   label=name)
    right.set(xscale='log', yscale='log', xlabel='compute C, FLOPs',
              title='Best tokens for each parameter, D / N')
    right.legend()
    common.save(figure, out, 'scaling_laws_table')
    common.record(out, 'scaling_laws_table', runs=len(N), **figures)


def thousands(n):
    """Format 57568 as '58k', 3000000 as '3,000k'."""
    return f'{n / 1e3:,.0f}k'


def power(C):
    """Format 2000000000000.0 as '2e12'."""
    return f'{C:.3g}'.replace('e+', 'e')


def groups_of(values, plt):
    """Yield (value, mask, color) for each distinct value."""
    distinct, colors = np.unique(values), plt.get_cmap('viridis')
    for i, value in enumerate(distinct):
        yield value, values == value, colors(0.9 * i / len(distinct))


def draw_law(ax, plt, runs, best):
    """Draw the runs of each size against their tokens, and the law through them."""
    N, D, loss = columns(runs)
    for size, mask, color in groups_of(N, plt):
        tokens = np.geomspace(D[mask].min(), D[mask].max(), 30)
        ax.plot(tokens, law.loss_of(best, size, tokens), color=color)
        ax.plot(D[mask], loss[mask], 'o', color=color, markersize=4)
        ax.annotate(thousands(size), (D[mask].min(), loss[mask].max()), (-6, -3), color=color,
                    fontsize=8, textcoords='offset points', ha='right')
    ax.set(title='The runs of each size N, the law', xlabel='tokens D',
           ylabel='loss on val, nats a byte')


def draw_valleys(ax, plt, runs, valleys):
    """Draw the runs of each budget against size, and the parabolas."""
    N, _, loss = columns(runs)
    for budget, mask, color in groups_of(np.array([run['C'] for run in runs]), plt):
        ax.plot(N[mask], loss[mask], 'o', color=color, markersize=4)
        if mask.sum() > 2:
            size = np.geomspace(N[mask].min(), N[mask].max(), 30)
            parabola = np.polyfit(np.log(N[mask]), loss[mask], 2)
            ax.plot(size, np.polyval(parabola, np.log(size)), color=color)
        ax.annotate(power(budget), (N[mask].max(), loss[mask][N[mask].argmax()]), (5, -3),
                    color=color, fontsize=8, textcoords='offset points')
    for _, size, low in valleys:
        ax.plot(size, low, '*', color=common.RED, markersize=11)
    ax.set(title='The best size for each budget C', xlabel='size N, FLOPs a token / 6')


def draw_prediction(ax, runs, law_fit, held_out):
    """Draw the best loss against the budget, and the held-out runs."""
    C = np.array([run['C'] for run in runs])
    compute = np.geomspace(C.min(), 1.5 * max([C.max(), *(run['C'] for run in held_out)]), 40)

    def best_loss(coefficients):
        return law.loss_of(coefficients, *law.best_size(coefficients, compute))

    ax.fill_between(compute, *law_fit.interval(best_loss), color=common.BLUE, alpha=0.2,
                    linewidth=0)
    ax.plot(compute, best_loss(law_fit.best), color=common.BLUE)
    ax.plot(C, columns(runs).loss, 'o', color='0.7', markersize=4)
    for run in held_out:
        ax.plot(run['C'], run['loss'], '*', color=common.RED, markersize=12)
    if held_out:
        predicted = law.loss_of(law_fit.best, held_out[0]['N'], held_out[0]['D'])
        measured = ', '.join(f'{run["loss"]:.3f}' for run in held_out)
        ax.annotate(f'predicted {predicted:.3f},\nthen trained:\n{measured}',
                    (held_out[0]['C'], predicted), (-25, -6), ha='right', va='center',
                    textcoords='offset points', color=common.RED)
    ax.set(title='The best loss for a budget', xlabel='compute C, FLOPs')


def draw(plt, runs, law_fit, valleys, held_out):
    """Draw the law through the runs, the valley of each budget, and the prediction."""
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 4.5), sharey=True)
    draw_law(axes[0], plt, runs, law_fit.best)
    draw_valleys(axes[1], plt, runs, valleys)
    draw_prediction(axes[2], runs, law_fit, held_out)
    for ax, form in zip(axes, (thousands, thousands, power), strict=True):
        ax.set_xscale('log')
        ax.margins(x=0.18)
        low, high = ax.get_xlim()
        ticks = [m * 10**e for e in range(3, 30) for m in (1, 3) if low < m * 10**e < high]
        ax.set_xticks(ticks, [form(tick) for tick in ticks])
        ax.minorticks_off()
    common.save(figure, out, 'scaling_laws')


# --------------------------------------------------------------------------------------------------


def numbers(name, kind=float):
    """Return the numbers of a setting such as '1e12,2e12', all above 0."""
    try:
        values = sorted({kind(part) for part in config[name].split(',')})
    except ValueError:
        values = [0]
    if not 0 < values[0] <= values[-1] < math.inf:
        kinds = 'whole numbers' if kind is int else 'numbers'
        raise UserError(f'--{name}={config[name]}: expected {kinds} above 0, separated by '
                        f'commas')
    return values


def check_settings():
    if bootstraps < 20:
        raise UserError(f'--bootstraps={bootstraps}: expected 20 or more')
    if val_windows % 64:
        raise UserError(f'--val_windows={val_windows}: expected a multiple of 64, the windows of a '
                        f'batch')
    if any(width % 16 for width in numbers('widths', int)):
        raise UserError(f'--widths={widths}: expected multiples of 16, the channels of a head')
    if len(numbers('ratios')) != 2:
        raise UserError(f'--ratios={ratios}: expected the fewest and the most tokens per N, such '
                        f'as 1,120')


def main():
    check_settings()
    common.start(out)
    plt = common.pyplot()
    if table:
        fit_table(plt)
        return
    # train the grid and fit the law
    jobs = grid()
    lock = lock_folder(runs_file(), 'training the runs of')
    runs = complete(jobs)
    law_fit = fit(columns(runs))
    figures = report(law_fit)
    valleys, exponents = report_sizes(law_fit, runs)
    figures |= exponents
    # predict a larger run, then train it
    held_out = []
    if larger:
        held_out, figures['prediction'] = hold_out(law_fit)
    draw(plt, runs, law_fit, valleys, held_out)
    common.record(out, 'scaling_laws', **figures, valleys=valleys, runs=runs, held_out=held_out)
    unlock(lock)


if __name__ == '__main__':
    main()
