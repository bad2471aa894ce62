"""Byte pair encoding in compiled code: what bpe.py does, by gigatoken where it is installed, else by tiktoken.

On one core with GPT-4's vocabulary (bench/results): bpe.py 5 to 10 MB/s, tiktoken 14, gigatoken 170 to 380.
"""

import base64
import functools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import bpe
from bpe import to_utf8
from workers import core_count

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
        schemes = {bpe.PATTERNS[name]: name for name in GIGATOKENS} if bpe.has_gigatoken() else {}
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
        if self.scheme and not bpe.has_newer(text):  # gigatoken is at Unicode 17
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
            groups = list(bpe.batches(texts, 1 << 16))  # one task each: a task costs more than a short text
            with ThreadPoolExecutor(workers) as pool:
                return [ids for group in pool.map(lambda group: [self.encode(text) for text in group], groups)
                        for ids in group]
        # the results of several threads come in a package (awkward) that takes 0.2 s to import: 50 MB on one core
        if not texts or workers == 1 or self.chars < 50_000_000 or any(map(bpe.has_newer, texts)):
            return [self.encode(text) for text in texts]
        self.forget(sum(map(len, texts)))
        rows = self.gigatoken.encode_batch([to_utf8(text) for text in texts]).layout
        return np.split(rows.content.data, rows.offsets.data[1:-1])
