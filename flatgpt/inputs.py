"""Open the files that a user names: unpacked, as UTF-8, a pipe as a file.

    with open_utf8('talks.jsonl.gz') as file: ...   # bytes, without a byte order mark
    path = regular_file('/dev/fd/63')               # a copy of a pipe, for readers that need a path

The content decides, not the suffix. gzip, bzip2, xz and zstd are unpacked; UTF-16 and UTF-32 with a
byte order mark become UTF-8. Everything streams.
"""

import atexit
import bz2
import codecs
import functools
import gzip
import io
import itertools
import lzma
import os
import re
import shutil
import stat
import tempfile
import zlib

from configurator import UserError

try:
    from compression import zstd  # Python 3.14
except ImportError:
    try:
        from backports import zstd
    except ImportError:
        zstd = None

LONGEST = 1 << 27  # characters or bytes of a row, which memory holds whole
BLOCK = 1 << 16    # bytes that are read at once; the first ones decide the encoding
MARKS = {codecs.BOM_UTF8: 'utf-8', codecs.BOM_UTF32_LE: 'utf-32', codecs.BOM_UTF32_BE: 'utf-32',
         codecs.BOM_UTF16_LE: 'utf-16', codecs.BOM_UTF16_BE: 'utf-16'}  # FF FE 00 00 is UTF-32
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, *([zstd.ZstdError] if zstd else []))


# Files ------------------------------------------------------------------------------------------

def regular_file(path):
    """Return the path of a regular file: `path`, or a copy of what a pipe holds.

    Raises UserError for a folder, a device, a terminal, and where there is nothing.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise UserError(f'{path} cannot be read: {getattr(error, "strerror", error)}') from error
    if stat.S_ISREG(mode):
        return path
    if stat.S_ISFIFO(mode):
        return copy_pipe(os.fspath(path))
    kind = 'folder' if stat.S_ISDIR(mode) else 'socket' if stat.S_ISSOCK(mode) else 'device'
    raise UserError(f'{path} cannot be read: it is a {kind}; expected a file or a pipe')


@functools.cache
def copy_pipe(path):
    """Copy a pipe, which can be read only once, to a temporary file; -> its path."""
    copy = tempfile.NamedTemporaryFile(prefix='flatgpt-', delete=False)
    atexit.register(os.remove, copy.name)
    with copy, open(path, 'rb') as pipe:
        shutil.copyfileobj(pipe, copy, BLOCK)
    return copy.name


# Packed files -----------------------------------------------------------------------------------

def open_zstd(path, mode):
    """Open a zstd file. Raises UserError without a package that unpacks it."""
    if zstd is None:
        raise UserError(f'{path} is packed with zstd, which needs a package: pip install '
                        f'backports.zstd; or unpack it: zstd -d "{path}"')
    return zstd.open(path, mode)


def unpacked(path, make):
    """Yield the blocks of a file of packed streams, each read by make().

    bz2.open and lzma.open take a damaged second stream for the end of the file.
    """
    with open(path, 'rb') as file:
        packed = file.read(BLOCK)
        while packed:
            stream = make()
            while not stream.eof:
                if stream.needs_input and not (packed := packed or file.read(BLOCK)):
                    raise EOFError('it ends within a packed stream')
                yield stream.decompress(packed, BLOCK)
                packed = b''
            packed = stream.unused_data or file.read(BLOCK)
            while packed and not (packed := packed.lstrip(b'\0')):  # xz pads with zeros
                packed = file.read(BLOCK)


def opener_of(make):
    """Return a function like open() for files of packed streams."""
    return lambda path, mode: io.BufferedReader(Blocks(unpacked(path, make)))


PACKED = {rb'\x1f\x8b\x08': gzip.open, rb'BZh[1-9]1AY&SY': opener_of(bz2.BZ2Decompressor),
          rb'\xfd7zXZ\0': opener_of(lzma.LZMADecompressor), rb'\x28\xb5\x2f\xfd': open_zstd}


def read_blocks(path, source, opener):
    """Yield the bytes of a file. Raises UserError, also for a damaged archive."""
    try:
        with opener(source, 'rb') as file:
            while block := file.read(BLOCK):
                yield block
    except DAMAGE as error:
        raise UserError(f'{path} cannot be read: {error}; if it is damaged, get it again') from None


def start_of(path) -> bytes:
    """Return the first bytes of a file, as they are. Raises UserError."""
    return next(read_blocks(path, regular_file(path), open), b'')


# Encodings --------------------------------------------------------------------------------------

def recode(path, blocks, encoding):
    """Yield blocks of UTF-8 for blocks of another encoding. Raises UserError."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for block in blocks:
            yield decoder.decode(block).encode()
        decoder.decode(b'', final=True)
    except UnicodeDecodeError as error:
        raise UserError(f'{path} begins as {encoding.upper()} and is not: {error.reason}; write it '
                        f'again as UTF-8') from None


