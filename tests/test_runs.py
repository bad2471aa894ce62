"""bench/runs.py and flatgpt/logs.py: how runs stand, their page under node and in Chromium, the server.

Run: pytest tests/test_runs.py
"""

import base64
import hashlib
import html.parser
import http.client
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, Folder

from bench import plot, runs
from configurator import UserError
from flatgpt import checkpoint, logs
from flatgpt.files import lock_folder, unlock
from model import GPT, GPTConfig

NODE, CHROMIUM = shutil.which('node'), shutil.which('chromium') or shutil.which('google-chrome')
needs_node = pytest.mark.skipif(NODE is None, reason='node is not installed')
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason='Chromium is not installed')
STEPS = [{'step': i, 'loss': 3.0 / (1 + i), 'lr': 1e-3, 'tokens': (i + 1) * 10, 'train_time': i + 1.0} for i in range(100)]
IMAGE = '<img src=x onerror=alert(1)>'


def write_run(folder, records=STEPS, config=None, tail='', samples=()):
    """The folder of a run with a log of these records."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'log.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records) + tail)
    if config is not None:
        (folder / 'config.json').write_text(json.dumps(config))
    if samples:
        (folder / 'samples.jsonl').write_text(''.join(json.dumps(sample) + '\n' for sample in samples))
    return folder


def read(folder):
    run = logs.Folder(str(folder), folder.name)
    run.read()
    return run


def write_page(folders, path):
    page, policy = runs.make_page({'runs': runs.view_all([read(folder) for folder in folders])}, is_live=False)
    path.write_bytes(page)
    return page.decode(), policy


def content_of(page):
    return json.loads(re.search(r'<script type="application/json" id="content">(.*?)</script>', page, re.S)[1])


def in_node(code, tmp_path, **values):
    """Run code behind the page's functions; -> what it prints, parsed."""
    script = re.search(r'<script>(.*?)</script>', runs.TEMPLATE.read_text(encoding='utf-8'), re.S)[1]
    given = ''.join(f'const {name} = {json.dumps(value)}\n' for name, value in values.items())
    (tmp_path / 'run.js').write_text(f'{script}\n{given}{code}', encoding='utf-8')
    done = subprocess.run([NODE, str(tmp_path / 'run.js')], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


# how a run stands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('records, config, tail, kind, said', [
    (STEPS, {'max_iters': 100}, '', 'complete', 'complete: 100 steps'),
    (STEPS, {'max_iters': 1000}, '', 'ended', 'ended at step 100 of 1,000: crashed, killed or stopped'),
    (STEPS, {'max_iters': 1000, 'flops_per_token': 6}, '', 'failed', 'crashed or killed at step 100 of 1,000'),
    (STEPS, None, '', 'ended', 'ended at step 100; there is no config.json'),
    ([*STEPS, {'step': 104, 'end': 'stopped', 'reason': 'stopped by SIGINT'}], {'max_iters': 1000}, '', 'ended',
     'stopped at step 104 of 1,000: stopped by SIGINT'),
    ([*STEPS, {'step': 100, 'end': 'not finite', 'reason': 'loss is nan'}], {'max_iters': 1000}, '', 'failed',
     'not finite: stopped at step 100 of 1,000: loss is nan'),
    ([*STEPS, {'step': 100, 'end': 'crashed', 'reason': 'OSError: a\nb'}], {'max_iters': 1000}, '', 'failed',
     'crashed at step 100 of 1,000: OSError: a b'),
    ([{'step': 9, 'end': 'stopped', 'reason': 'x'}, *STEPS], {'max_iters': 100}, '', 'complete', 'complete: 100 steps'),
    ([*STEPS[:50], {'step': 50, 'loss': math.nan}, {'step': 51, 'loss': -math.inf}], {'max_iters': 52}, '', 'failed',
     'complete: 52 steps; loss is NaN or infinite at step 50 and in 1 more lines'),
    ([{'step': 0, 'loss': 10**400}], {'max_iters': 1}, '', 'failed', 'complete: 1 steps; loss is NaN or infinite at step 0'),
    (STEPS, {'max_iters': 100}, '{"step": 100, "lo', 'complete', 'complete: 100 steps; log.jsonl: the last line is cut off'),
    (STEPS, {'max_iters': 100}, '{"step": 1}{"step": 2}\n\xff\n[1]\n{"step": "5"}\n{"step": -1}\n' + '[' * 9**5 + '\n', 'complete',
     'complete: 100 steps; log.jsonl: line 101 is damaged, and 5 more'),
    ([], {'max_iters': 100}, '', 'ended', 'log.jsonl is empty'),
    ([], {'max_iters': 100}, 'no JSON\n', 'ended', 'no line of log.jsonl can be read; log.jsonl: line 1 is damaged'),
    ([{'step': 0, 'val_loss': 2.0}, {'step': 10, 'val_loss': 1.0}], {'max_iters': 10}, '', 'complete', 'complete: 10 steps'),
])
def test_status(tmp_path, records, config, tail, kind, said):
    assert read(write_run(tmp_path / 'out', records, config, tail)).status() == (kind, said)


