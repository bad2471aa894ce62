"""Read texts and tables from files, and split them into train and val.

    for text in read_documents('notes/'): ...         # files of a folder, rows of tables
    for where, row in read_records('a.csv'): ...      # rows of one table, as dicts
    for split, text in split_documents(texts, 0.1): ...

Everything streams: memory holds a piece of a text, or a few hundred rows of a table.
"""

import csv
import hashlib
import itertools
import os

from configurator import UserError, nearest
from flatgpt import jsonl
from tokenizer.patterns import to_utf8

TEXT_SUFFIXES = set("""
    .txt .text .md .markdown .rst .org .tex .log .htm .html .xml .yaml .yml .toml .ini .cfg .srt
    .css .sql .py .pyi .pyx .js .jsx .ts .tsx .java .kt .scala .c .h .cc .cpp .cxx .hpp .cu .cuh
    .cs .m .swift .go .rs .zig .rb .pl .php .lua .r .jl .hs .ml .clj .ex .exs .erl .lisp .el .f90
    .f .sh .bash .bat .ps1
""".split())
ROW_SUFFIXES = {'.jsonl', '.ndjson', '.csv', '.tsv', '.parquet'}
PIECE_CHARS = 1 << 18     # a piece of running text: small enough to share out between the cores
DOCUMENT_CHARS = 1 << 22  # a longer text file becomes several documents


# Files ------------------------------------------------------------------------------------------

def suffix_of(path) -> str:
    return os.path.splitext(path)[1].lower()


def is_rows(path) -> bool:
    """Return whether a file is a table, with a document per row."""
    return suffix_of(path) in ROW_SUFFIXES


def find_files(path) -> tuple[list[str], int]:
    """List the texts and tables below a folder; -> (paths, number of other files).

    Hidden files and folders are skipped. A path of a file is taken whatever its suffix. Raises
    UserError when there is nothing to read.
    """
    path = os.fspath(path)
    if os.path.isfile(path):
        if os.path.getsize(path) == 0:
            raise UserError(f'{path} is empty; expected a file with text')
        return [path], 0
    if not os.path.isdir(path):
        folder, name = os.path.split(path)
        names = os.listdir(folder or '.') if os.path.isdir(folder or '.') else []
        raise UserError(f'{path} does not exist{nearest(name, names)}')
    known, files, n_others = TEXT_SUFFIXES | ROW_SUFFIXES, [], 0
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith('.'))
        names = sorted(name for name in names if not name.startswith('.'))
        chosen = [os.path.join(folder, name) for name in names if suffix_of(name) in known]
        files += chosen
        n_others += len(names) - len(chosen)
    if not files:
        raise UserError(f'{path} has no text files, but {n_others} files with other suffixes. '
                        f'Known suffixes: {" ".join(sorted(known))}. Give any other text file by '
                        f'its name: --input=FILE')
    return files, n_others


def text_size(files) -> int | None:
    """Return the bytes of text in files, None when some are tables."""
    return None if any(map(is_rows, files)) else sum(map(os.path.getsize, files))


# Texts ------------------------------------------------------------------------------------------

