"""train.py as its users run it: processes, signals, broken input, files left. Run: pytest tests/test_train_e2e.py"""

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import CHARS, ROOT, TINY, Folder, close_state, encode, make_text, same_state, same_tensors, write_dataset

from data import tokens
from model import GPT, GPTConfig

STEP = r'iter {}: loss'  # the line of a step, for Run.wait_for


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
def trained(finished, folder):
    """A folder of the test's own in which that run has happened."""
    shutil.copytree(finished[0].path / 'out', folder.path / 'out')
    return folder


def losses(run):
    """Training losses by step, and (train, val) of evaluations by step, as printed."""
    steps = {int(n): float(x) for n, x in re.findall(r'^iter (\d+): loss (\S+),', run.out, re.M)}
    evals = {int(n): (float(a), float(b))
             for n, a, b in re.findall(r'^step (\d+): train loss (\S+), val loss (\S+)$', run.out, re.M)}
    return steps, evals


# a run and what it leaves ---------------------------------------------------------------------------------------------

def test_a_run(finished):
    shared, run = finished
    steps, evals = losses(run)
    assert list(steps) == list(range(20)) and list(evals) == [0, 10, 20]
    assert abs(evals[0][1] - math.log(len(CHARS))) < 0.1 and evals[20][1] < evals[10][1] < evals[0][1]
    for text in ('device cpu (threads: 1), dtype float32 (as set), compile False (as set)', 'mfu n/a',
                 '2 micro-batch(es) x 4 x 16', 'saved out/ckpt.pt at step 20 (best so far)',
                 f'best val loss {evals[20][1]:.4f}', 'python sample.py --out_dir=out'):
        assert text in run.out
    assert sorted(os.listdir(shared.path / 'out')) == ['best.pt', 'ckpt.pt', 'config.json', 'log.jsonl']


def test_the_log(finished):
    shared, run = finished
    log = shared.log()
    steps, evals = losses(run)
    assert {line['step']: round(line['loss'], 4) for line in log if 'loss' in line} == steps
    assert {line['step']: (round(line['train_loss'], 4), round(line['val_loss'], 4))
            for line in log if 'val_loss' in line} == evals
    rates = {line['step']: line['lr'] for line in log if 'lr' in line}
    assert [rates[0], rates[2], rates[11]] == pytest.approx([1e-2 / 3, 1e-2, 5.5e-3])  # warmup, then the cosine
    assert [line['tokens'] for line in log if 'tokens' in line] == [128 * n for n in range(1, 21)]
    times = [line['train_time'] for line in log]
    assert times == sorted(times) and all(line['grad_norm'] > 0 for line in log if 'loss' in line)


def test_resolved_settings_are_written(finished):
    config = json.loads((finished[0].path / 'out' / 'config.json').read_text())
    assert {**config, **TINY} == config and config['total_batch_size'] == 128 and config['seed'] == 1337


def test_checkpoint_is_plain_and_complete(finished):
    state = finished[0].checkpoint()  # reads with weights_only=True
    assert state['iter_num'] == 20 and state['tokenizer'] == {'kind': 'char', 'chars': ''.join(CHARS)}
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config', 'version'} <= set(state)
    assert set(state['model']) == set(GPT(GPTConfig(**state['model_args'])).state_dict())
    assert [g['weight_decay'] for g in state['optimizer']['param_groups']] == [0.1, 0.0]
    same_state(state, finished[0].checkpoint(name='best.pt'))


def test_val_loss_is_that_of_the_whole_split(finished):
    """Computed again in float64, one window at a time, each of the 332 targets once."""
    shared, run = finished
    state = shared.checkpoint()
    model = GPT(GPTConfig(**state['model_args'])).double()
    model.load_state_dict(state['model'])
    ids = torch.from_numpy(np.fromfile(shared.path / 'data/tiny/val.bin', dtype=np.uint16).astype(np.int64))
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, 16):
        x, y = ids[start : start + 16][: len(ids) - 1 - start], ids[start + 1 : start + 17]
        p = torch.log_softmax(model(x[None], y[None])[0][0], -1)
        total, count = total - p[torch.arange(len(y)), y].sum().item(), count + len(y)
    assert count == 332
    logged = [line['val_loss'] for line in shared.log() if line['step'] == 20 and 'val_loss' in line]
    assert logged == [pytest.approx(total / count, abs=1e-5)] and state['best_val_loss'] == logged[0]


def test_it_learns(folder):
    """Enough steps bring the loss to what the text's own statistics allow, far below that of single characters."""
    run = folder.train(max_iters=300, lr_decay_iters=300, eval_interval=300, n_embd=32, log_interval=100).ok()
    ids = encode(make_text(3000))
    p = np.bincount(ids) / len(ids)
    unigram = -(p[p > 0] * np.log(p[p > 0])).sum()
    steps, evals = losses(run)
    assert evals[300][1] < unigram - 1.2
    assert list(steps) == [0, 100, 200, 299]


# 20 steps are 10 and 10 more ------------------------------------------------------------------------------------------

CASES = {
    'float32': {'dropout': 0.1},
    'bfloat16': {'dropout': 0.1, 'dtype': 'bfloat16', 'bias': True},
    'float16': {'dropout': 0.1, 'dtype': 'float16'},  # with a gradient scaler, whose state is part of the run
    'two threads': {'dropout': 0.1},
    'wsd': {'lr_schedule': 'wsd', 'grad_clip': 0.0, 'always_save_checkpoint': False},
    'muon': {'preset': 'modern', 'dropout': 0.1, 'weight_decay': 0.1, 'dtype': 'bfloat16'},
    'muon, float16, all options': {
        'preset': 'modern', 'dtype': 'float16', 'n_kv_head': 1, 'mlp': 'swiglu', 'window': 5, 'n_layer': 3,
        'residual_lambdas': True, 'value_embeddings': True, 'weight_decay': 0.1},
    'average': {'average_decay': 0.8, 'tie_embeddings': False, 'always_save_checkpoint': False},
}


@pytest.mark.parametrize('case', CASES)
def test_resume_is_exact(folder, case):
    threads = folder.path / 'threads.py'
    threads.write_text('import torch\ntorch.set_num_threads(2)\n' if case == 'two threads' else '')
    folder.train(threads, out_dir='whole', **CASES[case]).ok()
    folder.train(threads, out_dir='half', **CASES[case], max_iters=10).ok()
    assert folder.checkpoint('half')['iter_num'] == 10
    run = folder.train(threads, out_dir='half', **CASES[case], init_from='resume').ok()
    assert list(losses(run)[0]) == list(range(10, 20))
    same_state(folder.checkpoint('half'), folder.checkpoint('whole'))
    assert case != 'float16' or folder.checkpoint('half')['scaler']['scale'] > 0
    keys = ('step', 'loss', 'val_loss', 'lr', 'grad_norm', 'tokens')
    half, whole = ([{k: line[k] for k in keys if k in line} for line in folder.log(d)] for d in ('half', 'whole'))
    assert half == whole  # one continuous log