def test_status_of_folders_that_are_no_runs(tmp_path):
    (tmp_path / 'log.jsonl').mkdir()
    assert read(tmp_path).status() == ('ended', 'there is no log.jsonl; there is no config.json')
    write_run(tmp_path / 'out', config=[1])
    assert read(tmp_path / 'out').status()[1].endswith('config.json is damaged')
    if hasattr(os, 'mkfifo'):
        for name in ('log.jsonl', 'config.json', 'samples.jsonl'):
            (tmp_path / 'pipes').mkdir(exist_ok=True)
            os.mkfifo(tmp_path / 'pipes' / name)
        assert read(tmp_path / 'pipes').status()[0] == 'ended'


def test_a_run_is_running_while_it_holds_its_lock(tmp_path):
    folder = write_run(tmp_path / 'out', config={'max_iters': 1000, 'flops_per_token': 6})
    lock = lock_folder(folder)
    assert read(folder).status() == ('running', 'running: step 100 of 1,000')
    unlock(lock)
    assert read(folder).status()[0] == 'failed'
    unlock(lock_folder(folder))  # and reading took no lock for good


def test_a_log_that_goes_beyond_its_checkpoint_is_of_a_crash(tmp_path):
    """FLOPs per token then come from the checkpoint too."""
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=16)
    folder, model = write_run(tmp_path / 'out', config={'max_iters': 1000}), GPT(config)
    for step, kind in ((50, 'failed'), (100, 'ended')):
        torch.save({'model': model.state_dict(), 'model_args': vars(config), 'iter_num': step, 'best_val_loss': 1.0},
                   folder / 'ckpt.pt')
        run = read(folder)
        assert run.status()[0] == kind and run.flops_per_token == model.flops_per_token()
    (folder / 'ckpt.pt').write_bytes(b'PK damaged')
    assert read(folder).status()[0] == 'ended' and read(folder).flops_per_token is None


def test_runs_log_how_they_end(tmp_path, capsys):
    """Stopped, not finite or crashed; each prints the command that draws it."""
    run = checkpoint.Run(str(tmp_path / 'out'), {'max_iters': 9})
    run.log(step=0, loss=1.0)
    run.step = run.saved_step = run.tried_step = 1
    run.stop_reason = 'stopped by SIGTERM'

    def end():
        return {key: value for key, value in read(tmp_path / 'out').end.items() if key != 'train_time'}

    assert not run.finish(None)
    assert f'\n  python -m bench.runs {tmp_path}/out\n' in capsys.readouterr().out
    assert end() == {'step': 1, 'end': 'stopped', 'reason': 'stopped by SIGTERM'}
    with pytest.raises(SystemExit, match='python -m bench.runs'):
        run.stop_not_finite('loss is nan')
    assert end() == {'step': 1, 'end': 'not finite', 'reason': 'loss is nan'}
    hook = sys.excepthook
    try:
        run.explain_out_of_memory({}, '')
        sys.excepthook(UserError, UserError('no disk'), None)
    finally:
        sys.excepthook = hook
    assert end() == {'step': 1, 'end': 'crashed', 'reason': 'UserError: no disk'}
    assert len(plot.read_log(str(tmp_path / 'out'))[0]) == 1  # the picture leaves them out


# reading what is appended ---------------------------------------------------------------------------------------------


