"""
Measure the time to the first training step, and to prepare python_stdlib.

    $ python -m bench.start                       # a minute
    $ python -m bench.start --config_file=config/train_shakespeare_char.py

The start has --compile=False and prepared data, and includes the evaluation
before the first step. It is measured from outside, from the start of the process
to its line `iter 0: ...`. The bars: the quickstart's first step in under 6 s,
python_stdlib in under 30 s and 500 MB. Prints a table, then a JSON line.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

from bench import common
from configurator import Count, UserError, override

# Settings -----------------------------------------------------------------------------------------
config_file = 'config/quickstart.py'
n: Count = 5  # starts, and preparations
config = override(globals())
# --------------------------------------------------------------------------------------------------


def until_first_step(command):
    """Return the seconds to the model's line, the first evaluation, the first step.

    The second equals the first without an evaluation. The command is then terminated.
    """
    t0, ready, evaluated = time.perf_counter(), None, None
    lines = common.follow(command)
    for line in lines:
        now = time.perf_counter() - t0
        if 'M parameters' in line:
            ready = now
        elif line.startswith('step 0: '):
            evaluated = now
        elif common.ITER.match(line):
            lines.close()
            return ready, evaluated or ready, now
    raise UserError(f'{" ".join(command)}\nended before its first step')


def time_and_memory(command):
    """Return the wall seconds and the peak resident MB of a command."""
    t0 = time.perf_counter()
    process = subprocess.Popen(command, cwd=common.ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    # wait4 measures this process alone, getrusage all children. Its peak includes the size of this
    # process, which is small, because this script does not import torch
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f'{" ".join(command)} failed with exit status {process.returncode}')
    per_mb = 2**20 if sys.platform == 'darwin' else 2**10
    return time.perf_counter() - t0, usage.ru_maxrss / per_mb


# measure
imports, starts, seconds, memory = [], [], [], []
with tempfile.TemporaryDirectory() as folder:
    train = common.train_command([config_file, '--compile=False', f'--out_dir={folder}/out'])
    until_first_step(train)  # prepares the dataset and warms the file cache
    for _ in range(n):
        imports.append(time_and_memory([sys.executable, '-c', 'import torch'])[0])
        starts.append(until_first_step(train))
    for i in range(n):
        out = os.path.join(folder, f'stdlib-{i}')
        prepare = [sys.executable, 'data/python_stdlib/prepare.py', f'--out_dir={out}']
        time_spent, peak = time_and_memory(prepare)
        seconds.append(time_spent)
        memory.append(peak)
        with open(os.path.join(out, 'meta.json'), encoding='utf-8') as f:
            n_bytes = sum(json.load(f)['bytes'].values())

# report
ready, evaluated, stepped = zip(*starts, strict=True)
evaluation = [b - a for a, b in zip(ready, evaluated, strict=True)]
rows, figures = [['', 'measured', 'bar']], {}
for key, values, label, bar in (
        ('import_torch_s', imports, 'import torch alone, s', ''),
        ('ready_s', ready, 'train.py: settings, model and data ready after, s', ''),
        ('evaluation_s', evaluation, 'its evaluation before the first step, s', ''),
        ('first_step_s', stepped, 'end of the first step after, s', '6'),
        ('prepare_s', seconds, f'preparing python_stdlib ({n_bytes / 1e6:.1f} MB), s', '30'),
        ('prepare_mb', memory, 'its peak memory, MB', '500')):
    figures[key] = common.spread(values, 1 if key == 'prepare_mb' else 3)
    form = '{:.0f}' if key == 'prepare_mb' else '{:.2f}'
    rows.append([label, common.show(figures[key], form=form), bar])
print(common.heading(f'start of {config_file}'))
print(common.table(rows))
common.finish('start', n, config=config_file, python_stdlib_bytes=n_bytes, **figures)
