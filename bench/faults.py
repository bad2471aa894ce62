"""
Fail at every file operation of every script, to check that nothing is lost.

    $ python -m bench.faults                        # about 2,500 cases, an hour
    $ python -m bench.faults --most=6 --script=rl   # a quick look at one script
    $ python -m bench.faults --script=export --fault=KILL --number=7    # one case

A library that is loaded before the C library (bench/faults.c, LD_PRELOAD) counts the file
operations of a script below its folder. At the n-th it sends SIGKILL or SIGTERM to the process,
lets the operation fail with ENOSPC or EIO, or fills the disk for good after half a write. Then
  - what was there before, or was reported as saved, is there, loads and is whole;
  - the exit status is not 0 unless the result is on disk; an error is a sentence, no traceback;
  - the same command without a fault ends well, with the result of the undisturbed run, bit for
    bit, and no temporary file stays.

Prints a table of the wrong cases by script and fault, then a JSON line; exit status 1 if there
is one. Needs Linux and a C compiler. Power cuts are not covered.
"""

import contextlib
import ctypes
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Literal

from bench import common, victims
from configurator import Count, Natural, Seed, UserError, override
from flatgpt import checkpoint

# Settings -----------------------------------------------------------------------------------------
script = ''  # only the scripts whose name begins with this; '': all
fault: Literal['', 'KILL', 'TERM', 'NO_SPACE', 'IO_ERROR', 'FULL'] = ''  # only this one; '': all
number: Natural = 0  # only this operation, the first is 1; 0: a sample
most: Count = 24  # operations of a script that get each fault
folder = ''  # the folder to work in; '': a temporary one
seed: Seed = 0  # chooses the operations
config = override(globals())
# --------------------------------------------------------------------------------------------------

FAULTS = {name: getattr(victims, name) for name in ('KILL', 'TERM', 'NO_SPACE', 'IO_ERROR', 'FULL')}


@dataclass
class Undisturbed:
    """Hold what a script finds and leaves: folder, contents, result, file names."""

    folder: str
    before: dict
    result: object
    names: set
    kinds: str  # of its operations, a letter each: see faults.c


def measure(server, script):
    """Run a script without a fault."""
    folder = server.prepare(script, f'{server.place}/{script.name}')
    before = victims.contents(f'{server.place}/w')
    code, text = server.run(script)
    if code:
        raise UserError(f'{script.name} fails without a fault:\n{text}')
    return Undisturbed(folder, before, script.result(server.place), names_in(server.place),
                       server.operations())


def names_in(place):
    """Return the paths of a script's files, without those of an earlier run."""
    return {path for path in victims.contents(f'{place}/w') if 'previous-' not in path}


def check_run(place, text, before):
    """Yield what is wrong with a run's files. text: its output; before: what it found."""
    out = f'{place}/w/out'
    now = victims.contents(out) if os.path.isdir(out) else {}
    reported = dict.fromkeys(('ckpt.pt', 'best.pt'), 0)
    for step, best in re.findall(r'^saved \S+ at step (\d+)( \(best so far\))?', text, re.M):
        reported |= {'ckpt.pt': int(step), **({'best.pt': int(step)} if best else {})}
    for name, step in reported.items():
        if step and name not in now:
            yield f'{name} was reported, and is not there'
        if f'out/{name}' in before and not any(path.endswith(name) for path in now):
            yield f'{name} of the earlier run is gone'
    for path in now:
        if path.endswith('.pt'):
            try:
                step = checkpoint.load(f'{out}/{path}')['iter_num']
            except ValueError as error:
                yield str(error)
            else:
                if step < reported.get(path, 0):
                    yield f'{path} is of step {step}, {reported[path]} was reported'
    moved = {os.path.dirname(path) for path in now if path.startswith('previous-')}
    if len(moved) > 1:
        yield f'the earlier run is in {sorted(moved)}'


def check_files(script, place, undisturbed):
    """Yield what is wrong with result files: old ones, new ones or none are right."""
    now = victims.contents(f'{place}/w')
    if script.name.startswith('prepare'):
        old = {os.path.basename(path): content for path, content in undisturbed.before.items()}
        with contextlib.suppress(UserError):  # none
            dataset = {path: content for path, content in script.result(place).items()
                       if not path.startswith('.')}
            if dataset not in (old, undisturbed.result):
                yield f'a mixture: {sorted(dataset)}'
        return
    for path, content in now.items():
        right = undisturbed.before.get(path), undisturbed.result.get(path)
        if path in undisturbed.result and content not in right:
            yield f'{path} is neither the old file nor the new one'


def is_right(result, undisturbed, text):
    """Return whether a result is that of the undisturbed run.

    A checkpoint that the disk refuses is a warning, and the best of the run may be that one.
    """
    if 'could not be saved' in text and isinstance(result, dict):
        return all(result[key] == undisturbed.result[key] for key in ('weights', 'log'))
    return result == undisturbed.result


