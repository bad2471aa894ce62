"""
Compare the wall time to a validation loss, ours and nanoGPT's, in turns.

    $ python -m bench.time_to_loss --peer=../nanoGPT
    $ python -m bench.time_to_loss --rounds=1                # ours alone
    $ python -m bench.time_to_loss --case=char --peer=../nanoGPT --rounds=1
    $ python -m bench.time_to_loss --case=char --full=False \\
        --sprint_char='--max_iters=400 --eval_interval=25'
    $ python -m bench.time_to_loss --peer=../nanoGPT --extra=--device=cuda \\
        --peer_flags=                                        # both on a GPU

--peer is a checkout of nanoGPT with data/shakespeare_char prepared.

Cases: 'small' compares the CPU command of nanoGPT's README (0.8M parameters,
2000 steps) with config/shakespeare_cpu.py, in about four minutes a round; 'char'
compares its config/train_shakespeare_char.py (10.65M) with ours of that name, in
up to 40 minutes. Ours runs twice a round: a 'sprint' with flags for an early
target, and the 'full' run of the config file for the lowest loss. Each round has
another --seed, except for nanoGPT, which has a fixed seed.

The target is nanoGPT's loss in the round; without --peer it is nanoGPT's known
loss, 1.8857 or 1.4697. Every loss is that of a checkpoint over the whole val
split, computed here in fp32. The target is reached at the first evaluation whose
checkpoint is at or below it. The logged loss of that checkpoint, in the dtype of
the run, is printed too.

Time is measured twice. Without evaluations: the sum of the steps as each program
prints them, without compilation. (nanoGPT's time of a step includes an
evaluation before it; such a step counts as its median step.) With evaluations:
wall time from the start of the process to the line of the evaluation, or to the
end of the process where whole runs are compared. An untimed start caches the
compiled code, unless --cold=True.

nanoGPT's 5000 steps of 'char' take hours on a CPU. So only some steps are timed,
and the time is estimated as that of 1750 steps: the lowest loss comes between
steps 1000 and 2500.

The bars, on two AMX cores: 'small' in 1/6 of nanoGPT's time (aim: 1/10), and a
loss of 1.60 (1.52) within nanoGPT's time; 'char' in 180 s (90 s), and 1.42
(1.38) within 1800 s. Prints a table of medians over the rounds with their range,
then a JSON line; a time to the target is null there if any round missed it.
"""

import filecmp
import os
import shlex
import statistics
import sys
import tempfile
import time
from typing import Literal

from bench import common
from configurator import Count, NonNegative, UserError, override
from data.datasets import prepare_if_missing
from flatgpt import logs

# Settings -----------------------------------------------------------------------------------------
case: Literal['small', 'char'] = 'small'
peer = ''  # path of a nanoGPT checkout; '': without the comparison
rounds: Count = 3
target: float | None = None  # nats per character; None: nanoGPT's loss of the round, or known loss
# small: flags of the sprint, a schedule as short as the target allows
sprint = ('--batch_size=24 --max_iters=115 --eval_interval=115 --compile=True --muon_lr=0.03 '
          '--embedding_lr=0.03 --learning_rate=0.006 --momentum=0.85 --sample_tokens=0')
sprint_char = ''  # char: flags of the sprint; '': the full run until it reaches the target
full = True  # also the full run, up to 30 minutes with 'char'
extra = ''  # flags for all of our runs, such as --device=cuda
peer_flags = '--device=cpu --compile=False'  # flags for nanoGPT
peer_steps: Count = 3  # char: nanoGPT's steps to time, after an untimed first
cold = False  # True: each of our runs begins with an empty cache of compiled code
wait: NonNegative = 0  # most seconds to wait for a quiet machine before each run
config = override(globals())
# --------------------------------------------------------------------------------------------------

CASES = {  # nanoGPT's command and known loss, our config file, bars and aims
    'small': {'theirs': common.SMALL, 'known_loss': 1.8857, 'ours': 'config/shakespeare_cpu.py',
              'share': ('1/6', '1/10'), 'seconds': ('', ''), 'best': ('1.60', '1.52'), 'limit': ''},
    'char': {'theirs': common.CHAR, 'known_loss': 1.4697,
             'ours': 'config/train_shakespeare_char.py', 'share': ('', ''),
             'seconds': ('180', '90'), 'best': ('1.42', '1.38'), 'limit': '1800'}}
ESTIMATED_STEPS = 1750  # char: the middle of the range of nanoGPT's lowest loss
SLACK = 0.01  # nats, more than evaluations in bf16 and fp32 differ
this = CASES[case]


