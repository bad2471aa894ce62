"""The prepare.py scripts, run from another folder, in a copy of the repository.

Run: pytest tests/test_prepare.py
"""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, load_or_skip
from corpora import ids, names, once, words

import tokenizer
from data import datasets, documents, download, encode

SHAKESPEARE = ROOT.parent / 'shared' / 'data' / 'tinyshakespeare' / 'input.txt'
POSIX = pytest.mark.skipif(os.name != 'posix', reason='needs fork and signals')
# A proxy that nobody listens at makes every machine one without a network.
PROXIES = dict.fromkeys(('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'),
                        'http://127.0.0.1:9')
OFFLINE = {**os.environ, 'no_proxy': '', 'NO_PROXY': '', **PROXIES}
OFFLINE.pop('PYTHONPATH', None)


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    root = tmp_path_factory.mktemp('repository')
    rooms = [path for room in ('config', 'flatgpt', 'posttrain', 'tokenizer')
             for path in ROOT.glob(f'{room}/**/*.py')]
    for path in [*ROOT.glob('*.py'), *ROOT.glob('data/*.py'), *ROOT.glob('data/*/prepare.py'),
                 *rooms]:
        target = root / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return root


def prepare(copy, name, *arguments, cwd, ok=True, env=OFFLINE):
    done = subprocess.run([sys.executable, str(copy / 'data' / name / 'prepare.py'), *arguments],
                          cwd=cwd, env=env,
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
    assert meta == {'vocab_size': len(stoi), 'stoi': stoi,
                    'itos': {i: char for char, i in stoi.items()}}
    assert tokenizer.from_meta_pkl(folder / 'meta.pkl').chars == sorted(stoi)
    if play == SHAKESPEARE:
        assert (len(ids(folder, 'train')), len(ids(folder, 'val'))) == (1_003_854, 111_540)
        meta = json.loads((folder / 'meta.json').read_text())
        assert meta['sha256'] == download.file_sha256(SHAKESPEARE)


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
    said = prepare(copy, 'python_stdlib', f'--out_dir={tmp_path / "a"}', cwd=tmp_path)
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
    assert ('next:  python train.py config/quickstart.py --dataset=My_Book '
            '--out_dir=out-My_Book\n') in said
    folder = copy / 'data' / 'My_Book'
    tok = tokenizer.from_dict(json.loads((folder / 'meta.json').read_text())['tokenizer'])
    assert tok.decode(ids(folder, 'train')) + tok.decode(ids(folder, 'val')) == words(1000)
    tok.save(tmp_path / 'my.json')
    for again in ('byte', 'word', tmp_path / 'my.json'):
        prepare(copy, 'text', '--input=My Book.txt', f'--tokenizer={again}', cwd=tmp_path)
    assert json.loads((folder / 'meta.json').read_text())['tokenizer'] == tok.to_dict()


@pytest.mark.parametrize('count', [5, 400])
def test_text_from_rows(copy, tmp_path, count):
    texts = [words(20, seed) for seed in range(count)]
    (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps({'body': text}) + '\n'
                                                 for text in texts))
    prepare(copy, 'text', '--input=rows.jsonl', '--text_key=body', f'--name=rows{count}',
            cwd=tmp_path)
    folder = copy / 'data' / f'rows{count}'
    train, val = (bytes(ids(folder, split).astype(np.uint8)).decode() for split in ('train', 'val'))
    if count == 5:  # few documents: the end of each
        assert train == ''.join(text[:int(len(text) * 0.9)] + '\n\n' for text in texts)
        assert val == ''.join(text[int(len(text) * 0.9):] + '\n\n' for text in texts)
    else:  # many: whole ones
        assert all((text in train) != (text in val) for text in texts)
        assert 0.05 < len(val) / len(train + val) < 0.15


