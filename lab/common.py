"""
What the experiments of this folder share: one training loop, and how pictures and numbers are kept.

    for step, loss in common.train(model, get_batch, steps=500):  # get_batch(step) -> (x, y)
        ...
    plt = common.pyplot()
    figure, ax = plt.subplots(figsize=(8, 4.5))
    common.save(figure, out, 'addition')                           # out/addition.png
    common.record(out, 'addition', accuracy=0.99)                  # out/addition.json, for who wants to go on from it
"""

import io
import json
import os

import torch

from flatgpt import optim, parallel, runtime
from flatgpt.files import replace_file

# Okabe and Ito's colours, told apart by colour-blind readers too
BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK = COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00',
                                                         '#56B4E9', '#000000')


def start(out, seed=0, threads=None):
    """
    Before an experiment: torch is set up for this machine's cores, and the folder of its results made. threads: 1 for
    models so small that a second thread waits more than it works; then the numbers are also the same on any number of
    cores. SystemExit if the folder can't be written, now and not after the work; or for a seed out of range.
    """
    if not 0 <= seed < 2**32:
        raise SystemExit(f'seed={seed}: expected 0 to {2**32 - 1}')
    try:
        os.makedirs(out, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError('it is write-protected')
    except OSError as error:
        raise SystemExit(f'out={out!r} can not be written ({error}); name another folder: --out=FOLDER') from None
    runtime.use_cores()
    if threads:
        torch.set_num_threads(threads)
    runtime.keep_freed_memory()


def muon(model, scale=1.0):
    """
    -> (optimizer, its highest learning rate): train.py's for preset=modern, which learns in a fraction of AdamW's
    steps. scale: of all its rates.
    """
    s = optim.PRESETS['modern']
    opt = optim.muon(model, s['weight_decay'], s['learning_rate'], s['muon_lr'], s['embedding_lr'],
                     (s['beta1'], s['beta2']), 0.95, torch.float32, parallel.World(0, 0, 1))
    return opt, scale * s['learning_rate']


def train(model, get_batch, steps, optimizer=None, learning_rate=None, decay=0.6, warmup=20, compile=False):
    """
    Train, and yield (step, loss in nats a token) after each of the steps 0 ... steps - 1, so that the caller can look
    at the model in between.

    get_batch(step) -> x, y: (B, T) ids, y negative where there is no target. optimizer, learning_rate: its highest
    rate; None: muon(model). The rate rises over `warmup` steps, at most a tenth of all, and falls in a line over the
    last `decay` of them.
    compile: worth its 10 s a shape for runs of a minute or more; then with bf16 products where the CPU has them.
    """
    if optimizer is None:
        optimizer, learning_rate = muon(model)
    device = next(model.parameters()).device
    dtype = 'float32'
    if compile:
        for block in model.transformer.h:
            block.compile(dynamic=False, options={'fallback_random': True})  # as train.py does
        dtype, _ = runtime.choose_dtype('auto', device, has_scaler=False)
    autocast = runtime.autocast(dtype, device)
    for step in range(steps):
        model.train()
        for group in optimizer.param_groups:
            group['lr'] = group['lr_scale'] * optim.wsd(step, learning_rate, min(warmup, steps // 10), steps, 0.0,
                                                        decay)
        x, y = (part.to(device) for part in get_batch(step))
        with autocast:
            loss = model(x, y)[1]
        if not loss.isfinite():
            raise SystemExit(f'step {step}: the loss is {loss.item()}, and training can not go on from there')
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield step, loss.item()


def pyplot():
    """matplotlib.pyplot, set up to draw into files; SystemExit that says how to install it."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("matplotlib is not installed: pip install -c constraints.txt -e '.[lab]'") from None
    matplotlib.use('Agg')  # writes files, needs no display
    from matplotlib import pyplot as plt

    plt.rcParams.update({'figure.constrained_layout.use': True, 'figure.dpi': 100, 'font.size': 10,
                         'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True, 'grid.alpha': 0.25,
                         'legend.frameon': False, 'axes.prop_cycle': plt.cycler(color=COLORS)})
    return plt


def save(figure, out, name):
    """A figure as out/name.png, in 256 colours: a third of the size."""
    from PIL import Image  # matplotlib needs it, too

    drawn, data = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format='png')
    Image.open(drawn).convert('RGB').quantize(256, dither=Image.Dither.NONE).save(data, 'png', optimize=True)
    write(out, f'{name}.png', data.getvalue())


def record(out, name, **figures):
    """The numbers of an experiment as out/name.json."""
    write(out, f'{name}.json', (json.dumps(figures, indent=1) + '\n').encode())


def write(out, name, data):
    """Bytes as out/name."""
    path = os.path.join(out, name)
    replace_file(path, data)
    print(f'wrote {path}')
