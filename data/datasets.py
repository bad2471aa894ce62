"""
Find a dataset, read its meta.json, run its prepare.py if it is missing.

A dataset is a folder: train.bin, val.bin and meta.json. A split of more than a shard's size
continues in train-00001.bin, ... A folder that nanoGPT prepared (uint16 files, perhaps meta.pkl)
reads the same.
"""

import contextlib
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from typing import Annotated, Literal, TypedDict

import numpy as np

import tokenizer
from configurator import Count, Natural, Range, UserError, nearest
from data import TOKEN_FILE
from flatgpt.entries import Tokenizer, conform
from tokenizer import vocabulary
from tokenizer.base import check_regular

DATA = os.path.dirname(os.path.abspath(__file__))


def folder_of(dataset):
    """Return a dataset's folder: a path, data/NAME here, or data/NAME beside train.py."""
    if os.path.basename(dataset) != dataset and os.path.isdir(dataset):
        return dataset
    local, beside = os.path.join('data', dataset), os.path.join(DATA, dataset)
    return beside if os.path.isdir(beside) and not os.path.isdir(local) else local


class Splits(TypedDict):
    """Name the numbers of tokens."""

    train: Natural
    val: Natural


class Files(TypedDict):
    """Name the files of each split and their numbers of tokens."""

    train: list[tuple[str, Natural]]
    val: list[tuple[str, Natural]]


class Required(TypedDict):
    """Name the entries of every meta.json."""

    dtype: Literal['uint16', 'uint32']
    vocab_size: Count
    tokens: Splits
    tokenizer: Tokenizer


class Meta(Required, total=False):
    """Name the entries of meta.json that are read."""

    files: Files
    bytes: Splits
    row: Annotated[int, Range(least=2)] | None
    chat_template: str | None


def check_meta(meta):
    """Raise UserError for entries of meta.json that contradict each other."""
    for split in ('train', 'val') if 'files' in meta else ():
        files = meta['files'][split]
        if sum(n for _, n in files) != meta['tokens'][split] or not all(
                re.fullmatch(rf'{split}(-\d{{5}})?\.bin', name) for name, _ in files):
            raise UserError(f'the files of {split}, {files}, do not hold '
                            f'{meta["tokens"][split]:,} tokens')
    row, tokens = meta.get('row') or 1, meta['tokens']
    if tokens['train'] < row or tokens['train'] % row or tokens['val'] % row:
        raise UserError(f'tokens={tokens} are no whole rows of {row}')
    described, vocab_size = meta['tokenizer'], meta['vocab_size']
    # OpenAI's vocabularies would be downloaded; they have at most 200,019 ids
    is_published = described['kind'] == 'tiktoken'
    n_ids = 2**18 if is_published else tokenizer.from_dict(described).vocab_size
    if vocab_size > n_ids:
        raise UserError(f'vocab_size={vocab_size}, but its tokenizer has {n_ids} ids')


def load_meta(data_dir):
    """Read a dataset's meta.json, or nanoGPT's meta.pkl.

    -> {'dtype', 'vocab_size', 'tokenizer', 'tokens', 'files', 'row', 'chat_template', 'digest'};
    all but dtype and digest are None where the folder lacks them. tokenizer: a dict for
    tokenizer.from_dict(); tokens: {'train': count, 'val': count}; files: {'train': [[name, count],
    ...], 'val': ...}; row, chat_template: for packed conversations; digest: see digest_of(). Raises
    UserError on a damaged file.
    """
    path = os.path.join(data_dir, 'meta.json')
    if os.path.exists(path):
        try:
            meta = conform(vocabulary.read_json(path), Meta)
            check_meta(meta)
        except UserError as error:
            raise UserError(f'{path} is damaged ({error}); prepare the dataset again: '
                            f'{prepare_command(data_dir)}') from error
        files = {split: [[f'{split}.bin', n]] for split, n in meta['tokens'].items()}
        return {'row': None, 'chat_template': None, 'files': files, **meta,
                'dtype': np.dtype(meta['dtype']), 'digest': digest_of(data_dir, meta)}
    meta = dict.fromkeys(('vocab_size', 'tokenizer', 'tokens', 'files', 'row', 'chat_template'))
    path = os.path.join(data_dir, 'meta.pkl')
    if os.path.exists(path):
        chars = tokenizer.from_meta_pkl(path)
        meta |= {'tokenizer': chars.to_dict(), 'vocab_size': chars.vocab_size}
    return {'dtype': np.dtype(np.uint16), **meta, 'digest': digest_of(data_dir, meta)}


