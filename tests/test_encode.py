"""data/encode.py: what it writes, and what it refuses. Run: pytest tests/test_encode.py"""

import hashlib
import json
import os
import random

import numpy as np
import pytest
from conftest import load_or_skip
from corpora import NEW, OLD, contents, ids, names, words, write, write_pieces
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer
from data import documents, encode
from tokenizer import base

# what is written ---------------------------------------------------------------------------------

def test_dataset(tmp_path):
    texts = [words(10, seed) for seed in range(40)]
    meta = write(tmp_path, texts)
    assert names(tmp_path) == ['meta.json', 'train.bin', 'train_documents.bin', 'val.bin', 'val_documents.bin']
    assert meta == json.loads((tmp_path / 'meta.json').read_text())
    for split in ('train', 'val'):
        chosen = [text + '\n\n' for side, text in documents.split_documents(texts, 0.3)
                  if side == split]
        assert bytes(ids(tmp_path, split).astype(np.uint8)).decode() == ''.join(chosen)
        assert meta['tokens'][split] == len(ids(tmp_path, split)) == meta['bytes'][split]
        assert meta['documents'][split] == len(chosen)
        lengths = np.fromfile(tmp_path / f'{split}_documents.bin', '<u4')
        assert lengths.tolist() == [len(text.encode()) for text in chosen]
    whole = ''.join(text + '\n\n' for text in texts)
    assert meta['sha256'] == hashlib.sha256(whole.encode()).hexdigest()
    assert (meta['version'], meta['dtype'], meta['vocab_size']) == (2, 'uint16', 256)
    assert meta['files'] == {split: [[f'{split}.bin', meta['tokens'][split]]]
                             for split in ('train', 'val')}
    assert isinstance(tokenizer.from_dict(meta['tokenizer']), tokenizer.ByteTokenizer)


def test_separator_is_in_a_char_vocabulary(tmp_path):
    texts = ['no line end in any', 'of these documents']

    def corpus(documents_end):
        return encode.Corpus(lambda: documents.split_each(texts, 0.5), documents_end, '', 0.5)

    tok = encode.make_tokenizer('char', corpus(True))
    encode.write_dataset(tmp_path, corpus(True), tok)
    assert tok.decode(ids(tmp_path, 'val')).endswith('\n\n')
    assert '\n' not in encode.make_tokenizer('char', corpus(False)).chars


@pytest.mark.parametrize('name', ['bpe', 'word'])
def test_vocabularies_are_trained_on_the_training_split(tmp_path, name):
    """What only val has gets no token of its own, and training again gives the same vocabulary."""
    texts = [f'plenty of ordinary words, number {i}' for i in range(40)]
    held_out = [f'{text} quixotic zeugma quixotic zeugma' for text in texts]

    def pieces():
        for text, secret in zip(texts, held_out, strict=True):
            yield 'train', text
            yield 'val', secret

    corpus = encode.Corpus(pieces, documents=True, source='', val_fraction=0.5)
    tok = encode.make_tokenizer(name, corpus, vocab_size=300)
    assert tok.to_dict() == encode.make_tokenizer(name, corpus, vocab_size=300).to_dict()
    assert tok.vocab_size <= 300 and tok.eot is not None
    encode.write_dataset(tmp_path, corpus, tok)
    ends = ids(tmp_path, 'train')
    assert (ends == tok.eot).sum() == 40
    assert tok.decode(ends[ends != tok.eot]) == ''.join(texts)
    assert len(tok.encode('plenty')) == 1 < len(tok.encode('quixotic')) or name == 'word'
    assert name == 'bpe' or 'quixotic' not in ''.join(tok.to_dict()['words'])


