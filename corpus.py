"""Text in, token files out: what every data/<name>/prepare.py is made of.

    read_text(path)                   one text file, in pieces
    read_documents(path)              documents of a folder, .txt, .jsonl, .csv or .parquet
    split_text, split_documents, ...  which of it is training text, which validation text
    write_dataset(out_dir, ...)       train.bin, val.bin and meta.json, all of them or none
    download(url, path, sha256, ...)  resumable and checked

All of it streams: memory stays below a few hundred MB however large the input is.

A .bin file is nothing but token ids, little-endian uint16 (uint32 when the vocabulary has more than 65,536 ids), so
`np.memmap(path, dtype='<u2')` reads it. meta.json says the rest: dtype, vocabulary size, counts, and the tokenizer.
"""

import csv
import errno
import hashlib
import http.client
import itertools
import json
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

import tokenizer as tokenizers

TEXT_SUFFIXES = set("""
    .txt .text .md .markdown .rst .org .tex .log .htm .html .xml .yaml .yml .toml .ini .cfg .srt .css .sql
    .py .pyi .pyx .js .jsx .ts .tsx .java .kt .scala .c .h .cc .cpp .cxx .hpp .cu .cuh .cs .m .swift .go .rs .zig
    .rb .pl .php .lua .r .jl .hs .ml .clj .ex .exs .erl .lisp .el .f90 .f .sh .bash .bat .ps1
""".split())
ROW_SUFFIXES = {'.jsonl', '.ndjson', '.csv', '.tsv', '.parquet'}  # many documents in one file

PIECE_CHARS = 1 << 18      # of a text that is one stream: small enough to share out between the cores
DOCUMENT_CHARS = 1 << 22   # a longer text file becomes several documents
BATCH_CHARS = 1 << 22      # in memory at a time: encoded, then written
GROUP_CHARS = 1 << 16      # encoded by one thread in one go
SEPARATOR = '\n\n'         # ends a document where the tokenizer has no <|endoftext|>


# ----------------------------------------------------------------------------------------------------------------------
# reading

def find_files(path) -> tuple[list[str], int]:
    """The text files of a folder (recursively, sorted, nothing hidden) and how many others were left out.

    A path that is a file is taken whatever its suffix. ValueError when there is nothing to read.
    """
    path = os.fspath(path)
    if os.path.isfile(path):
        if os.path.getsize(path) == 0:
            raise ValueError(f'{path} is empty; expected a file with text')
        return [path], 0
    if not os.path.isdir(path):
        folder = os.path.dirname(path) or '.'
        names = os.listdir(folder) if os.path.isdir(folder) else []
        raise ValueError(f'{path} does not exist' + tokenizers.nearest(os.path.basename(path), names))
    files, skipped = [], 0
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith('.'))
        for name in sorted(names):
            if name.startswith('.'):
                continue
            if os.path.splitext(name)[1].lower() in TEXT_SUFFIXES | ROW_SUFFIXES:
                files.append(os.path.join(folder, name))
            else:
                skipped += 1
    if not files:
        raise ValueError(f'{path} holds no text files ({skipped} files with other suffixes). Known suffixes: '
                         f'{" ".join(sorted(TEXT_SUFFIXES | ROW_SUFFIXES))}. Any other single text file can be given '
                         f'by name: --input=FILE')
    return files, skipped


def text_size(files) -> int | None:
    """Bytes of text in files, for the progress bar; None when they are rows, whose text is shorter than the file."""
    if any(is_rows(path) for path in files):
        return None
    return sum(os.path.getsize(path) for path in files)


def is_rows(path) -> bool:
    """True for a file that holds many documents (.jsonl, .csv, .parquet), False for one that is a text itself."""
    return os.path.splitext(path)[1].lower() in ROW_SUFFIXES


