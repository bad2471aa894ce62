"""What happens to a run from outside: signals, lost output, a folder or a dataset that changes. Run: pytest tests/test_train_faults.py"""

import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import test_dpo_e2e
import test_reward_e2e
import test_rl_e2e
import torch
from chat_models import make_chats
from conftest import encode, make_text, write_dataset

LONG = {'max_iters': 10**6, 'lr_decay_iters': 10**6, 'eval_interval': 10**6, 'eval_first': False}


# signals --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU'])
def test_signals_of_terminals_and_clusters(folder, name):
    run = folder.start_train(**LONG)
    run.wait_for('iter 3: ')
    stopped, _ = run.stop(getattr(signal, name))
    assert stopped > 3 and folder.checkpoint()['iter_num'] == stopped


def test_nohup(folder):
    """A signal that the run inherits as ignored stays so."""
    (folder.path / 'config.py').write_text('import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n')
    run = folder.start_train('config.py', **LONG)
    run.wait_for('iter 3: ')
    run.kill(signal.SIGHUP)
    last = int(re.findall(r'iter (\d+): ', run.out)[-1])
    run.wait_for(f'iter {last + 20}: ')
    run.kill(signal.SIGTERM).ok()
    assert 'stopped by SIGTERM' in run.out and 'SIGHUP' not in run.out


def test_infinite_weights_are_not_saved(folder):
    """The step that ruins the weights has a finite loss, and SIGTERM comes before the next."""
    (folder.path / 'config.py').write_text(
        'import os, signal, torch\n_step = torch.optim.AdamW.step\n'
        'def ruin(self, *args, **kwargs):\n    _step(self, *args, **kwargs)\n    self.calls = getattr(self, "calls", 0) + 1\n'
        '    if self.calls == 5:\n        self.param_groups[0]["params"][0].data.view(-1)[7] = float("inf")\n'
        '        os.kill(os.getpid(), signal.SIGTERM)\n'
        'torch.optim.AdamW.step = ruin\n')
    run = folder.train('config.py', eval_interval=3)
    run.refused('step 5: the weights are not finite', 'ckpt.pt is of step 3')
    saved = [folder.checkpoint(), folder.checkpoint(name='best.pt')]
    assert all(state['iter_num'] == 3 and all(w.isfinite().all() for w in state['model'].values()) for state in saved)


# output ---------------------------------------------------------------------------------------------------------------

LOSSES = {  # a config file that does to the streams what a shell or a system does, and then
    'closed': 'os.close(1); os.close(2)',
    'pipe without a reader': '_r, _w = os.pipe(); os.close(_r); os.dup2(_w, 1); os.dup2(_w, 2)',
    'full disk': '_f = os.open("/dev/full", os.O_WRONLY); os.dup2(_f, 1); os.dup2(_f, 2)',
    'terminal that is gone': 'import pty as _pty; _a, _b = _pty.openpty(); os.dup2(_b, 1); os.dup2(_b, 2); os.close(_a); os.close(_b)',
    'closed streams': 'sys.stdout.stream.close(); sys.stderr.stream.close()',
    'no streams': 'sys.stdout.stream = None'}


@pytest.mark.parametrize('how', LOSSES)
def test_a_run_outlives_its_output(finished, folder, how):
    """The same weights as with a terminal; log.jsonl says it, once."""
    if how == 'full disk' and not os.path.exists('/dev/full'):
        pytest.skip('no /dev/full')
    (folder.path / 'config.py').write_text(f'import os, sys\n{LOSSES[how]}\n')
    if how == 'no streams':  # Python's own, where a descriptor was closed before it started
        (folder.path / 'config.py').write_text(
            'import os, sys\nfrom flatgpt import output\nos.close(1); sys.stdout = sys.stderr = None\noutput.protect(drop=True)\n')
    run = folder.train('config.py')
    assert run.code == 0
    for name, tensor in folder.checkpoint()['model'].items():
        assert torch.equal(tensor, finished[0].checkpoint()['model'][name])
    warnings = [record['warning'] for record in folder.log() if 'warning' in record]
    assert len(warnings) == (how != 'no streams') and all('standard output was lost' in text for text in warnings)


def test_a_filter_ends_with_its_reader(tiny_run):
    """sample.py | head: no traceback, and no hours of samples for nobody; a full disk is an error."""
    (tiny_run.path / 'closed.py').write_text(
        'import os\n_r, _w = os.pipe(); os.close(_r); os.dup2(_w, 1)\nmax_new_tokens = 10**6\n')
    (tiny_run.path / 'full.py').write_text('import os\nos.dup2(os.open("/dev/full", os.O_WRONLY), 1)\n')
    settings = {'out_dir': 'out', 'device': 'cpu', 'num_samples': 1000}
    run = tiny_run.start('sample.py', 'closed.py', **settings).wait(60)
    assert run.code == 1 and run.out == ''
    run = tiny_run.start('sample.py', 'full.py', **settings).wait(60)
    assert run.code == 1 and 'error: the output could not be written' in run.out and 'Traceback' not in run.out


