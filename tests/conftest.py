"""Shared by the tests: tiny datasets, and running train.py and sample.py as processes of their own."""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import pickle
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

import tokenizer

ROOT = Path(__file__).resolve().parent.parent
if (ROOT.parent / 'shared' / 'tiktoken').is_dir():
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', str(ROOT.parent / 'shared' / 'tiktoken'))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell's & and nohup let pytest ignore Ctrl-C; processes that it starts would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile('shared machine', deadline=None)  # an example that waited for a core is no failure
settings.load_profile('shared machine')
# threads cost more than they bring with tensors this small, and very much more where others use the same cores
torch.set_num_threads(1)
# the environment of the processes that tests start
os.environ.update(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='passive', PYTHONPATH=str(ROOT))

# a model and a run of it that take a second; every test says what it changes
TINY = {'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'block_size': 16, 'batch_size': 4, 'gradient_accumulation_steps': 2,
        'dropout': 0.0, 'learning_rate': 1e-2, 'max_iters': 20, 'lr_decay_iters': 20, 'warmup_iters': 2,
        'min_lr': 1e-3, 'eval_interval': 10, 'eval_iters': 2, 'dataset': 'tiny', 'out_dir': 'out', 'device': 'cpu',
        'dtype': 'float32', 'compile': False}


def load_or_skip(name):
    """Load a published vocabulary, downloaded once; skip the test where it cannot be had."""
    try:
        return tokenizer.load(name)
    except ValueError as error:
        pytest.skip(f'{name} cannot be had here: {str(error)[:60]}')


@pytest.fixture(scope='module')
def gpt2():
    return load_or_skip('gpt2')


# processes ------------------------------------------------------------------------------------------------------------
# Starting Python and importing torch takes three seconds, most of a tiny run, and the project's modules half of the rest.
# A fork server has imported both once and forks for every run: otherwise each run is what `python train.py ...` would
# be, with its own exit code and signals.
context = multiprocessing.get_context('forkserver' if 'forkserver' in multiprocessing.get_all_start_methods()
                                      else 'spawn')
if context.get_start_method() == 'forkserver':
    context.set_forkserver_preload(['torch', 'torch._dynamo', 'torch.distributed', 'torch.nn.parallel', 'tqdm', 'numpy',
                                    'runpy', 'pytest', 'hypothesis', 'torch.distributed.algorithms.join', 'data.mixture',
                                    'flatgpt.decoding', 'flatgpt.plan', 'flatgpt.samples', 'flatgpt.sharded',
                                    'flatgpt.shares', 'posttrain.evaluation', 'posttrain.preferences',
                                    'posttrain.reward_model', 'posttrain.rollouts', 'posttrain.tools'])
ROOMS = {path.stem for path in ROOT.iterdir() if path.suffix == '.py' or (path / '__init__.py').exists()}


def execute(script, argv, cwd, env, output, home=ROOT):
    """
    Become `python script argv`, or `python -m script argv`, in the child.

    It prints to the file `output` and reads the file of that name with '.in' behind, if there is one. home: the
    repository, or a copy of it with modules of its own.
    """
    if os.path.exists(f'{output}.in'):
        os.dup2(os.open(f'{output}.in', os.O_RDONLY), 0)
        sys.stdin = open(0, closefd=False)
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout, sys.stderr = open(1, 'w', buffering=1, closefd=False), open(2, 'w', buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    if hasattr(signal, 'SIGHUP'):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where pytest runs under nohup
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [script, *argv]
    if home != ROOT:
        for name in [name for name in sys.modules if name.partition('.')[0] in ROOMS]:
            del sys.modules[name]
    sys.path.insert(0, os.path.dirname(script) if script.endswith('.py') else str(home))
    try:
        if script.endswith('.py'):
            runpy.run_path(script, run_name='__main__')
        else:
            runpy.run_module(script, run_name='__main__', alter_sys=True)
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())  # which train.py and sample.py replace; multiprocessing would not call it
        sys.exit(1)


