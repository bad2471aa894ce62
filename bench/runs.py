"""
Draw runs into one HTML page, or serve the page while they train.

    $ python -m bench.runs out-quickstart                  # writes runs.html
    $ python -m bench.runs out-a out-b --html=runs.html    # compare two runs
    $ python -m bench.runs out-a --watch          # http://127.0.0.1:8001, live

Reads log.jsonl, config.json and samples.jsonl of each folder. The page has the
curves of everything that a log counts, over steps, tokens, time or FLOPs, the
samples at the step under the pointer, and the settings that differ. It needs no
network. Prints how each run stands: complete, running, stopped, crashed, with
NaN, or damaged. The last line is JSON.
"""

import base64
import json
import os
import re
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np

from configurator import UserError, explain_errors, printable
from data.encode import make_parser
from flatgpt import output
from flatgpt.logs import Folder, names_of
from flatgpt.policy import policy_of
from tokenizer.base import write_file

TEMPLATE = Path(__file__).with_name('runs.html')
MARK, POLICY = '/*RUNS*/', '/*POLICY*/'  # where the template takes the runs and the CSP
MOST_BUCKETS = 2000  # points of a curve; a screen has fewer pixels
CURVE_BYTES, SAMPLE_BYTES = 1_150_000, 200_000  # of all runs; base64 adds a third to the first
MOST_VALUE = 300  # characters of a setting
AXES = ('step', 'train_time', 'tokens')
HOSTS = ('localhost', '127.0.0.1', '[::1]')


# Curves -------------------------------------------------------------------------------------------

def series_of(table):
    """Return the columns of a table that are drawn."""
    return [key for key in table.columns if key not in AXES]


def size_of(tables, n_buckets):
    """Return the bytes of tables in n_buckets."""
    return sum(min(table.n, n_buckets) * (4 * len(AXES) + len(series_of(table))
                                          * (9 if table.n > n_buckets else 3))
               for table in tables)


def choose_buckets(folders):
    """Return how many points a curve may have for the page to stay small."""
    tables = [table for folder in folders for table in (folder.steps, folder.evaluations)]
    n = MOST_BUCKETS
    while n > 100 and size_of(tables, n) > CURVE_BYTES:
        n = n * 9 // 10
    return n


def x_of(folder, axis):
    """Return the positions of steps and of evaluations on an axis, NaN where unknown.

    A line without a position gets one between those of its neighbours, by the number of updates.
    """
    tables = folder.steps, folder.evaluations
    places = [table.columns.get('step', np.zeros(0)) for table in tables]
    if axis == 'step':
        return places
    updates = places[0] + 1, places[1]  # an evaluation precedes the update of its step
    known = [table.columns.get(axis, np.full(table.n, np.nan)) for table in tables]
    if not any(np.isfinite(column).any() for column in known):
        return known
    x, y = (np.concatenate(([0.0], *columns)) for columns in (updates, known))
    order = np.argsort(x, kind='stable')
    order = order[np.isfinite(y[order])]
    return [np.where(np.isfinite(column), column,
                     np.interp(at, x[order], y[order], right=np.nan))
            for at, column in zip(updates, known, strict=True)]


def pack(numbers, size):
    """Write numbers as float32 in base64; size 3 leaves out the last byte."""
    bits = np.clip(numbers, -3e38, 3e38).astype('<f4').view('<u4')
    if size == 3:
        bits = np.where(bits & 0x7fffffff > 0x7f800000, 0x7fc00000, bits + 0x80) >> 8  # NaN stays
    content = bits.astype('<u4').view('u1').reshape(-1, 4)[:, :size].tobytes()
    return base64.b64encode(content).decode()


def view_table(table, positions, n_buckets):
    """Return a table as runs.html reads it: low, high and mean of each bucket."""
    order = np.argsort(table.columns['step'], kind='stable')
    n = min(table.n, n_buckets)
    edges = np.linspace(0, table.n, n + 1).astype(int)
    starts, middles = edges[:-1], (edges[:-1] + edges[1:] - 1) // 2
    series = {}
    for key in series_of(table):
        values = table.columns[key][order]
        parts = [values]
        if n < table.n:
            counts = np.add.reduceat(np.isfinite(values), starts)
            sums = np.add.reduceat(np.nan_to_num(values), starts)
            means = np.divide(sums, counts, out=np.full(n, np.nan), where=counts > 0)
            parts = [np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts), means]
        series[key] = pack(np.concatenate(parts), 3)
    return {'n': n, 'x': [pack(x[order][middles], 4) for x in positions], 'series': series,
            'broken': table.broken}