# the folder -----------------------------------------------------------------------------------------------------------

def test_a_deleted_folder_is_made_again(folder):
    run = folder.start_train(**LONG)
    run.wait_for('iter 3: ')
    (folder.path / 'out').rename(folder.path / 'gone')  # at once: the run could write while files are removed
    shutil.rmtree(folder.path / 'gone')
    run.wait_for('out is gone; it is made again')
    folder.train().refused('another process is training in out')
    run.stop()
    assert folder.checkpoint()['iter_num'] > 3 and folder.log() and (folder.path / 'out' / 'config.json').exists()


def test_a_replaced_folder_keeps_what_it_holds(folder):
    """Another run made a folder of the same name meanwhile: its files are moved, not overwritten."""
    run = folder.start_train(**{**LONG, 'log_interval': 10**6, 'eval_interval': 10**6})
    run.wait_for('compile False')
    while not (folder.path / 'out' / 'log.jsonl').exists():
        time.sleep(0.01)
    time.sleep(0.5)
    (folder.path / 'out').rename(folder.path / 'moved')
    folder.train(seed=7).ok()
    other = (folder.path / 'out' / 'ckpt.pt').read_bytes()
    run.stop()
    assert 'out is gone; it is made again' in run.out
    assert (folder.path / 'out' / 'previous-1' / 'ckpt.pt').read_bytes() == other
    assert folder.checkpoint()['config']['seed'] == 1337


def test_best_of_another_text_is_kept(tiny_run):
    """Where the lowest val loss starts anew, the earlier best.pt is moved."""
    best = (tiny_run.path / 'out' / 'best.pt').read_bytes()
    run = tiny_run.train(init_from='resume', max_iters=30, eval_tokens=32).ok()
    assert 'the lowest val loss starts anew' in run.out and 'they are now in out/previous-1' in run.out
    assert (tiny_run.path / 'out' / 'previous-1' / 'best.pt').read_bytes() == best


def test_pipes_in_place_of_a_dataset_are_refused(folder):
    for name in ('meta.json', 'train.bin'):
        path = folder.path / 'data' / 'tiny' / name
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        folder.start_train().wait(60).refused('is a pipe, a folder or a device; expected a regular file')
        path.unlink()
        path.write_bytes(content)


def test_links_are_not_followed(folder):
    """Whoever can write in out_dir makes no file elsewhere grow, or appear, or empty."""
    out, victim = folder.path / 'out', folder.path / 'victim'
    out.mkdir()
    victim.write_text('mine')
    for name, target in (('log.jsonl', folder.path / 'nowhere'), ('config.json', victim), ('ckpt.pt.tmp', victim),
                         ('best.pt.tmp', victim), ('config.json.tmp', victim), ('log.jsonl.tmp', victim)):
        (out / name).symlink_to(target)
    folder.train().ok()
    assert victim.read_text() == 'mine' and not (folder.path / 'nowhere').exists()
    assert len(folder.log()) > 20 and not (out / 'log.jsonl').is_symlink() and not (out / 'config.json').is_symlink()


def test_bad_lines_of_the_log_are_dropped(tiny_run):
    path = tiny_run.path / 'out' / 'log.jsonl'
    lines = path.read_bytes().splitlines(keepends=True)
    bad = [b'\xff\xfe\n', b'7\n', b'null\n', b'"step"\n', b'[1]\n', b'{}\n', b'{"step": "3"}\n', b'{"step": true}\n',
           b'{"step": null}\n', b'[' * 100_000 + b'\n', b'\x00\x00\n', b'\n', b'{"step": 1\n']
    path.write_bytes(b''.join(line for pair in zip(lines, bad, strict=False) for line in pair) + b''.join(lines[len(bad):]))
    tiny_run.train(init_from='resume', max_iters=22).ok()
    steps = [record['step'] for record in tiny_run.log() if 'loss' in record]
    assert steps == list(range(22))


# the dataset ----------------------------------------------------------------------------------------------------------

def prepare(folder, text, name='tiny', digest=None):
    ids = encode(text)
    write_dataset(folder.path / 'data' / name, ids[:-400], ids[-400:])
    if digest:
        path = folder.path / 'data' / name / 'meta.json'
        path.write_text(json.dumps({**json.loads(path.read_text()), 'sha256': digest}))


@pytest.mark.parametrize('digest', [None, 'a' * 64])
def test_another_text_under_the_same_name(folder, digest):
    """The best on the old text is no measure for the new one."""
    prepare(folder, 'the cat sat ' * 300, digest=digest)
    folder.train().ok()
    assert folder.checkpoint()['best_val_loss'] < 2
    prepare(folder, make_text(3000, seed=3)[::-1], digest=digest and 'b' * 64)
    run = folder.train(init_from='resume', max_iters=22).ok()
    assert 'data/tiny holds another text than at step 20' in run.out
    assert folder.checkpoint(name='best.pt')['iter_num'] == 22


