"""Encode text into token files, for every data/<name>/prepare.py.

    corpus = Corpus(pieces, documents=True, source='my notes', val_fraction=0.1)
    tokenizer = make_tokenizer('bpe', corpus)
    meta = write_dataset('data/notes', corpus, tokenizer)  # train.bin, val.bin and meta.json

Memory stays below a few hundred MB whatever the size of the text, apart from its longest
document. A running text counts as one document if its tokenizer has the user's own split pattern.
A killed preparation that is run again continues after its last finished shard.

A .bin file is a plain array of token ids, little-endian uint16, or uint32 for more than 65,536
ids: np.memmap(path, dtype='<u2') reads it. A split longer than a shard continues in
train-00001.bin, train-00002.bin, ... meta.json has the dtype, the vocabulary size, the counts,
the files in order, and the tokenizer. train_documents.bin has the length of each document of
train.bin in tokens, uint32, and train_documents-00001.bin those of the next shard.
"""

import argparse
import collections
import contextlib
import hashlib
import itertools
import json
import os
import re
import shlex
import stat
import sys
import time
from array import array
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

import tokenizer as tokenizers
from configurator import UserError, printable
from data import TOKEN_FILE
from data.documents import split_suffix
from flatgpt import files, output
from tokenizer.base import ENDOFTEXT, remove_temporaries
from tokenizer.patterns import batches, to_utf8

BATCH_CHARS = 1 << 22   # a batch of text; memory holds two: one is encoded, the next is read
SEPARATOR = '\n\n'      # ends a document if the tokenizer has no <|endoftext|>
SHARD_TOKENS = 10**9    # 2 GB of uint16
VOCAB_SIZES = {'bpe': 8192, 'word': 10000}  # defaults of the vocabularies trained on the text


@dataclass
class Corpus:
    """Hold the text of a dataset, and the way to write it."""

    pieces: Callable[[], Iterable[tuple[str, str]]]  # -> (split, text), from the start at each call
    documents: bool     # each piece is a document; else the pieces of a split are one running text
    source: str         # the origin of the text, for meta.json
    val_fraction: float
    shard_tokens: int = SHARD_TOKENS  # most tokens of a file, unless one document has more
    total: int | None = None          # bytes of text, for the progress bar
    workers: int | None = None        # threads or processes that encode; None: one per core


# Tokenizers -------------------------------------------------------------------------------------

def load_tokenizer(name: str, vocab_size: int | None = None):
    """Load a tokenizer by name or path; -> None for one that is made from the text.

    Raises UserError where make_tokenizer() would, so that a script can check before a download.
    """
    if vocab_size is not None and name not in VOCAB_SIZES:
        raise UserError(f'--vocab_size={vocab_size} does not apply to --tokenizer={name}, whose '
                        f'size is fixed; it applies to {" and ".join(VOCAB_SIZES)}')
    return None if name == 'char' or name in VOCAB_SIZES else tokenizers.load(name)


def make_tokenizer(name: str, corpus: Corpus, vocab_size: int | None = None):
    """Return the tokenizer of a name or path; make char, word and bpe from text.

    char has every character of the text; word and bpe are trained on the training split alone,
    to vocab_size ids.
    """
    if (tokenizer := load_tokenizer(name, vocab_size)) is not None:
        return tokenizer
    if name == 'char':
        texts = (text for _, text in corpus.pieces())
        tokenizer = tokenizers.CharTokenizer.from_text(
            itertools.chain(texts, [SEPARATOR] if corpus.documents else []))
        if tokenizer.vocab_size > 1000:
            print(f'note: this text has {tokenizer.vocab_size:,} different characters, each a '
                  f'token; --tokenizer=byte needs 256', file=sys.stderr)
        return tokenizer
    vocab_size = vocab_size or VOCAB_SIZES[name]
    print(f'training a vocabulary of {vocab_size:,} ids on the training split', file=sys.stderr)
    texts = (text for split, text in corpus.pieces() if split == 'train')
    if name == 'word':
        return tokenizers.WordTokenizer.train(texts, vocab_size)
    return tokenizers.BPETokenizer.train(texts, vocab_size, special_tokens=['<|endoftext|>'])