def read_text(path, size: int = PIECE_CHARS):
    """Yield the text of one UTF-8 file in pieces of about `size` characters, which joined are the whole text.

    Line ends become "\\n" and a byte order mark is dropped. Pieces end at line ends (inside a line only when the line
    is longer than a piece). ValueError at bytes that are not UTF-8.
    """
    rest = ''
    try:
        with open(path, encoding='utf-8-sig') as file:
            while len(new := file.read(size)) == size:
                text = rest + new
                end = piece_end(text)
                rest = text[end:]
                yield text[:end]
    except UnicodeDecodeError:
        raise ValueError(not_utf8(path)) from None
    if rest + new:
        yield rest + new


def piece_end(text: str) -> int:
    """Where to cut a text so that its two parts, encoded one by one, give the ids of the whole.

    BPE joins bytes only within the words that a pattern finds. After a line end that follows ink and precedes a letter
    or digit, every pattern of tiktoken starts a new word. Without such a place: the last line end, or else the end.
    """
    i = text.rfind('\n', 0, len(text) - 1)
    last = i
    while i > len(text) // 2:
        if text[i + 1].isalnum() and not text[i - 1].isspace():
            return i + 1
        i = text.rfind('\n', 0, i)
    return last + 1 if last > len(text) // 2 else len(text)


def not_utf8(path) -> str:
    """The message for a file with bytes that are not UTF-8: which bytes, where, and how to convert the file."""
    with open(path, 'rb') as file:
        start = file.read(4096)
        file.seek(0)
        offset, rest = 0, b''  # of the bytes before `rest`; rest: the beginning of a character cut by the block's end
        while True:
            block = file.read(1 << 20)
            data = rest + block
            try:
                data.decode('utf-8')
                rest, offset = b'', offset + len(data)
            except UnicodeDecodeError as error:
                if block and error.reason == 'unexpected end of data' and error.start > len(data) - 4:
                    rest, offset = data[error.start:], offset + error.start
                    continue
                bad = data[error.start:error.start + 4].hex(' ')
                offset += error.start
                break
            if not block:
                return f'{path} is being changed while it is read; try again'
    where = f'{path} is not UTF-8: at byte {offset:,} there is {bad}.'
    if start[:2] in (b'\xff\xfe', b'\xfe\xff'):
        return f'{where} It looks like UTF-16; convert it: iconv -f utf-16 -t utf-8 "{path}" > utf8.txt'
    if b'\0' in start:
        return f'{where} It looks like a binary file; expected text (or .jsonl, .csv, .parquet).'
    return f'{where} Convert it, for example: iconv -f latin1 -t utf-8 "{path}" > utf8.txt'


def read_documents(path, text_key: str = 'text'):
    """Yield the documents below path, a folder or a file, as strings; documents without any ink are left out.

    A text file is one document (one of more than DOCUMENT_CHARS characters is handed out in several). .jsonl, .csv,
    .tsv and .parquet have a document per row, in the field `text_key`. ValueError for input that is empty, not UTF-8,
    broken or without the field.
    """
    files, _ = find_files(path)
    found = False
    for name in files:
        for text in read_rows(name, text_key) if is_rows(name) else read_text(name, DOCUMENT_CHARS):
            if text and not text.isspace():
                found = True
                yield text
    if not found:
        raise ValueError(f'{path} holds no text: nothing but empty or blank documents in {len(files)} file(s)')


def read_rows(path, text_key):
    """Yield the field `text_key` of every row of a .jsonl, .ndjson, .csv, .tsv or .parquet file."""
    suffix = os.path.splitext(path)[1].lower()
    try:
        if suffix in ('.jsonl', '.ndjson'):
            yield from read_jsonl(path, text_key)
        elif suffix == '.parquet':
            yield from read_parquet(path, text_key)
        else:
            yield from read_csv(path, text_key, '\t' if suffix == '.tsv' else ',')
    except UnicodeDecodeError:
        raise ValueError(not_utf8(path)) from None


