"""
Read and write tiktoken's, Hugging Face's, GPT-2's and nanoGPT's files.

    read(path)                       any of them, by content; or a folder that has one
    read_tiktoken(path, pattern)     *.tiktoken: a token in base64 and its rank, line by line
    read_tokenizer_json(path)        Hugging Face's tokenizer.json
    read_model(path)                 SentencePiece's tokenizer.model
    read_gpt2_files(vocab, merges)   GPT-2's encoder.json and vocab.bpe (vocab.json, merges.txt)
    from_meta_pkl(path)              nanoGPT's meta.pkl, as a CharTokenizer
    write_tiktoken(values, path)
    write_model(values, path)
    write_tokenizer_json(values, path)
    write_hf_folder(values, folder)  tokenizer.json and the files that AutoTokenizer needs

`values` is a description (see vocabulary.py). A file that is read or written gives the same ids for
every text, or UserError names the obstacle. Special tokens differ: Hugging Face's libraries
turn their text into ids everywhere; encode() and tiktoken do so only when allowed to.
"""

import base64
import binascii
import hashlib
import io
import itertools
import os
import pickle
import pickletools

from configurator import UserError
from tokenizer import vocabulary
from tokenizer.base import ENDOFTEXT, write_file
from tokenizer.basic import CharTokenizer
from tokenizer.bpe import final_parts, recover_merges
from tokenizer.patterns import BYTE_TO_CHAR, PATTERNS, SPECIAL, find_pattern
from tokenizer.sentencepiece_model import is_model, read_model, write_model
from tokenizer.tokenizer_json import read_tokenizer_json, write_hf_folder, write_tokenizer_json

__all__ = ['GPT2_FILES', 'from_meta_pkl', 'read', 'read_gpt2_files', 'read_tiktoken',
           'read_model', 'read_tokenizer_json', 'write_hf_folder', 'write_model', 'write_tiktoken',
           'write_tokenizer_json']

GPT2_FILES = [('vocab.json', 'merges.txt'), ('encoder.json', 'vocab.bpe')]

# OpenAI's published files: SHA-256 -> name, pattern and special tokens, which are not in the file.
PUBLISHED = {
    '306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930': (
        'r50k_base', 'gpt2', {ENDOFTEXT: 50256}),
    '94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069': (
        'p50k_base', 'gpt2', {ENDOFTEXT: 50256}),
    '223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7': ('cl100k_base', 'gpt4', {
        ENDOFTEXT: 100257, '<|fim_prefix|>': 100258, '<|fim_middle|>': 100259,
        '<|fim_suffix|>': 100260, '<|endofprompt|>': 100276}),
    '446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d': (
        'o200k_base', 'o200k', {ENDOFTEXT: 199999, '<|endofprompt|>': 200018})}


def read(path) -> dict:
    """Read the vocabulary in a file or folder; return its description.

    Raises UserError where there is none, or none that gives the same ids here.
    """
    if os.path.isdir(path):
        names = sorted(os.listdir(path))
        tiktokens = [name for name in names if name.endswith('.tiktoken')]
        if 'tokenizer.json' in names:
            return read_tokenizer_json(os.path.join(path, 'tokenizer.json'))
        for vocab, merges in GPT2_FILES:
            if vocab in names and merges in names:
                return read_gpt2_files(os.path.join(path, vocab), os.path.join(path, merges))
        if not tiktokens and 'tokenizer.model' in names:
            return read(os.path.join(path, 'tokenizer.model'))
        if len(tiktokens) != 1:
            content = ', '.join(names[:8]) or 'it is empty'
            raise UserError(f'the folder {path} holds no vocabulary ({content}); expected '
                            f'{vocabulary.READABLE}')
        path = os.path.join(path, tiktokens[0])
    content = vocabulary.read_bytes(path).removeprefix(b'\xef\xbb\xbf')
    first_line = content.split(b'\n', 1)[0].split()
    if content.lstrip()[:1] == b'{':
        file = vocabulary.read_json(path)
        if vocabulary.is_vocab(file):
            return read_gpt2_files(path, beside(path, dict(GPT2_FILES)))
        if 'model' in file:
            return read_tokenizer_json(path)
        if 'kind' in file:
            raise UserError(f"{path} is in this program's own format, of kind "
                            f'{vocabulary.short(file["kind"])}: tokenizer.load() reads it')
    elif first_line[:1] == [b'#version:']:
        return read_gpt2_files(beside(path, {merges: vocab for vocab, merges in GPT2_FILES}), path)
    elif len(first_line) == 2 and len(first_line[0]) % 4 == 0 and first_line[1].isdigit():
        return read_tiktoken(path)
    fact = 'unknown content'
    if content[:1] == b'\x80':
        fact = 'a pickle, which could run code when read; export another format'
    elif is_model(path, content):
        return read_model(path)
    raise UserError(f'{path}: {fact}. Expected {vocabulary.READABLE}')


