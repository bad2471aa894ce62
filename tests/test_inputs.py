"""flatgpt/inputs.py and the options of prepare scripts: packed files, encodings, pipes, devices.

Run: pytest tests/test_inputs.py
"""

import bz2
import csv
import functools
import gzip
import lzma
import os
import subprocess
import sys
import threading

import pytest
from conftest import ROOT

from configurator import UserError
from data import documents, encode
from flatgpt import files, inputs

TEXT = 'hällo 日本 🙂\r\nzwei\n' * 5
POSIX = pytest.mark.skipif(os.name != 'posix', reason='needs pipes and devices')


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32'])
@pytest.mark.parametrize('pack', [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_content_decides(tmp_path, encoding, pack):
    """A file reads the same, packed or not, in any encoding that it marks, under any name."""
    path = tmp_path / 'name.png'
    path.write_bytes(pack(TEXT.encode(encoding)))
    with inputs.open_utf8(path) as file:
        assert file.read() == TEXT.encode()
    assert files.read_text(path) == TEXT.replace('\r\n', '\n')
    assert list(documents.read_documents(path)) == [TEXT.replace('\r\n', '\n')]


def test_big_and_small_reads_agree(tmp_path):
    lines = b''.join(b'line %d\n' % i for i in range(40_000))
    path = tmp_path / 'a.gz'
    path.write_bytes(gzip.compress(lines[:200_000]) + gzip.compress(lines[200_000:]))  # two members
    with inputs.open_utf8(path) as file:
        assert b''.join(iter(lambda: file.read(777), b'')) == lines
    assert b''.join(inputs.read_lines(path, inputs.open_utf8(path))) == lines


@pytest.mark.parametrize('encoding', ['utf-16-le', 'utf-16-be', 'utf-32-le', 'utf-32-be'])
@pytest.mark.parametrize('text', ['plain words\n' * 9, 'привет мир и другие\n' * 9, TEXT])
def test_utf16_without_a_mark(tmp_path, encoding, text):
    path = tmp_path / 'a.txt'
    path.write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=f'a.txt is not text: .* iconv -f {encoding[:-3]}'
                                         f'{encoding[-2:]} -t utf-8'):
        list(documents.read_documents(path))


@pytest.mark.parametrize('content, said', [
    (b'PK\x03\x04\0\0', 'a ZIP archive: unzip'), (b'PAR1\0\0', 'Parquet'),
    (b'a' * 257 + b'ustar\0\0', 'a tar archive: tar -xf'), (b'a few words \0 and more' * 9, 'tr -d'),
    (b'\x7fELF\x02\0\0\x11\0', 'a binary file')])
def test_binary_files_are_named(tmp_path, content, said):
    path = tmp_path / 'a.gz'
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=f'a.gz is not text: there are NUL bytes.*{said}'):
        inputs.open_utf8(path)


@pytest.mark.parametrize('pack', [gzip.compress, bz2.compress, lzma.compress])
def test_streams_one_after_another(tmp_path, pack):
    """All are read, with the zeros that xz puts between them; what is no stream is no end."""
    texts = [os.urandom(n).hex().encode() for n in (10, 70_000, 3)]
    padding = b'\0' * 4 * (pack is lzma.compress)
    whole = padding.join(map(pack, texts)) + padding
    (tmp_path / 'a').write_bytes(whole)
    with inputs.open_utf8(tmp_path / 'a') as file:
        assert file.read() == b''.join(texts)
    second = pack(texts[1])
    for rest in (b'text', second[:-9], bytes([second[0] ^ 1]) + second[1:]):
        (tmp_path / 'a').write_bytes(pack(texts[0]) + rest)
        with pytest.raises(UserError, match='a cannot be read: '), inputs.open_utf8(tmp_path / 'a') as file:
            file.read()


