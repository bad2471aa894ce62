"""
Damage files of every kind that is read here, and count what becomes of it.

    $ python -m bench.fuzz                                    # 2,000 cases of each kind
    $ python -m bench.fuzz --kind=ckpt --seed=12 --cases=2000
    $ python -m bench.fuzz --kind=ckpt --seed=12 --number=7   # one case again

A case damages one file, its bytes or the values in it (bench/mutate.py), and
reads it as the scripts do. It ends in one of these ways:
  - same:      the result is that of the file without damage;
  - other:     another result is accepted; no checksum could find the damage;
  - refused:   an error for the user;
  - traceback: another exception;
  - changed:   another result although a checksum no longer fits;
  - memory:    more than 2 GB, or an allocation that was refused;
  - hang:      more than 20 s;
  - crash:     a signal.

Prints a table and the first cases of each fault, then a JSON line; exit status 1
after a crash, hang, memory or changed.
"""

import collections
import re
import sys
import tempfile
import time

import torch

from bench import common
from bench.fuzz_cases import BAD, GOOD, run_cases
from bench.fuzz_kinds import make_kinds
from configurator import Count, Natural, UserError, nearest, override

# Settings -----------------------------------------------------------------------------------------
kind = ''  # the kind of file; '': all
cases: Count = 2000  # cases of each kind
seed: Natural = 0
number: Natural | None = None  # the case to run again, with its error
config = override(globals())
# --------------------------------------------------------------------------------------------------


def place_of(outcome):
    """Return the last line of a traceback that is in this repository."""
    places = re.findall(rf'{re.escape(common.ROOT)}/(.+)", line (\d+)', outcome.reason)
    places = [f'{path}:{line}' for path, line in places if not path.startswith('bench/fuzz_cases')]
    last = (outcome.reason.strip().splitlines() or [''])[-1]
    return f'{outcome.name} {places[-1] if places else ""} {last[:100]}'


# make the files
if sys.platform != 'linux':
    raise UserError('bench.fuzz measures memory by /proc; run it on Linux')
torch.set_num_threads(1)  # workers are forked
with tempfile.TemporaryDirectory() as folder:
    kinds = make_kinds(folder)
if kind and kind not in kinds:
    raise UserError(f'kind={kind!r}: expected one of {", ".join(kinds)}{nearest(kind, kinds)}')
chosen = [kind] if kind else list(kinds)
numbers = range(cases) if number is None else [number]

# run the cases
counts, faults = {}, {}
for name in chosen:
    started, by_place = time.perf_counter(), {}
    outcomes = run_cases(kinds[name], seed, numbers)
    counts[name] = collections.Counter(outcome.name for outcome in outcomes)
    for outcome in outcomes:
        if outcome.name in BAD:
            by_place.setdefault(place_of(outcome), []).append(outcome.number)
        if number is not None:
            print(f'{outcome.name}: {outcome.reason}')
    faults |= {f'{name}: {place}': found for place, found in by_place.items()}
    print(f'{name}: {time.perf_counter() - started:.0f} s, {len(by_place)} kinds of faults',
          file=sys.stderr)

# report
total = sum(counts.values(), collections.Counter())
print(common.heading('fuzz'))
print(common.table([['kind', *GOOD, *BAD], *(
    [name, *(count[outcome] for outcome in (*GOOD, *BAD))] for name, count in
    [*counts.items(), ('all', total)])]))
for place, found in faults.items():
    print(f'{len(found)} x {place} (number {", ".join(map(str, found[:3]))})')
common.finish('fuzz', len(numbers), seed=seed, counts=counts, total=total)
raise SystemExit(any(total[outcome] for outcome in ('changed', 'memory', 'hang', 'crash')))
