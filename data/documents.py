"""Read texts and tables from files, and split them into train and val.

    for text in read_documents('notes/'): ...         # files of a folder, rows of tables
    for where, row in read_records('a.csv.gz'): ...   # rows of one table, as dicts
    for split, text in split_documents(texts, 0.1): ...

The content of a file decides: gzip, bzip2, xz and zstd are unpacked (flatgpt/inputs.py), and JSON
is recognised under any name. Everything streams: memory holds a piece of a text, or a few rows.
"""

import csv
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import sys

from configurator import UserError, nearest
from data import pages
from flatgpt import jsonl
from flatgpt.inputs import LONGEST, open_text, open_utf8, read_lines, regular_file, start_of
from tokenizer.patterns import to_utf8

TEXT_SUFFIXES = set("""
    .txt .text .md .markdown .rst .org .tex .log .htm .html .xml .yaml .yml .toml .ini .cfg .srt
    .xhtml .css .sql .py .pyi .pyx .js .jsx .ts .tsx .java .kt .scala .c .h .cc .cpp .cxx .hpp .cu
    .cuh .cs .m .swift .go .rs .zig .rb .pl .php .lua .r .jl .hs .ml .clj .ex .exs .erl .lisp .el
    .f90 .f .sh .bash .bat .ps1
""".split())
LINES_SUFFIXES = {'.jsonl', '.ndjson'}
ROW_SUFFIXES = {*LINES_SUFFIXES, '.csv', '.tsv', '.parquet'}
PACKED_SUFFIXES = {'.gz', '.bz2', '.xz', '.zst'}
PIECE_CHARS = 1 << 18     # a piece of running text: small enough to share out between the cores
DOCUMENT_CHARS = 1 << 22  # a longer text file becomes several documents
SPACE = re.compile('[ \t\n\r]*')  # between the values of JSON
BATCH_ROWS = 16           # rows of Parquet in memory, fewer if ...
BATCH_BYTES = 1 << 24     # ... they have more bytes than this together


# Files ------------------------------------------------------------------------------------------

def split_suffix(path) -> tuple[str, str]:
    """Split off the suffix of the content: a.csv.gz -> ('a', '.csv')."""
    stem, suffix = os.path.splitext(path)
    return split_suffix(stem) if suffix.lower() in PACKED_SUFFIXES else (stem, suffix.lower())


def suffix_of(path) -> str:
    return split_suffix(path)[1]


def kind_of(path, text_key: str | None = None) -> str:
    """Return 'text', or 'json', 'csv', 'parquet' with a document per row.

    JSON is .json, .jsonl, .ndjson, and any other file that begins with an object in JSON that has
    a string in the field text_key (None: any object).
    """
    suffix = suffix_of(path)
    if suffix in ('.csv', '.tsv'):
        return 'csv'
    if suffix == '.parquet' or start_of(path).startswith(b'PAR1'):
        return 'parquet'
    if suffix in LINES_SUFFIXES or suffix == '.json':
        return 'json'
    return 'json' if has_objects(path, text_key) else 'text'


def has_objects(path, text_key: str | None = None) -> bool:
    """Return whether a file begins with an object in JSON, with a string in text_key."""
    try:
        _, record = next(read_json(path), (None, {}))
    except UserError:
        return False
    return bool(record) if text_key is None else isinstance(record.get(text_key), str)


def begins_like_json(path) -> bool:
    """Return whether a file begins like JSON, an object or a list of objects."""
    with open_utf8(path) as file:
        return re.match(rb'\s*(\[\s*)?\{\s*"', file.read(200)) is not None


