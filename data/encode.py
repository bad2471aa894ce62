"""Text in, token files out: what every data/<name>/prepare.py is made of.

    read_text(path)                   one text file, in pieces
    read_documents(path)              documents of a folder, .txt, .jsonl, .csv or .parquet
    split_text, split_documents, ...  which of it is training text, which validation text
    make_tokenizer(name, ...)         a vocabulary by name, from a file, or trained on the training text
    write_dataset(out_dir, ...)       train.bin, val.bin and meta.json, all of them or none

All of it streams: however large the input is, memory stays below a few hundred MB, apart from the longest document. (A
single text counts as one document where its tokenizer has a split pattern of one's own.) An interrupted preparation
goes on where it was when the same command is run again.

A .bin file is nothing but token ids, little-endian uint16 (uint32 when the vocabulary has more than 65,536 ids), so
`np.memmap(path, dtype='<u2')` reads it. What is longer than a shard goes on in train-00001.bin, train-00002.bin, ...
meta.json says the rest: dtype, vocabulary size, counts, the files in their order, and the tokenizer.
"""

import argparse
import csv
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
import numpy as np
from tqdm import tqdm
import tokenizer as tokenizers
from tokenizer.patterns import batches, to_utf8
from flatgpt.files import Busy, NO_ROOM, lock_folder, remove, replace_file, sync_folder, unlock, write_synced
from configurator import UserError


BATCH_CHARS = 1 << 22      # in memory at a time, twice: one batch is encoded while the next is read
SEPARATOR = '\n\n'         # ends a document where the tokenizer has no <|endoftext|>
SHARD_TOKENS = 10**9       # 2 GB of uint16: what file systems and copying tools are at ease with
JOURNAL_SECONDS, JOURNAL_BYTES = 10, 1 << 30  # of work and of text that a kill can cost at most
VOCAB_SIZES = {'bpe': 8192, 'word': 10000}    # of the vocabularies trained on the text, unless --vocab_size says else


# ----------------------------------------------------------------------------------------------------------------------
# reading


# ----------------------------------------------------------------------------------------------------------------------
# splitting. Each function yields (split, text) with split 'train' or 'val', which is what write_dataset writes.


# ----------------------------------------------------------------------------------------------------------------------
# tokenizers

def load_tokenizer(name: str, vocab_size: int | None = None):
    """The tokenizer called name, or None for those that are made from the text. ValueError for what make_tokenizer()
    would refuse, so that it can be known before a long download."""
    if vocab_size is not None and name not in VOCAB_SIZES:
        raise UserError(f'--vocab_size={vocab_size} does not go with --tokenizer={name}, whose size is given; it is '
                         f'for {" and ".join(VOCAB_SIZES)}')
    return None if name == 'char' or name in VOCAB_SIZES else tokenizers.load(name)


def make_tokenizer(name: str, pieces, documents: bool, vocab_size: int | None = None):
    """The tokenizer called name for write_dataset(..., pieces, documents=documents).

    name: 'char', 'word' or 'bpe', whose vocabularies are made here, or what tokenizer.load() takes: another name, or
    the path of a tokenizer file. char holds every character of the text; word and bpe are trained on the training split
    alone, to vocab_size ids. pieces: a function that returns an iterator of (split, text).
    """
    if (tokenizer := load_tokenizer(name, vocab_size)) is not None:
        return tokenizer
    if name == 'char':
        separator = [SEPARATOR] if documents else []
        tokenizer = tokenizers.CharTokenizer.from_text(itertools.chain((text for _, text in pieces()), separator))
        if tokenizer.vocab_size > 1000:
            print(f'note: this text has {tokenizer.vocab_size:,} different characters, each a token of its own. '
                  f'--tokenizer=byte needs 256.', file=sys.stderr)
        return tokenizer
    vocab_size = vocab_size or VOCAB_SIZES[name]
    print(f'training a vocabulary of {vocab_size:,} ids on the training split', file=sys.stderr)
    texts = (text for split, text in pieces() if split == 'train')
    if name == 'word':
        return tokenizers.WordTokenizer.train(texts, vocab_size)
    return tokenizers.BPETokenizer.train(texts, vocab_size, special_tokens=['<|endoftext|>'])


