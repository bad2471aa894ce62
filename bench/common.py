"""
Run commands, read their steps, and print tables and the last line of JSON.

Importing this module does not import torch, so scripts that only start others begin quickly.
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from importlib import metadata

import numpy as np

from configurator import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# lines that train.py and nanoGPT both print
ITER = re.compile(r'^iter (\d+): loss (\S+), time ([\d.]+)ms')
EVALUATED = re.compile(r'^step (\d+): train loss (\S+), val loss (\S+)')
SAVED = re.compile(r'^saved (.+) at step (\d+)')  # train.py's

# nanoGPT's two documented commands that a CPU can run: the small one of its README, and its config
# file; classic() names the same recipe in this repository
SMALL = ['config/train_shakespeare_char.py', '--device=cpu', '--compile=False', '--eval_iters=20',
         '--log_interval=1', '--block_size=64', '--batch_size=12', '--n_layer=4', '--n_head=4',
         '--n_embd=128', '--max_iters=2000', '--lr_decay_iters=2000', '--dropout=0.0']
CHAR = ['config/train_shakespeare_char.py', '--device=cpu', '--compile=False', '--log_interval=1']


# Commands -----------------------------------------------------------------------------------------


def train_command(arguments=(), auto=False, script='train.py'):
    """Return the command of a training run; with auto, without --device and --compile."""
    machine = ('--device=', '--compile=') if auto else ()
    return [sys.executable, script, *(a for a in arguments if not a.startswith(machine))]


def classic(arguments):
    """Replace the name of nanoGPT's recipe by the one it has in this repository."""
    return [a.replace('train_shakespeare_char', 'shakespeare_char_classic') for a in arguments]


def environment(**changes):
    """Return a child's environment with unbuffered output; None removes a variable."""
    env = {**os.environ, 'PYTHONUNBUFFERED': '1', **changes}
    return {key: value for key, value in env.items() if value is not None}


def run(command, cwd=ROOT, **changes):
    """Run a command and return what it prints. changes: to its environment."""
    return ''.join(follow(command, cwd, **changes))


