"""
Encode by byte pairs: BPETokenizer with its own merges, TiktokenTokenizer.

bpe.py is the algorithm, fast.py the same in compiled code.
"""

import functools
import hashlib
import itertools
import os
import tempfile
from dataclasses import dataclass

import numpy as np

from configurator import UserError, nearest
from tokenizer import fast
from tokenizer.added import AddedTokens
from tokenizer.base import (
    MAX_ID,
    Tokenizer,
    check_ids,
    check_new_specials,
    check_specials,
    id_dtype,
    read_texts,
    shown,
)
from tokenizer.bpe import Merges, are_long, count_pieces, in_bytes, learn, recover_merges
from tokenizer.patterns import PATTERNS, find_pattern, from_printable, normalize, printable, split
from tokenizer.vocabulary import Vocabulary
from tokenizer.workers import encode_in_processes

# OpenAI's vocabularies: the pattern, and the files that tiktoken downloads.
URL = 'https://openaipublic.blob.core.windows.net'
TIKTOKEN_PATTERNS = {'gpt2': 'gpt2', 'cl100k_base': 'gpt4', 'o200k_base': 'o200k'}
TIKTOKEN_FILES = {
    'gpt2': [f'{URL}/gpt-2/encodings/main/{name}' for name in ('vocab.bpe', 'encoder.json')],
    **{name: [f'{URL}/encodings/{name}.tiktoken'] for name in ('cl100k_base', 'o200k_base')}}
KNOWN_PIECES = 1 << 18  # pieces whose ids are kept; words come back


def remember(known, piece, ids):
    """Keep the ids of a piece in `known`, of KNOWN_PIECES at most."""
    if len(known) >= KNOWN_PIECES:
        known.clear()
    if len(piece) <= 64:  # longer ones hardly come back
        known[piece] = ids


class MergeTokenizer(Tokenizer):
    """Decode by `_token_of`, {id: bytes}."""

    def decode_bytes(self, ids) -> bytes:
        ids = check_ids(ids, self.vocab_size).tolist()
        try:
            return b''.join(map(self._token_of.__getitem__, ids))
        except KeyError as error:  # cl100k_base and o200k_base have such ids
            raise UserError(f'cannot decode token id {error}: the vocabulary does not use it, '
                            f'though it is below vocab_size') from None


