"""Test data/tokens.py: the windows of a batch, and errors for damaged data. Run: pytest tests/test_tokens.py"""

import errno
import json
import math
import os
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CHARS, ROOT, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer
from data import datasets, device, encode
from data import tokens as dataloader
from data.shuffle import epoch_places, mix, shuffled
from data.tokens import Cut, eval_windows, even_windows, gather, train_windows, whole_windows

seeds = st.integers(0, 2**63 - 1)


# the order of the windows ---------------------------------------------------------------------------------------------

@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_shuffled_is_a_bijection(n, key):
    places = shuffled(np.arange(n, dtype=np.uint64), n, np.full(n, key, dtype=np.uint64))
    assert sorted(places.tolist()) == list(range(n))


@pytest.mark.parametrize('n', [1, 2, 3, 4, 5, 16, 17, 4096, 4097])
def test_shuffled_at_the_edges(n):
    i = np.arange(n, dtype=np.uint64)
    before = i.copy()
    assert sorted(shuffled(i, n, np.zeros_like(i)).tolist()) == list(range(n))
    assert np.array_equal(i, before)  # the argument is left as it was


@pytest.mark.parametrize('n', [2, 3, 4, 5])
def test_orders_of_few_items_are_equally_frequent(n):
    """Chi-square of all n! orders over 24,000 epochs, below the 99.9th percentile."""
    orders = Counter(tuple(epoch_places(epoch * n, n, n, 7)[0].tolist()) for epoch in range(24_000))
    expected = 24_000 / math.factorial(n)
    chi_square = sum((count - expected) ** 2 / expected for count in orders.values())
    assert len(orders) == math.factorial(n) and chi_square < {2: 10.8, 3: 20.5, 4: 49.7, 5: 172}[n]


def test_shuffled_of_a_huge_range():
    """A billion places: distinct, in range, spread evenly, and not in the order of the indices."""
    n, i = 10**9, np.arange(100_000, dtype=np.uint64)
    places = shuffled(i, n, np.full_like(i, 5)).astype(np.int64)
    assert len(np.unique(places)) == len(i) and places.min() >= 0 and places.max() < n
    counts = np.histogram(places, bins=100, range=(0, n))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 180  # chi-squared of 99 degrees of freedom: 99 +- 14
    assert abs(np.corrcoef(i, places)[0, 1]) < 0.02


def test_shuffled_keys_give_independent_orders():
    i = np.arange(5000, dtype=np.uint64)
    orders = [shuffled(i, 5000, np.full_like(i, key)).astype(float) for key in range(6)]
    for a in range(6):
        for b in range(a):
            assert abs(np.corrcoef(orders[a], orders[b])[0, 1]) < 0.07  # 5 / sqrt(5000)
            assert (orders[a] == orders[b]).sum() < 12  # fixed points are Poisson(1)


def test_mix_by_plain_python():
    def reference(x, key):
        mask = 2**64 - 1
        x = (x + ((2 * key | 1) & mask) * 0x9E3779B97F4A7C15) & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    numbers = [0, 1, 2, 12345, 2**63, 2**64 - 1]
    for key in numbers:
        got = mix(np.array(numbers, dtype=np.uint64), np.full(len(numbers), key, dtype=np.uint64))
        assert got.tolist() == [reference(x, key) for x in numbers]


def epochs_of(n_epochs, n_tokens, block_size, seed):
    """The windows' first positions, (n_epochs, windows of an epoch)."""
    per_epoch = (n_tokens + block_size - 3) // block_size + 1
    return train_windows(0, n_epochs * per_epoch, n_tokens, block_size, seed).reshape(n_epochs, per_epoch)


@given(n_tokens=st.integers(2, 5000), block_size=st.integers(1, 300), n=st.integers(1, 50),
       first=st.integers(0, 10**9), seed=seeds)
def test_no_window_out_of_range(n_tokens, block_size, n, first, seed):
    block_size = min(block_size, n_tokens - 1)
    starts = train_windows(first, n, n_tokens, block_size, seed)
    assert starts.shape == (n,) and starts.dtype == np.int64
    assert starts.min() >= 0 and starts.max() + block_size + 1 <= n_tokens


@given(n_tokens=st.integers(2, 2000), block_size=st.integers(1, 300), seed=seeds)
def test_every_token_is_a_target_in_every_epoch(n_tokens, block_size, seed):
    """All but the first, which nothing precedes; and at most two windows more than the text has."""
    block_size = min(block_size, n_tokens - 1)
    for starts in epochs_of(3, n_tokens, block_size, seed):
        targets = np.unique(starts[:, None] + np.arange(1, block_size + 1))
        assert targets.tolist() == list(range(1, n_tokens))
        assert (len(starts) - 2) * block_size < n_tokens - 1
        inner = np.unique(starts)[1:-1]  # end to end between the first and the last
        assert (np.diff(inner) == block_size).all()


