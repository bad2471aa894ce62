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
from conftest import (
    CHARS,
    ROOT,
    TINY,
    close_state,
    encode,
    losses,
    make_text,
    same_state,
    write_dataset,
)

from model import GPT, GPTConfig

STEP = r'iter {}: loss'  # the line of a step, for Run.wait_for


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
    'wsd': {'lr_schedule': 'wsd', 'grad_clip': 0.0, 'always_save_checkpoint': False, 'batch_stages': 2},
    'muon': {'preset': 'modern', 'dropout': 0.1, 'weight_decay': 0.1, 'dtype': 'bfloat16'},
    'muon, float16, all options': {
        'preset': 'modern', 'dtype': 'float16', 'n_kv_head': 1, 'mlp': 'swiglu', 'window': 5, 'n_layer': 3,
        'residual_lambdas': True, 'value_embeddings': True, 'weight_decay': 0.1, 'head_gates': True, 'value_gates': True,
        'cautious_decay': True, 'muon_decay_fraction': 0.8},
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_batch_grows_in_stages(folder):
    """4, 8, 12 sequences a step: the steps of three runs with these batches, at the roots of these parts of the rate."""
    changes = {'batch_size': 2, 'decay_lr': False, 'eval_interval': 7}
    whole = {**changes, 'batch_stages': 3, 'total_batch_size': 192}
    run = folder.train(out_dir='whole', **whole).ok()
    assert '6 micro-batch(es) x 2 x 16, after 2 stage(s) with fewer' in ' '.join(run.out.split())
    init_from = 'scratch'
    for k, max_iters in ((1, 7), (2, 14), (3, 20)):
        folder.train(out_dir='parts', **changes, init_from=init_from, total_batch_size=64 * k, max_iters=max_iters,
                     learning_rate=1e-2 * (k / 3) ** 0.5).ok()
        init_from = 'resume'
    same_state(folder.checkpoint('parts'), folder.checkpoint('whole'))
    keys = ('step', 'loss', 'lr', 'grad_norm', 'tokens')
    parts, whole_log = ([{k: line[k] for k in keys} for line in folder.log(d) if 'loss' in line] for d in ('parts', 'whole'))
    assert parts == whole_log and [line['tokens'] for line in parts] == [
        64 * n for n in (*range(1, 8), *range(9, 22, 2), *range(24, 40, 3))]
    folder.train_two(out_dir='two', **whole)
    close_state(folder.checkpoint('two'), folder.checkpoint('whole'), tolerance=1e-4)


def test_seeds(finished, folder):
    folder.train(out_dir='same').ok()
    same_state(folder.checkpoint('same'), finished[0].checkpoint())
    folder.train(out_dir='other', seed=1).ok()
    a, b = folder.log('same'), folder.log('other')
    assert a[0]['val_loss'] != b[0]['val_loss'] and a[1]['loss'] != b[1]['loss']
    folder.train(out_dir='negative', seed=-5, max_iters=2).ok()  # any int is a seed


@pytest.mark.slow
def test_compiled(folder):
    """The compiled step: the same losses as eager, and exact on resuming with dropout. A cold cache takes a while."""
    changes = {'max_iters': 4, 'lr_decay_iters': 4, 'eval_interval': 2, 'warmup_iters': 0, 'batch_stages': 2}
    eager = folder.train(out_dir='eager', **changes).ok()
    run = folder.train(out_dir='compiled', compile=True, **changes).wait(240).ok()
    assert 'compiling the training step' in run.out and 'WARNING' not in run.out
    assert list(losses(run)[0].values()) == pytest.approx(list(losses(eager)[0].values()), abs=2e-3)
    for out_dir, iters, init_from in (('whole', 4, 'scratch'), ('half', 2, 'scratch'), ('half', 4, 'resume')):
        folder.start_train(out_dir=out_dir, compile=True, dropout=0.2, init_from=init_from,
                           **{**changes, 'max_iters': iters}).wait(240).ok()
    same_state(folder.checkpoint('half'), folder.checkpoint('whole'))


@pytest.mark.parametrize('changes', [{'dropout': 0.2}, {'preset': 'modern', 'value_embeddings': True,
                                                       'residual_lambdas': True, 'n_head': 4}])