def find_files(path, text_key: str = 'text') -> tuple[list[str], int]:
    """List the texts and tables below a folder; -> (paths, number of other files).

    Hidden files and folders are skipped. Links to folders are followed, each folder once. A .json
    file counts if its objects have the field text_key. A path of a file is taken whatever its
    suffix. Raises UserError when there is nothing to read, or a folder cannot be read.
    """
    path = os.fspath(path)
    if os.path.exists(path) and not os.path.isdir(path):
        if os.path.getsize(regular_file(path)) == 0:
            raise UserError(f'{path} is empty; expected a file with text')
        return [path], 0
    if not os.path.isdir(path):
        folder, name = os.path.split(path)
        names = os.listdir(folder or '.') if os.path.isdir(folder or '.') else []
        raise UserError(f'{path} does not exist{nearest(name, names)}')
    known, files, n_others, seen = TEXT_SUFFIXES | ROW_SUFFIXES, [], 0, set()
    for folder, subfolders, names in os.walk(path, onerror=refuse, followlinks=True):
        if os.path.realpath(folder) in seen:  # a link leads to it
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith('.'))
        paths = [os.path.join(folder, name) for name in sorted(names) if not name.startswith('.')]
        chosen = [name for name in paths if suffix_of(name) in known
                  or suffix_of(name) == '.json' and has_objects(name, text_key)]
        if strange := [name for name in chosen if not os.path.isfile(name)]:
            raise UserError(f'{strange[0]} is a broken link, a pipe or a device; expected files '
                            f'below {path}: remove it')
        files += chosen
        n_others += len(paths) - len(chosen)
    if not files:
        raise UserError(f'{path} has no text files, but {n_others} files with other suffixes. '
                        f'Known suffixes: {" ".join(sorted(known))}, packed or not. Give any other '
                        f'text file by its name: --input=FILE')
    return files, n_others


def refuse(error: OSError):
    raise UserError(f'{error.filename} cannot be read: {error.strerror}') from error


def list_files(path, text_key: str = 'text') -> list[str]:
    """Return the paths of find_files(); print how many files of a folder are left out."""
    files, n_others = find_files(path, text_key)
    if n_others:
        print(f'{len(files):,} files; {n_others:,} more are left out: their suffix is not that of '
              f'a text, or they are .json without texts', file=sys.stderr)
    return files


def text_size(files) -> int | None:
    """Return the bytes of text in files, None when some are tables or packed."""
    others = {*ROW_SUFFIXES, *PACKED_SUFFIXES, '.json'}
    is_text = not any(os.path.splitext(name)[1].lower() in others for name in files)
    return sum(map(os.path.getsize, files)) if is_text else None


# Texts ------------------------------------------------------------------------------------------

def read_text(path, size: int = PIECE_CHARS):
    """Yield the text of one file in pieces of about `size` characters.

    Line ends become "\\n" and a byte order mark is dropped. A piece ends at a line end, unless
    the line is longer than half a piece. Raises UserError at bytes that are not UTF-8.
    """
    rest = ''
    try:
        with open_text(path) as file:
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
    with open_utf8(path) as file:
        for line in file:  # b'\n' is never part of another character
            try:
                line.decode()
                offset += len(line)
            except UnicodeDecodeError as error:
                bad = line[error.start:error.start + 4].hex(' ')
                offset += error.start
                break
    return UserError(f'{path} is not UTF-8: at byte {offset:,} there is {bad}. If it is text, '
                     f'convert it, for example: iconv -f latin1 -t utf-8 "{path}" > utf8.txt')


def read_parts(path, separator: str):
    """Yield the texts between separators, without line ends around them.

    Raises UserError for a text longer than LONGEST characters.
    """
    parts = ['']
    for piece in read_text(path, DOCUMENT_CHARS):
        parts = (parts[0] + piece).split(separator)
        yield from (part.strip('\n') for part in parts[:-1])
        parts = parts[-1:]
        if len(parts[0]) > LONGEST:
            raise UserError(f'{path} has more than {LONGEST:,} characters without a '
                            f'{separator!r}; expected it between documents: --separator=TEXT')
    yield parts[0].strip('\n')


