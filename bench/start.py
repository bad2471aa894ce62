"""
How long a beginning takes: from `python train.py` to the end of the first step, and preparing python_stdlib.

    $ python -m bench.start                       # a minute
    $ python -m bench.start --config_file=config/train_shakespeare_char.py

The start is with --compile=False and the data prepared, and includes the evaluation that precedes the first step; it is
measured from outside, from the start of the process to its line `iter 0: ...`. The bars: the quickstart's first step
in under 6 s, python_stdlib in under 30 s and 500 MB. Prints a table, then a JSON line.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

from bench import common
from configurator import override

# settings ------------------------------------------------------------------------------------------------------------
config_file = 'config/quickstart.py'
n = 5  # starts, and preparations
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------


def until_first_step(command):
    """
    -> (seconds from the start of a training command to the line that describes the model, to the first evaluation, to
    the end of the first step); the command is then killed. The second is the first where there is no evaluation.
    """
    t0 = time.perf_counter()
    process = subprocess.Popen(command, cwd=common.ROOT, env=common.environment(), text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    lines, ready, evaluated = [], None, None
    try:
        for line in process.stdout:
            lines.append(line)
            now = time.perf_counter() - t0
            if 'M parameters; ' in line:
                ready = now
            elif line.startswith('step 0: '):
                evaluated = now
            elif common.ITER.match(line):
                return ready, evaluated or ready, now
    finally:
        process.kill()
        process.wait()
    raise SystemExit(f'{" ".join(command)}\nended before its first step:\n{"".join(lines)[-2000:]}')


def time_and_memory(command):
    """-> (wall seconds, peak resident MB) of a command and the processes it waits for."""
    t0 = time.perf_counter()
    process = subprocess.Popen(command, cwd=common.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # its own usage; getrusage would mix that of all children so far. It begins with this process's size, which is small
    # because nothing here imports torch
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f'{" ".join(command)} failed with exit status {process.returncode}')
    return time.perf_counter() - t0, usage.ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)


imports, starts, seconds, memory = [], [], [], []
with tempfile.TemporaryDirectory() as folder:
    train = [sys.executable, 'train.py', config_file, '--compile=False', f'--out_dir={folder}/out']
    until_first_step(train)  # prepares the dataset if need be, and warms the file cache
    for _ in range(n):
        imports.append(time_and_memory([sys.executable, '-c', 'import torch'])[0])
        starts.append(until_first_step(train))
    for i in range(n):
        out = os.path.join(folder, f'stdlib-{i}')
        time_spent, peak = time_and_memory([sys.executable, 'data/python_stdlib/prepare.py', f'--out_dir={out}'])
        seconds.append(time_spent)
        memory.append(peak)
        with open(os.path.join(out, 'meta.json'), encoding='utf-8') as f:
            n_bytes = sum(json.load(f)['bytes'].values())

ready, evaluated, stepped = zip(*starts, strict=True)
evaluation = [b - a for a, b in zip(ready, evaluated, strict=True)]
figures = {'import_torch_s': common.spread(imports), 'ready_s': common.spread(ready),
           'evaluation_s': common.spread(evaluation), 'first_step_s': common.spread(stepped),
           'prepare_s': common.spread(seconds), 'prepare_mb': common.spread(memory, 1)}
print(common.heading(f'start of {config_file}'))
print(common.table([
    ['', 'measured', 'bar'],
    ['import torch alone, s', common.show(figures['import_torch_s'], form='{:.2f}'), ''],
    ['train.py: settings, model and data ready after, s', common.show(figures['ready_s'], form='{:.2f}'), ''],
    ['its evaluation before the first step, s', common.show(figures['evaluation_s'], form='{:.2f}'), ''],
    ['end of the first step after, s', common.show(figures['first_step_s'], form='{:.2f}'), '6'],
    [f'preparing python_stdlib ({n_bytes / 1e6:.1f} MB), s', common.show(figures['prepare_s'], form='{:.2f}'), '30'],
    ['its peak memory, MB', common.show(figures['prepare_mb'], form='{:.0f}'), '500'],
]))
common.finish('start', n, config=config_file, python_stdlib_bytes=n_bytes, **figures)
