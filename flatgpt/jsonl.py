"""
JSON lines: many objects in, a result for each out, and nothing lost when the run between them is killed.

    objects = read_objects('in.jsonl')                    # {line number: object}
    results = Results('out.jsonl', digest)                # of a run that was killed, those it had are in results.done
    for number in set(objects) - set(results.done):
        results.add(number, {'answer': ...})
    results.finish(objects)                               # out.jsonl is written whole: the objects and their results
"""

import json
import os

from configurator import UserError
from flatgpt.files import lock_folder, replace_file, unlock
from tokenizer.formats import unique


def read_objects(path, bad=None):
    """
    -> {line number: object}, blank lines left out. Raises ValueError naming the line that holds no JSON object, unless
    `bad`, a list, takes what is wrong with such lines.
    """
    objects = {}
    try:
        with open(path, 'rb') as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    objects[number] = read_object(line)
                except ValueError as error:
                    if bad is None:
                        raise UserError(f'{path}, line {number}: {error}') from None
                    bad.append(str(error))
    except OSError as error:
        raise UserError(f'{path} can not be read: {error}') from error
    return objects


def read_object(line):
    try:
        value = json.loads(line.decode('utf-8-sig'), object_pairs_hook=unique)
        json.dumps(value, allow_nan=False)  # infinities are Python's, not JSON's
    except json.JSONDecodeError as error:
        raise UserError(f'no JSON, {error.msg} at character {error.pos + 1}') from None
    except (ValueError, RecursionError) as error:
        raise UserError(str(error)) from None
    if not isinstance(value, dict):
        raise UserError(f'{json.dumps(value)[:40]} is no object; expected {{"key": value, ...}}')
    return value


def to_line(value):
    """-> bytes. Half a surrogate pair, which JSON can escape and UTF-8 can't hold, stays escaped."""
    return json.dumps(value, ensure_ascii=False).encode('utf-8', 'backslashreplace') + b'\n'


class Results:
    """
    Results by line number, in `done` and, as they come, in the file {out}.part. Its first line is `digest`, of all that
    they depend on: another run with the same goes on with them. finish() makes `out` of it. Raises ValueError if `out`
    is there already, or the part is of a run with another digest, or in use.
    """

    def __init__(self, out, digest):
        self.out, self.part, self.done = out, f'{out}.part', {}
        if os.path.exists(out):
            raise UserError(f'{out} is there already; delete it, or name another --out')
        self.file = open(self.part, 'a+b')
        self.lock = lock_folder(self.part, 'writing')
        self.file.seek(0)
        lines, whole, first = self.file.readlines(), 0, to_line({'digest': digest})
        if not lines:
            lines = [first]
            self.file.write(first)
        if lines[0] != first:
            raise UserError(f'{self.part} has results of other prompts, settings or another model; go on with those, '
                             f'delete it, or name another --out')
        for line in lines:
            if not line.endswith(b'\n'):  # the run was killed while it wrote this
                break
            try:
                entry = read_object(line)
            except ValueError as error:
                raise UserError(f'{self.part} is damaged; delete it, or name another --out: {error}') from None
            whole += len(line)
            if 'line' in entry:
                self.done[entry['line']] = entry['result']
        self.file.truncate(whole)
        self.file.flush()

    def add(self, number, result):
        self.done[number] = result
        self.file.write(to_line({'line': number, 'result': result}))
        self.file.flush()

    def finish(self, objects):
        """Write `out`: each of the objects, {line number: object}, with the keys of its result, in their order."""
        replace_file(self.out, b''.join(to_line({**value, **self.done[number]}) for number, value in objects.items()))
        self.file.close()
        os.remove(self.part)
        unlock(self.lock)
