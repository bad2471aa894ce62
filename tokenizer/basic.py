"""Encode without merges: by characters, bytes, words."""

import numpy as np
import regex

from configurator import UserError
from tokenizer import bpe
from tokenizer.base import ENDOFTEXT, Tokenizer, check_ids, id_dtype, read_texts
from tokenizer.patterns import split, to_utf8
from tokenizer.workers import encode_in_processes

WORD_SPECIALS = {'<|unk|>': 0, ENDOFTEXT: 1}  # the first ids of a word tokenizer


class ListTokenizer(Tokenizer):
    """Decode by `tokens`, a list of texts; an id is a place in it."""

    def decode(self, ids) -> str:
        return ''.join(self.tokens[i] for i in check_ids(ids, self.vocab_size).tolist())

    def decode_bytes(self, ids) -> bytes:
        return self.decode(ids).encode('utf-8')


class CharTokenizer(ListTokenizer):
    """Encode a character as an id. chars: the vocabulary by id, a string or list."""

    kind = 'char'

    def __init__(self, chars):
        self.chars = self.tokens = list(chars)
        self.vocab_size = len(self.chars)
        if not self.chars:
            raise UserError('a char tokenizer needs a character, got none; is the text empty?')
        for char in self.chars:
            if not isinstance(char, str) or len(char) != 1 or '\ud800' <= char <= '\udfff':
                raise UserError(f'a char vocabulary holds single characters, got {char!r}')
        codes = np.array([ord(char) for char in self.chars])
        if len(np.unique(codes)) != len(codes):
            repeated = next(char for i, char in enumerate(self.chars) if char in self.chars[:i])
            raise UserError(f'a char vocabulary holds every character once, got {repeated!r} twice')
        # Code point -> id, or vocab_size. The last entry stands for every larger code point.
        self._table = np.full(codes.max() + 2, self.vocab_size, dtype=np.uint32)
        self._table[codes] = np.arange(self.vocab_size)

    @classmethod
    def from_text(cls, texts) -> 'CharTokenizer':
        """Collect the sorted characters of texts: one string, or an iterable of strings."""
        chars = set()
        for text in texts:
            chars.update(text)
        return cls(sorted(chars))

    def encode_array(self, text: str) -> np.ndarray:
        """Encode text to an array of ids. Raises UserError naming the unknown characters."""
        codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')
        ids = self._table[np.minimum(codes, len(self._table) - 1)]
        if (ids == self.vocab_size).any():
            unknown = sorted(set(text).difference(self.chars))
            names = ', '.join(f'{char!r} (U+{ord(char):04X})' for char in unknown[:10])
            more = f' and {len(unknown) - 10} more' if len(unknown) > 10 else ''
            raise UserError(f'this vocabulary of {self.vocab_size} characters lacks {names}{more}. '
                            f'Remove them from the text, or prepare the data and train with '
                            f'--tokenizer=byte, which encodes any text')
        return ids.astype(id_dtype(self.vocab_size))

    def cuts(self, text: str):
        yield len(text)

    def to_dict(self) -> dict:
        return {'kind': 'char', 'chars': ''.join(self.chars)}


class ByteTokenizer(Tokenizer):
    """Encode any text as bytes of UTF-8, ids 0 to 255, without training or download."""

    kind = 'byte'
    vocab_size = 256
    cuts = CharTokenizer.cuts

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(to_utf8(text), dtype=np.uint8).astype(id_dtype(256))

    def decode_bytes(self, ids) -> bytes:
        return check_ids(ids, 256).astype(np.uint8).tobytes()

    def to_dict(self) -> dict:
        return {'kind': 'byte'}


class WordTokenizer(ListTokenizer):
    """Encode a word and the space before it as an id; marks and blanks are words too.

    Id 0 is <|unk|>, which replaces unknown words; 1 is <|endoftext|>; from 2 on stand `words`.
    """

    kind = 'word'
    pattern = r' ?\w+|[^\w\s]|\s'
    special_tokens = WORD_SPECIALS

    def __init__(self, words):
        self.words, self._id_of = list(words), {}
        for i, word in enumerate(self.words, len(self.special_tokens)):
            if not isinstance(word, str) or split(word, self.pattern) != [word]:
                raise UserError(f'a word vocabulary holds words, such as " the", got {word!r}')
            if word in self._id_of:
                raise UserError(f'a word vocabulary holds every word once, got {word!r} twice')
            self._id_of[word] = i
        self.tokens = [*self.special_tokens, *self.words]
        self.vocab_size = len(self.tokens)

    @classmethod
    def train(cls, texts, vocab_size: int, workers: int | None = None) -> 'WordTokenizer':
        """Learn the most frequent words of texts, for at most vocab_size ids.

        texts: one string, or an iterable of strings. Ties go by code points.
        """
        least = len(cls.special_tokens) + 1
        if type(vocab_size) is not int or vocab_size < least:
            raise UserError(f'vocab_size is {vocab_size}; expected at least {least}: '
                            f'{", ".join(cls.special_tokens)} and a word')
        counts = bpe.count_pieces(read_texts(texts), cls.pattern, cls.special_tokens, workers)
        if not counts:
            raise UserError('the text to train on is empty; expected at least one word')
        by_count = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(by_count[:vocab_size - len(cls.special_tokens)])

    def encode_array(self, text: str) -> np.ndarray:
        words = split(to_utf8(text).decode('utf-8'), self.pattern)
        return np.array([self._id_of.get(word, 0) for word in words], id_dtype(self.vocab_size))

    def encode_batch(self, texts: list[str], workers: int | None = None) -> list[np.ndarray]:
        return encode_in_processes(self, texts, workers)

    def cuts(self, text: str):
        for match in regex.finditer(r'(?r)(?<=\S)(?=\s)', text):
            yield match.start()

    def to_dict(self) -> dict:
        return {'kind': 'word', 'words': list(self.words)}