def test_only_appended_lines_are_read(tmp_path):
    path = tmp_path / 'log.jsonl'
    file = logs.Appended(str(path))
    assert file.read() == (False, [])
    path.write_bytes(b'one\ntw')
    assert file.read() == (True, [b'one']) and file.half == b'tw'
    with open(path, 'ab') as log:
        log.write(b'o\nthree\n')
    assert file.read() == (False, [b'two', b'three']) and file.read() == (False, [])
    path.write_bytes(b'cut\n')
    assert file.read() == (True, [b'cut'])
    path.write_bytes(b'new\nlonger than before\n')
    assert file.read() == (True, [b'new', b'longer than before'])
    (tmp_path / 'other').write_bytes(b'new\nlonger than before\n')
    os.replace(tmp_path / 'other', path)
    assert file.read()[0]
    path.unlink()
    assert file.read() == (True, []) and file.read() == (False, [])


def test_reading_in_pieces_gives_the_same(tmp_path):
    """A new key may appear late, and a table is padded."""
    records = [*STEPS, {'step': 60, 'val_loss': 1.0, 'sources': {'web': {'val_loss': 2}}}, {'step': 100, 'kl': 1}]
    whole = read(write_run(tmp_path / 'whole', records))
    run = logs.Folder(str(tmp_path / 'part'), 'part')
    for n in (1, 1, 30, 101, 102):
        write_run(tmp_path / 'new', records[:n])
        text = (tmp_path / 'new' / 'log.jsonl').read_bytes()
        (tmp_path / 'part').mkdir(exist_ok=True)
        with open(tmp_path / 'part' / 'log.jsonl', 'ab') as log:
            log.write(text[log.tell():])
        run.read()
    for name in ('steps', 'evaluations'):
        a, b = getattr(whole, name).columns, getattr(run, name).columns
        assert list(a) == list(b)
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    assert list(whole.evaluations.columns) == ['step', 'val_loss', 'sources.web.val_loss']
    assert np.isnan(run.steps.columns['kl'][:-1]).all() and run.steps.columns['kl'][-1] == 1


def test_a_log_with_a_new_key_in_each_line_stays_small(tmp_path):
    run = read(write_run(tmp_path / 'out', [{**{f'k{i}.{j}': 1 for j in range(100)}, 'step': i} for i in range(50)]))
    assert len(run.steps.columns) == logs.MOST_SERIES and '4,937 series more than 64' in run.status()[1]


# curves ---------------------------------------------------------------------------------------------------------------


def test_positions_on_the_axes(tmp_path):
    """An evaluation precedes the update of its step. What a line lacks comes from its neighbours."""
    run = read(write_run(tmp_path / 'out', [
        {'step': 0, 'val_loss': 3.0, 'train_time': 0.0}, {'step': 0, 'loss': 3.0, 'tokens': 10},
        {'step': 3, 'loss': 2.0, 'tokens': 40}, {'step': 4, 'val_loss': 2.0, 'train_time': 8.0},
        {'step': 6, 'val_loss': 2.0, 'train_time': 12.0}]))
    assert [list(x) for x in runs.x_of(run, 'step')] == [[0, 3], [0, 4, 6]]
    assert [list(x) for x in runs.x_of(run, 'train_time')] == [[2, 8], [0, 8, 12]]
    steps, evaluations = runs.x_of(run, 'tokens')
    assert list(steps) == [10, 40] and list(evaluations[:2]) == [0, 40] and math.isnan(evaluations[2])


@needs_node
def test_numbers_survive_packing(tmp_path):
    numbers = np.array([0.0, -0.0, 1.0, -2.5, 3.14159265, 1e-30, 6e-4, 1e300, -1e300, 65504.0, np.nan, 0.1 + 0.2])
    ours = in_node('console.log(JSON.stringify([[...unpack(packed, 3)], [...unpack(whole, 4)]]))', tmp_path,
                   packed=runs.pack(numbers, 3), whole=runs.pack(numbers, 4))
    expected = np.clip(numbers, -3e38, 3e38)
    for got, tolerance in zip(ours, (2**-16, 2**-23), strict=True):
        got = np.array([np.nan if x is None else x for x in got])
        np.testing.assert_allclose(got, expected, rtol=tolerance)


