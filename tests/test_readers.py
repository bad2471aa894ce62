"""data/documents.py: JSON in every form, dialects of CSV, types of Parquet, separators.

Run: pytest tests/test_readers.py
"""

import csv
import io
import json
import random
import subprocess
import sys

import pytest
from conftest import ROOT, load_script
from corpora import words
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import UserError
from data import documents, encode, scoring

ROWS = [{'id': f'a{i}', 'text': f'text {i} "é" 🙂\n'} for i in range(7)]
TEXTS = [row['text'] for row in ROWS]
LINES = '\n'.join(map(json.dumps, ROWS))


def read(path, content=None, **options):
    if content is not None:
        path.write_text(content, encoding='utf-8', newline='')
    return list(documents.read_documents(path, **options))


# JSON --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['a.json', 'a.jsonl', 'a.txt', 'a', 'a.log'])
@pytest.mark.parametrize('content', [
    LINES, json.dumps(ROWS), json.dumps(ROWS, indent=1), '\n \n' + json.dumps(ROWS, indent=2) + '\n\n',
    LINES.replace('\n', '\r\n\r\n'), '\ufeff' + json.dumps(ROWS)], ids=range(6))
def test_rows_under_any_name(tmp_path, name, content):
    assert read(tmp_path / name, content) == TEXTS


@pytest.mark.parametrize('content', [
    json.dumps(ROWS[0], indent=1), '\n\n'.join(json.dumps(row, indent=1) for row in ROWS),
    ' '.join(map(json.dumps, ROWS))])
def test_objects_one_after_another(tmp_path, content):
    assert read(tmp_path / 'a.json', content) == TEXTS[:content.count('"id"')]


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(max_size=3), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=2), values, max_size=3),
    max_leaves=6), max_size=4), max_size=6), indent=st.none() | st.integers(0, 3),
    size=st.integers(1, 40))