@dataclass(eq=False, repr=False)
class BPETokenizer(MergeTokenizer):
    """Encode by byte pairs with merges of its own.

    merges: pairs of bytes, in the order they were learnt; token = left + right
    pattern: a name in PATTERNS, a regular expression that cuts text into pieces, or None
    special_tokens: {text: id}
    byte_ids, merge_ids: ids of the 256 bytes and of the merges (None: 0 to 255 and 256 + i)
    ignore_merges: a piece that is a token becomes its id, even if no merges lead there (Llama 3)
    normalizer: 'NFC' encodes text in that form (Qwen); decode(encode(text)) is then NFC of text
    bos_token: the special token that Hugging Face's libraries put before every text
    visible_tokens: special tokens that they keep in decoded text, such as <think>
    added_tokens: {text: id} of tokens that are not special: any text has them before it is cut
    token_rules: {text: rules} of special and added tokens, see added.py

    encode() and decode() depend on neither bos_token nor visible_tokens.
    """

    merges: list
    pattern: str | None = None
    special_tokens: dict[str, int] | None = None
    byte_ids: list[int] | None = None
    merge_ids: list[int] | None = None
    ignore_merges: bool = False
    normalizer: str | None = None
    bos_token: str | None = None
    visible_tokens: list[str] = ()
    added_tokens: dict[str, int] | None = None
    token_rules: dict[str, list[str]] | None = None

    kind = 'bpe'

    def __post_init__(self):
        self.merges = [(bytes(left), bytes(right)) for left, right in self.merges]
        self.pattern = find_pattern(self.pattern)
        self.special_tokens = dict(self.special_tokens or {})
        self.visible_tokens = list(self.visible_tokens or ())
        check_specials(self.special_tokens)
        self.added_tokens, self.token_rules = dict(self.added_tokens or {}), self.token_rules or {}
        self._added = (AddedTokens(self.added_tokens, self.token_rules, self.normalizer)
                       if self.added_tokens or self.token_rules else None)
        if self.normalizer not in (None, 'NFC'):
            raise UserError(f"normalizer is {shown(self.normalizer)}; expected 'NFC' or None")
        for token in [*self.visible_tokens, *([] if self.bos_token is None else [self.bos_token])]:
            if not isinstance(token, str) or token not in self.special_tokens:
                raise UserError(f'bos_token or visible_tokens has {shown(token)}, which is no '
                                f'special token; expected '
                                f'{", ".join(self.special_tokens) or "none"}')
        # The rank of a token is its place among the 256 bytes and then the merges.
        rank = {bytes([byte]): byte for byte in range(256)}
        pairs = []
        for i, (left, right) in enumerate(self.merges):
            if left not in rank or right not in rank:
                raise UserError(f'merge {i} joins {shown(left)} and {shown(right)}; expected bytes '
                                f'or earlier merges')
            if left + right in rank:
                raise UserError(f'merge {i} makes the token {shown(left + right)}, which exists')
            pairs.append((rank[left], rank[right]))
            rank[left + right] = 256 + i
        self._merges, self._tokens = Merges(pairs), list(rank)
        ids = [*self._checked_ids('byte_ids', range(256)),
               *self._checked_ids('merge_ids', range(256, len(rank)))]
        self._token_of = dict(zip(ids, self._tokens, strict=True))
        shared = [token for token, i in self.added_tokens.items()
                  if self._token_of.get(i) == token.encode('utf-8')]
        self._token_of |= {i: token.encode('utf-8') for token, i in
                           [*self.special_tokens.items(), *self.added_tokens.items()]}
        if len(self._token_of) + len(shared) < (len(ids) + len(self.special_tokens)
                                                + len(self.added_tokens)):
            raise UserError('two tokens have the same id; expected an id of its own for each')
        self.vocab_size = max(self._token_of) + 1
        self._ids = None if ids == list(range(len(ids))) else np.array(ids)  # by rank
        self._whole_pieces = rank if self.ignore_merges else {}
        self._known = {}  # ids of pieces

    def _checked_ids(self, name: str, default: range):
        """Return byte_ids or merge_ids, or their default. Raises UserError."""
        ids = getattr(self, name)
        if ids is None:
            return default
        if len(ids) != len(default) or any(type(i) is not int or not 0 <= i <= MAX_ID for i in ids):
            raise UserError(f'{name} has {len(ids)} ids; expected {len(default)}, from 0 to '
                            f'{MAX_ID:,}')
        return ids

    @classmethod
    def train(cls, texts, vocab_size: int, pattern: str | None = 'gpt4', special_tokens=(),
              workers: int | None = None) -> 'BPETokenizer':
        """Learn vocab_size - 256 - len(special_tokens) merges from texts.

        texts: one string, or an iterable of strings; no merge crosses the end of one. Special
        tokens get the last ids. workers: processes that count (None: one per core). With GPT-2's
        pattern the package gigatoken, where installed, learns the same merges. Raises UserError.
        """
        pattern = find_pattern(pattern)
        specials = [special_tokens] if isinstance(special_tokens, str) else list(special_tokens)
        check_new_specials(specials)
        least = 256 + len(specials)
        if type(vocab_size) is not int or vocab_size < least:
            raise UserError(f'vocab_size is {vocab_size}; expected at least {least}: 256 bytes and '
                            f'{len(specials)} special token(s)')
        texts = (text for text in read_texts(texts) if text)
        if (first := next(texts, None)) is None:
            raise UserError('the text to train on is empty; expected some text')
        texts, n_merges = itertools.chain([first], texts), vocab_size - least
        if pattern == PATTERNS['gpt2'] and fast.has_gigatoken():
            merges = fast.learn_with_gigatoken(texts, n_merges, specials)
        else:
            merges = in_bytes(learn(count_pieces(texts, pattern, specials, workers), n_merges))
        if len(merges) < n_merges:
            raise UserError(f'the text has {len(merges):,} pairs to join, and vocab_size '
                            f'{vocab_size:,} needs {n_merges:,}: train on more text, or with '
                            f'vocab_size at most {least + len(merges):,}')
        first_id = 256 + len(merges)
        return cls(merges, pattern, {token: first_id + i for i, token in enumerate(specials)})

    @classmethod
    def from_tiktoken(cls, name: str) -> 'BPETokenizer':
        """Recover the merges of a name in TIKTOKEN_FILES from tiktoken's ranks."""
        encoding = open_tiktoken(name)
        ranks, pattern = encoding._mergeable_ranks, PATTERNS[TIKTOKEN_PATTERNS[name]]
        vocabulary = Vocabulary(name, ranks, recover_merges(ranks), encoding._special_tokens)
        ignore_merges = len(vocabulary.merges) < len(ranks) - 256
        return cls.from_values(vocabulary.describe(pattern, ignore_merges))

    @classmethod
    def from_values(cls, values: dict) -> 'BPETokenizer':
        """Make the tokenizer that to_dict() described."""
        merges = []
        for i, merge in enumerate(values['merges']):
            try:
                left, right = merge.split(' ')
                merges.append((from_printable(left), from_printable(right)))
            except (AttributeError, ValueError, KeyError):
                raise UserError(f"merge {i} is {shown(merge)}; expected two tokens in GPT-2's byte "
                                f"alphabet with a space between, such as 'Ġ t'") from None
        return cls(merges, **{key: value for key, value in values.items()
                              if key in cls.__dataclass_fields__ and key != 'merges'})

    def encode_parts(self, text: str, allowed, fast: bool = False) -> list[int]:
        if self._added is None:
            return super().encode_parts(text, allowed, fast)
        ids, specials = [], {token: self.special_tokens[token] for token in allowed}
        for part, token_id in self._added.split(text, specials):
            if token_id is not None:
                ids.append(token_id)
            else:
                ids += self.encode_fast(part).tolist() if fast else self.encode_plainly(part)
        return ids

    def encode_ordinary(self, text: str) -> list[int]:
        return self.encode_plainly(text) if self._added is None else self.encode_parts(text, ())

    def encode_plainly(self, text: str) -> list[int]:
        """Encode text without added tokens."""
        ids = []
        for piece in split(normalize(text, self.normalizer), self.pattern):
            piece_ids = self._known.get(piece)
            if piece_ids is None:
                piece_ids = self.encode_piece(piece.encode('utf-8'))
                remember(self._known, piece, piece_ids)
            ids += piece_ids
        return ids

    def encode_piece(self, piece: bytes) -> list[int]:
        """Encode one piece, whatever pattern cut it out."""
        whole = self._whole_pieces.get(piece)
        ranks = self._merges.join(piece) if whole is None else [whole]
        return ranks if self._ids is None else self._ids[ranks].tolist()

    @functools.cached_property
    def _fast(self):
        return fast.FastEncoder(self._tokens, self.pattern)

    def forget(self):
        self._known.clear()
        if '_fast' in vars(self):
            self._fast.forget()

    @functools.cached_property
    def is_fast(self) -> bool:
        """Return whether compiled code encodes to the same ids.

        It has few patterns, and joins any two neighbours that together are a token. Learnt merges
        do so too; those of other files may differ.
        """
        ranks = {token: rank for rank, token in enumerate(self._tokens)}
        return ((self.pattern is None or self.pattern in PATTERNS.values())
                and not self.ignore_merges and not are_long(ranks)
                and recover_merges(ranks) == self.merges)

    def _array(self, ranks) -> np.ndarray:
        return (ranks if self._ids is None else self._ids[ranks]).astype(id_dtype(self.vocab_size))

    def encode_fast(self, text: str) -> np.ndarray:
        """Encode text without added tokens, by compiled code where its ids are the same."""
        if self.is_fast:
            return self._array(self._fast.encode(normalize(text, self.normalizer)))
        return np.array(self.encode_plainly(text), dtype=id_dtype(self.vocab_size))

    def encode_array(self, text: str) -> np.ndarray:
        if self._added is None:
            return self.encode_fast(text)
        return np.array(self.encode_parts(text, (), fast=True), dtype=id_dtype(self.vocab_size))

    def encode_batch(self, texts: list[str], workers: int | None = None) -> list[np.ndarray]:
        if self.is_fast and self._added is None:
            texts = [normalize(text, self.normalizer) for text in texts]
            return [self._array(ranks) for ranks in self._fast.encode_batch(texts, workers)]
        return encode_in_processes(self, texts, workers)

    def cuts(self, text: str):
        if self._added is not None and not self._added.can_cut:
            return
        if self.pattern is None:
            for i in range(len(text) - 1, 0, -1):
                if self.normalizer and not text[i - 1:i + 1].isascii():
                    continue  # the two may compose
                left, right = (char.encode('utf-8', 'replace') for char in text[i - 1:i + 1])
                if left[-1:] + right[:1] not in self._inner_pairs:
                    yield i
        elif self.pattern in PATTERNS.values():
            yield from super().cuts(text)

    @functools.cached_property
    def _inner_pairs(self) -> set[bytes]:
        """Return all pairs of bytes inside tokens; no merge joins another pair."""
        return {token[i:i + 2] for token in self._tokens for i in range(len(token) - 1)}

    def to_dict(self) -> dict:
        # rare fields are left out, so that older descriptions compare equal
        rare = {'normalizer': self.normalizer, 'bos_token': self.bos_token,
                'visible_tokens': self.visible_tokens, 'added_tokens': self.added_tokens,
                'token_rules': self.token_rules}
        return {'kind': 'bpe', 'pattern': self.pattern, 'special_tokens': dict(self.special_tokens),
                'byte_ids': self.byte_ids, 'merge_ids': self.merge_ids,
                'ignore_merges': self.ignore_merges,
                **{key: value for key, value in rare.items() if value},
                'merges': [f'{printable(left)} {printable(right)}' for left, right in self.merges]}


