"""
Share one training loop, and write pictures and numbers to files.

    for step, loss in common.train(model, get_batch, steps=500):  # get_batch(step) -> (x, y)
        ...
    plt = common.pyplot()
    figure, ax = plt.subplots(figsize=(8, 4.5))
    common.save(figure, out, 'addition')              # out/addition.png
    common.record(out, 'addition', accuracy=0.99)     # out/addition.json
"""

import importlib
import io
import json
import os
from dataclasses import fields

import numpy as np
import torch

from config.presets import PRESETS
from configurator import UserError
from flatgpt import optim, output, parallel, runtime
from flatgpt.files import replace_file
from model import GPTConfig
from posttrain.tasks.common import wilson

# the palette of Okabe and Ito: colour-blind readers can tell these colours apart
BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK = COLORS = (
    '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')


def start(out, threads=None):
    """Set torch up for this machine and make the folder of the results.

    threads: 1 for models so small that a second thread waits more than it computes. The numbers
    then do not depend on the number of cores. Raises UserError if the folder cannot be written.
    """
    output.protect()
    try:
        os.makedirs(out, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError('it is write-protected')
    except OSError as error:
        raise UserError(f'out={out!r} cannot be written ({error}); use another folder: '
                        f'--out=FOLDER') from None
    runtime.use_cores()
    if threads:
        torch.set_num_threads(threads)
    runtime.keep_freed_memory()


def gpt_config(preset='modern', **changes):
    """Return the GPTConfig of a preset's architecture; `changes` win over the preset."""
    names = {field.name for field in fields(GPTConfig)}
    architecture = {key: value for key, value in PRESETS[preset].items() if key in names}
    return GPTConfig(**{**architecture, **changes})


def muon(model, scale=1.0):
    """Return the optimizer of preset=modern, its learning rates times `scale`."""
    settings = dict(PRESETS['modern'])
    for name in ('learning_rate', 'muon_lr', 'embedding_lr'):
        settings[name] *= scale
    return optim.create(model, settings, 'float32', parallel.World(0, 0, 1))


def train(model, get_batch, steps, optimizer=None, compile=False):
    """Train the model, and yield (step, loss in nats per token) after each step.

    get_batch(step) -> x, y: (B, T) ids, y negative where there is no target. optimizer: muon(model)
    by default; its learning rate rises over 20 steps, at most a tenth of all, and falls linearly to
    0 over the last 60%. compile: for runs of a minute or more; with bf16 products where the CPU has
    them. Raises UserError when the loss is not finite.
    """
    optimizer = optimizer or muon(model)
    schedule = optim.Schedule(optimizer.defaults['lr'], min(20, steps // 10), steps, 0.0, 0.6)
    device = next(model.parameters()).device
    dtype = 'float32'
    if compile:
        for block in model.transformer.h:
            block.compile(dynamic=False, options={'fallback_random': True})  # as train.py does
        dtype, _ = runtime.choose_dtype('auto', device, has_scaler=False)
    autocast = runtime.autocast(dtype, device)
    for step in range(steps):
        model.train()
        optim.set_rates(optimizer, schedule.wsd(step))
        x, y = (part.to(device) for part in get_batch(step))
        with autocast:
            loss = model(x, y)[1]
        if not loss.isfinite():
            raise UserError(f'step {step}: the loss is {loss.item()}; try a lower learning rate or '
                            f'another --seed')
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield step, loss.item()


def library(name):
    """Import a library of the extra 'lab'. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{name.partition('.')[0]} is not installed: pip install -c "
                        f"constraints.txt -e '.[lab]'") from None


def pyplot():
    """Return matplotlib.pyplot for files. Raises UserError if it is not installed."""
    matplotlib = library('matplotlib')
    matplotlib.use('Agg')  # draws into files, needs no display
    from matplotlib import pyplot as plt

    plt.rcParams.update({
        'figure.constrained_layout.use': True, 'figure.dpi': 100, 'font.size': 10,
        'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True, 'grid.alpha': 0.25,
        'legend.frameon': False, 'axes.prop_cycle': plt.cycler(color=COLORS)})
    return plt


def save(figure, out, name):
    """Write a figure to out/name.png in 256 colours, a third of the full size."""
    from PIL import Image  # matplotlib depends on it

    drawn, data = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format='png')
    colors = Image.open(drawn).convert('RGB').quantize(256, dither=Image.Dither.NONE)
    colors.save(data, 'png', optimize=True)
    write(out, f'{name}.png', data.getvalue())


def record(out, name, **figures):
    """Write the numbers of an experiment to out/name.json."""
    write(out, f'{name}.json', (json.dumps(figures, indent=1) + '\n').encode())


def percent(n_right, n):
    """Return a share in percent with Wilson's 95% interval, or NaN of nothing."""
    return [100 * x for x in (n_right / n, *wilson(n_right, n))] if n else [np.nan] * 3


def interval(values):
    """Return the mean of values (n,) that are numbers, and its 95% bootstrap interval."""
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(0)
    values = values[~np.isnan(values)]
    if not len(values):
        return [np.nan] * 3
    means = values[rng.integers(len(values), size=(2000, len(values)))].mean(1)
    return [float(value) for value in (values.mean(), *np.quantile(means, (0.025, 0.975)))]


def interval_of_draws(values, resamples):
    """Return the mean of values (draws, n), and its 95% bootstrap interval.

    The bootstrap resamples both the draws, such as seeds, and the n, such as questions.
    """
    rng, (n_draws, n) = np.random.default_rng(0), values.shape
    means = [values[rng.integers(n_draws, size=n_draws)][:, rng.integers(n, size=n)].mean()
             for _ in range(resamples)]
    return [float(value) for value in (values.mean(), *np.quantile(means, (0.025, 0.975)))]


def compare(rights, others):
    """Compare right answers with others' on the same questions, both (n,) of bool.

    Returns the difference in points, the ends of its 95% interval, and the p of McNemar's exact
    test.
    """
    from scipy.stats import binomtest

    difference = np.subtract(rights, others, dtype=int)
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    error = 1.96 * difference.std(ddof=1) / len(difference)**0.5
    p = binomtest(better, better + worse).pvalue if better + worse else 1.0
    mean = difference.mean()
    return [float(100 * mean), float(100 * (mean - error)), float(100 * (mean + error)), float(p)]


def write(out, name, data):
    """Write bytes to out/name and print the path."""
    path = os.path.join(out, name)
    replace_file(path, data)
    print(f'wrote {path}')
