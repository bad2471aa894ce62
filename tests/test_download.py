"""data/download.py against a server on this machine that cuts, corrupts and refuses.

Run: pytest tests/test_download.py (no network)
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
from conftest import ROOT

from data import documents, download
from flatgpt.files import Busy, lock_folder

CONTENT = random.Random(0).randbytes(300_000)
SHA = hashlib.sha256(CONTENT).hexdigest()
COMMIT = 'c0ffee' + '0' * 34


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with server.files[path]. server.cuts[path] lists after how many bytes answers to it
    break off, server.refusals[path] the status of its first answers."""

    def do_HEAD(self):  # as the Hub answers for a file
        content = self.server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        self.send_response(200)
        for name, value in (('Content-Length', len(content)), ('X-Repo-Commit', COMMIT),
                            ('ETag', f'"{hashlib.sha256(content).hexdigest()}"')):
            self.send_header(name, str(value))
        self.end_headers()

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
    server.asked, server.files = [], {'/file': CONTENT}
    server.cuts, server.ignores_ranges = {}, set()
    server.refusals = {}
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f'http://127.0.0.1:{server.server_port}'
    yield server
    server.shutdown()
    server.server_close()


def ranges(server):
    return [asked for _, asked in server.asked]


# one file ----------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match='it ended at 200,001 of 300,000 bytes.*COMMAND The first '
                                         '200,001 bytes are kept; run again'):
        # the last one brought nothing
        download.download(server.url + '/file', tmp_path / 'f', SHA, 'COMMAND')
    assert ranges(server) == [f'bytes={start}-' for start in (0, 100_000, 100_001, 200_001)]
    assert 'continuing at 100,000 bytes' in capsys.readouterr().err
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


def test_a_server_that_refuses(tmp_path, server):
    server.refusals['/file'] = [503]
    (tmp_path / 'f.part').write_bytes(CONTENT[:500])
    with pytest.raises(ValueError, match='answers 503 Service Unavailable. Try again.*COMMAND'):
        download.download(server.url + '/file', tmp_path / 'f', SHA, 'COMMAND')
    assert (tmp_path / 'f.part').read_bytes() == CONTENT[:500]
    download.download(server.url + '/file', tmp_path / 'f', SHA, 'COMMAND')
    assert (tmp_path / 'f').read_bytes() == CONTENT and ranges(server)[-1] == 'bytes=500-'


def test_shakespeare_is_downloaded_by_one_process_at_a_time(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download, 'SHAKESPEARE', server.url + '/file')
    monkeypatch.setattr(download, 'SHAKESPEARE_SHA256', SHA)
    lock = lock_folder(tmp_path)
    if lock is None:
        pytest.skip('no locks on this system')
    with pytest.raises(Busy, match='downloading to'):
        download.get_shakespeare(None, tmp_path, 'COMMAND')
    os.close(lock)
    assert server.asked == [] and os.listdir(tmp_path) == []
    path = download.get_shakespeare(None, tmp_path, 'COMMAND')
    assert Path(path).read_bytes() == CONTENT
    os.close(lock_folder(tmp_path))  # which is free again


def test_download_offline(tmp_path, monkeypatch):
    monkeypatch.setenv('no_proxy', '*')
    with pytest.raises(ValueError, match='offline.*COMMAND$'):
        download.download('http://127.0.0.1:9/file', tmp_path / 'f', SHA, 'COMMAND')
    (tmp_path / 'f.part').write_bytes(b'12345')
    with pytest.raises(ValueError, match='first 5 bytes are kept'):
        download.download('http://127.0.0.1:9/file', tmp_path / 'f', SHA, 'COMMAND')


# the Hugging Face Hub -----------------------------------------------------------------------------

REPO = 'HuggingFaceFW/fineweb-edu'
FOLDER = 'sample/10BT'
RESOLVE = f'/datasets/{REPO}/resolve/{COMMIT}/{FOLDER}'
TREE = f'/api/datasets/{REPO}/tree/{COMMIT}/sample%2F10BT?recursive=false&expand=false'


def texts(shard):
    rng = random.Random(shard)
    return [' '.join(rng.choices(['some', 'words', 'ünd', '日本', '42'], k=30)) for _ in range(150)]


@pytest.fixture
def hub(server, monkeypatch):
    """Three shards, and the Hub's answers about them, for the real huggingface_hub."""
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq
    constants = pytest.importorskip('huggingface_hub.constants')
    monkeypatch.setattr(constants, 'ENDPOINT', server.url)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE',
                        server.url + '/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    entries = [{'type': 'directory', 'path': f'{FOLDER}/more', 'size': 0, 'oid': 'x'}]
    for i in (2, 0, 1):
        buffer = io.BytesIO()
        scores = [2.5 + (n % 4) for n in range(150)]
        pq.write_table(pa.table({'text': texts(i), 'id': range(150), 'score': scores}), buffer)
        content, name = buffer.getvalue(), f'00{i}_00000.parquet'
        server.files[f'{RESOLVE}/{name}'] = content
        lfs = {'oid': hashlib.sha256(content).hexdigest(), 'size': len(content), 'pointerSize': 1}
        entries.append({'type': 'file', 'path': f'{FOLDER}/{name}', 'size': len(content),
                        'oid': 'x', 'lfs': lfs})
    info = json.dumps({'id': REPO, 'sha': COMMIT}).encode()
    server.files[f'/api/datasets/{REPO}/revision/main'] = info
    server.files[TREE] = json.dumps(entries).encode()
    return server