def test_arrays_in_small_windows(tmp_path_factory, rows, indent, size):
    """An array reads as json.loads() reads it, wherever the window on the file ends."""
    path = tmp_path_factory.getbasetemp() / 'rows.json'
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False).encode(
        'utf-8', 'replace').decode(), encoding='utf-8')
    expected = json.loads(path.read_text(encoding='utf-8'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, 'PIECE_CHARS', size)
        assert [row for _, row in documents.read_values(path)] == expected


@pytest.mark.parametrize('content, said', [
    (json.dumps(ROWS)[:-1], 'a.json, entry 8: expected "," before it, or "]"'),
    (json.dumps(ROWS)[:-41], 'a.json, entry 7: not JSON: Unterminated string'),
    (json.dumps(ROWS).replace('}, {', '} {'), 'entry 2: expected ","'),
    (json.dumps(ROWS)[:-1] + ',]', 'entry 8: not JSON: Expecting value, line 1'),
    (json.dumps(ROWS) + 'x', 'text after its array'), ('["a"]', 'entry 1: "a" is not an object'),
    ('[{"text": "a"},\n {"text": b}]', 'entry 2: not JSON: Expecting value, line 2'),
    ('[{"text": "a", "text": "b"}]', 'entry 1: the key "text" stands there twice'),
    ('[' * 100_000, 'recursion'), ('{"text": ' * 100_000, 'recursion'), ('hello', "is not JSON: it begins with 'hello'"),
    (LINES[:-5], 'line 7: not JSON'), ('[]', 'has no text'), ('  ', 'has no text'),
    ('{"name": "x", "main": "index of all"}', "no field 'text'; it has: name, main; .*--text_key=main"),
    ('{"messages": []}', 'for conversations: python data/chat/prepare.py'),
    ('{"text": "a"}\n{"text": 5}', "line 2 has '5' as 'text'"),
])
def test_broken_json(tmp_path, content, said):
    with pytest.raises(ValueError, match=said):
        read(tmp_path / 'a.json', content)


@pytest.mark.parametrize('content', [
    '{"body": "x"}\n{"body": "y"}', '[link](http://x)', '{ int x; }', '[1, 2]', '["text"]', '{"text": 5}', '{}'])
def test_text_stays_text(tmp_path, content):
    """JSON without text in the field is the text of a .txt or .py file; in a folder .json is left out."""
    assert read(tmp_path / 'a.txt', content) == [content]
    assert read(tmp_path / 'b.py', content) == [content]
    (tmp_path / 'c.json').write_text(content)
    (tmp_path / 'package.json').write_text('{\n "name": "x"\n}')
    assert documents.find_files(tmp_path) == ([str(tmp_path / 'a.txt'), str(tmp_path / 'b.py')], 2)
    (tmp_path / 'd.json.gz').write_text(LINES)
    files, n_others = documents.find_files(tmp_path)
    assert files[2:] == [str(tmp_path / 'd.json.gz')] and n_others == 2
    assert read(tmp_path) == [content, content, *TEXTS]


def test_numbers_that_nobody_reads(tmp_path):
    assert read(tmp_path / 'a.jsonl', '{"text": "a", "x": NaN, "y": 1e999, "z": -Infinity}') == ['a']
    with pytest.raises(ValueError, match="line 1 has 'nan' as 'text'; expected a string"):
        read(tmp_path / 'a.jsonl', '{"text": NaN}')


@pytest.mark.parametrize('record, advised', [
    ({'id': 'a-long-identifier-of-many-letters', 'url': 'x' * 50, 'body': 'short text'}, '--text_key=body'),
    ({'uuid': 'x' * 36, 'n': '12345678901234567890', 'my text': 'a b'}, "'--text_key=my text'"),
    ({'id': 5, 'lang': 'en', 'inhalt': '日本語の文章です'}, '--text_key=inhalt'),
    ({'n': 1, 'digits': '12 34'}, 'none of them holds a text')])
def test_advised_field(tmp_path, record, advised):
    with pytest.raises(ValueError, match=f"has no field 'text'.*{advised}"):
        read(tmp_path / 'a.jsonl', json.dumps(record))


# CSV ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('suffix', ['csv', 'tsv'])
@pytest.mark.parametrize('delimiter', [',', ';', '\t', '|'])
@pytest.mark.parametrize('quoting', [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_dialects(tmp_path, suffix, delimiter, quoting):
    file, texts = io.StringIO(), [*TEXTS, 'a, b; c', 'x | y\tz', '"all"', 'two\r\nlines', 'plain']
    writer = csv.writer(file, delimiter=delimiter, quoting=quoting)
    writer.writerows([['id', 'text', 'n'], *([i, text, 0] for i, text in enumerate(texts))])
    assert read(tmp_path / f'a.{suffix}', file.getvalue()) == texts


@pytest.mark.parametrize('content, said', [
    ('text,label\nGood day, he said,pos\n', "a.csv, line 2: 3 fields; expected 2: text, label. A field with a ','"),
    ('text,label\na,b\nc\n', 'a.csv, line 3: 1 fields; expected 2'),
    ('text\nGood day, he said\n', 'a.csv, line 2: 2 fields; expected 1'),
    ('id;text\n1;a;b\n', "a.csv, line 2: 3 fields; expected 2: id, text. A field with a ';'"),
    ('id,text\n1,a\n2,"open\n' + '3,c\n' * 50, 'a.csv, line 3: the row that begins here .*unexpected end of data'),
    ('id,text\n1,a\n2,"open\n3,c\n4,"d"\n', 'a.csv, line 3: the row that begins here'),
    ('id,text\n\n1,"say "hi" now"\n', 'a.csv, line 3: the row that begins here .*Is a quote not closed'),
    ('text,text\na,b\n', 'two columns of one name: text, text'),
    ('id;text\n1;a\n', "no field 'body'; it has: id, text; .*--text_key=text"),
])
def test_broken_csv(tmp_path, content, said):
    with pytest.raises(ValueError, match=said):
        read(tmp_path / 'a.csv', content, text_key='body' if 'body' in said else 'text')


@pytest.mark.parametrize('content, texts', [
    ('id\ttext\n1\t"Hello, she said.\n2\t"Bye" and more\n3\t5" pipe\n', ['"Hello, she said.', '"Bye" and more', '5" pipe']),
    ('text\tid\n"Hello\t1\nmore\t2\nsaid bye"\t3\n', ['"Hello', 'more', 'said bye"']),
    ('id\ttext\n1\t"He said ""hi"""\n2\tplain\n', ['He said "hi"', 'plain']),
    ('id\ttext\n1\t"a\tb"\n2\t"c\nd"\n', ['a\tb', 'c\nd']),
    ('id\ttext\n1\t"def f():\n\treturn 1"\n2\tplain\n', ['def f():\n\treturn 1', 'plain']),
    ('id\ttext\r\n1\t"open\r\n\r\n2\tb\r\n', ['"open', 'b']), ('text\n"a\nb"\n"c"\n', ['a\nb', 'c'])])
def test_quotes_in_tsv(tmp_path, content, texts):
    """They are letters where lines and tabs suffice, and CSV's where a field has those in it."""
    assert read(tmp_path / 'a.tsv', content) == texts


# Parquet -----------------------------------------------------------------------------------------


def test_string_types(tmp_path):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq
    texts = ['a', None, 'b c', 'a', '']
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()),
                 *([pa.string_view()] if hasattr(pa, 'string_view') else [])):
        pq.write_table(pa.table({'text': pa.array(texts).cast(kind)}), tmp_path / 'a.parquet')
        assert read(tmp_path / 'a.parquet') == ['a', 'b c', 'a']
    (tmp_path / 'other').write_bytes((tmp_path / 'a.parquet').read_bytes())
    assert read(tmp_path / 'other') == ['a', 'b c', 'a']  # the content decides
    pq.write_table(pa.table({'text': pa.nulls(3)}), tmp_path / 'a.parquet')
    with pytest.raises(ValueError, match='has no text'):
        read(tmp_path / 'a.parquet')
    pq.write_table(pa.table({'id': ['a' * 40], 'content': ['b c']}), tmp_path / 'a.parquet')
    with pytest.raises(ValueError, match="no field 'text'; it has: id, content; .*--text_key=content"):
        read(tmp_path / 'a.parquet')
    pq.write_table(pa.table({'text': ['a'], 'score': ['5']}), tmp_path / 'a.parquet')
    with pytest.raises(ValueError, match="row 1 has '5' as score; expected a number"):
        read(tmp_path / 'a.parquet', min_score=3)


def test_batches_are_bounded_by_bytes(tmp_path, monkeypatch):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq
    sizes, iter_batches = [], pq.ParquetFile.iter_batches

    def counted(*arguments, **options):
        for batch in iter_batches(*arguments, **options):
            sizes.append((batch.num_rows, batch.nbytes))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, 'iter_batches', counted)
    monkeypatch.setattr(documents, 'BATCH_BYTES', 5000)
    texts = [chr(97 + i % 26) * (2000 if i < 60 else 10) for i in range(100)]
    pq.write_table(pa.table({'text': texts}), tmp_path / 'a.parquet', row_group_size=20, use_dictionary=False)
    assert read(tmp_path / 'a.parquet') == texts
    assert max(size for _, size in sizes) <= 5000 and max(n for n, _ in sizes) == documents.BATCH_ROWS