def read_documents(path, text_key: str = 'text', min_score: float | None = None,
                   separator: str | None = None, html: bool = False):
    """Yield the documents, not blank, of a file, a folder, or a list of such.

    A text file is one document; more than DOCUMENT_CHARS characters come in several. A separator
    cuts it into documents. A table has a document per row, in the field `text_key`. min_score:
    only rows of Parquet files whose 'score' is at least this. html: .html files come whole, in the
    encoding that they declare. Raises UserError for input without text, not UTF-8, or damaged.
    """
    paths = [path] if isinstance(path, (str, os.PathLike)) else path
    files = [name for path in paths for name in find_files(path, text_key)[0]]
    is_blank = True
    for name in files:
        kind = kind_of(name, text_key)
        if min_score is not None and kind != 'parquet':
            raise UserError(f'{name} is not Parquet, which --min_score={min_score} needs')
        if separator and kind != 'text':
            raise UserError(f'{name} is a table with a document per row; --separator={separator} '
                            f'is for texts: leave it out')
        for text in (read_column(name, kind, text_key, min_score) if kind != 'text' else
                     read_parts(name, separator) if separator else
                     [pages.read_page(name)] if html and pages.FILE_NAME.search(name) else
                     read_text(name, DOCUMENT_CHARS)):
            if text and not text.isspace():
                is_blank = False
                yield text
    if is_blank:
        scored = '' if min_score is None else f' with a score of at least {min_score}'
        raise UserError(f'{", ".join(map(str, paths[:3]))} has no text{scored}: all documents in '
                        f'{len(files)} file(s) are blank')


# Tables -----------------------------------------------------------------------------------------

def read_column(path, kind, text_key, min_score=None):
    """Yield the text in a field of each row of a table; rows without one are skipped.

    kind: kind_of(path, text_key).
    """
    names = [text_key] if min_score is None else [text_key, 'score']
    for where, record in (read_parquet(path, names) if kind == 'parquet' else
                          read_csv(path) if kind == 'csv' else read_json(path)):
        if text_key not in record:
            raise no_field(where, text_key, record)
        text = record[text_key]
        if text is None or min_score is not None and not score_of(where, record) >= min_score:
            continue
        if not isinstance(text, str):
            raise UserError(f'{where} has {str(text)[:40]!r} as {text_key!r}; expected a string')
        # JSON can hold "\ud83d" alone, which is no character
        yield text if text.isascii() else to_utf8(text).decode()


def score_of(where, record) -> float:
    """Return a row's score, 0 without one. Raises UserError for another value."""
    if not isinstance(record['score'], int | float | None):
        raise UserError(f'{where} has {str(record["score"])[:40]!r} as score; expected a number')
    return record['score'] or 0


def no_field(where, key, record) -> UserError:
    """Return the error for a row without a field. It advises a field that holds text."""
    texts = [name for name, value in record.items() if isinstance(value, str)
             and any(map(str.isalpha, value))
             and not re.search('(^|id|ur[li]|hash|sha[0-9]*|md5|date|time|path|file)$', name, re.I)]
    best = max(texts, default=None,
               key=lambda name: (len(record[name].split()) > 1, len(record[name])))
    if key == 'score':
        remedy = 'leave out --min_score, which needs it'
    elif not {'messages', 'conversations'}.isdisjoint(record):
        remedy = 'for conversations: python data/chat/prepare.py --input=FILE'
    elif best is None:
        remedy = 'none of them holds a text; expected a field that does: --text_key=NAME'
    else:
        remedy = f'name the field that holds the text: {shlex.quote(f"--text_key={best}")}'
    return UserError(f'{where} has no field {key!r}; it has: {", ".join(record) or "none"}; '
                     f'{remedy}')


def read_records(path, columns: list[str] | None = None, bad: list[str] | None = None):
    """Yield (where, dict) for each row of a table: JSON, CSV, TSV or Parquet.

    where: file and line, or row, for error messages. columns: the header of a .csv or .tsv whose
    first line does not name columns[0]. bad: see jsonl.iter_objects(). Raises UserError with file
    and line.
    """
    kind = kind_of(path)
    if kind == 'text':
        raise UserError(f'{path} is no table; expected JSON lines, an array of objects in JSON, '
                        f'.csv, .tsv or .parquet')
    yield from (read_csv(path, columns) if kind == 'csv' else
                read_parquet(path) if kind == 'parquet' else read_json(path, bad))


# JSON -------------------------------------------------------------------------------------------