def test_average_of_the_weights(folder):
    """Of the weights after every step, by hand; it is what is evaluated; without it a run goes on from the weights."""
    changes = {'average_decay': 0.2, 'eval_interval': 1, 'max_iters': 4}
    states = []
    for n in range(1, 5):
        folder.train(out_dir='run', **{**changes, 'max_iters': n}, init_from='auto').ok()
        states.append(folder.checkpoint('run'))
    expected = states[0]['unaveraged']
    for decay, state in zip((1 / 11, 2 / 12, 0.2), states[1:], strict=True):  # step / (step + 10), but 0.2 at most
        expected = {name: decay * mean + (1 - decay) * state['unaveraged'][name] for name, mean in expected.items()}
    for name, mean in expected.items():
        torch.testing.assert_close(states[-1]['model'][name], mean)
    model = GPT(GPTConfig(**states[-1]['model_args']))
    model.load_state_dict(states[-1]['model'])
    ids = torch.from_numpy(np.fromfile(folder.path / 'data/tiny/val.bin', dtype=np.uint16).astype(np.int64))
    x, y = ids[:-1].split(16), ids[1:].split(16)
    total = sum(model(a[None], b[None])[1].item() * len(b) for a, b in zip(x, y, strict=True))
    logged = [line['val_loss'] for line in folder.log('run') if 'val_loss' in line]
    assert logged[-1] == pytest.approx(total / (len(ids) - 1), abs=1e-5)
    folder.train(out_dir='plain', max_iters=4, eval_interval=1).ok()
    same_tensors(states[-1]['unaveraged'], folder.checkpoint('plain')['model'])
    folder.train(out_dir='run', max_iters=6, init_from='resume').ok()
    folder.train(out_dir='plain', max_iters=6, init_from='resume').ok()
    same_tensors(folder.checkpoint('run')['model'], folder.checkpoint('plain')['model'])
    assert 'unaveraged' not in folder.checkpoint('run')


def test_a_schedule_as_long_as_the_run(folder):
    rates = {}
    for out_dir, changes in (('open', {'max_iters': 8}), ('said', {'max_iters': 8, 'lr_decay_iters': 8})):
        folder.train(out_dir=out_dir, lr_schedule='wsd', decay_fraction=0.5, eval_first=False,
                     **{'lr_decay_iters': 'None', **changes}).ok()
        rates[out_dir] = [line['lr'] for line in folder.log(out_dir) if 'lr' in line]
    assert rates['open'] == rates['said'] and rates['open'][-1] < rates['open'][4]


def test_resume_is_exact_with_two_processes(folder):
    changes = {'dropout': 0.1, 'dtype': 'bfloat16'}
    run = folder.train_two(out_dir='whole', **changes)
    assert '2 process(es) x 1 micro-batch(es) x 4 x 16' in run.out
    folder.train_two(out_dir='half', **changes, max_iters=10)
    folder.train_two(out_dir='half', **changes, init_from='resume')
    same_state(folder.checkpoint('half'), folder.checkpoint('whole'))
    assert [line['step'] for line in folder.log('half')] == [line['step'] for line in folder.log('whole')]


def test_muon_with_two_processes(folder):
    """They share the matrices, an odd number of some shapes: the weights of one process, and an exact resume."""
    changes = {'preset': 'modern', 'n_layer': 3, 'weight_decay': 0.1}
    folder.train_two(out_dir='bf16', **changes, dtype='bfloat16', max_iters=2)
    folder.train(out_dir='one', **changes).ok()
    folder.train_two(out_dir='two', **changes)
    close_state(folder.checkpoint('two'), folder.checkpoint('one'), tolerance=2e-3)
    losses_of = [[line['loss'] for line in folder.log(out_dir) if 'loss' in line] for out_dir in ('one', 'two')]
    assert losses_of[0] == pytest.approx(losses_of[1], abs=1e-3)
    folder.train_two(out_dir='half', **changes, max_iters=10)
    folder.train_two(out_dir='half', **changes, init_from='resume')
    same_state(folder.checkpoint('half'), folder.checkpoint('two'))


def test_dropout_of_processes_differs(folder):
    """On data whose windows are all alike, the same masks in both would make their mean gradient that of one alone."""
    ids = encode(make_text(16)).tolist() * 100
    write_dataset(folder.path / 'data' / 'alike', ids, ids)

    def gradient(train, n, dropout):
        out_dir = f'{n}-{dropout}'
        train(dataset='alike', out_dir=out_dir, dropout=dropout, total_batch_size=16 * n, batch_size=1, max_iters=1,
              grad_clip=0.0)
        return folder.checkpoint(out_dir)['optimizer']['state'][0]['exp_avg']

    assert not torch.allclose(gradient(folder.train, 1, 0.3), gradient(folder.train_two, 2, 0.3), rtol=0.01)
    torch.testing.assert_close(gradient(folder.train, 1, 0.0), gradient(folder.train_two, 2, 0.0), rtol=1e-3, atol=1e-7)


def test_total_batch_fixes_the_mathematics(finished, folder):
    """8 sequences a step: at once, in 2, 4 and 8 micro-batches, over two processes; and changed on resuming."""
    expected = finished[0].checkpoint()
    expected_log = [line['loss'] for line in finished[0].log() if 'loss' in line]

    def same(out_dir):
        close_state(folder.checkpoint(out_dir), expected, tolerance=1e-4)
        assert [line['loss'] for line in folder.log(out_dir) if 'loss' in line] == pytest.approx(expected_log, abs=1e-4)
        assert folder.checkpoint(out_dir)['best_val_loss'] == pytest.approx(expected['best_val_loss'], abs=1e-4)

    for batch_size in (8, 2, 1, 100):
        folder.train(out_dir=f'batch-{batch_size}', batch_size=batch_size, total_batch_size=128).ok()
        same(f'batch-{batch_size}')
    folder.train(out_dir='nanogpt', batch_size=2, gradient_accumulation_steps=4).ok()
    same('nanogpt')
    folder.train_two(out_dir='two')
    same('two')
    folder.train(out_dir='grown', max_iters=10).ok()
    folder.train_two(out_dir='grown', init_from='resume', batch_size=2, total_batch_size=128)
    same('grown')
    folder.train_two(out_dir='shrunk', max_iters=10)
    folder.train(out_dir='shrunk', init_from='resume').ok()
    same('shrunk')


