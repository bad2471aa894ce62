"""download.py against a server on this machine that cuts, corrupts and refuses, and the Hub's API as it answers.

Run: pytest tests/test_download.py (seconds, no network)
"""

import hashlib
import http.server
import io
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import documents as corpus
from data import download, encode

CONTENT = random.Random(0).randbytes(300_000)
SHA = hashlib.sha256(CONTENT).hexdigest()
COMMIT = 'c0ffee' + '0' * 34


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with server.files[path]. server.cuts[path] lists after how many bytes answers to it break off,
    server.refusals[path] the status of its first answers; server.following[path] is the address of its next page."""

    def do_GET(self):
        path, server = self.path, self.server
        server.asked.append((path, self.headers.get('Range')))
        if path not in server.files:
            return self.send_error(404)
        if server.refusals.get(path):
            return self.send_error(server.refusals[path].pop(0))
        content, start = server.files[path], int((self.headers.get('Range') or 'bytes=0-')[6:-1])
        if path in server.ignores_ranges:
            start = 0
        if start and start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(content) - start))
        if path in server.following:
            self.send_header('Link', f'<{server.url}{server.following[path]}>; rel="next"')
        self.end_headers()
        cuts = server.cuts.get(path)
        self.wfile.write(content[start:start + cuts.pop(0)] if cuts else content[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setattr(download, 'RETRY_SECONDS', 0)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
    server.asked, server.files, server.cuts, server.ignores_ranges = [], {'/file': CONTENT}, {}, set()
    server.refusals, server.following = {}, {}
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f'http://127.0.0.1:{server.server_port}'
    yield server
    server.shutdown()
    server.server_close()


def ranges(server):
    return [asked for _, asked in server.asked]


# one file -------------------------------------------------------------------------------------------------------------


def test_download(tmp_path, server):
    download.download(server.url + '/file', tmp_path / 'f', SHA, 'COMMAND')
    assert (tmp_path / 'f').read_bytes() == CONTENT and os.listdir(tmp_path) == ['f']


@pytest.mark.parametrize('have', [1, 123, len(CONTENT) - 1, len(CONTENT)])
@pytest.mark.parametrize('ranges_work', [True, False])
def test_download_goes_on(tmp_path, server, have, ranges_work):
    if not ranges_work:
        server.ignores_ranges.add('/file')
    (tmp_path / 'f.part').write_bytes(CONTENT[:have])
    download.download(server.url + '/file', tmp_path / 'f', SHA, 'COMMAND')
    assert ranges(server) == [f'bytes={have}-']
    assert (tmp_path / 'f').read_bytes() == CONTENT and os.listdir(tmp_path) == ['f']


def test_broken_connections(tmp_path, server, capsys):
    server.cuts['/file'] = [100_000, 1, 100_000, 0]
    with pytest.raises(ValueError, match='it ended at 200,001 of 300,000 bytes.*COMMAND The 200,001 bytes.*run again'):
        download.download(server.url + '/file', tmp_path / 'f', SHA, 'COMMAND')  # the last one brought nothing
    assert ranges(server) == [f'bytes={start}-' for start in (0, 100_000, 100_001, 200_001)]
    assert 'going on at 100,000 bytes' in capsys.readouterr().err
    assert os.listdir(tmp_path) == ['f.part']
    download.download(server.url + '/file', tmp_path / 'f', SHA, 'COMMAND')
    assert (tmp_path / 'f').read_bytes() == CONTENT and os.listdir(tmp_path) == ['f']


def test_download_of_something_else(tmp_path, server):
    (tmp_path / 'f').write_bytes(b'precious')
    with pytest.raises(ValueError, match='SHA-256.*expected 0000.*COMMAND'):
        download.download(server.url + '/file', tmp_path / 'f', '0' * 64, 'COMMAND')
    (tmp_path / 'f.part').write_bytes(bytes(1000))  # not the beginning of the file
    with pytest.raises(ValueError, match='SHA-256.*it was removed'):
        download.download(server.url + '/file', tmp_path / 'f', SHA, 'COMMAND')
    with pytest.raises(ValueError, match='404.*COMMAND'):
        download.download(server.url + '/missing', tmp_path / 'f', SHA, 'COMMAND')
    assert (tmp_path / 'f').read_bytes() == b'precious' and os.listdir(tmp_path) == ['f']


def test_a_busy_server_is_asked_again(tmp_path, server, monkeypatch, capsys):
    pauses = []
    monkeypatch.setattr(download.time, 'sleep', pauses.append)
    monkeypatch.setattr(download, 'RETRY_SECONDS', 2)
    server.cuts['/file'] = [1000]
    server.refusals['/file'] = [429, 500, 503]
    download.download(server.url + '/file', tmp_path / 'f', SHA, 'COMMAND')
    assert (tmp_path / 'f').read_bytes() == CONTENT and pauses == [2, 4, 8, 2]  # the last for the broken connection
    assert 'the server says 429 Too Many Requests; asking again in 2 s' in capsys.readouterr().err
    (tmp_path / 'g.part').write_bytes(CONTENT[:500])
    server.refusals['/file'] = [503] * 100
    with pytest.raises(ValueError, match='says 503 .* busy: run again later to go on.*COMMAND'):
        download.download(server.url + '/file', tmp_path / 'g', SHA, 'COMMAND')
    assert len(server.refusals['/file']) == 94 and (tmp_path / 'g.part').read_bytes() == CONTENT[:500]


def test_shakespeare_is_downloaded_by_one_process_at_a_time(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download, 'SHAKESPEARE', server.url + '/file')
    monkeypatch.setattr(download, 'SHAKESPEARE_SHA256', SHA)
    lock = encode.lock_folder(tmp_path)
    if lock is None:
        pytest.skip('no locks on this system')
    with pytest.raises(encode.Busy, match='downloading to'):
        download.get_shakespeare(None, tmp_path, 'COMMAND')
    os.close(lock)
    assert server.asked == [] and os.listdir(tmp_path) == []
    path = download.get_shakespeare(None, tmp_path, 'COMMAND')
    assert Path(path).read_bytes() == CONTENT
    os.close(encode.lock_folder(tmp_path))  # which is free again


def test_download_offline(tmp_path, monkeypatch):
    monkeypatch.setenv('no_proxy', '*')
    with pytest.raises(ValueError, match='offline.*COMMAND$'):
        download.download('http://127.0.0.1:9/file', tmp_path / 'f', SHA, 'COMMAND')
    (tmp_path / 'f.part').write_bytes(b'12345')
    with pytest.raises(ValueError, match='5 bytes so far are kept'):
        download.download('http://127.0.0.1:9/file', tmp_path / 'f', SHA, 'COMMAND')


# shards of the Hub ----------------------------------------------------------------------------------------------------

REPO = 'HuggingFaceFW/fineweb-edu'
RESOLVE = f'/datasets/{REPO}/resolve/{COMMIT}/sample/10BT'


def documents(shard):
    rng = random.Random(shard)
    return [' '.join(rng.choices(['some', 'words', 'ünd', '日本', '42'], k=30)) for _ in range(150)]


@pytest.fixture
def hub(server, monkeypatch):
    """Three shards, and the two questions that are asked about them."""
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq
    monkeypatch.setenv('HF_ENDPOINT', server.url + '/')
    entries = [{'type': 'directory', 'path': 'sample/10BT/more', 'size': 0, 'oid': 'x'}]
    for i in (2, 0, 1):
        buffer = io.BytesIO()
        pq.write_table(pa.table({'text': documents(i), 'id': range(150), 'score': [2.5 + (n % 4) for n in range(150)],
                                 'language_score': [0.9] * 150}), buffer)
        content = buffer.getvalue()
        server.files[f'{RESOLVE}/00{i}_00000.parquet'] = content
        entries.append({'type': 'file', 'path': f'sample/10BT/00{i}_00000.parquet', 'size': len(content), 'oid': 'x',
                        'lfs': {'oid': hashlib.sha256(content).hexdigest(), 'size': len(content), 'pointerSize': 1}})
    server.files[f'/api/datasets/{REPO}/revision/main'] = json.dumps({'id': REPO, 'sha': COMMIT}).encode()
    server.files[f'/api/datasets/{REPO}/tree/{COMMIT}/sample/10BT'] = json.dumps(entries).encode()
    return server


def get(out_dir, n_shards=None, revision='main', folder='sample/10BT'):
    return download.get_shards(REPO, folder, out_dir, revision, n_shards, 'COMMAND')


def test_shards(tmp_path, hub):
    paths, commit = get(tmp_path / 'shards', 2)
    assert [os.path.basename(path) for path in paths] == ['000_00000.parquet', '001_00000.parquet'] and commit == COMMIT
    assert [list(corpus.read_documents(path)) for path in paths] == [documents(0), documents(1)]
    assert sorted(os.listdir(tmp_path / 'shards')) == ['000_00000.parquet', '001_00000.parquet', 'listing.json']
    before = len(hub.asked)
    assert len(get(tmp_path / 'shards')[0]) == 3
    assert [path for path, _ in hub.asked[before:]] == [f'{RESOLVE}/002_00000.parquet']  # only what is not there yet
    with pytest.raises(ValueError, match='--shards=4, but .* has 3 in sample/10BT'):
        get(tmp_path / 'shards', 4)
    with pytest.raises(ValueError, match='is of revision main, expected v2; remove'):
        get(tmp_path / 'shards', revision='v2')


def test_the_listing_keeps_the_bytes(tmp_path, hub):
    """main moves on, but what was begun goes on with the same commit and the same bytes."""
    get(tmp_path / 'shards', 1)
    hub.files[f'/api/datasets/{REPO}/revision/main'] = json.dumps({'sha': 'f' * 40}).encode()
    assert get(tmp_path / 'shards', 2)[1] == COMMIT
    hub.files[f'{RESOLVE}/002_00000.parquet'] = hub.files[f'{RESOLVE}/001_00000.parquet']
    with pytest.raises(ValueError, match='002_00000.parquet gave a file with SHA-256'):
        get(tmp_path / 'shards')
    assert '002_00000.parquet' not in os.listdir(tmp_path / 'shards')


def test_damaged_and_broken_shards(tmp_path, hub, capsys):
    path = f'{RESOLVE}/000_00000.parquet'
    hub.cuts[path] = [1000, 0]
    with pytest.raises(ValueError, match='1,000 bytes so far are kept'):
        get(tmp_path / 'shards', 1)
    (file,), _ = get(tmp_path / 'shards', 1)
    assert hub.asked[-1] == (path, 'bytes=1000-')
    content = bytearray(Path(file).read_bytes())
    content[500] ^= 1  # a bit that the disk lost
    Path(file).write_bytes(content)
    get(tmp_path / 'shards', 1)
    assert f'{file} is damaged' in capsys.readouterr().err
    assert list(corpus.read_documents(file)) == documents(0)


@pytest.mark.parametrize('answer', [b'{}', b'[]', b'null', b'[{"path": "a.parquet"}]', b'<html>'])
def test_unexpected_answers(tmp_path, hub, answer):
    hub.files[f'/api/datasets/{REPO}/tree/{COMMIT}/sample/10BT'] = answer
    with pytest.raises(ValueError, match='unknown form|no Parquet files in sample/10BT|cannot read'):
        get(tmp_path / 'shards')
    with pytest.raises(ValueError, match='tree/.*/sample/11BT: the server says 404.*COMMAND'):
        get(tmp_path / 'shards', folder='sample/11BT')
    assert 'listing.json' not in os.listdir(tmp_path / 'shards')


def test_a_listing_of_several_pages(tmp_path, hub):
    tree = f'/api/datasets/{REPO}/tree/{COMMIT}/sample/10BT'
    entries = json.loads(hub.files[tree])
    hub.refusals[tree] = [429]
    for i, address in enumerate([tree, f'{tree}?cursor=1', f'{tree}?cursor=2']):
        hub.files[address] = json.dumps(entries[i:i + 1 if i < 2 else None]).encode()
        hub.following[address] = f'{tree}?cursor={i + 1}'
    del hub.following[f'{tree}?cursor=2']
    paths, _ = get(tmp_path / 'shards')
    assert [os.path.basename(path)[:3] for path in paths] == ['000', '001', '002']


@pytest.mark.parametrize('damage', [
    lambda text: '{}', lambda text: '[]', lambda text: 'null', lambda text: '', lambda text: text[:-20],
    lambda text: text.replace('"files"', '"field"'), lambda text: text.replace('"size": ', '"size": "x", "sise": '),
    lambda text: text.replace('"commit"', '"kommit"')])
def test_a_damaged_listing(tmp_path, hub, damage):
    get(tmp_path / 'shards', 1)
    path = tmp_path / 'shards' / 'listing.json'
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match='listing.json is damaged; remove it and run again$'):
        get(tmp_path / 'shards', 1)
    path.unlink()
    assert len(get(tmp_path / 'shards', 1)[0]) == 1


def test_no_room_for_the_shards(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(ValueError, match='0.0 GB free; the download needs'):
        get(tmp_path / 'shards')


def test_fineweb_edu(tmp_path, hub):
    """The script, from the download to the token files; then from the local files, the better ones of them."""
    def prepare(*arguments, **changes):
        done = subprocess.run([sys.executable, str(ROOT / 'data/fineweb_edu/prepare.py'), '--tokenizer=byte',
                               '--val_fraction=0.1', *arguments], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, **changes})
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads((tmp_path / arguments[0].split('=')[1] / 'meta.json').read_text())

    said, meta = prepare('--out_dir=a', '--shards=2', '--shard_tokens=3e4')
    assert '300 documents' in said and 'next:  python train.py' in said
    assert meta['source'] == f'{REPO}@{COMMIT}, 2 shards of sample/10BT' and len(meta['files']['train']) > 1
    texts = dict.fromkeys(('train', 'val'), '')
    for split, text in corpus.split_documents(documents(0) + documents(1), 0.1):
        texts[split] += text + '\n\n'
    for split in texts:
        ids = np.concatenate([np.fromfile(tmp_path / 'a' / name, '<u2') for name, _ in meta['files'][split]])
        assert bytes(ids.astype(np.uint8)).decode() == texts[split]
    # a shard without a page of that score doesn't end it
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    pq.write_table(pa.table({'text': ['bad'], 'score': [1.0]}), tmp_path / 'a' / '10BT' / '000_bad.parquet')
    said, meta = prepare('--out_dir=b', '--input=a/10BT', '--min_score=4', HF_ENDPOINT='http://127.0.0.1:9')
    assert '148 documents' in said  # 74 of 150 a shard have a score of 4.5 or 5.5
    assert meta['source'] == '10BT, score of at least 4.0'
