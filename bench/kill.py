"""
Is anything lost? Kill training again and again, and fill its disk.

    $ python -m bench.kill               # 100 kills, 8 minutes or more
    $ python -m bench.kill --runs=10     # a quick look

A tiny model trains with --init_from=auto, saving after every step, and is killed with SIGKILL at a moment drawn at
random: of ten times, five while it trains, three in the milliseconds in which it saves, two from its start on. Then
  - ckpt.pt must exist if train.py ever said that it saved one, load, and be of the last step reported or a later one;
  - best.pt likewise; the next run must go on at exactly the step of ckpt.pt, and at the end log.jsonl must hold every
    step once.
Then a disk without room for the next checkpoint or the next line of the log, in two ways: the size of the process's
files is limited (RLIMIT_FSIZE), and out_dir is on a small tmpfs (where user namespaces let us mount one). The old
ckpt.pt must stay as it was, training must go on and say so, and with room again it must resume. Not covered: power
cuts, which a process can't cause.

Prints a table, then a JSON line; exit status 1 if anything failed.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

from bench import common
from configurator import override
from flatgpt import checkpoint

# settings ------------------------------------------------------------------------------------------------------------
runs = 100  # kills
longest = 1.0  # seconds; a kill during training comes at most so long after the first step
seed = 0
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

TRAIN = [sys.executable, os.path.join(common.ROOT, 'train.py'), '--dataset=tiny', '--device=cpu', '--dtype=float32',
         '--compile=False', '--n_layer=1', '--n_head=1', '--n_embd=32', '--block_size=16', '--batch_size=2',
         '--gradient_accumulation_steps=1', '--eval_interval=1', '--eval_iters=1', '--warmup_iters=0',
         '--learning_rate=1e-3']


def make_dataset(folder):
    """A byte dataset of random text, with a val split so short that evaluations take no time."""
    os.makedirs(f'{folder}/data/tiny')
    generator = np.random.default_rng(seed)
    tokens = {'train': 10_000, 'val': 40}
    for split, count in tokens.items():
        generator.integers(97, 123, count).astype('<u2').tofile(f'{folder}/data/tiny/{split}.bin')
    with open(f'{folder}/data/tiny/meta.json', 'w', encoding='utf-8') as f:
        json.dump({'dtype': 'uint16', 'vocab_size': 256, 'tokens': tokens, 'tokenizer': {'kind': 'byte'}}, f)


def logged_steps(out_dir):
    """The steps in log.jsonl, in its order; half a line at its end does not count."""
    with open(f'{out_dir}/log.jsonl', encoding='utf-8') as f:
        records = [json.loads(line) for line in f if line.endswith('\n')]
    return [record['step'] for record in records if 'loss' in record]


def run_and_kill(folder, moment, delay):
    """
    Start train.py and kill it `delay` seconds after its 'start', the first 'step' or the beginning of a 'save'.
    -> (first step it trained or None, last step it reported as saved or None, everything it printed).
    """
    process = subprocess.Popen([*TRAIN, '--init_from=auto'], cwd=folder, env=common.environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    killer = threading.Timer(delay, process.kill)
    if moment == 'start':
        killer.start()
    first, reported, lines = None, None, []
    for line in process.stdout:  # to its end, which the kill makes
        lines.append(line)
        if match := common.ITER.match(line):
            first = int(match[1]) if first is None else first
        elif match := common.SAVED.match(line):
            reported = int(match[2])
        # the evaluation's line precedes a save at once; the first is left alone, so that there is progress
        if not killer.is_alive() and (moment == 'step' and first is not None or
                                      moment == 'save' and reported is not None and line.startswith('step ')):
            moment = 'over'
            killer.start()
    if process.wait() != -9:
        raise SystemExit(f'train.py ended by itself:\n{"".join(lines)[-2000:]}')
    return first, reported, ''.join(lines)


def kill_runs(folder):
    """-> the counts of all the kills, and a list of what went wrong."""
    chance = random.Random(seed)
    out_dir = f'{folder}/out'
    counts = {'kills': runs, 'before the first step': 0, 'with a half-written file': 0, 'saves reported': 0}
    failures, on_disk, longest_start = [], 0, 4.0
    for kill in range(runs):
        moment = ['step', 'step', 'save', 'step', 'start', 'save', 'step', 'save', 'step', 'start'][kill % 10]
        delay = chance.uniform(0, {'start': longest_start, 'step': longest, 'save': 0.01}[moment])
        t0 = time.perf_counter()
        first, reported, text = run_and_kill(folder, moment, delay)
        if moment == 'step':
            longest_start = time.perf_counter() - t0  # a start that long reaches the training
        counts['before the first step'] += first is None
        counts['saves reported'] += text.count('\nsaved ')
        if os.path.isdir(out_dir):
            counts['with a half-written file'] += os.path.exists(f'{out_dir}/ckpt.pt.tmp')
        if first is not None and first != on_disk:
            failures.append(f'kill {kill}: the run began at step {first}, ckpt.pt was of step {on_disk}')
        expected = on_disk if reported is None else reported
        if expected == 0 and not os.path.exists(f'{out_dir}/ckpt.pt'):
            continue
        for name in ('ckpt.pt', 'best.pt'):
            try:
                step = checkpoint.load(f'{out_dir}/{name}')['iter_num']
            except ValueError as error:
                failures.append(f'kill {kill}: {error}')
                continue
            if name == 'ckpt.pt':
                if step < expected:
                    failures.append(f'kill {kill}: ckpt.pt is of step {step}, {expected} was reported as saved')
                on_disk = step
        print(f'kill {kill + 1} of {runs}: step {on_disk}, {len(failures)} failures', file=sys.stderr)
    counts['steps in the end'] = on_disk
    if logged_steps(out_dir)[:on_disk] != list(range(on_disk)):
        failures.append('log.jsonl does not hold every step once')
    return counts, failures


def digest(path):
    with open(path, 'rb') as f:
        return hashlib.sha256(f.read()).hexdigest()


def full_disk(folder, tmpfs):
    """
    Train 10 steps, then resume where neither the next checkpoint nor the next line of the log fits, then once more with
    room. -> None, or what went wrong.
    """
    out_dir = f'{folder}/{"tmpfs" if tmpfs else "limit"}'
    train = [*TRAIN, '--init_from=auto', f'--out_dir={out_dir}']
    common.run([*train, '--max_iters=10'], cwd=folder)
    before, room = digest(f'{out_dir}/ckpt.pt'), os.path.getsize(f'{out_dir}/log.jsonl')
    more, limit = [*train, '--max_iters=13'], None
    if tmpfs:  # in a mount namespace of its own: out_dir moves onto a tmpfs that has room for a few lines of the log
        script = ('out=$1; kb=$2; shift 2; mkdir full && mount -t tmpfs -o size=${kb}k tmpfs full && cp "$out"/* full/ '
                  '|| exit 99; "$@" --out_dir=full; status=$?; rm -r "$out"/*; cp -r full/. "$out"; exit $status')
        kilobytes = sum(-(-os.path.getsize(f'{out_dir}/{name}') // 4096) * 4 for name in os.listdir(out_dir))
        kilobytes += 8  # while the log is rewritten at the start there are two of it
        more = ['unshare', '-rm', 'sh', '-c', script, 'sh', out_dir, str(kilobytes), *more]
    else:
        import resource

        def limit():  # the size of any one file: the log ends in the middle of a line
            resource.setrlimit(resource.RLIMIT_FSIZE, (room + 100, room + 100))

    done = subprocess.run(more, cwd=folder, env=common.environment(), text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, preexec_fn=limit)
    if tmpfs and (done.returncode == 99 or 'unshare' in done.stdout):
        return f'could not be tried: {done.stdout.strip()}'
    if done.stdout.count('ckpt.pt could not be saved') < 3 or 'iter 12: ' not in done.stdout:
        return f'expected three warnings and three steps:\n{done.stdout[-1500:]}'
    if digest(f'{out_dir}/ckpt.pt') != before:
        return 'the old ckpt.pt has changed'
    if left := [name for name in os.listdir(out_dir) if '.tmp' in name]:
        return f'half-written files stay: {left}'
    if done.returncode == 0:
        return 'the state of the last step was not saved, but the exit status is 0'
    done = subprocess.run([*train, '--max_iters=13'], cwd=folder, env=common.environment(), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0 or 'iter 10: ' not in done.stdout:
        return f'with room again it does not resume:\n{done.stdout[-600:]}'
    if logged_steps(out_dir) != list(range(13)):
        return f'log.jsonl holds steps {logged_steps(out_dir)}, expected 0 to 12'
    return None


if sys.platform == 'win32':
    raise SystemExit('bench/kill.py needs SIGKILL and RLIMIT_FSIZE; run it on Linux or macOS')
folder = tempfile.mkdtemp()
try:
    make_dataset(folder)
    counts, failures = kill_runs(folder)
    disks = {'RLIMIT_FSIZE': full_disk(folder, tmpfs=False)}
    disks['tmpfs'] = full_disk(folder, tmpfs=True) if shutil.which('unshare') else 'could not be tried: no unshare'
finally:
    shutil.rmtree(folder)

print(common.heading('kill'))
print(common.table([['', 'count'], *counts.items(), ['failures', len(failures)]]))
print(*failures, sep='\n')
for name, problem in disks.items():
    print(f'full disk, {name}: {problem or "old checkpoint untouched, training went on"}')
failed = bool(failures) or any(problem and 'could not be tried' not in problem for problem in disks.values())
common.finish('kill', runs, **{key.replace(' ', '_').replace('-', '_'): v for key, v in counts.items()},
              failures=failures, full_disk={name: problem or 'ok' for name, problem in disks.items()})
raise SystemExit(failed)
