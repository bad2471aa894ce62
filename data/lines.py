"""Drop lines that occur in many documents, such as "Accept cookies", for data.clean --lines.

    counts = LineCounts(least=10)
    for text in texts: counts.add(unique_keys(text))  # the first reading
    for text in texts: text = counts.drop(text, line_keys(text))  # the second; None: as it was

A count-min sketch, so memory is 160 MB for any corpus. Counts are never too low. Lines that share
all their cells with frequent ones would be dropped too; counting stops with an error before that
happens to one line in a thousand.
"""

import hashlib
import re

import numpy as np

from configurator import UserError

ROWS = 4
CELLS_BITS = 23           # 2^23 cells a row
MOST_WRONG = 0.001        # greatest chance that a rare line counts as frequent
CHECK_LINES = 1 << 20     # lines between two checks of it
EXAMPLES = 10             # dropped lines in the report
LETTER = re.compile(r'[^\W\d_]')
# odd factors lose no bits; RandomState draws the same in every version of NumPy
FACTORS = np.random.RandomState(2).randint(0, 2**63, (ROWS, 1), np.uint64) * 2 + 1


def line_keys(text: str) -> np.ndarray:
    """Hash each line of a text to uint64, white space and case aside; 0 without a letter."""
    return np.array([line_key(line) if LETTER.search(line) else 0 for line in text.split('\n')],
                    dtype=np.uint64)


def line_key(line: str) -> int:
    content = ' '.join(line.lower().split()).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), 'little') | 1


def unique_keys(text: str) -> np.ndarray:
    """Return the keys of a text's lines, each once, without those of lines without letters."""
    keys = np.unique(line_keys(text))
    return keys[keys != 0]


class LineCounts:
    """Count the documents that have a line, and keep frequent lines once."""

    def __init__(self, least: int):
        self.least = least  # documents that have a frequent line
        self.counts = np.zeros((ROWS, 1 << CELLS_BITS), dtype=np.uint32)
        self.seen = np.zeros((ROWS, 1 << CELLS_BITS), dtype=bool)
        self.unchecked, self.dropped, self.kept, self.examples = 0, 0, 0, {}

    def add(self, keys: np.ndarray):
        """Count the lines of one or more documents. Raises UserError for too many lines."""
        for row, cells in enumerate(self.cells(keys)):
            np.add.at(self.counts[row], cells, 1)
        self.unchecked += len(keys)
        if self.unchecked >= CHECK_LINES:
            self.unchecked = 0
            self.check()

    def cells(self, keys) -> np.ndarray:
        """Return the cells of keys, (ROWS, len(keys))."""
        return (keys * FACTORS >> np.uint64(64 - CELLS_BITS)).astype(np.intp)

    def wrong(self) -> float:
        """Compute the chance that a line that occurs once counts as frequent."""
        return float(np.prod(np.mean(self.counts >= self.least, axis=1)))

    def check(self):
        if (wrong := self.wrong()) > MOST_WRONG:
            mean = int(self.counts[0].mean(dtype=float))
            raise UserError(f'--lines={self.least} is too low for this many lines: {wrong:.2%} of '
                            f'the rare lines would count as frequent; expected a number well above '
                            f'{mean:,}, such as --lines={3 * mean + 3 * self.least}')

    def drop(self, text: str, keys: np.ndarray) -> str | None:
        """Return a text without the frequent lines that came before; None if it has none."""
        is_frequent = keys != 0
        for row, cells in enumerate(self.cells(keys)):
            is_frequent &= self.counts[row, cells] >= self.least
        places = np.flatnonzero(is_frequent)
        if not len(places):
            return None
        lines, dropped = text.split('\n'), set()
        rows = np.arange(ROWS)
        for place, cells in zip(places.tolist(), self.cells(keys[places]).T, strict=True):
            if self.seen[rows, cells].all():
                dropped.add(place)
                if len(self.examples) < EXAMPLES or lines[place].strip() in self.examples:
                    line = lines[place].strip()
                    self.examples[line] = self.examples.get(line, 0) + 1
            else:
                self.seen[rows, cells] = True
                self.kept += 1
        self.dropped += len(dropped)
        return '\n'.join(line for place, line in enumerate(lines) if place not in dropped
                         ) if dropped else None

    def report(self) -> dict:
        return {'documents at least': self.least, 'kept once': self.kept, 'dropped': self.dropped,
                'chance that a rare line counts as frequent': self.wrong(),
                'examples': {line[:100]: count for line, count in self.examples.items()}}