# Writing ----------------------------------------------------------------------------------------
# An unfinished preparation leaves its finished shards under temporary names, and PROGRESS:
# {'shards': {split: [[tokens, pieces, sha256], ...]}, 'sha256': of these and the settings}.
# `pieces` and a shard's `sha256` are those of all text of the split up to the end of the shard.

PROGRESS = '.progress.json'


class TextChanged(Exception):
    """Signal that the text of the finished shards is not the text that is read now."""


def write_dataset(out_dir, corpus: Corpus, tokenizer, meta_pkl: bytes | None = None) -> dict:
    """Encode a corpus into token files, all or none; -> meta.json's content.

    A document ends with the tokenizer's <|endoftext|>, or with SEPARATOR if it has none. A running
    text gets the ids of the whole text. meta_pkl: content of nanoGPT's meta.pkl, to write too.
    Raises UserError when a split has fewer than 2 tokens, the disk is full, or another process
    writes here.
    """
    described = tokenizer.to_dict()
    settings = json.dumps([corpus.source, corpus.documents, corpus.val_fraction,
                           corpus.shard_tokens, described], sort_keys=True)
    settings = hashlib.sha256(settings.encode()).hexdigest()
    is_new = not os.path.isdir(out_dir)
    os.makedirs(out_dir, exist_ok=True)
    lock = files.lock_folder(out_dir)
    try:
        with files.explain_full_disk(out_dir, 'the token files, 2 or 4 bytes per token'):
            try:
                counts = encode_pieces(out_dir, corpus, tokenizer, settings)
            except TextChanged:
                print('note: the text is not the same; starting again', file=sys.stderr)
                remove_unfinished(out_dir)
                counts = encode_pieces(out_dir, corpus, tokenizer, settings)
            meta = {'version': 2, 'dtype': tokenizers.id_dtype(tokenizer.vocab_size).name,
                    'vocab_size': tokenizer.vocab_size, **counts, 'source': corpus.source,
                    'val_fraction': corpus.val_fraction, 'tokenizer': described}
            contents = {'meta.json': (json.dumps(meta, indent=1) + '\n').encode(),
                        **({'meta.pkl': meta_pkl} if meta_pkl else {})}
            names = [name for shards in meta['files'].values() for name, _ in shards]
            names += [index_name(name) for name in names] * corpus.documents
            note_replaced(out_dir, meta)
            publish(out_dir, names, contents)
        return meta
    finally:
        if os.path.exists(os.path.join(out_dir, PROGRESS)):
            print(f'the finished shards are kept in {out_dir}; the same command continues after '
                  f'them', file=sys.stderr)
        else:
            remove_unfinished(out_dir)
        if is_new and not os.listdir(out_dir):
            os.rmdir(out_dir)
        files.unlock(lock)


