"""checkpoint.py: what a disk, a kill or a stranger can do to a file. Run: pytest tests/test_checkpoint.py"""

import json
import os
import pickle
import random
import resource
import subprocess
import sys

import pytest
import torch
from conftest import CHARS, ROOT, write_dataset

from flatgpt import checkpoint, outdir, pretrained
from model import GPT, GPTConfig
from tokenizer import CharTokenizer


def make_state(iter_num=3, width=8):
    torch.manual_seed(iter_num)
    return {'model': {'a.weight': torch.randn(width, width), 'b.bias': torch.randn(width)},
            'optimizer': {'state': {0: {'step': torch.tensor(3.0), 'exp_avg': torch.randn(width)}},
                          'param_groups': [{'lr': 0.1, 'betas': (0.9, 0.95), 'fused': True, 'params': [0]}]},
            'model_args': {'n_layer': 1, 'vocab_size': 8}, 'iter_num': iter_num, 'best_val_loss': 1.5,
            'config': {'dataset': 'tiny', 'compile': 'auto'}, 'tokenizer': {'kind': 'byte'}, 'scaler': {}}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def files(folder):
    return sorted(os.listdir(folder))


# saving ---------------------------------------------------------------------------------------------------------------

def test_round_trip(tmp_path):
    state = make_state()
    checkpoint.save(str(tmp_path), state, is_best=False)
    assert files(tmp_path) == ['ckpt.pt']
    loaded = checkpoint.load(str(tmp_path / 'ckpt.pt'))
    assert loaded.pop('version') == checkpoint.VERSION
    assert equal(loaded, state)


def test_best_is_the_best(tmp_path):
    for iter_num, is_best in ((1, True), (2, False), (3, True), (4, False)):
        checkpoint.save(str(tmp_path), make_state(iter_num), is_best)
    assert files(tmp_path) == ['best.pt', 'ckpt.pt']
    assert checkpoint.load(str(tmp_path / 'best.pt'))['iter_num'] == 3
    assert checkpoint.load(str(tmp_path / 'ckpt.pt'))['iter_num'] == 4


def test_best_without_hard_links(tmp_path, monkeypatch):
    def link(source, target):
        raise PermissionError('no hard links here')

    monkeypatch.setattr(os, 'link', link)
    checkpoint.save(str(tmp_path), make_state(1), is_best=True)
    assert files(tmp_path) == ['best.pt', 'ckpt.pt']
    assert (tmp_path / 'best.pt').read_bytes() == (tmp_path / 'ckpt.pt').read_bytes()
    (tmp_path / 'best.pt').unlink()
    outdir.open_folder(str(tmp_path), {}, 0, version=0)
    assert (tmp_path / 'best.pt').read_bytes() == (tmp_path / 'ckpt.pt').read_bytes()


@pytest.mark.parametrize('call', ['fsync', 'replace'])
@pytest.mark.parametrize('is_best', [False, True])
def test_failing_system_calls(tmp_path, monkeypatch, call, is_best):
    """Whichever step fails, the old files stay whole, the error is an OSError, and nothing is left lying about."""
    checkpoint.save(str(tmp_path), make_state(1), is_best=True)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

    def fail(*args):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match='No space left'):
            checkpoint.save(str(tmp_path), make_state(2), is_best)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_bytes_are_on_disk_before_the_name(tmp_path, monkeypatch):
    """fsync comes before the rename, and is of the file that is renamed."""
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: events.append(('fsync', os.fstat(fd).st_ino)) or fsync(fd))
    monkeypatch.setattr(os, 'replace', lambda a, b: events.append(('replace', os.stat(a).st_ino, os.path.basename(b)))
                        or replace(a, b))
    checkpoint.save(str(tmp_path), make_state(), is_best=True)
    inode = (tmp_path / 'ckpt.pt').stat().st_ino
    assert events == [('fsync', inode), ('replace', inode, 'best.pt'), ('replace', inode, 'ckpt.pt'),
                      ('fsync', tmp_path.stat().st_ino)]


