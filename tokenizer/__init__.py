"""
Turn text into token ids and back: characters, bytes, words, byte pairs.

    python -m tokenizer --text='Hello, 안녕!' --tokenizer=gpt2          # see the tokens
    python -m tokenizer --compare=gpt2,cl100k_base,byte                 # count them, by language
    python -m tokenizer page --out=tokens.html --tokenizer=gpt2         # type, and see them
    python -m tokenizer train --input=FOLDER --vocab_size=8192 --out=my.json
    python -m tokenizer train --kind=sentencepiece --input=FOLDER --vocab_size=8192 --out=my.model
    python -m tokenizer export --tokenizer=my.json --out=tokenizer.json # or NAME.tiktoken

    >>> import tokenizer
    >>> tok = tokenizer.load('gpt2')  # or byte, cl100k_base (GPT-4), o200k_base (GPT-4o), a file
    >>> tok = tokenizer.BPETokenizer.train(texts, 8192, special_tokens=['<|endoftext|>'])
    >>> tok.decode(tok.encode('some text'))
    'some text'

README.md has the table of methods that every tokenizer offers.
"""

import json
import os

from configurator import UserError, nearest
from tokenizer import formats
from tokenizer.base import ENDOFTEXT, FILE_FORMAT, FILE_VERSION, Tokenizer, digest, id_dtype
from tokenizer.basic import ByteTokenizer, CharTokenizer, WordTokenizer
from tokenizer.bytepair import TIKTOKEN_FILES, BPETokenizer, TiktokenTokenizer
from tokenizer.formats import from_meta_pkl
from tokenizer.sentencepiece import SentencePieceTokenizer
from tokenizer.vocabulary import read_bytes

__all__ = ['BPETokenizer', 'ByteTokenizer', 'CharTokenizer', 'ENDOFTEXT', 'NAMES',
           'SentencePieceTokenizer', 'TiktokenTokenizer', 'Tokenizer', 'WordTokenizer', 'digest',
           'from_dict', 'from_meta_pkl', 'id_dtype', 'load', 'load_file']

NAMES = ['byte', *TIKTOKEN_FILES]  # the names that load() takes without a file
TRAINED = ['char', 'word', 'bpe', 'sentencepiece']
ALSO_CALLED = {'gpt-2': 'gpt2', 'gpt4': 'cl100k_base', 'gpt-4': 'cl100k_base',
               'gpt4o': 'o200k_base', 'gpt-4o': 'o200k_base'}  # for "did you mean"
CLASSES = {'char': CharTokenizer, 'byte': ByteTokenizer, 'word': WordTokenizer,
           'tiktoken': TiktokenTokenizer}
# The entries of to_dict() for each kind, and those that may be left out.
FIELDS = {'char': {'chars': str | list}, 'byte': {}, 'word': {'words': list},
          'tiktoken': {'name': str},
          'bpe': {'merges': list, 'pattern': str | None, 'special_tokens': dict},
          'sentencepiece': {'pieces': list, 'special_tokens': dict, 'add_dummy_prefix': bool}}
OPTIONAL = {**dict.fromkeys(['byte_ids', 'merge_ids', 'visible_tokens', 'ranks',
                             'user_defined_symbols'], list | None),
            **dict.fromkeys(['added_tokens', 'token_rules'], dict | None),
            **dict.fromkeys(['precompiled_charsmap', 'metaspace'], str | None),
            'remove_extra_whitespaces': bool | None}


def load(name):
    """Return the tokenizer of a name, a file or a folder.

    NAMES has the names; formats.py reads other people's files. Raises UserError.
    """
    if name == 'byte':
        return ByteTokenizer()
    if name in TIKTOKEN_FILES:
        return TiktokenTokenizer(name)
    for path in (name, f'{name}.json'):
        if os.path.exists(path):
            return load_file(path)
    if name in TRAINED:
        raise UserError(f'the tokenizer {name!r} takes its vocabulary from a text: python -m '
                        f'tokenizer train --kind={name} --input=FILE --out=my.json')
    files = [path for path in os.listdir() if path.endswith(('.json', '.tiktoken', '.model'))]
    near = nearest(ALSO_CALLED.get(name, str(name)), [*TRAINED, *NAMES, *files])
    raise UserError(f'unknown tokenizer {str(name)!r}; expected one of '
                    f'{", ".join([*TRAINED, *NAMES])}, or a file{near}')


def load_file(path):
    """Return the tokenizer in a file or folder. Raises UserError."""
    content = read_bytes(path) if os.path.isfile(path) else b''
    if FILE_FORMAT.encode() not in content[:200]:
        return from_dict(formats.read(path))
    again = 'Fetch the file again, or train the tokenizer again'
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is damaged or cut short ({error}). {again}') from None
    if not isinstance(values, dict):
        raise UserError(f'{path} is damaged: expected a JSON object, got '
                        f'{type(values).__name__}. {again}')
    if values.get('version') != FILE_VERSION:
        raise UserError(f'{path} is of version {values.get("version")!r}, and this program reads '
                        f'version {FILE_VERSION}: update it, or train the tokenizer again')
    described = {key: value for key, value in values.items()
                 if key not in ('format', 'version', 'sha256')}
    if values.get('sha256') != digest(described):
        raise UserError(f'{path} is damaged: its content does not match its checksum. {again}')
    try:
        return from_dict(described)
    except ValueError as error:
        raise UserError(f'{path}: {error}') from None


def from_dict(values: dict):
    """Return the tokenizer that to_dict() described. Raises UserError."""
    if not isinstance(values, dict) or 'kind' not in values:
        raise UserError(f"a tokenizer is described by a dict with the key 'kind', got "
                        f'{str(values)[:80]}')
    kind = values['kind']
    if not isinstance(kind, str) or kind not in FIELDS:
        raise UserError(f'unknown kind of tokenizer {kind!r}; expected one of {", ".join(FIELDS)}'
                        f'{nearest(str(kind), FIELDS)}. Is the file from a newer version?')
    for key, expected in (FIELDS[kind] | OPTIONAL).items():
        if key not in values and key in FIELDS[kind]:
            raise UserError(f'the description of a {kind!r} tokenizer lacks {key!r}; it has '
                            f'{sorted(values)}')
        if not isinstance(values.get(key), expected):
            raise UserError(f'{key} of a {kind!r} tokenizer is {str(values[key])[:80]!r}; expected '
                            f'{getattr(expected, "__name__", expected)}')
    if kind in ('bpe', 'sentencepiece'):
        return (BPETokenizer if kind == 'bpe' else SentencePieceTokenizer).from_values(values)
    return CLASSES[kind](*(values[key] for key in FIELDS[kind]))