def read_json(path, bad: list[str] | None = None):
    """Yield (where, object) for JSON lines, an array of objects, or single objects.

    bad: see jsonl.iter_objects(); it is for lines. Raises UserError where the file begins with
    neither { nor [.
    """
    with open_utf8(path) as file:
        first = next(filter(bytes.strip, iter(lambda: file.readline(1 << 16), b'')), b'').lstrip()
        is_lines = suffix_of(path) in LINES_SUFFIXES and not first.startswith(b'[')
        if first.startswith(b'{') and not is_lines:
            first += file.readline(LONGEST) * (not first.endswith(b'\n'))
            is_lines = is_object(first)
    if is_lines:
        for number, record in jsonl.iter_objects(path, bad):
            yield f'{path}, line {number}', record
    elif first.startswith((b'{', b'[')):
        yield from read_values(path)
    elif first:
        raise UserError(f'{path} is not JSON: it begins with '
                        f'{first[:20].decode(errors="replace")!r}; expected {{ or [')


def is_object(line: bytes) -> bool:
    try:
        jsonl.read_object(line)
    except UserError:
        return False
    return True


class Window:
    """Hold the part of a text file that is being parsed, from `place` on."""

    def __init__(self, path, file):
        self.path, self.file, self.text, self.place, self.line = path, file, '', 0, 1

    def grow(self, size) -> bool:
        """Drop the text before the place, read `size` more; -> whether there is any."""
        try:
            new = self.file.read(size)
        except UnicodeDecodeError:
            raise not_utf8(self.path) from None
        self.line += self.text.count('\n', 0, self.place)
        self.text, self.place = self.text[self.place:] + new, 0
        return bool(new)

    def skip(self, char: str = '') -> bool:
        """Skip white space, and then a character; -> whether that was there."""
        self.place = SPACE.match(self.text, self.place).end()
        while self.is_read() and self.grow(PIECE_CHARS):
            self.place = SPACE.match(self.text).end()
        is_there = self.text.startswith(char, self.place)
        self.place += len(char) * is_there
        return is_there

    def is_read(self) -> bool:
        return self.place == len(self.text)

    def decode(self):
        """Parse the JSON object at the place. Raises UserError."""
        while True:
            try:
                value, self.place = jsonl.DECODER.raw_decode(self.text, self.place)
                break
            except json.JSONDecodeError as error:
                n_chars = len(self.text) - self.place
                if n_chars > LONGEST:
                    raise UserError(f'it is longer than {LONGEST:,} characters, the most that a '
                                    f'row may have; cut its text into several rows') from None
                # near the end of the text, more of the file may complete the value
                is_cut = error.pos > len(self.text) - 16 or error.msg.startswith('Unterminated')
                if not is_cut or not self.grow(n_chars + PIECE_CHARS):
                    line = self.line + self.text.count('\n', 0, error.pos)
                    raise UserError(f'not JSON: {error.msg}, line {line}') from None
            except (ValueError, RecursionError) as error:  # a key twice, a huge number
                raise UserError(str(error).partition('; use')[0]) from None
        if not isinstance(value, dict):
            raise UserError(f'{json.dumps(value)[:40]} is not an object; expected {{"key": value}}')
        return value


def read_values(path):
    """Yield (where, object) for a JSON array, or objects one after another.

    Memory holds one object, of at most LONGEST characters, and twice as much while it is parsed.
    """
    with open_text(path) as file:
        window = Window(path, file)
        is_array = window.skip('[')
        for number in itertools.count(1):
            where = f'{path}, entry {number}'
            if window.skip(']' if is_array else '') and (is_array or window.is_read()):
                break
            if is_array and number > 1 and not window.skip(','):
                raise UserError(f'{where}: expected "," before it, or "]" at the end of the array; '
                                f'is the file cut off?')
            window.skip()
            try:
                value = window.decode()
            except UserError as error:
                raise UserError(f'{where}: {error}') from None
            yield where, value
        window.skip()
        if not window.is_read():
            raise UserError(f'{path} has text after its array; expected only the array')


# CSV and Parquet --------------------------------------------------------------------------------

