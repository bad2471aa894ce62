"""Share a corpus out among machines, and join their parts, for data.clean --part and --join.

    python -m data.clean --input=crawl/ --part=2/8 --exact --out=parts/2.jsonl
    python -m data.clean --join=parts/ --near=0.8 --out=clean.jsonl

Each machine reads the whole input and does the documents whose content hashes to its part. Copies,
white space aside, are in one part. The hash is the least of those of all runs of five words, so
two documents that share a fraction s of their runs meet with probability s.

Rows of a part have the number of the document. Joining merges the parts by number, drops the copies
that met only after other steps had changed them, and gives the bytes that one machine writes. With
--near in the parts it does not: then --near compares within parts, and once more when joining.
"""

import argparse
import collections
import contextlib
import hashlib
import heapq
import json
import os

from configurator import UserError
from data.classifier import Scores
from data.minhash import SHINGLE_WORDS, hash_runs, hash_words
from flatgpt import jsonl

OTHER = 'other part'  # the rule of documents of other machines
KEYS = {'text', 'document', 'bytes', 'changes'}


def part_of(text) -> tuple[int, int]:
    """Parse an option as I/N, with I from 1 to N."""
    with contextlib.suppress(ValueError):
        number, count = map(int, text.split('/'))
        if 1 <= number <= count <= 10**6:
            return number, count
    raise argparse.ArgumentTypeError(f'{text!r} is not a part such as 2/8, the second of 8')


def find_part(text: str, count: int) -> tuple[int, int]:
    """Return the part of a document, from 1 to count, and a hash of its content."""
    content = hash_bytes(' '.join(text.split()).encode())
    runs = hash_runs(hash_words(text), SHINGLE_WORDS)
    # hashed again, because the least hash is small
    key = hash_bytes(int(runs.min()).to_bytes(8, 'little')) if len(runs) else content
    return key % count + 1, content


def hash_bytes(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), 'little')


def report_of(out) -> str:
    """Return the path of the report that belongs to a file of clean documents."""
    return os.path.splitext(out)[0] + '.report.json'


class Whole:
    """Count and hash all documents of the input, so that other machines' can be compared."""

    def __init__(self):
        self.documents, self.hash = 0, 0

    def add(self, number, content):
        self.documents = number
        self.hash = (self.hash + (2 * number + 1) * content) % 2**64

    def report(self, tally) -> dict:
        return {'documents of all parts': self.documents, 'hash of all parts': f'{self.hash:016x}',
                'scores': {model: scores.counts.tolist() for model, scores in tally.scores.items()}}


# Joining ----------------------------------------------------------------------------------------

def part_files(paths) -> list[str]:
    """Return the files of parts among files and folders: those with a report of a part."""
    names = []
    for path in paths:
        if os.path.isdir(path):
            found = [os.path.join(path, name) for name in sorted(os.listdir(path))
                     if name.endswith(('.jsonl', '.ndjson'))]
            names += [name for name in found if 'part' in read_report(name)]
        else:
            names.append(path)
    if not names:
        raise UserError(f'{", ".join(paths)} has no parts; expected files made with --part=I/N, '
                        f'and their .report.json')
    return names


def read_report(path) -> dict:
    """Read the report beside a file; {} where there is none."""
    try:
        with open(report_of(path), encoding='utf-8') as file:
            report = json.load(file)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from None
    return report if isinstance(report, dict) else {}


def damaged(path, error) -> UserError:
    return UserError(f'{report_of(path)} is damaged ({type(error).__name__}: {str(error)[:80]}); '
                     f'make the part again')


class Parts:
    """Hold the parts of a corpus. Raises UserError unless they are all of one.

    step_names: those of this version.
    """

    def __init__(self, paths, step_names):
        self.reports, numbers = {}, {}
        for path in paths:
            report = read_report(path)
            if 'part' not in report:
                raise UserError(f'{path} is no part of a corpus: {report_of(path)} is not there, '
                                f'or not of a run with --part=I/N')
            try:
                number, facts = facts_of(report, step_names)
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                raise damaged(path, error) from None
            if number in numbers:
                raise UserError(f'{path} and {numbers[number]} are both part {number}; expected '
                                f'each once')
            if not numbers:
                first, expected = path, facts
            for name, value in facts.items():
                if value != expected[name]:
                    raise UserError(f'{path} has another {name} than {first}: {value}, not '
                                    f'{expected[name]}; make both with the same command but for '
                                    f'--part')
            numbers[number], self.reports[path] = path, report
        self.source, self.steps, count = (facts[name] for name in ('source', 'steps', 'count'))
        if missing := sorted(set(range(1, count + 1)) - set(numbers)):
            raise UserError(f'{len(missing)} of {count} parts are missing: '
                            f'{", ".join(f"{number}/{count}" for number in missing[:10])}')

    def rows(self):
        """Yield the rows of all parts by the number of the document."""
        yield from heapq.merge(*map(self.read, self.reports), key=lambda row: row['document'])

    def read(self, path):
        n_rows, last = 0, 0
        for line, row in jsonl.iter_objects(path):
            if not is_row(row) or row['document'] <= last:
                raise UserError(f'{path}, line {line} is no row of a part; make the part again')
            n_rows, last = n_rows + 1, row['document']
            yield row
        expected = self.reports[path]['documents']['kept']
        if n_rows != expected:
            raise UserError(f'{path} has {n_rows:,} documents; expected {expected:,}, as in its '
                            f'report. Copy it again, or make the part again')

    def fill(self, tally):
        """Add what the parts read and removed."""
        for report in self.reports.values():
            tally.documents['read'] += report['documents']['read']
            tally.sizes['read'] += report['bytes']['read']
            for rule, entry in report['removed'].items():
                tally.add_removed(rule, entry)
            for model, counts in report['part']['scores'].items():
                tally.scores[model].counts += counts

    def complete(self, report) -> dict:
        """Add to the joined report what is per evaluation set."""
        sets = next(iter(self.reports.values())).get('decontaminate')
        if sets:
            removed = collections.Counter({rule: entry['documents']
                                           for rule, entry in report['removed'].items()})
            report['decontaminate'] = {name: {
                **entry, 'documents': removed[f'decontaminate: {name}']}
                for name, entry in sets.items()}
        return report


def is_row(row) -> bool:
    return (set(row) == KEYS and isinstance(row['text'], str) and isinstance(row['changes'], dict)
            and all(type(count) is int for count in (row['document'], row['bytes'],
                                                     *row['changes'].values())))


def facts_of(report, step_names) -> tuple[int, dict]:
    """Return the number of a part, and what all parts have in common.

    Raises the errors of Python where the report is not one of this version.
    """
    number, count = report['steps']['part']
    if not 1 <= number <= count <= 10**6 or set(report['steps']) != set(step_names):
        raise ValueError('steps of another version')
    for n_documents in (report['documents']['read'], report['documents']['kept'],
                        report['bytes']['read']):
        n_documents += 0
    for entry in report['removed'].values():
        sorted(example['document'] + entry['documents'] + entry['bytes']
               for example in entry['examples'])
    for counts in report['part']['scores'].values():
        Scores().counts += counts
    return number, {'count': count, 'steps': {**report['steps'], 'part': None},
                    'source': report['source'],
                    'input': [report['part']['documents of all parts'],
                              report['part']['hash of all parts']]}