# ----------------------------------------------------------------------------------------------------------------------
# writing

def write_dataset(out_dir, pieces, tokenizer, *, documents: bool, source: str, val_fraction: float,
                  shard_tokens: int = SHARD_TOKENS, total: int | None = None, workers: int | None = None,
                  meta_pkl: bytes | None = None) -> dict:
    """Encode pieces into out_dir: train.bin, val.bin and meta.json, all of them or none. Returns meta.json's content.

    pieces: a function that returns an iterator of (split, text), each time from the start. documents: each piece is a
    document, and ends with the tokenizer's <|endoftext|>, or with a blank line where it has none; otherwise the pieces
    of a split, which come one after another, are one running text, and its ids are those of the whole. source: what
    meta.json says about the origin. shard_tokens: a split of more goes on in further files; none is larger, unless by a
    single document or PIECE_CHARS of a running text. total: bytes of text, for the progress bar. workers: threads or
    processes of encoding, default one per core. meta_pkl: nanoGPT's meta.pkl, to write along.

    train.bin is the sign that a dataset is complete: it goes first and comes last, so whoever looks at the folder,
    after whatever crash, finds a whole dataset or none. What was encoded before an interruption stays beside it under
    temporary names, with a journal; the next call with the same arguments checks that the text is still the same and
    goes on there, to the same files. ValueError when a split has fewer than 2 tokens, the disk is full, or another
    process is writing here.
    """
    if shard_tokens < 1:
        raise UserError(f'shard_tokens is {shard_tokens}; expected 1 or more, such as {SHARD_TOKENS:,}')
    created = not os.path.isdir(out_dir)
    os.makedirs(out_dir, exist_ok=True)
    lock = lock_folder(out_dir)
    described = tokenizer.to_dict()
    # a trained vocabulary may be long, so of it only the digest; the rest lets a note say what differs
    settings = {'version': 2, 'source': source, 'tokenizer': tokenizers.digest(described), 'documents': documents,
                'val_fraction': val_fraction, 'shard_tokens': shard_tokens}
    try:
        done = write_tokens(out_dir, pieces, tokenizer, settings, total, workers)
        tokens = {split: sum(count for _, count in files) for split, files in done['files'].items()}
        for split in ('train', 'val'):
            if tokens[split] < 2:
                remove([os.path.join(out_dir, JOURNAL)])  # going on would come to the same end
                remedy = ('give more text, or a larger --val_fraction' if split == 'val'
                          else 'give more text, or a smaller --val_fraction')
                raise UserError(f'the {split} split has {tokens[split]} token(s) with --val_fraction={val_fraction}; '
                                 f'expected at least 2: {remedy}')
        meta = {'version': 2, 'dtype': tokenizers.id_dtype(tokenizer.vocab_size).name,
                'vocab_size': tokenizer.vocab_size, 'tokens': tokens, 'files': done['files'], 'bytes': done['bytes'],
                'documents': done['pieces'] if documents else {'train': 1, 'val': 1}, 'sha256': done['sha256'],
                'source': source, 'val_fraction': val_fraction, 'tokenizer': described}
        publish(out_dir, meta, meta_pkl, settings, done)
        return meta
    except OSError as error:
        if error.errno in NO_ROOM:
            free = shutil.disk_usage(out_dir).free
            raise UserError(f'{out_dir} has no room for the token files ({error.strerror}; {free / 1e6:,.0f} MB free '
                             f'now). They take 2 bytes per token (4 with more than 65,536 ids), while the old ones, '
                             f'if any, stay as they are. Free some space and run the same command again, or use '
                             f'another disk.') from None
        raise
    finally:
        if os.path.exists(os.path.join(out_dir, JOURNAL)):
            print(f'what is encoded so far is kept in {out_dir}; the same command goes on from there', file=sys.stderr)
        else:
            remove_unfinished(out_dir)
        if created and not os.listdir(out_dir):
            os.rmdir(out_dir)
        unlock(lock)