def get(out_dir, n_files=None):
    source = download.HubFolder(REPO, FOLDER, n_files=n_files)
    return download.get_shards(source, out_dir, 'COMMAND')


def test_shards(tmp_path, hub):
    paths, commit = get(tmp_path, 2)
    assert [os.path.relpath(path, tmp_path) for path in paths] == [
        os.path.join(FOLDER, f'00{i}_00000.parquet') for i in (0, 1)] and commit == COMMIT
    assert [list(documents.read_documents(path)) for path in paths] == [texts(0), texts(1)]
    before = len(hub.asked)
    assert len(get(tmp_path)[0]) == 3
    fetched = [path for path, _ in hub.asked[before:] if path.startswith('/datasets')]
    assert fetched == [f'{RESOLVE}/002_00000.parquet']  # only what is not there yet
    with pytest.raises(ValueError, match='has 3 Parquet files in sample/10BT at main; expected 4'):
        get(tmp_path, 4)


def test_a_damaged_shard(tmp_path, hub):
    (path,), _ = get(tmp_path, 1)
    content = bytearray(Path(path).read_bytes())
    content[500] ^= 1  # a bit that the disk lost
    Path(path).write_bytes(content)
    with pytest.raises(ValueError, match='was damaged, and is removed; run again'):
        get(tmp_path, 1)
    get(tmp_path, 1)
    assert list(documents.read_documents(path)) == texts(0)


def test_other_bytes_than_listed(tmp_path, hub):
    hub.files[f'{RESOLVE}/000_00000.parquet'] = bytes(1000)
    with pytest.raises(ValueError, match='damaged|cannot download'):
        get(tmp_path, 1)
    assert not list(tmp_path.glob('**/*.parquet'))


def test_a_broken_connection(tmp_path, hub):
    hub.cuts[f'{RESOLVE}/000_00000.parquet'] = [1000]
    (path,), _ = get(tmp_path, 1)
    assert list(documents.read_documents(path)) == texts(0)
    assert [path for path, _ in hub.asked].count(f'{RESOLVE}/000_00000.parquet') == 2


@pytest.mark.parametrize('answer', [b'[]', b'null', b'<html>'])
def test_unexpected_answers(tmp_path, hub, answer):
    hub.files[TREE] = answer
    with pytest.raises(ValueError, match='cannot download .*COMMAND|has 0 Parquet files'):
        get(tmp_path)


def test_no_such_revision_and_no_package(tmp_path, hub, monkeypatch):
    with pytest.raises(ValueError, match='cannot download .*404.*COMMAND'):
        download.get_shards(download.HubFolder(REPO, FOLDER, 'v2'), tmp_path, 'COMMAND')
    monkeypatch.setitem(sys.modules, 'huggingface_hub.hf_api', None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[data\]'.*COMMAND"):
        get(tmp_path)


def test_no_room_for_the_shards(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(ValueError, match='0.0 GB free; the download needs'):
        get(tmp_path)


def test_fineweb_edu(tmp_path, hub):
    """The script, from the download to the token files; then from the local files, by score."""
    def prepare(*arguments, **changes):
        done = subprocess.run(
            [sys.executable, str(ROOT / 'data/fineweb_edu/prepare.py'), '--tokenizer=byte',
             '--val_fraction=0.1', *arguments], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, 'HF_ENDPOINT': hub.url, **changes})
        assert done.returncode == 0, done.stderr
        out_dir = tmp_path / arguments[0].split('=')[1]
        return done.stdout, json.loads((out_dir / 'meta.json').read_text())

    printed, meta = prepare('--out_dir=a', '--shards=2', '--shard_tokens=3e4')
    assert '300 documents' in printed and 'next:  python train.py' in printed
    assert meta['source'] == f'{REPO}@{COMMIT}, 2 shards of {FOLDER}'
    assert len(meta['files']['train']) > 1
    splits = dict.fromkeys(('train', 'val'), '')
    for split, text in documents.split_documents(texts(0) + texts(1), 0.1):
        splits[split] += text + '\n\n'
    for split in splits:
        ids = np.concatenate([np.fromfile(tmp_path / 'a' / name, '<u2')
                              for name, _ in meta['files'][split]])
        assert bytes(ids.astype(np.uint8)).decode() == splits[split]
    # a shard without a page of that score does not end it
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    folder = tmp_path / 'a' / 'shards' / FOLDER
    pq.write_table(pa.table({'text': ['bad'], 'score': [1.0]}), folder / '000_bad.parquet')
    printed, meta = prepare('--out_dir=b', '--input=a/shards/sample/10BT', '--min_score=4',
                            HF_ENDPOINT='http://127.0.0.1:9')
    assert '148 documents' in printed  # 74 of 150 a shard have a score of 4.5 or 5.5
    assert meta['source'] == '10BT, score of at least 4.0'


# without end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('limit, value, said, kept', [
    ('MOST_BYTES', 200_000, 'sends more than 200,000 bytes', False),
    ('MOST_SECONDS', -1, 'takes longer than -1 seconds; what is there is kept', True)])
def test_a_download_ends(tmp_path, server, monkeypatch, limit, value, said, kept):
    monkeypatch.setattr(download, limit, value)
    with pytest.raises(ValueError, match=said):
        download.download(server.url + '/file', tmp_path / 'f', SHA, 'COMMAND')
    assert (tmp_path / 'f.part').exists() == kept
    assert not (tmp_path / 'f').exists()
