"""A server in the shapes of OpenAI's API that says what a test chose, to show pages what models may write."""

import base64
import hashlib
import json
import math
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from conftest import ROOT

PAGE = ROOT / 'serving' / 'page.html'


def policy(source):
    """Return the header that allows the page's own script and style, and nothing else."""
    hashes = {tag: base64.b64encode(hashlib.sha256(
        re.search(f'<{tag}>(.*?)</{tag}>', source, re.S)[1].encode()).digest()).decode() for tag in ('script', 'style')}
    return (f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
            f"connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def pieces(text, n=4):
    return [text[i:i + n] for i in range(0, len(text), n)]


class Api(ThreadingHTTPServer):
    """reply: pieces of text; a number waits so many seconds, an Event until it is set, 'cut' ends the connection."""

    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server_port}/'
        self.reset()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def reset(self):
        self.models = [{'id': 'out-sft', 'object': 'model', 'max_model_len': 1024, 'chat': True, 'tools': []}]
        self.reply, self.finish, self.failure, self.key = ['Hello', ' there', '!'], 'stop', None, None
        self.requests, self.paths, self.disconnected, self.models_wait = [], [], 0, 0
        self.likeliest = None  # other tokens than the usual
        self.tokens = None  # of /tokenize

    def handle_error(self, request, address):
        pass


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def answer(self, value, code=200, kind='application/json', **headers):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        headers |= {'Content-Type': kind, 'Content-Length': str(len(content))}
        for name, text in headers.items():
            self.send_header(name.replace('_', '-'), text)
        self.end_headers()
        self.wfile.write(content)

    def is_refused(self):
        api = self.server
        failure = api.failure
        if api.key and self.headers['Authorization'] != f'Bearer {api.key}':
            failure = 401, 'wrong API key'
        if failure:
            self.answer({'error': {'message': failure[1], 'type': 'x', 'param': None, 'code': None}}, failure[0])
        return bool(failure)

    def do_GET(self):
        self.server.paths.append(self.path)
        if self.path == '/':
            source = PAGE.read_text(encoding='utf-8')
            self.answer(source.encode(), kind='text/html; charset=utf-8', Content_Security_Policy=policy(source))
        elif self.path == '/v1/models':
            time.sleep(self.server.models_wait)
            if not self.is_refused():
                self.answer({'object': 'list', 'data': self.server.models})
        else:
            self.answer({}, 404)

    def do_POST(self):
        self.server.paths.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        if self.is_refused():
            return
        if self.path == '/tokenize':
            texts = self.server.tokens or [('<|user|>', True), *(
                (piece, False) for message in body.get('messages', [{'content': body.get('prompt')}])
                for piece in pieces(message['content'])), ('<|assistant|>', True)]
            self.answer({'count': len(texts), 'max_model_len': 1024, 'tokens': list(range(len(texts))),
                         'token_strs': [text for text, _ in texts], 'special': [special for _, special in texts]})
            return
        self.server.requests.append(body)
        self.send_response(200)
        self.send_header('Content-Type', 'text/event-stream')
        self.end_headers()
        try:
            self.stream('messages' in body)
        except OSError:
            self.server.disconnected += 1

    def send(self, value):
        self.wfile.write(b'data: ' + json.dumps(value).encode() + b'\n\n')

    def stream(self, is_chat):
        api, n = self.server, 0
        for piece in api.reply:
            if isinstance(piece, int | float):
                time.sleep(piece)
            elif isinstance(piece, threading.Event):
                while not piece.wait(0.02):
                    self.wfile.write(b': still here\n\n')
            elif piece == 'cut':
                return
            elif isinstance(piece, dict):
                self.send(piece)
            else:
                n += 1
                self.send({'choices': [self.choice(piece, n, is_chat)]})
        last = {'index': 0, 'finish_reason': api.finish} | ({'delta': {}} if is_chat else {'text': ''})
        self.send({'choices': [last]})
        self.send({'choices': [], 'usage': {'prompt_tokens': 20, 'completion_tokens': n, 'total_tokens': 20 + n,
                                            'prompt_tokens_details': {'cached_tokens': 8}}})
        self.wfile.write(b'data: [DONE]\n\n')

    def choice(self, piece, n, is_chat):
        share = (0.97, 0.6, 0.3, 0.1, 0.01)[n % 5]
        others = [(piece, share), *(self.server.likeliest or [(' other', 0.2 * (1 - share)), ('\n', 0.1 * (1 - share))])]
        others = sorted(others, key=lambda pair: -pair[1])
        top = [{'token': text, 'logprob': math.log(p), 'bytes': list(text.encode())} for text, p in others]
        token = {'token': piece, 'logprob': math.log(share), 'bytes': list(piece.encode())}
        if is_chat:
            return {'index': 0, 'delta': {'content': piece}, 'finish_reason': None,
                    'logprobs': {'content': [token | {'top_logprobs': top}]}}
        return {'index': 0, 'text': piece, 'finish_reason': None, 'logprobs': {
            'tokens': [piece], 'token_logprobs': [math.log(share)], 'text_offset': [0],
            'top_logprobs': [{other['token']: other['logprob'] for other in top}]}}