def write_tokens(out_dir, pieces, tokenizer, settings, total, workers) -> dict:
    """Write the token files under their temporary names, going on where a journal with the same settings ends.

    Returns what was done: {'pieces': {split: count}, 'bytes': {split: count}, 'sha256': of the text, 'files': {split:
    [[name, tokens], ...]}}. When it ends early, for whatever reason, what was done is kept for the next call.
    """
    dtype = tokenizers.id_dtype(tokenizer.vocab_size)
    has_eot = settings['documents'] and tokenizer.eot is not None
    eot = np.array([tokenizer.eot] if has_eot else [], dtype=dtype)
    separator = SEPARATOR if settings['documents'] and not has_eot else ''
    # disable=None: no bar where stderr is not a terminal
    bar = tqdm(desc='encoding', total=total, unit='B', unit_scale=True, disable=None, leave=False, dynamic_ncols=True)

    def from_start():
        return read_batches(pieces() if settings['documents'] else cut_anew(pieces(), tokenizer), separator)

    stream = from_start()
    done = load_journal(out_dir, settings, dtype.itemsize)
    if done is not None:
        size = sum(done['bytes'].values())
        print(f'going on with the unfinished preparation in {out_dir}: {size / 1e6:,.1f} MB of text are done, and read '
              f'again to see that they are still the same', file=sys.stderr)
        counts, read = {}, 0
        for _, counts in stream:
            bar.update(sum(counts['bytes'].values()) - read)
            read = sum(counts['bytes'].values())
            if read >= size:
                break
        if counts != {key: done[key] for key in ('pieces', 'bytes', 'sha256')}:
            print('note: they are not the same; starting anew', file=sys.stderr)
            stream, done = from_start(), None
            bar.reset()
    if done is None:
        remove_unfinished(out_dir)
        done = {'pieces': {'train': 0, 'val': 0}, 'bytes': {'train': 0, 'val': 0},
                'sha256': hashlib.sha256().hexdigest(), 'files': {'train': [['train.bin', 0]], 'val': [['val.bin', 0]]}}

    writers = {split: SplitWriter(out_dir, split, done['files'][split], dtype, settings['shard_tokens'], eot)
               for split in ('train', 'val')}
    saved_at, unsaved = time.monotonic(), 0  # seconds, bytes of text
    try:
        with ThreadPoolExecutor(1) as reader:  # one batch ahead
            coming = reader.submit(next, stream, None)
            while (read := coming.result()) is not None:
                coming = reader.submit(next, stream, None)
                batch, counts = read
                arrays = tokenizer.encode_batch([text for _, text in batch], workers)
                for split, writer in writers.items():
                    writer.write([ids for (side, _), ids in zip(batch, arrays, strict=True) if side == split])
                size = sum(counts['bytes'].values()) - sum(done['bytes'].values())
                done = {**counts, 'files': {split: [list(file) for file in writer.files]
                                            for split, writer in writers.items()}}
                bar.update(size)
                unsaved += size
                if unsaved >= JOURNAL_BYTES or time.monotonic() - saved_at >= JOURNAL_SECONDS:
                    for writer in writers.values():
                        writer.sync()
                    save_journal(out_dir, settings, done)
                    saved_at, unsaved = time.monotonic(), 0
        for writer in writers.values():
            writer.sync()
            writer.close()
        return done
    except BaseException:
        for writer in writers.values():
            writer.close()
        try:
            if any(done['pieces'].values()) and cut_files(out_dir, done['files'], dtype.itemsize):
                save_journal(out_dir, settings, done)
        except OSError:  # a full disk takes no more; the journal before, if there is one, still holds
            pass
        raise
    finally:
        bar.close()


