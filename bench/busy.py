"""
Time training steps while other programs use the cores.

    $ python -m bench.busy                    # alone, then beside two busy processes
    $ python -m bench.busy --beside=0,1,2,4 --rounds=5

Runs the first steps of config/quickstart.py. OpenMP's threads wait in one of five ways: spinning as
libgomp does, passively, with two shorter spins, and as flatgpt/cores.py does, which is the default.
The ways take turns. A busy process counts in Python.
"""

import statistics
import subprocess
import sys
import tempfile

from bench import common
from configurator import Count, override

# settings -----------------------------------------------------------------------------------------
beside = '0,2'  # numbers of busy processes
rounds: Count = 3
steps: Count = 30  # measured, after 10 others
config = override(globals())
# --------------------------------------------------------------------------------------------------

WAYS = {'libgomp': {'GOMP_SPINCOUNT': '300000'}, 'passive': {'OMP_WAIT_POLICY': 'passive'},
        'spin 1,000': {'GOMP_SPINCOUNT': '1000'}, 'spin 20,000': {'GOMP_SPINCOUNT': '20000'},
        'cores.py': {}}
SETTINGS = ['config/quickstart.py', '--log_interval=1', '--compile=True']


def measure(way):
    """Return the mean milliseconds of a step."""
    with tempfile.TemporaryDirectory() as folder:
        command = common.train_command([*SETTINGS, f'--out_dir={folder}/out'])
        return statistics.mean(common.step_times(command, 10 + steps, **WAYS[way])[10:])


def main():
    times = {}
    for n in map(int, beside.split(',')):
        others = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(n)]
        try:
            for _ in range(rounds):
                for way in WAYS:
                    times.setdefault((way, n), []).append(measure(way))
                    print(f'{n} beside, {way}: {times[way, n][-1]:.0f} ms', flush=True)
        finally:
            for other in others:
                other.kill()
    figures = {f'{way}, {n} beside': common.spread(values, 1) for (way, n), values in times.items()}
    rows = [['ms a step', *(f'{n} beside' for n in beside.split(','))]]
    rows += [[way, *(common.show(figures[f'{way}, {n} beside'], form='{:.0f}')
                     for n in beside.split(','))] for way in WAYS]
    print(common.heading('steps of config/quickstart.py beside busy processes'))
    print(common.table(rows))
    common.finish('busy', rounds, **figures)


if __name__ == '__main__':
    main()
