import functools
import hashlib
import itertools
import os
import tempfile

import numpy as np

from configurator import UserError
from tokenizer import fast, formats
from tokenizer.base import (
    MAX_ID,
    Tokenizer,
    check_ids,
    check_specials,
    encode_in_processes,
    id_dtype,
    nearest,
    read_texts,
)
from tokenizer.bpe import Merges, count_pieces, in_bytes, learn, recover_merges
from tokenizer.fast import FastEncoder
from tokenizer.patterns import PATTERNS, find_pattern, from_printable, normalize, printable, split, to_utf8

# What tiktoken downloads for each vocabulary, so that the error message of a machine without a network can say it.
TIKTOKEN_URL = 'https://openaipublic.blob.core.windows.net'
TIKTOKEN_FILES = {
    'gpt2': [f'{TIKTOKEN_URL}/gpt-2/encodings/main/vocab.bpe', f'{TIKTOKEN_URL}/gpt-2/encodings/main/encoder.json'],
    'cl100k_base': [f'{TIKTOKEN_URL}/encodings/cl100k_base.tiktoken'],
    'o200k_base': [f'{TIKTOKEN_URL}/encodings/o200k_base.tiktoken'],
}
TIKTOKEN_PATTERNS = {'gpt2': 'gpt2', 'cl100k_base': 'gpt4', 'o200k_base': 'o200k'}  # names in bpe.PATTERNS


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
        self.pattern = find_pattern(pattern)
        self.special_tokens = dict(special_tokens or {})
        self.ignore_merges, self.normalizer = ignore_merges, normalizer
        self.bos_token, self.visible_tokens = bos_token, list(visible_tokens)
        if normalizer not in (None, 'NFC'):
            raise UserError(f"normalizer is {normalizer!r}; expected 'NFC' or None")
        for token in [*self.visible_tokens, *([] if bos_token is None else [bos_token])]:
            if not isinstance(token, str) or token not in self.special_tokens:
                raise UserError(f'{token!r} is among bos_token and visible_tokens, and no special token; expected one '
                                 f'of {", ".join(self.special_tokens) or "none"}')
        place = {bytes([byte]): byte for byte in range(256)}  # of a token among the 256 bytes and then the merges
        pairs = []
        for i, (left, right) in enumerate(self.merges):
            if left not in place or right not in place:
                raise UserError(f'merge {i} joins {left!r} and {right!r}, which are not both bytes or earlier merges')
            if left + right in place:
                raise UserError(f'merge {i} makes the token {left + right!r}, which there is already')
            pairs.append((place[left], place[right]))
            place[left + right] = 256 + i
        self._merges = Merges(pairs)
        self._tokens = list(place)  # bytes of each place
        self.byte_ids, self.merge_ids = byte_ids, merge_ids
        ids = []
        for name, given, usual in (('byte_ids', byte_ids, range(256)),
                                   ('merge_ids', merge_ids, range(256, 256 + len(pairs)))):
            given = usual if given is None else given
            if len(given) != len(usual) or any(type(i) is not int or not 0 <= i <= MAX_ID for i in given):
                raise UserError(f'{name} has {len(given)} ids; expected {len(usual)}, from 0 to {MAX_ID:,}')
            ids += given
        check_specials(self.special_tokens)
        self._token_of = dict(zip(ids, self._tokens, strict=True))
        self._token_of |= {i: token.encode('utf-8') for token, i in self.special_tokens.items()}
        if len(self._token_of) < len(ids) + len(self.special_tokens):
            raise UserError('two tokens have the same id')
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
        pattern = find_pattern(pattern)
        special_tokens = [special_tokens] if isinstance(special_tokens, str) else list(special_tokens)
        check_specials({token: i for i, token in enumerate(special_tokens)})
        if len(set(special_tokens)) < len(special_tokens):
            raise UserError(f'a special token is given twice: {special_tokens}')
        least = 256 + len(special_tokens)
        if type(vocab_size) is not int or vocab_size < least:
            raise UserError(f'vocab_size is {vocab_size}; expected at least {least}: 256 bytes and '
                             f'{len(special_tokens)} special token(s)')
        texts = (text for text in read_texts(texts) if text)
        if (first := next(texts, None)) is None:
            raise UserError(f'the text to train on is empty, so vocab_size is at most {least}; give it some text')
        texts = itertools.chain([first], texts)
        can = pattern == PATTERNS['gpt2'] and fast.has_gigatoken()
        if accelerate and not can:
            raise UserError("accelerate=True needs the package gigatoken (pip install gigatoken) and pattern='gpt2'")
        if can and accelerate is not False:
            merges = fast.learn_with_gigatoken(texts, vocab_size - least, special_tokens)
        else:
            counts = count_pieces(texts, pattern, special_tokens, workers)
            merges = in_bytes(learn(counts, vocab_size - least))
        if len(merges) < vocab_size - least:
            raise UserError(f'the text has {len(merges):,} pairs to join, and vocab_size {vocab_size:,} asks for '
                             f'{vocab_size - least:,}: train on more text, or with vocab_size at most '
                             f'{least + len(merges):,}')
        return cls(merges, pattern, {token: 256 + len(merges) + i for i, token in enumerate(special_tokens)})

    @classmethod
    def from_tiktoken(cls, name: str) -> 'BPETokenizer':
        """The vocabulary 'gpt2', 'cl100k_base' or 'o200k_base', with its merges recovered from the ranks."""
        encoding = open_tiktoken(name)
        ranks = encoding._mergeable_ranks
        merges = recover_merges(ranks)
        pattern = PATTERNS[TIKTOKEN_PATTERNS[name]]
        return cls.from_values(formats.describe(name, ranks, merges, pattern, encoding._special_tokens,
                                                ignore_merges=len(merges) < len(ranks) - 256))

    @classmethod
    def from_values(cls, values: dict) -> 'BPETokenizer':
        """The tokenizer that to_dict() described."""
        merges = []
        for i, merge in enumerate(values['merges']):
            try:
                left, right = merge.split(' ')
                merges.append((from_printable(left), from_printable(right)))
            except (AttributeError, ValueError, KeyError):
                raise UserError(f"merge {i} is {merge!r}; expected two tokens in GPT-2's byte alphabet with a space "
                                 f"between, such as 'Ġ t'") from None
        return cls(merges, values['pattern'], values['special_tokens'], values.get('byte_ids'),
                   values.get('merge_ids'), values.get('ignore_merges', False), values.get('normalizer'),
                   values.get('bos_token'), values.get('visible_tokens') or ())

    def normalized(self, text: str) -> str:
        """text as it is cut into pieces: without halves of surrogate pairs, in the tokenizer's normal form."""
        return normalize(to_utf8(text).decode('utf-8'), self.normalizer)

    def encode_ordinary(self, text: str) -> list[int]:
        ids = []
        for piece in split(self.normalized(text), self.pattern):
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
        pieces = split(text, self.pattern)
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
        return [i for piece in split(text, self.pattern) for i in self._merges.join(piece.encode('utf-8'))]

    @functools.cached_property
    def is_fast(self) -> bool:
        """True when compiled code encodes the same: it has the pattern, and it joins, as these merges do, any two
        neighbours that together are a token. With merges that were learnt it is so; those of other files may differ."""
        return ((self.pattern is None or self.pattern in PATTERNS.values()) and not self.ignore_merges
                and recover_merges({token: place for place, token in enumerate(self._tokens)}) == self.merges)

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
        elif self.pattern in PATTERNS.values():
            yield from super().cuts(text)

    @functools.cached_property
    def _side_by_side(self) -> set[bytes]:
        """All pairs of bytes within tokens: between any other two, no merge can reach."""
        return {token[i:i + 2] for token in self._tokens for i in range(len(token) - 1)}

    def decode_bytes(self, ids) -> bytes:
        try:
            return b''.join(map(self._token_of.__getitem__, check_ids(ids, self.vocab_size).tolist()))
        except KeyError as error:
            raise UserError(f'cannot decode token id {error}: this vocabulary does not use this id') from None

    def to_dict(self) -> dict:
        # what few have is left out where it is not so, and thus compares as it did before there was such a thing
        rare = {'normalizer': self.normalizer, 'bos_token': self.bos_token, 'visible_tokens': self.visible_tokens}
        return {'kind': 'bpe', 'pattern': self.pattern, 'special_tokens': dict(self.special_tokens),
                'byte_ids': self.byte_ids, 'merge_ids': self.merge_ids, 'ignore_merges': self.ignore_merges,
                **{key: value for key, value in rare.items() if value},
                'merges': [f'{printable(left)} {printable(right)}' for left, right in self.merges]}


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
        self.pattern = PATTERNS[TIKTOKEN_PATTERNS[name]]

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
            raise UserError(f'cannot decode token id {unused}: {self.name} does not use this id') from None

    def to_dict(self) -> dict:
        return {'kind': 'tiktoken', 'name': self.name}


def open_tiktoken(name: str):
    """tiktoken's encoding of that name; ValueError when there is none, or no way to get it."""
    if name not in TIKTOKEN_FILES:
        raise UserError(f'unknown tiktoken vocabulary {name!r}; expected one of {", ".join(TIKTOKEN_FILES)}'
                         + nearest(name, TIKTOKEN_FILES))
    try:
        import tiktoken
    except ImportError:
        raise UserError(f'the tokenizer {name!r} needs the package tiktoken: pip install tiktoken') from None
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # whatever requests, the file system or a damaged file can raise
        raise UserError(no_vocabulary(name, error)) from error


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