def check(server, script, undisturbed, code, text):
    """Yield what is wrong after a fault. code, text: exit status and output."""
    place, is_run = server.place, script.result is victims.run_result
    if is_run:
        yield from check_run(place, text, undisturbed.before)
    elif not script.prints:
        yield from check_files(script, place, undisturbed)
    if code is None:
        yield 'it hangs'
    if code == 0 and not is_right(victims.result_of(script, place), undisturbed, text):
        stopped = re.search(r'^stopped by SIGTERM after step (\d+)', text, re.M)
        path = f'{place}/w/out/ckpt.pt'
        saved = checkpoint.load(path)['iter_num'] if os.path.exists(path) else 0
        if not stopped or saved != int(stopped[1]):
            yield 'exit status 0, but the result is not there'
    if 'Traceback' in text or 'Exception ignored' in text:
        yield f'exit status {code}, a traceback'
    if code and code > 0 and 'error' not in text and 'not saved' not in text:
        yield f'exit status {code} without a word'


def check_again(server, script, undisturbed, code, text):
    """Yield what is wrong after the same command without a fault, which ran now."""
    result = victims.result_of(script, server.place)
    if code != 0:
        yield f'again: exit status {code}'
    elif not is_right(result, undisturbed, text):
        parts = ([key for key, value in undisturbed.result.items() if result[key] != value]
                 if isinstance(result, dict) else result[:200])
        yield f'again: another result, {parts}'
    if left := sorted(names_in(server.place) - undisturbed.names):
        yield f'again: these files stay: {left}'


def try_case(server, script, undisturbed, fault, number):
    """Run a script with a fault, and again without; -> (what is wrong, the output)."""
    server.reset(undisturbed.folder)
    code, text = server.run(script, FAULTS[fault], number)
    wrong = [*check(server, script, undisturbed, code, text)]
    if fault not in ('KILL', 'TERM') and (code or 0) < 0:
        wrong.append(f'it ends by signal {-code}')
    if script.once and victims.result_of(script, server.place) == undisturbed.result:
        code, more = 0, ''  # it would refuse to write over it
    else:
        code, more = server.run(script)
    wrong += check_again(server, script, undisturbed, code, text + more)
    return wrong, f'{text}\n--- again\n{more}'


def choose(kinds, chance):
    """Choose the numbers of operations, few of the writes that follow a write."""
    weights = {i + 1: chance.random() + (kinds[max(0, i - 1) : i + 1] == 'ww')
               for i in range(len(kinds))}
    return sorted(sorted(weights, key=weights.get)[:most])


def try_all(place):
    """Return the table's rows, and {case: what is wrong}."""
    server, chance = victims.Server(victims.make_place(place)), random.Random(seed)
    server.load_library()
    faults, wrong = [fault] if fault else list(FAULTS), {}
    rows = [['', 'operations', 'cases', *faults]]
    for case in victims.scripts():
        if not case.name.startswith(script):
            continue
        undisturbed, started = measure(server, case), time.perf_counter()
        row = dict.fromkeys(faults, 0)
        numbers = [number] if number else choose(undisturbed.kinds, chance)
        for name in faults:
            for n in numbers:
                problems, text = try_case(server, case, undisturbed, name, n)
                if problems:
                    row[name] += 1
                    label = f'--script={case.name!r} --fault={name} --number={n}'
                    wrong[label] = problems
                    print(f'{label} ({undisturbed.kinds[n - 1]}): {"; ".join(problems)}',
                          text if number else '', file=sys.stderr)
        rows.append([case.name, len(undisturbed.kinds), len(numbers) * len(faults), *row.values()])
        print(f'{case.name}: {rows[-1][2]} cases in {time.perf_counter() - started:.0f} s',
              file=sys.stderr)
    return rows, wrong


def start_again(place):
    """Start this script again with the library loaded; -> its exit status."""
    environment = common.environment(LD_PRELOAD=victims.build_library(place), OMP_NUM_THREADS='1')
    command = [sys.executable, '-m', 'bench.faults', *sys.argv[1:]]
    return subprocess.run(command, cwd=common.ROOT, env=environment).returncode


place = tempfile.mkdtemp(dir=folder or None)  # a TemporaryDirectory would end with a child
try:
    if not hasattr(ctypes.CDLL(None), 'arm'):
        raise SystemExit(start_again(place))
    rows, wrong = try_all(place)
finally:
    shutil.rmtree(place)

# report
_, *columns = zip(*rows[1:], strict=True)
print(common.heading('faults'))
print(common.table([*rows, ['all', *map(sum, columns)]]))
print(*(f'{label}: {"; ".join(problems)}' for label, problems in wrong.items()), sep='\n')
common.finish('faults', sum(columns[1]), wrong=len(wrong), seed=seed)
raise SystemExit(bool(wrong))
