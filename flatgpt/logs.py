"""
Read what runs leave in their folders: log.jsonl, samples.jsonl, config.json.

    train, val = read_log('out')    # records, of a log without damage
    run = Folder('out', 'out')
    run.read()                      # what is new since the last call
    run.steps.columns['loss'], run.status()

A Folder counts damaged lines and goes on. It decides how a run ended from the files alone.
"""

import json
import math
import os
from functools import cache, partial
from itertools import chain

import numpy as np

from configurator import UserError
from flatgpt.files import Busy, lock_folder, unlock

MOST_SERIES = 64  # of a run; a damaged log can have a new key in each line
MOST_BYTES = 1 << 17  # of a config.json
MOST_CHARS = 2000  # of a sample's prompt and text
BLOCK = 1 << 22  # bytes of a log that are parsed at once
ENDS = {'stopped': 'stopped at', 'not finite': 'not finite: stopped at', 'crashed': 'crashed at'}


def read_log(folder):
    """Return the training records and the evaluations of a run's log.jsonl.

    Half a line at the end, which a killed run leaves, is dropped as in train.py. Raises UserError
    for a log that is missing, damaged or empty.
    """
    path = os.path.join(folder, 'log.jsonl')
    if not os.path.isfile(path):
        raise UserError(f'{path} does not exist; expected the out_dir of a run of train.py')
    train, val = [], []
    with open(path, encoding='utf-8', errors='replace') as f:
        for number, line in enumerate(f, start=1):
            if not line.endswith('\n'):
                break
            try:
                record = json.loads(line)
                if 'end' in record:
                    continue
                loss = record['val_loss' if 'val_loss' in record else 'loss']
                is_finite = math.isfinite(record['step'] + loss)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(f'{path}, line {number} is damaged ({type(error).__name__}: '
                                f'{error}): {line[:60]!r}. Remove the line to draw the rest'
                                ) from None
            if is_finite:
                (val if 'val_loss' in record else train).append(record)
    if not train and not val:
        raise UserError(f'{path} holds no losses yet')
    return train, val


def names_of(folders):
    """Return the folders' names, or their paths where two names are the same."""
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    return names if len(set(names)) == len(names) else folders


class Appended:
    """Read the whole lines of a file to which others append, each once.

    half: what follows the last whole line.
    """

    def __init__(self, path):
        self.path = path
        self.forget(None)

    def forget(self, identity):
        self.identity, self.offset, self.tail, self.half = identity, 0, b'', b''

    def read(self):
        """Return whether the file is another one than before, and its new lines."""
        if not os.path.isfile(self.path):  # opening a pipe would wait
            is_other = self.identity is not None
            self.forget(None)
            return is_other, []
        with open(self.path, 'rb') as file:
            stat = os.fstat(file.fileno())
            identity = stat.st_dev, stat.st_ino
            file.seek(self.offset - len(self.tail))
            # the last bytes that were read are others where a file was cut and written anew
            is_other = identity != self.identity or file.read(len(self.tail)) != self.tail
            if is_other:
                self.forget(identity)
                file.seek(0)
            content = file.read()
        whole = content.rfind(b'\n') + 1
        content, self.half = content[:whole], content[whole:]
        self.tail = (self.tail + content[-64:])[-64:]
        self.offset += whole
        return is_other, content.split(b'\n')[:-1]


