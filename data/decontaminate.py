"""Find documents that share 13 words in a row with evaluation sets, for data.clean.

    index = EvaluationIndex(['tasks.jsonl', 'exam.txt'])
    index.find(text)  # None, or (name of the file, the words in common)

Words are compared without case and punctuation. 13 is GPT-3's (arXiv 2005.14165, appendix C).
Memory: 8 bytes per word of the evaluation sets.
"""

import numpy as np

from configurator import UserError
from data.documents import find_files, kind_of, read_records, read_text
from data.minhash import WORD, hash_runs, hash_words

RUN_WORDS = 13


class EvaluationIndex:
    """Hold the hashes of all runs of words of some files."""

    def __init__(self, paths):
        self.hashes, self.files = {}, {}  # by file; files: counts for the report
        for path in paths:
            for name in evaluation_files(path):
                self.read(name)

    def read(self, path):
        """Add a file. Raises UserError if no text of it has enough words."""
        runs, counts = [], {'texts': 0, 'texts of fewer than 13 words': 0}
        for hashes in read_hashes(path):
            counts['texts'] += 1
            if len(hashes) >= RUN_WORDS:
                runs.append(np.unique(hash_runs(hashes, RUN_WORDS)))
            else:
                counts['texts of fewer than 13 words'] += 1
        if not runs:
            raise UserError(f'--decontaminate={path}: none of its {counts["texts"]:,} texts has '
                            f'{RUN_WORDS} words, so no document can match; leave it out')
        self.hashes[path] = np.unique(np.concatenate(runs))
        self.files[path] = counts

    def find(self, text: str) -> tuple[str, str] | None:
        """Return the first file with a run of words of this text, and the run."""
        runs = hash_runs(hash_words(text), RUN_WORDS)
        for path, known in self.hashes.items():
            places = np.minimum(np.searchsorted(known, runs), len(known) - 1)
            if (is_known := known[places] == runs).any():
                first = int(np.argmax(is_known))
                words = WORD.findall(text.lower())[first:first + RUN_WORDS]
                return path, ' '.join(words)
        return None

    def report(self, tally) -> dict:
        """Return the counts of each file, with the documents that it removed."""
        return {name: {**counts, 'documents': tally.count(f'decontaminate: {name}')}
                for name, counts in self.files.items()}


def evaluation_files(path) -> list[str]:
    """List the files of a path. Raises UserError for a folder with files that are not read."""
    names, n_others = find_files(path)
    if n_others:
        raise UserError(f'--decontaminate={path}: the folder has {n_others} files besides texts '
                        f'and tables, or .json files whose field is not "text"; expected the names '
                        f'of the files: --decontaminate=a.json,b.jsonl')
    return names


def read_hashes(path):
    """Yield the hashes of the words of each text of a file: a row of a table, or all of it."""
    if kind_of(path) != 'text':
        for _, record in read_records(path):
            yield hash_words('\n'.join(strings_of(record)))
        return
    rest = np.empty(0, np.uint64)
    for text in read_text(path):
        hashes = np.concatenate([rest, hash_words(text)])
        yield hashes
        rest = hashes[-RUN_WORDS + 1:]


def strings_of(value):
    """Yield all strings in a value of JSON, in order: a question, its choices, its answer."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings_of(part)
