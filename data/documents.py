"""Read text and tables from files, and split them into training and validation text."""

import csv
import hashlib
import itertools
import json
import os

import tokenizer as tokenizers
from configurator import UserError
from tokenizer.patterns import to_utf8

TEXT_SUFFIXES = set("""
    .txt .text .md .markdown .rst .org .tex .log .htm .html .xml .yaml .yml .toml .ini .cfg .srt .css .sql
    .py .pyi .pyx .js .jsx .ts .tsx .java .kt .scala .c .h .cc .cpp .cxx .hpp .cu .cuh .cs .m .swift .go .rs .zig
    .rb .pl .php .lua .r .jl .hs .ml .clj .ex .exs .erl .lisp .el .f90 .f .sh .bash .bat .ps1
""".split())
ROW_SUFFIXES = {'.jsonl', '.ndjson', '.csv', '.tsv', '.parquet'}  # many documents in one file
PIECE_CHARS = 1 << 18      # of a text that is one stream: small enough to share out between the cores
DOCUMENT_CHARS = 1 << 22   # a longer text file becomes several documents


def find_files(path) -> tuple[list[str], int]:
    """The text files of a folder (recursively, sorted, nothing hidden) and how many others were left out.

    A path that is a file is taken whatever its suffix. ValueError when there is nothing to read.
    """
    path = os.fspath(path)
    if os.path.isfile(path):
        if os.path.getsize(path) == 0:
            raise UserError(f'{path} is empty; expected a file with text')
        return [path], 0
    if not os.path.isdir(path):
        folder = os.path.dirname(path) or '.'
        names = os.listdir(folder) if os.path.isdir(folder) else []
        raise UserError(f'{path} does not exist' + tokenizers.nearest(os.path.basename(path), names))
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
        raise UserError(f'{path} holds no text files ({skipped} files with other suffixes). Known suffixes: '
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

    Line ends become "\\n" and a byte order mark is dropped. Pieces end at line ends (inside a line only when it is
    longer than half a piece). ValueError at bytes that are not UTF-8.
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
        raise UserError(not_utf8(path)) from None
    if rest + new:
        yield rest + new


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


def read_documents(path, text_key: str = 'text', min_score: float | None = None):
    """Yield the documents below path (a folder, a file, or a list of such) as strings; those without ink are left out.

    A text file is one document (one of more than DOCUMENT_CHARS characters is handed out in several). .jsonl, .csv,
    .tsv and .parquet have a document per row, in the field `text_key`. min_score: only rows of Parquet files whose
    column 'score' is at least this. ValueError for input that is empty, not UTF-8, broken or without the field.
    """
    paths = [path] if isinstance(path, (str, os.PathLike)) else path
    files = [name for path in paths for name in find_files(path)[0]]
    found = False
    for name in files:
        if min_score is not None and not name.lower().endswith('.parquet'):
            raise UserError(f'{name} is not Parquet, which --min_score={min_score} needs; leave it out')
        for text in read_rows(name, text_key, min_score) if is_rows(name) else read_text(name, DOCUMENT_CHARS):
            if text and not text.isspace():
                found = True
                yield text
    if not found:
        scored = '' if min_score is None else f' with a score of at least {min_score}'
        raise UserError(f'{", ".join(map(str, paths[:3]))}{", ..." if len(paths) > 3 else ""} holds no text{scored}: '
                         f'nothing but empty or blank documents in {len(files)} file(s)')


def read_rows(path, text_key, min_score=None):
    """Yield the field `text_key` of every row of a .jsonl, .ndjson, .csv, .tsv or .parquet file."""
    suffix = os.path.splitext(path)[1].lower()
    try:
        if suffix == '.parquet':
            try:
                yield from read_parquet(path, text_key, min_score)
            except UnicodeDecodeError as error:
                raise UserError(f'{path} has a text in the column {text_key!r} that is not UTF-8 ({error.reason}: '
                                 f'{error.object[error.start:error.start + 4].hex(" ")}); write the file anew from '
                                 f'text that is') from None
        elif suffix in ('.jsonl', '.ndjson'):
            yield from read_jsonl(path, text_key)
        else:
            yield from read_csv(path, text_key, '\t' if suffix == '.tsv' else ',')
    except UnicodeDecodeError:
        raise UserError(not_utf8(path)) from None


def no_field(where, text_key, names) -> UserError:
    names = [str(name) for name in names]
    first = next((name for name in names if name), 'NAME')
    return UserError(f'{where} has no field {text_key!r}; it has: {", ".join(names) or "none"}. Say which one holds '
                      f'the text: --text_key={first}')


def read_jsonl(path, text_key):
    with open(path, encoding='utf-8-sig') as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            where = f'{path}, line {number},'
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # also a number of 5,000 digits, and lists 1,000 deep
                what = str(error).split(': line 1', 1)[0].split('; use', 1)[0]
                at = f' at character {error.pos + 1}' if isinstance(error, json.JSONDecodeError) else ''
                raise UserError(f'{where} is not JSON: {what}{at}. Expected one object like {{"{text_key}": "..."}} '
                                 f'per line; correct or remove the line') from None
            if not isinstance(row, dict):
                raise UserError(f'{where} holds {str(row)[:40]!r}; expected an object like {{"{text_key}": "..."}}')
            if text_key not in row:
                raise no_field(where, text_key, row)
            text = row[text_key]
            if text is None:
                continue
            if not isinstance(text, str):
                raise UserError(f'{where} has {str(text)[:40]!r} as {text_key!r}; expected a string')
            # "\ud83d" alone is valid JSON but no character
            yield text if text.isascii() else to_utf8(text).decode('utf-8')


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
            raise UserError(f'{path}, line {rows.line_num}, is not CSV: {error}') from None


def read_parquet(path, text_key, min_score=None):
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{path} is Parquet, which needs the package pyarrow: pip install -e '.[data]'") from None
    try:
        with pq.ParquetFile(path) as file:
            if text_key not in file.schema_arrow.names:
                raise no_field(path, text_key, file.schema_arrow.names)
            kind = file.schema_arrow.field(text_key).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise UserError(f'{path} has {kind} in the column {text_key!r}; expected strings (--text_key=NAME)')
            columns = [text_key] if min_score is None else [text_key, 'score']
            if 'score' not in file.schema_arrow.names and min_score is not None:
                raise UserError(f"{path} has no column 'score', which --min_score={min_score} needs; leave it out")
            for batch in file.iter_batches(batch_size=256, columns=columns):
                scores = itertools.repeat(None) if min_score is None else batch.column('score').to_pylist()
                for text, score in zip(batch.column(text_key).to_pylist(), scores, strict=False):
                    if min_score is None or score is not None and score >= min_score:
                        yield text or ''
    except (pa.ArrowException, OSError) as error:
        raise UserError(f'{path} cannot be read as Parquet: {error}') from None


def check_fraction(val_fraction):
    if not 0 < val_fraction < 1:
        raise UserError(f'val_fraction is {val_fraction}; expected a number between 0 and 1, such as 0.1')


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
    return int.from_bytes(hashlib.blake2b(to_utf8(text), digest_size=6).digest(), 'big') / 2**48


def split_documents(documents, val_fraction: float, longest: int | None = None):
    """Whole documents, `val_fraction` of them val, chosen by a hash of their text.

    So the choice does not depend on order or on the other documents, and copies of a document stay on one side.
    longest: documents with more characters than this are train in any case, lest one of them be half of a small val.
    """
    check_fraction(val_fraction)
    for text in documents:
        is_val = (longest is None or len(text) <= longest) and text_hash(text) < val_fraction
        yield ('val' if is_val else 'train'), text


def fraction_for(documents, val_bytes: int, longest: int) -> float:
    """The smallest val_fraction with which split_documents makes a val split of at least val_bytes.

    For collections of a few thousand documents, whose sizes differ so much that a plain fraction of their number says
    little about the size of the split.
    """
    total = 0
    for number, size in sorted((text_hash(text), len(to_utf8(text))) for text in documents
                               if len(text) <= longest):
        total += size
        if total >= val_bytes:
            return number + 2**-48
    raise UserError(f'val_bytes is {val_bytes:,}; expected at most {total:,}, the bytes of all documents of up to '
                     f'{longest:,} characters')


def split_each(documents, val_fraction: float):
    """The last `val_fraction` of each document is val: for collections too small to set whole documents aside."""
    check_fraction(val_fraction)
    for text in documents:
        end = int(len(text) * (1 - val_fraction))
        if text[:end]:
            yield 'train', text[:end]
        yield 'val', text[end:]