def no_field(where, text_key, names) -> ValueError:
    names = [str(name) for name in names]
    first = next((name for name in names if name), 'NAME')
    return ValueError(f'{where} has no field {text_key!r}; it has: {", ".join(names) or "none"}. Say which one holds '
                      f'the text: --text_key={first}')


def read_jsonl(path, text_key):
    with open(path, encoding='utf-8-sig') as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            where = f'{path}, line {number},'
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f'{where} is not JSON: {error.msg} at character {error.pos + 1}. Expected one object '
                                 f'like {{"{text_key}": "..."}} per line; correct or remove the line') from None
            if not isinstance(row, dict):
                raise ValueError(f'{where} holds {str(row)[:40]!r}; expected an object like {{"{text_key}": "..."}}')
            if text_key not in row:
                raise no_field(where, text_key, row)
            text = row[text_key]
            if text is None:
                continue
            if not isinstance(text, str):
                raise ValueError(f'{where} has {str(text)[:40]!r} as {text_key!r}; expected a string')
            # "\ud83d" alone is valid JSON but no character
            yield text if text.isascii() else tokenizers.to_utf8(text).decode('utf-8')


def read_csv(path, text_key, delimiter):
    csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, is less than a long document
    with open(path, encoding='utf-8-sig', newline='') as file:
        rows = csv.DictReader(file, delimiter=delimiter)
        try:
            if text_key not in (rows.fieldnames or []):
                raise no_field(f'{path} (its first line)', text_key, rows.fieldnames or [])
            for row in rows:
                yield row[text_key] or ''
        except csv.Error as error:
            raise ValueError(f'{path}, line {rows.line_num}, is not CSV: {error}') from None


def read_parquet(path, text_key):
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"{path} is Parquet, which needs the package pyarrow: pip install -e '.[data]'") from None
    try:
        with pq.ParquetFile(path) as file:
            if text_key not in file.schema_arrow.names:
                raise no_field(path, text_key, file.schema_arrow.names)
            kind = file.schema_arrow.field(text_key).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise ValueError(f'{path} has {kind} in the column {text_key!r}; expected strings (--text_key=NAME)')
            for batch in file.iter_batches(batch_size=256, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    yield text or ''
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f'{path} cannot be read as Parquet: {error}') from None


# ----------------------------------------------------------------------------------------------------------------------
# splitting. Each function yields (split, text) with split 'train' or 'val', which is what write_dataset takes.

def check_fraction(val_fraction):
    if not 0 < val_fraction < 1:
        raise ValueError(f'val_fraction is {val_fraction}; expected a number between 0 and 1, such as 0.1')


def split_text(path, val_fraction: float = 0.1):
    """One text file: its first characters train, its last `val_fraction` of characters val. Reads the file twice."""
    check_fraction(val_fraction)
    left = int(sum(len(text) for text in read_text(path)) * (1 - val_fraction))
    for text in read_text(path):
        if text[:left]:
            yield 'train', text[:left]
        if text[left:]:
            yield 'val', text[left:]
        left = max(0, left - len(text))


def text_hash(text: str) -> float:
    """A number in [0, 1) that depends on nothing but the text."""
    # 48 bits, so that it is exact as a float
    return int.from_bytes(hashlib.blake2b(tokenizers.to_utf8(text), digest_size=6).digest(), 'big') / 2**48


def split_documents(documents, val_fraction: float, longest: int | None = None):
    """Whole documents, `val_fraction` of them val, chosen by a hash of their text.

    So the choice does not depend on order or on the other documents, and copies of a document stay on one side.
    longest: documents with more characters than this are train in any case, lest one of them be half of a small val.
    """
    check_fraction(val_fraction)
    for text in documents:
        is_val = text_hash(text) < val_fraction and (longest is None or len(text) <= longest)
        yield ('val' if is_val else 'train'), text