def cut_anew(pieces, tokenizer):
    """Yield the same text as pieces of (split, text), of which adjoining ones of a split are one text, cut where that
    leaves the ids as they are: Tokenizer.cut_safely()."""
    for split, group in itertools.groupby(pieces, key=itemgetter(0)):
        for text in tokenizer.cut_safely(text for _, text in group):
            yield split, text


def read_batches(pieces, separator):
    """Yield (batch, counts): a list of (split, text + separator), and the counts of all text up to its end."""
    digest = hashlib.sha256()
    n_pieces, n_bytes = {'train': 0, 'val': 0}, {'train': 0, 'val': 0}
    with_separators = ((split, text + separator) for split, text in pieces)
    for batch in batches(with_separators, BATCH_CHARS, length=lambda piece: len(piece[1])):
        for split, text in batch:
            utf8 = to_utf8(text)
            digest.update(utf8)
            n_pieces[split] += 1
            n_bytes[split] += len(utf8)
        yield batch, {'pieces': dict(n_pieces), 'bytes': dict(n_bytes), 'sha256': digest.hexdigest()}


class SplitWriter:
    """The token files of one split while they are written, under their temporary names.

    files: [[name, tokens], ...] where writing goes on; the last one is open. eot: what ends a document, an array.
    """

    def __init__(self, out_dir, split, files, dtype, shard_tokens, eot):
        self.out_dir, self.split, self.dtype, self.shard_tokens, self.eot = out_dir, split, dtype, shard_tokens, eot
        self.files = [list(file) for file in files]
        self.open()

    def open(self):
        self.file = open(temporary(self.out_dir, self.files[-1][0]), 'ab')

    def write(self, arrays):
        """Append the ids of pieces, and a new file before each piece that would make the last one too large."""
        chunk = []
        for ids in arrays:
            tokens = len(ids) + len(self.eot)
            if 0 < self.files[-1][1] and self.files[-1][1] + tokens > self.shard_tokens:
                self.append(chunk)
                chunk = []
                self.sync()
                self.file.close()
                self.files.append([f'{self.split}-{len(self.files):05d}.bin', 0])
                self.open()
            chunk += [ids, self.eot]
            self.files[-1][1] += tokens
        self.append(chunk)

    def append(self, chunk):
        if chunk:
            self.file.write(np.concatenate(chunk, dtype=self.dtype).data)
            self.file.flush()

    def sync(self):
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self):
        try:
            self.file.close()
        except OSError:  # what a full disk did not take; the cause is already on its way up
            pass


# What an unfinished preparation leaves. The journal says {'settings', 'done', 'publishing'}: of which preparation, what
# it has done, and whether it was complete and its files were being renamed.
JOURNAL = '.journal.json'
TOKEN_FILE = re.compile(r'(train|val)(-\d{5})?\.bin')


def temporary(out_dir, name) -> str:
    """Path of a file of a dataset while the dataset is not complete."""
    return os.path.join(out_dir, f'.{name}.tmp')


def save_journal(out_dir, settings, done, publishing=False):
    journal = {'settings': settings, 'done': done, 'publishing': publishing}
    replace_file(os.path.join(out_dir, JOURNAL), json.dumps(journal).encode())


def load_journal(out_dir, settings, itemsize) -> dict | None:
    """What an unfinished preparation with the same settings has done, its files cut to that; None where there is none.

    A journal that cannot be used is named on stderr.
    """
    try:
        with open(os.path.join(out_dir, JOURNAL), encoding='utf-8') as file:
            journal = json.load(file)
        done = journal['done']
        differing = [key for key in settings if journal['settings'].get(key) != settings[key]]
        if not differing and journal['publishing']:
            if not os.path.exists(temporary(out_dir, 'train.bin')):
                return None  # it was complete
            for name, _ in [*done['files']['train'], *done['files']['val']]:
                if not os.path.exists(temporary(out_dir, name)):
                    os.replace(os.path.join(out_dir, name), temporary(out_dir, name))
        if not differing and not cut_files(out_dir, done['files'], itemsize):
            differing = ['size than its journal says']
    except FileNotFoundError:
        return None
    except (AttributeError, KeyError, TypeError, ValueError):
        differing = ['layout of its journal']
    if differing:
        print(f'note: the unfinished preparation in {out_dir} is of another {", ".join(differing)}; starting anew',
              file=sys.stderr)
        return None
    return done


