"""corpus.py and the prepare.py scripts: what they write, what they refuse, and what a crash leaves behind.

Run: pytest tests/test_corpus.py (about 20 s on two cores, no network)
"""

import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, load_or_skip
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

import tokenizer
from data import datasets, download, encode
from data import documents as corpus
from tokenizer import base

# tqdm's lock is shared with forked processes: one that is killed while it has it would stop all others
tqdm.set_lock(threading.RLock())
SHAKESPEARE = ROOT.parent / 'shared' / 'data' / 'tinyshakespeare' / 'input.txt'
POSIX = pytest.mark.skipif(os.name != 'posix', reason='needs fork and signals')
# A proxy that nobody listens at makes every machine one without a network.
OFFLINE = {**os.environ, 'no_proxy': '', 'NO_PROXY': '',
           **{name: 'http://127.0.0.1:9' for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY')}}


def words(count, seed=0):
    """Some lines of made-up text."""
    rng = random.Random(seed)
    return ''.join(rng.choice(['lorem', 'ipsum', 'dölor', 'sit', '12', 'amet.', '日本']) + rng.choice('   \n')
                   for _ in range(count))


def write(out_dir, documents, val_fraction=0.3, tok=None, **options):
    """A dataset of documents, a list or a function that returns an iterator of them."""
    def pieces():
        return corpus.split_documents(documents() if callable(documents) else documents, val_fraction)

    return encode.write_dataset(out_dir, pieces, tok or tokenizer.ByteTokenizer(), documents=True, source='test',
                                val_fraction=val_fraction, **options)


def ids(out_dir, split):
    meta = json.loads((Path(out_dir) / 'meta.json').read_text())
    return np.fromfile(Path(out_dir) / f'{split}.bin', dtype=meta['dtype'])


def names(folder):
    return sorted(os.listdir(folder))


def contents(folder):
    return {name: (Path(folder) / name).read_bytes() for name in names(folder)}


# ----------------------------------------------------------------------------------------------------------------------
# reading

@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet='ab \n\té日', max_size=80), size=st.integers(1, 20))
def test_pieces_join_to_the_text(tmp_path_factory, text, size):
    path = tmp_path_factory.getbasetemp() / 'pieces.txt'
    path.write_bytes(text.encode())
    pieces = list(corpus.read_text(path, size))
    assert ''.join(pieces) == text
    assert all(pieces) and all(len(piece) <= 2 * size for piece in pieces)


def test_pieces_end_at_line_ends(tmp_path):
    lines = [f'line {i} {"x" * (i % 37)}\n' for i in range(300)]
    (tmp_path / 'lines.txt').write_text(''.join(lines))
    pieces = list(corpus.read_text(tmp_path / 'lines.txt', 100))
    assert len(pieces) > 50 and [line for piece in pieces for line in piece.splitlines(True)] == lines


def test_line_ends_and_byte_order_mark(tmp_path):
    path = tmp_path / 'windows.txt'
    path.write_bytes('\ufeffeins\r\nzwei\rdrei\n'.encode())
    assert ''.join(corpus.read_text(path)) == 'eins\nzwei\ndrei\n'


