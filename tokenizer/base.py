import difflib
import functools
import hashlib
import json
import os

import numpy as np
import regex

from configurator import UserError
from tokenizer.patterns import batches, split_specials, to_utf8
from tokenizer.workers import Workers, core_count

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
        raise UserError(f'cannot decode {str(ids[0])[:40]!r}: token ids are whole numbers below {vocab_size}')
    ids = ids.astype(np.int64)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise UserError(f'cannot decode token id {outside[0]}: this tokenizer has the ids 0 to {vocab_size - 1}. '
                         f'The ids come from another tokenizer, or from a model whose vocabulary is padded.')
    return ids


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
            raise UserError(f'encode() takes text or bytes, got {type(text).__name__}: {str(text)[:40]}')
        allowed = self.allowed(text, allowed_special)
        ids = []
        for i, part in enumerate(split_specials(text, allowed)):
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
        raise UserError(f'these bytes are not UTF-8 (byte {valid:,} is {data[valid]:#04x}), and a {self.kind} '
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
                    raise UserError(f'allowed_special has {token!r}, which is no special token of this tokenizer; it '
                                     f'has: {", ".join(self.special_tokens) or "none"}' +
                                     nearest(token, self.special_tokens))
        else:
            raise UserError(f"allowed_special is {allowed_special!r}; expected 'all', 'none', 'none_raise' or a set "
                             f"of special tokens")
        for token in self.special_tokens:
            if token not in allowed and token in text:
                before = text[:text.index(token)][-20:]
                raise UserError(f"the text contains the special token {token!r} (after {before!r}), which is not "
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
                raise UserError(f'expected text, got {type(text).__name__}: open the file as text, '
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
        write_file(path, json.dumps(content, indent=0, ensure_ascii=False) + '\n')


def digest(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_specials(special_tokens: dict[str, int]):
    """ValueError for special tokens that are empty, no text, share an id, or could overlap in a text."""
    for token, i in special_tokens.items():
        if not isinstance(token, str) or not token or type(i) is not int or not 0 <= i <= MAX_ID:
            raise UserError(f'special tokens are {{text: id}} with ids from 0 to {MAX_ID:,}, got {token!r}: {i!r}')
        if to_utf8(token) != token.encode('utf-8', 'surrogatepass'):
            raise UserError(f'the special token {token!r} has half a surrogate pair, which is no character')
    if len(set(special_tokens.values())) < len(special_tokens):
        raise UserError(f'two special tokens have the same id: {special_tokens}')
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
        raise UserError(f'special tokens overlap: {overlap}, so a text could be read in two ways. Give them other '
                         f'names, such as <|one|> and <|two|>')


def read_texts(texts):
    """Yield the texts to train on, checked: an iterable of strings, or one string. ValueError for anything else."""
    for text in [texts] if isinstance(texts, str) else texts:
        if not isinstance(text, str):
            raise UserError(f'expected texts to train on as strings, got {type(text).__name__}; the documents of a '
                             f'file or folder: data.documents.read_documents(path)')
        yield to_utf8(text).decode('utf-8')


worker_tokenizer = None  # of a process of encode_in_processes()


def start_worker(tokenizer):
    global worker_tokenizer
    worker_tokenizer = tokenizer


def encode_in_worker(texts: list[str]) -> list[np.ndarray]:
    return [worker_tokenizer.encode_array(text) for text in texts]


def encode_in_processes(tokenizer, texts: list[str], count: int | None) -> list[np.ndarray]:
    """encode_array() of each text by a tokenizer in Python, which threads would not make faster."""
    count = count or core_count()
    if count == 1 or sum(map(len, texts)) < 1 << 21:
        return [tokenizer.encode_array(text) for text in texts]
    if tokenizer.workers is None or tokenizer.workers.count != count:  # kept, for there will be more to encode
        tokenizer.workers = Workers(count, start_worker, tokenizer)
    groups = tokenizer.workers.map(encode_in_worker, batches(texts, 1 << 18))
    return [ids for _, group in groups for ids in group]


ALSO_CALLED = {'gpt-2': 'gpt2', 'gpt4': 'cl100k_base', 'gpt-4': 'cl100k_base', 'gpt4o': 'o200k_base',
               'gpt-4o': 'o200k_base'}


def nearest(name, names) -> str:
    """' (did you mean ...?)' for a misspelt name, or nothing when none is near."""
    near = [ALSO_CALLED[name]] if ALSO_CALLED.get(name) in names else difflib.get_close_matches(
        str(name), list(names), n=2, cutoff=0.5)
    return f' (did you mean {" or ".join(near)}?)' if near else ''


def write_file(path, text: str):
    """Write text to path, all of it or nothing; ValueError where there is no way to."""
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        with open(temporary, 'x', encoding='utf-8', newline='') as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise UserError(f'{path} could not be written ({error.strerror}); what was there before is untouched. '
                         f'Write it to another folder, or free some space') from None