def fraction_for(documents, val_bytes: int, longest: int) -> float:
    """The smallest val_fraction with which split_documents makes a val split of at least val_bytes.

    For collections of a few thousand documents, whose sizes differ so much that a plain fraction of their number says
    little about the size of the split.
    """
    total = 0
    for number, size in sorted((text_hash(text), len(tokenizers.to_utf8(text))) for text in documents
                               if len(text) <= longest):
        total += size
        if total >= val_bytes:
            return number + 2**-48
    raise ValueError(f'val_bytes is {val_bytes:,}; expected at most {total:,}, the bytes of all documents of up to '
                     f'{longest:,} characters')


def split_each(documents, val_fraction: float):
    """The last `val_fraction` of each document is val: for collections too small to set whole documents aside."""
    check_fraction(val_fraction)
    for text in documents:
        end = int(len(text) * (1 - val_fraction))
        if text[:end]:
            yield 'train', text[:end]
        yield 'val', text[end:]


# ----------------------------------------------------------------------------------------------------------------------
# writing

def write_dataset(out_dir, pieces, tokenizer, *, documents: bool, source: str, val_fraction: float,
                  total: int | None = None, threads: int | None = None, more_files: dict | None = None) -> dict:
    """Encode pieces into out_dir: train.bin, val.bin and meta.json, all of them or none. Returns meta.json's content.

    pieces: iterable of (split, text). documents: each piece is a document, and ends with the tokenizer's <|endoftext|>,
    or with a blank line where it has none; otherwise the pieces of a split are one running text. source: what meta.json
    says about the origin. total: bytes of text, for the progress bar. threads: of encoding, default one per core.
    more_files: {name: bytes} to write along.

    train.bin is the sign that a dataset is complete: it goes first and comes last, so whoever looks at the folder,
    after whatever crash, finds a whole dataset or none. ValueError when a split has fewer than 2 tokens, the disk is
    full, or another process is writing here.
    """
    created = not os.path.isdir(out_dir)
    os.makedirs(out_dir, exist_ok=True)
    lock = lock_folder(out_dir)
    more_files = more_files or {}
    # meta.pkl is in the list so that one of an older dataset with another tokenizer does not survive.
    names = ['val.bin', 'meta.json', *sorted({'meta.pkl', *more_files}), 'train.bin']
    temporary = {name: os.path.join(out_dir, f'.{name}.tmp') for name in names}
    try:
        remove(temporary.values())  # of a run that was killed
        meta = write_tokens(temporary, pieces, tokenizer, documents, total, threads)
        meta.update(source=source, val_fraction=val_fraction, tokenizer=tokenizer.to_dict())
        for split in ('train', 'val'):
            if meta['tokens'][split] < 2:
                remedy = ('give more text, or a larger --val_fraction' if split == 'val'
                          else 'give more text, or a smaller --val_fraction')
                raise ValueError(f'the {split} split has {meta["tokens"][split]} token(s) with --val_fraction='
                                 f'{val_fraction}; expected at least 2: {remedy}')
        write_synced(temporary['meta.json'], (json.dumps(meta, indent=1, ensure_ascii=True) + '\n').encode())
        for name, content in more_files.items():
            write_synced(temporary[name], content)

        remove([os.path.join(out_dir, 'train.bin')])
        for name in names[:-1]:
            if os.path.exists(temporary[name]):
                os.replace(temporary[name], os.path.join(out_dir, name))
            else:
                remove([os.path.join(out_dir, name)])
        sync_folder(out_dir)
        os.replace(temporary['train.bin'], os.path.join(out_dir, 'train.bin'))
        sync_folder(out_dir)
        return meta
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(out_dir).free
            raise ValueError(f'{out_dir} has no room for the token files ({error.strerror}; {free / 1e6:,.0f} MB free '
                             f'now). They take 2 bytes per token (4 with more than 65,536 ids), while the old ones, '
                             f'if any, stay. Free some space, or use another disk; nothing was changed.') from None
        raise
    finally:
        remove(temporary.values())
        if created and not os.listdir(out_dir):
            os.rmdir(out_dir)
        if lock is not None:
            os.close(lock)