def test_epochs_differ_in_offset_and_order():
    n_tokens, block_size = 100_064, 64
    epochs = epochs_of(20, n_tokens, block_size, 1)
    assert len({np.sort(epoch)[1] for epoch in epochs}) > 12  # of 64 offsets
    assert len({tuple(np.argsort(epoch)) for epoch in epochs}) == 20
    assert len(np.unique(epochs)) > 12 * epochs.shape[1]  # windows that no other epoch cuts like this


@given(first=st.integers(0, 10**6), n=st.integers(1, 40), seed=seeds)
def test_pure_function_of_seed_and_place(first, n, seed):
    starts = train_windows(first, n, 9999, 16, seed)
    assert np.array_equal(starts, train_windows(first, n, 9999, 16, seed))
    # n at once are n times one: how many windows came before is all that counts
    assert starts.tolist() == [train_windows(first + i, 1, 9999, 16, seed)[0] for i in range(n)]


def test_other_seeds_other_batches():
    a, b = (train_windows(0, 1000, 10**6, 16, seed) for seed in (1, 2))
    assert (a == b).mean() < 0.01 and abs(np.corrcoef(a, b)[0, 1]) < 0.16


@given(n_tokens=st.integers(2, 3000), block_size=st.integers(1, 100))
def test_whole_windows_cover_each_target_once(n_tokens, block_size):
    tokens = np.arange(n_tokens)
    x, y = gather(tokens, whole_windows(n_tokens, block_size), block_size, n_tokens)
    assert y[y >= 0].tolist() == list(range(1, n_tokens))
    assert torch.equal(x[y >= 0] + 1, y[y >= 0])


@given(n_windows=st.integers(1, 100), n_tokens=st.integers(2, 3000), block_size=st.integers(1, 100))
def test_even_windows_stay_inside(n_windows, n_tokens, block_size):
    block_size = min(block_size, n_tokens - 1)
    starts = even_windows(n_windows, n_tokens, block_size)
    assert len(starts) == n_windows and starts.min() >= 0 and starts.max() + block_size + 1 <= n_tokens
    assert n_windows == 1 or starts.max() + block_size + 1 == n_tokens


def test_gather_by_hand():
    x, y = gather(np.array([5, 6, 7, 8, 9], dtype=np.uint16), [0, 2, 3], 3, 10)
    assert x.tolist() == [[5, 6, 7], [7, 8, 9], [8, 9, 0]]
    assert y.tolist() == [[6, 7, 8], [8, 9, -1], [9, -1, -1]]
    assert x.dtype == y.dtype == torch.int64


def test_gather_names_an_id_beyond_the_vocabulary():
    tokens = np.array([1, 2, 3, 500, 4, 5], dtype=np.uint16)
    with pytest.raises(ValueError, match='token 3 of the data has id 500; expected an id below vocab_size=500'):
        gather(tokens, [0, 1], 3, 500)
    gather(tokens, [0, 1], 3, 501)


# files ----------------------------------------------------------------------------------------------------------------

def opened(folder, split='train', block_size=8):
    return dataloader.open_tokens(str(folder), split, datasets.load_meta(str(folder)), block_size)


@pytest.mark.parametrize('dtype', ['uint16', 'uint32'])
def test_round_trip(tmp_path, dtype):
    ids = np.arange(100) * (655 if dtype == 'uint16' else 700_000)
    write_dataset(tmp_path, ids, ids[:20], dtype)
    assert np.array_equal(opened(tmp_path), ids) and np.array_equal(opened(tmp_path, 'val'), ids[:20])
    meta = datasets.load_meta(str(tmp_path))
    assert meta['dtype'] == np.dtype(dtype) and meta['tokens'] == {'train': 100, 'val': 20}
    assert meta['vocab_size'] == len(CHARS) and meta['tokenizer'] == {'kind': 'char', 'chars': ''.join(CHARS)}