def test_seeds(finished, folder):
    folder.train(out_dir='same').ok()
    same_state(folder.checkpoint('same'), finished[0].checkpoint())
    folder.train(out_dir='other', seed=1).ok()
    a, b = folder.log('same'), folder.log('other')
    assert a[0]['val_loss'] != b[0]['val_loss'] and a[1]['loss'] != b[1]['loss']
    folder.train(out_dir='negative', seed=-5, max_iters=2).ok()  # any int is a seed


def test_compiled(folder):
    """The compiled step: the same losses as eager, and exact on resuming with dropout. A cold cache takes a while."""
    changes = {'max_iters': 4, 'eval_interval': 2, 'warmup_iters': 0}
    eager = folder.train(out_dir='eager', **changes).ok()
    run = folder.train(out_dir='compiled', compile=True, **changes).wait(240).ok()
    assert 'compiling the training step' in run.out and 'WARNING' not in run.out
    assert list(losses(run)[0].values()) == pytest.approx(list(losses(eager)[0].values()), abs=2e-3)
    for out_dir, iters, init_from in (('whole', 4, 'scratch'), ('half', 2, 'scratch'), ('half', 4, 'resume')):
        folder.start_train(out_dir=out_dir, compile=True, dropout=0.2, init_from=init_from,
                           **{**changes, 'max_iters': iters}).wait(240).ok()
    same_state(folder.checkpoint('half'), folder.checkpoint('whole'))


def test_compiler_that_fails(folder):
    """Training goes on without it, and says so."""
    (folder.path / 'config.py').write_text(
        'import torch._inductor.config\ntorch._inductor.config.cpp.cxx = ("/bin/false",)\n'
        'torch._inductor.config.force_disable_caches = True\n')
    run = folder.train('config.py', compile=True, max_iters=3).wait(120).ok()
    assert 'WARNING: torch.compile failed' in run.out and '--compile=False silences this' in run.out
    assert list(losses(run)[0]) == [0, 1, 2]


# stopping -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_say_how_to_go_on(folder, number):
    """Stopped in the middle, then gone on with by the command it prints: the weights of a run without a stop."""
    changes = {'max_iters': 60, 'dropout': 0.1, 'eval_interval': 40, 'out_dir': 'a b'}  # a space must be quoted
    run = folder.start_train(**changes)
    run.wait_for(STEP.format(5))
    stopped, settings = run.stop(number)
    assert 5 < stopped < 60 and folder.checkpoint('a b')['iter_num'] == stopped
    assert f'saved a b/ckpt.pt at step {stopped}' in run.out
    assert ('finishing this step, then saving; Ctrl-C again' in run.out) == (number == signal.SIGINT)
    again = folder.start('train.py', **settings).ok()
    assert list(losses(again)[0]) == list(range(stopped, 60))
    folder.train(**{**changes, 'out_dir': 'whole'}).ok()
    same_state(folder.checkpoint('a b'), folder.checkpoint('whole'))


def test_signal_to_one_of_two_processes(folder):
    """Whichever process hears it, both stop after the same step."""
    (folder.path / 'config.py').write_text(
        'import os, signal, threading\nif os.environ["RANK"] == "1":\n'
        '    threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM)).start()\n')
    run = folder.train_two('config.py', max_iters=100000, eval_interval=100000, log_interval=10000)
    assert 'stopped by SIGTERM after step' in run.out
    assert 'torchrun --standalone --nproc_per_node=2' in run.out.splitlines()[-1]
    assert 0 < folder.checkpoint()['iter_num'] < 100000


def test_second_ctrl_c_is_obeyed(folder):
    """While a step takes forever, the first Ctrl-C waits for its end; one more than a second later does not."""
    (folder.path / 'config.py').write_text(
        'import time, torch\n_step = torch.optim.AdamW.step\n'
        'def slow(*args, **kwargs):\n    print("slow step", flush=True)\n    time.sleep(60)\n'
        'torch.optim.AdamW.step = slow\n')
    run = folder.start_train('config.py')
    run.wait_for('slow step')
    run.kill(signal.SIGINT)
    time.sleep(1.2)
    assert run.kill(signal.SIGINT).wait(20).code != 0
    assert 'stopped by Ctrl-C' in run.out and 'Traceback' not in run.out


def test_kills_lose_nothing(folder):
    """SIGKILL at random moments: what was reported saved is there, and init_from=auto goes on to the same weights."""
    changes = {'max_iters': 200, 'eval_interval': 2, 'dropout': 0.1, 'log_interval': 20}
    folder.train(out_dir='whole', **changes).ok()
    rng, kills, reported = random.Random(0), 0, 0
    while kills < 8:
        run = folder.start_train(init_from='auto', **changes)
        run.wait_for('M parameters')
        time.sleep(rng.uniform(0, 0.3))
        run.kill(signal.SIGKILL).wait()
        kills += run.code == -signal.SIGKILL
        reported = max([reported, *map(int, re.findall(r'saved out/ckpt.pt at step (\d+)', run.out))])
        if reported:
            assert folder.checkpoint()['iter_num'] >= reported and folder.checkpoint(name='best.pt')['iter_num'] > 0
        if run.code == 0:
            break
    assert kills >= 3 and reported > 0
    run = folder.train(init_from='auto', **changes).ok()
    same_state(folder.checkpoint(), folder.checkpoint('whole'))
    same_state(folder.checkpoint(name='best.pt'), folder.checkpoint('whole', 'best.pt'))
    assert [line['step'] for line in folder.log()] == [line['step'] for line in folder.log('whole')]
    assert sorted(os.listdir(folder.path / 'out')) == ['best.pt', 'ckpt.pt', 'config.json', 'log.jsonl']


def test_torchrun_brings_a_run_back(folder):
    """A real torchrun, one of whose workers dies once: --max-restarts=1 with init_from=auto finishes the run."""
    (folder.path / 'config.py').write_text(
        'import os, signal, threading, time\ndef _kill():\n'
        '    while not os.path.exists("out/ckpt.pt"):\n        time.sleep(0.01)\n'
        '    open("marker", "w").close()\n    os.kill(os.getpid(), signal.SIGKILL)\n'
        'if os.environ["RANK"] == "1" and not os.path.exists("marker"):\n'
        '    threading.Thread(target=_kill, daemon=True).start()\n')
    settings = {**TINY, 'init_from': 'auto', 'dropout': 0.1, 'max_iters': 300, 'eval_interval': 50, 'log_interval': 50}
    process = subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max-restarts=1',
         '--monitor-interval=0.1', str(ROOT / 'train.py'), 'config.py', *(f'--{k}={v}' for k, v in settings.items())],
        cwd=folder.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        out = process.communicate(timeout=60)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # the workers are in its session, and would outlive it
    assert process.returncode == 0, out
    assert (folder.path / 'marker').exists() and '300 steps' in out
    folder.train_two(**{**settings, 'init_from': 'scratch', 'out_dir': 'whole'})
    same_state(folder.checkpoint(), folder.checkpoint('whole'))