@pytest.mark.parametrize('before', [0, 5, (1 << 20) - 1, (1 << 20) + 3, 3 << 20])
@pytest.mark.parametrize('after', [b'', b'abc'])
def test_invalid_utf8_says_where(tmp_path, before, after):
    path = tmp_path / 'latin.txt'
    path.write_bytes(('é' * (before // 2) + 'x' * (before % 2)).encode() + b'\xe4' + after)
    with pytest.raises(ValueError, match=f'latin.txt is not UTF-8: at byte {before:,} there is e4.*iconv -f latin1'):
        list(corpus.read_documents(path))


def test_utf16_and_binary_files_are_recognised(tmp_path):
    (tmp_path / 'a.txt').write_bytes('hällo'.encode('utf-16'))
    with pytest.raises(ValueError, match='iconv -f utf-16'):
        list(corpus.read_documents(tmp_path / 'a.txt'))
    (tmp_path / 'b.gz').write_bytes(b'\x1f\x8b\x08\x00\x00')
    with pytest.raises(ValueError, match='binary'):
        list(corpus.read_documents(tmp_path / 'b.gz'))


def test_folder(tmp_path):
    for name in ('b.txt', 'a/z.md', 'a/.hidden.txt', '.git/x.txt', 'image.png', 'a/empty.py', 'a/rows.jsonl'):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('' if 'empty' in name else name)
    (tmp_path / 'a/rows.jsonl').write_text('{"text": "one"}\n\n{"text": "two"}\n{"text": null}\n{"text": " "}\n')
    files, skipped = corpus.find_files(tmp_path)
    assert [os.path.relpath(path, tmp_path) for path in files] == [
        'b.txt', *(os.path.join('a', name) for name in ('empty.py', 'rows.jsonl', 'z.md'))]
    assert skipped == 1
    assert list(corpus.read_documents(tmp_path)) == ['b.txt', 'one', 'two', 'a/z.md']


def test_long_file_is_several_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, 'DOCUMENT_CHARS', 1000)
    path = tmp_path / 'long.txt'
    path.write_text(words(2000), encoding='utf-8')
    documents = list(corpus.read_documents(path))
    assert len(documents) > 5 and ''.join(documents) == words(2000)
    assert all(document.endswith('\n') for document in documents[:-1])


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
        assert list(corpus.read_documents(tmp_path / f'a.{suffix}', 'body')) == texts
        with pytest.raises(ValueError, match="no field 'text'.*body.*--text_key="):
            list(corpus.read_documents(tmp_path / f'a.{suffix}'))


def test_lone_surrogate_in_json(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": "a\\ud83d b"}\n')
    assert list(corpus.read_documents(tmp_path / 'a.jsonl')) == ['a\ufffd b']


@pytest.mark.parametrize('content, message', [
    ('{"text": "a"}\n{"text": \n', r'a.jsonl, line 2, is not JSON.*'),
    ('["a"]\n', 'line 1, holds .*expected an object'),
    ('{"text": 5}\n', "line 1, has '5'.*expected a string"),
    ('{"body": "a"}\n', 'line 1, has no field.*--text_key=body'),
    ('{"text": ""}\n', 'holds no text'),
    ('', 'is empty'),
])
def test_broken_rows(tmp_path, content, message):
    (tmp_path / 'a.jsonl').write_text(content)
    with pytest.raises(ValueError, match=message):
        list(corpus.read_documents(tmp_path / 'a.jsonl'))


def test_broken_parquet_and_wrong_type(tmp_path):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq
    (tmp_path / 'a.parquet').write_bytes(b'PAR1 no, it is not')
    with pytest.raises(ValueError, match='a.parquet cannot be read as Parquet'):
        list(corpus.read_documents(tmp_path / 'a.parquet'))
    pq.write_table(pa.table({'text': [1, 2]}), tmp_path / 'b.parquet')
    with pytest.raises(ValueError, match="int64 in the column 'text'"):
        list(corpus.read_documents(tmp_path / 'b.parquet'))


def test_parquet_scores(tmp_path):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq
    table = {'text': ['a', 'b', 'c', 'd'], 'score': [2.6, 3.5, None, 3.4999]}
    pq.write_table(pa.table(table), tmp_path / 'a.parquet')
    assert list(corpus.read_documents(tmp_path / 'a.parquet')) == table['text']
    assert list(corpus.read_documents(tmp_path / 'a.parquet', min_score=3)) == ['b', 'd']
    assert list(corpus.read_documents(tmp_path / 'a.parquet', min_score=3.5)) == ['b']
    with pytest.raises(ValueError, match='holds no text with a score of at least 5'):
        list(corpus.read_documents(tmp_path / 'a.parquet', min_score=5))
    pq.write_table(pa.table({'text': ['a']}), tmp_path / 'b.parquet')
    with pytest.raises(ValueError, match="no column 'score', which --min_score=3 needs"):
        list(corpus.read_documents(tmp_path / 'b.parquet', min_score=3))
    (tmp_path / 'c.txt').write_text('a')
    with pytest.raises(ValueError, match='c.txt is not Parquet, which --min_score=3 needs'):
        list(corpus.read_documents(tmp_path / 'c.txt', min_score=3))


def test_a_file_without_a_document_among_others(tmp_path):
    for name, text in (('a', '{"text": "eins"}'), ('b', '{"text": " "}'), ('c', '{"text": ""}')):
        (tmp_path / f'{name}.jsonl').write_text(text)
    a, b, c = (tmp_path / f'{name}.jsonl' for name in 'abc')
    assert list(corpus.read_documents([c, a, b])) == ['eins']
    with pytest.raises(ValueError, match=r'b.jsonl, .*c.jsonl holds no text.*2 file'):
        list(corpus.read_documents([b, c]))


def test_pyarrow_missing(tmp_path, monkeypatch):
    (tmp_path / 'a.parquet').write_bytes(b'PAR1')
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[data\]'"):
        list(corpus.read_documents(tmp_path / 'a.parquet'))


def test_nothing_there(tmp_path):
    (tmp_path / 'input.txt').write_text('x')
    with pytest.raises(ValueError, match='inptu.txt does not exist.*did you mean input.txt'):
        list(corpus.read_documents(tmp_path / 'inptu.txt'))
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / 'x.png').write_text('x')
    with pytest.raises(ValueError, match='no text files.*1 files'):
        list(corpus.read_documents(tmp_path / 'folder'))


# ----------------------------------------------------------------------------------------------------------------------
# splitting

def val_of(documents, val_fraction=0.3):
    return {text for split, text in corpus.split_documents(documents, val_fraction) if split == 'val'}


def test_split_ignores_order_and_company():
    documents = [words(20, seed) for seed in range(300)]
    shuffled = random.Random(1).sample(documents, 300)
    assert val_of(shuffled) == val_of(documents)
    assert 60 < len(val_of(documents)) < 120
    assert val_of(documents[:150]) == val_of(documents) & set(documents[:150])
    assert val_of(documents, 0.1) < val_of(documents, 0.3)  # a smaller split is part of a larger one


def test_duplicates_stay_on_one_side():
    documents = [words(20, seed) for seed in range(50)] * 3
    sides = {}
    for split, text in corpus.split_documents(documents, 0.5):
        sides.setdefault(text, set()).add(split)
    assert len(sides) == 50 and all(len(side) == 1 for side in sides.values())


def test_split_is_this_one_forever():
    # blake2b of the UTF-8 text, first 48 bits as a fraction: another choice would change everyone's val split
    expected = int.from_bytes(hashlib.blake2b('hällo'.encode(), digest_size=6).digest(), 'big') / 2**48
    assert corpus.text_hash('hällo') == expected == 0.0918754632096892


def test_fraction_for_a_size():
    documents = [words(20 + seed, seed) for seed in range(300)]
    longest = 600
    fraction = corpus.fraction_for(documents, 20_000, longest)
    chosen = [text for split, text in corpus.split_documents(documents, fraction, longest) if split == 'val']
    sizes = [len(text.encode()) for text in chosen]
    assert 20_000 <= sum(sizes) < 20_000 + max(sizes)
    assert max(len(text) for text in chosen) <= longest < max(len(text) for text in documents)
    with pytest.raises(ValueError, match='at most'):
        corpus.fraction_for(documents, 10**9, longest)


@pytest.mark.parametrize('val_fraction', [0, 1, -0.1, 90])
def test_senseless_fraction(tmp_path, val_fraction):
    with pytest.raises(ValueError, match=f'val_fraction is {val_fraction}; expected'):
        write(tmp_path, ['a'], val_fraction)


@pytest.mark.parametrize('text', [words(500), 'x' * 999, 'é' * 77 + '\n'])
def test_text_is_split_by_characters(tmp_path, monkeypatch, text):
    monkeypatch.setattr(corpus.read_text, '__defaults__', (64,))  # many pieces
    path = tmp_path / 'a.txt'
    path.write_text(text, encoding='utf-8')
    sides = {'train': '', 'val': ''}
    for split, piece in corpus.split_text(path, 0.1):
        sides[split] += piece
    assert sides['train'] == text[:int(len(text) * 0.9)] and sides['val'] == text[int(len(text) * 0.9):]


# ----------------------------------------------------------------------------------------------------------------------
# what is written

def test_dataset(tmp_path):
    documents = [words(10, seed) for seed in range(40)]
    meta = write(tmp_path, documents)
    assert names(tmp_path) == ['meta.json', 'train.bin', 'val.bin']
    assert meta == json.loads((tmp_path / 'meta.json').read_text())
    for split in ('train', 'val'):
        chosen = [text + '\n\n' for side, text in corpus.split_documents(documents, 0.3) if side == split]
        assert bytes(ids(tmp_path, split).astype(np.uint8)).decode() == ''.join(chosen)
        assert meta['tokens'][split] == len(ids(tmp_path, split)) == meta['bytes'][split]
        assert meta['documents'][split] == len(chosen)
    assert meta['sha256'] == hashlib.sha256(''.join(text + '\n\n' for text in documents).encode()).hexdigest()
    assert (meta['version'], meta['dtype'], meta['vocab_size']) == (2, 'uint16', 256)
    assert meta['files'] == {split: [[f'{split}.bin', meta['tokens'][split]]] for split in ('train', 'val')}
    assert isinstance(tokenizer.from_dict(meta['tokenizer']), tokenizer.ByteTokenizer)


def test_separator_is_in_a_char_vocabulary(tmp_path):
    documents = ['no line end in any', 'of these documents']

    def pieces():
        return corpus.split_each(documents, 0.5)

    tok = encode.make_tokenizer('char', pieces, documents=True)
    encode.write_dataset(tmp_path, pieces, tok, documents=True, source='', val_fraction=0.5)
    assert tok.decode(ids(tmp_path, 'val')).endswith('\n\n')
    assert '\n' not in encode.make_tokenizer('char', pieces, documents=False).chars


@pytest.mark.parametrize('name', ['bpe', 'word'])
def test_vocabularies_are_trained_on_the_training_split(tmp_path, name):
    """What only val has gets no token of its own, and training again gives the same vocabulary."""
    documents = [f'plenty of ordinary words, number {i}' for i in range(40)]
    held_out = [f'{text} quixotic zeugma quixotic zeugma' for text in documents]

    def pieces():
        for text, secret in zip(documents, held_out, strict=True):
            yield 'train', text
            yield 'val', secret

    tok = encode.make_tokenizer(name, pieces, documents=True, vocab_size=300)
    assert tok.to_dict() == encode.make_tokenizer(name, pieces, documents=True, vocab_size=300).to_dict()
    assert tok.vocab_size <= 300 and tok.eot is not None
    encode.write_dataset(tmp_path, pieces, tok, documents=True, source='', val_fraction=0.5)
    ends = ids(tmp_path, 'train')
    assert (ends == tok.eot).sum() == 40
    assert tok.decode(ends[ends != tok.eot]) == ''.join(documents)
    assert len(tok.encode('plenty')) == 1 < len(tok.encode('quixotic')) or name == 'word'
    assert name == 'bpe' or 'quixotic' not in ''.join(tok.to_dict()['words'])


def test_end_of_text_ids(tmp_path):
    gpt2 = load_or_skip('gpt2')
    documents = [words(10, seed) for seed in range(40)]
    meta = write(tmp_path, documents, tok=gpt2)
    for split in ('train', 'val'):
        expected = []
        for side, text in corpus.split_documents(documents, 0.3):
            expected += gpt2.encode(text) + [50256] if side == split else []
        assert ids(tmp_path, split).tolist() == expected
    assert sum(meta['bytes'].values()) == len(''.join(documents).encode())


def of_kind(kind, text):
    """A tokenizer for a running text; with a pattern of one's own no place to cut is known."""
    if kind == 'gpt2':
        return load_or_skip('gpt2')
    if kind == 'byte':
        return tokenizer.ByteTokenizer()
    if kind == 'char':
        return tokenizer.CharTokenizer.from_text(text)
    if kind == 'word':
        return tokenizer.WordTokenizer.train([text], 300)
    return tokenizer.BPETokenizer.train([text], 275, pattern={'bytes': None, 'own': '(?s:.{1,7})'}.get(kind, kind))


KINDS = ['gpt2', 'gpt4', 'bytes', 'own', 'word', 'byte', 'char']


@pytest.mark.parametrize('kind', KINDS)
def test_a_running_text_has_the_ids_of_the_whole(tmp_path, monkeypatch, kind):
    """Wherever its pieces are cut: the files are those of the text encoded at once."""
    monkeypatch.setattr(encode, 'BATCH_CHARS', 1000)
    monkeypatch.setattr(base, 'STREAM_CHARS', 200)
    rng = random.Random(1)
    texts = {'train': words(2000, 1) + ' \n\n \t\n' * 100 + 'x' * 1500 + words(500, 2), 'val': words(300, 3)}
    tok = of_kind(kind, texts['train'] + texts['val'])
    pieces = []
    for split, text in texts.items():
        at = sorted({0, len(text), *rng.sample(range(len(text)), len(text) // 90)})
        pieces += [(split, text[i:j]) for i, j in zip(at, at[1:], strict=False)]
    meta = encode.write_dataset(tmp_path, lambda: iter(pieces), tok, documents=False, source='test', val_fraction=0.1)
    for split, text in texts.items():
        assert ids(tmp_path, split).tolist() == tok.encode(text)
    assert meta['sha256'] == hashlib.sha256(''.join(texts.values()).encode()).hexdigest()
    longest = max(len(text) for _, text in encode.cut_anew(pieces, tok))
    assert longest == len(texts['train']) if kind == 'own' else longest < 5000  # what is held in memory


@pytest.mark.parametrize('kind', KINDS)
def test_a_running_text_goes_on(tmp_path, monkeypatch, capsys, kind):
    """Interrupted again and again, each time a little later, it ends in the same files."""
    monkeypatch.setattr(encode, 'BATCH_CHARS', 2000)
    monkeypatch.setattr(base, 'STREAM_CHARS', 200)
    monkeypatch.setattr(encode, 'JOURNAL_BYTES', 1)
    text = words(2000)
    tok = of_kind(kind, text)
    pieces = [('train', text[i:i + 100]) for i in range(0, len(text), 100)] + [('val', words(100, 4))]

    def prepare(folder, stop=None):
        def until():
            yield from pieces[:stop]
            if stop is not None:
                raise ValueError('broken input')

        return encode.write_dataset(folder, until, tok, documents=False, source='test', val_fraction=0.1,
                                    shard_tokens=700)

    prepare(tmp_path / 'whole')
    for stop in range(10, len(pieces), 23):
        with pytest.raises(ValueError, match='broken input'):
            prepare(tmp_path / 'parts', stop)
    said = capsys.readouterr().err
    prepare(tmp_path / 'parts')
    assert contents(tmp_path / 'parts') == contents(tmp_path / 'whole')
    assert 'starting anew' not in said and ('going on' in said) == (kind != 'own')


def test_uint32_vocabulary(tmp_path):
    tok = tokenizer.CharTokenizer([chr(code) for code in range(0x10000, 0x10000 + 65537)])
    text = chr(0x10000 + 65536) * 10
    meta = encode.write_dataset(tmp_path, lambda: [('train', text), ('val', text)], tok, documents=False,
                                source='test', val_fraction=0.5)
    assert meta['dtype'] == 'uint32' and os.path.getsize(tmp_path / 'val.bin') == 40
    assert ids(tmp_path, 'val').tolist() == [65536] * 10


@pytest.mark.parametrize('workers', [1, 5])
def test_same_bytes_whatever_the_workers(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(encode, 'BATCH_CHARS', 300)
    documents = [words(15, seed) for seed in range(100)]
    write(tmp_path / 'a', documents, tok=load_or_skip('gpt2'), workers=workers)
    monkeypatch.undo()
    write(tmp_path / 'b', documents, tok=tokenizer.load('gpt2'))
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b')


def test_any_order_gives_the_same_split(tmp_path):
    documents = [words(10, seed) for seed in range(60)] + [words(10, seed) for seed in range(20)]  # 20 occur twice
    splits = []
    for i, order in enumerate((documents, documents[::-1], random.Random(3).sample(documents, len(documents)))):
        write(tmp_path / str(i), order)
        splits.append([bytes(ids(tmp_path / str(i), split).astype(np.uint8)).decode() for split in ('train', 'val')])
    for train, val in splits:
        for text in documents:
            sides = [side.count(text + '\n\n') for side in (train, val)]
            assert sorted(sides) == [0, documents.count(text)]
            assert (sides[1] > 0) == (text + '\n\n' in splits[0][1])


@settings(max_examples=40)
@given(sizes=st.lists(st.integers(1, 60), min_size=20, max_size=60), shard_tokens=st.integers(1, 300))
def test_shards(tmp_path_factory, sizes, shard_tokens):
    """End to end they are the one file; a document is whole; none is too large, unless by one document."""
    folder = tmp_path_factory.mktemp('shards')
    documents = [chr(97 + i % 26) * n + str(i) for i, n in enumerate(sizes)]
    splits = ['train' if i % 3 else 'val' for i in range(len(sizes))]
    metas = [encode.write_dataset(folder / str(n), lambda: zip(splits, documents, strict=True),
                                  tokenizer.ByteTokenizer(), documents=True, source='', val_fraction=0.3,
                                  shard_tokens=n) for n in (10**9, shard_tokens)]
    for split in ('train', 'val'):
        whole, files = (folder / str(10**9) / f'{split}.bin').read_bytes(), metas[1]['files'][split]
        assert [name for name, _ in files] == [f'{split}.bin', *(f'{split}-{i:05d}.bin' for i in range(1, len(files)))]
        parts = [(folder / str(shard_tokens) / name).read_bytes() for name, _ in files]
        assert b''.join(parts) == whole and [len(part) // 2 for part in parts] == [n for _, n in files]
        texts = [bytes(np.frombuffer(part, '<u2').astype(np.uint8)).decode() for part in parts]
        assert all(text.endswith('\n\n') for text in texts)
        assert all(len(text) <= shard_tokens or text.count('\n\n') == 1 for text in texts)
        for text, following in zip(texts, texts[1:], strict=False):  # no shard ends earlier than it has to
            assert len(text) + following.index('\n\n') + 2 > shard_tokens
    assert {**metas[0], 'files': None} == {**metas[1], 'files': None}


def test_stale_shards_go(tmp_path):
    write(tmp_path, OLD, shard_tokens=300)
    assert len(names(tmp_path)) > 6 and 'train-00003.bin' in names(tmp_path)
    tokens = write(tmp_path, NEW)['tokens']
    assert names(tmp_path) == ['meta.json', 'train.bin', 'val.bin']
    larger = max(tokens, key=tokens.get)
    write(tmp_path, NEW, shard_tokens=tokens[larger] - 1)
    assert names(tmp_path) == sorted(['meta.json', 'train.bin', 'val.bin', f'{larger}-00001.bin'])


def test_splits_too_short(tmp_path):
    with pytest.raises(ValueError, match=r'the val split has 0 token\(s\).*larger --val_fraction'):
        write(tmp_path, ['only one document'], 1e-9)
    with pytest.raises(ValueError, match=r'the train split has 0 token\(s\).*smaller --val_fraction'):
        write(tmp_path, ['only one document'], 1 - 1e-9)
    assert names(tmp_path) == []
    with pytest.raises(ValueError, match='val split'):
        write(tmp_path / 'new folder', ['only one document'], 1e-9)
    assert names(tmp_path) == []  # no empty folder is left behind


# ----------------------------------------------------------------------------------------------------------------------
# all or nothing

OLD, NEW = [words(30, seed) for seed in range(20)], [words(50, seed) for seed in range(100, 150)]


def state(folder, references):
    """Which of the complete datasets this folder holds, or None when it counts as not prepared."""
    if not (folder / 'train.bin').exists():
        return None
    for name, reference in references.items():
        if all(path.exists() and path.read_bytes() == content
               for path, content in ((folder / file, content) for file, content in contents(reference).items())):
            return name
    raise AssertionError(f'a mixture: {names(folder)}')


@pytest.fixture
def references(tmp_path):
    write(tmp_path / 'old', OLD)
    write(tmp_path / 'new', NEW)
    return {'old': tmp_path / 'old', 'new': tmp_path / 'new'}


@pytest.fixture
def small_steps(monkeypatch):
    """A journal after every few documents."""
    monkeypatch.setattr(encode, 'BATCH_CHARS', 4000)
    monkeypatch.setattr(encode, 'JOURNAL_BYTES', 1)


def die_at(step):
    """End this process without any clean-up just before the step-th call that changes or syncs a folder."""
    calls = 0

    def or_die(function):
        def counted(*arguments):
            nonlocal calls
            calls += 1
            if calls == step:
                os._exit(9)
            return function(*arguments)
        return counted

    for name in ('fsync', 'replace', 'remove'):
        setattr(os, name, or_die(getattr(os, name)))


@POSIX
@pytest.mark.parametrize('shard_tokens', [10**9, 2500])
def test_a_crash_at_every_step(tmp_path, shard_tokens, small_steps, capfd):
    """Die, as if by kill -9, just before the 1st, 2nd, ... call that changes the folder."""
    references = {'old': tmp_path / 'old', 'new': tmp_path / 'new'}
    write(references['old'], OLD, shard_tokens=shard_tokens)
    write(references['new'], NEW, shard_tokens=shard_tokens)
    seen, went_on = [], 0
    for step in range(1, 1000):
        folder = tmp_path / f'step{step}'
        shutil.copytree(references['old'], folder)
        (folder / 'meta.pkl').write_bytes(b'left over from before')
        child = os.fork()
        if child == 0:
            die_at(step)
            try:
                write(folder, NEW, shard_tokens=shard_tokens)
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seen.append(state(folder, references))
        write(folder, NEW, shard_tokens=shard_tokens)  # the next run succeeds and tidies up
        assert contents(folder) == contents(references['new'])
        said = capfd.readouterr().err
        went_on += 'going on' in said
        assert 'starting anew' not in said
        shutil.rmtree(folder)
        if status == 0:
            break
    assert status == 0 and len(seen) > 30 and went_on > 0.5 * len(seen)
    assert seen == sorted(seen, key=['old', None, 'new'].index)  # first the old one, then none, then the new one
    assert set(seen) == {'old', None, 'new'}


@POSIX
def test_kill_at_any_moment(tmp_path, references, small_steps, capfd):
    """SIGKILL, again and again, while two datasets take turns, and while a longer one is prepared."""
    rng, went_on, killed = random.Random(0), 0, 0
    for i in range(200):
        child = os.fork()
        if child == 0:
            try:
                while (tmp_path / 'long' / 'train.bin').exists():
                    write(tmp_path / 'turns', OLD)
                    write(tmp_path / 'turns', NEW)
                write(tmp_path / 'long', NEW * 40)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, 0.005 * (i + 1)))  # on a busy machine, too, one of them comes to the end
        os.kill(child, 9)
        os.waitpid(child, 0)
        went_on += 'going on' in capfd.readouterr().err
        state(tmp_path / 'turns', references)  # raises for a mixture
        killed += (tmp_path / 'long' / 'train.bin').exists()
        if killed == 10:
            break
    assert killed == 10 and went_on > 3
    write(tmp_path / 'reference', NEW * 40)
    assert contents(tmp_path / 'long') == contents(tmp_path / 'reference')
    write(tmp_path / 'turns', NEW)
    assert state(tmp_path / 'turns', references) == 'new' and len(names(tmp_path / 'turns')) == 3


class CountingTokenizer(tokenizer.ByteTokenizer):
    texts = 0

    def encode_batch(self, texts, workers=None):
        self.texts += len(texts)
        return super().encode_batch(texts, workers)


@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError('broken input'), OSError(28, 'No space left')])
def test_going_on_after_an_error(tmp_path, references, small_steps, capsys, error):
    def broken():
        yield from NEW[:30]
        raise error

    folder = tmp_path / 'folder'
    shutil.copytree(references['old'], folder)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else ValueError):
        write(folder, broken)
    assert 'the same command goes on from there' in capsys.readouterr().err
    assert state(folder, references) == 'old'
    tok = CountingTokenizer()
    write(folder, NEW, tok=tok)
    said = capsys.readouterr().err
    assert 'going on with the unfinished preparation' in said and 'anew' not in said
    assert 20 <= tok.texts < 40  # of 50; the others were not encoded again
    assert contents(folder) == contents(references['new'])


def write_and_interrupt(folder):
    """An unfinished preparation of 30 documents."""
    def broken():
        yield from NEW[:30]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(folder, broken)


@pytest.mark.parametrize('changed, said', [
    ({'documents': [NEW[0] + 'x', *NEW[1:]]}, 'they are not the same; starting anew'),
    ({'documents': NEW[:1]}, 'they are not the same; starting anew'),
    ({'val_fraction': 0.5}, 'another val_fraction; starting anew'),
    ({'tok': tokenizer.CharTokenizer.from_text(NEW)}, 'another tokenizer; starting anew'),
    ({'shard_tokens': 5000}, 'another shard_tokens; starting anew'),
])
def test_another_preparation_starts_anew(tmp_path, small_steps, capsys, changed, said):
    write_and_interrupt(tmp_path / 'a')
    other = {'documents': NEW, **changed}
    if len(other['documents']) == 1:  # too little for a dataset, and nothing of the 30 others is taken for it
        with pytest.raises(ValueError, match='val split has 0'):
            write(tmp_path / 'a', **other)
        assert names(tmp_path / 'a') == []
    else:
        write(tmp_path / 'a', **other)
        write(tmp_path / 'b', **other)
        assert contents(tmp_path / 'a') == contents(tmp_path / 'b')
    assert said in capsys.readouterr().err


@pytest.mark.parametrize('damage', [
    lambda folder: (folder / '.journal.json').write_text('{'),
    lambda folder: (folder / '.journal.json').write_text('[]'),
    lambda folder: (folder / '.journal.json').write_text('{"settings": {}, "done": {}, "publishing": false}'),
    lambda folder: (folder / '.train.bin.tmp').write_bytes(b'short'),
    lambda folder: (folder / '.val.bin.tmp').unlink(),
])
def test_a_damaged_journal_starts_anew(tmp_path, references, small_steps, capsys, damage):
    write_and_interrupt(tmp_path / 'a')
    damage(tmp_path / 'a')
    write(tmp_path / 'a', NEW)
    assert 'starting anew' in capsys.readouterr().err
    assert contents(tmp_path / 'a') == contents(references['new'])


@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError('broken input')])
def test_an_error_keeps_the_old_dataset(tmp_path, references, error):
    def documents():
        yield from NEW
        raise error

    folder = tmp_path / 'folder'
    shutil.copytree(references['old'], folder)
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        write(folder, documents)
    assert names(folder) == ['meta.json', 'train.bin', 'val.bin']
    assert state(folder, references) == 'old'