def view(folder, n_buckets, sample_bytes):
    """Return a run as runs.html reads it."""
    kind, text = folder.status()
    tables = folder.steps, folder.evaluations
    places = list(zip(*(x_of(folder, axis) for axis in AXES), strict=True))
    return {'name': folder.name, 'path': folder.path, 'kind': kind, 'status': text,
            'lowest': lowest_of(folder), 'flops_per_token': folder.flops_per_token,
            'wrong': counts_wrong_answers(folder.evaluations),
            'tables': [view_table(table, positions, n_buckets)
                       for table, positions in zip(tables, places, strict=True) if table.n],
            'samples': some_samples(folder.samples, sample_bytes),
            'settings': None if folder.settings is None else
            {key: show(value) for key, value in folder.settings.items()}}


def lowest_of(folder):
    """Return the lowest val loss and its step, or None."""
    losses = folder.evaluations.columns.get('val_loss', np.zeros(0))
    if not np.isfinite(losses).any():
        return None
    i = int(np.nanargmin(losses))
    return float(losses[i]), int(folder.evaluations.columns['step'][i])


def counts_wrong_answers(table):
    """Return whether val_loss is the share of wrong answers, as in rl and dpo."""
    if 'val_accuracy' not in table.columns:
        return False
    return bool(np.allclose(table.columns['val_loss'], 1 - table.columns['val_accuracy'],
                            equal_nan=True))


def some_samples(samples, most_bytes):
    """Return the samples of as many steps, evenly spaced, as most_bytes have room for."""
    by_step = {}
    for step, *texts in samples:
        by_step.setdefault(step, []).append(texts)
    sizes = {step: len(to_json(texts)) for step, texts in by_step.items()}
    steps, every = sorted(by_step), 1
    while True:
        kept = steps[::-1][::every][::-1]  # the last one always
        if sum(sizes[step] for step in kept) <= most_bytes or len(kept) == 1:
            break
        every += 1
    return [[step, *texts] for step in kept for texts in by_step[step][:20]]


def show(value):
    """Write a setting as JSON. A long one ends with a checksum of the rest."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= MOST_VALUE:
        return text
    checksum = zlib.crc32(text.encode('utf-8', 'replace'))
    return f'{text[:MOST_VALUE]}... ({len(text):,} characters, CRC-32 {checksum:08x})'


def view_all(folders, wanted=None):
    """Return all runs, or those in `wanted`, as runs.html reads them."""
    n_buckets, sample_bytes = choose_buckets(folders), SAMPLE_BYTES // len(folders)
    return [view(folder, n_buckets, sample_bytes) if wanted is None or i in wanted else None
            for i, folder in enumerate(folders)]


# The page -----------------------------------------------------------------------------------------

def to_json(value):
    """Return JSON, bytes, that ends no script. Half a surrogate pair stays escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False).replace('<', '\\u003c')
    return text.encode('utf-8', 'backslashreplace')


def make_page(content, is_live):
    """Return the page, bytes, and its Content-Security-Policy."""
    source = TEMPLATE.read_text(encoding='utf-8')
    policy = policy_of(source) + "; connect-src 'self'" * is_live
    before, after = source.replace(POLICY, policy, 1).encode().split(MARK.encode(), 1)
    return before + to_json({**content, 'live': is_live}) + after, policy


class Watch:
    """Serve the page of some folders and what changes in them."""

    def __init__(self, folders):
        self.folders, self.lock, self.started = folders, threading.Lock(), os.urandom(4).hex()

    def changes(self, known=()):
        """Read the folders; -> the runs whose versions are not `known`."""
        with self.lock:
            for folder in self.folders:
                folder.read()
            versions = [f'{self.started}.{folder.version}' for folder in self.folders]
            wanted = {i for i, version in enumerate(versions) if version not in known[i : i + 1]}
            return {'names': [folder.name for folder in self.folders], 'versions': versions,
                    'runs': view_all(self.folders, wanted)}


