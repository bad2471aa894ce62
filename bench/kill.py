"""
Kill training again and again, and fill its disk, to check that nothing is lost.

    $ python -m bench.kill               # 100 kills, 8 minutes or more
    $ python -m bench.kill --runs=10     # a quick look

A tiny model trains with --init_from=auto, saves after every step, and is killed
with SIGKILL at a random moment: five times in ten while it trains, three in the
milliseconds of a save, two during its start. Then
  - ckpt.pt must exist if train.py ever reported it, must load, and must be of
    the last reported step or a later one; the same holds for best.pt;
  - the next run must continue at the step of ckpt.pt, and in the end log.jsonl
    must hold every step once.
Then the disk has no room for the next checkpoint or the next line of the log, in
two ways: by a limit on file sizes (RLIMIT_FSIZE), and by a small tmpfs (where
user namespaces can mount one). The old ckpt.pt must not change, training must
continue with a warning, and it must resume once there is room. Power cuts are
not covered.

Prints a table, then a JSON line; exit status 1 if anything failed.
"""

import glob
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

from bench import common
from configurator import Count, Positive, Seed, UserError, override
from flatgpt import checkpoint

# Settings -----------------------------------------------------------------------------------------
runs: Count = 100  # kills
longest: Positive = 1.0  # most seconds from the first step to a kill during training
seed: Seed = 0
config = override(globals())
# --------------------------------------------------------------------------------------------------

TRAIN = [sys.executable, os.path.join(common.ROOT, 'train.py'), '--dataset=tiny', '--device=cpu',
         '--dtype=float32', '--compile=False', '--n_layer=1', '--n_head=1', '--n_embd=32',
         '--block_size=16', '--batch_size=2', '--gradient_accumulation_steps=1',
         '--eval_interval=1', '--eval_iters=1', '--warmup_iters=0', '--learning_rate=1e-3']


def logged_steps(out_dir):
    """Return the steps in log.jsonl, in its order, without half a line at its end."""
    with open(f'{out_dir}/log.jsonl', encoding='utf-8') as f:
        records = [json.loads(line) for line in f if line.endswith('\n')]
    return [record['step'] for record in records if 'loss' in record]