def limited_save(folder, limit, is_best):
    """For a process of its own: save with files limited to `limit` bytes, which fails like a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        checkpoint.save(folder, make_state(2, width=256), is_best)
    except OSError as error:
        print(f'OSError {error}')


def test_full_disk(tmp_path):
    """A real write that fails, at the first byte, within the tensors, and within the closing directory of the zip."""
    checkpoint.save(str(tmp_path), make_state(2, width=256), is_best=True)
    size = (tmp_path / 'ckpt.pt').stat().st_size
    checkpoint.save(str(tmp_path), make_state(1), is_best=True)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    assert files(tmp_path) == ['best.pt', 'ckpt.pt']
    limits = [0, 100, size // 2, size - 1]
    code = ''.join(f'test_checkpoint.limited_save({str(tmp_path)!r}, {limit}, {limit != 100})\n'
                   for limit in reversed(limits))
    done = subprocess.run([sys.executable, '-c', f'import sys\nsys.path[:0] = {[str(ROOT), str(ROOT / "tests")]}\n'
                           f'import test_checkpoint\n{code}'], capture_output=True, text=True)
    assert done.stdout.count('OSError') == 4 and done.returncode == 0, done.stdout + done.stderr
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_a_start_removes_what_a_kill_left(tmp_path):
    folder = tmp_path / 'out [1]'  # brackets mean something to glob
    folder.mkdir()
    half = '.0123456789abcdef.tmp'
    for name in ('best.pt', f'ckpt.pt{half}', f'best.pt{half}', f'log.jsonl{half}', f'config.json{half}', f'mine{half}'):
        (folder / name).write_text('x')
    outdir.open_folder(str(folder), {}, 3, version=1)
    assert files(folder) == ['best.pt', 'config.json', f'mine{half}']


# loading --------------------------------------------------------------------------------------------------------------

def refused(path, *said):
    with pytest.raises(ValueError) as error:
        checkpoint.load(str(path))
    for text in (str(path), *said):
        assert text in str(error.value), error.value


def test_missing(tmp_path):
    refused(tmp_path / 'ckpt.pt', 'no checkpoint at', f'python train.py CONFIG --out_dir={tmp_path}')


class Evil:
    """Unpickled without care, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize('how', ['torch', 'old torch', 'pickle'])
def test_malicious_pickle_does_not_run(tmp_path, how):
    path, ran = tmp_path / 'ckpt.pt', tmp_path / 'ran'
    state = {**make_state(), 'config': Evil(ran)}
    if how == 'pickle':
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=how == 'torch')
    refused(path, 'refused', 'run code')
    assert not ran.exists()
    if how == 'torch':
        torch.load(path, weights_only=False)
        assert ran.exists()  # it would have, elsewhere


def test_truncated(tmp_path):
    checkpoint.save(str(tmp_path), make_state(), is_best=False)
    path = tmp_path / 'ckpt.pt'
    whole = path.read_bytes()
    for length in (0, 1, 2, 3, 10, 100, 1000, len(whole) // 2, len(whole) - 100, len(whole) - 22, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, 'damaged or truncated', 'best.pt')


def test_flipped_bytes(tmp_path):
    """Wherever a byte goes bad, the file is refused, or what it held is read all the same; never something else."""
    state = make_state()
    checkpoint.save(str(tmp_path), state, is_best=False)
    path = tmp_path / 'ckpt.pt'
    whole, rng, n_refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        position = rng.randrange(len(whole))
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << rng.randrange(8)]) + whole[position + 1 :])
        try:
            loaded = checkpoint.load(str(path))
        except ValueError as error:
            assert str(path) in str(error)
            n_refused += 1
        else:
            assert loaded.pop('version') == 1 and equal(loaded, state), f'byte {position} changed unnoticed'
    assert n_refused > 50


@pytest.mark.parametrize('content', [b'', b'hello', b'\x80\x02', b'PK\x03\x04' + bytes(100), bytes(1000),
                                     b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n'])
def test_not_a_torch_file(tmp_path, content):
    (tmp_path / 'ckpt.pt').write_bytes(content)
    refused(tmp_path / 'ckpt.pt', 'ckpt.pt is damaged or truncated')


@pytest.mark.parametrize('content', [[1, 2], {'model': {}}, torch.zeros(3), {'a.weight': torch.zeros(3)}, 'text', None])
def test_not_a_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / 'ckpt.pt')
    refused(tmp_path / 'ckpt.pt', 'is no checkpoint', 'model_args')


@pytest.mark.parametrize('key, value', [
    ('model', None), ('model', [1]), ('model_args', None), ('iter_num', None), ('iter_num', '7'),
    ('best_val_loss', None)])
def test_incomplete(tmp_path, key, value):
    """A key is missing (None) or holds something else."""
    state = {**make_state(), key: value}
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / 'ckpt.pt')
    refused(tmp_path / 'ckpt.pt', 'is no checkpoint', f'it has no {key}' if value is None else f'{key}')