def read_tiktoken(path, pattern: str | None = 'gpt4', special_tokens=None) -> dict:
    """Read a file of lines 'base64 rank'; return the description.

    Such a file has neither pattern nor special tokens. OpenAI's are found by the file's SHA-256.
    For other files, pattern is a name in PATTERNS (GPT-4's is Llama 3's too), a regular expression
    or None; special_tokens is {text: id}. Raises UserError for a damaged file.
    """
    content = vocabulary.read_bytes(path)
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 in PUBLISHED:
        _, pattern, special_tokens = PUBLISHED[sha256]
    for expected, (name, _, _) in PUBLISHED.items():
        if os.path.basename(path) == f'{name}.tiktoken' and sha256 != expected:
            raise UserError(f'{path} is not the published {name}: its SHA-256 is {sha256}, '
                            f'expected {expected}. Fetch it again, or rename your own vocabulary')
    ids = {}
    for number, line in enumerate(content.splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            token, rank = base64.b64decode(fields[0], validate=True), int(fields[1])
            if len(fields) != 2 or not token or not fields[1].isdigit():
                raise ValueError
        except (ValueError, IndexError, binascii.Error):
            raise UserError(f'{path}, line {number}: {line[:60]!r} is not a token in base64, a '
                            f'space, and its rank; fetch the file again') from None
        if token in ids:
            raise UserError(f'{path}, line {number}: the token {token[:40]!r} has rank {rank}, '
                            f'but already rank {ids[token]}; fetch the file again')
        ids[token] = rank
    vocabulary.check_lengths(path, ids)
    merges = recover_merges(ids)
    return vocabulary.Vocabulary(path, ids, merges, special_tokens or {}).describe(
        find_pattern(pattern), ignore_merges=len(merges) < len(ids) - 256)


def write_tiktoken(values: dict, path):
    """Write a description as lines 'base64 rank', without pattern and specials.

    Raises UserError when tiktoken would encode some text differently with these ranks.
    """
    ids, merges = vocabulary.tokens_of(values)
    if values.get('added_tokens'):
        raise UserError(f'{path} cannot be written: the format has no added tokens, such as '
                        f'{next(iter(values["added_tokens"]))!r}; write tokenizer.json')
    vocabulary.check_lengths(path, ids)
    by_rank = recover_merges(ids)  # what tiktoken merges, in its order
    rank = vocabulary.rank_in({pair: i for i, pair in enumerate(merges)})
    reached = [(left, right) for left, right in merges
               if final_parts(left + right, rank) == [left, right]]
    tokens = [left + right for left, right in reached]
    differing = {left + right for left, right in set(reached) ^ set(by_rank)}
    differing |= {token for token, following in itertools.pairwise(tokens)
                  if ids[token] > ids[following]}
    if not values['ignore_merges']:
        differing |= {left + right for left, right in merges} - set(tokens)
    if differing and by_rank != merges:
        token = min(differing, key=ids.get)
        raise UserError(f'{path} cannot be written: tiktoken joins any neighbours that are a '
                        f'token, the lowest id first, and takes a piece whole that is one. So it '
                        f'would use {token!r} (id {ids[token]}) elsewhere; write tokenizer.json')
    write_file(path, ''.join(f'{base64.b64encode(token).decode()} {ids[token]}\n'
                             for token in sorted(ids, key=ids.get)))


def read_gpt2_files(vocab_json, merges_txt) -> dict:
    """Read GPT-2's two files, {token: id} and one merge per line.

    Returns the description. Tokens like <|endoftext|> that no merge makes are special. Raises
    UserError for files that do not fit together.
    """
    vocab = vocabulary.read_json(vocab_json)
    if not vocabulary.is_vocab(vocab):
        raise UserError(f'{vocab_json} is no vocabulary: expected an object {{token: id}}, got '
                        f'{vocabulary.short(vocab)}')
    pairs = []
    for number, line in enumerate(vocabulary.read_utf8(merges_txt).split('\n'), start=1):
        line = line.removesuffix('\r')
        if line and not (number == 1 and line.startswith('#version')):
            pairs.append((f'line {number}', line.split(' ')))
    made = {''.join(pair) for _, pair in pairs} | set(BYTE_TO_CHAR.values())
    specials = {text: i for text, i in vocab.items()
                if text not in made and SPECIAL.fullmatch(text)}
    return vocabulary.from_alphabet(merges_txt, vocab, pairs, specials).describe(PATTERNS['gpt2'])


def beside(path, partners: dict[str, str]):
    """Return the path of the second of GPT-2's two files. Raises UserError."""
    name = os.path.basename(path)
    if name not in partners:
        raise UserError(f"{path} is one of GPT-2's two files; rename it to "
                        f'{" or ".join(partners)}, and the other to '
                        f'{" or ".join(partners.values())}')
    partner = os.path.join(os.path.dirname(path), partners[name])
    if not os.path.exists(partner):
        raise UserError(f"{path} is one of GPT-2's two files; copy the other, {partner}")
    return partner


class PlainUnpickler(pickle.Unpickler):
    """Refuse every class and function by name, since a pickle runs code only through these."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it refers to {module}.{name}')


def from_meta_pkl(path) -> CharTokenizer:
    """Make the tokenizer of nanoGPT's meta.pkl; runs no code. Raises UserError."""
    command = f'Make it again: python {os.path.dirname(path) or "."}/prepare.py'
    try:
        with open(path, 'rb') as file:
            content = file.read()
        for opcode, number, _ in pickletools.genops(content):
            if 'PUT' in opcode.name and number > len(content):  # its place in an array
                raise pickle.UnpicklingError(f'it numbers an object {number:,}')
        meta = PlainUnpickler(io.BytesIO(content)).load()
    except FileNotFoundError:
        raise UserError(f'{path} does not exist. {command}') from None
    except Exception as error:  # damaged pickles raise nearly anything
        raise UserError(f'{path} was refused: it is damaged, or not a plain meta.pkl ({error}). '
                        f'{command}') from None
    stoi = meta.get('stoi') if isinstance(meta, dict) else None
    valid = (isinstance(stoi, dict) and type(meta.get('vocab_size')) is int
             and len(stoi) == meta['vocab_size']
             and all(type(char) is str and type(i) is int for char, i in stoi.items())
             and sorted(stoi.values()) == list(range(meta['vocab_size']))
             and meta.get('itos') == {i: char for char, i in stoi.items()})
    if not valid:
        raise UserError(f'{path} was refused: expected vocab_size, stoi {{character: id}} with the '
                        f'ids 0 to vocab_size - 1, and itos, the reverse of stoi. {command}')
    try:
        return CharTokenizer(sorted(stoi, key=stoi.get))
    except UserError as error:
        raise UserError(f'{path} was refused: {error}. {command}') from None