def encode_pieces(out_dir, corpus, tokenizer, settings) -> dict:
    """Encode the pieces that are not in finished shards, and write them.

    settings: a hash, for PROGRESS. -> entries of meta.json: 'tokens', 'files', 'bytes',
    'documents', 'sha256'. Raises TextChanged, and UserError for too short a split.
    """
    dtype = tokenizers.id_dtype(tokenizer.vocab_size)
    has_eot = corpus.documents and tokenizer.eot is not None
    eot = np.array([tokenizer.eot] if has_eot else [], dtype)
    separator = SEPARATOR if corpus.documents and not has_eot else ''
    shards = load_progress(out_dir, settings, dtype.itemsize, corpus.documents)
    writers = {split: ShardWriter(out_dir, split, eot, corpus, shards[split]) for split in shards}
    digest, sizes = hashlib.sha256(), {'train': 0, 'val': 0}
    names = sorted({ENDOFTEXT, *tokenizer.special_tokens}, key=len, reverse=True)
    special = re.compile(b'|'.join(re.escape(to_utf8(name)) for name in names))
    written_out = collections.Counter()  # special tokens that the text spells
    pieces = corpus.pieces() if corpus.documents else cut_safely(corpus.pieces(), tokenizer)
    stream = read_batches(pieces, separator, digest)
    # disable=None: no bar unless stderr is a terminal
    bar = tqdm(desc='encoding', total=corpus.total, unit='B', unit_scale=True, disable=None,
               leave=False, dynamic_ncols=True)
    try:
        with bar, ThreadPoolExecutor(1) as reader:  # reads one batch ahead
            coming = reader.submit(next, stream, None)
            while (batch := coming.result()) is not None:
                coming = reader.submit(next, stream, None)
                for split, _, utf8 in batch:
                    sizes[split] += len(utf8)
                    written_out.update(special.findall(utf8))
                    bar.update(len(utf8))
                batch = [piece for piece in batch if not writers[piece[0]].skip(piece[2])]
                arrays = tokenizer.encode_batch([text for _, text, _ in batch], corpus.workers)
                for (split, _, utf8), ids in zip(batch, arrays, strict=True):
                    if writers[split].write(ids, utf8):
                        progress = {'shards': shards, 'sha256': digest_of(settings, shards)}
                        files.replace_file(os.path.join(out_dir, PROGRESS),
                                           json.dumps(progress).encode())
        for writer in writers.values():
            writer.end(corpus.val_fraction)
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise
    for name, count in written_out.most_common():
        print(f'note: the text has {name.decode()!r} {count:,} times. It is encoded as these '
              f'letters, not as a special token. If it stands between documents: '
              f'data/text/prepare.py --separator={shlex.quote(name.decode())}', file=sys.stderr)
    names = {split: [[shard_name(split, i), shard[0]] for i, shard in enumerate(shards[split])]
             for split in shards}
    counts = {split: writers[split].pieces if corpus.documents else 1 for split in writers}
    return {'tokens': {split: sum(n for _, n in names[split]) for split in names}, 'files': names,
            'bytes': sizes, 'documents': counts, 'sha256': digest.hexdigest()}


def note_replaced(out_dir, meta):
    """Print a note where a dataset of another text is to be replaced."""
    try:
        with open(os.path.join(out_dir, 'meta.json'), encoding='utf-8') as file:
            before = dict(json.load(file))
    except (OSError, TypeError, ValueError):  # no dataset, or a damaged one
        return
    if before.get('sha256') != meta['sha256']:
        print(f'note: {out_dir} held another text, {before.get("source")!r} of SHA-256 '
              f'{str(before.get("sha256"))[:12]!r}; it is replaced. To keep both, write to another '
              f'folder: --out_dir=FOLDER', file=sys.stderr)


def cut_safely(pieces, tokenizer):
    """Yield the same running text in pieces that encode to the ids of the whole."""
    for split, group in itertools.groupby(pieces, key=lambda piece: piece[0]):
        for text in tokenizer.cut_safely(text for _, text in group):
            yield split, text


def read_batches(pieces, separator, digest):
    """Yield lists of (split, text + separator, UTF-8), and update the digest."""
    ended = ((split, text + separator) for split, text in pieces)
    for batch in batches(ended, BATCH_CHARS, length=lambda piece: len(piece[1])):
        encoded = [(split, text, to_utf8(text)) for split, text in batch]
        for _, _, utf8 in encoded:
            digest.update(utf8)
        yield encoded


