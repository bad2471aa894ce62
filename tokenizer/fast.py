"""
Encode and train byte pairs in compiled code: by gigatoken, or else tiktoken.

On one core with GPT-4's vocabulary (bench/results): bpe.py encodes 5 to 10 MB/s, tiktoken 14,
gigatoken 170 to 380. The ids and merges are those of bpe.py.
"""

import base64
import contextlib
import functools
import importlib.util
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import UserError
from tokenizer.bpe import count_pieces, in_bytes, learn
from tokenizer.patterns import PATTERNS, batches, has_newer, split, split_specials, to_utf8
from tokenizer.workers import core_count

GIGATOKENS = ('gpt2', 'gpt4', 'o200k', 'qwen2')  # the patterns that gigatoken has, by its names
FORGET_CHARS = 64_000_000  # words of at most 0.5 GB; a new gigatoken costs 0.1 s
ONE_CORE_CHARS = 50_000_000  # awkward, gigatoken's package for threads, takes 0.2 s to import
BLANKS = 200_000  # characters; tiktoken's regular expressions overflow at about a million blanks


def has_gigatoken() -> bool:
    """Return whether the package gigatoken is installed."""
    return importlib.util.find_spec('gigatoken') is not None


def learn_with_gigatoken(texts, n_merges: int, special_tokens=()) -> list[tuple[bytes, bytes]]:
    """Learn the merges of bpe.learn(), as bytes, with GPT-2's pattern.

    gigatoken trains with no other pattern. The texts go through a temporary file (in TMPDIR), which
    keeps memory small. In two cases gigatoken 0.10 would learn other merges, and bpe.learn() takes
    over. It is at Unicode 17. And when every piece has become one id, it goes on with pairs that
    occur nowhere; that cannot happen with more distinct pieces than merges and bytes.
    """
    import gigatoken
    separator = b'\xff'  # in no UTF-8 text
    pieces, enough, newer = set(), n_merges + 256, False
    bar = tqdm(desc='reading', unit='char', unit_scale=True, disable=None, leave=False,
               dynamic_ncols=True)
    with (tempfile.TemporaryDirectory() as folder,
          open(os.path.join(folder, 'texts'), 'w+b') as file, bar):
        try:
            for text in texts:
                for part in split_specials(text, special_tokens)[::2]:
                    file.write(part.encode('utf-8') + separator)
                    newer = newer or has_newer(part)
                    if len(pieces) <= enough:
                        pieces.update(split(part, PATTERNS['gpt2']))
                bar.update(len(text))
            file.flush()
        except OSError as error:
            raise UserError(f'the text to train on could not be written to {folder} '
                            f'({error.strerror}); set TMPDIR to a folder with more room') from None
        if newer or len(pieces) <= enough:
            file.seek(0)
            counts = count_pieces(read_separated(file, separator), PATTERNS['gpt2'])
            return in_bytes(learn(counts, n_merges))
        with silenced():
            source = gigatoken.TextFileSource([file.name], separator=separator)
            _, merges = gigatoken.train_bpe(source, 256 + n_merges, [],
                                            tie_breaking='raw_token_ids')
    return merges


def read_separated(file, separator: bytes):
    """Yield the texts of a file in which the separator ends each."""
    rest = b''
    while block := file.read(1 << 20):
        *texts, rest = (rest + block).split(separator)
        for text in texts:
            yield text.decode('utf-8')


@contextlib.contextmanager
def silenced():
    """Discard the output of C and Rust code; gigatoken reports progress on stdout."""
    sys.stdout.flush()
    sys.stderr.flush()
    terminal = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(terminal[0], 1)
        os.dup2(terminal[1], 2)
        for descriptor in (*terminal, nowhere):
            os.close(descriptor)


class FastEncoder:
    """Encode text to ranks, which are places in `tokens`.

    tokens: the bytes of all tokens, in the order of their merges. pattern: one of PATTERNS, or
    None. encoding: the tiktoken.Encoding, where there is one.
    """

    def __init__(self, tokens: list[bytes], pattern: str | None, encoding=None):
        self.tokens, self.pattern = tokens, pattern
        if encoding is not None:
            self.tiktoken = encoding
        schemes = {PATTERNS[name]: name for name in GIGATOKENS} if has_gigatoken() else {}
        self.scheme = schemes.get(pattern)
        self.chars = 0  # characters that gigatoken has encoded

    @functools.cached_property
    def gigatoken(self):
        """Return gigatoken's tokenizer for these tokens."""
        import gigatoken
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / 'ranks.tiktoken'
            path.write_bytes(b''.join(b'%s %d\n' % (base64.b64encode(token), rank)
                                      for rank, token in enumerate(self.tokens)))
            return gigatoken.Tokenizer.from_tiktoken(path, self.scheme, {})

    @functools.cached_property
    def tiktoken(self):
        """Return tiktoken's encoding for these tokens."""
        import tiktoken
        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        return tiktoken.Encoding('flatgpt', pat_str=self.pattern or r'(?s:.+)', special_tokens={},
                                 mergeable_ranks=ranks)

    def count(self, chars: int):
        """Count characters; renew gigatoken every FORGET_CHARS, as it keeps all words."""
        self.chars += chars
        if self.chars // FORGET_CHARS > (self.chars - chars) // FORGET_CHARS:
            self.forget()

    def forget(self):
        """Drop gigatoken, which keeps every word; the next text makes it anew."""
        self.__dict__.pop('gigatoken', None)

    def encode(self, text: str) -> np.ndarray:
        """Encode text to an array of ranks."""
        if self.scheme and not has_newer(text):  # gigatoken is at Unicode 17
            self.count(len(text))
            return self.gigatoken.encode(to_utf8(text))
        return self.encode_by_tiktoken(text)

    def encode_by_tiktoken(self, text: str) -> np.ndarray:
        """Encode text to an array of ranks without gigatoken."""
        text = to_utf8(text).decode('utf-8')
        # a run of 2 * BLANKS covers a whole block
        if any(text[i:i + BLANKS].isspace() for i in range(0, len(text) - BLANKS + 1, BLANKS)):
            join = self.tiktoken._core_bpe.encode_single_piece
            return np.array([rank for piece in split(text, self.pattern)
                             for rank in join(piece.encode('utf-8'))])
        return self.tiktoken.encode_to_numpy(text, disallowed_special=())

    def encode_batch(self, texts: list[str], workers: int | None) -> list[np.ndarray]:
        """Apply encode() to each text.

        tiktoken uses `workers` threads (None: one per core). gigatoken uses one core for its first
        ONE_CORE_CHARS and then all, or one if workers is 1.
        """
        workers = workers or core_count()
        if self.scheme is None:
            groups = batches(texts, 1 << 16)  # one task each: a task costs more than a short text
            with ThreadPoolExecutor(workers) as pool:
                encoded = pool.map(lambda group: [self.encode(text) for text in group], groups)
                return [ids for group in encoded for ids in group]
        one_core = workers == 1 or self.chars < ONE_CORE_CHARS
        if not texts or one_core or any(map(has_newer, texts)):
            return [self.encode(text) for text in texts]
        self.count(sum(map(len, texts)))
        rows = self.gigatoken.encode_batch([to_utf8(text) for text in texts]).layout
        return np.split(rows.content.data, rows.offsets.data[1:-1])
