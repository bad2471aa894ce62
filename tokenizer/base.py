"""
Define the interface of every tokenizer: ids, special tokens, streams, files.

A subclass defines `kind`, `vocab_size`, encode_array(), decode_bytes() and to_dict().
"""

import bisect
import functools
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
from contextlib import suppress

import numpy as np
import regex

from configurator import UserError, nearest
from tokenizer.patterns import split_specials, to_utf8

ENDOFTEXT = '<|endoftext|>'
FILE_FORMAT, FILE_VERSION = 'flatgpt tokenizer', 1
MAX_ID = 9_999_999      # the largest id; memory grows with it, and no vocabulary has a tenth of it
MAX_SPECIAL_CHARS = 100_000  # in all special tokens
STREAM_CHARS = 1 << 16  # encode_iterable() encodes about so many characters at a time
FORGET_CHARS = 1 << 24  # of a stream, whose pieces are kept: 0.2 GB if all differ


def id_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype of ids on disk: <u2 for at most 65,536 ids, else <u4."""
    return np.dtype('<u2') if vocab_size <= 65536 else np.dtype('<u4')


def check_ids(ids, vocab_size: int) -> np.ndarray:
    """Return ids as an int64 array. Raises UserError for one out of range."""
    ids = np.asarray(ids).reshape(-1)
    if ids.size and ids.dtype.kind not in 'iu':
        raise UserError(f'cannot decode {str(ids[0])[:40]!r}; expected ids below {vocab_size}')
    ids = ids.astype(np.int64)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise UserError(f'cannot decode token id {outside[0]}; this tokenizer has the ids 0 to '
                        f'{vocab_size - 1}. Is it another one, or the vocabulary padded?')
    return ids


def check_regular(path):
    """Raise UserError for a pipe, a folder or a device: opening one may wait forever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f'{path} is a pipe, a folder or a device; expected a regular file')


