"""Read JSON lines, and write a result for each line that survives a kill.

    objects = read_objects('in.jsonl')           # {line number: object}
    results = Results('out.jsonl', digest)       # results.done: those of a killed run
    for number in set(objects) - set(results.done):
        results.add(number, {'answer': ...})
    results.finish(objects)                      # writes out.jsonl: objects and their results
"""

import hashlib
import json
import os
from contextlib import contextmanager, suppress

from configurator import UserError
from flatgpt.files import lock_folder, no_link, replace_file, unlock
from flatgpt.inputs import open_utf8, read_lines
from tokenizer.vocabulary import read_bytes, unique

DECODER = json.JSONDecoder(object_pairs_hook=unique)


def iter_objects(path, bad=None):
    """Yield (line number, object) for each line that is not blank.

    bad: a list that takes the messages of lines without a JSON object. Without it, such a line
    raises UserError with file and line, as inputs.read_lines() does for a line too long.
    """
    for number, line in enumerate(read_lines(path, open_utf8(path)), 1):
        if not line.strip():
            continue
        try:
            value = read_object(line)
        except UserError as error:
            if bad is None:
                raise UserError(f'{path}, line {number}: {error}') from None
            bad.append(str(error))
        else:
            yield number, value


def read_objects(path, bad=None):
    """Return {line number: object} of a file of JSON lines. `bad`: see iter_objects()."""
    return dict(iter_objects(path, bad))


def read_object(line):
    """Parse one line, bytes, as a JSON object. Raises UserError with the reason."""
    try:
        value = DECODER.decode(line.decode())
    except json.JSONDecodeError as error:
        kind = "an array of several lines, not an object (jq -c '.[]' makes lines of it)"
        raise UserError(kind if line.lstrip().startswith(b'[') else
                        f'not JSON: {error.msg} at character {error.pos + 1}') from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a huge number, too many brackets
        raise UserError(str(error).partition('; use')[0]) from None
    if not isinstance(value, dict):
        raise UserError(f'{json.dumps(value)[:40]} is not an object; expected {{"key": value}}')
    return value


def to_line(value):
    """Return a value as one JSON line, bytes. Half a surrogate pair stays escaped.

    A value that JSON lacks, such as a date of a table, becomes its text.
    """
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text.encode('utf-8', 'backslashreplace') + b'\n'


@contextmanager
def writing(out, is_main=True):
    """Turn what ends the writing of Results, an OSError or Ctrl-C, into advice."""
    try:
        yield
    except OSError as error:
        raise UserError(f'{out} cannot be written: {error}; free space or use another --out'
                        ) from error
    except KeyboardInterrupt:
        why = f'\nstopped by Ctrl-C; the same command continues from {out}.part'
        raise SystemExit(why if is_main else 1) from None


class Results:
    """Collect results by line number in `done` and in the file {out}.part.

    The first line of {out}.part is `digest`, a hash of everything that the results depend on. A
    run with the same digest continues with the results that are there. finish() writes `out`.
    Raises UserError if {out}.part is in use or of another digest, or if `out` exists without it.
    """

    def __init__(self, out, digest):
        self.out, self.part, self.done, self.written = out, f'{out}.part', {}, set()
        self.file = open(self.part, 'a+b', opener=no_link)
        self.lock = lock_folder(self.part, 'writing')
        self.file.seek(0)
        content, whole, first = self.file.read(), 0, to_line({'digest': digest})
        if first.startswith(content):  # a new file, or one of a run killed before its first result
            if os.path.exists(out):
                self.close()
                raise UserError(f'{out} exists already; delete it, or name another --out')
            self.file.truncate(0)
            self.file.write(first)
            content = first
        if not content.startswith(first):
            raise UserError(f'{self.part} has results of other prompts, settings or another model; '
                            f'continue with those, delete it, or name another --out')
        for line in content.splitlines(keepends=True):
            if not line.endswith(b'\n'):  # a killed run wrote half of it
                break
            try:
                match read_object(line):
                    case {'line': int(number), 'result': dict(result)}:
                        self.done[number] = result
                    case {'written': str(sha256)}:
                        self.written.add(sha256)
                    case entry if line != first:
                        raise UserError(f'expected a line and its result, got {str(entry)[:40]}')
            except UserError as error:
                raise UserError(f'{self.part} is damaged; delete it, or name another --out: '
                                f'{error}') from None
            whole += len(line)
        self.file.truncate(whole)
        self.file.flush()

    def add(self, number, result):
        """Add the result of a line, and write it."""
        self.done[number] = result
        self.file.write(to_line({'line': number, 'result': result}))
        self.file.flush()

    def finish(self, objects):
        """Write `out`, objects with their results in order; then close().

        objects: {line number: object}. Raises UserError as write() does.
        """
        self.write(b''.join(to_line({**value, **self.done[number]})
                            for number, value in objects.items()))
        self.close()

    def write(self, content):
        """Write bytes to `out`.

        A later run that continues from {out}.part may replace them. Raises UserError if `out` is
        there with other content, of another program.
        """
        sha256 = hashlib.sha256(content).hexdigest()
        if os.path.exists(self.out):  # a killed run may have come as far as here
            now = hashlib.sha256(read_bytes(self.out)).hexdigest()
            if now not in {sha256, *self.written}:
                raise UserError(f'{self.out} exists by now; move it away, and the same command '
                                f'goes on')
        self.file.write(to_line({'written': sha256}))
        self.file.flush()
        os.makedirs(os.path.dirname(self.out) or '.', exist_ok=True)  # it may have been deleted
        self.written.add(sha256)
        replace_file(self.out, content)

    def close(self):
        """Remove {out}.part, and release it."""
        self.file.close()
        with suppress(FileNotFoundError):  # deleted meanwhile
            os.remove(self.part)
        unlock(self.lock)