def run_peer(folder):
    """Run nanoGPT; return its val_loss, train_s, wall_s, step_ms and steps."""
    command = [*common.train_command(this['theirs'], auto=True), *shlex.split(peer_flags),
               f'--out_dir={folder}']
    if case == 'char':
        times = common.step_times([*command, '--eval_iters=1'], 1 + peer_steps, cwd=peer)[1:]
        ms = statistics.median(times)
        seconds = ms * ESTIMATED_STEPS / 1e3
        return {'val_loss': this['known_loss'], 'train_s': seconds, 'wall_s': seconds,
                'step_ms': ms, 'steps': ESTIMATED_STEPS}
    t0 = time.perf_counter()
    # ckpt.pt is then of the last step
    text = common.run([*command, '--always_save_checkpoint=True'], cwd=peer)
    wall_s = time.perf_counter() - t0
    times, after_evaluation = [], set()
    for line in text.splitlines():
        if common.EVALUATED.match(line):
            after_evaluation.add(len(times))
        elif match := common.ITER.match(line):
            times.append(float(match[3]))
    ms = statistics.median(times)
    train_s = sum(ms if i in after_evaluation else t for i, t in enumerate(times)) / 1e3
    loss, step = common.val_loss(os.path.join(folder, 'ckpt.pt'), data_dir)
    return {'val_loss': loss, 'train_s': train_s, 'wall_s': wall_s, 'step_ms': ms, 'steps': step}


def our_command(flags):
    return common.train_command(
        [os.path.join(common.ROOT, this['ours']), *flags, *shlex.split(extra)],
        script=os.path.join(common.ROOT, 'train.py'))


def run_ours(flags, seed, goal, folder):
    """Run our training to its end.

    Returns 'best_val' in fp32, 'best_val_logged', 'train_s' and 'wall_s' of the whole run. And of
    the first checkpoint at or below `goal`: 'reached_step', 'reached_val', 'reached_val_logged',
    'reached_train_s' and 'reached_wall_s', or None.
    """
    walls, kept, is_sure = {}, [], False
    cache = {'TORCHINDUCTOR_CACHE_DIR': f'{folder}-cache'} if cold else {}
    command = [*our_command(flags), f'--seed={seed}', f'--out_dir={folder}']
    t0 = time.perf_counter()
    for line in common.follow(command, cwd=None, **cache):
        now = time.perf_counter() - t0
        if match := common.EVALUATED.match(line):
            walls[int(match[1])], logged = now, float(match[3])
        elif common.SAVED.match(line) and 'best so far' in line and logged <= goal + SLACK:
            if not is_sure:  # the losses in fp32 are computed after the run
                kept.append(f'{folder}-{len(kept)}.pt')
                os.link(os.path.join(folder, 'best.pt'), kept[-1])
                is_sure = logged <= goal - SLACK
    wall_s = time.perf_counter() - t0
    steps, evaluations = logs.read_log(folder)
    evaluations = {record['step']: record for record in evaluations}
    best_val, step = common.val_loss(os.path.join(folder, 'best.pt'), data_dir)
    result = {'wall_s': wall_s, 'train_s': steps[-1]['train_time'], 'best_val': best_val,
              'best_val_logged': evaluations[step]['val_loss'],
              **dict.fromkeys(['reached_step', 'reached_val', 'reached_val_logged',
                               'reached_train_s', 'reached_wall_s'])}
    for path in kept:
        loss, step = common.val_loss(path, data_dir)
        if loss <= goal:
            record = evaluations[step]
            return result | {
                'reached_step': step, 'reached_val': loss,
                'reached_val_logged': record['val_loss'], 'reached_train_s': record['train_time'],
                'reached_wall_s': walls[step]}
    return result


def spread(values, digits=3):
    """Return common.spread, or None if one of the values is None."""
    return None if None in values else common.spread(values, digits)


def shares(ours, theirs, key, their_key):
    """Return the spread of ours over theirs, round by round, or None."""
    return spread([None if a[key] is None else a[key] / b[their_key]
                   for a, b in zip(ours, theirs, strict=True)])


# prepare
data_dir = os.path.join('data', 'shakespeare_char')  # here or in the repository, as in train.py
if not os.path.isdir(data_dir):
    data_dir = os.path.join(common.ROOT, data_dir)
prepare_if_missing(data_dir, is_first=True)
if peer:
    common.check_peer(peer)
    our_val = os.path.join(data_dir, 'val.bin')
    their_val = os.path.join(peer, 'data', 'shakespeare_char', 'val.bin')
    if not filecmp.cmp(their_val, our_val, shallow=False):
        raise UserError(f'{their_val} differs from {our_val}, so losses cannot be compared; '
                        f'prepare both from the same text')
sprint_flags = shlex.split(sprint if case == 'small' else sprint_char)
runs = {'sprint': sprint_flags, **({'full': []} if full and sprint_flags else {})}

