"""serve.py as a user starts it. Run: pytest tests/test_serve_e2e.py"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from chat_models import save_chat_model
from conftest import ROOT

pytest.importorskip('uvicorn')


@contextlib.contextmanager
def served(folder, *arguments):
    """Run serve.py on a free port; -> (url, the printed lines, process)."""
    command = [sys.executable, 'serve.py', '--out_dir=' + str(folder), '--device=cpu', '--port=0', *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, 'PYTHONUNBUFFERED': '1'})
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith('http://'):
                break
        yield lines[-1].split()[0], lines, process
    finally:
        process.kill()
        process.wait()


def get(url, value=None, **headers):
    data = None if value is None else json.dumps(value).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('serve')
    save_chat_model(path, block_size=64)
    (path / 'key.txt').write_text('secret\n')
    (path / 'empty.txt').touch()
    return path / 'chat'


def test_serve(folder):
    """The page and an answer; a stream ends cleanly at Ctrl-C."""
    with served(folder, '--max_streams=2', '--name=mine') as (url, lines, process):
        assert '2 streams of 64 tokens, 0 MB of cache\n' in lines and not any('WARNING' in line for line in lines)
        assert all(len(line) <= 81 for line in lines if str(folder) not in line)
        status, page = get(url)
        assert status == 200 and page.startswith('<!doctype html>')
        value = {'model': 'mine', 'messages': [{'role': 'user', 'content': 'Hi'}], 'max_tokens': 5}
        assert json.loads(get(url + '/v1/chat/completions', value)[1])['object'] == 'chat.completion'
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == '\nstopped by Ctrl-C\n' and process.wait(20) == 0


def test_other_machines(folder):
    """--host=0.0.0.0 warns; the key is read from a file, and needed."""
    key = folder.parent / 'key.txt'
    with served(folder, '--host=0.0.0.0', f'--api_key=FILE:{key}') as (url, lines, _):
        assert 'WARNING: other machines can reach this server, and what they send' in ''.join(lines)
        assert 'secret' not in ''.join(lines)
        url = url.replace('0.0.0.0', '127.0.0.1')
        assert get(url + '/v1/models')[0] == 401 and get(url)[0] == 200
        assert get(url + '/v1/models', Authorization='Bearer secret')[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize('arguments, message', [
    (['--context=65'], 'context=65: expected at most 64'),
    (['--cache_gb=1e-7'], 'cache_gb=1e-07: it holds'),
    (['--out_dir=missing'], 'no checkpoint at missing'),
    (['--port=70000'], 'expected at least 0 and at most 65535'),
    (['--api_key=FILE:missing.txt'], 'missing.txt'),
    (['--api_key=FILE:HERE/empty.txt'], 'empty.txt is empty; expected the API key'),
])
def test_settings_that_cannot_be_met(folder, arguments, message):
    arguments = [argument.replace('HERE', str(folder.parent)) for argument in arguments]
    done = subprocess.run([sys.executable, 'serve.py', f'--out_dir={folder}', '--port=0', *arguments], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and message in done.stderr and 'Traceback' not in done.stderr, done.stderr


@pytest.mark.slow
def test_port_in_use(folder):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run([sys.executable, 'serve.py', f'--out_dir={folder}', f'--port={port}'], cwd=ROOT,
                              capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and f'127.0.0.1:{port} cannot be used' in done.stderr, done.stderr
    assert f'such as {port + 1}' in done.stderr