class Run:
    """A script that runs in its own process. `out` is all it has printed so far, `code` its exit code once it ended."""

    def __init__(self, script, argv, cwd, env=None, typed=None, home=ROOT):
        self.argv = argv
        self.path = Path(cwd) / f'.output-{time.monotonic_ns()}'
        if typed is not None:
            Path(f'{self.path}.in').write_text(typed, encoding='utf-8')
        self.script = str(home / script) if script.endswith('.py') else script
        self.process = context.Process(
            target=execute, args=(self.script, self.argv, str(cwd), env or {}, str(self.path), home),
            daemon=True)  # ends with pytest, however a test left it
        self.process.start()

    @property
    def out(self):
        return self.path.read_text(encoding='utf-8', errors='replace') if self.path.exists() else ''

    @property
    def code(self):
        return self.process.exitcode

    def wait(self, timeout=600):  # seconds; only a run that hangs takes so long
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            pytest.fail(f'{self.argv} still ran after {timeout} s. It said:\n{self.out}')
        return self

    def wait_for(self, pattern, timeout=600):
        """Until the output matches `pattern`; -> the match."""
        end = time.monotonic() + timeout
        while (found := re.search(pattern, self.out)) is None:
            if time.monotonic() > end or not self.process.is_alive():
                self.process.kill()
                pytest.fail(f'{self.argv}: no {pattern!r} in:\n{self.out}')
            time.sleep(0.005)
        return found

    def kill(self, number):
        with contextlib.suppress(ProcessLookupError):  # it may have ended just now
            os.kill(self.process.pid, number)
        return self

    def stop(self, number=signal.SIGTERM):
        """Ask it to stop, which it does once it has saved; -> (its last step, the settings it says to go on with)."""
        self.kill(number).ok()
        *_, said, command = self.out.splitlines()
        step = re.fullmatch(rf'stopped by {number.name} after step (\d+)\. To go on:', said)
        assert step, self.out
        started_as = ['python', self.script] if self.script.endswith('.py') else ['python', '-m', self.script]
        argv = shlex.split(command)
        assert argv[:len(started_as)] == started_as
        argv = argv[len(started_as):]
        settings = dict(a.removeprefix('--').split('=', 1) for a in argv)
        assert settings['init_from'] == 'resume'
        return int(step[1]), settings

    def ok(self):
        assert self.wait().code == 0, self.out
        return self

    def refused(self, *said):
        """It ended with an error whose message has all of `said`, addressed to the user: without a traceback."""
        assert self.wait().code not in (0, None), self.out
        for text in said:
            assert text in self.out, f'{text!r} is not in:\n{self.out}'
        assert 'Traceback' not in self.out, self.out
        return self


def copy_scripts(home):
    """Copy all that runs from the repository to the folder home, without its datasets."""
    for path in ROOT.glob('*.py'):
        shutil.copy(path, home)
    for room in ('config', 'data', 'flatgpt', 'posttrain', 'tokenizer'):
        shutil.copytree(ROOT / room, home / room, ignore=shutil.ignore_patterns('__pycache__', '*.bin', '*.jsonl', '*.txt'))


