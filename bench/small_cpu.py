"""
The whole CPU command of nanoGPT's README, 2000 steps of a 0.8M model: nanoGPT's time and loss, and ours.

    $ python -m bench.small_cpu --peer=../nanoGPT   # a checkout whose data/shakespeare_char is prepared
    $ python -m bench.small_cpu                     # ours alone

Runs one after the other, wall time of the whole process: nanoGPT as its README says; train.py with the same recipe
(config/shakespeare_char_classic.py) and flags ('same flags'); and train.py without --device=cpu --compile=False
('auto'), once with an empty cache of compiled code ('cold', what a first run sees) and once more ('warm'). All save
at every evaluation, so that ckpt.pt is of step 2000. The loss is that of ckpt.pt over the whole val split,
evaluated here for both in the same way, in fp32. The bar: the same loss within noise, and auto in at most 1/1.5 of
nanoGPT's time. About 5 minutes a round. Each round has another --seed, except for nanoGPT, whose seed is fixed.
"""

import os
import statistics
import sys
import tempfile
import time

from bench import common
from configurator import override
from data.datasets import prepare_if_missing

# settings ------------------------------------------------------------------------------------------------------------
peer = ''  # path of a nanoGPT checkout; '': without it
runs = 'peer,same flags,auto cold,auto warm'  # which, in this order
rounds = 1
max_iters = 2000  # fewer for a quick look; the comparison is meant at 2000
wait = 0  # seconds to wait before each run, at most, until other processes leave the machine alone
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------


os.chdir(common.ROOT)  # datasets are found from there
data_dir = 'data/shakespeare_char'
prepare_if_missing(data_dir, is_first=True)
names = [name for name in runs.split(',') if peer or name != 'peer']
known = ('peer', 'same flags', 'auto cold', 'auto warm')
for name in names:
    if name not in known:
        raise SystemExit(f'runs={runs!r}: {name!r} is none of {", ".join(known)}')
if peer:
    common.check_peer(peer)
arguments = [*common.SMALL, '--always_save_checkpoint=True', f'--max_iters={max_iters}',
             f'--lr_decay_iters={max_iters}', f'--eval_interval={min(250, max_iters)}']
seconds, losses, step_ms = ({name: [] for name in names} for _ in range(3))
with tempfile.TemporaryDirectory() as folder:
    for turn in range(rounds):
        cache = os.path.join(folder, f'cache-{turn}')  # torch's, for compiled code
        for name in names:
            print(f'{name}: round {turn + 1} of {rounds}', file=sys.stderr)
            common.wait_for_quiet(wait)
            out_dir = os.path.join(folder, f'{name}-{turn}'.replace(' ', '-'))
            command = common.train_command(arguments if name == 'peer' else common.classic(arguments),
                                           auto=name.startswith('auto'))
            command.append(f'--out_dir={out_dir}')
            if name == 'peer':
                os.makedirs(out_dir)
            else:
                command.append(f'--seed={1337 + turn}')
            t0 = time.perf_counter()
            text = common.run(command, cwd=peer if name == 'peer' else common.ROOT, TORCHINDUCTOR_CACHE_DIR=cache)
            seconds[name].append(time.perf_counter() - t0)
            path = os.path.join(out_dir, 'ckpt.pt')
            loss, step = common.val_loss(path, data_dir)
            if step != max_iters:
                raise SystemExit(f'{path} is of step {step}, expected {max_iters}')
            losses[name].append(loss)
            times = [float(match[3]) for match in map(common.ITER.match, text.splitlines()) if match]
            step_ms[name].append(statistics.median(times))

print(common.heading('small_cpu'))
titles = {'peer': 'nanoGPT', 'same flags': 'train.py, same flags', 'auto cold': 'train.py, auto, cold cache',
          'auto warm': 'train.py, auto, warm cache'}
rows, figures = [['', 'wall s', 'ms a step', 'val loss', "of nanoGPT's"]], {}
for name in names:
    figures[name.replace(' ', '_')] = run = {'wall_s': common.spread(seconds[name]),
                                             'step_ms': common.spread(step_ms[name]),
                                             'val_loss': common.spread(losses[name], 4)}
    if peer:
        run['share_of_peer_time'] = common.spread([a / b for a, b in zip(seconds[name], seconds['peer'], strict=True)])
    rows.append([titles[name], common.show(run['wall_s']), common.show(run['step_ms']),
                 common.show(run['val_loss'], form='{:.4f}'),
                 common.show(run['share_of_peer_time'], form='{:.2f}') if peer else '-'])
print(common.table(rows))
common.finish('small_cpu', rounds, steps=max_iters, **figures)
