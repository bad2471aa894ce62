"""Text to token ids and back: characters, UTF-8 bytes, words, and byte pair encoding.

    python tokenizer.py --text='Hello, 안녕!' --tokenizer=gpt2              # see the tokens
    python tokenizer.py --compare=gpt2,cl100k_base,byte                     # count them, per language and for code
    python tokenizer.py train --input=FOLDER --vocab_size=8192 --out=my.json
    python tokenizer.py export --tokenizer=my.json --out=tokenizer.json     # for Hugging Face; .tiktoken for tiktoken

    >>> import tokenizer
    >>> tok = tokenizer.load('gpt2')      # or 'byte', 'cl100k_base' (GPT-4), 'o200k_base' (GPT-4o), or a file
    >>> tok = tokenizer.BPETokenizer.train(texts, vocab_size=8192, special_tokens=['<|endoftext|>'])
    >>> tok.decode(tok.encode('some text'))
    'some text'

Every tokenizer has the same face:

    vocab_size              ids are below it
    eot                     id of <|endoftext|>, or None
    special_tokens          {text: id} of the tokens that no text is encoded to unless allowed
    encode(text, allowed_special='none_raise')
                            list of ids. Text in which a special token stands is refused (ValueError), because in text
                            from others it is a way to slip a boundary in; 'all' makes ids of them, a set of some makes
                            ids of these and refuses the others, 'none' takes them as ordinary text
    encode_iterable(texts)  the same ids for text that comes in parts, such as an open file, in constant memory
    encode_array(text)      the fast way for a corpus: the ids of encode(text, 'none') as a uint16 or uint32 array
    encode_batch(texts)     a list of such arrays, on all cores
    decode_bytes(ids)       the bytes these ids stand for (part of a character, when ids end inside one)
    decode(ids)             text; bytes that are not UTF-8 become U+FFFD
    to_dict(), from_dict()  plain values, as meta.json and checkpoints carry them, and the same tokenizer of them again
    save(path), load(path)  the same in a readable file
"""

import difflib
import functools
import hashlib
import itertools
import json
import os
import pickle
import tempfile

import numpy as np
import regex

import bpe
import interchange
from bpe import to_utf8
from fastbpe import FastEncoder
from workers import Workers, core_count

# What tiktoken downloads for each vocabulary, so that the error message of a machine without a network can say it.
TIKTOKEN_URL = 'https://openaipublic.blob.core.windows.net'
TIKTOKEN_FILES = {
    'gpt2': [f'{TIKTOKEN_URL}/gpt-2/encodings/main/vocab.bpe', f'{TIKTOKEN_URL}/gpt-2/encodings/main/encoder.json'],
    'cl100k_base': [f'{TIKTOKEN_URL}/encodings/cl100k_base.tiktoken'],
    'o200k_base': [f'{TIKTOKEN_URL}/encodings/o200k_base.tiktoken'],
}
TIKTOKEN_PATTERNS = {'gpt2': 'gpt2', 'cl100k_base': 'gpt4', 'o200k_base': 'o200k'}  # names in bpe.PATTERNS

ENDOFTEXT = '<|endoftext|>'
FILE_FORMAT, FILE_VERSION = 'flatgpt tokenizer', 1
MAX_ID = 2**31 - 1      # of a token: what fits the integers that files and models hold ids in
STREAM_CHARS = 1 << 16  # encode_iterable() encodes so much at a time


def id_dtype(vocab_size: int) -> np.dtype:
    """The dtype of token ids on disk, little-endian: uint16 while every id fits (up to 65,535), else uint32."""
    return np.dtype('<u2') if vocab_size <= 65536 else np.dtype('<u4')


def check_ids(ids, vocab_size: int) -> np.ndarray:
    """ids as an int64 array; ValueError naming the first id outside 0 .. vocab_size - 1."""
    ids = np.asarray(ids).reshape(-1)
    if ids.size and ids.dtype.kind not in 'iu':
        raise ValueError(f'cannot decode {str(ids[0])[:40]!r}: token ids are whole numbers below {vocab_size}')
    ids = ids.astype(np.int64)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise ValueError(f'cannot decode token id {outside[0]}: this tokenizer has the ids 0 to {vocab_size - 1}. '
                         f'The ids come from another tokenizer, or from a model whose vocabulary is padded.')
    return ids


# ----------------------------------------------------------------------------------------------------------------------
# what all tokenizers share

