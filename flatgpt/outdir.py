"""
Make the folder of a run ready: lock it, put an earlier run aside, keep its log.

    lock_run(out_dir)                                 # nothing has moved yet
    open_folder(out_dir, settings, step=0, version=None)
"""

import json
import os
import re
import shlex
import shutil
from contextlib import contextmanager, suppress

from configurator import UserError
from flatgpt.entries import glance
from flatgpt.files import (
    MOVING,
    link_file,
    lock_folder,
    move_aside,
    put_back,
    replace_file,
    replacing,
)
from tokenizer.base import remove_temporaries

LINES = ('log.jsonl', 'samples.jsonl')  # of a run, in its out_dir
FILES = ('best.pt', *LINES, 'config.json', 'ckpt.pt')
NUMBERED = re.compile(r'ckpt-([1-9]\d{0,11})\.pt')  # its checkpoints of keep_every
SHARDS = re.compile(r'shards-\d{1,12}(-\d{1,2})?')  # its folders of shards


def files_in(out_dir):
    """Return the names of a run's files and folders that exist."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    several = [name for name in names if SHARDS.fullmatch(name) or NUMBERED.fullmatch(name)]
    return sorted(several) + [name for name in FILES if name in names]


def kept_steps(out_dir):
    """Return the steps of a run's numbered checkpoints, in order."""
    return sorted(int(match[1]) for match in map(NUMBERED.fullmatch, files_in(out_dir)) if match)


UNKNOWN = '?'  # the folder of a checkpoint that cannot be read


def shards_of(path):
    """Return the name of the folder of a checkpoint's shards, None, or UNKNOWN."""
    try:
        return glance(path).get('shards', {}).get('folder') if os.path.exists(path) else None
    except UserError:
        return UNKNOWN


def named_shards(out_dir, without=''):
    """Return shards_of() the checkpoints in out_dir, except the one named `without`."""
    return {shards_of(os.path.join(out_dir, name)) for name in files_in(out_dir)
            if name.endswith('.pt') and name != without}


def remove_shards(out_dir):
    """Remove the folders of shards that no checkpoint in out_dir names."""
    if folders := list(filter(SHARDS.fullmatch, os.listdir(out_dir))):
        named = named_shards(out_dir)
        for name in set(folders) - named if UNKNOWN not in named else ():
            shutil.rmtree(os.path.join(out_dir, name), ignore_errors=True)


@contextmanager
def explain_unwritable(out_dir):
    """Raise UserError for an OSError of a folder that cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f'out_dir={out_dir!r} cannot be written: {error}; free some space, or '
                        f'choose another --out_dir') from error


def command_to_draw(out_dir):
    """Return the command that draws the log of a run."""
    return shlex.join(['python', '-m', 'bench.runs', out_dir])


def lock_run(out_dir):
    """Create and lock out_dir; -> its identity(). Raises UserError if a run is in it."""
    with explain_unwritable(out_dir):
        os.makedirs(out_dir, exist_ok=True)
        lock_folder(out_dir, 'training in')
        return identity(out_dir)


def identity(path):
    """Return what distinguishes a folder from another of its name; None if it is gone."""
    with suppress(OSError):
        stat = os.stat(path)
        return stat.st_dev, stat.st_ino
    return None


def open_folder(out_dir, settings, step, version):
    """Make out_dir ready for a run, and write `settings` to its config.json.

    out_dir: locked by lock_run().

    version: layout version of the checkpoint that the run resumes, None for a new run. A new run
    moves the files of an earlier one to previous-N; -> that folder, or None. nanoGPT's ckpt.pt
    (version 0) is the only copy of its best weights, so it becomes best.pt too. Raises UserError
    if out_dir cannot be written; then nothing has moved.
    """
    best, *_, config, last = paths = [os.path.join(out_dir, name) for name in FILES]
    moved_to = None
    with explain_unwritable(out_dir):
        put_back(out_dir, files_in(os.path.join(out_dir, MOVING)))
        for path in paths:
            remove_temporaries(path)
        with replacing(config) as file:
            file.write(json.dumps(settings, indent=2).encode())
            file.flush()
            os.fsync(file.fileno())
            if version is None:
                moved_to = put_aside(out_dir)
            elif version == 0 and not os.path.exists(best):
                link_file(last, best)
            for name in LINES:
                keep_lines_until(os.path.join(out_dir, name), step)
    return moved_to


def put_aside(out_dir, best_alone=False):
    """Move files of an earlier run to out_dir/previous-N; -> that folder, or None.

    best_alone: move best.pt, and its shards if no other checkpoint names them.
    """
    names, links = files_in(out_dir), []
    if best_alone:
        best, others = shards_of(os.path.join(out_dir, 'best.pt')), named_shards(out_dir, 'best.pt')
        links = [best] if best in others and best in names else []
        names = [name for name in names if name in {'best.pt', best} - others]
    has_state = any(name.endswith('.pt') for name in names)
    return move_aside(out_dir, names, links) if has_state else None


def keep_lines_until(path, step):
    """Drop the lines of a file in LINES from `step` on, which a resumed run repeats.

    Lines that are no record go too: half of one, where the machine lost power.
    """
    kept = []
    if not os.path.lexists(path):
        return
    for line in open(path, 'rb') if os.path.isfile(path) else ():
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            # evaluation and sample at step n precede update n, and the checkpoint of step n
            if (isinstance(record, dict) and type(record.get('step')) is int and record['step']
                    < step + (step > 0 and not {'val_loss', 'text'}.isdisjoint(record))):
                kept.append(line.rstrip(b'\n') + b'\n')
    replace_file(path, b''.join(kept))