def test_recomputed_blocks_give_the_same_weights(folder, changes):
    """Bit for bit, also through a resume without it; and less is kept for the backward pass."""
    changes = {**changes, 'max_iters': 6, 'eval_interval': 3, 'warmup_iters': 0}
    folder.train(out_dir='kept', **changes).ok()
    folder.train(recompute='block', **{**changes, 'max_iters': 3, 'lr_decay_iters': 20}).ok()
    folder.train(init_from='resume', **changes).ok()
    same_state(folder.checkpoint(), folder.checkpoint('kept'))


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert 'stopped at once, without saving' in run.out and 'Traceback' not in run.out


@pytest.mark.parametrize('name', ['step', 'learning_rate', 'data', 'auto'])
def test_processes_that_differ_are_refused(folder, name):
    """Two machines without a shared disk: of checkpoints, a setting, the text; one has a checkpoint, one none."""
    folder.train(out_dir='out-0', max_iters=10).ok()
    folder.train(out_dir='out-1', max_iters=10 + 5 * (name == 'step')).ok()
    write_dataset(folder.path / 'data' / 'other', encode(make_text(3000, seed=3)), encode(make_text(333, seed=1)))
    (folder.path / 'config.py').write_text(
        'import os\nout_dir = "out-" + os.environ["RANK"]\nlearning_rate = 1e-2\ndataset = "tiny"\n'
        + {'step': '', 'learning_rate': 'learning_rate *= 1 + int(os.environ["RANK"])\n',
           'data': 'dataset = ["tiny", "other"][int(os.environ["RANK"])]\n', 'auto': 'init_from = "auto"\n'}[name])
    changes = {'out_dir': None, 'learning_rate': None, 'dataset': None, 'init_from': 'resume'}
    if name == 'auto':
        shutil.rmtree(folder.path / 'out-1')
        changes['init_from'], name = None, 'step'
    before = {path: path.read_bytes() for path in folder.path.glob('out-*/*')}
    for run in folder.start_two('config.py', **changes):
        run.refused(f'process 1 has {name}=', 'as in process 0: start all with one command')
    assert {path: path.read_bytes() for path in folder.path.glob('out-*/*')} == before


@pytest.mark.slow
def test_second_sigterm_is_obeyed_by_a_process_that_waits(folder):
    """A process waits in C++ for one that hangs, where Python runs no handler."""
    runs = folder.start_two(max_iters=100000, eval_interval=100000, log_interval=1)
    runs[0].wait_for(STEP.format(3))
    runs[1].kill(signal.SIGSTOP)
    time.sleep(0.5)
    runs[0].kill(signal.SIGTERM)
    time.sleep(1.2)
    assert runs[0].kill(signal.SIGTERM).wait(20).code == 128 + signal.SIGTERM
    runs[1].kill(signal.SIGKILL).wait()


def test_kills_lose_nothing(folder):
    """SIGKILL at random moments: what was reported saved is there, and init_from=auto goes on to the same weights."""
    changes = {'max_iters': 200, 'eval_interval': 2, 'dropout': 0.1, 'log_interval': 20}
    folder.train(out_dir='whole', **changes).ok()
    rng, kills, reported = random.Random(0), 0, 0
    while kills < 8:
        run = folder.start_train(init_from='auto', **changes)
        run.wait_for(r'(saved [^\n]*\n[\s\S]*?)' + f'{{{rng.randint(1, 6)}}}')
        time.sleep(rng.uniform(0, 0.02))  # somewhere in a step, an evaluation or a save
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


@pytest.mark.slow
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


def test_full_disk(tiny_run):
    """Saving fails: training goes on and ends with an error, and the checkpoint that was there is untouched."""
    (tiny_run.path / 'config.py').write_text(
        'import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n')
    before = (tiny_run.path / 'out' / 'ckpt.pt').read_bytes()
    assert len(before) > 40000
    run = tiny_run.train('config.py', init_from='resume', max_iters=30, eval_interval=5).refused(
        'WARNING: out/ckpt.pt could not be saved at step 25', 'untouched', 'free some space', 'File too large',
        'the state of step 30 is not saved; out/ckpt.pt is older')
    assert list(losses(run)[0]) == list(range(20, 30))
    assert run.out.count('could not be saved at step 30') == 1  # tried once
    assert (tiny_run.path / 'out' / 'ckpt.pt').read_bytes() == before
    assert sorted(os.listdir(tiny_run.path / 'out')) == ['best.pt', 'ckpt.pt', 'config.json', 'log.jsonl']