class Tokenizer:
    """The common part: special tokens, streams, files. A subclass has encode_array, decode_bytes, to_dict."""

    special_tokens = {}
    bos_token = None  # the special token that a model has seen in front of every text; encode() does not add it
    pattern = None  # in which pieces text is encoded: a regular expression, or None
    workers = None  # see encode_in_processes()

    @property
    def eot(self):
        return self.special_tokens.get(ENDOFTEXT)

    def encode(self, text: str | bytes, allowed_special='none_raise') -> list[int]:
        """ids of text. See the top of this file for allowed_special; ValueError for a special token not allowed.

        Bytes may be anything, to byte and BPE tokenizers: where they are not UTF-8, no special token becomes an id.
        """
        if isinstance(text, bytes | bytearray):
            try:
                text = text.decode('utf-8')
            except UnicodeDecodeError as error:
                text = bytes(text)
                self.allowed(text.decode('utf-8', 'replace'), allowed_special)
                return self.encode_invalid(text, error.start)
        if not isinstance(text, str):
            raise ValueError(f'encode() takes text or bytes, got {type(text).__name__}: {str(text)[:40]}')
        allowed = self.allowed(text, allowed_special)
        ids = []
        for i, part in enumerate(bpe.split_specials(text, allowed)):
            if i % 2:
                ids.append(self.special_tokens[part])
            elif part:
                ids += self.encode_ordinary(part)
        return ids

    def encode_ordinary(self, text: str) -> list[int]:
        """ids of text in which nothing is special."""
        return self.encode_array(text).tolist()

    def encode_invalid(self, data: bytes, valid: int) -> list[int]:
        """ids of bytes of which the first `valid` are UTF-8 and the next are not."""
        raise ValueError(f'these bytes are not UTF-8 (byte {valid:,} is {data[valid]:#04x}), and a {self.kind} '
                         f'tokenizer encodes nothing but text; a byte or BPE tokenizer takes any bytes')

    def allowed(self, text: str, allowed_special) -> list[str]:
        """The special tokens that encode() makes ids of; ValueError when another one stands in text."""
        if allowed_special == 'all':
            return list(self.special_tokens)
        if allowed_special == 'none':
            return []
        if allowed_special == 'none_raise':
            allowed = []
        elif isinstance(allowed_special, set | frozenset | list | tuple):
            allowed = list(allowed_special)
            for token in allowed:
                if token not in self.special_tokens:
                    raise ValueError(f'allowed_special has {token!r}, which is no special token of this tokenizer; it '
                                     f'has: {", ".join(self.special_tokens) or "none"}' +
                                     nearest(token, self.special_tokens))
        else:
            raise ValueError(f"allowed_special is {allowed_special!r}; expected 'all', 'none', 'none_raise' or a set "
                             f"of special tokens")
        for token in self.special_tokens:
            if token not in allowed and token in text:
                before = text[:text.index(token)][-20:]
                raise ValueError(f"the text contains the special token {token!r} (after {before!r}), which is not "
                                 f"allowed here. Allow it with allowed_special={{{token!r}}} or 'all', or "
                                 f"take it as ordinary text with allowed_special='none'")
        return allowed

    def encode_batch(self, texts: list[str], workers: int | None = None) -> list[np.ndarray]:
        """encode_array() of each text. workers: threads or processes, where they help (default: one per core)."""
        return [self.encode_array(text) for text in texts]

    def encode_iterable(self, texts, allowed_special='none_raise'):
        """Yield the ids of texts joined: an iterable of strings, or a file opened as text, which is read in blocks.

        Memory is constant where there are places at which a cut leaves the ids as they are (safe_cut()); with a split
        pattern of your own none are known, and the text is collected first.
        """
        if hasattr(texts, 'read'):
            texts = iter(functools.partial(texts.read, STREAM_CHARS), '')
        for text in self.cut_safely(texts):
            yield from self.encode(text, allowed_special)

    def cut_safely(self, texts):
        """Yield texts joined, and cut anew into some of at least STREAM_CHARS that encode to the ids of the whole."""
        rest, enough = '', STREAM_CHARS
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f'expected text, got {type(text).__name__}: open the file as text, '
                                 f"open(path, encoding='utf-8')")
            rest += text
            if len(rest) >= enough:
                if cut := self.safe_cut(rest):
                    yield rest[:cut]
                    rest = rest[cut:]
                enough = max(STREAM_CHARS, 2 * len(rest))  # a long run without a cut is not searched at every line
        if rest:
            yield rest

    def safe_cut(self, text: str) -> int:
        """The last place at which text can be cut in two that encode to the same ids, whatever comes after; 0: none."""
        for cut in self.cuts(text):
            if regex.search('[\ud800-\udfff]', text[cut - 1:cut + 1]):  # half a pair, whose other half may follow
                continue
            # not inside a special token, even if its end has not come yet
            inside = ((token, i) for token in self.special_tokens for i in range(max(0, cut - len(token) + 1), cut))
            if not any(text.startswith(token, i) or len(text) - i < len(token) and token.startswith(text[i:])
                       for token, i in inside):
                return cut
        return 0

    def cuts(self, text: str):
        """Yield places, from the last to the first, at which pieces end in any case."""
        # In none of bpe.PATTERNS does a piece go on over a blank that follows ink; nor, at a line end that follows ink
        # and precedes a letter or digit, into the next line.
        for match in regex.finditer(r'(?r)(?<=\S)(?=[ \t])|(?<=\S\n)(?=[\p{L}\p{N}])', text):
            yield match.start()

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode('utf-8', 'replace')

    def save(self, path):
        """Write to_dict() as readable JSON; load(path) reads it. All of the file or nothing of it is written."""
        values = self.to_dict()
        content = {'format': FILE_FORMAT, 'version': FILE_VERSION, 'sha256': digest(values), **values}
        interchange.write_file(path, json.dumps(content, indent=0, ensure_ascii=False) + '\n')