# separators, special tokens, replacing -----------------------------------------------------------


def test_separator(tmp_path, monkeypatch):
    content = '<|endoftext|>'.join(['one\n', '\ntwo\n\n', '\n', 'three <|end', '']) + 'four'
    expected = ['one', 'two', 'three <|end', 'four']
    for size in (1, 3, 13, 1000):
        monkeypatch.setattr(documents, 'DOCUMENT_CHARS', size)
        assert read(tmp_path / 'a.txt', content, separator='<|endoftext|>') == expected
    monkeypatch.setattr(documents, 'LONGEST', 20)
    with pytest.raises(ValueError, match="more than 20 characters without a 'q'"):
        read(tmp_path / 'a.txt', content, separator='q')
    with pytest.raises(ValueError, match='is a table.*--separator=x is for texts'):
        read(tmp_path / 'a.jsonl', LINES, separator='x')


def prepare_text(monkeypatch, capsys, **options):
    script = load_script(ROOT / 'data/text/prepare.py')
    monkeypatch.setattr('sys.argv', ['prepare.py', *(f'--{key}={value}' for key, value in options.items())])
    encode.run(script.main)
    return capsys.readouterr()


def test_special_tokens_in_a_text_are_counted(tmp_path, monkeypatch, capsys):
    stories = [words(30, seed) for seed in range(150)]
    (tmp_path / 'a.txt').write_text('\n<|endoftext|>\n'.join(stories), encoding='utf-8')
    options = {'input': tmp_path / 'a.txt', 'out_dir': tmp_path / 'out', 'tokenizer': 'bpe', 'vocab_size': 280}
    said = prepare_text(monkeypatch, capsys, **options).err
    assert "the text has '<|endoftext|>' 149 times" in said and "--separator='<|endoftext|>'" in said
    said = prepare_text(monkeypatch, capsys, **options, separator='<|endoftext|>').err
    assert "'<|endoftext|>'" not in said and 'held another text' in said  # the same, cut into documents
    assert sum(json.loads((tmp_path / 'out/meta.json').read_text())['documents'].values()) == 150