class ShardWriter:
    """Write the token ids of one split into shards, under temporary names.

    eot: ids that end each piece, of the dtype of the files. shards: [[tokens, pieces, sha256],
    ...] of those that are finished; grows. The lengths of documents get a file beside each shard.
    """

    def __init__(self, out_dir, split, eot, corpus, shards):
        self.out_dir, self.split, self.eot = out_dir, split, eot
        self.shard_tokens, self.has_index = corpus.shard_tokens, corpus.documents
        self.shards, self.n_finished = shards, shards[-1][1] if shards else 0  # pieces
        self.digest, self.pieces = hashlib.sha256(), 0     # those of the split so far
        self.file, self.tokens, self.lengths = None, 0, array('I')  # those of the open shard

    def name(self):
        return shard_name(self.split, len(self.shards))

    def path(self):
        return temporary(self.out_dir, self.name())

    def skip(self, utf8: bytes) -> bool:
        """Skip a piece that is in a finished shard; -> whether it was. Raises TextChanged."""
        if self.pieces >= self.n_finished:
            return False
        self.digest.update(utf8)
        self.pieces += 1
        if self.pieces == self.n_finished and self.digest.hexdigest() != self.shards[-1][2]:
            raise TextChanged
        return True

    def write(self, ids, utf8: bytes) -> bool:
        """Append the ids of a piece; -> whether a shard was finished before it."""
        n_tokens = len(ids) + len(self.eot)
        if is_full := self.tokens > 0 and self.tokens + n_tokens > self.shard_tokens:
            self.finish_shard()
        if self.file is None:
            self.file = files.create(self.path())
        self.file.write(np.concatenate((ids, self.eot), dtype=self.eot.dtype).data)
        self.tokens += n_tokens
        self.lengths.append(n_tokens)
        self.pieces += 1
        self.digest.update(utf8)
        return is_full

    def finish_shard(self):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if self.has_index:
            lengths = np.array(self.lengths, '<u4').tobytes()
            files.write_synced(temporary(self.out_dir, index_name(self.name())), lengths)
        self.shards.append([self.tokens, self.pieces, self.digest.hexdigest()])
        self.file, self.tokens, self.lengths = None, 0, array('I')

    def end(self, val_fraction):
        """Finish the last shard. Raises TextChanged; UserError for under 2 tokens."""
        if self.pieces < self.n_finished:
            raise TextChanged
        if not self.shards and self.tokens < 2:
            size = 'larger' if self.split == 'val' else 'smaller'
            # a continued run would end the same way
            files.remove([os.path.join(self.out_dir, PROGRESS)])
            raise UserError(f'the {self.split} split has {self.tokens} token(s) with '
                            f'--val_fraction={val_fraction}; expected at least 2: give more text, '
                            f'or a {size} --val_fraction')
        if self.file is not None:
            self.finish_shard()

    def discard(self):
        """Remove the open shard."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # a full disk; the first error is on its way up
                self.file.close()
            files.remove([self.path()])


def shard_name(split, number) -> str:
    return f'{split}-{number:05d}.bin' if number else f'{split}.bin'


def index_name(name) -> str:
    """Return the name of the file with the lengths of a shard's documents."""
    return re.sub('^(train|val)', r'\1_documents', name)


def temporary(out_dir, name) -> str:
    """Return the path of a file of a dataset that is not complete."""
    return os.path.join(out_dir, f'.{name}.tmp')


def digest_of(settings, shards) -> str:
    """Return the hash by which PROGRESS is known to be whole."""
    return hashlib.sha256(json.dumps([settings, shards], sort_keys=True).encode()).hexdigest()


def load_progress(out_dir, settings, itemsize, has_index) -> dict:
    """Return the finished shards of an unfinished preparation with the same settings.

    -> {split: [[tokens, pieces, sha256], ...]}, empty lists where there is none
    """
    path = os.path.join(out_dir, PROGRESS)
    if os.path.exists(path):
        try:
            with open(path, encoding='utf-8') as file:
                progress = json.load(file)
            shards = {split: [[int(tokens), int(pieces), str(sha256)]
                              for tokens, pieces, sha256 in progress['shards'][split]]
                      for split in ('train', 'val')}
            sizes = {}  # of the files that belong to the finished shards
            for split in shards:
                for i, (tokens, pieces, _) in enumerate(shards[split]):
                    sizes[shard_name(split, i)] = tokens * itemsize
                    if has_index:
                        before = shards[split][i - 1][1] if i else 0
                        sizes[index_name(shard_name(split, i))] = 4 * (pieces - before)
            found = {name: os.lstat(temporary(out_dir, name)) for name in sizes}
            is_usable = progress['sha256'] == digest_of(settings, shards) and all(
                stat.S_ISREG(file.st_mode) and file.st_size == sizes[name]
                for name, file in found.items())
        except (KeyError, OSError, OverflowError, TypeError, ValueError):
            is_usable = False
        if is_usable:
            print(f'continuing the unfinished preparation in {out_dir}: '
                  f'{sum(map(len, shards.values()))} shards are finished; their text is read '
                  f'again, to compare it', file=sys.stderr)
            return shards
        print(f'note: the unfinished preparation in {out_dir} has other settings or is damaged; '
              f'starting again', file=sys.stderr)
    remove_unfinished(out_dir)
    return {'train': [], 'val': []}