def parse(lines):
    """Yield lists of objects of JSON lines; None for one without a step."""
    while lines:
        n = max(1, BLOCK // (1 + len(lines[0])))
        block, lines = lines[:n], lines[n:]
        try:  # all at once is faster than line by line
            values = json.loads(b'[' + b','.join(block) + b']')
        except (ValueError, RecursionError):
            values = None
        if values is None or len(values) != len(block):
            values = [parse_line(line) for line in block]
        yield [value if isinstance(value, dict) and is_step(value.get('step')) else None
               for value in values]


def parse_line(line):
    """Return what a line of JSON holds, None for other lines."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def is_step(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**53


class Table:
    """Hold the numbers of records by key, NaN where a record lacks one.

    broken: {key: [number of values that are NaN or infinite, step of the first]}.
    """

    def __init__(self):
        self.n, self.columns, self.broken, self.left_out = 0, {}, {}, set()

    def append(self, records):
        steps = [record['step'] for record in records]
        new = {'step': np.array(steps, dtype=float)}
        self.collect(records, '', new, steps)
        for key in [*self.columns, *(key for key in new if key not in self.columns)]:
            before = self.columns.get(key, np.full(self.n, np.nan))
            values = new.get(key, np.full(len(records), np.nan))
            self.columns[key] = np.concatenate((before, values))
        self.n += len(records)

    def collect(self, records, prefix, columns, steps):
        """Add the numbers of records, and of the dicts in them, to columns."""
        for key in dict.fromkeys(chain.from_iterable(records)):
            name, values = prefix + key, [record.get(key) for record in records]
            kinds = set(map(type, values))
            if dict in kinds and prefix.count('.') < 3:
                self.collect([value if isinstance(value, dict) else {} for value in values],
                             f'{name}.', columns, steps)
            if name == 'step' or not kinds & {int, float}:
                continue
            if name not in self.columns and len(self.columns.keys() | columns) >= MOST_SERIES:
                self.left_out.add(name)
                continue
            columns[name] = column = to_floats(values, kinds)
            for i in np.flatnonzero(~np.isfinite(column)):
                if type(values[i]) in (int, float):
                    self.broken.setdefault(name, [0, steps[i]])[0] += 1
                    column[i] = np.nan


def to_floats(values, kinds):
    """Return values as float64, NaN for those that are no numbers."""
    try:
        if kinds <= {int, float, type(None)}:
            return np.array(values, dtype=float)
    except OverflowError:
        pass

    def to_float(value):
        try:
            return float(value) if type(value) in (int, float) else math.nan
        except OverflowError:
            return math.inf

    return np.array([to_float(value) for value in values])


def is_locked(path):
    """Return whether a run holds the lock of a folder; None: no locks here."""
    try:
        lock = lock_folder(path)
    except Busy:
        return True
    except OSError:  # the folder is gone
        return False
    unlock(lock)
    return None if lock is None else False


def read_settings(path):
    """Return the bytes of a config.json, and its settings or None."""
    if not os.path.isfile(path):  # opening a pipe would wait
        return b'', None
    with open(path, 'rb') as file:
        content = file.read(MOST_BYTES)
    settings = parse_line(content)
    return content, settings if isinstance(settings, dict) else None


class Folder:
    """Read the folder of a run, again and again while it grows.

    steps, evaluations: the Tables of its log. samples: (step, prompt, text). settings: those of
    config.json, or None. version: grows with each change.
    """

    def __init__(self, path, name):
        self.path, self.name, self.version, self.stamp = path, name, 0, None
        self.log = Appended(os.path.join(path, 'log.jsonl'))
        self.samples_file, self.samples = Appended(os.path.join(path, 'samples.jsonl')), []
        self.start_over()

    def start_over(self):
        self.steps, self.evaluations, self.end = Table(), Table(), None
        self.n_lines, self.damaged = 0, []
        self.read_checkpoint = cache(partial(read_checkpoint, os.path.join(self.path, 'ckpt.pt')))

    def read(self):
        """Read what is new in the folder."""
        is_other, lines = self.log.read()
        if is_other:
            self.start_over()
        for records in parse(lines):
            self.add(records)
        is_other, lines = self.samples_file.read()
        if is_other:
            self.samples = []
        for records in parse(lines):
            self.samples += [(record['step'], *(str(record.get(key, ''))[:MOST_CHARS]
                                                for key in ('prompt', 'text')))
                             for record in records if record is not None]
        content, self.settings = read_settings(os.path.join(self.path, 'config.json'))
        self.is_locked = not self.is_complete and is_locked(self.path)
        stamp = [self.is_locked, content, *((file.identity, file.offset, len(file.half))
                                            for file in (self.log, self.samples_file))]
        self.version += stamp != self.stamp
        self.stamp = stamp

    def add(self, records):
        """Add records of the log, None for damaged lines."""
        self.damaged += [i for i, record in enumerate(records, self.n_lines + 1) if record is None]
        self.n_lines += len(records)
        records = [record for record in records if record is not None]
        numbers = [record for record in records if 'end' not in record]
        self.steps.append([record for record in numbers if 'val_loss' not in record])
        self.evaluations.append([record for record in numbers if 'val_loss' in record])
        if records:  # a run that goes on has lines after the end
            self.end = records[-1] if 'end' in records[-1] else None

    @property
    def last_step(self):
        """The number of updates in the log, -1 without a line. Evaluations precede updates."""
        return int(max([table.columns['step'].max() + after for table, after in (
            (self.steps, 1), (self.evaluations, 0)) if table.n], default=-1))

    @property
    def max_iters(self):
        value = (self.settings or {}).get('max_iters')
        return value if type(value) is int and is_step(value) else None

    @property
    def is_complete(self):
        return self.max_iters is not None and self.last_step >= self.max_iters

    @property
    def flops_per_token(self):
        """FLOPs of training on a token, by config.json or the checkpoint's model; or None."""
        value = (self.settings or {}).get('flops_per_token')
        if type(value) in (int, float) and 0 < value < math.inf:
            return value
        return self.read_checkpoint()[1] if 'tokens' in self.steps.columns else None

    def status(self):
        """Return how the run stands: complete, running, ended or failed; and in words."""
        total, end, warnings = self.max_iters, self.end, self.warnings()
        step = max(self.last_step, int(end['step']) if end else -1)  # few steps may be logged
        place = f'step {max(step, 0):,}' + (f' of {total:,}' if total is not None else '')
        kind, text = 'ended', f'ended at {place}'
        if self.is_complete:
            kind, text = 'complete', f'complete: {total:,} steps'
        elif self.is_locked:
            kind, text = 'running', f'running: {place}'
        elif end:
            kind = 'ended' if end['end'] == 'stopped' else 'failed'
            text = f'{ENDS.get(str(end["end"]), "ended at")} {place}'
            text += ': ' + ' '.join(str(end.get('reason')).split())[:300]
        elif step < 0:
            text = ('no line of log.jsonl can be read' if self.damaged or self.log.half else
                    'log.jsonl is empty' if self.log.identity else 'there is no log.jsonl')
        elif self.had_no_end():
            kind, text = 'failed', f'crashed or killed at {place}'
        elif total is not None:
            text += ': crashed, killed or stopped'
        kind = 'failed' if self.steps.broken or self.evaluations.broken else kind
        return kind, '; '.join([text, *warnings])

    def had_no_end(self):
        """Return whether the run, whose log has no end, cannot have been stopped."""
        if self.is_locked is None:  # it may be running
            return False
        if 'flops_per_token' in (self.settings or {}):
            return True  # versions that write this setting log how a run ends
        saved = self.read_checkpoint()[0]
        return saved is not None and saved < self.last_step  # a stopped run saves its last step

    def warnings(self):
        """Return what is wrong with the files, in words."""
        warnings = []
        for table in (self.steps, self.evaluations):
            warnings += [f'{key} is NaN or infinite at step {step:,}'
                         + (f' and in {n - 1:,} more lines' if n > 1 else '')
                         for key, (n, step) in table.broken.items()]
            if table.left_out:
                warnings.append(f'{len(table.left_out):,} series more than {MOST_SERIES} are left '
                                f'out')
        if n := len(self.damaged):
            warnings.append(f'log.jsonl: line {self.damaged[0]:,} is damaged'
                            + (f', and {n - 1:,} more' if n > 1 else ''))
        if self.log.half and not self.is_locked:
            warnings.append('log.jsonl: the last line is cut off')
        if self.settings is None:
            warnings.append('config.json is damaged' if os.path.exists(
                os.path.join(self.path, 'config.json')) else 'there is no config.json')
        return warnings


def read_checkpoint(path):
    """Return a checkpoint's step and its FLOPs per token, None for the unknown."""
    if not os.path.isfile(path):
        return None, None
    from flatgpt.entries import glance, without_memory  # torch takes seconds to import
    from model import GPT, GPTConfig

    step = None
    try:
        state = glance(path)
        step, config = state['iter_num'], GPTConfig(**state['model_args'])
        return step, without_memory(GPT, config, len(state['model'])).flops_per_token()
    except (UserError, TypeError):
        return step, None