def test_the_same_text_under_another_name(tiny_run):
    """A lower val loss is still the lowest."""
    shutil.copytree(tiny_run.path / 'data' / 'tiny', tiny_run.path / 'elsewhere')
    before = tiny_run.checkpoint(name='best.pt')
    state = tiny_run.checkpoint()
    torch.save({**state, 'best_val_loss': 0.01}, tiny_run.path / 'out' / 'ckpt.pt')
    run = tiny_run.train(init_from='resume', dataset='./elsewhere', max_iters=22).ok()
    assert 'another text' not in run.out
    assert tiny_run.checkpoint(name='best.pt')['iter_num'] == before['iter_num']
    assert tiny_run.checkpoint()['best_val_loss'] == 0.01


def test_tokens_are_counted_and_placed_by_what_was_seen(folder):
    """20 steps of 8 sequences and then 10 of 16 visit the epochs of 180 sequences that one run would."""
    (folder.path / 'config.py').write_text(
        'import data.tokens\n_windows = data.tokens.train_windows\n'
        'def windows(first, n, *args):\n    if n == 8 or first >= 160:\n        print(f"drawn {first} {n}")\n    return _windows(first, n, *args)\n'
        'data.tokens.train_windows = windows\n')
    folder.train('config.py').ok()
    run = folder.train('config.py', init_from='resume', max_iters=30, batch_size=8).ok()
    assert [record['tokens'] for record in folder.log() if 'tokens' in record] == (
        [16 * 8 * (i + 1) for i in range(20)] + [16 * (160 + 16 * (i + 1)) for i in range(10)])
    drawn = [tuple(map(int, pair)) for pair in re.findall(r'drawn (\d+) (\d+)', run.out)]
    assert drawn[:10] == [(160 + 16 * i, 16) for i in range(10)]


@pytest.mark.parametrize('shorter', [False, True])
def test_a_split_that_is_rewritten_in_place(folder, shorter):
    """A shorter file would end the process with a bus error; the run saves first. Another text is a warning."""
    run = folder.start_train(**{**LONG, 'eval_interval': 20})
    run.wait_for('iter 3: ')
    path = folder.path / 'data' / 'tiny' / 'train.bin'
    with open(path, 'r+b') as file:
        if shorter:
            file.truncate(5998)  # the pages stay: the process must not depend on the test's luck
        else:
            file.write(np.zeros(10, np.uint16).tobytes())
    run.wait_for('WARNING: .*train.bin was rewritten')
    if shorter:
        run.wait(60).ok()
        assert 'To go on' in run.out
    else:
        run.stop()
    assert folder.checkpoint()['iter_num'] > 3


# wandb ----------------------------------------------------------------------------------------------------------------

FAKE_WANDB = '''
import json
class Run:
    def __init__(self, id): self.id, self.n = id, 0
    def log(self, record, step):
        self.n += 1
        if self.n > 5: raise BrokenPipeError('the helper is gone')
    def finish(self): raise BrokenPipeError('the helper is gone')
def init(**settings):
    with open('calls', 'a') as f: f.write(json.dumps([settings['id'], settings['resume']]) + chr(10))
    return Run(settings['id'] or 'first')
'''


@pytest.mark.parametrize('wandb', ['raise ImportError("No module named wandb")', 'def init(**k): raise RuntimeError("No API key")'])
def test_wandb_that_does_not_start_moves_nothing(tiny_run, wandb):
    (tiny_run.path / 'wandb.py').write_text(wandb)
    before = {path.name: path.read_bytes() for path in (tiny_run.path / 'out').iterdir()}
    run = tiny_run.train(wandb_log=True, env={'PYTHONPATH': str(tiny_run.path)})
    run.refused('wandb_log=True: wandb does not start', 'WANDB_MODE=offline')
    assert before == {path.name: path.read_bytes() for path in (tiny_run.path / 'out').iterdir()}


def test_a_resumed_run_continues_its_wandb_run(folder):
    """And wandb's failures later on are warnings."""
    (folder.path / 'wandb.py').write_text(FAKE_WANDB)
    (folder.path / 'config.py').write_text('import sys\nsys.path.insert(0, ".")\n')
    run = folder.train('config.py', wandb_log=True).ok()
    assert run.out.count('WARNING: wandb gets nothing more') == 1
    folder.train('config.py', wandb_log=True, init_from='resume', max_iters=22).ok()
    calls = [json.loads(line) for line in (folder.path / 'calls').read_text().splitlines()]
    assert calls == [[None, None], ['first', 'allow']]


# posttraining ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('script, settings', [('reward', test_reward_e2e.SMALL), ('rl', test_rl_e2e.SMALL),
                                              ('dpo', test_dpo_e2e.SMALL)])
def test_posttraining_outlives_its_output(tmp_path, script, settings):
    chats = make_chats(tmp_path)
    (chats.path / 'config.py').write_text(f'import os, sys\n{LOSSES["pipe without a reader"]}\n')
    run = chats.start(f'posttrain.{script}', 'config.py', **{**settings, 'out_dir': 'out', 'max_iters': 2}).wait()
    assert run.code == 0 and chats.checkpoint()['iter_num'] == 2
    assert sum('warning' in record for record in chats.log()) == 1