def read_text(path, size: int = PIECE_CHARS):
    """Yield the text of one UTF-8 file in pieces of about `size` characters.

    Line ends become "\\n" and a byte order mark is dropped. A piece ends at a line end, unless
    the line is longer than half a piece. Raises UserError at bytes that are not UTF-8.
    """
    rest = ''
    try:
        with open(path, encoding='utf-8-sig') as file:
            while len(new := file.read(size)) == size:
                text = rest + new
                end = text.rfind('\n', len(text) // 2) + 1 or len(text)
                rest = text[end:]
                yield text[:end]
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    if rest + new:
        yield rest + new


def not_utf8(path) -> UserError:
    """Return the error for a file that is not UTF-8: the place, and a remedy."""
    offset, bad = 0, ''
    with open(path, 'rb') as file:
        start = file.read(4096)
        file.seek(0)
        for line in file:  # b'\n' is never part of another character
            try:
                line.decode()
                offset += len(line)
            except UnicodeDecodeError as error:
                bad = line[error.start:error.start + 4].hex(' ')
                offset += error.start
                break
    where = f'{path} is not UTF-8: at byte {offset:,} there is {bad}.'
    is_utf16 = start[:2] in (b'\xff\xfe', b'\xfe\xff')
    if b'\0' in start and not is_utf16:
        return UserError(f'{where} It looks like a binary file; expected text, .jsonl, .csv, .tsv '
                         f'or .parquet')
    return UserError(f'{where} Convert it, for example: iconv -f '
                     f'{"utf-16" if is_utf16 else "latin1"} -t utf-8 "{path}" > utf8.txt')


def read_documents(path, text_key: str = 'text', min_score: float | None = None):
    """Yield the documents, not blank, of a file, a folder, or a list of such.

    A text file is one document; more than DOCUMENT_CHARS characters come in several. A table has
    a document per row, in the field `text_key`. min_score: only rows of Parquet files whose
    'score' is at least this. Raises UserError for input without text, not UTF-8, or damaged.
    """
    paths = [path] if isinstance(path, (str, os.PathLike)) else path
    files, is_blank = [name for path in paths for name in find_files(path)[0]], True
    for name in files:
        if min_score is not None and suffix_of(name) != '.parquet':
            raise UserError(f'{name} is not Parquet, which --min_score={min_score} needs')
        for text in (read_column(name, text_key, min_score) if is_rows(name)
                     else read_text(name, DOCUMENT_CHARS)):
            if text and not text.isspace():
                is_blank = False
                yield text
    if is_blank:
        scored = '' if min_score is None else f' with a score of at least {min_score}'
        raise UserError(f'{", ".join(map(str, paths[:3]))} has no text{scored}: all documents in '
                        f'{len(files)} file(s) are blank')


# Tables -----------------------------------------------------------------------------------------

def read_column(path, text_key, min_score=None):
    """Yield the text in a field of each row of a table; rows without one are skipped."""
    names = [text_key] if min_score is None else [text_key, 'score']
    records = read_parquet(path, names) if suffix_of(path) == '.parquet' else read_records(path)
    for where, record in records:
        if text_key not in record:
            raise no_field(where, text_key, record)
        text = record[text_key]
        if text is None or min_score is not None and not (record['score'] or 0) >= min_score:
            continue
        if not isinstance(text, str):
            raise UserError(f'{where} has {str(text)[:40]!r} as {text_key!r}; expected a string')
        # JSON can hold "\ud83d" alone, which is no character
        yield text if text.isascii() else to_utf8(text).decode()


def no_field(where, key, names) -> UserError:
    """Return the error for a row or a file without a field."""
    remedy = ('leave out --min_score, which needs it' if key == 'score' else 'name the field that '
              f'holds the text: --text_key={next(filter(None, names), "NAME")}')
    return UserError(f'{where} has no field {key!r}; it has: {", ".join(names) or "none"}; '
                     f'{remedy}')


def read_records(path, columns: list[str] | None = None):
    """Yield (where, dict) for each row of a .jsonl, .csv, .tsv or .parquet file.

    where: file and line, or row, for error messages. columns: the header of a .csv or .tsv whose
    first line does not name columns[0]. Raises UserError with file and line.
    """
    kind = suffix_of(path)
    if kind in ('.jsonl', '.ndjson'):
        for number, record in jsonl.iter_objects(path):
            yield f'{path}, line {number}', record
    elif kind in ('.csv', '.tsv'):
        yield from read_csv(path, columns)
    elif kind == '.parquet':
        yield from read_parquet(path)
    else:
        raise UserError(f'{path}: expected a {", ".join(sorted(ROW_SUFFIXES))} file')


def read_csv(path, columns=None):
    """Yield (where, dict) for each row of a .csv or .tsv file; see read_records()."""
    csv.field_size_limit(2**31 - 1)  # the default is less than a long document
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:
            reader = csv.reader(file, delimiter='\t' if suffix_of(path) == '.tsv' else ',')
            rows = filter(None, reader)  # without blank lines
            first = [next(rows, [])]
            if columns is None or columns[0] in first[0]:
                columns = first.pop()
            for row in itertools.chain(first, rows):
                where = f'{path}, line {reader.line_num}'
                if len(row) != len(columns):
                    raise UserError(f'{where}: {len(row)} fields; expected {len(columns)}: '
                                    f'{", ".join(columns)}')
                yield where, dict(zip(columns, row, strict=True))
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    except (OSError, csv.Error) as error:
        raise UserError(f'{path} cannot be read as CSV: {error}') from None


def read_parquet(path, names: list[str] | None = None):
    """Yield (where, dict) for each row of a .parquet file, of all or some columns."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{path} is Parquet, which needs the package pyarrow: "
                        f"pip install -e '.[data]'") from None
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for name in names or ():
                if name not in file.schema_arrow.names:
                    raise no_field(path, name, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=256, columns=names):
                for record in batch.to_pylist():
                    number += 1
                    yield f'{path}, row {number}', record
    except UnicodeDecodeError as error:
        bad = error.object[error.start:error.start + 4].hex(' ')
        raise UserError(f'{path} has a text after row {number} that is not UTF-8 ({error.reason}: '
                        f'{bad}); write the file again from text that is') from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f'{path} cannot be read as Parquet: {error}') from None


# Splitting: each function yields (split, text), with split 'train' or 'val' ---------------------

def check_fraction(val_fraction: float):
    """Raise UserError unless both splits can get some of the text."""
    if not 0 < val_fraction < 1:
        raise UserError(f'val_fraction is {val_fraction}; expected a number between 0 and 1, '
                        f'such as 0.1')


def split_text(path, val_fraction: float = 0.1):
    """Split one text file: its last `val_fraction` of characters is val."""
    check_fraction(val_fraction)
    left = int(sum(map(len, read_text(path))) * (1 - val_fraction))
    for text in read_text(path):
        if text[:left]:
            yield 'train', text[:left]
        if text[left:]:
            yield 'val', text[left:]
        left = max(0, left - len(text))


def text_hash(text: str) -> float:
    """Hash a text to a number in [0, 1), of 48 bits, so that it is exact as a float."""
    return int.from_bytes(hashlib.blake2b(to_utf8(text), digest_size=6).digest(), 'big') / 2**48


def split_documents(documents, val_fraction: float, longest: int | None = None):
    """Split by whole documents: `val_fraction` is val, by a hash of the text.

    So a document stays in its split whatever the others are, and so do its copies. longest: a
    document with more characters is train, so that it cannot be half of a small val split.
    """
    check_fraction(val_fraction)
    for text in documents:
        is_val = (longest is None or len(text) <= longest) and text_hash(text) < val_fraction
        yield ('val' if is_val else 'train'), text


def fraction_for(documents, val_bytes: int, longest: int) -> float:
    """Return the smallest val_fraction with val_bytes in split_documents()'s val.

    This suits a few thousand documents of very different sizes: a plain fraction of their number
    would give a val split of any size.
    """
    total = 0
    for number, size in sorted((text_hash(text), len(to_utf8(text))) for text in documents
                               if len(text) <= longest):
        total += size
        if total >= val_bytes:
            return number + 2**-48
    raise UserError(f'val_bytes is {val_bytes:,}; expected at most {total:,}, the bytes of all '
                    f'documents of up to {longest:,} characters')


def split_each(documents, val_fraction: float):
    """Split each document: its last `val_fraction` is val. For few documents."""
    check_fraction(val_fraction)
    for text in documents:
        end = int(len(text) * (1 - val_fraction))
        if text[:end]:
            yield 'train', text[:end]
        yield 'val', text[end:]