def test_full_disk(trained):
    """Saving fails: training goes on and ends with an error, and the checkpoint that was there is untouched."""
    (trained.path / 'config.py').write_text(
        'import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n')
    before = (trained.path / 'out' / 'ckpt.pt').read_bytes()
    assert len(before) > 40000
    run = trained.train('config.py', init_from='resume', max_iters=30, eval_interval=5).refused(
        'WARNING: out/ckpt.pt could not be saved at step 25', 'untouched', 'free some space', 'File too large',
        'the state of step 30 could not be saved; out/ckpt.pt is older')
    assert list(losses(run)[0]) == list(range(20, 30))
    assert run.out.count('could not be saved at step 30') == 1  # tried once
    assert (trained.path / 'out' / 'ckpt.pt').read_bytes() == before
    assert sorted(os.listdir(trained.path / 'out')) == ['best.pt', 'ckpt.pt', 'config.json', 'log.jsonl']


# losses that are no numbers -------------------------------------------------------------------------------------------

def poison(folder, value):
    """Set a weight of the checkpoint to `value`; -> the bytes of the file."""
    state = folder.checkpoint()
    state['model']['transformer.h.1.mlp.c_fc.weight'][0, 0] = value
    torch.save(state, folder.path / 'out' / 'ckpt.pt')
    return (folder.path / 'out' / 'ckpt.pt').read_bytes()


def test_non_finite_loss_stops_before_the_update(trained):
    before = poison(trained, math.nan)
    run = trained.train(init_from='resume', max_iters=30).refused(
        'step 20: loss is nan', 'Stopped without saving; out/ckpt.pt is of step 20', '--learning_rate')
    assert 'iter 20' not in run.out
    assert (trained.path / 'out' / 'ckpt.pt').read_bytes() == before


def test_divergence_does_not_overwrite_the_checkpoint(trained):
    """A ruinous update is seen by the next loss, whether a step or an evaluation computes it."""
    before = (trained.path / 'out' / 'ckpt.pt').read_bytes()
    best = (trained.path / 'out' / 'best.pt').read_bytes()
    for eval_interval in (1000, 1):
        run = trained.train(init_from='resume', max_iters=40, learning_rate=1e30, min_lr=1e30, decay_lr=False,
                            eval_interval=eval_interval).refused('step 21: ', 'nan')
        assert 'out/ckpt.pt is of step 20' in run.out and 'saved' not in run.out
        assert (trained.path / 'out' / 'ckpt.pt').read_bytes() == before
        assert (trained.path / 'out' / 'best.pt').read_bytes() == best


def test_non_finite_loss_before_any_checkpoint(folder):
    folder.train(learning_rate=1e30, decay_lr=False).refused('step 1: ', 'there is no checkpoint yet')
    assert not (folder.path / 'out' / 'ckpt.pt').exists()


# settings that steer a run --------------------------------------------------------------------------------------------

def test_eval_only(trained):
    before = {f.name: f.read_bytes() for f in (trained.path / 'out').iterdir()}
    run = trained.train(eval_only=True, init_from='resume').ok()
    assert losses(run) == ({}, {20: losses(run)[1][20]}) and 'saved' not in run.out
    assert 'M parameters\n' in run.out and 'epochs' not in run.out and 'a step of' not in run.out
    assert losses(run)[1][20][1] == pytest.approx(trained.checkpoint()['best_val_loss'], abs=1e-4)
    assert {f.name: f.read_bytes() for f in (trained.path / 'out').iterdir()} == before
    run = trained.train(eval_only=True, init_from='resume', eval_interval=7).ok()  # step 20 is no multiple of it
    assert list(losses(run)[0]) == [] and list(losses(run)[1]) == [20]
    run = trained.train(eval_only=True, out_dir='new').ok()
    assert list(losses(run)[1]) == [0] and not (trained.path / 'new').exists()


def test_no_steps(folder):
    """max_iters=0 evaluates and ends; nothing is saved, so nothing is said of a checkpoint that is not there."""
    for eval_first, evals in ((True, [0]), (False, [])):
        run = folder.train(max_iters=0, eval_first=eval_first).ok()
        assert list(losses(run)[1]) == evals and '0 steps' in run.out
        assert 'best val loss' not in run.out and 'sample.py' not in run.out and 'inf' not in run.out
        assert sorted(os.listdir(folder.path / 'out'))[0] == 'config.json'  # no best.pt, no ckpt.pt


def test_patience(folder):
    """Evaluations without improvement in a row: a rate of 0 after the first steps makes each as good as the last."""
    run = folder.train(max_iters=100, eval_interval=5, patience=3, decay_lr=True, lr_decay_iters=5, min_lr=0.0).ok()
    assert list(losses(run)[1]) == [0, 5, 10, 15, 20]
    assert 'val loss has not improved for 3 evaluations after step 20. To go on:' in run.out
    assert folder.checkpoint()['iter_num'] == 20 and folder.checkpoint(name='best.pt')['iter_num'] == 5
    # the count goes on across a resume
    folder.train(out_dir='b', max_iters=10, eval_interval=5, patience=3, lr_decay_iters=5, min_lr=0.0).ok()
    run = folder.train(out_dir='b', init_from='resume', max_iters=100, eval_interval=5, patience=3, lr_decay_iters=5,
                       min_lr=0.0).ok()
    assert list(losses(run)[1]) == [15, 20]


def test_a_run_that_only_gets_worse(folder):
    """The best is the best that was saved: of what was before the first step there is no file."""
    run = folder.train(max_iters=6, eval_interval=3, learning_rate=3.0, warmup_iters=0, decay_lr=False).ok()
    of_steps = {step: val for step, (_, val) in losses(run)[1].items()}
    best = min((3, 6), key=of_steps.get)
    assert of_steps[0] < of_steps[best] and folder.checkpoint(name='best.pt')['iter_num'] == best
    assert folder.checkpoint(name='best.pt')['best_val_loss'] == pytest.approx(of_steps[best], abs=1e-4)
    assert f'best val loss {of_steps[best]:.4f}' in run.out