def cut_files(out_dir, files, itemsize) -> bool:
    """Cut the unfinished token files to files, {split: [[name, tokens], ...]}; False where there is less than that."""
    sizes = {name: tokens * itemsize for name, tokens in [*files['train'], *files['val']]}
    for name, size in sizes.items():
        path = temporary(out_dir, name)
        if not os.path.exists(path) or os.path.getsize(path) < size:
            return False
    for name, size in sizes.items():
        with open(temporary(out_dir, name), 'r+b') as file:
            file.truncate(size)
            os.fsync(file.fileno())
    remove(temporary(out_dir, name) for name in unfinished(out_dir) if TOKEN_FILE.fullmatch(name) and name not in sizes)
    return True


def unfinished(out_dir) -> list[str]:
    """Names of the files of a dataset that are here under their temporary names."""
    names = [name[1:-4] for name in os.listdir(out_dir) if name.startswith('.') and name.endswith('.tmp')]
    return [name for name in names if TOKEN_FILE.fullmatch(name) or name in ('meta.json', 'meta.pkl')]


def remove_unfinished(out_dir):
    """Remove an unfinished preparation, its journal first, lest that speak of files that are gone."""
    remove([os.path.join(out_dir, JOURNAL), os.path.join(out_dir, f'{JOURNAL}.tmp')])
    remove(temporary(out_dir, name) for name in unfinished(out_dir))


def publish(out_dir, meta, meta_pkl, settings, done):
    """Give the files of a complete preparation their names, and remove those of the one before that it doesn't have."""
    save_journal(out_dir, settings, done, publishing=True)  # first, so that nothing is lost when the disk is full here
    contents = {'meta.json': (json.dumps(meta, indent=1, ensure_ascii=True) + '\n').encode()}
    if meta_pkl is not None:
        contents['meta.pkl'] = meta_pkl
    for name, content in contents.items():
        write_synced(temporary(out_dir, name), content)
    names = {name for files in done['files'].values() for name, _ in files} | set(contents)
    remove([os.path.join(out_dir, 'train.bin')])
    for name in sorted(names - {'train.bin'}):
        os.replace(temporary(out_dir, name), os.path.join(out_dir, name))
    # meta.pkl: that of an older dataset with another tokenizer must not survive
    remove(os.path.join(out_dir, name) for name in os.listdir(out_dir)
           if (TOKEN_FILE.fullmatch(name) or name == 'meta.pkl') and name not in names)
    sync_folder(out_dir)
    os.replace(temporary(out_dir, 'train.bin'), os.path.join(out_dir, 'train.bin'))
    sync_folder(out_dir)
    remove([os.path.join(out_dir, JOURNAL)])


# ----------------------------------------------------------------------------------------------------------------------
# what the prepare.py scripts share