def test_model_of():
    """The model comes back bit for bit; whatever is wrong with its weights or their description is named."""
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=2, n_head=2, n_embd=8, bias=False))
    args = {'block_size': 8, 'vocab_size': 16, 'n_layer': 2, 'n_head': 2, 'n_embd': 8, 'bias': False, 'dropout': 0.0}
    weights = model.state_dict()
    found = pretrained.model_of({'model': weights, 'model_args': args}, 'x.pt', dropout=0.25)
    assert equal(dict(found.state_dict()), dict(weights)) and found.transformer.drop.p == 0.25
    name = 'transformer.h.1.attn.c_attn.weight'
    for changes, said in (
            ({'model': {k: v for k, v in weights.items() if k != name}}, f'Missing key(s) in state_dict: "{name}"'),
            ({'model': {**weights, 'extra.bias': torch.zeros(2)}}, 'Unexpected key(s) in state_dict: "extra.bias"'),
            ({'model': {**weights, name: torch.zeros(24, 9)}}, f'size mismatch for {name}'),
            ({'model': {}}, 'Missing key(s) in state_dict: "transformer.wte.weight"'), ({'model_args': {**args, 'n_layer': 3}}, 'h.2.'),
            ({'model_args': {**args, 'n_layer': 1}}, '"transformer.h.1.ln_1.weight"'),
            ({'model_args': {**args, 'vocab_size': 20}}, 'size mismatch for transformer.wte.weight'),
            ({'model_args': {k: v for k, v in args.items() if k != 'n_head'}}, 'model_args lacks n_head'),
            ({'model_args': {**args, 'n_expert': 8}}, "unexpected keyword argument 'n_expert'")):
        with pytest.raises(ValueError) as error:
            pretrained.model_of({'model': weights, 'model_args': args, **changes}, 'x.pt', dropout=0.0)
        assert str(error.value).startswith('x.pt holds no model') and said in str(error.value)


def test_newer_version(tmp_path):
    torch.save({**make_state(), 'version': checkpoint.VERSION + 1}, tmp_path / 'ckpt.pt')
    refused(tmp_path / 'ckpt.pt', f'version {checkpoint.VERSION + 1}', 'Update')


@pytest.mark.parametrize('prefix', ['', '_orig_mod.', 'module.', 'module._orig_mod.'])
def test_prefixes_are_stripped(tmp_path, prefix):
    state = make_state()
    torch.save({**state, 'model': {prefix + name: t for name, t in state['model'].items()}}, tmp_path / 'ckpt.pt')
    assert equal(checkpoint.load(str(tmp_path / 'ckpt.pt'))['model'], state['model'])


def test_nanogpts_gelu(tmp_path):
    """nanoGPT's files have no version; its MLP takes the exact GELU, ours what model_args says."""
    torch.save(make_state(), tmp_path / 'ckpt.pt')
    assert checkpoint.load(str(tmp_path / 'ckpt.pt'))['model_args'] == {
        'n_layer': 1, 'vocab_size': 8, 'mlp': 'gelu_erf'}
    checkpoint.save(str(tmp_path), make_state(), is_best=False)
    assert 'mlp' not in checkpoint.load(str(tmp_path / 'ckpt.pt'))['model_args']


# the tokenizer of a checkpoint ----------------------------------------------------------------------------------------

def test_tokenizer_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = make_state()
    assert pretrained.tokenizer_of(state).vocab_size == 256
    write_dataset('data/tiny', range(9), range(9), meta='pkl')
    nanogpts = {key: value for key, value in state.items() if key != 'tokenizer'}
    nanogpts['model_args'] = {**state['model_args'], 'vocab_size': len(CHARS)}
    found = pretrained.tokenizer_of(nanogpts)
    assert isinstance(found, CharTokenizer) and found.chars == CHARS
    assert pretrained.tokenizer_of({**nanogpts, 'tokenizer': None}).chars == CHARS
    os.remove('data/tiny/meta.pkl')
    with pytest.raises(ValueError, match='no tokenizer in it.*data/tiny has none.*python data/tiny/prepare.py'):
        pretrained.tokenizer_of(nanogpts)


# the run's folder -----------------------------------------------------------------------------------------------------

def test_put_aside(tmp_path):
    assert outdir.put_aside(str(tmp_path)) is None
    (tmp_path / 'log.jsonl').write_text('0')
    assert outdir.put_aside(str(tmp_path)) is None and files(tmp_path) == ['log.jsonl']
    for n in (1, 2, 3):
        for name in ('ckpt.pt', 'best.pt', 'log.jsonl', 'config.json')[: 5 - n]:
            (tmp_path / name).write_text(f'{name} {n}')
        (tmp_path / 'mine.txt').write_text('stays')
        assert outdir.put_aside(str(tmp_path)) == str(tmp_path / f'previous-{n}')
        assert files(tmp_path) == ['mine.txt', *(f'previous-{i + 1}' for i in range(n))]
    assert files(tmp_path / 'previous-1') == ['best.pt', 'ckpt.pt', 'config.json', 'log.jsonl']
    assert files(tmp_path / 'previous-3') == ['best.pt', 'ckpt.pt']
    assert (tmp_path / 'previous-2' / 'ckpt.pt').read_text() == 'ckpt.pt 2'