def test_a_replaced_dataset_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / 'a.txt').write_text(words(100), encoding='utf-8')
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b/a.txt').write_text(words(100, 1), encoding='utf-8')
    options = {'input': tmp_path / 'a.txt', 'out_dir': tmp_path / 'out'}
    for _ in range(2):
        assert 'held another' not in prepare_text(monkeypatch, capsys, **options).err
    said = prepare_text(monkeypatch, capsys, **options | {'input': tmp_path / 'b/a.txt'}).err
    assert "out held another text, 'a.txt' of SHA-256" in said and 'it is replaced' in said
    (tmp_path / 'out/meta.json').write_text('[7]')
    assert 'held another' not in prepare_text(monkeypatch, capsys, **options).err


def test_a_note_on_json_that_is_text(tmp_path, monkeypatch, capsys):
    (tmp_path / 'a.txt').write_text('{"body": "x y"}\n' * 9)
    said = prepare_text(monkeypatch, capsys, input=tmp_path / 'a.txt', out_dir=tmp_path / 'out').err
    assert 'begins like JSON that has no text in' in said and '--text_key=NAME' in said
    (tmp_path / 'folder').mkdir()
    for name, content in (('a', '{"text": "a"\n{"text": "x y"}\n'), ('b', 'words')):  # a damaged first line
        (tmp_path / f'folder/{name}.txt').write_text(content * 9)
    said = prepare_text(monkeypatch, capsys, input=tmp_path / 'folder', out_dir=tmp_path / 'out').err
    assert 'folder/a.txt begins like JSON' in said and 'name the file .jsonl' in said


def test_values_that_python_lacks(tmp_path):
    """A date beyond the year 9999 in a column that nobody reads, and a time zone that nobody knows."""
    pa = pytest.importorskip('pyarrow')
    from pyarrow import parquet
    for kind, value in ((pa.date32(), 10**7), (pa.timestamp('us'), 10**18), (pa.timestamp('us', tz='Mars/Phobos'), 10**15)):
        table = pa.table({'text': ['a', 'b'], 'other': pa.array([value] * 2, kind)})
        parquet.write_table(table, tmp_path / 'a.parquet')
        with pytest.raises(UserError, match='a value after row 0 that Python lacks .*write the file again without'):
            list(documents.read_records(tmp_path / 'a.parquet'))
        assert [row['text'] for _, row in documents.read_parquet(tmp_path / 'a.parquet', ['text'])] == ['a', 'b']
        parquet.write_table(table.select(['text']), tmp_path / 'a.parquet')
        with pytest.raises(UserError, match='body') as refused:
            list(documents.read_parquet(tmp_path / 'a.parquet', ['body']))
        assert 'Python lacks' not in str(refused.value)


def test_random_bytes_are_read_or_refused(tmp_path):
    """No content of a file raises anything but UserError."""
    rng = random.Random(0)
    seeds = [LINES.encode(), json.dumps(ROWS, indent=1).encode(), b'id,text\n1,"a b"\n2,c\n', b'id\ttext\n1\t"a\n']
    for name in ('a.json', 'a.jsonl', 'a.csv', 'a.tsv', 'a.txt', 'a.parquet'):
        for _ in range(40):
            content = bytearray(rng.choice(seeds))
            for _ in range(rng.randint(1, 6)):
                place = rng.randrange(len(content))
                content[place:place + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
            (tmp_path / name).write_bytes(content)
            try:
                read(tmp_path / name)
            except ValueError as error:
                assert type(error).__name__ == 'UserError' and name in str(error)


def test_an_empty_file_in_a_folder_is_no_error(tmp_path):
    """Only a file that is named alone must have text."""
    folder = tmp_path / 'in'
    folder.mkdir()
    (folder / 'a.txt').write_text('the cat sat on the mat\n' * 20)
    (folder / 'empty.txt').touch()
    assert ''.join(scoring.read_pieces(str(folder), 'text')).startswith('the cat')
    done = subprocess.run([sys.executable, '-m', 'tokenizer', 'train', f'--input={folder}', '--vocab_size=260',
                           f'--out={tmp_path}/t.json'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / 't.json').exists(), done.stderr