def positive(text) -> int:
    """An option's value as a whole number of 1 or more, which may be written 1e9."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if number < 1 or not number.is_integer():
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of 1 or more, such as 1000 or 1e9')
    return int(number)


def add_options(parser, tokenizer: str, val_fraction: float | None = None, out_dir: str | None = None):
    """The options of preparing a dataset: --tokenizer, --vocab_size, --shard_tokens and --num_proc, and with their
    defaults given --val_fraction and --out_dir too."""
    parser.add_argument('--tokenizer', default=tokenizer,
                        help=f'byte, char, word, bpe, gpt2, cl100k_base, o200k_base or the path of a tokenizer file '
                             f'({tokenizer})')
    parser.add_argument('--vocab_size', type=positive,
                        help=f'ids of bpe ({VOCAB_SIZES["bpe"]:,}) and word ({VOCAB_SIZES["word"]:,}), which are '
                             f'trained on the training split')
    parser.add_argument('--shard_tokens', type=positive, default=SHARD_TOKENS,
                        help='tokens of a file, beyond which train-00001.bin, ... follow; documents, and 60,000 '
                             'characters or more of a single text, stay whole (1e9)')
    parser.add_argument('--num_proc', type=positive, help='threads or processes of encoding (one per core)')
    if val_fraction is not None:
        parser.add_argument('--val_fraction', type=float, default=val_fraction,
                            help=f'share of the text or its documents that becomes val.bin ({val_fraction})')
    if out_dir is not None:
        parser.add_argument('--out_dir', default=out_dir, help="folder to write to (this script's own)")


def report(out_dir, meta: dict, started: float, next_command: str):
    """Print what was written, how long it took since time.time() was `started`, and the command that comes next."""
    for split in ('train', 'val'):
        files = meta['files'][split]
        size = sum(os.path.getsize(os.path.join(out_dir, name)) for name, _ in files)
        more = f' and {len(files) - 1} more' if len(files) > 1 else ''
        print(f'{split:5}  {meta["tokens"][split]:>13,} tokens  {meta["bytes"][split]:>14,} bytes of text  '
              f'{split}.bin{more} {size / 1e6:,.1f} MB')
    print(f'vocab  {meta["vocab_size"]:>13,} ids ({meta["dtype"]}), tokenizer '
          f'{meta["tokenizer"].get("name", meta["tokenizer"]["kind"])}')
    print(f'wrote  {os.path.relpath(out_dir)} in {time.time() - started:.1f} s')
    print(f'next:  {next_command}')


def output_folder(name, path, out_dir=None):
    """
    -> (what train.py calls the dataset, a name for runs on it, its folder): data/<name> (name: by default from the
    input's), or out_dir. ValueError when it is not ours to write to.
    """
    if name is not None and out_dir:
        raise UserError(f'--name={name} and --out_dir={out_dir} both say where to write; give one of them')
    if name is None:
        stem = os.path.basename(os.path.abspath(out_dir or path))
        stem = stem if out_dir else os.path.splitext(stem)[0]
        name = re.sub(r'[^\w.-]+', '_', stem).strip('._') or 'mytext'
    if out_dir:
        dataset, another = os.path.relpath(out_dir), 'folder: --out_dir=FOLDER'
        if os.path.basename(dataset) == dataset:  # a separator is what train.py tells a path by
            dataset = os.path.join('.', dataset)
    else:
        if not re.fullmatch(r'[\w-][\w.-]*', name):
            raise UserError(f'--name={name} is not a plain name; expected letters, digits, "_", "-" and ".", like '
                             f'--name=mytext (the folder becomes data/mytext)')
        out_dir = os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
        dataset, another = name, f'name: --name=my_{name}'
    shown = os.path.relpath(out_dir)
    if os.path.exists(os.path.join(out_dir, 'prepare.py')):
        raise UserError(f'{shown} is a dataset with its own prepare.py; choose another {another}')
    if os.path.exists(os.path.join(out_dir, 'train.bin')) and not os.path.exists(os.path.join(out_dir, 'meta.json')):
        raise UserError(f'{shown} has a train.bin that this script did not make (there is no meta.json beside it); '
                         f'choose another {another}')
    return dataset, name, out_dir


def run(main):
    """Run a script's main(); anything a person can put right ends it with one line instead of a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print('\ninterrupted', file=sys.stderr)
        sys.exit(130)
    except Busy as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL if hasattr(os, 'EX_TEMPFAIL') else 1)  # train.py waits for the other process then
    except BrokenPipeError:  # whoever reads the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try once more, and complain
        sys.exit(1)
    except (ValueError, OSError) as error:
        sys.exit(f'error: {error}')