@needs_node
@pytest.mark.parametrize('n', [1, 7, 2000, 2001, 12345])
def test_no_spike_is_lost(tmp_path, n):
    rng = np.random.default_rng(n)
    losses = rng.normal(3, 0.1, n)
    losses[rng.integers(n)], losses[rng.integers(n)] = 50.0, -50.0
    folder = write_run(tmp_path / 'out', [{'step': i, 'loss': loss} for i, loss in enumerate(losses)])
    view, = runs.view_all([read(folder)])
    code = ("const c = unpackRun(view).tables[0].curves.get('loss'), f = a => Array.from(a)\n"
            'console.log(JSON.stringify([f(c.low), f(c.high), f(c.mean)]))')
    low, high, mean = map(np.array, in_node(code, tmp_path, view=view))
    assert len(low) == len(high) == len(mean) == min(n, runs.MOST_BUCKETS)
    assert low.min() == pytest.approx(losses.min(), rel=2**-16) and high.max() == pytest.approx(losses.max(), rel=2**-16)
    assert (low <= mean + 1e-3).all() and (mean <= high + 1e-3).all()
    if n <= runs.MOST_BUCKETS:
        np.testing.assert_allclose(mean, losses, rtol=2**-16)


@needs_node
def test_smoothing_is_that_of_plot(tmp_path):
    values = np.random.default_rng(0).normal(size=101).tolist()
    for window in (1, 2, 9, 50):
        ours = in_node('console.log(JSON.stringify([...smooth(values.map((_, i) => i), values, width)]))', tmp_path,
                       values=values, width=window - 1 + (window % 2 == 0))
        if window % 2:
            assert ours == pytest.approx(plot.smooth(values, window))
    with_gap = in_node('values[1] = NaN; console.log(JSON.stringify([...smooth([0, 1, 2, 3, 4], values, 2)]))', tmp_path,
                       values=[1.0, 2.0, 3.0, 6.0, 5.0])
    assert with_gap == [1, None, 4.5, pytest.approx(14 / 3), 5]


@needs_node
def test_what_the_page_chooses(tmp_path):
    """Series of all kinds of runs in an order, nearest points and samples, rows that differ, round ticks."""
    rl = [{'step': 0, 'val_loss': 0.25, 'val_accuracy': 0.75},
          {'step': 0, 'reward': 1.0, 'zebra': 1, 'kl': 0.1, 'lr': 1e-4, 'loss': 0.1, 'accuracy': 1.0}]
    folders = [write_run(tmp_path / 'a', rl, {'seed': 1, 'n': 2}, samples=[{'step': s, 'prompt': 'p', 'text': f't{s}'} for s in (0, 10, 10)]),
               write_run(tmp_path / 'b', rl[:1] + STEPS, {'seed': 2, 'n': 2, 'mlp': 'gelu'}), write_run(tmp_path / 'c')]
    names, places, rows, samples, places_of_ticks = in_node(
        'const all = views.map(unpackRun)\n'
        'console.log(JSON.stringify([panelNames(all), [-1, 0, 4, 6, 99].map(x => nearest(Float64Array.of(0, 4, 9, NaN), x)),\n'
        '  settingRows(all), [0, 4, 6, 99].map(s => samplesAt(all[0].samples, s)), ticks(0, 10, 5, false)]))', tmp_path,
        views=runs.view_all([read(folder) for folder in folders]))
    assert names == ['reward', 'loss', 'accuracy', 'share of wrong answers', 'kl', 'lr', 'zebra']
    assert places == [0, 0, 1, 1, 2] and places_of_ticks == [0, 2, 4, 6, 8, 10]
    assert rows == [['seed', ['1', '2', '?'], True], ['n', ['2', '2', '?'], False], ['mlp', ['not set', '"gelu"', '?'], True]]
    assert [found['step'] for found in samples] == [0, 0, 10, 10] and samples[2]['samples'] == [['p', 't10']] * 2


# the page -------------------------------------------------------------------------------------------------------------


def long_run(folder, n=50_000):
    rng = np.random.default_rng(0)
    losses, norms = rng.normal(3, 0.1, n), rng.normal(1, 0.1, n)
    return write_run(folder, [
        {'step': i, 'loss': losses[i], 'lr': 1e-3 / (i + 1), 'grad_norm': norms[i], 'tokens': i * 10**5, 'ms': 2.0 + i % 7,
         'mfu': 0.4 + i % 5 / 100, 'tokens_per_s': 10**6 + i % 99, 'train_time': i / 5} for i in range(n)], {'max_iters': n})


