"""
Clients that come, go, disconnect and send rubbish: statuses, memory, places. Run: pytest tests/test_serve_crowd.py

CROWD_SECONDS=120 makes it longer than 20 s.
"""

import asyncio
import json
import os
import random
import re
import time
from collections import Counter

import pytest
from chat_models import save_chat_model
from test_serve_e2e import get, served

N_CLIENTS, SECONDS = 200, float(os.environ.get('CROWD_SECONDS', 20))
RUBBISH = [b'\x16\x03\x01\xff\0', b'GET / HTTP/1.1\r\n', b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nx',
           b'GET /health HTTP/1.1\r\nHost: [::1\r\n\r\n', b'POST /tokenize HTTP/1.1\r\nHost: localhost\r\n'
           b'Transfer-Encoding: chunked\r\n\r\nzz\r\n', b'GET /%ff%00/../../etc/passwd HTTP/1.0\r\nHost: localhost\r\n\r\n']
VALUES = ['{', '[]', '{"prompt": 5}', '{"prompt": "x", "\\ud800": 1}', '{"prompt": "x", "n": 1e9}', '[' * 5000,
          '{"prompt": "x", "temperature": ' + '9' * 4000 + '}', '{"prompt": "\\ud800", "max_tokens": 2}']


def body_of(rng):
    """An ordinary request, of which one in five is streamed."""
    if rng.random() < 0.2:
        return rng.choice(VALUES)
    value = {'prompt': 'ab' * rng.randint(1, 100), 'max_tokens': rng.randint(1, 60), 'n': rng.choice([1, 1, 1, 3]),
             'stream': rng.random() < 0.5, 'seed': rng.randint(0, 5), 'logprobs': rng.choice([None, 3]),
             'stop': rng.choice([None, 'e', ['xyz', 'q']]), 'temperature': rng.choice([0, 1, 1.5])}
    if rng.random() < 0.05:
        value.update(response_format={'type': 'json_object'}, stop=None, max_tokens=30)
    return json.dumps(value)


async def visit(port, rng, statuses):
    """Send one request, or rubbish; read all of the answer, some, or nothing."""
    reader, writer = await asyncio.open_connection('127.0.0.1', port)
    try:
        if rng.random() < 0.15:
            writer.write(rng.choice(RUBBISH))
        else:
            body = body_of(rng).encode()
            writer.write(b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n'
                         b'Content-Length: %d\r\n\r\n' % len(body) + body)
            if rng.random() < 0.8:
                content = await reader.read()
                statuses[int(content[9:12])] += 1
                assert b'"server_error"' not in content, content
                return
        await asyncio.wait_for(reader.read(rng.randint(1, 500)), rng.random())
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.transport.abort() if rng.random() < 0.5 else writer.close()


async def crowd(port, seconds, statuses):
    end = time.monotonic() + seconds

    async def client(seed):
        rng = random.Random(seed)
        while time.monotonic() < end:
            await asyncio.sleep(rng.random())
            await visit(port, rng, statuses)
    await asyncio.gather(*map(client, range(N_CLIENTS)))


def memory(process):
    """Return the resident memory of a process, in bytes."""
    with open(f'/proc/{process.pid}/status') as status:
        return 1024 * int(re.search(r'VmRSS:\s+(\d+)', status.read())[1])


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='reads /proc')
def test_a_crowd(tmp_path):
    """Answers or refusals, never an error of the server; memory stays, and every place is free afterwards."""
    save_chat_model(tmp_path, block_size=256)
    with served(tmp_path / 'chat') as (url, _, process):
        port = int(url.rpartition(':')[2])
        asyncio.run(crowd(port, max(5, SECONDS / 4), Counter()))
        before, statuses = memory(process), Counter()
        asyncio.run(crowd(port, SECONDS, statuses))
        end = time.monotonic() + 20
        while not re.search('running 0\n.*\n.*waiting 0\n', metrics := get(url + '/metrics')[1]):
            assert time.monotonic() < end, metrics
            time.sleep(0.1)
        gained = memory(process) - before
        print(f'{sum(statuses.values()):,} answers {dict(statuses)}, memory {before / 1e6:.0f} MB {gained / 1e6:+.0f} MB')
        assert set(statuses) <= {200, 400, 429} and statuses[200] > 20 and statuses[400] > 5, statuses
        assert 'status="5' not in metrics and gained < 30e6