def make_handler(watch):
    """Return the class that answers the requests of a browser on this machine."""

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version, timeout = 'bench.runs', '', 60

        def do_GET(self):
            hosts, url = self.headers.get_all('Host', []), urlsplit(self.path)
            # a foreign page whose name resolves to this machine sends that name
            if len(hosts) != 1 or re.sub(r':\d*$', '', hosts[0]).lower() not in HOSTS:
                self.answer(403, b'expected the host localhost\n')
            elif self.path == '/':
                page, policy = make_page(watch.changes(), is_live=True)
                self.answer(200, page, 'text/html', f"{policy}; frame-ancestors 'none'")
            elif url.path == '/data' and not url.netloc:
                known = parse_qs(url.query).get('known', [''])[0].split(',')
                self.answer(200, to_json(watch.changes(known)), 'application/json')
            else:
                self.answer(404, b'there is only the page, /\n')

        do_HEAD = do_GET

        def answer(self, status, content, kind='text/plain', policy="default-src 'none'"):
            self.send_response(status)
            for name, value in {'Content-Type': f'{kind}; charset=utf-8',
                                'Content-Length': len(content), 'Content-Security-Policy': policy,
                                'Cache-Control': 'no-store', 'X-Content-Type-Options': 'nosniff',
                                'Cross-Origin-Resource-Policy': 'same-origin',
                                'Referrer-Policy': 'no-referrer'}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command != 'HEAD':
                self.wfile.write(content)

        def log_message(self, *_):
            """Print no line for each request."""

    return Handler


class Server(ThreadingHTTPServer):
    """Answer each connection in a thread of its own."""

    daemon_threads = True

    def handle_error(self, request, address):
        """Let a browser close a connection; other errors are printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, address)


def serve(folders, port):
    """Serve the page on 127.0.0.1 until Ctrl-C."""
    try:
        server = Server(('127.0.0.1', port), make_handler(Watch(folders)))
    except (OSError, OverflowError) as error:
        raise UserError(f'--port={port}: {error}; expected a free port, 1024 to 65535') from None
    with server:
        print(f'serving http://127.0.0.1:{server.server_port}; Ctrl-C ends it')
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print('\nended')


# The command --------------------------------------------------------------------------------------

def main():
    sys.excepthook = explain_errors
    output.protect()
    parser = make_parser(__doc__)
    parser.add_argument('folders', nargs='+', help='out_dir of each run')
    parser.add_argument('--html', help='the page to write (runs.html; with --watch none)')
    parser.add_argument('--watch', action='store_true', help='serve the page, live')
    parser.add_argument('--port', type=int, default=8001, help='port of --watch (8001)')
    args = parser.parse_args()
    paths = list(dict.fromkeys(args.folders))
    if missing := [path for path in paths if not os.path.isdir(path)]:
        raise UserError(f'there is no folder {missing[0]!r}; expected the out_dir of a run')
    folders = [Folder(path, name) for path, name in zip(paths, names_of(paths), strict=True)]
    rows = []
    for folder in folders:
        folder.read()
        kind, text = folder.status()
        value, step = lowest_of(folder) or (None, None)
        found = '' if value is None else f'; lowest val loss {value:.4f} at step {step:,}'
        print(printable(f'{folder.name}: {text}{found}'.replace('\n', '\\n')))
        rows.append({'run': folder.name, 'kind': kind, 'status': text, 'steps': folder.last_step,
                     'val_loss': value, 'step': step})
    path = args.html or (None if args.watch else 'runs.html')
    if path:
        page, _ = make_page({'runs': view_all(folders)}, is_live=False)
        write_file(path, page)
        print(f'wrote {printable(path)} ({len(page) / 1e6:.1f} MB): open it in a browser')
    if args.watch:
        serve(folders, args.port)
    else:
        print(json.dumps({'bench': 'runs', 'html': path, 'runs': rows}))


if __name__ == '__main__':
    main()
