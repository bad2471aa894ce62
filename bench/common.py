"""
What the measuring scripts of this folder share: running a command, reading its steps, tables, and the last line.

Imports neither torch nor anything that does, so that a script which only starts others is quick.
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

from data.datasets import load_meta
from data.tokens import gather, open_tokens, whole_windows
from flatgpt import checkpoint
from flatgpt.pretrained import model_of

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ITER = re.compile(r'^iter (\d+): loss (\S+), time ([\d.]+)ms')  # train.py's line, and nanoGPT's
SAVED = re.compile(r'^saved (.+) at step (\d+)')
EVALUATED = re.compile(r'^step (\d+): train loss (\S+), val loss (\S+)')  # both print this one alike, too

# nanoGPT's two documented commands that a CPU can run: its README's small one, and the config file as it is; classic()
# is the same recipe here
SMALL = ['config/train_shakespeare_char.py', '--device=cpu', '--compile=False', '--eval_iters=20', '--log_interval=1',
         '--block_size=64', '--batch_size=12', '--n_layer=4', '--n_head=4', '--n_embd=128', '--max_iters=2000',
         '--lr_decay_iters=2000', '--dropout=0.0']
CHAR = ['config/train_shakespeare_char.py', '--device=cpu', '--compile=False', '--log_interval=1']


def train_command(arguments=(), auto=False, python=sys.executable, script='train.py'):
    """The command line of a training run; with auto, device and compile are left for train.py to choose."""
    kept = [a for a in arguments if not (auto and a.startswith(('--device=', '--compile=')))]
    return [python, script, *kept]


def classic(arguments):
    """nanoGPT's arguments with its recipe's name here: config/train_shakespeare_char.py is another."""
    return [a.replace('train_shakespeare_char', 'shakespeare_char_classic') for a in arguments]


def environment(**changes):
    """This process's environment, output of a child unbuffered, with changes (None removes a variable)."""
    env = {**os.environ, 'PYTHONUNBUFFERED': '1', **changes}
    return {key: value for key, value in env.items() if value is not None}


def run(command, cwd=ROOT, **changes):
    """-> what a command printed; SystemExit with the end of it if it failed. changes: to its environment."""
    return ''.join(follow(command, cwd, **changes))