def run_and_kill(folder, moment, delay):
    """Kill train.py `delay` seconds after its 'start', first 'step' or next 'save'.

    Returns the first step it trained or None, the last step it reported as saved or None, and its
    output.
    """
    process = subprocess.Popen([*TRAIN, '--init_from=auto'], cwd=folder, env=common.environment(),
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    killer = threading.Timer(delay, process.kill)
    if moment == 'start':
        killer.start()
    first, reported, lines = None, None, []
    for line in process.stdout:
        lines.append(line)
        if match := common.ITER.match(line):
            first = int(match[1]) if first is None else first
        elif match := common.SAVED.match(line):
            reported = int(match[2])
        # an evaluation's line comes right before a save; the first save is spared, for progress
        is_saving = reported is not None and line.startswith('step ')
        if (moment == 'step' and first is not None) or (moment == 'save' and is_saving):
            moment = 'over'
            killer.start()
    if process.wait() != -9:
        raise UserError(f'train.py ended by itself:\n{"".join(lines)[-2000:]}')
    return first, reported, ''.join(lines)


def kill_runs(folder):
    """Return the counts of all kills, and a list of failures."""
    chance = random.Random(seed)
    out_dir = f'{folder}/out'
    counts = {'kills': runs, 'before the first step': 0, 'with a half-written file': 0,
              'saves reported': 0}
    moments = ['step', 'step', 'save', 'step', 'start', 'save', 'step', 'save', 'step', 'start']
    failures, on_disk, longest_start = [], 0, 4.0
    for kill in range(runs):
        moment = moments[kill % 10]
        most = {'start': longest_start, 'step': longest, 'save': 0.01}[moment]
        t0 = time.perf_counter()
        first, reported, text = run_and_kill(folder, moment, chance.uniform(0, most))
        if moment == 'step':
            longest_start = time.perf_counter() - t0  # reaches the training
        counts['before the first step'] += first is None
        counts['saves reported'] += text.count('\nsaved ')
        counts['with a half-written file'] += bool(glob.glob(f'{out_dir}/ckpt.pt.*.tmp'))
        if first is not None and first != on_disk:
            failures.append(f'kill {kill}: the run began at step {first}, ckpt.pt was of step '
                            f'{on_disk}')
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
                    failures.append(f'kill {kill}: ckpt.pt is of step {step}, but {expected} was '
                                    f'reported as saved')
                on_disk = step
        print(f'kill {kill + 1} of {runs}: step {on_disk}, {len(failures)} failures',
              file=sys.stderr)
    counts['steps in the end'] = on_disk
    if logged_steps(out_dir)[:on_disk] != list(range(on_disk)):
        failures.append('log.jsonl does not hold every step once')
    return counts, failures


def digest(path):
    with open(path, 'rb') as f:
        return hashlib.sha256(f.read()).hexdigest()


# in a mount namespace of its own: moves out_dir to a tmpfs with room for a few lines of the log
ON_TMPFS = '''out=$1; kb=$2; shift 2
mkdir full && mount -t tmpfs -o size=${kb}k tmpfs full && cp "$out"/* full/ || exit 99
"$@" --out_dir=full; status=$?
rm -r "$out"/*; cp -r full/. "$out"; exit $status'''


def full_disk(folder, tmpfs):
    """Train 10 steps, resume on a full disk, and resume with room.

    Returns None, or what failed.
    """
    out_dir = f'{folder}/{"tmpfs" if tmpfs else "limit"}'
    train = [*TRAIN, '--init_from=auto', f'--out_dir={out_dir}']

    def start(command, limit=None):
        return subprocess.run(command, cwd=folder, env=common.environment(), text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=limit)

    # 10 steps with room
    common.run([*train, '--max_iters=10'], cwd=folder)
    before, log_size = digest(f'{out_dir}/ckpt.pt'), os.path.getsize(f'{out_dir}/log.jsonl')

    # 3 steps without
    more, limit = [*train, '--max_iters=13'], None
    if tmpfs:
        sizes = [os.path.getsize(f'{out_dir}/{name}') for name in os.listdir(out_dir)]
        kilobytes = sum(-(-size // 4096) * 4 for size in sizes) + 8  # the start copies the log
        more = ['unshare', '-rm', 'sh', '-c', ON_TMPFS, 'sh', out_dir, str(kilobytes), *more]
    else:
        import resource

        def limit():  # of any one file: the log ends in the middle of a line
            resource.setrlimit(resource.RLIMIT_FSIZE, (log_size + 100, log_size + 100))

    done = start(more, limit)
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

    # 3 steps with room
    done = start([*train, '--max_iters=13'])
    if done.returncode != 0 or 'iter 10: ' not in done.stdout:
        return f'with room again it does not resume:\n{done.stdout[-600:]}'
    if logged_steps(out_dir) != list(range(13)):
        return f'log.jsonl holds steps {logged_steps(out_dir)}, expected 0 to 12'
    return None


# kill, then fill the disk
if sys.platform == 'win32':
    raise UserError('bench.kill needs SIGKILL and RLIMIT_FSIZE; run it on Linux or macOS')
with tempfile.TemporaryDirectory() as folder:
    common.make_dataset(folder, 10_000, seed)
    counts, failures = kill_runs(folder)
    disks = {'RLIMIT_FSIZE': full_disk(folder, tmpfs=False)}
    disks['tmpfs'] = 'could not be tried: no unshare'
    if shutil.which('unshare'):
        disks['tmpfs'] = full_disk(folder, tmpfs=True)

# report
print(common.heading('kill'))
print(common.table([['', 'count'], *counts.items(), ['failures', len(failures)]]))
print(*failures, sep='\n')
for name, problem in disks.items():
    print(f'full disk, {name}: {problem or "old checkpoint unchanged, training continued"}')
has_failed = any(problem and 'could not be tried' not in problem for problem in disks.values())
common.finish('kill', runs, failures=failures,
              **{key.replace(' ', '_').replace('-', '_'): value for key, value in counts.items()},
              full_disk={name: problem or 'ok' for name, problem in disks.items()})
raise SystemExit(bool(failures) or has_failed)