def test_nanogpts_folders(tmp_path):
    """Headerless uint16, with a meta.pkl or without anything."""
    write_dataset(tmp_path / 'pkl', np.arange(20), np.arange(10), meta='pkl')
    meta = datasets.load_meta(str(tmp_path / 'pkl'))
    assert meta == {'digest': meta['digest'], 'dtype': np.dtype('uint16'), 'vocab_size': len(CHARS), 'tokens': None, 'files': None,
                    'tokenizer': {'kind': 'char', 'chars': ''.join(CHARS)}, 'row': None, 'chat_template': None}
    write_dataset(tmp_path / 'bare', np.arange(20), np.arange(10), meta=None)
    meta = datasets.load_meta(str(tmp_path / 'bare'))
    assert meta == dict.fromkeys(meta, None) | {'dtype': np.dtype('uint16'), 'digest': meta['digest']}
    assert opened(tmp_path / 'bare').tolist() == list(range(20))


def test_meta_pkl_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)

    write_dataset(tmp_path, np.arange(20), np.arange(10), meta=None)
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 1, 'stoi': Evil(), 'itos': {}}))
    with pytest.raises(ValueError, match='meta.pkl was refused'):
        datasets.load_meta(str(tmp_path))
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('cut', [1, 2, 20])
@pytest.mark.parametrize('meta', ['json', 'pkl'])
def test_truncated(tmp_path, cut, meta):
    """meta.json tells the length; without one only half a token can be told."""
    write_dataset(tmp_path, np.arange(100), np.arange(20), meta=meta)
    path = tmp_path / 'train.bin'
    path.write_bytes(path.read_bytes()[:-cut])
    if meta == 'json' or cut % 2:
        with pytest.raises(ValueError) as error:
            opened(tmp_path)
        assert str(path) in str(error.value) and f'{200 - cut} bytes' in str(error.value)
        assert f'--out_dir={tmp_path}' in str(error.value)
    else:
        assert len(opened(tmp_path)) == 100 - cut // 2


def test_too_short(tmp_path):
    write_dataset(tmp_path, np.arange(100), np.arange(8))
    with pytest.raises(ValueError, match='val.bin has 8 tokens, fewer than block_size [+] 1 = 9.*--block_size=7'):
        opened(tmp_path, 'val', 8)
    assert len(opened(tmp_path, 'val', 7)) == 8  # the suggestion works
    with pytest.raises(ValueError, match='block_size [+] 1 = 101'):
        opened(tmp_path, 'train', 100)
    write_dataset(tmp_path, np.arange(100), [])
    with pytest.raises(ValueError, match='val.bin has 0 tokens'):
        opened(tmp_path, 'val', 8)


@pytest.mark.parametrize('damage', [
    lambda meta: '', lambda meta: '{', lambda meta: '[]', lambda meta: 'null', lambda meta: '"text"',
    lambda meta: json.dumps({**meta, 'dtype': 'uint17'}), lambda meta: json.dumps({**meta, 'tokens': 5}),
    lambda meta: json.dumps({**meta, 'vocab_size': None}), lambda meta: json.dumps({**meta, 'tokenizer': 'char'}),
    lambda meta: json.dumps({**meta, 'tokens': {'train': 3}}), lambda meta: json.dumps(meta)[:-9],
    *[lambda meta, key=key: json.dumps({k: v for k, v in meta.items() if k != key})
      for key in ('dtype', 'vocab_size', 'tokens', 'tokenizer')]])
def test_damaged_meta_json(tmp_path, damage):
    write_dataset(tmp_path, np.arange(100), np.arange(20))
    path = tmp_path / 'meta.json'
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(ValueError) as error:
        datasets.load_meta(str(tmp_path))
    assert f'{path} is damaged' in str(error.value) and f'--out_dir={tmp_path}' in str(error.value)


def test_meta_json_that_is_no_text(tmp_path):
    write_dataset(tmp_path, np.arange(100), np.arange(20))
    (tmp_path / 'meta.json').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match='is damaged'):
        datasets.load_meta(str(tmp_path))


def write_shards(folder, ids, lengths, val=20, dtype='uint16'):
    """ids as train.bin, train-00001.bin, ... of these lengths."""
    write_dataset(folder, ids, np.arange(val), dtype)
    meta = json.loads((folder / 'meta.json').read_text())
    files = [['train.bin' if i == 0 else f'train-{i:05d}.bin', n] for i, n in enumerate(lengths)]
    for (name, _), part in zip(files, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
        part.astype(dtype).tofile(folder / name)
    (folder / 'meta.json').write_text(json.dumps({**meta, 'files': {'train': files, 'val': [['val.bin', val]]}}))


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(0, 400), min_size=1, max_size=8), block_size=st.integers(1, 64), seed=seeds,
       dtype=st.sampled_from(['uint16', 'uint32']))