def follow(command, cwd=ROOT, **changes):
    """The same, but yields each line as the command prints it; a caller that stops listening ends the command."""
    process = subprocess.Popen(command, cwd=cwd, env=environment(**changes), text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            yield line
        process.wait()
    finally:
        process.kill()  # nothing happens if it has ended
        process.wait()
    if process.returncode != 0:
        raise SystemExit(f'{" ".join(command)}\nfailed with exit status {process.returncode}:\n'
                         f'{"".join(lines)[-2000:]}')


def step_times(command, n, cwd=ROOT):
    """
    -> [ms of steps 0, 1, ..., n-1] of a training command, which is asked to stop (SIGTERM) once it has printed them:
    so a run can be measured under exactly the settings of the whole one. Raises SystemExit if it ends earlier.
    """
    process = subprocess.Popen(command, cwd=cwd, env=environment(), text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    lines, times = [], []
    try:
        for line in process.stdout:
            lines.append(line)
            match = ITER.match(line)
            if match and len(times) < n:
                times.append(float(match[3]))
                if len(times) == n:
                    process.terminate()
    finally:
        process.kill()  # nothing happens if it has ended
        process.wait()
    if len(times) < n:
        raise SystemExit(f'{" ".join(command)}\nended after {len(times)} of {n} steps:\n{"".join(lines)[-2000:]}')
    return times


def check_peer(peer, dataset='shakespeare_char'):
    """SystemExit unless `peer` is a nanoGPT checkout whose dataset is prepared."""
    for path, remedy in (('train.py', 'expected a checkout of github.com/karpathy/nanoGPT'),
                         (f'data/{dataset}/train.bin', f'in it run: python data/{dataset}/prepare.py')):
        if not os.path.isfile(os.path.join(peer, path)):
            raise SystemExit(f'--peer={peer}: there is no {path}; {remedy}')


def val_loss(path, data_dir):
    """-> (mean loss in nats a token of a checkpoint over the whole val split, in fp32 on the CPU, its step)."""
    import torch  # here, so that scripts which only start others stay quick


    state = checkpoint.load(path)
    model = model_of(state, path, 0.0).eval()
    block_size, vocab_size = model.config.block_size, model.config.vocab_size
    tokens = open_tokens(data_dir, 'val', load_meta(data_dir), block_size)
    starts, total, count = whole_windows(len(tokens), block_size), 0.0, 0
    for i in range(0, len(starts), 256):
        x, y = gather(tokens, starts[i : i + 256], block_size, vocab_size)
        n_targets = int((y >= 0).sum())
        with torch.no_grad():
            total += model(x, y)[1].item() * n_targets
        count += n_targets
    return total / count, state['iter_num']


def spread(values, digits=3):
    """-> {'median', 'min', 'max', 'n'} of some numbers."""
    return {'median': round(statistics.median(values), digits), 'min': round(min(values), digits),
            'max': round(max(values), digits), 'n': len(values)}


def show(figures, unit='', form='{:,.1f}'):
    """A spread as text: median, and the range in brackets."""
    low, middle, high = (form.format(figures[key]) for key in ('min', 'median', 'max'))
    return f'{middle}{unit} ({low}-{high})' if figures['n'] > 1 else f'{middle}{unit}'


def table(rows):
    """Rows of cells, the first of them the header -> text in aligned columns, the first column to the left."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ['  '.join(cell.rjust(widths[i]) if i else cell.ljust(widths[i]) for i, cell in enumerate(row))
             for row in rows]
    return '\n'.join([lines[0], '-' * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def hardware():
    """One line about this machine: processor, cores, the units that multiply bf16, and a GPU if torch sees one."""
    name, flags = platform.processor() or platform.machine(), ''
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            fields = dict(line.split(':', 1) for line in f if ':' in line)  # the last core's, as good as any
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        name, flags = fields.get('model name', name), fields.get('flags', '').split()
    units = [unit for flag, unit in (('amx_bf16', 'AMX'), ('avx512_bf16', 'AVX512-BF16')) if flag in flags]
    parts = [name, f'{os.cpu_count()} cores', *(units or ['no native bf16'])]
    torch = sys.modules.get('torch')
    if torch is not None and torch.cuda.is_available():
        parts.append(f'{torch.cuda.device_count()} x {torch.cuda.get_device_name()}')
    return ', '.join(parts)


def commit():
    """The commit of this checkout, with '-dirty' behind it if files were changed; 'unknown' without git."""
    try:
        done = subprocess.run(['git', 'describe', '--always', '--dirty', '--exclude=*'], cwd=ROOT, text=True,
                              capture_output=True)
    except OSError:
        return 'unknown'
    return done.stdout.strip() or 'unknown'


def cpu_seconds():
    """-> (CPU seconds that everyone on this machine has used since it started, those of this process and its children
    that have ended), or None where the system doesn't tell: the difference is what disturbs a measurement."""
    try:
        with open('/proc/stat', encoding='utf-8') as f:
            user, nice, system, _idle, _wait, irq, soft, *_ = map(int, f.readline().split()[1:])
    except OSError:
        return None
    own = os.times()
    return (user + nice + system + irq + soft) / os.sysconf('SC_CLK_TCK'), sum(own[:4])


def others_since(before):
    """How many cores the processes of others have kept busy on average since a moment, (time, cpu_seconds())."""
    t0, cpu0 = before
    cpu = cpu_seconds()
    if cpu is None or cpu0 is None:
        return None
    return round(max(0.0, (cpu[0] - cpu0[0]) - (cpu[1] - cpu0[1])) / (time.perf_counter() - t0), 2)


STARTED = time.perf_counter(), cpu_seconds()


def wait_for_quiet(seconds):
    """Wait until others leave the machine alone, all but a tenth of a core for three seconds, or `seconds` are over."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        before = time.perf_counter(), cpu_seconds()
        time.sleep(3)
        if (others_since(before) or 0) < 0.1:
            return


def heading(name):
    """The lines above a table."""
    others = others_since(STARTED)
    noise = '' if others is None else f', others kept {others} cores busy meanwhile'
    return f'{name} | {hardware()}\ntorch {torch_version()}, commit {commit()}{noise}\n'


def torch_version():
    return metadata.version('torch')


def finish(name, n, **figures):
    """Print the last line of a script: everything that is needed to quote the figures, as one JSON object."""
    print(json.dumps({'bench': name, 'hardware': hardware(), 'torch': torch_version(), 'commit': commit(), 'n': n,
                      'others_cores_busy': others_since(STARTED), **figures}))
