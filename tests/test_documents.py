"""data/documents.py: reading texts and tables, and splitting them. Run: pytest
tests/test_documents.py"""

import hashlib
import json
import os
import random
import sys

import pytest
from corpora import words, write
from hypothesis import given, settings
from hypothesis import strategies as st

from data import documents

# reading -----------------------------------------------------------------------------------------

@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet='ab \n\té日', max_size=80), size=st.integers(1, 20))
def test_pieces_join_to_the_text(tmp_path_factory, text, size):
    path = tmp_path_factory.getbasetemp() / 'pieces.txt'
    path.write_bytes(text.encode())
    pieces = list(documents.read_text(path, size))
    assert ''.join(pieces) == text
    assert all(pieces) and all(len(piece) <= 2 * size for piece in pieces)


def test_pieces_end_at_line_ends(tmp_path):
    lines = [f'line {i} {"x" * (i % 37)}\n' for i in range(300)]
    (tmp_path / 'lines.txt').write_text(''.join(lines))
    pieces = list(documents.read_text(tmp_path / 'lines.txt', 100))
    assert len(pieces) > 50 and [line for piece in pieces
                                 for line in piece.splitlines(True)] == lines


def test_line_ends_and_byte_order_mark(tmp_path):
    path = tmp_path / 'windows.txt'
    path.write_bytes('\ufeffeins\r\nzwei\rdrei\n'.encode())
    assert ''.join(documents.read_text(path)) == 'eins\nzwei\ndrei\n'


@pytest.mark.parametrize('before', [0, 5, (1 << 20) - 1, (1 << 20) + 3, 3 << 20])
@pytest.mark.parametrize('after', [b'', b'abc'])
def test_invalid_utf8_says_where(tmp_path, before, after):
    path = tmp_path / 'latin.txt'
    path.write_bytes(('é' * (before // 2) + 'x' * (before % 2)).encode() + b'\xe4' + after)
    with pytest.raises(ValueError,
                       match=f'is not UTF-8: at byte {before:,} there is e4.*iconv -f latin1'):
        list(documents.read_documents(path))


def test_utf16_and_binary_files_are_recognised(tmp_path):
    (tmp_path / 'a.txt').write_bytes('hällo'.encode('utf-16'))
    assert list(documents.read_documents(tmp_path / 'a.txt')) == ['hällo']
    (tmp_path / 'b.bin').write_bytes(b'\x7fELF\x02\x00\x00\x11\x00')
    with pytest.raises(ValueError, match='binary'):
        list(documents.read_documents(tmp_path / 'b.bin'))


def test_folder(tmp_path):
    for name in ('b.txt', 'a/z.md', 'a/.hidden.txt', '.git/x.txt', 'image.png', 'a/empty.py',
                 'a/rows.jsonl'):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('' if 'empty' in name else name)
    (tmp_path / 'a/rows.jsonl').write_text('{"text": "one"}\n\n{"text": "two"}\n'
                                           '{"text": null}\n{"text": " "}\n')
    files, skipped = documents.find_files(tmp_path)
    assert [os.path.relpath(path, tmp_path) for path in files] == [
        'b.txt', *(os.path.join('a', name) for name in ('empty.py', 'rows.jsonl', 'z.md'))]
    assert skipped == 1
    assert list(documents.read_documents(tmp_path)) == ['b.txt', 'one', 'two', 'a/z.md']


def test_long_file_is_several_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, 'DOCUMENT_CHARS', 1000)
    path = tmp_path / 'long.txt'
    path.write_text(words(2000), encoding='utf-8')
    texts = list(documents.read_documents(path))
    assert len(texts) > 5 and ''.join(texts) == words(2000)
    assert all(document.endswith('\n') for document in texts[:-1])


def test_rows(tmp_path):
    texts = ['plain', 'two\nlines, "quoted"', 'ünï 日本 🙂', 'x' * 200_000]
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'body': text}) + '\n' for text in texts))
    import csv
    for suffix, delimiter in (('csv', ','), ('tsv', '\t')):
        with open(tmp_path / f'a.{suffix}', 'w', newline='', encoding='utf-8') as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([['id', 'body']] + [[i, text] for i, text in enumerate(texts)])
    suffixes = ['jsonl', 'csv', 'tsv']
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
        pq.write_table(pa.table({'id': range(4), 'body': texts}), tmp_path / 'a.parquet')
        suffixes.append('parquet')
    except ImportError:
        pass
    for suffix in suffixes:
        assert list(documents.read_documents(tmp_path / f'a.{suffix}', 'body')) == texts
        with pytest.raises(ValueError, match="no field 'text'.*body.*--text_key="):
            list(documents.read_documents(tmp_path / f'a.{suffix}'))