def test_shards_give_the_batches_of_one_file(tmp_path_factory, lengths, block_size, seed, dtype):
    """Bit for bit, at every step and whatever the number of processes; also where a window spans several files."""
    folder = tmp_path_factory.mktemp('shards')
    ids = np.random.default_rng(seed).integers(0, 60_000, sum(lengths)).astype(dtype)
    if len(ids) < 2:
        return
    block_size = min(block_size, len(ids) - 1)
    write_dataset(folder / 'one', ids, ids[:20], dtype)
    write_shards(folder / 'many', ids, lengths, dtype=dtype)
    one, many = opened(folder / 'one', block_size=block_size), opened(folder / 'many', block_size=block_size)
    assert len(many) == len(one) == len(ids)
    for first in (0, 6, 12):
        starts = train_windows(first, 6, len(one), block_size, seed)
        for rank in (starts, starts[:3], starts[3:]):
            for a, b in zip(gather(one, rank, block_size, 65_536), gather(many, rank, block_size, 65_536), strict=True):
                assert torch.equal(a, b) and a.dtype == b.dtype
    everything = whole_windows(len(many), block_size)
    assert torch.equal(gather(one, everything, block_size, 65_536)[1], gather(many, everything, block_size, 65_536)[1])


@settings(max_examples=40)
@given(lengths=st.lists(st.integers(0, 300), min_size=1, max_size=5), block_size=st.integers(1, 64), seed=seeds,
       dtype=st.sampled_from(['uint16', 'uint32']))
def test_tokens_on_a_device_give_the_same_batches(tmp_path_factory, lengths, block_size, seed, dtype):
    """Bit for bit, with ids that a signed number of as many bits would not hold, and past the end of the tokens."""
    largest = 2**16 if dtype == 'uint16' else 2**32
    ids = np.random.default_rng(seed).integers(0, largest, sum(lengths)).astype(dtype)
    if len(ids) < 2:
        return
    block_size = min(block_size, len(ids) - 1)
    folder = tmp_path_factory.mktemp('device')
    write_shards(folder, ids, lengths, dtype=dtype)
    tokens = opened(folder, block_size=block_size)
    on_device = device.DeviceTokens(tokens, torch.device('cpu'), largest)
    assert len(on_device) == len(tokens)
    for starts in (train_windows(3, 6, len(ids), block_size, seed), whole_windows(len(ids), block_size)):
        for a, b in zip(gather(tokens, starts, block_size, largest), gather(on_device, starts, block_size, largest),
                        strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype
    i = int(ids.argmax())
    with pytest.raises(ValueError, match=f'token {i:,} of the data has id {ids[i]}; expected an id below vocab_size={ids[i]}'):
        device.DeviceTokens(tokens, torch.device('cpu'), int(ids[i]))
    assert not device.fits_on(torch.device('cpu'), [tokens])  # it is there already


def test_tokens_that_fit_on_a_gpu(monkeypatch):
    """Less than a tenth of what is free, and than a gigabyte."""
    gpu, free = torch.device('cuda', 0), [10**6]
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (free[0], 10**12))
    small, large = np.zeros(30_000, dtype=np.uint16), np.broadcast_to(np.uint16(0), 2**29)
    assert device.fits_on(gpu, [small, dataloader.Shards([small[:10_000], small[:5000]])])
    assert not device.fits_on(gpu, [small, dataloader.Rows(small, small, 100)])
    assert not device.fits_on(gpu, [small, small])
    free[0] = 10**12
    assert device.fits_on(gpu, [small, large[:-30_001]]) and not device.fits_on(gpu, [small, large])
    assert not device.fits_on(gpu, [small.astype(np.int64)])


def test_a_prepared_dataset_in_shards(tmp_path):
    """data/tokens.py reads the files of data/encode.py: the same batches from one file and from many."""
    documents = [('train' if i % 5 else 'val', chr(97 + i % 26) * (i + 3)) for i in range(90)]
    for shard_tokens in (10**9, 700):
        corpus = encode.Corpus(lambda: documents, True, '', 0.2, shard_tokens)
        encode.write_dataset(tmp_path / str(shard_tokens), corpus, tokenizer.ByteTokenizer())
    one, many = opened(tmp_path / str(10**9)), opened(tmp_path / '700')
    assert len(list((tmp_path / '700').glob('train-*.bin'))) >= 4 and isinstance(one, np.ndarray)
    starts = train_windows(0, 300, len(one), 8, 1)
    assert torch.equal(gather(one, starts, 8, 256)[0], gather(many, starts, 8, 256)[0])