@pytest.fixture
def unlocked(monkeypatch):
    """A run keeps its folder locked until its process ends; here several runs share one, so none locks it."""
    monkeypatch.setattr(outdir, 'lock_folder', lambda path, doing: None)


def test_open_folder_to_resume(tmp_path, unlocked):
    """nanoGPT's ckpt.pt becomes best.pt as well, before it is overwritten, unless there is a better one already."""
    folder = tmp_path / 'out'
    folder.mkdir()
    torch.save(make_state(1), folder / 'ckpt.pt')
    nanogpts = (folder / 'ckpt.pt').read_bytes()
    outdir.open_folder(str(folder), {'seed': 1}, 1, version=0)
    assert files(folder) == ['best.pt', 'ckpt.pt', 'config.json']
    checkpoint.save(str(folder), make_state(2), is_best=False)
    assert (folder / 'best.pt').read_bytes() == nanogpts != (folder / 'ckpt.pt').read_bytes()
    torch.save(make_state(3), folder / 'ckpt.pt')
    outdir.open_folder(str(folder), {'seed': 2}, 3, version=0)
    assert (folder / 'best.pt').read_bytes() == nanogpts
    assert json.loads((folder / 'config.json').read_text()) == {'seed': 2}
    (folder / 'best.pt').unlink()
    outdir.open_folder(str(folder), {}, 3, version=1)  # a state of flatgpt's that was never evaluated is no best
    assert not (folder / 'best.pt').exists()


def test_open_folder_to_start_anew(tmp_path, unlocked):
    folder = tmp_path / 'a' / 'out'
    outdir.lock_run(str(folder))
    assert outdir.open_folder(str(folder), {'seed': 1}, 0, version=None) is None
    assert files(folder) == ['config.json']
    checkpoint.save(str(folder), make_state(1), is_best=True)
    (folder / f'ckpt.pt.{"0" * 16}.tmp').write_text('half')
    write_log(folder, 3)
    before = (folder / 'log.jsonl').read_text()
    assert outdir.open_folder(str(folder), {'seed': 2}, 0, version=None) == str(folder / 'previous-1')
    assert files(folder) == ['config.json', 'previous-1']
    assert files(folder / 'previous-1') == ['best.pt', 'ckpt.pt', 'config.json', 'log.jsonl']
    assert (folder / 'previous-1' / 'log.jsonl').read_text() == before


@pytest.mark.parametrize('version', [None, 0])
@pytest.mark.parametrize('call', ['fsync', 'replace', 'makedirs'])
def test_folder_that_can_not_be_written(tmp_path, monkeypatch, call, version):
    """Whichever step fails is said in a sentence, and every file that was there is there, in its place."""
    torch.save(make_state(1), tmp_path / 'ckpt.pt')
    (tmp_path / 'config.json').write_text('{"seed": 1}')
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

    def fail(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(ValueError, match='cannot be written: .*No space left.*--out_dir'):
            outdir.lock_run(str(tmp_path))
            outdir.open_folder(str(tmp_path), {'seed': 2}, 1, version)
    after = {path.name: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file() and '.tmp' not in path.name}
    assert {**after, 'best.pt': before['ckpt.pt']} == {**before, 'best.pt': before['ckpt.pt']}


def write_log(folder, until):
    """Lines of steps 0..until-1, evaluated every 5 steps, as train.py writes them."""
    lines = []
    for step in range(until):
        if step % 5 == 0:
            lines.append({'step': step, 'train_loss': 1.0, 'val_loss': 1.0})
        lines.append({'step': step, 'loss': 1.0})
    (folder / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines) + '{"step": 9')
    return lines


@pytest.mark.parametrize('at', [1, 3, 5, 6, 10, 12, 13, 40])
def test_keep_lines_until(tmp_path, at):
    """
    A run that goes on at step `at` has done updates 0 .. at-1, and the evaluation at step `at`, if there is a line of
    it, before the checkpoint was saved; all other lines, and half a line, go.
    """
    lines = write_log(tmp_path, 13)
    outdir.keep_lines_until(str(tmp_path / 'log.jsonl'), at)
    kept = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert kept == [line for line in lines if line['step'] < at or (line['step'] == at and 'val_loss' in line)]


def test_keep_lines_until_the_beginning(tmp_path):
    """A run from scratch evaluates at step 0 itself: nothing of a run that died before its first checkpoint stays."""
    write_log(tmp_path, 3)
    outdir.keep_lines_until(str(tmp_path / 'log.jsonl'), 0)
    assert not (tmp_path / 'log.jsonl').exists() or (tmp_path / 'log.jsonl').read_text() == ''


def test_keep_lines_without_a_log(tmp_path):
    outdir.keep_lines_until(str(tmp_path / 'log.jsonl'), 5)
    assert files(tmp_path) == []
