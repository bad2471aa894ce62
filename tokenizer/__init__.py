"""Text to token ids and back: characters, UTF-8 bytes, words, and byte pair encoding.

    python -m tokenizer --text='Hello, 안녕!' --tokenizer=gpt2              # see the tokens
    python -m tokenizer --compare=gpt2,cl100k_base,byte                     # count them, per language and for code
    python -m tokenizer train --input=FOLDER --vocab_size=8192 --out=my.json
    python -m tokenizer export --tokenizer=my.json --out=tokenizer.json     # for Hugging Face; .tiktoken for tiktoken

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

import json
import os

from configurator import UserError
from tokenizer import formats
from tokenizer.base import ENDOFTEXT, FILE_FORMAT, FILE_VERSION, Tokenizer, digest, id_dtype, nearest
from tokenizer.basic import ByteTokenizer, CharTokenizer, WordTokenizer
from tokenizer.bytepair import TIKTOKEN_FILES, BPETokenizer, TiktokenTokenizer
from tokenizer.formats import from_meta_pkl

__all__ = ['BPETokenizer', 'ByteTokenizer', 'CharTokenizer', 'ENDOFTEXT', 'NAMES', 'TiktokenTokenizer', 'Tokenizer',
           'WordTokenizer', 'digest', 'from_dict', 'from_meta_pkl', 'id_dtype', 'load', 'load_file', 'nearest']

NAMES = ['byte', *TIKTOKEN_FILES]  # that load() knows without a file


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
        raise UserError(f'the tokenizer {name!r} takes its vocabulary from a text: python -m tokenizer train '
                         f'--kind={name} --input=FILE --out=my.json, or a prepare.py with --tokenizer={name}')
    names = ['char', 'word', 'bpe', *NAMES]
    near = nearest(name, [*names, *(path for path in os.listdir() if path.endswith(('.json', '.tiktoken')))])
    raise UserError(f'unknown tokenizer {str(name)!r}; expected one of {", ".join(names)}, or a file{near}')


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
                    raise UserError(f'{path} is damaged or cut short ({error}); get the file anew, or train the '
                                     f'tokenizer again') from None
    if values is None:
        return from_dict(formats.read(path))
    if not isinstance(values, dict):
        raise UserError(f'{path} is damaged: expected a JSON object, got {type(values).__name__}')
    if values.get('version') != FILE_VERSION:
        raise UserError(f'{path} is of version {values.get("version")!r} of this format, and this program reads '
                         f'version {FILE_VERSION}: update this program, or train the tokenizer again with it')
    described = {key: value for key, value in values.items() if key not in ('format', 'version', 'sha256')}
    if values.get('sha256') != digest(described):
        raise UserError(f'{path} is damaged: its content does not have the checksum that is written in it. Get the '
                         f'file anew, or train the tokenizer again')
    try:
        return from_dict(described)
    except ValueError as error:
        raise UserError(f'{path}: {error}') from None


def from_dict(values: dict):
    """The tokenizer that to_dict() described; ValueError when the description is damaged or of an unknown kind."""
    if not isinstance(values, dict) or 'kind' not in values:
        raise UserError(f"a tokenizer is described by a dict with the key 'kind', got {str(values)[:80]}")
    kind = values['kind']
    needed = {'char': {'chars': str | list}, 'byte': {}, 'word': {'words': list}, 'tiktoken': {'name': str},
              'bpe': {'merges': list, 'pattern': str | None, 'special_tokens': dict}}
    if not isinstance(kind, str) or kind not in needed:
        raise UserError(f'unknown kind of tokenizer {kind!r}; expected one of {", ".join(needed)}'
                         + nearest(str(kind), needed) + '. The file may come from a newer version of this program.')
    for key, expected in needed[kind].items():
        if key not in values:
            raise UserError(f'the description of a {kind!r} tokenizer lacks {key!r}; it has {sorted(values)}')
        if not isinstance(values[key], expected):
            raise UserError(f'{key} of a {kind!r} tokenizer is {str(values[key])[:80]!r}; expected '
                             f'{getattr(expected, "__name__", expected)}')
    for key, expected in (('byte_ids', 'ids'), ('merge_ids', 'ids'), ('visible_tokens', 'special tokens')):
        if not isinstance(values.get(key), list | None):
            raise UserError(f'{key} of a {kind!r} tokenizer is {str(values[key])[:80]!r}; expected a list of '
                             f'{expected}')
    if kind == 'char':
        return CharTokenizer(values['chars'])
    if kind == 'byte':
        return ByteTokenizer()
    if kind == 'word':
        return WordTokenizer(values['words'])
    if kind == 'tiktoken':
        return TiktokenTokenizer(values['name'])
    return BPETokenizer.from_values(values)