# take turns
theirs, goals, ours = [], [], {name: [] for name in runs}
with tempfile.TemporaryDirectory() as folder:
    for name, flags in runs.items():
        if not cold:  # compiles before the timed runs
            print(f'{name}: compiling', file=sys.stderr)
            command = [*our_command(flags), f'--out_dir={folder}/compile-{name}']
            common.step_times(command, 1, cwd=None)
    for turn in range(rounds):
        print(f'round {turn + 1} of {rounds}', file=sys.stderr)
        common.wait_for_quiet(wait)
        if peer:
            theirs.append(run_peer(os.path.join(folder, f'peer-{turn}')))
        known_loss = theirs[-1]['val_loss'] if peer else this['known_loss']
        goals.append(known_loss if target is None else target)
        for name, flags in runs.items():
            common.wait_for_quiet(wait)
            out_dir = os.path.join(folder, f'{name}-{turn}')
            ours[name].append(run_ours(flags, 1337 + turn, goals[-1], out_dir))
if full and not sprint_flags:
    ours['full'] = ours['sprint']

# compute figures over the rounds
figures = {'target': common.spread(goals, 4)}
if peer:
    figures['peer'] = {
        key: common.spread([run[key] for run in theirs], 4 if key == 'val_loss' else 3)
        for key in theirs[0]}
    figures['peer']['estimated'] = case == 'char'
for name, results in ours.items():
    f = figures[name] = {'flags': shlex.join(runs.get(name, []))}
    for key in results[0]:
        f[key] = spread([run[key] for run in results], 4 if '_val' in key else 3)
    f['rounds_reached'] = sum(run['reached_step'] is not None for run in results)
    f['reached_wall_s_by_round'] = [run['reached_wall_s'] and round(run['reached_wall_s'], 3)
                                    for run in results]
    for kind in ('train_s', 'wall_s') if peer else ():
        f[f'reached_{kind}_of_peer'] = shares(results, theirs, f'reached_{kind}', kind)
        f[f'{kind}_of_peer'] = shares(results, theirs, kind, kind)
        # by the milliseconds that are reported: equal ones are within
        f[f'rounds_within_peer_{kind}'] = sum(round(a[kind], 3) <= round(b[kind], 3)
                                              for a, b in zip(results, theirs, strict=True))

# report
rows = [['', 'measured', 'bar', 'aim']]


def row(label, value, form='{:,.1f}', bars=('', '')):
    rows.append([label, value if isinstance(value, str) else common.show(value, form=form), *bars])


if peer:
    p = figures['peer']
    is_known = case == 'char'
    row('nanoGPT: val loss', f'{this["known_loss"]}, documented' if is_known else p['val_loss'],
        '{:.4f}')
    row('  a step, ms', p['step_ms'])
    if case == 'char':
        row(f'  {ESTIMATED_STEPS} steps, estimated, s', p['train_s'])
    else:
        row('  its steps, s', p['train_s'])
        row('  with evaluations, start, s', p['wall_s'])
s = figures['sprint']
row('target', figures['target'], '{:.4f}')
if s['rounds_reached'] < rounds:
    where = '' if rounds == 1 else f' in {rounds - s["rounds_reached"]} of {rounds}'
    row('ours: time to it', f'not reached{where}, best {s["best_val"]["min"]:.4f}')
else:
    row('ours: reached at step', s['reached_step'], '{:.0f}')
    row('  its steps, s', s['reached_train_s'], bars=this['seconds'])
    row('  with evaluations, start, s', s['reached_wall_s'], bars=this['seconds'])
    if peer:
        row("  steps, of nanoGPT's time", s['reached_train_s_of_peer'], '{:.3f}', this['share'])
        row("  with evaluations, of nanoGPT's", s['reached_wall_s_of_peer'], '{:.3f}',
            this['share'])
    row('  val loss there', s['reached_val'], '{:.4f}')
    row('  val loss in the log', s['reached_val_logged'], '{:.4f}')
if full:
    f = figures['full']
    row('full run: lowest val loss', f['best_val'], '{:.4f}', this['best'])
    row('  val loss in the log', f['best_val_logged'], '{:.4f}')
    row('  its steps, s', f['train_s'])
    row('  with evaluations, start, s', f['wall_s'], bars=(this['limit'], ''))
    if peer:
        row("  steps within nanoGPT's time", f'{f["rounds_within_peer_train_s"]} of {rounds}')
        row('  with evaluations, as well', f'{f["rounds_within_peer_wall_s"]} of {rounds}')
print(common.heading(f'time_to_loss, {case}'))
print(common.table(rows))
common.finish('time_to_loss', rounds, case=case, cold=cold, **figures)