# losses that are no numbers -------------------------------------------------------------------------------------------

def poison(folder, value):
    """Set a weight of the checkpoint to `value`; -> the bytes of the file."""
    state = folder.checkpoint()
    state['model']['transformer.h.1.mlp.c_fc.weight'][0, 0] = value
    torch.save(state, folder.path / 'out' / 'ckpt.pt')
    return (folder.path / 'out' / 'ckpt.pt').read_bytes()


def test_non_finite_loss_stops_before_the_update(tiny_run):
    before = poison(tiny_run, math.nan)
    run = tiny_run.train(init_from='resume', max_iters=30).refused(
        'step 20: loss is nan', 'Stopped without saving; out/ckpt.pt is of step 20', '--learning_rate')
    assert 'iter 20' not in run.out
    assert (tiny_run.path / 'out' / 'ckpt.pt').read_bytes() == before


def test_divergence_does_not_overwrite_the_checkpoint(tiny_run):
    """A ruinous update is seen by the next loss, whether a step or an evaluation computes it."""
    before = (tiny_run.path / 'out' / 'ckpt.pt').read_bytes()
    best = (tiny_run.path / 'out' / 'best.pt').read_bytes()
    for eval_interval in (1000, 1):
        run = tiny_run.train(init_from='resume', max_iters=40, learning_rate=1e30, min_lr=1e30, decay_lr=False,
                            eval_interval=eval_interval).refused('step 21: ', 'nan')
        assert 'out/ckpt.pt is of step 20' in run.out and 'saved' not in run.out
        assert (tiny_run.path / 'out' / 'ckpt.pt').read_bytes() == before
        assert (tiny_run.path / 'out' / 'best.pt').read_bytes() == best


def test_non_finite_loss_before_any_checkpoint(folder):
    folder.train(learning_rate=1e30, decay_lr=False).refused('step 1: ', 'there is no checkpoint yet')
    assert not (folder.path / 'out' / 'ckpt.pt').exists()


# settings that steer a run --------------------------------------------------------------------------------------------

def test_eval_only(tiny_run):
    before = {f.name: f.read_bytes() for f in (tiny_run.path / 'out').iterdir()}
    run = tiny_run.train(eval_only=True, init_from='resume').ok()
    assert losses(run) == ({}, {20: losses(run)[1][20]}) and 'saved' not in run.out
    assert 'M parameters\n' in run.out and 'epochs' not in run.out and 'a step of' not in run.out
    assert losses(run)[1][20][1] == pytest.approx(tiny_run.checkpoint()['best_val_loss'], abs=1e-4)
    assert {f.name: f.read_bytes() for f in (tiny_run.path / 'out').iterdir()} == before
    run = tiny_run.train(eval_only=True, init_from='resume', eval_interval=7).ok()  # step 20 is no multiple of it
    assert list(losses(run)[0]) == [] and list(losses(run)[1]) == [20]
    run = tiny_run.train(eval_only=True, out_dir='new').ok()
    assert list(losses(run)[1]) == [0] and not (tiny_run.path / 'new').exists()


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


def test_an_earlier_run_is_moved(tiny_run):
    before = {f.name: f.read_bytes() for f in (tiny_run.path / 'out').iterdir()}
    run = tiny_run.train(max_iters=2).ok()
    assert 'out held files of an earlier run; they are now in out/previous-1' in run.out
    assert {f.name: f.read_bytes() for f in (tiny_run.path / 'out' / 'previous-1').iterdir()} == before
    assert tiny_run.checkpoint()['iter_num'] == 2 and len(tiny_run.log()) == 4
    tiny_run.train(max_iters=3, init_from='auto').ok()  # resumes, so there is nothing to move
    assert not (tiny_run.path / 'out' / 'previous-2').exists() and tiny_run.checkpoint()['iter_num'] == 3


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