@POSIX
def test_a_full_disk_keeps_the_old_dataset(tmp_path, references):
    """A limit on the size of files stands in for a small disk: writes fail half-way in the same manner."""
    folder = tmp_path / 'folder'
    shutil.copytree(references['old'], folder)
    code = ('import resource, sys, corpus, tokenizer\n'
            'corpus.BATCH_CHARS, limit = 30_000, int(sys.argv[2])\n'
            'resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n'
            'pieces = (("train" if i % 9 else "val", "hello world " * 500) for i in range(90))\n'
            'corpus.run(lambda: corpus.write_dataset(sys.argv[1], lambda: pieces, tokenizer.ByteTokenizer(),\n'
            '                                        documents=True, source="test", val_fraction=0.1))\n')

    def run(folder, limit):
        return subprocess.run([sys.executable, '-c', code, str(folder), str(limit)], cwd=ROOT, capture_output=True,
                              text=True)

    done = run(folder, 40_000)  # less than the first batch: nothing to keep
    assert done.returncode == 1 and 'has no room for the token files' in done.stderr
    assert names(folder) == ['meta.json', 'train.bin', 'val.bin']
    for limit in (200_000, 500_000):
        done = run(folder, limit)
        assert done.returncode == 1
        assert 'has no room for the token files' in done.stderr and 'MB free' in done.stderr
        assert 'the same command goes on from there' in done.stderr and 'Traceback' not in done.stderr
        assert state(folder, references) == 'old'
    assert 'going on with the unfinished' in done.stderr
    done = run(folder, 10**9)
    assert 'going on with the unfinished' in done.stderr and done.returncode == 0
    run(tmp_path / 'reference', 10**9)
    assert contents(folder) == contents(tmp_path / 'reference')