def sizes_of(data_dir):
    """Return a dataset's (ids of its vocabulary, row), None where they are not known."""
    if not any(os.path.exists(os.path.join(data_dir, f'meta.{kind}')) for kind in ('json', 'pkl')):
        return None, None
    meta = load_meta(data_dir)
    return meta['vocab_size'], meta['row']


def train_tokens(data_dir, meta):
    """Return the number of a dataset's training tokens."""
    if meta['tokens']:
        return meta['tokens']['train']
    return os.path.getsize(os.path.join(data_dir, 'train.bin')) // meta['dtype'].itemsize


def digest_of(data_dir, meta):
    """Hash a dataset's text and its split, to recognise it under any path.

    meta: the content of meta.json. Without the text's own SHA-256 in it, the sizes of train.bin
    and val.bin and their first and last megabyte are hashed.
    """
    digest = hashlib.sha256(json.dumps([meta.get(key) for key in (
        'sha256', 'val_fraction', 'tokens', 'row')]).encode())
    for path in () if meta.get('sha256') else token_files(data_dir):
        with open(path, 'rb') as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(b'%d' % size + file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read(2**20))
    return digest.hexdigest()


def token_files(data_dir):
    """Return the paths of a dataset's token files, sorted."""
    paths = [os.path.join(data_dir, name) for name in sorted(os.listdir(data_dir))
             if TOKEN_FILE.fullmatch(name)]
    for path in paths:
        check_regular(path)
    return paths


def stamps_of(data_dir):
    """Return {path: (inode, size, time of change)} of a dataset's token files."""
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            for path in token_files(data_dir) for stat in [os.stat(path)]}


def find_rewritten(stamps, warn):
    """Compare stamps_of() with the disk; -> a line about a shorter file, or None.

    A new preparation replaces the files, and a run keeps the old ones open. A file that is
    rewritten in place changes what the run reads: warn(line). Reading past a new end is a bus
    error.
    """
    for path, (inode, size, time_ns) in stamps.items():
        with contextlib.suppress(OSError):  # it is gone, and stays open
            now = os.stat(path)
            if now.st_ino == inode and (now.st_size, now.st_mtime_ns) != (size, time_ns):
                line = f'{path} was rewritten: it had {size:,} bytes and has {now.st_size:,}'
                warn(f'WARNING: {line}')
                if now.st_size < size:
                    return line
    return None


def prepare_command(data_dir, kind='text'):
    """Return the command that makes a dataset again; kind: 'text' or 'chat'."""
    data_dir = os.path.normpath(data_dir)
    script = os.path.join(data_dir, 'prepare.py')
    if os.path.exists(script):
        return f'python {script}'
    folder, name = os.path.split(data_dir)
    # --name writes beside this file, where folder_of() looks if there is no such folder here
    is_named = os.path.abspath(folder) == DATA or (folder == 'data' and not os.path.isdir(data_dir))
    where = f'--name={name}' if is_named else shlex.quote(f'--out_dir={data_dir}')
    return f'python data/{kind}/prepare.py --input=FILE {where}'


def prepare_if_missing(data_dir, is_first):
    """Run the dataset's prepare.py if its .bin files are missing.

    Under torchrun one process per machine (is_first) runs it and the others wait. Raises UserError
    if there is no prepare.py, or if it fails.
    """
    def is_missing():
        paths = (os.path.join(data_dir, f'{split}.bin') for split in ('train', 'val'))
        return not all(map(os.path.exists, paths))

    script = os.path.join(data_dir, 'prepare.py')
    if is_missing() and not os.path.exists(script):
        names = sorted(os.listdir('data')) if os.path.isdir('data') else []
        names = [name for name in names if os.path.isdir(os.path.join('data', name))]
        home = os.path.dirname(DATA)
        elsewhere = '' if os.path.realpath(home) == os.path.realpath(os.getcwd()) else (
            f' The current folder is {os.getcwd()}; for the datasets of train.py: cd {home}.')
        raise UserError(f'no dataset in {data_dir}{nearest(os.path.basename(data_dir), names)}: '
                        f'expected train.bin and val.bin, or a prepare.py. Datasets here: '
                        f'{", ".join(names) or "none"}.{elsewhere} Your own text: '
                        f'{prepare_command(data_dir)}')
    while is_missing():
        if is_first:
            print(f'{data_dir} is not prepared yet; running: python {script}', flush=True)
            code = subprocess.run([sys.executable, script]).returncode
            if code == 0 and is_missing():
                raise UserError(f'python {script} wrote no train.bin and val.bin to '
                                f'{data_dir}; correct the script')
            if code not in (0, 75):  # 75, EX_TEMPFAIL: another machine on this disk prepares it
                raise UserError(f'python {script} failed; its error is above')
        time.sleep(1 if is_missing() else 0)