def follow(command, cwd=ROOT, **changes):
    """Run a command and yield each line as it is printed.

    Closing the generator terminates the command. Raises UserError with the end of the output if the
    command fails.
    """
    process = subprocess.Popen(command, cwd=cwd, env=environment(**changes), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            yield line
        process.wait()
    finally:
        process.terminate()  # does nothing if it has ended
        process.wait()
    if process.returncode != 0:
        raise UserError(f'{" ".join(command)}\nfailed with exit status {process.returncode}:\n'
                        f'{"".join(lines)[-2000:]}')


def step_times(command, n, cwd=ROOT, **changes):
    """Return the ms of the first n steps of a training command, and then terminate it.

    So a run is measured under exactly its own settings. Raises UserError if it ends earlier.
    """
    times, lines = [], follow(command, cwd, **changes)
    for line in lines:
        if match := ITER.match(line):
            times.append(float(match[3]))
        if len(times) == n:
            lines.close()
            return times
    raise UserError(f'{" ".join(command)}\nended after {len(times)} of {n} steps')


def cut_half_line(path):
    """Remove half a line at the end of a file, which a killed process leaves."""
    with open(path, 'r+b') as f:
        f.truncate(f.read().rfind(b'\n') + 1)


def check_peer(peer, dataset='shakespeare_char'):
    """Raise UserError unless `peer` is a nanoGPT checkout with this dataset."""
    needs = [('train.py', 'expected a checkout of github.com/karpathy/nanoGPT')]
    if dataset:
        needs.append((f'data/{dataset}/train.bin', f'in it run: python data/{dataset}/prepare.py'))
    for path, remedy in needs:
        if not os.path.isfile(os.path.join(peer, path)):
            raise UserError(f'--peer={peer}: there is no {path}; {remedy}')


def val_loss(path, data_dir):
    """Return a checkpoint's val loss in nats per token, in fp32, and its step."""
    from data import datasets  # torch comes with these
    from data import tokens as data
    from flatgpt import checkpoint
    from flatgpt.pretrained import model_of

    state = checkpoint.load(path)
    model = model_of(state, path, 0.0).eval()
    block_size = model.config.block_size
    tokens = data.open_tokens(data_dir, 'val', datasets.load_meta(data_dir), block_size)
    starts = data.whole_windows(len(tokens), block_size)
    cut = data.Cut(len(starts), block_size, batch_size=256)
    total, count = data.sum_losses(model, tokens, starts, cut, model.config.vocab_size)
    return total / count, state['iter_num']


# Tables -------------------------------------------------------------------------------------------


def make_dataset(folder, n_train, seed):
    """Write a byte dataset of random text, FOLDER/data/tiny, with a short val split."""
    os.makedirs(f'{folder}/data/tiny')
    generator = np.random.default_rng(seed)
    tokens = {'train': n_train, 'val': 40}
    for split, count in tokens.items():
        generator.integers(97, 123, count).astype('<u2').tofile(f'{folder}/data/tiny/{split}.bin')
    with open(f'{folder}/data/tiny/meta.json', 'w', encoding='utf-8') as file:
        json.dump({'dtype': 'uint16', 'vocab_size': 256, 'tokens': tokens,
                   'tokenizer': {'kind': 'byte'}}, file)


def spread(values, digits=3):
    """Return {'median', 'min', 'max', 'n'} of some numbers."""
    return {'median': round(statistics.median(values), digits), 'min': round(min(values), digits),
            'max': round(max(values), digits), 'n': len(values)}


def show(figures, unit='', form='{:,.1f}'):
    """Format a spread: the median, and the range in brackets."""
    low, middle, high = (form.format(figures[key]) for key in ('min', 'median', 'max'))
    return f'{middle}{unit} ({low}-{high})' if figures['n'] > 1 else f'{middle}{unit}'


def table(rows):
    """Align rows of cells in columns, the header first, the first column to the left."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ['  '.join(cell.rjust(widths[i]) if i else cell.ljust(widths[i])
                       for i, cell in enumerate(row)) for row in rows]
    return '\n'.join([lines[0], '-' * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def hardware():
    """Describe this machine: processor, cores, its bf16 units, and the GPU if any."""
    name, flags = platform.processor() or platform.machine(), ''
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            fields = dict(line.split(':', 1) for line in f if ':' in line)  # of the last core
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        name, flags = fields.get('model name', name), fields.get('flags', '').split()
    units = [unit for flag, unit in (('amx_bf16', 'AMX'), ('avx512_bf16', 'AVX512-BF16'))
             if flag in flags]
    parts = [name, f'{os.cpu_count()} cores', *(units or ['no native bf16'])]
    torch = sys.modules.get('torch')
    if torch is not None and torch.cuda.is_available():
        parts.append(f'{torch.cuda.device_count()} x {torch.cuda.get_device_name()}')
    return ', '.join(parts)


def commit():
    """Return the commit, '-dirty' with changes, 'unknown' without git."""
    try:
        done = subprocess.run(['git', 'describe', '--always', '--dirty', '--exclude=*'], cwd=ROOT,
                              text=True, capture_output=True)
    except OSError:
        return 'unknown'
    return done.stdout.strip() or 'unknown'


def torch_version():
    return metadata.version('torch')


# Other processes ----------------------------------------------------------------------------------


def cpu_seconds():
    """Return the CPU seconds of all processes, and of this one; None if unknown."""
    try:
        with open('/proc/stat', encoding='utf-8') as f:
            user, nice, system, _idle, _wait, irq, soft, *_ = map(int, f.readline().split()[1:])
    except OSError:
        return None
    ticks = os.sysconf('SC_CLK_TCK')
    return (user + nice + system + irq + soft) / ticks, sum(os.times()[:4])


def others_since(before):
    """Return the mean number of cores that others used since (time, cpu_seconds())."""
    t0, cpu0 = before
    cpu = cpu_seconds()
    if cpu is None or cpu0 is None:
        return None
    others = (cpu[0] - cpu0[0]) - (cpu[1] - cpu0[1])
    return round(max(0.0, others) / (time.perf_counter() - t0), 2)


STARTED = time.perf_counter(), cpu_seconds()


def wait_for_quiet(seconds):
    """Wait, at most `seconds`, until others use less than a tenth of a core for 3 s."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        before = time.perf_counter(), cpu_seconds()
        time.sleep(3)
        if (others_since(before) or 0) < 0.1:
            return


def heading(name):
    """Return the lines above a table."""
    others = others_since(STARTED)
    noise = '' if others is None else f', others kept {others} cores busy meanwhile'
    return f'{name} | {hardware()}\ntorch {torch_version()}, commit {commit()}{noise}\n'


def finish(name, n, **figures):
    """Print the figures and what is needed to quote them, as one line of JSON."""
    print(json.dumps({'bench': name, 'hardware': hardware(), 'torch': torch_version(),
                      'commit': commit(), 'n': n, 'others_cores_busy': others_since(STARTED),
                      **figures}))