def no_text(path, start) -> UserError:
    """Return the error for a file with a NUL near its start: its kind, and a remedy."""
    at = [start[i::4].count(0) / len(start) for i in range(4)]  # shares of NULs by place
    encoding = ('utf-32le' if at[2] + at[3] > 0.4 else 'utf-32be' if at[0] + at[1] > 0.4 else
                'utf-16le' if at[1] + at[3] > 0.05 + 8 * (at[0] + at[2]) else
                'utf-16be' if at[0] + at[2] > 0.05 + 8 * (at[1] + at[3]) else None)
    kind = ('Parquet: name it .parquet' if start.startswith(b'PAR1') else
            'a ZIP archive: unzip' if start.startswith(b'PK') else
            'a tar archive: tar -xf' if start[257:262] == b'ustar' else
            "a binary file; if it is text, remove them: tr -d '\\000'" if encoding is None else
            f'{encoding.upper()} without a byte order mark: iconv -f {encoding} -t utf-8')
    return UserError(f'{path} is not text: there are NUL bytes in it. It looks like {kind}; '
                     f'expected text, .jsonl, .csv, .tsv or .parquet')


class Blocks(io.RawIOBase):
    """Read an iterator of bytes as a file."""

    def __init__(self, blocks):
        self.blocks, self.rest = blocks, memoryview(b'')

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.rest:
            if (block := next(self.blocks, None)) is None:
                return 0
            self.rest = memoryview(block)
        n = min(len(buffer), len(self.rest))
        buffer[:n], self.rest = self.rest[:n], self.rest[n:]
        return n


def open_utf8(path):
    """Open a text file; -> binary file of UTF-8, unpacked, without a byte order mark.

    Raises UserError for what regular_file() refuses, and for a NUL near the start, which binary
    files and UTF-16 without a mark have. Bytes that are not UTF-8 pass: readers find their place.
    """
    start = start_of(path)
    opener = next((opener for magic, opener in PACKED.items() if re.match(magic, start)), open)
    blocks = read_blocks(path, regular_file(path), opener)
    start = next(blocks, b'')
    mark = next((mark for mark in MARKS if start.startswith(mark)), b'')
    if not mark and b'\0' in start:
        raise no_text(path, start)
    blocks = itertools.chain([start], blocks)
    if mark == codecs.BOM_UTF8:
        blocks = itertools.chain([next(blocks)[len(mark):]], blocks)
    elif mark:
        blocks = recode(path, blocks, MARKS[mark])
    return io.BufferedReader(Blocks(blocks), BLOCK)


def open_text(path):
    """Open a text file; -> file of text with "\\n" at line ends. Raises as open_utf8()."""
    return io.TextIOWrapper(open_utf8(path), encoding='utf-8')


def read_lines(path, file):
    """Yield the lines of an open file. Raises UserError for one longer than LONGEST."""
    with file:
        for number in itertools.count(1):
            line = file.readline(LONGEST + 1)
            if len(line) > LONGEST:
                raise UserError(f'{path}, line {number} is longer than {LONGEST:,} characters, the '
                                f'most that a row may have; cut its text into several rows')
            if not line:
                return
            yield line
