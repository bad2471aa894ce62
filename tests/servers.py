"""Serve a model in this process, as serve.py does, for the tests of its API and its page."""

import contextlib
import http.client
import json
import socket
import threading
import time

import uvicorn

from serving.app import Guard, make_app
from serving.connection import Connection
from serving.engine import Engine, Limits
from serving.guardrail import Guardrail
from serving.protocol import Served


class Serving:
    """A server at .url. Calls return (status, JSON value or text)."""

    def __init__(self, model, tokenizer, template, guard=None, max_seconds=60.0, guardrail='', **limits):
        limits = Limits(**{'max_streams': 4, 'context': model.config.block_size, 'max_queue': 8, **limits})
        self.engine = Engine(model, tokenizer, limits)
        self.served = Served('tiny', tokenizer, template, limits.context, model.config.vocab_size, max_seconds)
        self.app = make_app(self.engine, self.served, guard or Guard(),
                            Guardrail(guardrail, 0.5, self.engine) if guardrail else None)
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.bind(('127.0.0.1', 0))
        self.port = listener.getsockname()[1]
        self.url = f'http://127.0.0.1:{self.port}'
        self.server = uvicorn.Server(uvicorn.Config(
            self.app, http=Connection, log_level='error', ws='none', timeout_graceful_shutdown=1))
        threading.Thread(target=self.engine.run, daemon=True).start()
        threading.Thread(target=self.server.run, args=([listener],), daemon=True).start()
        wait_for(lambda: self.server.started)

    def call(self, path, value=None, method=None, body=None, **headers):
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=60)
        body = json.dumps(value).encode() if value is not None else body
        with contextlib.closing(connection):
            connection.request(method or ('GET' if body is None else 'POST'), path, body,
                               {key.replace('_', '-'): text for key, text in headers.items()})
            response = connection.getresponse()
            content = response.read().decode()
            self.headers = dict(response.getheaders())
        try:
            return response.status, json.loads(content)
        except ValueError:
            return response.status, content

    def events(self, path, value):
        """Return the values of a stream of server-sent events."""
        status, content = self.call(path, {**value, 'stream': True})
        assert status == 200, content
        parts = content.split('\n\n')
        assert all(part.startswith('data: ') for part in parts[:-1]) and parts[-2:] == ['data: [DONE]', '']
        return [json.loads(part[6:]) for part in parts[:-2]]

    def is_idle(self):
        return not self.engine.running and not self.engine.waiting


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