def read_csv(path, columns=None):
    """Yield (where, dict) for each row of a .csv or .tsv file; see read_records().

    The delimiter is the one of comma, semicolon, tab and bar that cuts the first line into the
    most fields. Raises UserError for a row with fields too few or too many, and for a quote that
    is not closed.
    """
    csv.field_size_limit(LONGEST)  # the default is less than a long document

    def lines():
        return read_lines(path, io.TextIOWrapper(open_utf8(path), 'utf-8', newline=''))

    try:
        first = next((line for line in lines() if line.strip()), '')
        own = '\t' if suffix_of(path) == '.tsv' else ','
        delimiter = max([own, *',;\t|'],
                        key=lambda char: len(next(csv.reader([first], delimiter=char), [])))
        quoting = (csv.QUOTE_NONE if delimiter == '\t' and has_plain_quotes(lines(), first) else
                   csv.QUOTE_MINIMAL)
        reader = csv.reader(lines(), delimiter=delimiter, quoting=quoting, strict=True)
        rows = read_rows(path, reader)
        before = [next(rows, [])]
        if columns is None or columns[0] in before[0]:
            columns = before.pop()
            check_columns(path, columns)
        for row in itertools.chain(before, rows):
            where = f'{path}, line {reader.line_num}'
            if len(row) != len(columns):
                raise UserError(f'{where}: {len(row)} fields; expected {len(columns)}: '
                                f'{", ".join(columns)}. A field with a {delimiter!r} in it has '
                                f'quotes around it')
            yield where, dict(zip(columns, row, strict=True))
    except UnicodeDecodeError:
        raise not_utf8(path) from None


def check_columns(path, columns):
    """Raise UserError for two columns of one name, of which a dict would drop one."""
    if len(set(columns)) < len(columns):
        raise UserError(f'{path} has two columns of one name: {", ".join(columns)}; rename one')


def has_plain_quotes(lines, header) -> bool:
    """Return whether the quotes of a file with tabs are letters.

    They are where not every line can be parsed with them, and each line has all fields: then no
    field has line ends and needs quotes. A tab that begins a line after an open quote is taken for
    the indentation of a quoted text.
    """
    n_tabs, is_plain = header.count('\t'), False
    for line in lines:
        if line.strip('\r\n') and line.count('\t') != n_tabs or is_plain and line[0] == '\t':
            return False
        try:
            is_plain = is_plain or not any(csv.reader([line], delimiter='\t', strict=True))
        except csv.Error:
            is_plain = True
    return is_plain and n_tabs > 0


def read_rows(path, reader):
    """Yield the rows that are not blank.

    Raises UserError with the line where a bad one begins.
    """
    while True:
        start = reader.line_num + 1
        try:
            if row := next(reader):
                yield row
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f'{path}, line {start}: the row that begins here cannot be read '
                            f'({error}). Is a quote not closed? A field with quotes in it is '
                            f'written "a ""b"" c"') from None


def read_parquet(path, names: list[str] | None = None):
    """Yield (where, dict) for each row of a .parquet file, of all or some columns.

    Memory holds BATCH_ROWS rows, or fewer of about BATCH_BYTES.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{path} is Parquet, which needs the package pyarrow: "
                        f"pip install -e '.[data]'") from None
    number = 0
    try:
        # a page of a column at a time; by default Arrow reads whole groups of rows ahead
        with pq.ParquetFile(regular_file(path), buffer_size=1 << 20, pre_buffer=False) as file:
            columns = file.schema_arrow.names
            check_columns(path, columns)
            for name in names or ():
                if name not in columns:
                    batch = next(file.iter_batches(1), pa.record_batch({}))
                    raise no_field(path, name, *batch.to_pylist() or [dict.fromkeys(columns)])
            for group in range(file.num_row_groups):
                sizes = file.metadata.row_group(group)
                row_bytes = sizes.total_byte_size // max(1, sizes.num_rows) + 1
                n_rows = max(1, min(BATCH_ROWS, BATCH_BYTES // row_bytes))
                for batch in file.iter_batches(n_rows, row_groups=[group], columns=names):
                    for record in batch.to_pylist():
                        number += 1
                        yield f'{path}, row {number}', record
    except UserError:  # a ValueError too
        raise
    except UnicodeDecodeError as error:
        bad = error.object[error.start:error.start + 4].hex(' ')
        raise UserError(f'{path} has a text after row {number} that is not UTF-8 ({error.reason}: '
                        f'{bad}); write the file again from text that is') from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f'{path} cannot be read as Parquet: {error}') from None
    except (ArithmeticError, LookupError, ValueError) as error:  # dates and time zones
        raise UserError(f'{path} has a value after row {number} that Python lacks '
                        f'({type(error).__name__}: {error}); write the file again without that '
                        f'column') from None


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