class Tokenizer:
    """Encode and decode text. The package's docstring lists the methods."""

    special_tokens = {}
    added_tokens = {}  # those in any text (see added.py)
    bos_token = None  # the special token before every text in training; encode() does not add it
    pattern = None    # the regular expression that cuts text into pieces
    workers = None    # the processes of encode_in_processes(), kept between calls
    dropped_at_cut = 0  # characters; SentencePiece puts one before a text

    @property
    def eot(self):
        """Return the id of <|endoftext|>, or None."""
        return self.special_tokens.get(ENDOFTEXT)

    def encode(self, text: str | bytes, allowed_special='none_raise') -> list[int]:
        """Encode text, or its UTF-8 bytes, to ids.

        allowed_special: 'all' makes ids of the special tokens in the text; a set makes ids of
        these and refuses the others; 'none_raise' refuses all; 'none' encodes them as ordinary
        text. Raises UserError for a refused token, and for bytes that are not UTF-8.
        """
        if isinstance(text, bytes | bytearray):
            try:
                text = text.decode('utf-8')
            except UnicodeDecodeError as error:
                raise UserError(f'byte {error.start:,} of the text is {text[error.start]:#04x}, '
                                f'which is not UTF-8; expected text or UTF-8. To replace such '
                                f"bytes: data.decode('utf-8', 'replace')") from None
        if not isinstance(text, str):
            raise UserError(f'expected text or bytes, got {type(text).__name__} {str(text)[:40]}')
        return self.encode_parts(text, self.allowed(text, allowed_special))

    def encode_parts(self, text: str, allowed, fast: bool = False) -> list[int]:
        """Encode text with the special tokens in `allowed`. fast: by encode_array()."""
        ids = []
        for i, part in enumerate(split_specials(text, allowed)):
            if i % 2:
                ids.append(self.special_tokens[part])
            elif part:
                ids += self.encode_array(part).tolist() if fast else self.encode_ordinary(part)
        return ids

    def encode_ordinary(self, text: str) -> list[int]:
        """Encode text in which nothing is special."""
        return self.encode_array(text).tolist()

    def allowed(self, text: str, allowed_special):
        """Return the tokens that become ids. Raises UserError for a refused one."""
        if allowed_special in ('all', 'none'):
            return list(self.special_tokens) if allowed_special == 'all' else []
        allowed = [] if allowed_special == 'none_raise' else allowed_special
        if not isinstance(allowed, set | frozenset | list | tuple):
            raise UserError(f"allowed_special is {allowed_special!r}; expected 'all', 'none', "
                            f"'none_raise' or a set of special tokens")
        for token in allowed:
            if token not in self.special_tokens:
                names = ', '.join(self.special_tokens) or 'none'
                raise UserError(f'allowed_special has {token!r}, which is no special token of this '
                                f'tokenizer; it has: {names}{nearest(token, self.special_tokens)}')
        for token in self.special_tokens:
            if token not in allowed and token in text:
                before = text[:text.index(token)][-20:]
                raise UserError(f'the text has the special token {token!r} (after {before!r}). '
                                f"Allow it: allowed_special={{{token!r}}} or 'all'; or encode it "
                                f"as text: allowed_special='none'")
        return allowed

    def encode_batch(self, texts: list[str], workers: int | None = None) -> list[np.ndarray]:
        """Encode each text by encode_array(), with `workers` (None: one per core)."""
        return [self.encode_array(text) for text in texts]

    def encode_iterable(self, texts, allowed_special='none_raise'):
        """Yield the ids of joined texts: an iterable of strings, or a file opened as text.

        Memory is constant, except with a pattern of your own, where safe_cut() finds no cuts.
        """
        if hasattr(texts, 'read'):
            texts = iter(functools.partial(texts.read, STREAM_CHARS), '')
        n_chars = 0
        for text in self.cut_safely(texts):
            n_chars += len(text)
            if n_chars > FORGET_CHARS:
                self.forget()
                n_chars = 0
            yield from self.encode_parts(text, self.allowed(text, allowed_special), fast=True)

    def forget(self):
        """Drop the pieces of earlier text that are kept because they come back."""

    def cut_safely(self, texts):
        """Yield the joined texts in parts of STREAM_CHARS or more, with the same ids."""
        rest, enough = '', STREAM_CHARS
        for text in texts:
            if not isinstance(text, str):
                raise UserError(f'expected text, got {type(text).__name__}; open the file with '
                                f"open(path, encoding='utf-8')")
            rest += text
            if len(rest) >= enough:
                if cut := self.safe_cut(rest):
                    yield rest[:cut]
                    rest = rest[cut + self.dropped_at_cut:]
                enough = max(STREAM_CHARS, 2 * len(rest))  # so that long runs cost linear time
        if rest:
            yield rest

    def safe_cut(self, text: str) -> int:
        """Return the last place where a cut leaves the ids as they are; 0: none."""
        for cut in self.cuts(text):
            if regex.search('[\ud800-\udfff]', text[cut - 1:cut + 1]):
                continue  # half a surrogate pair, whose other half may follow
            # not inside a special or added token, even if its end has not come yet
            inside = ((token, i) for token in [*self.special_tokens, *self.added_tokens]
                      for i in range(max(0, cut - len(token) + 1), cut))
            if not any(text.startswith(token, i)
                       or len(text) - i < len(token) and token.startswith(text[i:])
                       for token, i in inside):
                return cut
        return 0

    def cuts(self, text: str):
        """Yield places, the last one first, where a piece ends whatever follows."""
        # By PATTERNS no piece crosses a blank behind a visible character, nor, before a letter or
        # digit, the end of a line that ends with one.
        for match in regex.finditer(r'(?r)(?<=\S)(?=[ \t])|(?<=\S\n)(?=[\p{L}\p{N}])', text):
            yield match.start()

    def decode(self, ids) -> str:
        """Decode ids to text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', 'replace')

    def save(self, path):
        """Write to_dict() as JSON, for tokenizer.load(path)."""
        values = self.to_dict()
        header = {'format': FILE_FORMAT, 'version': FILE_VERSION, 'sha256': digest(values)}
        write_file(path, json.dumps(header | values, indent=0, ensure_ascii=False) + '\n')


def digest(values: dict) -> str:
    """Return the SHA-256 of a description, in hexadecimal."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_specials(special_tokens: dict[str, int]):
    """Raise UserError for special tokens that are no text or share an id."""
    for token, i in special_tokens.items():
        if not isinstance(token, str) or not token or type(i) is not int or not 0 <= i <= MAX_ID:
            raise UserError(f'special tokens are {{text: id}} with ids from 0 to {MAX_ID:,}, '
                            f'got {shown(token)}: {shown(i)}')
        if to_utf8(token) != token.encode('utf-8', 'surrogatepass'):
            raise UserError(f'the special token {shown(token)} has half a surrogate pair')
    if (n_chars := sum(map(len, special_tokens))) > MAX_SPECIAL_CHARS:
        raise UserError(f'the special tokens have {n_chars:,} characters; expected '
                        f'{MAX_SPECIAL_CHARS:,} or fewer, since each text is searched for them')
    if len(set(special_tokens.values())) < len(special_tokens):
        raise UserError(f'two special tokens have the same id: {shown(special_tokens)}; expected '
                        f'one each')