class TiktokenTokenizer(MergeTokenizer):
    """Encode by OpenAI's 'gpt2', 'cl100k_base' (GPT-4) or 'o200k_base' (GPT-4o).

    Raises UserError when tiktoken neither has the vocabulary in its cache nor can download it.
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
        """Return the same vocabulary as merges, in Python."""
        return BPETokenizer.from_tiktoken(self.name)

    @functools.cached_property
    def _fast(self):
        ranks = self._encoding._mergeable_ranks  # they are the ids too
        return fast.FastEncoder(sorted(ranks, key=ranks.get), self.pattern, self._encoding)

    def forget(self):
        self._fast.forget()

    def encode_ordinary(self, text: str) -> list[int]:
        return self._fast.encode_by_tiktoken(text).tolist()  # a prompt does not pay for gigatoken

    def encode_array(self, text: str) -> np.ndarray:
        return self._fast.encode(text).astype(id_dtype(self.vocab_size))

    def encode_batch(self, texts: list[str], workers: int | None = None) -> list[np.ndarray]:
        dtype = id_dtype(self.vocab_size)
        return [ids.astype(dtype) for ids in self._fast.encode_batch(texts, workers)]

    @functools.cached_property
    def _token_of(self) -> dict[int, bytes]:
        tokens = {i: token for token, i in self._encoding._mergeable_ranks.items()}
        return tokens | {i: token.encode('utf-8') for token, i in self.special_tokens.items()}

    def to_dict(self) -> dict:
        return {'kind': 'tiktoken', 'name': self.name}


def open_tiktoken(name: str):
    """Return tiktoken's encoding of that name. Raises UserError."""
    if name not in TIKTOKEN_FILES:
        raise UserError(f'unknown tiktoken vocabulary {name!r}; expected one of '
                        f'{", ".join(TIKTOKEN_FILES)}{nearest(name, TIKTOKEN_FILES)}')
    try:
        import tiktoken
    except ImportError:
        raise UserError(f'the tokenizer {name!r} needs the package tiktoken: '
                        f'pip install tiktoken') from None
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # requests, the file system and damaged files raise nearly anything
        folder = (os.environ.get('TIKTOKEN_CACHE_DIR')
                  or os.path.join(tempfile.gettempdir(), 'data-gym-cache'))
        commands = '\n'.join(f'    curl -o {hashlib.sha1(url.encode()).hexdigest()} {url}'
                             for url in TIKTOKEN_FILES[name])
        raise UserError(
            f"cannot get tiktoken's vocabulary {name!r} ({type(error).__name__}): it is not in "
            f'{folder}, and the download failed. On a machine with a network:\n{commands}\n'
            f'Copy the files to a folder here and set TIKTOKEN_CACHE_DIR to it.\n'
            f'--tokenizer=byte and --tokenizer=char need no network.') from error