def test_always_save_checkpoint(folder):
    """False: after an evaluation only if it was the best; but the end is always saved."""
    run = folder.train(always_save_checkpoint=False, max_iters=23, eval_interval=5, lr_decay_iters=5, min_lr=0.0).ok()
    assert re.findall(r'saved out/ckpt.pt at step (\d+)', run.out) == ['5', '23']
    assert folder.checkpoint()['iter_num'] == 23 and folder.checkpoint(name='best.pt')['iter_num'] == 5
    run = folder.train(out_dir='b', max_iters=23, eval_interval=5, lr_decay_iters=5, min_lr=0.0).ok()
    assert re.findall(r'saved b/ckpt.pt at step (\d+)', run.out) == ['5', '10', '15', '20', '23']


def test_an_earlier_run_is_moved(trained):
    before = {f.name: f.read_bytes() for f in (trained.path / 'out').iterdir()}
    run = trained.train(max_iters=2).ok()
    assert 'out held an earlier run; it is in out/previous-1 now' in run.out
    assert {f.name: f.read_bytes() for f in (trained.path / 'out' / 'previous-1').iterdir()} == before
    assert trained.checkpoint()['iter_num'] == 2 and len(trained.log()) == 4
    trained.train(max_iters=3, init_from='auto').ok()  # resumes, so there is nothing to move
    assert not (trained.path / 'out' / 'previous-2').exists() and trained.checkpoint()['iter_num'] == 3


def test_two_runs_in_one_folder(folder):
    """The second is refused; the first goes on, and leaves the folder to others when it ends."""
    run = folder.start_train(max_iters=10**6, eval_interval=10**6)
    run.wait_for(STEP.format(3))
    folder.train(max_iters=2).refused('another process is training in out')
    run.kill(signal.SIGTERM).ok()
    folder.train(max_iters=2, init_from='auto').ok()


def test_a_run_that_died_before_its_first_checkpoint(folder):
    """It leaves a log; the run that starts anew leaves one as if nothing had been."""
    run = folder.start_train(max_iters=10**6, eval_interval=10**6)
    run.wait_for(STEP.format(3))
    run.kill(signal.SIGKILL).wait()
    folder.train(init_from='auto', max_iters=2).ok()
    assert [line['step'] for line in folder.log()] == [0, 0, 1, 2]


def test_sample_at_the_end(folder):
    run = folder.train(sample_tokens=40, sample_prompt='the').ok()
    sample = run.out.split('---------------\n')[1]
    assert sample.startswith('the') and len(sample) == 3 + 40 + 1


def test_sample_that_can_not_be_encoded(folder):
    """The work is done and saved by then: a prompt the tokenizer lacks is reported, but is no failure."""
    run = folder.train(sample_tokens=40, sample_prompt='@').ok()
    assert "'@'" in run.out and 'python sample.py --out_dir=out' in run.out


def test_wandb_offline(folder):
    pytest.importorskip('wandb')
    env = {'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true', 'WANDB_DIR': str(folder.path)}
    folder.start_train(wandb_log=True, wandb_project='p', wandb_run_name='r', max_iters=3, env=env).wait(90).ok()
    runs = list((folder.path / 'wandb').glob('offline-run-*/run-*.wandb'))
    assert len(runs) == 1 and runs[0].stat().st_size > 0


# refusals -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('changes, said', [
    ({'batchsize': 4}, ["unknown setting 'batchsize'; did you mean 'batch_size'?"]),
    ({'batch_size': 'four'}, ["batch_size = 'four' is of type str, expected int"]),
    ({'n_embd': 18, 'n_head': 4}, ['n_embd=18 is not divisible by n_head=4']),
    ({'dropout': 1.5}, ['dropout=1.5']), ({'batch_size': 0}, ['batch_size=0: expected 1 or more']),
    ({'eval_interval': 0}, ['eval_interval=0: expected 1 or more']),
    ({'total_batch_size': -64}, ['total_batch_size=-64']), ({'grad_clip': -1.0}, ['grad_clip=-1.0']),
    ({'beta2': 1.0}, ['beta2=1.0']), ({'max_iters': -1}, ['max_iters=-1']),
    ({'dataset': 'novel'}, ['no dataset in data/novel', 'Datasets here: tiny', 'prepare.py --input=FILE --name=novel']),
    ({'backend': 'foo'}, ["backend='foo': expected 'auto', 'nccl' or 'gloo'"]),
    ({'lr_schedule': 'linear'}, ["lr_schedule='linear': expected 'cosine' or 'wsd'"]),
    ({'preset': 'gpt3'}, ["preset='gpt3': expected 'gpt2' or 'llama' or 'modern'"]),
    ({'optimizer': 'sgd'}, ["optimizer='sgd': expected 'adamw' or 'muon'"]), ({'momentum': 1.0}, ['momentum=1.0']),
    ({'optimizer': 'muon', 'learning_rate': 0.0}, ["learning_rate=0.0: expected above 0 with optimizer='muon'"]),
    ({'learning_rate': 1e-4}, ['min_lr=0.001: expected at most learning_rate=0.0001, as the rate would rise to it']),
    ({'muon_lr': -1.0}, ['muon_lr=-1.0']), ({'n_kv_head': 3}, ['n_kv_head=3: expected a divisor of n_head=2: 1, 2']),
    ({'window_pattern': 'long'}, ["window_pattern='long'"]), ({'pos': 'sine'}, ["pos='sine': expected 'learned' or"]),
    ({'lr_decay_iters': 1}, ['lr_decay_iters=1: expected at least warmup_iters=2']),
    ({'dtype': 'float8'}, ["dtype='float8': expected 'auto', 'float32', 'bfloat16', 'float16'"]),
    ({'device': 'gpu'}, ["device='gpu' is no device"]), ({'compile': 'maybe'}, ["compile='maybe'"]),
    ({'init_from': 'gpt3'}, ["init_from='gpt3': expected another run's out_dir, a folder in", 'one of scratch']),
    ({'init_from': 'resume'}, ['no checkpoint at out/ckpt.pt', 'python train.py --out_dir=out']),
    ({'block_size': 400}, ['val.bin has 333 tokens, fewer than block_size + 1 = 401', '--block_size=332'])])
def test_refused(folder, changes, said):
    folder.train(**changes).refused(*said)
    assert not (folder.path / 'out').exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_cuda_without_a_gpu(folder):
    folder.train(device='cuda').refused("device='cuda'", 'no CUDA GPU', '--device=cpu')


@pytest.mark.parametrize('changes, two', [
    ({'total_batch_size': 100}, False), ({'total_batch_size': 5}, False),
    ({'total_batch_size': 16 * 7, 'batch_size': 3}, False), ({'total_batch_size': 16 * 3}, True)])