@POSIX
def test_two_at_once(tmp_path):
    import fcntl
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match='another process is preparing'):
        write(tmp_path, NEW)
    os.close(folder)
    write(tmp_path, NEW)


@pytest.mark.parametrize('step', ['fsync', 'replace'])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, step):
    def full(*_):
        raise OSError(28, 'No space left on device')

    encode.replace_file(tmp_path / 'f', b'old')
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match='No space left'):
        encode.replace_file(tmp_path / 'f', b'new')
    assert contents(tmp_path) == {'f': b'old'}
    monkeypatch.undo()
    encode.replace_file(tmp_path / 'f', b'new')
    assert contents(tmp_path) == {'f': b'new'}


def test_stale_meta_pkl_goes(tmp_path):
    (tmp_path / 'meta.pkl').write_bytes(b'of another tokenizer')
    write(tmp_path, NEW)
    assert names(tmp_path) == ['meta.json', 'train.bin', 'val.bin']


@POSIX
def test_memory_is_constant(tmp_path):
    """Ten times the text must not need more memory; nor may a text without a single line end."""
    line = words(2000).replace('\n', ' ').encode()
    sources = {}
    for name, size, end in (('small', 20, b'\n'), ('large', 200, b'\n'), ('one line', 40, b' ')):
        sources[name] = tmp_path / f'{name}.txt'
        with open(sources[name], 'wb') as file:
            for _ in range(size * 1_000_000 // len(line)):
                file.write(line + end)
    code = ('import resource, sys, corpus, tokenizer\n'
            'path, out = sys.argv[1:]\n'
            'def text():\n'
            '    return corpus.split_text(path, 0.1)\n'
            'def each():\n'
            '    return corpus.split_each(corpus.read_documents(path), 0.1)\n'
            'tok = corpus.make_tokenizer("char", text, documents=True)\n'
            'for pieces, documents in ((text, False), (each, True)):\n'
            '    corpus.write_dataset(out, pieces, tok, documents=documents, source="", val_fraction=0.1)\n'
            'if sys.platform == "linux":\n'  # ru_maxrss would count what the parent held when it forked
            '    print([int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line][0] / 1e3)\n'
            'else:\n'
            '    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)\n')
    peak = {}
    for name, path in sources.items():
        done = subprocess.run([sys.executable, '-c', code, str(path), str(tmp_path / 'out')], cwd=ROOT,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peak[name] = float(done.stdout)
    assert peak['small'] < 300 and max(peak.values()) < 1.2 * peak['small'], peak  # MB


# ----------------------------------------------------------------------------------------------------------------------
# the scripts, as a person runs them: from another folder, in a copy of the repository

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    root = tmp_path_factory.mktemp('repository')
    for path in [*ROOT.glob('*.py'), *ROOT.glob('data/*/prepare.py')]:
        target = root / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return root


def prepare(copy, name, *arguments, cwd, ok=True, env=OFFLINE):
    done = subprocess.run([sys.executable, str(copy / 'data' / name / 'prepare.py'), *arguments], cwd=cwd, env=env,
                          capture_output=True, text=True)
    assert 'Traceback' not in done.stderr
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout if ok else done.stderr


@pytest.fixture
def play(tmp_path):
    """Tiny Shakespeare where it is at hand, else some made-up text."""
    if SHAKESPEARE.exists():
        return SHAKESPEARE
    (tmp_path / 'play.txt').write_text(words(20_000), encoding='utf-8')
    return tmp_path / 'play.txt'


def test_shakespeare_char(copy, play, tmp_path):
    said = prepare(copy, 'shakespeare_char', f'--input={play}', cwd=tmp_path)
    assert 'python train.py config/train_shakespeare_char.py' in said
    folder = copy / 'data' / 'shakespeare_char'
    text = play.read_text(encoding='utf-8')
    stoi = {char: i for i, char in enumerate(sorted(set(text)))}
    assert ids(folder, 'train').tolist() == [stoi[char] for char in text[:int(len(text) * 0.9)]]
    assert ids(folder, 'val').tolist() == [stoi[char] for char in text[int(len(text) * 0.9):]]
    meta = pickle.loads((folder / 'meta.pkl').read_bytes())
    assert meta == {'vocab_size': len(stoi), 'stoi': stoi, 'itos': {i: char for char, i in stoi.items()}}
    assert tokenizer.from_meta_pkl(folder / 'meta.pkl').chars == sorted(stoi)
    if play == SHAKESPEARE:
        assert (len(ids(folder, 'train')), len(ids(folder, 'val'))) == (1_003_854, 111_540)
        assert json.loads((folder / 'meta.json').read_text())['sha256'] == download.file_sha256(SHAKESPEARE)


def test_shakespeare_bpe(copy, play, tmp_path):
    tok = load_or_skip('gpt2')
    prepare(copy, 'shakespeare', f'--input={play}', cwd=tmp_path)
    folder = copy / 'data' / 'shakespeare'
    text = play.read_text(encoding='utf-8')
    assert ids(folder, 'train').tolist() == tok.encode(text[:int(len(text) * 0.9)])
    assert ids(folder, 'val').tolist() == tok.encode(text[int(len(text) * 0.9):])
    if play == SHAKESPEARE:
        assert (len(ids(folder, 'train')), len(ids(folder, 'val'))) == (301_966, 36_059)


def test_input_txt_beside_the_script_is_used(copy, tmp_path):
    folder = copy / 'data' / 'shakespeare_char'
    (folder / 'input.txt').write_text('abcdefghij' * 10)
    assert '90 tokens' in prepare(copy, 'shakespeare_char', cwd=tmp_path)
    (folder / 'input.txt').unlink()


def test_shakespeare_offline(copy, tmp_path):
    said = prepare(copy, 'shakespeare_char', cwd=tmp_path, ok=False)
    assert 'offline' in said and 'python data/shakespeare_char/prepare.py --input=FILE' in said


def test_python_stdlib(copy, tmp_path):
    started = time.time()
    said = prepare(copy, 'python_stdlib', f'--out_dir={tmp_path / "a"}', cwd=tmp_path)
    assert time.time() - started < 30
    assert 'python train.py config/quickstart.py' in said
    prepare(copy, 'python_stdlib', f'--out_dir={tmp_path / "b"}', cwd=tmp_path)
    for name in ('train.bin', 'val.bin', 'meta.json'):
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
    train, val = ids(tmp_path / 'a', 'train'), ids(tmp_path / 'a', 'val')
    assert len(train) > 5_000_000 and 350_000 <= len(val) < 410_000
    val_files = set(bytes(val.astype(np.uint8)).decode().split('\n\n\n'))
    assert len(val_files) > 20
    with open(os.path.join(os.path.dirname(os.__file__), 'argparse.py'), encoding='utf-8') as file:
        source = file.read()
    text = bytes(train.astype(np.uint8)).decode() + bytes(val.astype(np.uint8)).decode()
    assert source + '\n\n' in text


def test_text_from_a_file(copy, tmp_path):
    (tmp_path / 'My Book.txt').write_text(words(1000), encoding='utf-8')
    said = prepare(copy, 'text', '--input=My Book.txt', '--tokenizer=char', cwd=tmp_path)
    assert 'next:  python train.py config/quickstart.py --dataset=My_Book --out_dir=out-My_Book\n' in said
    folder = copy / 'data' / 'My_Book'
    tok = tokenizer.from_dict(json.loads((folder / 'meta.json').read_text())['tokenizer'])
    assert tok.decode(ids(folder, 'train')) + tok.decode(ids(folder, 'val')) == words(1000)
    tok.save(tmp_path / 'my.json')
    for again in ('byte', 'word', tmp_path / 'my.json'):
        prepare(copy, 'text', '--input=My Book.txt', f'--tokenizer={again}', cwd=tmp_path)
    assert json.loads((folder / 'meta.json').read_text())['tokenizer'] == tok.to_dict()


@pytest.mark.parametrize('count', [5, 400])
def test_text_from_rows(copy, tmp_path, count):
    documents = [words(20, seed) for seed in range(count)]
    (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps({'body': text}) + '\n' for text in documents))
    prepare(copy, 'text', '--input=rows.jsonl', '--text_key=body', f'--name=rows{count}', cwd=tmp_path)
    folder = copy / 'data' / f'rows{count}'
    train, val = (bytes(ids(folder, split).astype(np.uint8)).decode() for split in ('train', 'val'))
    if count == 5:  # few documents: the end of each
        assert train == ''.join(text[:int(len(text) * 0.9)] + '\n\n' for text in documents)
        assert val == ''.join(text[int(len(text) * 0.9):] + '\n\n' for text in documents)
    else:  # many: whole ones
        assert all((text in train) != (text in val) for text in documents)
        assert 0.05 < len(val) / len(train + val) < 0.15


def test_text_folder_says_what_it_left_out(copy, tmp_path):
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes' / 'a.md').write_text(words(100), encoding='utf-8')
    (tmp_path / 'notes' / 'b.png').write_bytes(b'\x89PNG')
    done = subprocess.run([sys.executable, str(copy / 'data/text/prepare.py'), '--input=notes'], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and '1 more were left out' in done.stderr


@pytest.mark.parametrize('arguments, message', [
    (['--name=shakespeare'], 'data/shakespeare is a dataset with its own prepare.py; .*--name=my_shakespeare'),
    (['--name=text'], 'data/text is a dataset with its own'),
    (['--name=../outside'], 'not a plain name'),
    (['--name=theirs'], 'train.bin that this script did not make'),
    (['--tokenizer=gpt9'], 'unknown tokenizer .gpt9.*did you mean gpt2'),
    (['--val_fraction=5'], 'val_fraction is 5.0; expected'),
    (['--input=nothing.txt'], 'nothing.txt does not exist'),
    (['--vall_fraction=0.2'], 'unrecognized arguments: --vall_fraction'),
    (['--num_proc=0'], "argument --num_proc: '0' is not a whole number of 1 or more"),
    (['--shard_tokens=1.5'], "argument --shard_tokens: '1.5' is not a whole number of 1 or more, such as 1000 or 1e9"),
    (['--shard_tokens=inf'], "argument --shard_tokens: 'inf' is not"),
    (['--vocab_size=100'], '--vocab_size=100 does not go with --tokenizer=byte'),
])
def test_text_refuses(copy, tmp_path, arguments, message):
    (copy / 'data' / 'theirs').mkdir(exist_ok=True)
    (copy / 'data' / 'theirs' / 'train.bin').write_bytes(b'precious')
    before = sorted(str(path) for path in copy.rglob('*'))
    (tmp_path / 'a.txt').write_text(words(100), encoding='utf-8')
    import re
    assert re.search(message, prepare(copy, 'text', '--input=a.txt', *arguments, cwd=tmp_path, ok=False))
    assert sorted(str(path) for path in copy.rglob('*')) == before


@pytest.mark.parametrize('out_dir, dataset, name', [
    ('mine', './mine', 'mine'), ('mine/', './mine', 'mine'), ('runs/my books.v2', 'runs/my books.v2', 'my_books.v2'),
    ('data/sums', 'data/sums', 'sums'), ('{}/mine', './mine', 'mine')])
def test_another_folder(tmp_path, monkeypatch, out_dir, dataset, name):
    """What is said of it leads train.py to it."""
    monkeypatch.chdir(tmp_path)
    out_dir = out_dir.format(tmp_path)
    assert encode.output_folder(None, 'book.txt', out_dir) == (dataset, name, out_dir)
    os.makedirs(out_dir)
    assert os.path.samefile(datasets.folder_of(dataset), out_dir)
    with pytest.raises(ValueError, match='--name=a and --out_dir=.* both say where to write'):
        encode.output_folder('a', 'book.txt', out_dir)


def test_openwebtext_shard(copy, tmp_path):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq
    tok = load_or_skip('gpt2')
    documents = [words(20, seed) for seed in range(300)]
    (tmp_path / 'shards').mkdir()
    for i in range(2):
        pq.write_table(pa.table({'text': documents[150 * i:150 * i + 150]}), tmp_path / 'shards' / f'{i}.parquet')
    said = prepare(copy, 'openwebtext', '--input=shards', '--val_fraction=0.05', '--num_proc=2', cwd=tmp_path)
    assert '300 documents' in said and 'python train.py config/train_gpt2.py' in said
    expected = {'train': [], 'val': []}
    for split, text in corpus.split_documents(documents, 0.05):
        expected[split] += tok.encode(text) + [50256]
    for split in ('train', 'val'):
        assert ids(copy / 'data' / 'openwebtext', split).tolist() == expected[split]


@pytest.mark.parametrize('name', ['openwebtext', 'fineweb_edu'])
def test_shards_offline(copy, tmp_path, name):
    load_or_skip('gpt2')
    said = prepare(copy, name, f'--out_dir={tmp_path / "out"}', cwd=tmp_path, ok=False)
    assert 'offline' in said and f'python data/{name}/prepare.py --input=FOLDER' in said
    assert prepare(copy, name, '--tokenizer=gpt9', cwd=tmp_path, ok=False).startswith('error: unknown tokenizer')


@pytest.mark.parametrize('name', ['shakespeare', 'shakespeare_char', 'openwebtext', 'fineweb_edu', 'python_stdlib',
                                  'text'])
def test_help(copy, tmp_path, name):
    said = prepare(copy, name, '--help', cwd=tmp_path)
    assert f'python data/{name}/prepare.py' in said and 'python train.py' in said or 'shakespeare' in name
    assert max(map(len, said.splitlines())) <= 120


@POSIX
def test_interrupted_script_goes_on(copy, tmp_path):
    import signal
    with open(tmp_path / 'big.txt', 'w') as file:
        for _ in range(30):
            file.write(('hello world ' * 10 + '\n') * 10_000)
    command = [sys.executable, str(copy / 'data/text/prepare.py'), '--input=big.txt', '--name=big', '--tokenizer=char',
               '--shard_tokens=5e6']
    child = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    folder = copy / 'data' / 'big'
    first = folder / '.train.bin.tmp'
    for _ in range(5000):
        if first.exists() and first.stat().st_size > 9_500_000:  # the first batch is done
            break
        time.sleep(0.002)
    child.send_signal(signal.SIGINT)
    said = child.communicate()[1]
    assert child.returncode == 130 and 'Traceback' not in said
    assert said.split('\n\n')[-1].strip() == 'interrupted' and 'what is encoded so far is kept' in said
    assert f'what is encoded so far is kept in {folder}; the same command goes on from there\n' in said
    assert not (folder / 'train.bin').exists()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and 'going on with the unfinished preparation' in done.stderr
    assert not [name for name in names(folder) if name.startswith('.')]
    shards = [np.fromfile(folder / name, '<u2') for name in names(folder) if name.startswith('train')]
    tok = tokenizer.from_dict(json.loads((folder / 'meta.json').read_text())['tokenizer'])
    text = (tmp_path / 'big.txt').read_text()
    assert len(shards) > 5 and tok.decode(np.concatenate(shards)) == text[:int(len(text) * 0.9)]


def test_produced_files_are_ignored_by_git():
    if not (ROOT / '.git').exists():
        pytest.skip('not a git checkout')
    paths = ['data/x/train.bin', 'data/x/meta.json', 'data/shakespeare/input.txt', 'data/x/.train.bin.tmp',
             'data/shakespeare_char/meta.pkl', 'data/shakespeare/input.txt.part', 'data/x/anything.jsonl',
             'data/x/train-00001.bin', 'data/x/.journal.json', 'data/fineweb_edu/10BT/listing.json',
             'data/fineweb_edu/10BT/000_00000.parquet.part', 'data/shakespeare/prepare.py', 'data/text/README.md']
    done = subprocess.run(['git', 'check-ignore', '--no-index', *paths], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == paths[:-2]


@pytest.mark.parametrize('line, message', [
    ('[' * 200_000, 'line 2, is not JSON'),
    ('{"text": ' + '9' * 5000 + '}', 'line 2, is not JSON: Exceeds the limit'),
], ids=['deep', 'long number'])
def test_json_that_python_cannot_hold(tmp_path, line, message):
    (tmp_path / 'a.jsonl').write_text('{"text": "good"}\n' + line + '\n')
    with pytest.raises(ValueError, match=message):
        list(corpus.read_documents(tmp_path / 'a.jsonl'))


def test_parquet_with_a_text_that_is_not_utf8(tmp_path):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq
    texts = pa.array([b'good', b'bad \xff'], pa.binary()).view(pa.string())
    pq.write_table(pa.table({'text': texts}), tmp_path / 'a.parquet')
    with pytest.raises(ValueError, match=r"a.parquet has a text in the column 'text' that is not UTF-8 .*: ff\)"):
        list(corpus.read_documents(tmp_path / 'a.parquet'))