def write_tokens(temporary, pieces, tokenizer, documents, total, threads):
    """Write the two .bin files under their temporary names; returns their part of meta.json."""
    tokens, sizes, counts = {'train': 0, 'val': 0}, {'train': 0, 'val': 0}, {'train': 0, 'val': 0}
    digest = hashlib.sha256()
    dtype = tokenizers.id_dtype(tokenizer.vocab_size)
    end = SEPARATOR if documents and tokenizer.eot is None else ''
    eot = tokenizer.eot.to_bytes(dtype.itemsize, 'little') if documents and tokenizer.eot is not None else b''
    files = {split: open(temporary[f'{split}.bin'], 'wb') for split in tokens}
    # disable=None: no bar where stderr is not a terminal
    bar = tqdm(desc='encoding', total=total, unit='B', unit_scale=True, disable=None, leave=False, dynamic_ncols=True)
    pool = ThreadPoolExecutor(threads or core_count())

    def encode_group(group):
        return [tokenizer.encode_array(text) for _, text in group]

    try:
        for batch in batches(((split, text + end) for split, text in pieces), BATCH_CHARS):
            # One task per group: a thread's task costs more than a short document. map keeps the order, so the files
            # do not depend on the number of threads.
            groups = list(batches(batch, GROUP_CHARS))
            for group, arrays in zip(groups, pool.map(encode_group, groups), strict=True):
                for (split, text), ids in zip(group, arrays, strict=True):
                    utf8 = tokenizers.to_utf8(text)
                    digest.update(utf8)
                    files[split].write(ids.tobytes() + eot)
                    tokens[split] += len(ids) + bool(eot)
                    sizes[split] += len(utf8)
                    counts[split] += 1
                    bar.update(len(utf8))
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
        for file in files.values():
            try:
                file.close()
            except OSError:  # what a full disk did not take; the cause is already on its way up
                pass
    return {'version': 1, 'dtype': dtype.name, 'vocab_size': tokenizer.vocab_size, 'tokens': tokens, 'bytes': sizes,
            'documents': counts if documents else {'train': 1, 'val': 1}, 'sha256': digest.hexdigest()}


def batches(pieces, chars):
    """Yield lists of pieces, in order, with at least `chars` characters together (the last list may have fewer)."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def write_synced(path, content):
    with open(path, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path):
    """Make renames in a folder survive a power cut. Windows cannot open folders, and does not need it."""
    if os.name == 'posix':
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove(paths):
    for path in paths:
        try:
            os.remove(path)
        except FileNotFoundError:
            pass


class Busy(ValueError):
    """Another process holds the lock of a folder."""


def lock_folder(path, doing='preparing'):
    """
    Keep other processes from writing into this folder for as long as this one lives; returns the descriptor that holds
    the lock. Raises Busy, saying that another process is `doing` the folder, if one is.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise Busy(f'another process is {doing} {path} right now; wait until it has finished') from None
    except OSError:  # some network file systems have no locks
        pass
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# downloading