def remove_unfinished(out_dir):
    """Remove an unfinished preparation, its progress file first."""
    progress = os.path.join(out_dir, PROGRESS)
    files.remove([progress])
    remove_temporaries(progress)
    files.remove(os.path.join(out_dir, name) for name in os.listdir(out_dir)
                 if re.fullmatch(rf'\.({TOKEN_FILE.pattern}|meta\.json|meta\.pkl)\.tmp', name))


def publish(out_dir, shards: list[str], contents: dict[str, bytes]):
    """Give a complete dataset its names, and remove the files of the old one.

    shards: names of the files that are written under temporary names. contents: the other files.
    train.bin marks a complete dataset: it goes first and comes last, so after any crash the
    folder has a whole dataset or none.
    """
    for name, content in contents.items():
        files.write_synced(temporary(out_dir, name), content)
    names = {*shards, *contents}
    files.remove(os.path.join(out_dir, name) for name in (PROGRESS, 'train.bin'))
    for name in sorted(names - {'train.bin'}):
        os.replace(temporary(out_dir, name), os.path.join(out_dir, name))
    # a meta.pkl of an older dataset would have another tokenizer
    files.remove(os.path.join(out_dir, name) for name in os.listdir(out_dir)
                 if (TOKEN_FILE.fullmatch(name) or name == 'meta.pkl') and name not in names)
    files.sync_folder(out_dir)
    os.replace(temporary(out_dir, 'train.bin'), os.path.join(out_dir, 'train.bin'))
    files.sync_folder(out_dir)


# Scripts ----------------------------------------------------------------------------------------

def positive(text) -> int:
    """Parse an option as a whole number of 1 or more, perhaps written 1e9."""
    with contextlib.suppress(ValueError):
        if (number := float(text)) >= 1 and number.is_integer():
            return int(number)
    raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of 1 or more, such as 1000 '
                                     f'or 1e9')


def names_of(text) -> tuple[str, ...]:
    """Parse an option as names with commas; spaces around them are dropped."""
    return tuple(filter(None, map(str.strip, text.split(','))))


def paths_of(text) -> tuple[str, ...]:
    """Parse an option as paths with commas; ~ is expanded."""
    return tuple(map(os.path.expanduser, names_of(text)))


PATHS = ('input', 'out', 'out_dir', 'template', 'tokenizer', 'quality', 'toxic')


class Once(argparse.Action):
    """Store the value of an option, ~ expanded in PATHS; refuse it the second time."""

    given = None

    def __call__(self, parser, namespace, values, option_string=None):
        if self.given is not None:
            parser.error(f'{option_string} is given twice, as {self.given} and as {values}; '
                         f'expected it once'
                         + '. For several files: a folder of them' * (self.dest == 'input'))
        self.given = values
        # shells leave the ~ of --input=~/x as it is
        setattr(namespace, self.dest, os.path.expanduser(values) if self.dest in PATHS else values)


