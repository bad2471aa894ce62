import numpy as np
import regex

from configurator import UserError
from tokenizer import bpe
from tokenizer.base import ENDOFTEXT, Tokenizer, check_ids, encode_in_processes, id_dtype, read_texts
from tokenizer.patterns import split, to_utf8

WORD_SPECIALS = {'<|unk|>': 0, ENDOFTEXT: 1}  # of a word tokenizer; its words follow


class CharTokenizer(Tokenizer):
    """One id per character. chars: the vocabulary in the order of its ids, as a string or list of characters."""

    kind = 'char'

    def __init__(self, chars):
        self.chars = list(chars)
        self.vocab_size = len(self.chars)
        if not self.chars:
            raise UserError('a char tokenizer needs at least one character, got none (is the text empty?)')
        for char in self.chars:
            if not isinstance(char, str) or len(char) != 1 or '\ud800' <= char <= '\udfff':
                raise UserError(f'a char vocabulary holds single characters, got {char!r}')
        codes = np.array([ord(char) for char in self.chars])
        if len(np.unique(codes)) != len(codes):
            twice = next(char for i, char in enumerate(self.chars) if char in self.chars[:i])
            raise UserError(f'a char vocabulary holds every character once, got {twice!r} twice')
        # Code point -> id, for encoding without a Python loop. The last entry answers for every larger code point.
        self._unknown = self.vocab_size
        self._table = np.full(codes.max() + 2, self._unknown, dtype=np.uint32)
        self._table[codes] = np.arange(self.vocab_size)

    @classmethod
    def from_text(cls, texts) -> 'CharTokenizer':
        """The sorted distinct characters of texts: an iterable of strings, or one string."""
        chars = set()
        for text in texts:
            chars.update(text)
        return cls(sorted(chars))

    def encode_array(self, text: str) -> np.ndarray:
        """ids of text; ValueError naming the characters that are not in the vocabulary."""
        codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')
        ids = self._table[np.minimum(codes, len(self._table) - 1)]
        if (ids == self._unknown).any():
            unknown = sorted(set(text).difference(self.chars))
            named = ', '.join(f'{char!r} (U+{ord(char):04X})' for char in unknown[:10])
            more = f' and {len(unknown) - 10} more' if len(unknown) > 10 else ''
            raise UserError(f'characters that this vocabulary of {self.vocab_size} does not have: {named}{more}. '
                             f'Leave them out, or prepare the data and train with --tokenizer=byte, '
                             f'which can write any text.')
        return ids.astype(id_dtype(self.vocab_size))

    def cuts(self, text: str):
        yield len(text)

    def decode(self, ids) -> str:
        return ''.join(self.chars[i] for i in check_ids(ids, self.vocab_size).tolist())

    def decode_bytes(self, ids) -> bytes:
        return self.decode(ids).encode('utf-8')

    def to_dict(self) -> dict:
        return {'kind': 'char', 'chars': ''.join(self.chars)}


class ByteTokenizer(Tokenizer):
    """ids 0 to 255 are the bytes of UTF-8: any text, no vocabulary to make, nothing to download."""

    kind = 'byte'
    vocab_size = 256

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(to_utf8(text), dtype=np.uint8).astype(id_dtype(256))

    def encode_invalid(self, data: bytes, valid: int) -> list[int]:
        return list(data)

    def cuts(self, text: str):
        yield len(text)

    def decode_bytes(self, ids) -> bytes:
        return check_ids(ids, 256).astype(np.uint8).tobytes()

    def to_dict(self) -> dict:
        return {'kind': 'byte'}


class WordTokenizer(Tokenizer):
    """One id per word, with the space before it; marks and other white space are words too. What is not in the
    vocabulary becomes <|unk|>, id 0, and is lost; id 1 is <|endoftext|>, ids from 2 are `words` in their order."""

    kind = 'word'
    pattern = r' ?\w+|[^\w\s]|\s'
    special_tokens = WORD_SPECIALS

    def __init__(self, words):
        self.words = list(words)
        self._id_of = {}
        for i, word in enumerate(self.words, len(self.special_tokens)):
            if not isinstance(word, str) or split(word, self.pattern) != [word]:
                raise UserError(f'a word vocabulary holds single words, such as "the", " the" or ",", got {word!r}')
            if word in self._id_of:
                raise UserError(f'a word vocabulary holds every word once, got {word!r} twice')
            self._id_of[word] = i
        self._tokens = [*self.special_tokens, *self.words]
        self.vocab_size = len(self._tokens)

    @classmethod
    def train(cls, texts, vocab_size: int, workers: int | None = None) -> 'WordTokenizer':
        """The most frequent words of texts (of equally frequent ones, the first by code points), so many that with the
        two special tokens there are at most vocab_size ids. texts: strings, Paths of files, or one of either."""
        least = len(cls.special_tokens) + 1
        if type(vocab_size) is not int or vocab_size < least:
            raise UserError(f'vocab_size is {vocab_size}; a word vocabulary has at least {least} ids: '
                             f'{", ".join(cls.special_tokens)} and a word')
        counts = bpe.count_pieces(read_texts(texts), cls.pattern, cls.special_tokens, workers)
        if not counts:
            raise UserError('the text to train on is empty; expected at least one word')
        by_count = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(by_count[:vocab_size - len(cls.special_tokens)])

    def encode_array(self, text: str) -> np.ndarray:
        text = to_utf8(text).decode('utf-8')
        return np.array([self._id_of.get(word, 0) for word in split(text, self.pattern)],
                        dtype=id_dtype(self.vocab_size))

    def encode_batch(self, texts: list[str], workers: int | None = None) -> list[np.ndarray]:
        return encode_in_processes(self, texts, workers)

    def cuts(self, text: str):
        for match in regex.finditer(r'(?r)(?<=\S)(?=\s)', text):
            yield match.start()

    def decode(self, ids) -> str:
        return ''.join(self._tokens[i] for i in check_ids(ids, self.vocab_size).tolist())

    def decode_bytes(self, ids) -> bytes:
        return self.decode(ids).encode('utf-8')

    def to_dict(self) -> dict:
        return {'kind': 'word', 'words': list(self.words)}