def check_new_specials(tokens: list[str]):
    """Raise UserError for special tokens that are given twice, or overlap."""
    check_specials({token: i for i, token in enumerate(tokens)})
    if len(set(tokens)) < len(tokens):
        raise UserError(f'a special token is given twice: {tokens}')
    if overlap := find_overlap(tokens):
        raise UserError(f'special tokens overlap: {overlap}. Give them other names, such as '
                        f'<|one|> and <|two|>')


def find_overlap(tokens) -> str | None:
    """Return how two of the tokens overlap, or None."""
    ordered = sorted(tokens)
    for token, following in itertools.pairwise(ordered):
        if following.startswith(token):
            return f'{shown(token)} stands in {shown(following)}'
    # No token begins another one now. So of all tokens only the one before an end of a token, in
    # their order, can begin that end, and those that the end begins come next.
    for token in ordered:
        for start in range(1, len(token)):
            end = token[start:]
            i = bisect.bisect_right(ordered, end)
            if i and end.startswith(ordered[i - 1]):
                return f'{shown(ordered[i - 1])} stands in {shown(token)}'
            others = [other for other in ordered[i:i + 2] if other != token]
            if others and others[0].startswith(end):
                return f'{shown(end)} ends {shown(token)} and begins {shown(others[0])}'
    return None


def shown(value) -> str:
    """Write a value for an error message, in at most 100 characters."""
    return clip(repr(value))


def clip(text: str) -> str:
    """Cut text to 100 characters, for an error message."""
    return text if len(text) <= 100 else text[:97] + '...'


def read_texts(texts):
    """Yield the texts to train on. Raises UserError unless they are strings."""
    for text in [texts] if isinstance(texts, str | os.PathLike) else texts:
        if not isinstance(text, str):
            raise UserError(f'expected texts to train on as strings, got {type(text).__name__}; '
                            f'for files: data.documents.read_documents(path)')
        yield to_utf8(text).decode('utf-8')


def remove_temporaries(path):
    """Remove the files and folders that killed processes left of writing `path`."""
    folder, name = os.path.split(os.path.abspath(path))
    with suppress(OSError):  # no such folder, or files of another user
        for other in os.listdir(folder):
            if re.fullmatch(re.escape(name) + r'\.[0-9a-f]{16}\.tmp', other):
                left = os.path.join(folder, other)
                is_folder = os.path.isdir(left) and not os.path.islink(left)
                shutil.rmtree(left) if is_folder else os.remove(left)


def temporary_name(path):
    """Return an unforeseeable name beside `path`, to write under it first."""
    remove_temporaries(path)
    return f'{path}.{secrets.token_hex(8)}.tmp'


def write_file(path, content: str | bytes):
    """Write content to path, the whole of it or nothing. Raises UserError."""
    temporary = temporary_name(path)
    if isinstance(content, str):
        content = content.encode('utf-8', 'backslashreplace')
    try:
        with open(temporary, 'xb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        remove_temporaries(path)
        raise UserError(f'{path} could not be written ({error.strerror}); the file before it is '
                        f'untouched. Write to another folder, or free some space') from None