def test_damaged_shards(tmp_path):
    ids = np.arange(100)
    write_shards(tmp_path, ids, [40, 40, 20])
    path = tmp_path / 'train-00002.bin'
    with pytest.raises(ValueError, match='fewer than block_size [+] 1 = 101'):
        opened(tmp_path, block_size=100)  # of all three together
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match='train-00002.bin has 38 bytes, expected 40.*again: python'):
        opened(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match='train-00002.bin is missing; prepare the dataset again: python'):
        opened(tmp_path)
    for lengths in ([40, 40], [40, 40, 30], []):
        write_shards(tmp_path, ids, [40, 40, 20])
        meta = json.loads((tmp_path / 'meta.json').read_text())
        meta['files']['train'] = [[name, n] for (name, _), n in zip(meta['files']['train'], lengths, strict=False)]
        (tmp_path / 'meta.json').write_text(json.dumps(meta))
        with pytest.raises(ValueError, match='meta.json is damaged.*do not hold 100 tokens'):
            datasets.load_meta(str(tmp_path))


# datasets that are not there ------------------------------------------------------------------------------------------

def test_missing_dataset_lists_those_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='no dataset in data/novel.*Datasets here: none'):
        datasets.prepare_if_missing('data/novel', True)
    for name in ('poems', 'code'):
        (tmp_path / 'data' / name).mkdir(parents=True)
    with pytest.raises(ValueError) as error:
        datasets.prepare_if_missing('data/novel', True)
    assert 'Datasets here: code, poems' in str(error.value)
    # train.py is elsewhere, and so may the data be
    assert f'The current folder is {tmp_path}; for the datasets of train.py: cd {ROOT}' in str(error.value)
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match='no dataset in data/novel') as error:
        datasets.prepare_if_missing('data/novel', True)
    assert 'current folder' not in str(error.value)
    assert 'python data/text/prepare.py --input=FILE --name=novel' in str(error.value)


def test_prepare_command(tmp_path, monkeypatch):
    """By name what is made beside train.py, or is not there; by its path what is elsewhere."""
    monkeypatch.chdir(tmp_path)
    for folder in ('mine', 'runs/a b', 'data/here'):
        (tmp_path / folder).mkdir(parents=True)
    for data_dir, said in (('data/novel', '--name=novel'), ('data/novel/', '--name=novel'),
                           (ROOT / 'data/x', '--name=x'), ('mine/', '--out_dir=mine'), ('./mine', '--out_dir=mine'),
                           ('data/here', '--out_dir=data/here'), ('runs/a b', "'--out_dir=runs/a b'"),
                           (tmp_path, f'--out_dir={tmp_path}')):
        assert datasets.prepare_command(str(data_dir)) == f'python data/text/prepare.py --input=FILE {said}'


def test_prepare_runs_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'data' / 'novel'
    folder.mkdir(parents=True)
    (folder / 'prepare.py').write_text(
        'import pathlib\nhere = pathlib.Path(__file__).parent\nassert not (here / "train.bin").exists()\n'
        '(here / "val.bin").write_bytes(bytes(40))\n(here / "train.bin").write_bytes(bytes(80))\n')
    datasets.prepare_if_missing('data/novel', True)
    assert len(opened(folder)) == 40 and len(opened(folder, 'val')) == 20
    datasets.prepare_if_missing('data/novel', True)  # would fail its assertion


def test_prepare_that_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'data' / 'novel'
    folder.mkdir(parents=True)
    (folder / 'prepare.py').write_text('raise SystemExit("no network")')
    with pytest.raises(ValueError, match='python data/novel/prepare.py failed'):
        datasets.prepare_if_missing('data/novel', True)


@pytest.mark.parametrize('eval_tokens, expected', [
    (0, range(0, 99, 4)), (100, range(0, 99, 4)), (20, [0, 24, 48, 72, 96]),
    (12, [0, 48, 96]), (1, [0])])
def test_eval_tokens(eval_tokens, expected):
    """Windows of the whole split, evenly spaced."""
    splits = {'train': np.zeros(1000, np.uint16), 'val': np.zeros(100, np.uint16)}
    windows = eval_windows(splits, 2, Cut(8, 4, 8), eval_tokens)
    assert windows['val'].tolist() == list(expected) and len(windows['train']) == min(16, max(8, len(expected)))


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    def memmap(*arguments, **options):
        raise OSError(errno.EMFILE, 'Too many open files')

    (tmp_path / 'train.bin').write_bytes(bytes(100))
    monkeypatch.setattr(np, 'memmap', memmap)
    with pytest.raises(ValueError, match='each of the 1 files .* ulimit -n 4, .* larger --shard_tokens'):
        dataloader.open_tokens(tmp_path, 'train', {'row': None, 'dtype': np.dtype(np.uint16), 'files': None}, 8)
