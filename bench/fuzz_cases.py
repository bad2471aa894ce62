"""
Run damaged files through their readers, and sort the outcomes.

The readers run in processes with limits.

    outcomes = run_cases(kind, seed=0, numbers=range(100))  # [Outcome, ...]

A worker process runs case after case. It is replaced when a case ends it or takes too long. A case
is a function of (kind, seed, number).
"""

import contextlib
import hashlib
import multiprocessing
import os
import random
import resource
import shutil
import tempfile
import traceback
from dataclasses import dataclass

import numpy as np
import torch

from bench.mutate import mutate
from configurator import UserError

SECONDS = 20  # a case that takes longer is a hang
MEMORY = 2 * 2**30  # bytes that a case may add to those of its process
GOOD = ('same', 'other', 'refused')  # 'other': accepted, with another result
BAD = ('traceback', 'changed', 'memory', 'hang', 'crash')
context = multiprocessing.get_context('fork')  # a worker starts with everything imported


@dataclass
class Kind:
    """Describe files that are read together.

    files: {name: content}, as they should be. forms: {name: format for mutate()} of those to
    damage. run: function that reads them in the current folder, like the script that does; ->
    anything made of plain values, tensors and arrays. checked: names of files whose damage is
    found by a checksum: what is read from them is as it was.
    """

    name: str
    files: dict
    forms: dict
    run: object
    checked: tuple = ()


@dataclass
class Outcome:
    """Hold the number of a case, its outcome in GOOD or BAD, and the reason."""

    number: int
    name: str
    reason: str = ''


def fingerprint(value, sha=None):
    """Return a SHA-256 of a value, bit for bit."""
    sha = sha or hashlib.sha256()
    if isinstance(value, dict | list | tuple):
        sha.update(f'{type(value).__name__} {len(value)}'.encode())
        for item in value.items() if isinstance(value, dict) else value:
            fingerprint(item, sha)
    elif isinstance(value, torch.Tensor | np.ndarray):
        array = value.detach().numpy() if isinstance(value, torch.Tensor) else value
        sha.update(f'{array.dtype} {array.shape}'.encode() + array.tobytes())
    else:
        sha.update(repr(value).encode('utf-8', 'surrogatepass'))
    return sha.hexdigest()


def write_files(files):
    """Make the current folder hold `files` and nothing else."""
    for entry in os.scandir():
        shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.remove(entry)
    for name, content in files.items():
        os.makedirs(os.path.dirname(name) or '.', exist_ok=True)
        with open(name, 'wb') as file:
            file.write(content)


def damaged(kind, seed, number):
    """Return the files of a case, and whether all checksums that there are still fit."""
    rng = random.Random(f'{kind.name} {seed} {number}')
    name = rng.choice(list(kind.forms))
    content, is_consistent = mutate(kind.files[name], kind.forms[name], rng)
    return {**kind.files, name: content}, is_consistent or name not in kind.checked


def run_case(kind, seed, number, valid):
    """Run a case; -> (name of its outcome, reason).

    valid: the fingerprint without damage.
    """
    files, may_differ = damaged(kind, seed, number)
    write_files(files)
    try:
        result = fingerprint(kind.run())
    except (UserError, SystemExit) as error:
        reason = str(error)
        is_memory = 'MemoryError' in reason or 'allocate' in reason
        return 'memory' if is_memory else 'refused', reason
    except MemoryError:
        return 'memory', traceback.format_exc()
    except Exception as error:
        if 'allocate memory' in str(error):
            return 'memory', traceback.format_exc()
        return 'traceback', traceback.format_exc()
    if result == valid:
        return 'same', ''
    return ('other', '') if may_differ else ('changed', 'accepted with another result')


def work(kind, seed, numbers, folder, pipe):
    """Run cases in a process of their own, and send each outcome."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.chdir(folder)
    write_files(kind.files)
    valid = fingerprint(kind.run())
    os.dup2(null, 2)
    with open('/proc/self/statm', encoding='ascii') as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for number in numbers:
        pipe.send(Outcome(number, *run_case(kind, seed, number, valid)))


def run_cases(kind, seed, numbers):
    """Run the cases of a kind; -> an Outcome of each, in order."""
    waiting, outcomes = list(numbers), []
    while waiting:
        receiver, sender = context.Pipe(duplex=False)
        with tempfile.TemporaryDirectory() as folder:
            process = context.Process(target=work, args=(kind, seed, waiting, folder, sender))
            process.start()
            sender.close()
            is_hang = False
            with contextlib.suppress(EOFError):  # the worker has ended
                while waiting and not is_hang:
                    if is_hang := not receiver.poll(SECONDS):
                        process.kill()
                    else:
                        outcomes.append(receiver.recv())
                        waiting.pop(0)
            process.join()
        if waiting:
            if process.exitcode == 1:
                raise RuntimeError(f'{kind.name}: the error above is no case\'s')
            outcomes.append(Outcome(waiting.pop(0), 'hang' if is_hang else 'crash',
                                    f'exit status {process.exitcode}'))
    return outcomes