def test_batch_suggestions_work(folder, changes, two):
    """Batch sizes that do not divide are refused, with others, which do."""
    settings, suggestions = {**changes, 'max_iters': 1}, []
    while True:
        runs = folder.start_two(**settings) if two else [folder.start_train(**settings)]
        if [run.wait().code for run in runs] == [0] * len(runs):
            break
        said = runs[0].refused('not a whole number').out
        suggestions.append(re.search(r'try --(\w+)=(\d+)', said).groups())
        settings.update([suggestions[-1]])
        assert len(suggestions) <= 2, said  # the total first, then its pieces
    assert suggestions


def test_out_dir_that_can_not_be_written(folder):
    (folder.path / 'file').write_text('')
    folder.train(out_dir='file').refused("out_dir='file' can not be written", '--out_dir')
    folder.train(out_dir='file/out').refused("out_dir='file/out' can not be written")
    if os.geteuid() != 0:  # root may write everywhere
        (folder.path / 'locked').mkdir(mode=0o500)
        folder.train(out_dir='locked').refused("out_dir='locked' can not be written")


def test_architecture_of_a_resumed_run(trained):
    before = (trained.path / 'out' / 'ckpt.pt').read_bytes()
    for key, value in (('n_layer', 3), ('n_head', 4), ('n_embd', 32), ('bias', True)):
        trained.train(init_from='resume', **{key: value}).refused(f'{key}={value}, but out/ckpt.pt has {key}=')
    trained.train(init_from='resume', block_size=32).refused(
        'block_size=32 is above the 16 positions of the model in out/ckpt.pt', '--block_size=16')
    assert (trained.path / 'out' / 'ckpt.pt').read_bytes() == before
    left_out = {'n_layer': None, 'n_head': None, 'n_embd': None, 'block_size': None}  # then the checkpoint's apply
    trained.train(init_from='resume', max_iters=22, **left_out).ok()
    assert trained.checkpoint()['model_args']['n_layer'] == 2 and trained.checkpoint()['iter_num'] == 22


def test_preset(folder):
    """It sets what is not set, in whatever order; and a run of it is resumed, lengthened, and sampled from as any."""
    (folder.path / 'config.py').write_text("qk_norm = False\npreset = 'modern'\n")
    folder.train('config.py', logit_softcap=7, lr_decay_iters=None).ok()
    config, args = json.loads((folder.path / 'out' / 'config.json').read_text()), folder.checkpoint()['model_args']
    assert args['vocab_size'] == len(CHARS) and all(args[name] == config[name] for name in args.keys() & config.keys())
    assert (args['pos'], args['norm'], args['mlp'], args['tie_embeddings']) == ('rope', 'rmsnorm', 'swiglu', False)
    assert (args['qk_norm'], args['logit_softcap']) == (False, 7.0)  # given in the file, on the command line
    assert (config['optimizer'], config['learning_rate'], config['lr_schedule']) == ('muon', 1e-2, 'wsd')
    resume = {'init_from': 'resume', 'max_iters': 22}
    folder.train('config.py', pos='learned', **resume).refused(
        'pos=learned, but out/ckpt.pt has pos=rope, and its weights fix that. Leave it out')
    folder.train(preset='modern', **resume).refused('qk_norm=True, but out/ckpt.pt has qk_norm=False',
                                                    "It is preset 'modern'", 'config/shakespeare_char_classic.py')
    folder.train(**resume).refused(
        "optimizer='adamw', but the state in out/ckpt.pt is that of 'muon'", '--optimizer=muon')
    run = folder.train(optimizer='muon', block_size=32, **resume).ok()  # the architecture is the checkpoint's
    # what is given of it may be impossible with the defaults of what is not
    folder.start('train.py', out_dir='out', dataset='tiny', optimizer='muon', device='cpu', init_from='resume',
                 n_layer=2, n_embd=16, eval_only=True).ok()
    assert 'the context is changed from 16 to 32 tokens' in run.out and list(losses(run)[0]) == [20, 21]
    assert folder.checkpoint()['model_args'] == {**args, 'block_size': 32}
    assert len(folder.sample(num_samples=1, max_new_tokens=50).ok().out) > 50  # past the end of the context


def test_options_of_pretrained_weights(folder):
    """Weights fix the architecture: finetuning takes the optimizer that is asked for, and no other architecture."""
    transformers = pytest.importorskip('transformers')
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(CHARS), n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
    )).save_pretrained(folder.path / 'hf')
    folder.train(init_from='hf', pos='rope').refused('pos=rope, but hf has pos=learned', 'Leave it out')
    folder.train(init_from='hf', preset='llama').refused('but hf has')
    run = folder.train(init_from='hf', optimizer='muon', max_iters=10).ok()  # n_layer=2, of the settings, passed over
    _, evals = losses(run)
    assert evals[10][1] < evals[0][1] - 0.3 and folder.checkpoint()['model_args']['n_layer'] == 1


def test_modern_learns(folder):
    """What the preset is for: in the same steps a lower loss than GPT-2's architecture and AdamW reach."""
    sizes = {'max_iters': 100, 'eval_interval': 100, 'n_embd': 32, 'lr_decay_iters': 100, 'log_interval': 100}
    found = {}
    for preset in ('gpt2', 'modern'):
        given = {'learning_rate': None, 'warmup_iters': None, 'min_lr': None} if preset == 'modern' else {}
        run = folder.train(out_dir=preset, preset=preset, **sizes, **given).ok()
        found[preset] = losses(run)[1][100][1]
    assert found['modern'] < found['gpt2'] - 0.2


def test_large_vocabularies_are_padded(folder):
    """To a multiple of 64, and that shows nowhere: ids of the padding are neither taken from the data nor drawn."""
    chars = [chr(0x4E00 + i) for i in range(1100)]
    ids = np.random.default_rng(0).integers(0, 1100, 2000)
    write_dataset(folder.path / 'data' / 'tiny', ids, ids[:300], chars=chars)
    folder.train(max_iters=2, eval_interval=2).ok()
    state = folder.checkpoint()
    assert state['model_args']['vocab_size'] == 1152 and state['model']['transformer.wte.weight'].shape == (1152, 16)
    text = folder.sample(num_samples=1, start=chars[0], max_new_tokens=300, temperature=100.0, top_k=None).ok().out
    assert len(set(text) & set(chars)) > 100
    folder.train(init_from='resume', max_iters=4).ok()
    # a checkpoint whose vocabulary was not padded
    model = GPT(GPTConfig(**{**state['model_args'], 'vocab_size': 1100}))
    torch.save({**{key: value for key, value in state.items() if key != 'optimizer'}, 'model': model.state_dict(),
                'model_args': {**state['model_args'], 'vocab_size': 1100}}, folder.path / 'out' / 'ckpt.pt')
    folder.train(init_from='resume', max_iters=3).ok()
    assert folder.checkpoint()['model_args']['vocab_size'] == 1100
    write_dataset(folder.path / 'data' / 'tiny', np.append(ids, 1100), ids[:300], chars=chars)
    folder.train(out_dir='new', eval_first=False, max_iters=20).refused('id 1100, but vocab_size is 1100')
    write_dataset(folder.path / 'data' / 'tiny', ids, ids[:300], meta=None)
    (folder.path / 'data' / 'tiny' / 'meta.json').unlink()
    folder.train(init_from='resume', max_iters=4).ok()