@pytest.mark.parametrize('pack', [gzip.compress, bz2.compress, lzma.compress])
def test_damage_is_no_end(tmp_path, pack):
    """No prefix of a packed file, and no file with a changed byte, passes for the whole."""
    whole = os.urandom(3000).hex().encode()
    packed = pack(whole)
    for i in range(20, len(packed), 97):
        for content in (packed[:i], packed[:i] + bytes([packed[i] ^ 0x55]) + packed[i + 1:]):
            (tmp_path / 'a').write_bytes(content)
            with pytest.raises(ValueError, match='a cannot be read: '), \
                    inputs.open_utf8(tmp_path / 'a') as file:
                assert file.read() == whole  # a byte that no reader looks at
                raise ValueError('a cannot be read: ')


def test_zstd_needs_a_package(tmp_path, monkeypatch):
    (tmp_path / 'a.zst').write_bytes(b'\x28\xb5\x2f\xfd' + b'x' * 20)
    monkeypatch.setattr(inputs, 'zstd', None)
    with pytest.raises(ValueError, match='packed with zstd.*pip install backports.zstd; or unpack'):
        inputs.open_utf8(tmp_path / 'a.zst')


def test_zstd(tmp_path):
    zstd = inputs.zstd or pytest.importorskip('backports.zstd')
    content = zstd.compress(b'one\n' * 9999) + zstd.compress(b'two\n' * 9999)
    (tmp_path / 'a').write_bytes(content)
    assert inputs.open_utf8(tmp_path / 'a').read() == b'one\n' * 9999 + b'two\n' * 9999
    (tmp_path / 'a').write_bytes(content[:-3])
    with pytest.raises(ValueError, match='a cannot be read'):
        inputs.open_utf8(tmp_path / 'a').read()


@POSIX
def test_a_pipe_is_read_as_often_as_needed(tmp_path):
    path = tmp_path / 'pipe'
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_bytes(gzip.compress(b'{"text": "a b"}\n')))
    writer.start()
    assert [list(documents.read_documents(path)) for _ in range(2)] == [['a b']] * 2
    writer.join()
    assert documents.find_files(path) == ([str(path)], 0)


@POSIX
@pytest.mark.parametrize('path, said', [
    ('/dev/zero', 'it is a device'), ('/dev/null', 'it is a device'), ('.', 'it is a folder'),
    ('nowhere', 'No such file'), ('a\0b', 'null')])
def test_no_file(path, said):
    for read in (inputs.open_utf8, inputs.regular_file, files.read_text):
        with pytest.raises(ValueError, match=f'cannot be read: .*{said}'):
            read(path)


@POSIX
@pytest.mark.skipif(os.name == 'posix' and os.geteuid() == 0, reason='root may read everything')
def test_files_without_permission(tmp_path):
    (tmp_path / 'a' / 'b').mkdir(parents=True)
    (tmp_path / 'a' / 'c.txt').write_text('x')
    (tmp_path / 'a' / 'b').chmod(0)
    with pytest.raises(ValueError, match='b cannot be read: Permission denied'):
        documents.find_files(tmp_path / 'a')


def test_errors_of_the_disk_are_of_the_user(tmp_path, monkeypatch):
    """A file that cannot be opened gives no traceback, whatever its kind."""
    (tmp_path / 'a.txt').write_text('x')

    def fail(path, mode):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(inputs, 'open', fail, raising=False)
    for read in (inputs.open_utf8, documents.kind_of, files.read_text):
        with pytest.raises(UserError, match='a.txt cannot be read: .*Permission denied'):
            read(tmp_path / 'a.txt')