def test_ten_runs_of_50_000_lines_are_below_two_megabytes(tmp_path):
    long_run(tmp_path / '0')
    for i in range(1, 10):
        (tmp_path / str(i)).symlink_to(tmp_path / '0')
    folder = read(tmp_path / '0')
    folder.samples = [(step, 'p' * 100, '<\x00' * 900) for step in range(500)]
    page, _ = runs.make_page({'runs': runs.view_all([folder] * 10)}, is_live=False)
    assert len(page) < 2_000_000
    content = content_of(page.decode())['runs'][9]
    assert content['tables'][0]['n'] > 1000 and content['samples'][-1][0] == 499


@needs_chromium
@pytest.mark.slow
def test_ten_runs_of_50_000_lines_are_drawn_within_a_second(tmp_path):
    long_run(tmp_path / '0')
    write_page([tmp_path / '0'] * 10, tmp_path / 'runs.html')
    assert int(re.search(r'data-drawn="(\d+)"', dump(f'file://{tmp_path}/runs.html'))[1]) < 1000


def dump(address):
    """The elements of a page after its script has run."""
    return subprocess.run([CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--dump-dom', address],
                          capture_output=True, text=True, timeout=60).stdout


HOSTILE = {'max_iters': 100, IMAGE: IMAGE, '__proto__': {'a': 1}, 'b': '</script><script>alert(1)</script>', 'nan': math.nan, 'half': '\ud800'}


def hostile_folders(tmp_path):
    samples = [{'step': 5, 'prompt': IMAGE, 'text': f'</script>{IMAGE}\u2028\0\ud83d'}, {'step': 9, 'prompt': 5}]
    records = [{**record, IMAGE: 1, '__proto__': 2, 'constructor': 3} for record in STEPS]
    end = {'step': 100, 'end': [IMAGE], 'reason': {'a': IMAGE}}
    return [write_run(tmp_path / f'{IMAGE.replace("/", "")}{i}', [*records, end], HOSTILE if i else {}, samples=samples) for i in range(2)]


def test_nothing_that_a_run_says_is_markup(tmp_path):
    page, policy = write_page(hostile_folders(tmp_path), tmp_path / 'runs.html')
    tags = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(page)
    names = [tag for tag, _ in tags]
    assert 'img' not in names and names.count('style') == 1 and names.count('script') == 2  # one of them is data
    assert not any(key in attributes for _, attributes in tags for key in ('src', 'href', 'onclick'))
    assert not re.search(r'innerHTML|outerHTML|insertAdjacent|document\.write|https?://(?!www\.w3\.org)|import\b|\beval\(', page)
    view = content_of(page)['runs'][1]
    assert view['settings'][IMAGE] == json.dumps(IMAGE) and view['samples'][0][2].startswith('</script><img')
    for tag in ('script', 'style'):
        part = re.search(f'<{tag}>(.*?)</{tag}>', page, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'") and 'unsafe' not in policy and f'content="{policy}"' in page


@needs_chromium
def test_the_page_in_chromium(tmp_path):
    folders = hostile_folders(tmp_path)
    for path in (*tmp_path.glob('*/config.json'), *tmp_path.glob('*/samples.jsonl')):  # --dump-dom dies of half a pair
        path.write_text(re.sub(r'\\ud83d|\\ud800', '', path.read_text()))
    write_page([*folders, write_run(tmp_path / 'nan', [*STEPS, {'step': 100, 'loss': math.nan}])], tmp_path / 'runs.html')
    shown = dump(f'file://{tmp_path}/runs.html')
    assert 'data-drawn="' in shown and '<img' not in shown.replace(re.search(r'id="content">.*?</script>', shown, re.S)[0], '')
    assert shown.count('<canvas') == 5 and '&lt;img src=x onerror=alert(1)&gt;1' in shown
    assert '<span class="failed">ended at step 101; loss is NaN or infinite at step 100' in shown
    assert '<strong>5</strong>' in shown and 'step 9' in shown  # the last sample, where no cursor is


def test_command(tmp_path):
    folders = [write_run(tmp_path / name, [{'step': 0, 'val_loss': 2.5}, *STEPS], {'max_iters': n})
               for name, n in (('a/out', 100), ('b/out', 200))]
    (tmp_path / 'empty').mkdir()

    def run(*arguments):
        return subprocess.run([sys.executable, '-m', 'bench.runs', *map(str, arguments)], cwd=tmp_path, text=True, capture_output=True,
                              env={**os.environ, 'PYTHONPATH': str(ROOT)})

    done = run(*folders, 'empty', folders[0])
    assert done.returncode == 0, done.stderr
    assert f'{folders[0]}: complete: 100 steps; lowest val loss 2.5000 at step 0\n' in done.stdout
    assert 'empty: there is no log.jsonl' in done.stdout and '\nwrote runs.html (0.0 MB)' in done.stdout
    assert [row['kind'] for row in json.loads(done.stdout.splitlines()[-1])['runs']] == ['complete', 'ended', 'ended']
    assert len(content_of((tmp_path / 'runs.html').read_text())['runs']) == 3
    for arguments, said in ((['nowhere'], "there is no folder 'nowhere'; expected the out_dir of a run"),
                            (['empty', '--html=no/folder/x.html'], 'could not be written'),
                            (['empty', '--watch', '--port=99999'], '--port=99999')):
        done = run(*arguments)
        assert done.returncode and said in done.stderr and 'Traceback' not in done.stderr


def test_the_package_ships_the_page():
    project = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    assert f'\nbench = ["{runs.TEMPLATE.name}"]\n' in project
    source = runs.TEMPLATE.read_text(encoding='utf-8')
    assert source.count(runs.MARK) == source.count(runs.POLICY) == 1


# the server -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path):
    """A run's folder, and a function that asks the server of its page."""
    folder = write_run(tmp_path / 'out', STEPS[:50], {'max_iters': 100})
    process = subprocess.Popen([sys.executable, '-m', 'bench.runs', 'out', '--watch', '--port=0'], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    lines = []
    while not lines or 'serving' not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    port = int(re.search(r'http://127\.0\.0\.1:(\d+);', lines[-1])[1])

    def ask(path, host=('localhost',), method='GET'):
        connection = http.client.HTTPConnection('127.0.0.1', port, timeout=20)
        connection.putrequest(method, path, skip_host=True)
        for name in host:
            connection.putheader('Host', name)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()

    yield folder, ask, process
    process.kill()
    process.communicate()


def test_the_server_sends_what_has_changed(served):
    folder, ask, process = served
    status, headers, page = ask('/')
    assert status == 200 and "connect-src 'self'" in headers['Content-Security-Policy']
    content = content_of(page.decode())
    assert content['live'] and content['runs'][0]['status'] == 'ended at step 50 of 100: crashed, killed or stopped'

    def news(known):
        return json.loads(ask(f'/data?known={",".join(known)}')[2])

    assert news(content['versions'])['runs'] == [None]
    write_run(folder, STEPS[:60], tail='{"step": 60')
    changed = news(content['versions'])
    assert 'step 60 of 100' in changed['runs'][0]['status'] and changed['versions'] != content['versions']
    write_run(folder, STEPS[:5])  # a new run
    assert 'step 5 of 100' in news(changed['versions'])['runs'][0]['status']
    shutil.rmtree(folder)
    assert 'there is no log.jsonl' in news([])['runs'][0]['status']
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0 and process.stdout.read() == '\nended\n'


def test_the_server_answers_this_machine_alone(served):
    _, ask, _ = served
    for host in (['localhost:8001'], ['127.0.0.1'], ['[::1]:9'], ['LocalHost']):
        assert ask('/', host)[0] == 200
    for host in (['evil.example'], ['localhost.evil.example'], ['127.0.0.1.nip.io:8001'], ['localhost:1:2'], [], ['localhost', 'evil.example']):
        status, headers, answer = ask('/data', host)
        assert status == 403 and b'loss' not in answer
    for path in ('/out/log.jsonl', '/../out/config.json', '/data/..', 'http://evil.example/data', '/favicon.ico', '/%64ata'):
        assert ask(path)[0] == 404
    assert ask('/', method='POST')[0] == 501
    status, headers, answer = ask('/', method='HEAD')
    assert (status, answer) == (200, b'') and headers['X-Content-Type-Options'] == 'nosniff'


# a run from train.py --------------------------------------------------------------------------------------------------


def test_a_trained_run(finished: tuple[Folder, dict]):
    """Its log has all axes, and config.json its FLOPs per token."""
    run = read(finished[0].path / 'out')
    state = finished[0].checkpoint()
    assert run.status() == ('complete', f'complete: {run.max_iters} steps')
    assert run.flops_per_token == GPT(GPTConfig(**state['model_args'])).flops_per_token()
    for axis in runs.AXES:
        assert all(np.isfinite(x).all() and (np.diff(x) >= 0).all() for x in runs.x_of(run, axis))