def download(url: str, path, sha256: str, instead: str):
    """Fetch url to path, continuing a broken download (path.part), and check it.

    instead: the command for a machine without a network. ValueError when offline, cut short, or the checksum differs.
    """
    part = f'{path}.part'
    have = os.path.getsize(part) if os.path.exists(part) else 0
    request = urllib.request.Request(url, headers={'User-Agent': 'flatgpt', 'Range': f'bytes={have}-'})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            # 206 continues where the .part file ends; with 200 the server sends everything from the start
            mode = 'ab' if answer.status == 206 else 'wb'
            have = have if mode == 'ab' else 0
            length = answer.headers.get('Content-Length')
            total = have + int(length) if length else None
            with open(part, mode) as file, tqdm(desc='downloading', total=total, initial=have, unit='B',
                                                unit_scale=True, disable=None, dynamic_ncols=True) as bar:
                while block := answer.read(1 << 16):
                    file.write(block)
                    bar.update(len(block))
                file.flush()
                os.fsync(file.fileno())
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the .part file already holds all bytes; the checksum tells
            raise ValueError(f'cannot download {url}: the server says {error.code} {error.reason}. '
                             f'Get the file elsewhere, and then: {instead}') from None
        total = have
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ValueError(f'no room on the disk for {part}: {error.strerror}') from None
        have = os.path.getsize(part) if os.path.exists(part) else 0
        kept = f' The {have:,} bytes so far are kept; run again to go on.' if have else ''
        raise ValueError(f'cannot download {url} ({getattr(error, "reason", error)}). Is this machine offline? Get the '
                         f'file on another one, and then: {instead}{kept}') from None
    if total is not None and os.path.getsize(part) < total:
        raise ValueError(f'the download of {url} was cut short at {os.path.getsize(part):,} of {total:,} bytes; '
                         f'run again to go on')
    found = file_sha256(part)
    if found != sha256:
        os.remove(part)
        raise ValueError(f'{url} gave a file with SHA-256 {found}, expected {sha256}; it was removed. Run again; if '
                         f'this repeats, the file has changed at its source: get the right one, and then: {instead}')
    os.replace(part, path)


def get_input(given, path, url: str, sha256: str, instead: str):
    """The file to prepare: `given` (--input=FILE) if there is one, else path, downloaded when it is not there yet."""
    if not given and not os.path.exists(path):
        download(url, path, sha256, instead)
    path = given or path
    find_files(path)  # says so when there is no such file, or an empty one
    if os.path.isdir(path):
        raise ValueError(f'{path} is a folder; expected one text file. For a folder of your own: '
                         f'python data/text/prepare.py --input={path}')
    found = file_sha256(path)
    if found != sha256:
        print(f'note: {path} is not the usual text (SHA-256 {found[:12]}..., usually {sha256[:12]}...), '
              f'so the counts will differ', file=sys.stderr)
    return path


def file_sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# what the prepare.py scripts share

def make_tokenizer(name: str, texts, documents: bool):
    """The tokenizer called name ('char', 'byte', 'gpt2', ...) for write_dataset(..., documents=documents).

    texts: iterable of strings, read only for 'char', whose vocabulary is what occurs in them.
    """
    if name != 'char':
        return tokenizers.load(name)
    tokenizer = tokenizers.CharTokenizer.from_text(itertools.chain(texts, [SEPARATOR] if documents else []))
    if tokenizer.vocab_size > 1000:
        print(f'note: this text has {tokenizer.vocab_size:,} different characters, each a token of its own. '
              f'--tokenizer=byte needs 256.', file=sys.stderr)
    return tokenizer


def report(out_dir, meta: dict, started: float, next_command: str):
    """Print what was written, how long it took since time.time() was `started`, and the command that comes next."""
    for split in ('train', 'val'):
        size = os.path.getsize(os.path.join(out_dir, f'{split}.bin'))
        print(f'{split:5}  {meta["tokens"][split]:>13,} tokens  {meta["bytes"][split]:>14,} bytes of text  '
              f'{split}.bin {size / 1e6:,.1f} MB')
    print(f'vocab  {meta["vocab_size"]:>13,} ids ({meta["dtype"]}), tokenizer '
          f'{meta["tokenizer"].get("name", meta["tokenizer"]["kind"])}')
    print(f'wrote  {os.path.relpath(out_dir)} in {time.time() - started:.1f} s')
    print(f'next:  {next_command}')


def run(main):
    """Run a script's main(); anything a person can put right ends it with one line instead of a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print('\ninterrupted; no half-written dataset was left behind', file=sys.stderr)
        sys.exit(130)
    except Busy as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL if hasattr(os, 'EX_TEMPFAIL') else 1)  # train.py waits for the other process then
    except (ValueError, OSError) as error:
        sys.exit(f'error: {error}')
