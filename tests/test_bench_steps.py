"""Test bench/: the bare training step, scaling, train_step and gpu.sh, with tiny models."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from bench import bare, gpu
from configurator import UserError
from model import GPT, GPTConfig

SIZE = {'device': 'cpu', 'dtype': 'float32', 'compile': False, 'n_layer': 2, 'n_head': 2, 'n_embd': 16,
        'block_size': 8, 'batch_size': 4, 'vocab_size': 31}


def last_json(text):
    return json.loads(text.splitlines()[-1])


# the bare step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('preset', ['gpt2', 'llama', 'modern'])
def test_the_step_learns_its_batch(preset):
    step = bare.Step(bare.settings(preset, **SIZE))
    losses = [step() for _ in range(40)]
    assert losses[0] == pytest.approx(math.log(31), abs=0.1) and losses[-1] < losses[0] - 0.1
    assert all(p.grad is None for p in step.model.parameters())


def test_the_step_is_what_torch_does():
    """Against AdamW written out with torch alone: the loss of the third step, which two updates have changed."""
    step = bare.Step(bare.settings('gpt2', **SIZE, grad_clip=0.5, learning_rate=0.01))
    model = GPT(step.model.config)
    model.load_state_dict(step.model.state_dict())
    decays = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    adamw = torch.optim.AdamW([{'params': decays, 'weight_decay': 0.1}, {'params': others, 'weight_decay': 0.0}],
                              lr=0.01, betas=(0.9, 0.95))
    for _ in range(3):
        loss = model(step.x, step.y)[1]
        assert step() == pytest.approx(loss.item(), abs=1e-5)
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        adamw.step()


def test_the_step_follows_every_setting():
    """Each option of the architecture, Muon, micro-batches."""
    options = {'mlp': 'swiglu', 'n_kv_head': 1, 'norm': 'rmsnorm', 'pos': 'rope', 'rope_base': 500.0, 'qk_norm': True,
               'tie_embeddings': False, 'window': 4, 'window_pattern': 'SL', 'logit_softcap': 20.0, 'zero_init': True,
               'residual_lambdas': True, 'value_embeddings': True, 'head_gates': True, 'value_gates': True, 'dropout': 0.1,
               'bias': True}
    s = bare.settings('gpt2', **SIZE, **options, optimizer='muon', total_batch_size=96)
    step = bare.Step(s)
    assert step.model.config == GPTConfig(8, 31, 2, 2, 16, **options)
    assert (step.micro_steps, step.tokens) == (3, 96)
    assert {group['lr'] for group in step.optimizer.param_groups} == {0.02, 6e-4}
    at_first = step.model.lm_head.weight.clone()
    step()
    step()
    assert (step.model.lm_head.weight - at_first).abs().max() > 0


def test_micro_batches_make_the_same_step():
    whole, cut = (bare.Step(bare.settings('gpt2', **SIZE, total_batch_size=tokens)) for tokens in (0, 64))
    assert [whole() for _ in range(3)] == pytest.approx([cut() for _ in range(3)], abs=1e-5)


def test_parts_and_shares():
    step = bare.Step(bare.settings('modern', **SIZE))
    times = step.in_parts()
    assert tuple(times) == bare.PARTS and all(ms > 0 for ms in times.values())
    share = bare.shares(step)
    assert share['products'] > 0 and share['attention'] > 0 and sum(share.values()) < 1


def test_speed_of_products_counts_each_layer():
    s = bare.settings('gpt2', **SIZE)
    speed, by_shape = bare.product_speed(s, bare.Step(s).model, 0.01)
    assert set(by_shape) == {'16x48', '16x16', '16x64', '64x16', '16x31'}
    assert min(by_shape.values()) <= speed <= max(by_shape.values())  # a mean of theirs


def test_peak_memory_is_that_of_the_process():
    before = bare.peak_memory(torch.device('cpu'))
    assert before is None or before > 50 * 2**20  # torch alone
    tensor = torch.ones((before or 0) + 2**24, dtype=torch.uint8)  # more than there has been so far
    assert before is None or bare.peak_memory(torch.device('cpu')) >= tensor.numel()


@pytest.mark.slow
def test_a_process_of_its_own():
    s = bare.settings('modern', **SIZE)
    figures = bare.in_own_process(s, seconds=0.05, product_seconds=0.01)
    model = GPT(GPTConfig(**{key: s[key] for key in GPTConfig.__dataclass_fields__}))
    assert figures['tokens_per_step'] == 32 and figures['step_flops'] == 32 * model.flops_per_token()
    assert figures['tokens_per_s'] == pytest.approx(32e3 / figures['ms']['median'], rel=0.01)
    assert figures['optimizer_share'] == pytest.approx(
        figures['parts_ms']['optimizer'] / sum(figures['parts_ms'].values()), abs=0.01)
    assert figures['mfu'] is None  # no peak is known of a CPU
    with pytest.raises(UserError, match='exit status 1; its error is above'):
        bare.in_own_process({**s, 'n_head': 3})


@pytest.mark.parametrize('power', [0, 0.5, 1, 2])
def test_exponent_of_exact_powers(power):
    sizes = [3, 6, 12, 48]
    assert bare.exponent(sizes, [7 * size**power for size in sizes]) == pytest.approx(power)


def test_exponent_of_a_sum_lies_between():
    assert bare.exponent([1, 2], [1 + 1, 2 + 4]) == pytest.approx(math.log2(3))  # size + size^2: 2 -> 6


# the scripts ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_scaling_along_the_batch(folder):
    out = folder.start('bench.scaling', axes='batch', batches='2,4', base='1x32x8x2', compile=False, seconds=0.05,
                       device='cpu', preset='gpt2').ok().out
    out = out[out.index('scaling | '):]  # before it stand the settings and the progress
    record = last_json(out)
    axis = record['axes']['batch']
    assert axis['sizes'] == [2, 4] and [f['tokens_per_step'] for f in axis['steps']] == [16, 32]
    assert axis['flops_exponent'] == 1  # FLOPs grow with the batch
    assert axis['exponent'] == pytest.approx(math.log2(
        axis['steps'][1]['ms']['median'] / axis['steps'][0]['ms']['median']), abs=0.01)
    assert max(map(len, out.splitlines()[2:-1])) <= 80 and 'grows with the power' in out


@pytest.mark.parametrize(('script', 'changes', 'said'), [
    ('scaling', {'axes': 'depth,hight'}, "'hight' is none of depth, width, context, batch"),
    ('scaling', {'base': '4x128'}, 'layers x width x context x sequences, such as 4x128x64x12'),
    ('scaling', {'depths': '2;4'}, 'whole numbers above 0'),
    ('scaling', {'widths': '100'}, 'not a whole number of heads'),
    ('scaling', {'preset': 'best'}, '--preset=best: '),
    ('train_step', {'cases': 'smal'}, "'smal' is none of small, char, gpt2, small-modern, char-modern"),
    ('train_step', {'steps': 1}, 'expected 2 or more'),
    ('train_step', {'cases': 'gpt2', 'peer': 'nowhere'}, 'there is no train.py; expected a checkout'),
])
def test_scripts_say_what_is_wrong(folder, script, changes, said):
    folder.start(f'bench.{script}', **changes).refused(said)


@pytest.mark.slow
def test_train_step_takes_the_step_apart(folder):
    """The 124M case cut down to nothing: its random tokens, the settings train.py resolved, the table."""
    out = folder.start('bench.train_step', cases='gpt2', rounds=1, steps=2, extra='--n_layer=1 --n_head=1 '
                       '--n_embd=16 --block_size=8 --batch_size=2 --device=cpu --compile=False --max_iters=4 '
                       '--preset=modern').ok().out
    out = out[out.index('train_step | '):]
    f = last_json(out)['gpt2']
    assert (f['tokens_per_step'], f['preset'], f['optimizer']) == (16, 'modern', 'muon')
    # untied tables; a block's attention, its SwiGLU 64 wide; the RMSNorms
    assert f['parameters'] == 2 * 50304 * 16 + 4 * 16**2 + 3 * 64 * 16 + 3 * 16
    assert f['overhead']['median'] == pytest.approx(f['ours_ms']['median'] / f['bare_ms']['median'] - 1, abs=1e-3)
    assert max(map(len, out.splitlines()[2:-1])) <= 80
    assert 'bare step: optimizer' in out and 'forward + backward: products' in out


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_generate(folder):
    """Every run has a rate, the comparisons are ratios of them, and the table fits a terminal."""
    out = folder.start('bench.generate', rounds=2, new_tokens=4, long_prompt=40, long_tokens=3, batch=2, n_layer=1,
                       n_head=2, n_embd=16, vocab_size=64, device='cpu').wait(300).ok().out
    figures = json.loads(out.splitlines()[-1])
    rates = figures['tokens_per_second']
    assert {'bfloat16, compiled', 'int8, compiled, long', 'bfloat16, batch of 2', 'floor'} <= set(rates)
    assert all(rate['n'] == 2 and rate['min'] > 0 for rate in rates.values())
    assert set(figures['ratios']) >= {'share of the floor', 'int8 against bfloat16', 'batch of 2 against 1'}
    int8, bf16 = rates['int8, compiled'], rates['bfloat16, compiled']
    ratio = figures['ratios']['int8 against bfloat16']['median']
    assert int8['min'] / bf16['max'] - 0.01 <= ratio <= int8['max'] / bf16['min'] + 0.01
    assert max(map(len, out.splitlines()[:-1])) <= 80


@pytest.mark.slow
def test_serve(folder):
    """A server in a process of its own, and peers in this one."""
    out = folder.start('bench.serve', rounds=2, streams=3, new_tokens=30, long_prompt=100, beside=2, shared_tokens=60,
                       n_layer=1, n_head=2, n_embd=16, vocab_size=256).wait(300).ok().out
    figures = json.loads(out.splitlines()[-1])
    assert {'one stream', '3 streams', 'sample.py, compiled'} <= set(figures['tokens_per_second'])
    assert all(rate['n'] == 2 and rate['min'] > 0 for rate in figures['tokens_per_second'].values())
    assert set(figures['seconds']) == {'alone', 'beside 2', 'gap', 'new', 'again'}
    assert figures['seconds']['beside 2']['max'] < 60 and len(figures['ratios']) >= 4
    assert max(map(len, out.splitlines()[:-1])) <= 80


# gpu.py, gpu.sh ------------------------------------------------------------------------------------------------------

EVALUATIONS = [{'step': 0, 'val_loss': 4.0}, {'step': 100, 'val_loss': 3.0}, {'step': 200, 'val_loss': 2.0},
               {'step': 300, 'val_loss': 2.5}]


def test_crossing_is_between_two_evaluations():
    assert gpu.crossing(EVALUATIONS, 2.75) == pytest.approx(125)
    assert gpu.crossing(EVALUATIONS, 3.0) == 100 and gpu.crossing(EVALUATIONS, 2.0) == 200
    assert gpu.crossing(EVALUATIONS, 5.0) == 0 and gpu.crossing(EVALUATIONS, 1.9) is None


def test_first_evaluation_below_a_target():
    assert gpu.first_below(EVALUATIONS, 2.2)['step'] == 200
    assert gpu.first_below(EVALUATIONS, 3.0)['step'] == 100 and gpu.first_below(EVALUATIONS, 1.0) is None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='needs bash and timeout')
def test_gpu_sh_runs_parts_one_by_one(tmp_path):
    """A part that fails does not stop the next, and the summary says which is which."""
    (tmp_path / 'peer').mkdir()  # no checkout of nanoGPT
    done = subprocess.run(['bash', str(ROOT / 'bench' / 'gpu.sh')], text=True, capture_output=True, timeout=120, env={
        **os.environ, 'DRY': '1', 'PARTS': 'peer machine', 'PEER': str(tmp_path / 'peer'), 'PYTHON': sys.executable,
        'OUT': str(tmp_path / 'out'), 'BUDGET': '100'})
    assert done.returncode == 1, done.stdout + done.stderr
    out = tmp_path / 'out'
    assert {path.name for path in out.iterdir()} == {'log.txt', 'parts.txt', 'machine.json', 'summary.json'}
    parts = json.loads((out / 'summary.json').read_text())['parts']
    assert parts['peer']['status'] == 'failed (1)' and parts['peer']['result'] is None
    assert parts['machine']['status'] == 'done' and parts['machine']['result']['torch'] == torch.__version__
    assert parts['peer']['limit'] + parts['machine']['limit'] < 2 * 100
    assert 'there is no train.py; expected a checkout' in (out / 'log.txt').read_text()


@pytest.mark.skipif(sys.platform != 'linux', reason='needs bash and timeout')
@pytest.mark.parametrize(('environment', 'said'), [
    ({'DRY': '1', 'PARTS': 'machine sped'}, "'sped' is none of machine, check, char"),
    ({'DRY': '1', 'PARTS': 'peer'}, 'PEER is not set; expected the path of a nanoGPT checkout'),
    pytest.param({}, 'DRY=1 bash bench/gpu.sh', marks=pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU')),
])
def test_gpu_sh_says_what_is_wrong(tmp_path, environment, said):
    done = subprocess.run(['bash', str(ROOT / 'bench' / 'gpu.sh')], text=True, capture_output=True, timeout=60, env={
        **os.environ, 'PYTHON': sys.executable, 'OUT': str(tmp_path / 'out'), **environment})
    assert done.returncode == 1 and said in done.stderr and not (tmp_path / 'out').exists()
