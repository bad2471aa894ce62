"""What a run has beside its mathematics: a log, checkpoints, signals that ask it to stop, the command to go on."""

import json
import math
import os
import shlex
import signal
import sys
import time
from contextlib import suppress

import checkpoint
import parallel


class Interrupt:
    """
    SIGINT and SIGTERM only ask a run to stop, which it does between two steps: `reason` says so then. A second Ctrl-C,
    more than a second later, is obeyed at once. is_main: of several processes one alone answers a Ctrl-C.
    """

    def __init__(self, is_main=True):
        self.is_main, self.reason, self.time = is_main, None, 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        if number == signal.SIGINT and self.reason == 'stopped by SIGINT' and time.monotonic() > self.time + 1:
            raise KeyboardInterrupt
        if self.is_main and number == signal.SIGINT and self.reason is None:
            with suppress(OSError):  # nobody reads it. print could be what is being interrupted, and can not be called
                os.write(2, b'\nfinishing this step, then saving; Ctrl-C again stops at once, unsaved\n')
        self.reason, self.time = f'stopped by {signal.Signals(number).name}', time.monotonic()


def command(**changes):
    """The command line of this run with some settings changed, for the messages that say what to do next."""
    kept = [a for a in sys.argv[1:] if a.removeprefix('--').split('=')[0] not in changes]
    size, here = parallel.from_environment().size, int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    launch = ['python'] if size == 1 else ['torchrun', '--standalone', f'--nproc_per_node={here}']
    if here < size:  # on several machines each has options of its own
        launch = ['torchrun', '...']
    return shlex.join([*launch, sys.argv[0], *kept, *(f'--{key}={value}' for key, value in changes.items())])


def say_out_of_memory(error, step, saved_step, changes, otherwise):
    """
    Say which command takes the same steps with less memory: this one with changes, from the checkpoint of saved_step
    if that is not 0; if there are no changes, what else.
    """
    if changes and saved_step:
        changes['init_from'] = 'resume'
    remedy = f'The same mathematics in smaller pieces:\n  {command(**changes)}' if changes else otherwise
    print(f'out of memory at step {step} ({str(error).splitlines()[0][:120]}). {remedy}', file=sys.stderr)


def progress_of(state):
    """
    Where a run stands, of its checkpoint, or of None if it begins: -> (steps done, lowest val loss, seconds of training
    without evaluations, layout version of the checkpoint or None)
    """
    if state is None:
        return 0, math.inf, 0.0, None
    return state['iter_num'], state['best_val_loss'], state['train_time'], state['version']


def open_folder(out_dir, settings, iter_num, version):
    """checkpoint.open_folder(), and say so if it moved an earlier run."""
    if folder := checkpoint.open_folder(out_dir, settings, iter_num, version):
        print(f'{out_dir} held an earlier run; it is in {folder} now')


def log(out_dir, say=print, **record):
    """Append a line to out_dir/log.jsonl; a disk without room for it is no reason to stop. say: what prints that."""
    path = os.path.join(out_dir, 'log.jsonl')
    size = os.path.getsize(path) if os.path.exists(path) else 0
    try:
        with open(path, 'a', encoding='utf-8') as f:
            f.write(json.dumps(record) + '\n')
    except OSError as error:
        with suppress(OSError):  # it could not even be opened
            os.truncate(path, size)  # the part of the line that still found room
        say(f'WARNING: {path} lacks the line of step {record["step"]}: {error}')


def save(out_dir, state, is_best, say=print):
    """checkpoint.save(), and say so; -> whether it could be written. A full disk is no reason to stop, either."""
    path, step = os.path.join(out_dir, 'ckpt.pt'), state['iter_num']
    try:
        checkpoint.save(out_dir, state, is_best)
    except OSError as error:
        say(f'WARNING: {path} could not be saved at step {step} ({error}). What was there is untouched; free some '
            f'space before the next save')
        return False
    say(f'saved {path} at step {step}' + (' (best so far)' if is_best else ''))
    return True