def make_parser(description: str, usage: str | None = None) -> argparse.ArgumentParser:
    """Return a parser that refuses abbreviations and repetition.

    description: printed by --help as it is.
    """
    parser = argparse.ArgumentParser(description=description, usage=usage, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.register('action', None, Once)
    return parser


def add_options(parser, tokenizer: str, val_fraction: float | None = None,
                out_dir: str | None = None):
    """Add the options that most scripts share. A default of None leaves it out."""
    add = parser.add_argument
    add('--tokenizer', default=tokenizer, help=f'byte, char, word, bpe, gpt2, cl100k_base, '
        f'o200k_base or the path of a tokenizer file ({tokenizer})')
    add('--vocab_size', type=positive, help=f'ids of bpe ({VOCAB_SIZES["bpe"]:,}) and word '
        f'({VOCAB_SIZES["word"]:,}), trained on the training split')
    add('--shard_tokens', type=positive, default=SHARD_TOKENS,
        help='most tokens of a file; documents stay whole (1e9)')
    add('--num_proc', type=positive, help='threads or processes that encode (one per core)')
    if val_fraction is not None:
        add('--val_fraction', type=float, default=val_fraction,
            help=f'share of the text or its documents in val.bin ({val_fraction})')
    if out_dir is not None:
        add('--out_dir', default=out_dir, help="folder to write to (the script's)")


def report(out_dir, meta: dict, started: float, next_command: str):
    """Print the files written, the seconds since `started`, and the next command."""
    for split in ('train', 'val'):
        shards = meta['files'][split]
        size = sum(os.path.getsize(os.path.join(out_dir, name)) for name, _ in shards)
        more = f' and {len(shards) - 1} more' if len(shards) > 1 else ''
        print(f'{split:5}  {meta["tokens"][split]:>13,} tokens  {meta["bytes"][split]:>14,} bytes '
              f'of text  {split}.bin{more} {size / 1e6:,.1f} MB')
    print(f'vocab  {meta["vocab_size"]:>13,} ids ({meta["dtype"]}), tokenizer '
          f'{meta["tokenizer"].get("name", meta["tokenizer"]["kind"])}')
    print(f'wrote  {os.path.relpath(out_dir)} in {time.time() - started:.1f} s')
    print(f'next:  {next_command}')


def output_folder(name, path, out_dir=None):
    """Choose the folder of a dataset: out_dir, or data/<name> (the input's name).

    -> (the dataset's name for train.py, a name for runs on it, its folder). Raises UserError for
    a folder that another script owns.
    """
    if name is not None and out_dir:
        raise UserError(f'--name={name} and --out_dir={out_dir} both name the folder; give one')
    is_pipe = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    if name is None and not out_dir and is_pipe:
        raise UserError(f'{path} gives the dataset no name; name it: --name=mytext')
    if name is None:
        stem = os.path.basename(os.path.abspath(out_dir or path))
        stem = stem if out_dir else split_suffix(stem)[0]
        name = re.sub(r'[^\w.-]+', '_', stem).strip('._') or 'mytext'
    if out_dir:
        dataset, remedy = os.path.relpath(out_dir), 'folder: --out_dir=FOLDER'
        if os.path.basename(dataset) == dataset:  # train.py takes a name with a slash as a path
            dataset = os.path.join('.', dataset)
    else:
        if not re.fullmatch(r'[\w-][\w.-]*', name):
            raise UserError(f'--name={name} is not a plain name; expected letters, digits, "_", '
                            f'"-" and ".", like --name=mytext for the folder data/mytext')
        out_dir = os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
        dataset, remedy = name, f'name: --name=my_{name}'
    shown = os.path.relpath(out_dir)
    if os.path.exists(os.path.join(out_dir, 'prepare.py')):
        raise UserError(f'{shown} is a dataset with its own prepare.py; choose another {remedy}')
    if (os.path.exists(os.path.join(out_dir, 'train.bin'))
            and not os.path.exists(os.path.join(out_dir, 'meta.json'))):
        raise UserError(f'{shown} has a train.bin without meta.json, so another program made it; '
                        f'choose another {remedy}')
    return dataset, name, out_dir


def run(main):
    """Run a script's main(); a mistake of the user ends it with one line."""
    output.protect(drop=True)
    try:
        main()
    except KeyboardInterrupt:
        print('\ninterrupted', file=sys.stderr)
        sys.exit(130)
    except files.Busy as error:
        print(f'error: {printable(error)}', file=sys.stderr)
        # train.py waits for the other process at this exit code
        sys.exit(os.EX_TEMPFAIL if hasattr(os, 'EX_TEMPFAIL') else 1)
    except (UserError, OSError) as error:
        sys.exit(f'error: {printable(error)}')