@POSIX
def test_links_to_folders(tmp_path):
    """They are followed, each folder once, also where they lead back."""
    for name, text in (('a/own.txt', 'own'), ('elsewhere/x.txt', 'linked'), ('a/sub/y.txt', 'sub')):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / 'a/link').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'a/sub/again').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'a/sub/back').symlink_to(tmp_path / 'a')
    assert sorted(documents.read_documents(tmp_path / 'a')) == ['linked', 'own', 'sub']
    (tmp_path / 'a/broken.txt').symlink_to('nowhere')
    with pytest.raises(ValueError, match='broken.txt is a broken link'):
        documents.find_files(tmp_path / 'a')
    (tmp_path / 'a/broken.txt').unlink()
    os.mkfifo(tmp_path / 'a/pipe.txt')
    with pytest.raises(ValueError, match='pipe.txt is a broken link, a pipe or a device'):
        documents.find_files(tmp_path / 'a')


def test_a_long_line(tmp_path, monkeypatch, request):
    # reading a CSV file sets the limit of the process
    request.addfinalizer(functools.partial(csv.field_size_limit, csv.field_size_limit()))
    monkeypatch.setattr(inputs, 'LONGEST', 100)
    monkeypatch.setattr(documents, 'LONGEST', 100)
    monkeypatch.setattr(documents, 'PIECE_CHARS', 10)
    for name, content, place in (
            ('a.jsonl', '{"text": "a"}\n{"text": "%s"}', 'line 2'), ('a.csv', 'text\n%s\n', 'line 2'),
            ('b.csv', 'text\n"\n%s\n', 'line 3'), ('a.json', '[{"text": "a"}, {"text": "%s"}]', 'entry 2')):
        (tmp_path / name).write_text(content % ('x' * 400))
        with pytest.raises(ValueError, match=f'{name}, {place}.* longer than 100 characters'):
            list(documents.read_documents(tmp_path / name))
        (tmp_path / name).write_text(content % 'x"' if name == 'b.csv' else content % ('x' * 20))
        assert list(documents.read_documents(tmp_path / name))[-1].strip().strip('x') == ''


# options -----------------------------------------------------------------------------------------


def test_options_are_given_once(capsys):
    parser = encode.make_parser('')
    parser.add_argument('--input')
    parser.add_argument('--n', type=int, default=3)
    parser.add_argument('--flag', action='store_true')
    assert parser.parse_args(['--input=a', '--flag', '--flag']).n == 3
    for option, values, said in (('--input', 'ab', 'For several files: a folder'), ('--n', '12', '')):
        parser = encode.make_parser('')
        parser.add_argument(option)
        with pytest.raises(SystemExit):
            parser.parse_args([f'{option}={value}' for value in values])
        error = capsys.readouterr().err
        assert f'{option} is given twice, as {values[0]} and as {values[1]}' in error and said in error


def test_home_in_paths(monkeypatch):
    monkeypatch.setenv('HOME', '/home/someone')
    monkeypatch.setenv('USERPROFILE', '/home/someone')
    parser = encode.make_parser('')
    for option in ('--input', '--out_dir', '--text_key'):
        parser.add_argument(option)
    args = parser.parse_args(['--input=~/a.txt', '--out_dir', '~/out', '--text_key=~/x'])
    assert (args.input, args.out_dir, args.text_key) == (
        '/home/someone/a.txt', '/home/someone/out', '~/x')


def test_names_with_spaces():
    assert encode.names_of('<a>, <b> ,,c ') == ('<a>', '<b>', 'c')


@pytest.mark.parametrize('name, out_dir, expected', [
    ('book.txt.gz', None, 'book'), ('book.v2.jsonl.xz', None, 'book.v2'), ('book.tar.', None, 'book.tar')])
def test_name_of_a_packed_file(tmp_path, name, out_dir, expected):
    (tmp_path / name).write_text('x')
    assert encode.output_folder(None, tmp_path / name, out_dir)[1] == expected


@POSIX
def test_a_pipe_needs_a_name(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / 'data/text/prepare.py'), '--input=/dev/stdin'],
                          input='some text', cwd=tmp_path, capture_output=True, text=True)
    assert 'gives the dataset no name; name it: --name=mytext' in done.stderr