def environments(n):
    """The environment that torchrun would give to each of n processes."""
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    return [{'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(n), 'LOCAL_WORLD_SIZE': str(n),
             'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(port)} for rank in range(n)]


class Folder:
    """A folder in which scripts run, with datasets under data/."""

    def __init__(self, path):
        self.path = Path(path)

    def start(self, script, *files, env=None, typed=None, home=ROOT, **settings):
        """Start a script with config files and settings. typed: its standard input. home: see execute()."""
        argv = [*map(str, files), *(f'--{key}={value}' for key, value in settings.items())]
        return Run(script, argv, self.path, env, typed, home)

    def train(self, *files, env=None, **changes):
        """train.py with the TINY settings under `changes`, to its end. A change to None leaves the setting out."""
        return self.start_train(*files, env=env, **changes).wait()

    def start_train(self, *files, env=None, **changes):
        settings = {key: value for key, value in {**TINY, **changes}.items() if value is not None}
        return self.start('train.py', *files, env=env, **settings)

    def start_two(self, *files, n=2, **changes):
        """The same by two processes, or n, in the environment that torchrun would give them; -> all."""
        return [self.start_train(*files, **changes, env=env) for env in environments(n)]

    def train_two(self, *files, n=2, **changes):
        """All of them, to their end; -> the first."""
        return [run.ok() for run in self.start_two(*files, n=n, **changes)][0]

    def sample(self, **settings):
        """sample.py to its end."""
        return self.start('sample.py', **{'device': 'cpu', 'out_dir': 'out', **settings}).wait()

    def batch(self, **settings):
        """Run flatgpt.batch to its end."""
        return self.start('flatgpt.batch', **{'device': 'cpu', 'out_dir': 'out', **settings}).wait()

    def checkpoint(self, out_dir='out', name='ckpt.pt'):
        return torch.load(self.path / out_dir / name, weights_only=True)

    def log(self, out_dir='out'):
        return [json.loads(line) for line in (self.path / out_dir / 'log.jsonl').read_text().splitlines()]


def load_lab(name, *arguments):
    """A script of lab/ as a module with the settings that `arguments` give it, for its functions; main() is not run."""
    return load_script(ROOT / 'lab' / f'{name}.py', *arguments)


def load_script(path, *arguments):
    """The same of any script that has a main()."""
    name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    if path.parent.parent.name == 'data':
        name = f'data_{path.parent.name}_prepare'
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    argv, sys.argv = sys.argv, [str(path), *arguments]
    try:
        spec.loader.exec_module(module)
    finally:
        sys.argv = argv
    return module


def same_tensors(a, b):
    """Two dicts of tensors hold the same bits."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f'{name} differs'


def same_state(a, b):
    """Two checkpoints hold the same bits: weights, optimizer moments, and where the run stands."""
    same_tensors(a['model'], b['model'])
    same_tensors(a.get('unaveraged', {}), b.get('unaveraged', {}))
    assert a['optimizer']['state'].keys() == b['optimizer']['state'].keys()
    for i, moments in a['optimizer']['state'].items():
        for name, value in moments.items():
            assert torch.equal(value, b['optimizer']['state'][i][name]), f'{name} of parameter {i} differs'
    for key in ('iter_num', 'best_val_loss', 'evals_since_best', 'model_args', 'scaler', 'tokenizer'):
        assert a[key] == b[key], key


def close_state(a, b, tolerance=1e-5):
    """Two checkpoints hold the same weights but for the rounding of float32."""
    for name in a['model']:
        torch.testing.assert_close(a['model'][name], b['model'][name], atol=tolerance, rtol=0)


# datasets -------------------------------------------------------------------------------------------------------------

WORDS = 'the cat sat on a mat and ran to its den; who saw it go? no one, but me.'.split()
CHARS = sorted(set('\n ' + ''.join(WORDS)))


def make_text(n, seed=0):
    """n characters of made-up text, in which a character does tell something about the next."""
    rng = random.Random(seed)
    text = ''
    while len(text) < n:
        text += rng.choice(WORDS) + rng.choice('  \n')
    return text[:n]


def encode(text):
    return np.array([CHARS.index(char) for char in text])


def write_dataset(folder, train, val, dtype='uint16', meta='json', chars=CHARS):
    """Token ids as a dataset in `folder`. meta: 'json' as flatgpt writes it, 'pkl' as nanoGPT does, None."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split, ids in (('train', train), ('val', val)):
        np.asarray(ids).astype(dtype).tofile(folder / f'{split}.bin')
    if meta == 'json':
        (folder / 'meta.json').write_text(json.dumps({
            'dtype': dtype, 'vocab_size': len(chars), 'tokens': {'train': len(train), 'val': len(val)},
            'tokenizer': {'kind': 'char', 'chars': ''.join(chars)}}))
    elif meta == 'pkl':
        with open(folder / 'meta.pkl', 'wb') as f:
            pickle.dump({'vocab_size': len(chars), 'itos': dict(enumerate(chars)),
                         'stoi': {char: i for i, char in enumerate(chars)}}, f)


@pytest.fixture
def folder(tmp_path):
    """An empty working folder with the dataset data/tiny in it."""
    write_dataset(tmp_path / 'data' / 'tiny', encode(make_text(3000)), encode(make_text(333, seed=1)))
    return Folder(tmp_path)


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    """A folder for runs that several tests read but none changes."""
    path = tmp_path_factory.mktemp('shared')
    write_dataset(path / 'data' / 'tiny', encode(make_text(3000)), encode(make_text(333, seed=1)))
    return Folder(path)


@pytest.fixture(scope='module')
def finished(shared):
    """(the folder, the output) of a run of 20 steps with the TINY settings."""
    return shared, shared.train().ok()


@pytest.fixture
def tiny_run(finished, folder):
    """A folder of the test's own in which that run has happened."""
    shutil.copytree(finished[0].path / 'out', folder.path / 'out')
    return folder


def losses(run):
    """Training losses by step, and (train, val) of evaluations by step, as printed."""
    steps = {int(n): float(x) for n, x in re.findall(r'^iter (\d+): loss (\S+),', run.out, re.M)}
    evals = {int(n): (float(a), float(b))
             for n, a, b in re.findall(r'^step (\d+): train loss (\S+), val loss (\S+)$', run.out, re.M)}
    return steps, evals


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """A folder with a model trained until it writes words. Tests must not change it."""
    path = tmp_path_factory.mktemp('sample')
    write_dataset(path / 'data' / 'tiny', encode(make_text(3000)), encode(make_text(333, seed=1)))
    folder = Folder(path)
    folder.train(max_iters=200, lr_decay_iters=200, eval_interval=100, n_embd=32).ok()
    return folder


# pages ----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def browser():
    """A browser; without one the test is skipped."""
    import chromium
    if chromium.EXECUTABLE is None:
        pytest.skip('Chromium is not installed')
    browser = chromium.Chromium()
    yield browser
    browser.close()


@pytest.fixture(scope='module')
def api():
    """A server of which the test chooses the answers."""
    from api_server import Api
    api = Api()
    yield api
    api.shutdown()


@pytest.fixture
def page(browser, api):
    """The chat page of that server; at the end the browser has found nothing wrong with it."""
    api.reset()
    page = browser.open(api.url)
    page.wait('state.model')
    yield page
    assert page.complaints() == []
    assert set(api.paths) <= {'/', '/v1/models', '/v1/chat/completions', '/v1/completions', '/tokenize'}
    page.close()


@pytest.fixture
def course(folder, tmp_path_factory, monkeypatch):
    """A folder with tiny models of lab/course.py in out/, which have barely learnt. The tests make them once."""
    import fcntl

    from lab.course import Course

    base = tmp_path_factory.getbasetemp()
    # beside the folders of all workers, and as deep as a test's, since commands name scripts from there
    made = base.parent / 'course' / 'made' if 'PYTEST_XDIST_WORKER' in os.environ else base / 'course'
    made.mkdir(parents=True, exist_ok=True)
    with open(made / 'lock', 'w') as lock, monkeypatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.chdir(made)
        if not (made / 'whole').exists():
            Course(share=0.01, out='out', n_layer=1, n_embd=16).make('base', 'sft', 'reward', 'ppo', 'grpo')
            path = made / 'out' / 'state_of_gpt' / 'stages.json'
            stages = json.loads(path.read_text())
            for stage in stages.values():  # the labs shall take them for models of the usual size
                stage['command'] = [part for part in stage['command'] if part not in ('--n_layer=1', '--n_embd=16')]
            path.write_text(json.dumps(stages))
            (made / 'whole').touch()
    shutil.copytree(made / 'out', folder.path / 'out')
    return folder


@pytest.fixture
def texts(folder):
    """A folder with a corpus of bytes, data/bytes, and a short text in the same words, target.txt."""
    data = folder.path / 'data' / 'bytes'
    data.mkdir()
    parts = {'train': make_text(30_000).encode(), 'val': make_text(3_000, seed=1).encode()}
    for split, text in parts.items():
        np.frombuffer(text, np.uint8).astype(np.uint16).tofile(data / f'{split}.bin')
    (data / 'meta.json').write_text(json.dumps({
        'dtype': 'uint16', 'vocab_size': 256, 'tokens': {split: len(text) for split, text in parts.items()},
        'tokenizer': {'kind': 'byte'}}))
    (folder.path / 'target.txt').write_text(make_text(3_000, seed=2))
    return folder