def test_text_folder_says_what_it_left_out(copy, tmp_path):
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes' / 'a.md').write_text(words(100), encoding='utf-8')
    (tmp_path / 'notes' / 'b.png').write_bytes(b'\x89PNG')
    done = subprocess.run([sys.executable, str(copy / 'data/text/prepare.py'), '--input=notes'],
                          cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and '1 more are left out' in done.stderr


@pytest.mark.parametrize('arguments, message', [
    (['--name=shakespeare'], 'with its own prepare.py; .*--name=my_shakespeare'),
    (['--name=text'], 'data/text is a dataset with its own'),
    (['--name=../outside'], 'not a plain name'),
    (['--name=theirs'], 'train.bin without meta.json'),
    (['--tokenizer=gpt9'], 'unknown tokenizer .gpt9.*did you mean .?gpt2'),
    (['--val_fraction=5'], 'val_fraction is 5.0; expected'),
    (['--input=nothing.txt'], 'nothing.txt does not exist'),
    (['--vall_fraction=0.2'], 'unrecognized arguments: --vall_fraction'),
    (['--num_proc=0'], "argument --num_proc: '0' is not a whole number of 1 or more"),
    (['--shard_tokens=1.5'], "--shard_tokens: '1.5' is not a whole number of 1 or more"),
    (['--shard_tokens=inf'], "argument --shard_tokens: 'inf' is not"),
    (['--vocab_size=100'], '--vocab_size=100 does not apply to --tokenizer=byte'),
])
def test_text_refuses(copy, tmp_path, arguments, message):
    (copy / 'data' / 'theirs').mkdir(exist_ok=True)
    (copy / 'data' / 'theirs' / 'train.bin').write_bytes(b'precious')
    before = sorted(str(path) for path in copy.rglob('*'))
    (tmp_path / 'a.txt').write_text(words(100), encoding='utf-8')
    assert re.search(message, prepare(copy, 'text', *once(['--input=a.txt'], arguments),
                                      cwd=tmp_path, ok=False))
    assert sorted(str(path) for path in copy.rglob('*')) == before


@pytest.mark.parametrize('out_dir, dataset, name', [
    ('mine', './mine', 'mine'), ('mine/', './mine', 'mine'),
    ('runs/my books.v2', 'runs/my books.v2', 'my_books.v2'),
    ('data/sums', 'data/sums', 'sums'), ('{}/mine', './mine', 'mine')])
def test_another_folder(tmp_path, monkeypatch, out_dir, dataset, name):
    """What is said of it leads train.py to it."""
    monkeypatch.chdir(tmp_path)
    out_dir = out_dir.format(tmp_path)
    assert encode.output_folder(None, 'book.txt', out_dir) == (dataset, name, out_dir)
    os.makedirs(out_dir)
    assert os.path.samefile(datasets.folder_of(dataset), out_dir)
    with pytest.raises(ValueError, match='--name=a and --out_dir=.* both name the folder'):
        encode.output_folder('a', 'book.txt', out_dir)


def test_openwebtext_shard(copy, tmp_path):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq
    tok = load_or_skip('gpt2')
    texts = [words(20, seed) for seed in range(300)]
    (tmp_path / 'shards').mkdir()
    for i in range(2):
        pq.write_table(pa.table({'text': texts[150 * i:150 * i + 150]}),
                       tmp_path / 'shards' / f'{i}.parquet')
    said = prepare(copy, 'openwebtext', '--input=shards', '--val_fraction=0.05', '--num_proc=2',
                   cwd=tmp_path)
    assert '300 documents' in said and 'python train.py config/train_gpt2.py' in said
    expected = {'train': [], 'val': []}
    for split, text in documents.split_documents(texts, 0.05):
        expected[split] += tok.encode(text) + [50256]
    for split in ('train', 'val'):
        assert ids(copy / 'data' / 'openwebtext', split).tolist() == expected[split]


@pytest.mark.parametrize('name', ['openwebtext', 'fineweb_edu'])
def test_shards_offline(copy, tmp_path, name):
    load_or_skip('gpt2')
    said = prepare(copy, name, f'--out_dir={tmp_path / "out"}', cwd=tmp_path, ok=False)
    assert 'offline' in said and f'python data/{name}/prepare.py --input=FOLDER' in said
    assert prepare(copy, name, '--tokenizer=gpt9', cwd=tmp_path,
                   ok=False).startswith('error: unknown tokenizer')


@pytest.mark.parametrize('name', ['shakespeare', 'shakespeare_char', 'openwebtext', 'fineweb_edu',
                                  'python_stdlib', 'python_bpe',
                                  'text'])
def test_help(copy, tmp_path, name):
    said = prepare(copy, name, '--help', cwd=tmp_path)
    assert f'python data/{name}/prepare.py' in said and 'python train.py' in said
    assert max(map(len, said.splitlines())) <= 120


@POSIX
def test_interrupted_script_goes_on(copy, tmp_path):
    with open(tmp_path / 'big.txt', 'w') as file:
        for _ in range(8):
            file.write(('hello world ' * 10 + '\n') * 10_000)
    command = [sys.executable, str(copy / 'data/text/prepare.py'), '--input=big.txt', '--name=big',
               '--tokenizer=char',
               '--shard_tokens=1e6']
    child = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    folder = copy / 'data' / 'big'
    while not (folder / '.progress.json').exists():  # the first shard is finished
        assert child.poll() is None
        time.sleep(0.002)
    child.send_signal(signal.SIGINT)
    said = child.communicate()[1]
    assert child.returncode == 130 and 'Traceback' not in said
    assert said.split('\n\n')[-1].strip() == 'interrupted'
    assert f'shards are kept in {folder}; the same command continues after them\n' in said
    assert not (folder / 'train.bin').exists()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and 'continuing the unfinished preparation' in done.stderr
    assert not [name for name in names(folder) if name.startswith('.')]
    shards = [np.fromfile(folder / name, '<u2') for name in names(folder)
              if name.startswith('train')]
    tok = tokenizer.from_dict(json.loads((folder / 'meta.json').read_text())['tokenizer'])
    text = (tmp_path / 'big.txt').read_text()
    assert len(shards) > 5 and tok.decode(np.concatenate(shards)) == text[:int(len(text) * 0.9)]


def test_produced_files_are_ignored_by_git():
    if not (ROOT / '.git').exists():
        pytest.skip('not a git checkout')
    paths = ['data/x/train.bin', 'data/x/meta.json', 'data/shakespeare/input.txt',
             'data/x/.train.bin.tmp',
             'data/shakespeare_char/meta.pkl', 'data/shakespeare/input.txt.part',
             'data/x/anything.jsonl',
             'data/x/train-00001.bin', 'data/x/.progress.json', 'data/fineweb_edu/shards/.cache/x',
             'data/fineweb_edu/shards/sample/10BT/000_00000.parquet',
             'data/shakespeare/prepare.py', 'data/text/README.md', 'data/README.md',
             'data/documents.py']
    done = subprocess.run(['git', 'check-ignore', '--no-index', *paths], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout.splitlines() == paths[:-4]


