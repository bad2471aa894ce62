"""Text to token ids and back: characters, UTF-8 bytes, or one of tiktoken's vocabularies.

    >>> import tokenizer
    >>> tok = tokenizer.load('byte')                            # or 'gpt2', 'cl100k_base', 'o200k_base'
    >>> tok = tokenizer.CharTokenizer.from_text(['some text'])  # one id per distinct character
    >>> tok.decode(tok.encode('some text'))
    'some text'

Every tokenizer has the same face:

    vocab_size           number of ids; ids are 0 .. vocab_size - 1
    eot                  id of <|endoftext|>, or None
    encode(text)         list of ids; the text of a special token is encoded as ordinary text
    encode_array(text)   the same ids as a uint16 or uint32 array, the fast way for a corpus
    decode_bytes(ids)    the bytes these ids stand for (part of a character, when ids end inside one)
    decode(ids)          text; bytes that are not UTF-8 become U+FFFD
    to_dict()            plain values; from_dict() makes the same tokenizer of them again

meta.json and checkpoints carry to_dict(), so text can be produced with nothing but a checkpoint at hand.
"""

import difflib
import hashlib
import os
import pickle
import tempfile

import numpy as np

# What tiktoken downloads for each vocabulary, so that the error message of a machine without a network can say it.
TIKTOKEN_URL = 'https://openaipublic.blob.core.windows.net'
TIKTOKEN_FILES = {
    'gpt2': [f'{TIKTOKEN_URL}/gpt-2/encodings/main/vocab.bpe', f'{TIKTOKEN_URL}/gpt-2/encodings/main/encoder.json'],
    'cl100k_base': [f'{TIKTOKEN_URL}/encodings/cl100k_base.tiktoken'],
    'o200k_base': [f'{TIKTOKEN_URL}/encodings/o200k_base.tiktoken'],
}


def id_dtype(vocab_size: int) -> np.dtype:
    """The dtype of token ids on disk, little-endian: uint16 while every id fits (up to 65,535), else uint32."""
    return np.dtype('<u2') if vocab_size <= 65536 else np.dtype('<u4')


def to_utf8(text: str) -> bytes:
    """UTF-8 bytes of text. Half a surrogate pair (JSON's "\\ud800") has none and becomes U+FFFD, as in tiktoken."""
    try:
        return text.encode('utf-8')
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace').encode('utf-8')


def check_ids(ids, vocab_size: int) -> np.ndarray:
    """ids as an int64 array; ValueError naming the first id outside 0 .. vocab_size - 1."""
    ids = np.asarray(ids, dtype=np.int64).reshape(-1)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise ValueError(f'cannot decode token id {outside[0]}: this tokenizer has the ids 0 to {vocab_size - 1}. '
                         f'The ids come from another tokenizer, or from a model whose vocabulary is padded.')
    return ids


class CharTokenizer:
    """One id per character. chars: the vocabulary in the order of its ids, as a string or list of characters."""

    eot = None

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

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def decode(self, ids) -> str:
        return ''.join(self.chars[i] for i in check_ids(ids, self.vocab_size).tolist())

    def decode_bytes(self, ids) -> bytes:
        return self.decode(ids).encode('utf-8')

    def to_dict(self) -> dict:
        return {'kind': 'char', 'chars': ''.join(self.chars)}


class ByteTokenizer:
    """ids 0 to 255 are the bytes of UTF-8: any text, no vocabulary to make, nothing to download."""

    vocab_size = 256
    eot = None

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(to_utf8(text), dtype=np.uint8).astype(id_dtype(256))

    def encode(self, text: str) -> list[int]:
        return list(to_utf8(text))

    def decode_bytes(self, ids) -> bytes:
        return check_ids(ids, 256).astype(np.uint8).tobytes()

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode('utf-8', 'replace')

    def to_dict(self) -> dict:
        return {'kind': 'byte'}


class TiktokenTokenizer:
    """One of OpenAI's vocabularies: 'gpt2' (50,257 ids), 'cl100k_base' (GPT-4), 'o200k_base' (GPT-4o).

    ValueError when the vocabulary is neither in tiktoken's cache nor to be had from the network.
    """

    def __init__(self, name: str):
        if name not in TIKTOKEN_FILES:
            raise ValueError(f'unknown tiktoken vocabulary {name!r}; expected one of {", ".join(TIKTOKEN_FILES)}'
                             + nearest(name, TIKTOKEN_FILES))
        try:
            import tiktoken
        except ImportError:
            raise ValueError(f'the tokenizer {name!r} needs the package tiktoken: pip install tiktoken') from None
        try:
            self._encoding = tiktoken.get_encoding(name)
        except Exception as error:  # whatever requests, the file system or a damaged file can raise
            raise ValueError(no_vocabulary(name, error)) from error
        self.name = name
        self.vocab_size = self._encoding.n_vocab
        self.eot = self._encoding.eot_token

    def encode_array(self, text: str) -> np.ndarray:
        try:
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            ids = self._encoding.encode_to_numpy(to_utf8(text).decode('utf-8'), disallowed_special=())
        return ids.astype(id_dtype(self.vocab_size))

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def decode_bytes(self, ids) -> bytes:
        ids = check_ids(ids, self.vocab_size).tolist()
        try:
            return self._encoding.decode_bytes(ids)
        except KeyError as error:  # cl100k_base and o200k_base have unused ids below vocab_size
            raise ValueError(f'cannot decode token id {error}: {self.name} does not use this id') from None

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode('utf-8', 'replace')

    def to_dict(self) -> dict:
        return {'kind': 'tiktoken', 'name': self.name}


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


def nearest(name, names) -> str:
    """' (did you mean ...?)' for a misspelt name, or nothing when none is near."""
    near = difflib.get_close_matches(str(name), list(names), n=2, cutoff=0.5)
    return f' (did you mean {" or ".join(near)}?)' if near else ''


def load(name: str):
    """The tokenizer called 'byte', 'gpt2', 'cl100k_base' or 'o200k_base'; ValueError for any other name."""
    if name == 'byte':
        return ByteTokenizer()
    if name == 'char':
        raise ValueError("the tokenizer 'char' takes its vocabulary from a text: "
                         "CharTokenizer.from_text(texts), or a prepare.py with --tokenizer=char")
    if name in TIKTOKEN_FILES:
        return TiktokenTokenizer(name)
    names = ['byte', 'char', *TIKTOKEN_FILES]
    raise ValueError(f'unknown tokenizer {name!r}; expected one of {", ".join(names)}' + nearest(name, names))


def from_dict(values: dict):
    """The tokenizer that to_dict() described; ValueError when the description is damaged or of an unknown kind."""
    if not isinstance(values, dict) or 'kind' not in values:
        raise ValueError(f"a tokenizer is described by a dict with the key 'kind', got {str(values)[:80]}")
    kind = values['kind']
    needed = {'char': ['chars'], 'byte': [], 'tiktoken': ['name']}
    if kind not in needed:
        raise ValueError(f'unknown kind of tokenizer {kind!r}; expected one of {", ".join(needed)}'
                         + nearest(kind, needed) + '. The file may come from a newer version of this program.')
    for key in needed[kind]:
        if key not in values:
            raise ValueError(f'the description of a {kind!r} tokenizer lacks {key!r}; it has {sorted(values)}')
    if kind == 'char':
        return CharTokenizer(values['chars'])
    if kind == 'byte':
        return ByteTokenizer()
    return TiktokenTokenizer(values['name'])


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