def test_records(tmp_path):
    """The same dicts from every kind of table, each with the place of its row."""
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq
    rows = [{'question': 'a, b', 'answer': 'é'}, {'question': 'c\nd', 'answer': 'question'}]
    (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps(row) for row in rows))
    (tmp_path / 'a.csv').write_text('\nquestion,answer\n"a, b",é\n\n"c\nd",question\n')
    (tmp_path / 'b.csv').write_text('"a, b",é\n\n"c\nd",question\n')
    (tmp_path / 'a.tsv').write_text('question\tanswer\na, b\té\n"c\nd"\tquestion\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / 'a.parquet')
    for name, columns, places in (('a.jsonl', None, ['line 1', 'line 2']),
                                  ('a.csv', None, ['line 3', 'line 6']),
                                  ('a.csv', ['question', 'answer'], ['line 3', 'line 6']),
                                  ('b.csv', ['question', 'answer'], ['line 1', 'line 4']),
                                  ('a.tsv', None, ['line 2', 'line 4']),
                                  ('a.parquet', None, ['row 1', 'row 2'])):
        records = list(documents.read_records(tmp_path / name, columns))
        assert records == [(f'{tmp_path / name}, {place}', row)
                           for place, row in zip(places, rows, strict=True)]


@pytest.mark.parametrize('name, content, message', [
    ('a.csv', b'a,b\n1,2\n1,2,3\n', 'a.csv, line 3: 3 fields; expected 2: a, b'),
    ('a.csv', b'a,b\n1,\xff\n', 'a.csv is not UTF-8: at byte 6 there is ff'),
    ('a.jsonl', b'{}\n[1]\n', 'a.jsonl, line 2: '),
    ('a.txt', b'a', 'a.txt is no table; expected JSON lines'),
])
def test_broken_records(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(documents.read_records(tmp_path / name))
    with pytest.raises(ValueError, match='none.csv cannot be read: No such file'):
        list(documents.read_records(tmp_path / 'none.csv'))


def test_lone_surrogate_in_json(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": "a\\ud83d b"}\n')
    assert list(documents.read_documents(tmp_path / 'a.jsonl')) == ['a\ufffd b']


@pytest.mark.parametrize('content, message', [
    ('{"text": "a"}\n{"text": \n', 'a.jsonl, line 2: not JSON.*'),
    ('["a"]\n', 'entry 1: "a" is not an object'),
    ('{"text": 5}\n', "line 1 has '5'.*expected a string"),
    ('{"body": "a"}\n', 'line 1 has no field.*--text_key=body'),
    ('{"text": ""}\n', 'has no text'),
    ('', 'is empty'),
])
def test_broken_rows(tmp_path, content, message):
    (tmp_path / 'a.jsonl').write_text(content)
    with pytest.raises(ValueError, match=message):
        list(documents.read_documents(tmp_path / 'a.jsonl'))


def test_broken_parquet_and_wrong_type(tmp_path):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq
    (tmp_path / 'a.parquet').write_bytes(b'PAR1 no, it is not')
    with pytest.raises(ValueError, match='a.parquet cannot be read as Parquet'):
        list(documents.read_documents(tmp_path / 'a.parquet'))
    pq.write_table(pa.table({'text': [1, 2]}), tmp_path / 'b.parquet')
    with pytest.raises(ValueError, match="row 1 has '1' as 'text'; expected a string"):
        list(documents.read_documents(tmp_path / 'b.parquet'))


def test_parquet_scores(tmp_path):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq
    table = {'text': ['a', 'b', 'c', 'd'], 'score': [2.6, 3.5, None, 3.4999]}
    pq.write_table(pa.table(table), tmp_path / 'a.parquet')
    assert list(documents.read_documents(tmp_path / 'a.parquet')) == table['text']
    assert list(documents.read_documents(tmp_path / 'a.parquet', min_score=3)) == ['b', 'd']
    assert list(documents.read_documents(tmp_path / 'a.parquet', min_score=3.5)) == ['b']
    with pytest.raises(ValueError, match='has no text with a score of at least 5'):
        list(documents.read_documents(tmp_path / 'a.parquet', min_score=5))
    pq.write_table(pa.table({'text': ['a']}), tmp_path / 'b.parquet')
    with pytest.raises(ValueError, match="no field 'score'.*leave out --min_score"):
        list(documents.read_documents(tmp_path / 'b.parquet', min_score=3))
    (tmp_path / 'c.txt').write_text('a')
    with pytest.raises(ValueError, match='c.txt is not Parquet, which --min_score=3 needs'):
        list(documents.read_documents(tmp_path / 'c.txt', min_score=3))


def test_a_file_without_a_document_among_others(tmp_path):
    for name, text in (('a', '{"text": "eins"}'), ('b', '{"text": " "}'), ('c', '{"text": ""}')):
        (tmp_path / f'{name}.jsonl').write_text(text)
    a, b, c = (tmp_path / f'{name}.jsonl' for name in 'abc')
    assert list(documents.read_documents([c, a, b])) == ['eins']
    with pytest.raises(ValueError, match=r'b.jsonl, .*c.jsonl has no text.*2 file'):
        list(documents.read_documents([b, c]))


def test_pyarrow_missing(tmp_path, monkeypatch):
    (tmp_path / 'a.parquet').write_bytes(b'PAR1')
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[data\]'"):
        list(documents.read_documents(tmp_path / 'a.parquet'))


def test_nothing_there(tmp_path):
    (tmp_path / 'input.txt').write_text('x')
    with pytest.raises(ValueError, match="inptu.txt does not exist; did you mean 'input.txt'"):
        list(documents.read_documents(tmp_path / 'inptu.txt'))
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / 'x.png').write_text('x')
    with pytest.raises(ValueError, match='no text files.*1 files'):
        list(documents.read_documents(tmp_path / 'folder'))


# splitting ---------------------------------------------------------------------------------------

def val_of(texts, val_fraction=0.3):
    return {text for split, text in documents.split_documents(texts, val_fraction)
            if split == 'val'}


def test_split_ignores_order_and_company():
    texts = [words(20, seed) for seed in range(300)]
    shuffled = random.Random(1).sample(texts, 300)
    assert val_of(shuffled) == val_of(texts)
    assert 60 < len(val_of(texts)) < 120
    assert val_of(texts[:150]) == val_of(texts) & set(texts[:150])
    assert val_of(texts, 0.1) < val_of(texts, 0.3)  # a smaller split is part of a larger one


def test_duplicates_stay_on_one_side():
    texts = [words(20, seed) for seed in range(50)] * 3
    sides = {}
    for split, text in documents.split_documents(texts, 0.5):
        sides.setdefault(text, set()).add(split)
    assert len(sides) == 50 and all(len(side) == 1 for side in sides.values())


def test_split_is_this_one_forever():
    # blake2b of the UTF-8 text, first 48 bits as a fraction: another choice would change everyone's
    # val split
    expected = int.from_bytes(hashlib.blake2b('hällo'.encode(), digest_size=6).digest(),
                              'big') / 2**48
    assert documents.text_hash('hällo') == expected == 0.0918754632096892


def test_fraction_for_a_size():
    texts = [words(20 + seed, seed) for seed in range(300)]
    longest = 600
    fraction = documents.fraction_for(texts, 20_000, longest)
    chosen = [text for split, text in documents.split_documents(texts, fraction, longest)
              if split == 'val']
    sizes = [len(text.encode()) for text in chosen]
    assert 20_000 <= sum(sizes) < 20_000 + max(sizes)
    assert max(len(text) for text in chosen) <= longest < max(len(text) for text in texts)
    with pytest.raises(ValueError, match='at most'):
        documents.fraction_for(texts, 10**9, longest)


@pytest.mark.parametrize('val_fraction', [0, 1, -0.1, 90])
def test_senseless_fraction(tmp_path, val_fraction):
    with pytest.raises(ValueError, match=f'val_fraction is {val_fraction}; expected'):
        write(tmp_path, ['a'], val_fraction)


@pytest.mark.parametrize('text', [words(500), 'x' * 999, 'é' * 77 + '\n'])
def test_text_is_split_by_characters(tmp_path, monkeypatch, text):
    monkeypatch.setattr(documents.read_text, '__defaults__', (64,))  # many pieces
    path = tmp_path / 'a.txt'
    path.write_text(text, encoding='utf-8')
    sides = {'train': '', 'val': ''}
    for split, piece in documents.split_text(path, 0.1):
        sides[split] += piece
    assert sides['train'] == text[:int(len(text) * 0.9)] and sides['val'] == text[int(len(text)
                                                                                      * 0.9):]



@pytest.mark.parametrize('line, message', [
    ('[' * 200_000, 'line 2: maximum recursion depth'),
    ('{"text": ' + '9' * 5000 + '}', 'line 2: Exceeds the limit'),
], ids=['deep', 'long number'])
def test_json_that_python_cannot_hold(tmp_path, line, message):
    (tmp_path / 'a.jsonl').write_text('{"text": "good"}\n' + line + '\n')
    with pytest.raises(ValueError, match=message):
        list(documents.read_documents(tmp_path / 'a.jsonl'))


def test_parquet_with_a_text_that_is_not_utf8(tmp_path):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq
    texts = pa.array([b'good', b'bad \xff'], pa.binary()).view(pa.string())
    pq.write_table(pa.table({'text': texts}), tmp_path / 'a.parquet')
    with pytest.raises(ValueError,
                       match=r"a.parquet has a text after row 0 that is not UTF-8 .*: ff\)"):
        list(documents.read_documents(tmp_path / 'a.parquet'))
