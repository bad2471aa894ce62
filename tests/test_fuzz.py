"""bench/fuzz.py: its outcomes, and all kinds of damaged files through their readers. Run: pytest tests/test_fuzz.py"""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter

import pytest
from conftest import ROOT

from bench import fuzz_cases, fuzz_kinds, mutate
from configurator import UserError

if sys.platform != 'linux':
    pytest.skip('limits of memory are read from /proc', allow_module_level=True)


@pytest.fixture(scope='module')
def kinds(tmp_path_factory):
    return fuzz_kinds.make_kinds(tmp_path_factory.mktemp('kinds'))


# the fuzzer itself ----------------------------------------------------------------------------------------------------

def number_in_file():
    """Read a whole number from a file; do what it says."""
    with open('number') as file:
        number = int(file.read())
    match number:
        case 1:
            raise UserError('no')
        case 2:
            raise KeyError('oh')
        case 3:
            os.abort()
        case 4:
            time.sleep(60)
        case 5:
            bytearray(12 * 2**30)  # more than the limit and what a worker has freed
        case 6:
            raise SystemExit('could not allocate 3 GB')
    return number


@pytest.mark.parametrize('number, outcome', [*enumerate((
    'same', 'refused', 'traceback', 'crash', 'hang', 'memory', 'memory', 'changed', 'other'))])
def test_outcomes(monkeypatch, number, outcome):
    """Also behind a case that ends its process. A checksum that fits allows another result."""
    monkeypatch.setattr(fuzz_cases, 'SECONDS', 1 if outcome == 'hang' else 20)
    monkeypatch.setattr(fuzz_cases, 'mutate', lambda data, form, rng: (str(number).encode(), number == 8))
    kind = fuzz_cases.Kind('numbers', {'number': b'0'}, {'number': 'bytes'}, number_in_file, ('number',))
    outcomes = fuzz_cases.run_cases(kind, 0, range(2))
    assert [(o.number, o.name) for o in outcomes] == [(0, outcome), (1, outcome)]
    assert outcome != 'traceback' or "KeyError: 'oh'" in outcomes[0].reason


def test_files_that_are_refused_without_damage():
    kind = fuzz_cases.Kind('numbers', {'number': b'1'}, {'number': 'bytes'}, number_in_file)
    with pytest.raises(RuntimeError, match='numbers'):
        fuzz_cases.run_cases(kind, 0, range(2))


def test_damage_is_a_function_of_the_case(kinds):
    for kind in kinds.values():
        damaged = [fuzz_cases.damaged(kind, 3, number) for number in range(6)]
        assert damaged == [fuzz_cases.damaged(kind, 3, number) for number in range(6)]
        assert sum(files != kind.files for files, _ in damaged) > 2
        assert len({tuple(files.values()) for files, _ in damaged}) > 2


def test_trees_are_damaged_at_all_levels():
    """Every entry of a tree is touched by some case, and the tree itself stays."""
    tree = {'a': 1, 'b': {'c': [1, 2, {'d': 'x'}]}, 'e': [True, None, 0.5]}
    results = [mutate.mutate_tree(tree, random.Random(i)) for i in range(300)]
    assert tree == {'a': 1, 'b': {'c': [1, 2, {'d': 'x'}]}, 'e': [True, None, 0.5]}
    whole = [r for r in results if isinstance(r, dict)]
    assert len(whole) > 250 and all(any(r.get(key) != tree[key] for r in whole) for key in tree)
    assert any(r.get('b', {}) != tree['b'] and isinstance(r.get('b'), dict) and r['b'].get('c') == [1, 2]
               for r in whole if isinstance(r.get('b', {}), dict))


# the readers ----------------------------------------------------------------------------------------------------------

def refuse_bad(kind, seed, outcomes):
    """No case may crash, hang, take memory or pass for whole, nor raise an error that is not for the user."""
    bad = [o for o in outcomes if o.name in fuzz_cases.BAD]
    assert not bad, f'{len(bad)} cases of --kind={kind.name} --seed={seed}, the first is --number={bad[0].number}: {bad[0].reason}'


def test_a_few_cases(kinds, tmp_path, monkeypatch):
    """In this process, which is quick: none of these cases ends it."""
    monkeypatch.chdir(tmp_path)
    for name in kinds:
        fuzz_cases.write_files(kinds[name].files)
        valid = fuzz_cases.fingerprint(kinds[name].run())
        outcomes = [fuzz_cases.Outcome(n, *fuzz_cases.run_case(kinds[name], 0, n, valid)) for n in range(3)]
        refuse_bad(kinds[name], 0, outcomes)


@pytest.mark.slow
def test_many_cases(kinds):
    for name in kinds:
        outcomes = fuzz_cases.run_cases(kinds[name], 7, range(200))
        refuse_bad(kinds[name], 7, outcomes)
        assert Counter(o.name for o in outcomes)['refused'] or name in ('progress', 'log')  # which are mended


@pytest.mark.slow
def test_script():
    command = [sys.executable, '-m', 'bench.fuzz', '--kind=tokenizer']
    done = subprocess.run([*command, '--cases=30'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and 'tokenizer' in done.stdout, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])['total']
    assert sum(counts.values()) == 30 and counts['refused'] > 20
    done = subprocess.run([*command, '--number=7'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and 'refused: own.json' in done.stdout, done.stdout + done.stderr