def digest(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_specials(special_tokens: dict[str, int]):
    """ValueError for special tokens that are empty, no text, share an id, or could overlap in a text."""
    for token, i in special_tokens.items():
        if not isinstance(token, str) or not token or type(i) is not int or not 0 <= i <= MAX_ID:
            raise ValueError(f'special tokens are {{text: id}} with ids from 0 to {MAX_ID:,}, got {token!r}: {i!r}')
        if to_utf8(token) != token.encode('utf-8', 'surrogatepass'):
            raise ValueError(f'the special token {token!r} has half a surrogate pair, which is no character')
    if len(set(special_tokens.values())) < len(special_tokens):
        raise ValueError(f'two special tokens have the same id: {special_tokens}')
    beginnings, overlap = {}, None
    for token in special_tokens:
        for end in range(1, len(token)):
            beginnings.setdefault(token[:end], []).append(token)
    for one in special_tokens:
        for start in range(len(one)):
            for end in range(start + 1, len(one) + 1):
                if one[start:end] in special_tokens and end - start < len(one):
                    overlap = f'{one[start:end]!r} stands in {one!r}'
            for other in beginnings.get(one[start:], []) if start else []:
                if other != one:
                    overlap = overlap or f'{one[start:]!r} ends {one!r} and begins {other!r}'
    if overlap:
        raise ValueError(f'special tokens overlap: {overlap}, so a text could be read in two ways. Give them other '
                         f'names, such as <|one|> and <|two|>')


# ----------------------------------------------------------------------------------------------------------------------
# characters, bytes, words

class CharTokenizer(Tokenizer):
    """One id per character. chars: the vocabulary in the order of its ids, as a string or list of characters."""

    kind = 'char'

    def __init__(self, chars):
        self.chars = list(chars)
        self.vocab_size = len(self.chars)
        if not self.chars:
            raise ValueError('a char tokenizer needs at least one character, got none (is the text empty?)')
        for char in self.chars:
            if not isinstance(char, str) or len(char) != 1 or '\ud800' <= char <= '\udfff':
                raise ValueError(f'a char vocabulary holds single characters, got {char!r}')
        codes = np.array([ord(char) for char in self.chars])
        if len(np.unique(codes)) != len(codes):
            twice = next(char for i, char in enumerate(self.chars) if char in self.chars[:i])
            raise ValueError(f'a char vocabulary holds every character once, got {twice!r} twice')
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
            raise ValueError(f'characters that this vocabulary of {self.vocab_size} does not have: {named}{more}. '
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
    special_tokens = interchange.WORD_SPECIALS

    def __init__(self, words):
        self.words = list(words)
        self._id_of = {}
        for i, word in enumerate(self.words, len(self.special_tokens)):
            if not isinstance(word, str) or bpe.split(word, self.pattern) != [word]:
                raise ValueError(f'a word vocabulary holds single words, such as "the", " the" or ",", got {word!r}')
            if word in self._id_of:
                raise ValueError(f'a word vocabulary holds every word once, got {word!r} twice')
            self._id_of[word] = i
        self._tokens = [*self.special_tokens, *self.words]
        self.vocab_size = len(self._tokens)

    @classmethod
    def train(cls, texts, vocab_size: int, workers: int | None = None) -> 'WordTokenizer':
        """The most frequent words of texts (of equally frequent ones, the first by code points), so many that with the
        two special tokens there are at most vocab_size ids. texts: strings, Paths of files, or one of either."""
        least = len(cls.special_tokens) + 1
        if type(vocab_size) is not int or vocab_size < least:
            raise ValueError(f'vocab_size is {vocab_size}; a word vocabulary has at least {least} ids: '
                             f'{", ".join(cls.special_tokens)} and a word')
        counts = bpe.count_pieces(read_texts(texts), cls.pattern, cls.special_tokens, workers)
        if not counts:
            raise ValueError('the text to train on is empty; expected at least one word')
        by_count = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(by_count[:vocab_size - len(cls.special_tokens)])

    def encode_array(self, text: str) -> np.ndarray:
        text = to_utf8(text).decode('utf-8')
        return np.array([self._id_of.get(word, 0) for word in bpe.split(text, self.pattern)],
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


# ----------------------------------------------------------------------------------------------------------------------
# byte pair encoding

class BPETokenizer(Tokenizer):
    """Byte pair encoding with merges of its own; bpe.py is the algorithm.

    merges: pairs of bytes, in the order they were learnt: token = left + right. pattern: a regular expression of the
    package regex that cuts text into pieces, one of bpe.PATTERNS' names, or None. special_tokens: {text: id}.
    byte_ids, merge_ids: ids of the 256 bytes and of the merges' tokens (default: the byte's value, and 256 + i).
    ignore_merges: a piece that is a token is taken as it is, even if no merges lead there (Llama 3). normalizer: 'NFC',
    the form in which text is encoded, special tokens aside, so that decode(encode(text)) is NFC of text (Qwen).
    bos_token, visible_tokens: of the special tokens, the one that Hugging Face's libraries put in front of a text, and
    those that they show in decoded text even when told to skip special ones; encode() and decode() depend on neither.
    """

    kind = 'bpe'

    def __init__(self, merges, pattern: str | None = None, special_tokens: dict[str, int] | None = None, byte_ids=None,
                 merge_ids=None, ignore_merges: bool = False, normalizer: str | None = None,
                 bos_token: str | None = None, visible_tokens=()):
        self.merges = [(bytes(left), bytes(right)) for left, right in merges]
        self.pattern = bpe.find_pattern(pattern)
        self.special_tokens = dict(special_tokens or {})
        self.ignore_merges, self.normalizer = ignore_merges, normalizer
        self.bos_token, self.visible_tokens = bos_token, list(visible_tokens)
        if normalizer not in (None, 'NFC'):
            raise ValueError(f"normalizer is {normalizer!r}; expected 'NFC' or None")
        for token in [*self.visible_tokens, *([] if bos_token is None else [bos_token])]:
            if not isinstance(token, str) or token not in self.special_tokens:
                raise ValueError(f'{token!r} is among bos_token and visible_tokens, and no special token; expected one '
                                 f'of {", ".join(self.special_tokens) or "none"}')
        place = {bytes([byte]): byte for byte in range(256)}  # of a token among the 256 bytes and then the merges
        pairs = []
        for i, (left, right) in enumerate(self.merges):
            if left not in place or right not in place:
                raise ValueError(f'merge {i} joins {left!r} and {right!r}, which are not both bytes or earlier merges')
            if left + right in place:
                raise ValueError(f'merge {i} makes the token {left + right!r}, which there is already')
            pairs.append((place[left], place[right]))
            place[left + right] = 256 + i
        self._merges = bpe.Merges(pairs)
        self._tokens = list(place)  # bytes of each place
        self.byte_ids, self.merge_ids = byte_ids, merge_ids
        ids = []
        for name, given, usual in (('byte_ids', byte_ids, range(256)),
                                   ('merge_ids', merge_ids, range(256, 256 + len(pairs)))):
            given = usual if given is None else given
            if len(given) != len(usual) or any(type(i) is not int or not 0 <= i <= MAX_ID for i in given):
                raise ValueError(f'{name} has {len(given)} ids; expected {len(usual)}, from 0 to {MAX_ID:,}')
            ids += given
        check_specials(self.special_tokens)
        self._token_of = dict(zip(ids, self._tokens, strict=True))
        self._token_of |= {i: token.encode('utf-8') for token, i in self.special_tokens.items()}
        if len(self._token_of) < len(ids) + len(self.special_tokens):
            raise ValueError('two tokens have the same id')
        self.vocab_size = max(self._token_of) + 1
        # places to ids; None where they are the same
        self._ids = None if ids == list(range(len(ids))) else np.array(ids)
        self._place = place if ignore_merges else {}
        self._known = {}  # pieces met before: words come back

    @classmethod
    def train(cls, texts, vocab_size: int, pattern: str | None = 'gpt4', special_tokens=(), workers: int | None = None,
              accelerate: bool | None = None) -> 'BPETokenizer':
        """Learn vocab_size - 256 - len(special_tokens) merges from texts; special tokens get the last ids.

        texts: strings, Paths of files (each a document, or rows of documents), or one of either. pattern: 'gpt2',
        'gpt4', 'o200k', a regular expression, or None. No merge crosses the end of a text or a special token. Of pairs
        that occur equally often the one with the smaller left id wins, then the smaller right id: the result depends on
        nothing but the counts. accelerate: by the package gigatoken, with the same result; it has GPT-2's pattern only
        (default: where it can). workers: processes that count, otherwise (default: one per core).
        """
        pattern = bpe.find_pattern(pattern)
        special_tokens = [special_tokens] if isinstance(special_tokens, str) else list(special_tokens)
        check_specials({token: i for i, token in enumerate(special_tokens)})
        if len(set(special_tokens)) < len(special_tokens):
            raise ValueError(f'a special token is given twice: {special_tokens}')
        least = 256 + len(special_tokens)
        if type(vocab_size) is not int or vocab_size < least:
            raise ValueError(f'vocab_size is {vocab_size}; expected at least {least}: 256 bytes and '
                             f'{len(special_tokens)} special token(s)')
        texts = (text for text in read_texts(texts) if text)
        if (first := next(texts, None)) is None:
            raise ValueError(f'the text to train on is empty, so vocab_size is at most {least}; give it some text')
        texts = itertools.chain([first], texts)
        can = pattern == bpe.PATTERNS['gpt2'] and bpe.has_gigatoken()
        if accelerate and not can:
            raise ValueError("accelerate=True needs the package gigatoken (pip install gigatoken) and pattern='gpt2'")
        if can and accelerate is not False:
            merges = bpe.learn_with_gigatoken(texts, vocab_size - least, special_tokens)
        else:
            counts = bpe.count_pieces(texts, pattern, special_tokens, workers)
            merges = bpe.in_bytes(bpe.learn(counts, vocab_size - least))
        if len(merges) < vocab_size - least:
            raise ValueError(f'the text has {len(merges):,} pairs to join, and vocab_size {vocab_size:,} asks for '
                             f'{vocab_size - least:,}: train on more text, or with vocab_size at most '
                             f'{least + len(merges):,}')
        return cls(merges, pattern, {token: 256 + len(merges) + i for i, token in enumerate(special_tokens)})

    @classmethod
    def from_tiktoken(cls, name: str) -> 'BPETokenizer':
        """The vocabulary 'gpt2', 'cl100k_base' or 'o200k_base', with its merges recovered from the ranks."""
        encoding = open_tiktoken(name)
        ranks = encoding._mergeable_ranks
        merges = bpe.recover_merges(ranks)
        pattern = bpe.PATTERNS[TIKTOKEN_PATTERNS[name]]
        return from_dict(interchange.describe(name, ranks, merges, pattern, encoding._special_tokens,
                                              ignore_merges=len(merges) < len(ranks) - 256))

    def normalized(self, text: str) -> str:
        """text as it is cut into pieces: without halves of surrogate pairs, in the tokenizer's normal form."""
        return bpe.normalize(to_utf8(text).decode('utf-8'), self.normalizer)

    def encode_ordinary(self, text: str) -> list[int]:
        ids = []
        for piece in bpe.split(self.normalized(text), self.pattern):
            known = self._known.get(piece)
            if known is None:
                known = self.encode_piece(piece.encode('utf-8'))
                if len(self._known) >= 1 << 18:
                    self._known.clear()
                if len(piece) <= 64:  # longer ones hardly come back
                    self._known[piece] = known
            ids += known
        return ids

    def encode_piece(self, piece: bytes) -> list[int]:
        """ids of one piece, whatever pattern cut it out."""
        if piece in self._place:
            places = [self._place[piece]]
        else:
            places = self._merges.join(piece)
        return places if self._ids is None else self._ids[places].tolist()

    def encode_invalid(self, data: bytes, valid: int) -> list[int]:
        """As tiktoken does it: the last piece of the valid part goes on to the end of data. So do the tokens of white
        space before it, when it begins with one: what follows could have been of their piece too."""
        text = self.normalized(data[:valid].decode('utf-8'))
        data = text.encode('utf-8') + data[valid:]
        pieces = bpe.split(text, self.pattern)
        ids = [self.encode_piece(piece.encode('utf-8')) for piece in pieces]
        last = len(ids[-1]) if ids else 0
        ids = list(itertools.chain.from_iterable(ids))

        def is_blank(i):
            return not self._token_of[i].strip(b' \n\t')

        if last and is_blank(ids[-last]):
            while last < len(ids) and is_blank(ids[-last - 1]):
                last += 1
        stable = ids[:len(ids) - last]
        return stable + self.encode_piece(data[len(self.decode_bytes(stable)):])

    @functools.cached_property
    def _fast(self):
        return FastEncoder(self._tokens, self.pattern, self._places_of)

    def _places_of(self, text: str) -> list[int]:
        """encode_ordinary(), before places become ids."""
        return [i for piece in bpe.split(text, self.pattern) for i in self._merges.join(piece.encode('utf-8'))]

    @functools.cached_property
    def is_fast(self) -> bool:
        """True when compiled code encodes the same: it has the pattern, and it joins, as these merges do, any two
        neighbours that together are a token. With merges that were learnt it is so; those of other files may differ."""
        return ((self.pattern is None or self.pattern in bpe.PATTERNS.values()) and not self.ignore_merges
                and bpe.recover_merges({token: place for place, token in enumerate(self._tokens)}) == self.merges)

    def _array(self, places) -> np.ndarray:
        return (places if self._ids is None else self._ids[places]).astype(id_dtype(self.vocab_size))

    def encode_array(self, text: str) -> np.ndarray:
        if self.is_fast:
            return self._array(self._fast.encode(self.normalized(text) if self.normalizer else text))
        return np.array(self.encode_ordinary(text), dtype=id_dtype(self.vocab_size))

    def encode_batch(self, texts: list[str], workers: int | None = None) -> list[np.ndarray]:
        if self.is_fast:
            texts = list(map(self.normalized, texts)) if self.normalizer else texts
            return [self._array(places) for places in self._fast.encode_batch(texts, workers)]
        return encode_in_processes(self, texts, workers)

    def cuts(self, text: str):
        if self.pattern is None:
            for i in range(len(text) - 1, 0, -1):
                if self.normalizer and not text[i - 1:i + 1].isascii():  # the two may compose
                    continue
                left, right = (char.encode('utf-8', 'replace') for char in text[i - 1:i + 1])
                if left[-1:] + right[:1] not in self._side_by_side:
                    yield i
        elif self.pattern in bpe.PATTERNS.values():
            yield from super().cuts(text)

    @functools.cached_property
    def _side_by_side(self) -> set[bytes]:
        """All pairs of bytes within tokens: between any other two, no merge can reach."""
        return {token[i:i + 2] for token in self._tokens for i in range(len(token) - 1)}

    def decode_bytes(self, ids) -> bytes:
        try:
            return b''.join(map(self._token_of.__getitem__, check_ids(ids, self.vocab_size).tolist()))
        except KeyError as error:
            raise ValueError(f'cannot decode token id {error}: this vocabulary does not use this id') from None

    def to_dict(self) -> dict:
        # what few have is left out where it is not so, and thus compares as it did before there was such a thing
        rare = {'normalizer': self.normalizer, 'bos_token': self.bos_token, 'visible_tokens': self.visible_tokens}
        return {'kind': 'bpe', 'pattern': self.pattern, 'special_tokens': dict(self.special_tokens),
                'byte_ids': self.byte_ids, 'merge_ids': self.merge_ids, 'ignore_merges': self.ignore_merges,
                **{key: value for key, value in rare.items() if value},
                'merges': [f'{bpe.printable(left)} {bpe.printable(right)}' for left, right in self.merges]}


class TiktokenTokenizer(Tokenizer):
    """One of OpenAI's vocabularies: 'gpt2' (50,257 ids), 'cl100k_base' (GPT-4), 'o200k_base' (GPT-4o).

    ValueError when the vocabulary is neither in tiktoken's cache nor to be had from the network.
    """

    kind = 'tiktoken'

    def __init__(self, name: str):
        self._encoding = open_tiktoken(name)
        self.name = name
        self.vocab_size = self._encoding.n_vocab
        self.special_tokens = dict(self._encoding._special_tokens)
        self.pattern = bpe.PATTERNS[TIKTOKEN_PATTERNS[name]]

    @functools.cached_property
    def bpe(self) -> BPETokenizer:
        """The same encoding in Python."""
        return BPETokenizer.from_tiktoken(self.name)

    @functools.cached_property
    def _fast(self):
        ranks = self._encoding._mergeable_ranks
        return FastEncoder(sorted(ranks, key=ranks.get), self.pattern, self._slow, self._encoding)

    def encode_ordinary(self, text: str) -> list[int]:
        return self._fast.encode_by_tiktoken(text).tolist()  # a prompt is not worth making a gigatoken for

    def _slow(self, text):
        return self.bpe.encode_ordinary(text)  # ranks without gaps are places

    def encode_array(self, text: str) -> np.ndarray:
        return self._fast.encode(text).astype(id_dtype(self.vocab_size))

    def encode_batch(self, texts: list[str], workers: int | None = None) -> list[np.ndarray]:
        return [ids.astype(id_dtype(self.vocab_size)) for ids in self._fast.encode_batch(texts, workers)]

    def encode_invalid(self, data: bytes, valid: int) -> list[int]:
        return self.bpe.encode_invalid(data, valid)

    def decode_bytes(self, ids) -> bytes:
        ids = check_ids(ids, self.vocab_size).tolist()
        try:
            return self._encoding.decode_bytes(ids)
        except KeyError:  # cl100k_base and o200k_base have unused ids below vocab_size
            used = {*self._encoding._mergeable_ranks.values(), *self.special_tokens.values()}
            unused = next(i for i in ids if i not in used)
            raise ValueError(f'cannot decode token id {unused}: {self.name} does not use this id') from None

    def to_dict(self) -> dict:
        return {'kind': 'tiktoken', 'name': self.name}


def open_tiktoken(name: str):
    """tiktoken's encoding of that name; ValueError when there is none, or no way to get it."""
    if name not in TIKTOKEN_FILES:
        raise ValueError(f'unknown tiktoken vocabulary {name!r}; expected one of {", ".join(TIKTOKEN_FILES)}'
                         + nearest(name, TIKTOKEN_FILES))
    try:
        import tiktoken
    except ImportError:
        raise ValueError(f'the tokenizer {name!r} needs the package tiktoken: pip install tiktoken') from None
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # whatever requests, the file system or a damaged file can raise
        raise ValueError(no_vocabulary(name, error)) from error


def no_vocabulary(name: str, error: Exception) -> str:
    """What to say when tiktoken cannot get the vocabulary `name`."""
    folder = os.environ.get('TIKTOKEN_CACHE_DIR') or os.path.join(tempfile.gettempdir(), 'data-gym-cache')
    lines = [f'cannot get the vocabulary {name!r} of tiktoken ({type(error).__name__}); not in {folder}, '
             f'and the download failed. On a machine with a network, fetch and name as shown:']
    for url in TIKTOKEN_FILES[name]:
        lines.append(f'    curl -o {hashlib.sha1(url.encode()).hexdigest()} {url}')
    lines.append('  put the files into a folder here and set TIKTOKEN_CACHE_DIR=that folder (the names are the SHA-1 '
                 'of the URLs).\n  The tokenizers byte and char (--tokenizer=byte, --tokenizer=char) need no network.')
    return '\n'.join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# text to train on, processes to encode with

def read_texts(texts):
    """The documents of texts: strings, Paths of files or folders to read, or one of either, not in a list."""
    for text in [texts] if isinstance(texts, str | os.PathLike) else texts:
        if isinstance(text, os.PathLike):
            import corpus  # it imports this module
            yield from corpus.read_documents(text)
        elif isinstance(text, str):
            yield to_utf8(text).decode('utf-8')
        else:
            raise ValueError(f'expected texts to train on as strings or Paths, got {type(text).__name__}')


worker_tokenizer = None  # of a process of encode_in_processes()


def start_worker(values: dict):
    global worker_tokenizer
    worker_tokenizer = from_dict(values)


def encode_in_worker(texts: list[str]) -> list[np.ndarray]:
    return [worker_tokenizer.encode_array(text) for text in texts]


def encode_in_processes(tokenizer, texts: list[str], count: int | None) -> list[np.ndarray]:
    """encode_array() of each text by a tokenizer in Python, which threads would not make faster."""
    count = count or core_count()
    if count == 1 or sum(map(len, texts)) < 1 << 21:
        return [tokenizer.encode_array(text) for text in texts]
    if tokenizer.workers is None or tokenizer.workers.count != count:  # kept, for there will be more to encode
        tokenizer.workers = Workers(count, start_worker, tokenizer.to_dict())
    groups = tokenizer.workers.map(encode_in_worker, bpe.batches(texts, 1 << 18))
    return [ids for _, group in groups for ids in group]


# ----------------------------------------------------------------------------------------------------------------------
# names, descriptions, files

NAMES = ['byte', *TIKTOKEN_FILES]  # that load() knows without a file
ALSO_CALLED = {'gpt-2': 'gpt2', 'gpt4': 'cl100k_base', 'gpt-4': 'cl100k_base', 'gpt4o': 'o200k_base',
               'gpt-4o': 'o200k_base'}


def nearest(name, names) -> str:
    """' (did you mean ...?)' for a misspelt name, or nothing when none is near."""
    near = [ALSO_CALLED[name]] if ALSO_CALLED.get(name) in names else difflib.get_close_matches(
        str(name), list(names), n=2, cutoff=0.5)
    return f' (did you mean {" or ".join(near)}?)' if near else ''


def load(name):
    """The tokenizer called 'byte', 'gpt2', 'cl100k_base' or 'o200k_base', or the one in a file or folder: ours (of
    save()), tiktoken's or Hugging Face's (see interchange.py). ValueError when there is none, or it is damaged."""
    if name == 'byte':
        return ByteTokenizer()
    if name in TIKTOKEN_FILES:
        return TiktokenTokenizer(name)
    for path in (name, f'{name}.json'):
        if os.path.exists(path):
            return load_file(path)
    if name in ('char', 'word', 'bpe'):
        raise ValueError(f'the tokenizer {name!r} takes its vocabulary from a text: python tokenizer.py train '
                         f'--kind={name} --input=FILE --out=my.json, or a prepare.py with --tokenizer={name}')
    names = ['char', 'word', 'bpe', *NAMES]
    near = nearest(name, [*names, *(path for path in os.listdir() if path.endswith(('.json', '.tiktoken')))])
    raise ValueError(f'unknown tokenizer {str(name)!r}; expected one of {", ".join(names)}, or a file{near}')


def load_file(path):
    """The tokenizer in a file."""
    values = None
    if os.path.isfile(path):
        with open(path, 'rb') as file:
            if FILE_FORMAT.encode() in file.read(200):  # else it is somebody else's
                file.seek(0)
                try:
                    values = json.loads(file.read())
                except (ValueError, RecursionError) as error:
                    raise ValueError(f'{path} is damaged or cut short ({error}); get the file anew, or train the '
                                     f'tokenizer again') from None
    if values is None:
        return from_dict(interchange.read(path))
    if not isinstance(values, dict):
        raise ValueError(f'{path} is damaged: expected a JSON object, got {type(values).__name__}')
    if values.get('version') != FILE_VERSION:
        raise ValueError(f'{path} is of version {values.get("version")!r} of this format, and this program reads '
                         f'version {FILE_VERSION}: update this program, or train the tokenizer again with it')
    described = {key: value for key, value in values.items() if key not in ('format', 'version', 'sha256')}
    if values.get('sha256') != digest(described):
        raise ValueError(f'{path} is damaged: its content does not have the checksum that is written in it. Get the '
                         f'file anew, or train the tokenizer again')
    try:
        return from_dict(described)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def from_dict(values: dict):
    """The tokenizer that to_dict() described; ValueError when the description is damaged or of an unknown kind."""
    if not isinstance(values, dict) or 'kind' not in values:
        raise ValueError(f"a tokenizer is described by a dict with the key 'kind', got {str(values)[:80]}")
    kind = values['kind']
    needed = {'char': {'chars': str | list}, 'byte': {}, 'word': {'words': list}, 'tiktoken': {'name': str},
              'bpe': {'merges': list, 'pattern': str | None, 'special_tokens': dict}}
    if not isinstance(kind, str) or kind not in needed:
        raise ValueError(f'unknown kind of tokenizer {kind!r}; expected one of {", ".join(needed)}'
                         + nearest(str(kind), needed) + '. The file may come from a newer version of this program.')
    for key, expected in needed[kind].items():
        if key not in values:
            raise ValueError(f'the description of a {kind!r} tokenizer lacks {key!r}; it has {sorted(values)}')
        if not isinstance(values[key], expected):
            raise ValueError(f'{key} of a {kind!r} tokenizer is {str(values[key])[:80]!r}; expected '
                             f'{getattr(expected, "__name__", expected)}')
    for key, expected in (('byte_ids', 'ids'), ('merge_ids', 'ids'), ('visible_tokens', 'special tokens')):
        if not isinstance(values.get(key), list | None):
            raise ValueError(f'{key} of a {kind!r} tokenizer is {str(values[key])[:80]!r}; expected a list of '
                             f'{expected}')
    if kind == 'char':
        return CharTokenizer(values['chars'])
    if kind == 'byte':
        return ByteTokenizer()
    if kind == 'word':
        return WordTokenizer(values['words'])
    if kind == 'tiktoken':
        return TiktokenTokenizer(values['name'])
    merges = []
    for i, merge in enumerate(values['merges']):
        try:
            left, right = merge.split(' ')
            merges.append((bpe.from_printable(left), bpe.from_printable(right)))
        except (AttributeError, ValueError, KeyError):
            raise ValueError(f"merge {i} is {merge!r}; expected two tokens in GPT-2's byte alphabet with a space "
                             f"between, such as 'Ġ t'") from None
    return BPETokenizer(merges, values['pattern'], values['special_tokens'], values.get('byte_ids'),
                        values.get('merge_ids'), values.get('ignore_merges', False), values.get('normalizer'),
                        values.get('bos_token'), values.get('visible_tokens') or ())


class PlainUnpickler(pickle.Unpickler):
    # A pickle can only run code through a class or function that it names, and every such name is looked up here.
    # Refusing all of them leaves dicts, lists, strings and numbers, which is all that nanoGPT's meta.pkl holds.
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it asks for {module}.{name}')


def from_meta_pkl(path) -> CharTokenizer:
    """The tokenizer of nanoGPT's meta.pkl (vocab_size, stoi, itos). Runs no code from the file.

    ValueError when the file is damaged, holds anything but plain values, or contradicts itself.
    """
    remedy = f'Make it again with the prepare.py of the dataset: python {os.path.dirname(path) or "."}/prepare.py'
    try:
        with open(path, 'rb') as file:
            meta = PlainUnpickler(file).load()
    except FileNotFoundError:
        raise ValueError(f'{path} does not exist. {remedy}') from None
    except Exception as error:  # damaged pickles raise nearly anything
        raise ValueError(f'{path} was refused: it is damaged, or not a plain meta.pkl ({error}). {remedy}') from None

    def refuse(why):
        raise ValueError(f'{path} was refused: {why}. {remedy}')

    if not isinstance(meta, dict):
        refuse(f'expected a dict with vocab_size, stoi and itos, got {type(meta).__name__}')
    missing = [key for key in ('vocab_size', 'stoi', 'itos') if key not in meta]
    if missing:
        refuse(f'it lacks {", ".join(missing)}')
    size, stoi, itos = meta['vocab_size'], meta['stoi'], meta['itos']
    if type(size) is not int or not isinstance(stoi, dict) or not isinstance(itos, dict):
        refuse('vocab_size must be an int, stoi and itos dicts')
    for char, i in stoi.items():
        if type(char) is not str or type(i) is not int:
            refuse(f'stoi must map characters to ids, got {char!r}: {i!r}')
        if len(char) != 1:
            refuse(f'stoi must have single characters, got {char!r}')
    if sorted(stoi.values()) != list(range(size)):
        refuse(f'the ids of stoi are not 0 to {size - 1} (vocab_size {size}), each once')
    if itos != {i: char for char, i in stoi.items()}:
        refuse('itos is not the reverse of stoi')
    try:
        return CharTokenizer(sorted(stoi, key=stoi.get))
    except ValueError as error:
        refuse(error)


if __name__ == '__main__':
    import corpus
    import tokenview
    corpus.run(tokenview.main)
