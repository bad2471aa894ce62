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


def has_gigatoken() -> bool:
    """True where the package gigatoken, the accelerator of training and encoding, is installed."""
    return importlib.util.find_spec('gigatoken') is not None


def learn_with_gigatoken(texts, n_merges: int, special_tokens=()) -> list[tuple[bytes, bytes]]:
    """count_pieces() with GPT-2's pattern, the only one gigatoken trains with, and learn(), in Rust: the same merges.

    texts go through a file in the folder for temporary ones (the variable TMPDIR), so that memory stays small. Where
    gigatoken (0.10) would find other merges, it is not asked: it is at Unicode 17; and when all pieces have become one
    id each, it goes on with pairs that occur nowhere, which cannot happen with more distinct pieces than merges and
    bytes.
    """
    import gigatoken
    separator = b'\xff'  # in no UTF-8 text
    pieces, enough, newer = set(), n_merges + 256, False
    bar = tqdm(desc='reading', unit='char', unit_scale=True, disable=None, leave=False, dynamic_ncols=True)
    with tempfile.TemporaryDirectory() as folder, open(os.path.join(folder, 'texts'), 'w+b') as file, bar:
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
            raise UserError(f'the text to train on could not be written to {folder} ({error.strerror}); set TMPDIR to '
                             f'a folder on a larger disk') from None
        if newer or len(pieces) <= enough:
            file.seek(0)
            return in_bytes(learn(count_pieces(read_separated(file, separator), PATTERNS['gpt2']), n_merges))
        with silenced():
            source = gigatoken.TextFileSource([file.name], separator=separator)
            _, merges = gigatoken.train_bpe(source, 256 + n_merges, [], tie_breaking='raw_token_ids')
    return merges


def read_separated(file, separator: bytes):
    """Yield the texts of a file, each of which ends with the separator."""
    rest = b''
    while block := file.read(1 << 20):
        *texts, rest = (rest + block).split(separator)
        for text in texts:
            yield text.decode('utf-8')


@contextlib.contextmanager
def silenced():
    """Nothing from C or Rust reaches the terminal meanwhile; gigatoken tells what it does on stdout."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in (*kept, nowhere):
            os.close(descriptor)


"""Byte pair encoding in compiled code: what bpe.py does, by gigatoken where it is installed, else by tiktoken.

On one core with GPT-4's vocabulary (bench/results): bpe.py 5 to 10 MB/s, tiktoken 14, gigatoken 170 to 380.
"""


GIGATOKENS = ('gpt2', 'gpt4', 'o200k', 'qwen2')  # patterns that gigatoken has too, under the same names
FORGET_CHARS = 64_000_000  # 0.5 GB of words, at worst; to begin anew takes 0.1 s


class FastEncoder:
    """tokens: the bytes of all tokens, in the order of the merges. pattern: one of bpe.PATTERNS, or None. slow(text):
    the same encoding in Python, for what neither library can do. encoding: the tiktoken.Encoding, where there is one.
    """

    def __init__(self, tokens: list[bytes], pattern: str | None, slow, encoding=None):
        self.tokens, self.pattern, self.slow = tokens, pattern, slow
        if encoding is not None:
            self.tiktoken = encoding
        schemes = {PATTERNS[name]: name for name in GIGATOKENS} if has_gigatoken() else {}
        self.scheme = schemes.get(pattern)
        self.chars = 0  # encoded by gigatoken so far

    @functools.cached_property
    def gigatoken(self):
        import gigatoken
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / 'ranks.tiktoken'
            path.write_bytes(b''.join(b'%s %d\n' % (base64.b64encode(token), rank)
                                      for rank, token in enumerate(self.tokens)))
            return gigatoken.Tokenizer.from_tiktoken(path, self.scheme, {})

    def forget(self, chars: int):
        """Count characters; every FORGET_CHARS of them make gigatoken anew, which keeps each word it ever met."""
        self.chars += chars
        if self.chars // FORGET_CHARS > (self.chars - chars) // FORGET_CHARS:
            self.__dict__.pop('gigatoken', None)

    @functools.cached_property
    def tiktoken(self):
        import tiktoken
        return tiktoken.Encoding('flatgpt', pat_str=self.pattern or r'(?s:.+)', special_tokens={},
                                 mergeable_ranks={token: rank for rank, token in enumerate(self.tokens)})

    def encode(self, text: str) -> np.ndarray:
        """The places of the ids in `tokens`, as an array of integers."""
        if self.scheme and not has_newer(text):  # gigatoken is at Unicode 17
            self.forget(len(text))
            return self.gigatoken.encode(to_utf8(text))
        return self.encode_by_tiktoken(text)

    def encode_by_tiktoken(self, text: str) -> np.ndarray:
        """encode() without gigatoken."""
        text = to_utf8(text).decode('utf-8')
        # tiktoken's regular expressions run out of stack in about a million blanks; every run of 400,000 covers a whole
        # block of 200,000.
        if any(text[i:i + 200_000].isspace() for i in range(0, len(text) - 199_999, 200_000)):
            return np.array(self.slow(text))
        return self.tiktoken.encode_to_numpy(text, disallowed_special=())

    def encode_batch(self, texts: list[str], workers: int | None) -> list[np.ndarray]:
        """encode() of each text. tiktoken uses so many threads (default: one per core); gigatoken uses one for the
        first 50 MB, and then all cores, or one if workers is 1."""
        workers = workers or core_count()
        if self.scheme is None:
            groups = list(batches(texts, 1 << 16))  # one task each: a task costs more than a short text
            with ThreadPoolExecutor(workers) as pool:
                return [ids for group in pool.map(lambda group: [self.encode(text) for text in group], groups)
                        for ids in group]
        # the results of several threads come in a package (awkward) that takes 0.2 s to import: 50 MB on one core
        if not texts or workers == 1 or self.chars < 50_000_000 or any(map(has_newer, texts)):
            return [self.encode(text) for text in texts]
        self.forget(sum(map(len, texts)))
        rows = self.gigatoken.encode_batch([to_utf8(text) for text in texts]).layout
        return np.split(rows.content.data, rows.offsets.data[1:-1])