def test_end_of_text_ids(tmp_path):
    gpt2 = load_or_skip('gpt2')
    texts = [words(10, seed) for seed in range(40)]
    meta = write(tmp_path, texts, tok=gpt2)
    for split in ('train', 'val'):
        expected = []
        for side, text in documents.split_documents(texts, 0.3):
            expected += gpt2.encode(text) + [50256] if side == split else []
        assert ids(tmp_path, split).tolist() == expected
    assert sum(meta['bytes'].values()) == len(''.join(texts).encode())


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
    pattern = {'bytes': None, 'own': '(?s:.{1,7})'}.get(kind, kind)
    return tokenizer.BPETokenizer.train([text], 275, pattern=pattern)


KINDS = ['gpt2', 'gpt4', 'bytes', 'own', 'word', 'byte', 'char']


@pytest.mark.parametrize('kind', KINDS)
def test_a_running_text_has_the_ids_of_the_whole(tmp_path, monkeypatch, kind):
    """Wherever its pieces are cut: the files are those of the text encoded at once."""
    monkeypatch.setattr(encode, 'BATCH_CHARS', 1000)
    monkeypatch.setattr(base, 'STREAM_CHARS', 200)
    rng = random.Random(1)
    texts = {'train': words(2000, 1) + ' \n\n \t\n' * 100 + 'x' * 1500 + words(500, 2),
             'val': words(300, 3)}
    tok = of_kind(kind, texts['train'] + texts['val'])
    pieces = []
    for split, text in texts.items():
        at = sorted({0, len(text), *rng.sample(range(len(text)), len(text) // 90)})
        pieces += [(split, text[i:j]) for i, j in zip(at, at[1:], strict=False)]
    meta = write_pieces(tmp_path, pieces, tok, documents=False)
    for split, text in texts.items():
        assert ids(tmp_path, split).tolist() == tok.encode(text)
    assert meta['sha256'] == hashlib.sha256(''.join(texts.values()).encode()).hexdigest()
    longest = max(len(text) for _, text in encode.cut_safely(pieces, tok))
    # what is held in memory
    assert longest == len(texts['train']) if kind == 'own' else longest < 5000


@pytest.mark.parametrize('kind', KINDS)
def test_a_running_text_goes_on(tmp_path, monkeypatch, capsys, kind):
    """Interrupted again and again, each time a little later, it ends in the same files."""
    monkeypatch.setattr(encode, 'BATCH_CHARS', 2000)
    monkeypatch.setattr(base, 'STREAM_CHARS', 200)
    text = words(2000)
    tok = of_kind(kind, text)
    pieces = [('train', text[i:i + 100]) for i in range(0, len(text), 100)]
    pieces.append(('val', words(100, 4)))

    def prepare(folder, stop=None):
        def until():
            yield from pieces[:stop]
            if stop is not None:
                raise ValueError('broken input')

        return write_pieces(folder, until, tok, documents=False, shard_tokens=700)

    prepare(tmp_path / 'whole')
    for stop in range(10, len(pieces), 23):
        with pytest.raises(ValueError, match='broken input'):
            prepare(tmp_path / 'parts', stop)
    said = capsys.readouterr().err
    prepare(tmp_path / 'parts')
    assert contents(tmp_path / 'parts') == contents(tmp_path / 'whole')
    assert 'starting again' not in said and ('continuing' in said) == (kind != 'own')


def test_uint32_vocabulary(tmp_path):
    tok = tokenizer.CharTokenizer([chr(code) for code in range(0x10000, 0x10000 + 65537)])
    text = chr(0x10000 + 65536) * 10
    meta = write_pieces(tmp_path, [('train', text), ('val', text)], tok, documents=False)
    assert meta['dtype'] == 'uint32' and os.path.getsize(tmp_path / 'val.bin') == 40
    assert ids(tmp_path, 'val').tolist() == [65536] * 10


@pytest.mark.parametrize('workers', [1, 5])
def test_same_bytes_whatever_the_workers(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(encode, 'BATCH_CHARS', 300)
    texts = [words(15, seed) for seed in range(100)]
    write(tmp_path / 'a', texts, tok=load_or_skip('gpt2'), workers=workers)
    monkeypatch.undo()
    write(tmp_path / 'b', texts, tok=tokenizer.load('gpt2'))
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b')


def test_any_order_gives_the_same_split(tmp_path):
    # 20 occur twice
    texts = [words(10, seed) for seed in range(60)] + [words(10, seed) for seed in range(20)]
    splits = []
    for i, order in enumerate((texts, texts[::-1], random.Random(3).sample(texts, len(texts)))):
        write(tmp_path / str(i), order)
        splits.append([bytes(ids(tmp_path / str(i), split).astype(np.uint8)).decode()
                       for split in ('train', 'val')])
    for train, val in splits:
        for text in texts:
            sides = [side.count(text + '\n\n') for side in (train, val)]
            assert sorted(sides) == [0, texts.count(text)]
            assert (sides[1] > 0) == (text + '\n\n' in splits[0][1])


@settings(max_examples=15)
@given(sizes=st.lists(st.integers(1, 60), min_size=20, max_size=60),
       shard_tokens=st.integers(1, 300))
def test_shards(tmp_path_factory, sizes, shard_tokens):
    """End to end they are the one file; a document is whole; none is too large, unless by one
    document."""
    folder = tmp_path_factory.mktemp('shards')
    texts = [chr(97 + i % 26) * n + str(i) for i, n in enumerate(sizes)]
    splits = ['train' if i % 3 else 'val' for i in range(len(sizes))]
    metas = [write_pieces(folder / str(n), lambda: zip(splits, texts, strict=True), shard_tokens=n)
             for n in (10**9, shard_tokens)]
    for split in ('train', 'val'):
        whole, files = (folder / str(10**9) / f'{split}.bin').read_bytes(), metas[1]['files'][split]
        assert [name for name, _ in files] == [
            f'{split}.bin', *(f'{split}-{i:05d}.bin' for i in range(1, len(files)))]
        parts = [(folder / str(shard_tokens) / name).read_bytes() for name, _ in files]
        assert b''.join(parts) == whole
        assert [len(part) // 2 for part in parts] == [n for _, n in files]
        texts = [bytes(np.frombuffer(part, '<u2').astype(np.uint8)).decode() for part in parts]
        assert all(text.endswith('\n\n') for text in texts)
        assert all(len(text) <= shard_tokens or text.count('\n\n') == 1 for text in texts)
        # no shard ends earlier than it has to
        for text, following in zip(texts, texts[1:], strict=False):
            assert len(text) + following.index('\n\n') + 2 > shard_tokens
    assert {**metas[0], 'files': None} == {**metas[1], 'files': None}


def test_stale_shards_go(tmp_path):
    write(tmp_path, OLD, shard_tokens=300)
    assert len(names(tmp_path)) > 6 and 'train-00003.bin' in names(tmp_path)
    tokens = write(tmp_path, NEW)['tokens']
    whole = ['meta.json', 'train.bin', 'train_documents.bin', 'val.bin', 'val_documents.bin']
    assert names(tmp_path) == whole
    larger = max(tokens, key=tokens.get)
    write(tmp_path, NEW, shard_tokens=tokens[larger] - 1)
    second = [f'{larger}-00001.bin', f'{larger}_documents-00001.bin']
    assert names(tmp_path) == sorted([*whole, *second])
    lengths = [np.fromfile(tmp_path / name, '<u4').sum() for name in (f'{larger}_documents.bin', second[1])]
    assert lengths == [len(np.fromfile(tmp_path / name, np.uint16)) for name in (f'{larger}.bin', second[0])]


def test_splits_too_short(tmp_path):
    with pytest.raises(ValueError, match=r'the val split has 0 token\(s\).*larger --val_fraction'):
        write(tmp_path, ['only one document'], 1e-9)
    with pytest.raises(ValueError,
                       match=r'the train split has 0 token\(s\).*smaller --val_fraction'):
        write(tmp_path, ['only one document'], 1 - 1e-9)
    assert names(tmp_path) == []
    with pytest.raises(ValueError, match='val split'):
        write(tmp_path / 'new folder', ['only one document'], 1e-9)
    assert names(tmp_path) == []  # no empty folder is left behind