def test_smaller_block_size_crops(trained):
    before = trained.checkpoint()
    run = trained.train(init_from='resume', block_size=8, max_iters=24, eval_interval=2).ok()
    after = trained.checkpoint()
    assert list(losses(run)[0]) == [20, 21, 22, 23] and after['model_args']['block_size'] == 8
    moved = (after['model']['transformer.wpe.weight'] - before['model']['transformer.wpe.weight'][:8]).abs().max()
    assert after['model']['transformer.wpe.weight'].shape == (8, 16) and 0 < moved < 0.1
    assert after['optimizer']['state'][1]['exp_avg'].shape == (8, 16) and after['optimizer']['state'][1]['step'] == 24
    trained.train(init_from='resume', block_size=8, max_iters=26).ok()


def test_bad_checkpoints(trained):
    path = trained.path / 'out' / 'ckpt.pt'
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    trained.train(init_from='resume').refused('out/ckpt.pt can not be read', 'best.pt')
    trained.train(init_from='auto').refused('out/ckpt.pt can not be read')
    assert path.read_bytes() == whole[:-1000]
    shutil.copy(trained.path / 'out' / 'best.pt', path)  # what the message says
    state = trained.checkpoint()
    for change, said in (
            (lambda s: s.pop('iter_num'), 'out/ckpt.pt holds no checkpoint'),
            (lambda s: s['model'].pop('transformer.ln_f.weight'), 'transformer.ln_f.weight is missing'),
            (lambda s: s['model'].update(extra=torch.zeros(1)), 'extra is unknown'),
            (lambda s: s['model_args'].update(n_layer=1), 'transformer.h.1.ln_1.weight is unknown'),
            (lambda s: s['model_args'].update(block_size=8), 'transformer.wpe.weight has shape (16, 16), expected (8')):
        changed = {**state, 'model': dict(state['model']), 'model_args': dict(state['model_args'])}
        change(changed)
        torch.save(changed, path)
        trained.train(init_from='resume', max_iters=21).refused('out/ckpt.pt', said)
    torch.save(state, path)
    trained.train(init_from='resume', max_iters=21).ok()


def test_other_tokenizer(trained):
    write_dataset(trained.path / 'data' / 'other', encode(make_text(500)), encode(make_text(100)), chars=CHARS[::-1])
    trained.train(init_from='resume', dataset='other').refused('another tokenizer', '--dataset=tiny')


# data -----------------------------------------------------------------------------------------------------------------

def test_bad_data(folder):
    tiny = folder.path / 'data' / 'tiny'
    (tiny / 'prepare.py').write_text('')  # there are .bin files: named, not run
    train = (tiny / 'train.bin').read_bytes()
    (tiny / 'train.bin').write_bytes(train[:-6])
    folder.train().refused('data/tiny/train.bin has 5,994 bytes, expected 6,000', 'python data/tiny/prepare.py')
    ids = np.frombuffer(train, dtype=np.uint16).copy()
    ids[::7] = len(CHARS)
    (tiny / 'train.bin').write_bytes(ids.tobytes())
    folder.train().refused(f'has id {len(CHARS)}, but vocab_size is {len(CHARS)}')
    (tiny / 'meta.json').write_text('{')
    folder.train().refused('data/tiny/meta.json is damaged')


def test_uint32_data(finished, folder):
    write_dataset(folder.path / 'data' / 'wide', encode(make_text(3000)), encode(make_text(333, seed=1)), 'uint32')
    folder.train(dataset='wide').ok()
    same_state(folder.checkpoint(), finished[0].checkpoint())


def test_prepares_what_is_missing(folder):
    data = folder.path / 'data' / 'late'
    data.mkdir()
    (data / 'prepare.py').write_text(
        'import shutil\nprint("preparing")\n'
        'for name in ("meta.json", "val.bin", "train.bin"):\n    shutil.copy(f"data/tiny/{name}", "data/late")\n')
    run = folder.train(dataset='late', max_iters=1).ok()
    assert 'running: python data/late/prepare.py' in run.out and 'preparing' in run.out
    (data / 'val.bin').unlink()
    (data / 'prepare.py').write_text('pass')  # succeeds, but makes nothing
    folder.start_train(dataset='late').wait(10).refused('python data/late/prepare.py', 'val.bin')


def test_dataset_beside_the_script(folder, tmp_path):
    """From another folder: data/ of the current one comes first, then the one beside train.py."""
    home = tmp_path / 'home'
    home.mkdir()
    for script in ROOT.glob('*.py'):
        shutil.copy(script, home)
    other = folder.path / 'data' / 'other'
    write_dataset(home / 'data' / 'other', encode(make_text(3000)), encode(make_text(333, seed=1)))
    settings = {**TINY, 'dataset': 'other', 'max_iters': 1}
    run = folder.start(home / 'train.py', **settings).ok()
    assert 'step 1' in run.out and not other.exists() and (folder.path / 'out' / 'ckpt.pt').exists()
    write_dataset(other, encode(make_text(30)), encode(make_text(5)))
    folder.start(home / 'train.py', **settings).refused('data/other/val.bin has 5 tokens')


# nanoGPT's habits -----------------------------------------------------------------------------------------------------

def nanogpt_checkpoint(path, dataset='tiny'):
    """A ckpt.pt as nanoGPT's train.py saves it after two steps of a compiled model. -> that model."""
    args = {'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'block_size': 16, 'bias': False, 'vocab_size': len(CHARS),
            'dropout': 0.1}
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**args, 'dropout': 0.0}, mlp='gelu_erf'))
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{'params': [p for p in params if p.dim() >= 2], 'weight_decay': 0.1},
                                   {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}],
                                  lr=1e-3, betas=(0.9, 0.99))
    ids = torch.from_numpy(encode(make_text(17 * 4))).view(4, 17)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:])[1].backward()
        optimizer.step()
    torch.save({'model': {f'_orig_mod.{name}': t for name, t in model.state_dict().items()},
                'optimizer': optimizer.state_dict(), 'model_args': args, 'iter_num': 2,
                'best_val_loss': torch.tensor(2.9), 'config': {'dataset': dataset, 'batch_size': 12, 'device': 'cuda'}},
               path)
    return model


def test_nanogpts_checkpoint_and_data(folder):
    """Evaluated, resumed and sampled as they are: uint16 files and meta.pkl, ckpt.pt of a compiled model."""
    write_dataset(folder.path / 'data' / 'tiny', encode(make_text(3000)), encode(make_text(333, 1)), meta='pkl')
    (folder.path / 'data' / 'tiny' / 'meta.json').unlink()
    (folder.path / 'out').mkdir()
    model = nanogpt_checkpoint(folder.path / 'out' / 'ckpt.pt')
    ids = torch.from_numpy(encode(make_text(333, 1))[:321]).long()
    run = folder.train(init_from='resume', eval_only=True).ok()
    assert losses(run)[0] == {}
    expected = model(ids[:-1].view(20, 16), ids[1:].view(20, 16))[1].item()
    assert losses(run)[1][2][1] == pytest.approx(expected, abs=0.03)  # but for the last 12 targets
    nanogpts = (folder.path / 'out' / 'ckpt.pt').read_bytes()
    run = folder.train(init_from='resume', max_iters=3, eval_interval=100, learning_rate=1.0).ok()
    # that step made it worse: the state which nanoGPT saved remains the best, its file untouched
    assert losses(run)[1][3][1] > 2.9 and (folder.path / 'out' / 'best.pt').read_bytes() == nanogpts
    (folder.path / 'out' / 'best.pt').rename(folder.path / 'out' / 'ckpt.pt')
    run = folder.train(init_from='resume', max_iters=4, eval_interval=2).ok()
    assert list(losses(run)[0]) == [2, 3]
    state = folder.checkpoint()
    assert state['optimizer']['state'][0]['step'] == 4 and state['model_args']['mlp'] == 'gelu_erf'
    assert state['tokenizer'] == {'kind': 'char', 'chars': ''.join(CHARS)}
    run = folder.sample(num_samples=1, max_new_tokens=20, which='last').ok()
    assert 'step 4' in run.out
    nanogpt_checkpoint(folder.path / 'out' / 'ckpt.pt')
    (folder.path / 'out' / 'best.pt').unlink(missing_ok=True)
    run = folder.sample(num_samples=2, max_new_tokens=20, start='the').ok()
    assert 'step 2, lowest val loss so far 2.9' in run.out and run.out.count('the') >= 2


def test_resuming_nanogpts_optimizer(folder):
    """The first update after resuming is the one that torch's AdamW would have made."""
    (folder.path / 'out').mkdir()
    model = nanogpt_checkpoint(folder.path / 'out' / 'ckpt.pt')
    saved = folder.checkpoint()
    optimizer = torch.optim.AdamW([{'params': [p for p in model.parameters() if p.dim() >= 2], 'weight_decay': 0.1},
                                   {'params': [p for p in model.parameters() if p.dim() < 2], 'weight_decay': 0.0}])
    optimizer.load_state_dict(saved['optimizer'])
    for group in optimizer.param_groups:
        group['lr'] = 5e-3
    folder.train(init_from='resume', max_iters=3, decay_lr=False, learning_rate=5e-3, min_lr=1.0, beta2=0.99,
                 grad_clip=0.0, weight_decay=0.1).ok()  # nothing comes near min_lr
    ids = encode(make_text(3000)).astype(np.uint16)
    starts = tokens.train_windows(2, 8, len(ids), 16, 1337)
    optimizer.zero_grad()
    model(*tokens.gather(ids, starts, 16, len(CHARS)))[1].backward()
    optimizer.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(folder.checkpoint()['model'][name], tensor, atol=2e-5, rtol=0)


SMALL = {**TINY, 'total_batch_size': 64, 'max_iters': 4, 'warmup_iters': 1, 'eval_interval': 4, 'eval_iters': 1,
         'log_interval': 1, 'sample_tokens': 0}
for name in ('gradient_accumulation_steps', 'dropout', 'learning_rate', 'lr_decay_iters', 'min_lr'):
    del SMALL[name]  # the recipe's own


# those of reward.py, rl.py and LoRA need a model to begin with: tests/test_tiny_chat.py, tests/test_lab_state_of_gpt.py
@pytest.mark.parametrize('config', [path.name for path in sorted((ROOT / 'config').glob('*.py')) if not
                                    path.name.startswith(('eval_', 'finetune_', 'grpo_', 'lora_', 'ppo_', 'reward_'))])
def test_recipes(folder, config):
    """Each of config/ with a small model and few steps on top: it trains, with finite losses and its own settings."""
    source = (ROOT / 'config' / config).read_text()
    begins = {'init_from': 'scratch'} if 'init_from' in source else {}  # of those that go on from another's model
    run = folder.start('train.py', ROOT / 'config' / config, **SMALL, **begins).ok()
    assert all(math.isfinite(loss) for loss in losses(run)[0].values()) and len(losses(run)[0]) == 4
    assert f"preset = '{folder.checkpoint()['config']['preset']}'" in source or 'classic' in config
    assert f'train.py config/{config}' in source  # its docstring says how to run it
    rates = [line['lr'] for line in folder.log() if 'lr' in line]
    if 'classic' not in config:
        assert rates[-1] < max(rates)  # the schedule ends with the run, however many steps it has


def test_nanogpts_config_file(folder):
    """As its config/ has them: computed values, imports, comments; then overrides on the command line."""
    (folder.path / 'config.py').write_text('''\
# train a miniature character-level model
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_tiny.py
import time

out_dir = 'out-tiny'
eval_interval = 5 # keep frequent because we'll overfit
wandb_log = False # override via command line if you like
wandb_run_name='ft-' + str(time.time())
dataset = 'tiny'
batch_size = 2
block_size = 16
gradient_accumulation_steps = 5 * 8
n_layer = 1
n_head = 2
n_embd = 16
max_iters = 1000
# on macbook also add
# device = 'cpu'  # run on cpu only
# compile = False # do not torch compile the model
''')
    done = subprocess.run([sys.executable, str(ROOT / 'train.py'), 'config.py', '--device=cpu', '--compile=False',
                           '--max_iters=5', '--eval_iters=1', '--dtype=float32'], cwd=folder.path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'step 5: train loss' in done.stdout and '40 micro-batch(es) x 2 x 16' in done.stdout
    state = folder.checkpoint('out-tiny')
    assert state['iter_num'] == 5 and re.fullmatch(r'ft-\d+[.]\d+', state['config']['wandb_run_name'])
