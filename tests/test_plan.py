"""Test --plan: memory against measured steps, machines, remedies. Run: pytest tests/test_plan.py"""

import re
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TINY, load_script
from torch.utils.flop_counter import FlopCounterMode

from bench import bare
from config.presets import PRESETS
from configurator import UserError
from flatgpt import costs, lora, muon, parallel, plan
from flatgpt.cut import Stages
from flatgpt.flops import GPUS, machine_named
from model import GPT, GPTConfig

GB = 1e9
bench = load_script(ROOT / 'bench' / 'plan.py')
EIGHT = GPTConfig(n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, vocab_size=128256, block_size=8192, bias=False,
                  norm='rmsnorm', pos='rope', mlp='swiglu', n_inner=14336, tie_embeddings=False)
SETUP = plan.Setup(EIGHT, 1, 8, 8, how=costs.How(compiled=True))


def settings_of(name, dtype, compile):
    """A case of bench.plan, smaller: processors without bf16 units would take a minute for each."""
    s = bench.settings_of(name, dtype, compile)
    most = {'n_layer': 2, 'n_head': 2, 'n_embd': 64, 'block_size': 128, 'batch_size': 4, 'vocab_size': 8192}
    return {**s, **{name: min(s[name], n) for name, n in most.items()}}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', [
    'activations', 'recompute', 'micro-batches', *(pytest.param(name, marks=pytest.mark.slow) for name in (
        'activations, modern', 'weights', 'dropout', 'long context', 'large vocabulary'))])
def test_memory_is_that_of_a_step(name, dtype):
    """Within 10% of all tensors of a real step on this CPU, not compiled."""
    s = settings_of(name, dtype, compile=False)
    assert sum(bench.predict(s).values()) == pytest.approx(bare.measure_memory(s)['tensors'], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize('name, dtype', [
    ('activations', 'float32'), ('activations, modern', 'bfloat16'), ('large vocabulary', 'float32')])
def test_memory_is_that_of_a_compiled_step(name, dtype):
    s = settings_of(name, dtype, compile=True)
    assert sum(bench.predict(s).values()) == pytest.approx(bare.in_own_process(s, only_memory=True)['tensors'], rel=0.1)


@pytest.mark.parametrize('bits', [32, 8, 4])
def test_memory_of_lora_is_that_of_a_step(monkeypatch, bits):
    def with_adapters(config):
        model = GPT(config)
        lora.add(model, 8, 16.0, ['c_attn', 'c_fc', 'c_proj'], bits)
        return model

    monkeypatch.setattr(bare, 'GPT', with_adapters)
    s = settings_of('activations', 'float32', compile=False)
    config = GPTConfig(**{name: s[name] for name in GPTConfig.__dataclass_fields__ if name in s})
    setup = plan.Setup(config, s['batch_size'], how=costs.How(4, on_gpu=False),
                       lora=(8, ['c_attn', 'c_fc', 'c_proj'], bits))
    assert plan.total(setup) == pytest.approx(bare.measure_memory(s)['tensors'], rel=0.1)


def test_8b_needs_shards():
    """On eight H200: 16 bytes a parameter do not fit, and an eighth of them do."""
    room = GPUS['H200'].memory
    n = sum(costs.parameters(EIGHT).values())
    assert n == pytest.approx(8.03e9, rel=0.001)
    parts = plan.need(SETUP)
    assert parts['weights'] == 4 * n and parts['moments'] == 8 * n and sum(parts.values()) > room
    shards = plan.need(replace(SETUP, n_shards=8))
    assert shards['weights'] == n / 2 and shards['moments'] == n
    assert 30 * GB < sum(shards.values()) < room / 1.5
    # whole weights: embeddings and head in fp32, and blocks in bf16
    assert 4 * 2 * EIGHT.vocab_size * EIGHT.n_embd < shards['gathered weights'] < 15 * GB
    less = plan.need(replace(SETUP, n_shards=8, recompute=True))
    assert less['activations'] < shards['activations'] / 5


def test_remedies_fit_and_others_do_not():
    """Each line alone lets the step fit, and leaves its tokens as they are."""
    big = replace(SETUP, batch_size=8, micro_steps=1)
    lines = plan.remedies(big, 140 * GB, 8)
    assert lines == ['--recompute=block --shard=full', '--shard=full --batch_size=2 --total_batch_size=524288']
    for line in lines:
        changes = {'recompute': '--recompute' in line, 'n_shards': 8 if '--shard' in line else 1}
        size = int((re.search(r'--batch_size=(\d+)', line) or [0, 8])[1])
        changed = replace(big, **changes, batch_size=size, micro_steps=8 // size)
        assert plan.total(changed) <= 140 * GB < plan.total(big)
        assert size == 8 or plan.total(replace(changed, batch_size=2 * size)) > 140 * GB
    assert plan.remedies(replace(big, n_processes=1, micro_steps=1), 140 * GB, 1) == []


def test_largest_batch_divides_the_step():
    small = plan.Setup(GPTConfig(), 4, 9, how=costs.How(compiled=True))
    for most in (10 * GB, 5 * GB, 3 * GB):
        size = plan.largest_batch(small, most)
        assert 36 % size == 0 and plan.total(replace(small, batch_size=size, micro_steps=36 // size)) <= most
        larger = min(n for n in plan.divisors(36) if n > size)
        assert plan.total(replace(small, batch_size=larger, micro_steps=36 // larger)) > most
    assert plan.largest_batch(small, 1 * GB) == 0
    assert plan.largest_batch(replace(small, stages=Stages(4, 100)), 1000 * GB) == 9


@pytest.mark.parametrize('bits', [8, 4])
def test_lora_trains_the_adapters(bits):
    """Parameters, and those of few bits, are those of lora.add()."""
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=64, block_size=16)
    model = GPT(config)
    lora.add(model, 4, 16.0, ['c_attn', 'mlp.c_proj'], bits)
    setup = plan.Setup(config, 1, lora=(4, ['c_attn', 'mlp.c_proj'], bits))
    n, n_trained, n_rounded = plan.parameters(setup)
    of_few_bits = [p for p in model.parameters() if p.element_size() == 1]
    n_held = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in of_few_bits)
    assert n == n_held + n_rounded
    assert n_trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(p.numel() for p in of_few_bits) == n_rounded * bits / 8
    parts = plan.need(setup)
    scales = sum(scale.nbytes for scale in model.buffers()) if bits == 4 else 0  # int8 has few
    assert parts['weights'] == sum(p.nbytes for p in model.parameters()) + scales and parts['moments'] == 8 * n_trained


def test_orthogonalization_is_muons():
    """The FLOPs that torch counts in a step of Muon."""
    config = GPTConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, vocab_size=64, block_size=16, bias=False,
                       mlp='swiglu')
    model = GPT(config)
    settings = {'learning_rate': 1e-3, **{key: PRESETS['modern'][key] for key in (
        'muon_lr', 'embedding_lr', 'weight_decay', 'beta1', 'beta2')}}
    optimizer = muon.create(model, settings, torch.bfloat16, parallel.World())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert plan.orthogonalization(plan.Setup(config, 1, optimizer='muon')) == counter.get_total_flops()


def test_time_of_a_step():
    """124M on an H200: products and memory as bench.lowering counts them; more is slower."""
    H200 = machine_named('H200')
    setup = plan.Setup(GPTConfig(bias=False), 32, how=costs.How(compiled=True))
    seconds = plan.seconds_of_step(setup, H200)
    assert seconds['products'] + seconds['memory'] == pytest.approx(0.0501, rel=0.1)  # 2026-11-30-lowering.md
    assert seconds['exchange'] == 0
    twice = plan.seconds_of_step(replace(setup, micro_steps=2), H200)
    assert twice['products'] == 2 * seconds['products'] and twice['update'] == seconds['update']
    slower = plan.seconds_of_step(replace(setup, recompute=True), H200)
    assert 1.2 < slower['products'] / seconds['products'] < 1.34
    # half of the steps have half of the products, and every step an update
    days = [float(plan.explain_time(replace(setup, stages=stages), H200, 10**9, True)[1].replace(',', '').split()[-2])
            for stages in (Stages(), Stages(2, 10**9))]
    update = seconds['update'] * 10**9 / 86400
    assert days[1] == pytest.approx(update + 0.75 * (days[0] - update), rel=1e-3)
    # 8 x 4 bytes of each weight: between machines they take longer than inside of one
    near, far = (plan.seconds_of_step(replace(setup, batch_size=1, n_processes=machine.size), machine)['exchange']
                 for machine in (machine_named('8xH200'), machine_named('8x1xH200')))
    assert far > near >= 0


@pytest.mark.parametrize('text, n_gpus, n_machines, name', [
    ('H100', 1, 1, 'H100'), ('4xA100', 4, 1, 'A100'), ('2x8xh200', 8, 2, 'H200'), ('8xRTX 4090', 8, 1, 'RTX 4090')])
def test_machines(text, n_gpus, n_machines, name):
    machine = machine_named(text)
    assert (machine.n_gpus, machine.n_machines, machine.gpu) == (n_gpus, n_machines, GPUS[name])
    assert machine.size == n_gpus * n_machines


@pytest.mark.parametrize('text', ['H101', '0xH100', '2x2x8xH100', '8x', '', 'xH100', '-1xH100'])
def test_unknown_machines(text):
    with pytest.raises(UserError, match='known are GB300'):
        machine_named(text)


# the command ----------------------------------------------------------------------------------------------------------


def test_plan_of_this_machine(folder):
    """It needs no dataset, prints all parts with their sum, and leaves nothing behind."""
    run = folder.train(plan=True, dataset=ROOT / 'data' / 'openwebtext').ok()
    assert 'plan for this CPU' in run.out and ': fits in ' in run.out and "GPT-2's vocabulary of 50,257" in run.out
    numbers = [float(n) for n in re.findall(r'^  \S.*? ([\d.]+) GB', run.out, re.M)]
    assert sum(numbers[:-1]) == pytest.approx(numbers[-1], abs=0.05)
    assert not (folder.path / 'out').exists()


def test_plan_of_a_prepared_dataset(folder):
    run = folder.train(plan='2x8xH100', total_batch_size=16 * 128).ok()
    assert 'a step of 2,048 tokens = 16 process(es) x 2 micro-batch(es) x 4 x 16' in run.out
    assert 'assumed: GPT-2' not in run.out and re.search(r'tokens/s, MFU \d+%', run.out)
    n = sum(costs.parameters(GPTConfig(**{key: TINY[key] for key in ('n_layer', 'n_head', 'n_embd', 'block_size')},
                                       vocab_size=27, bias=False)).values())
    assert f'{n / 1e6:,.0f}M parameters' in run.out


def test_plan_says_what_would_fit(folder):
    big = {'n_layer': 48, 'n_head': 25, 'n_embd': 1600, 'block_size': 1024, 'batch_size': 16}
    run = folder.train(plan='8xRTX 4090', **big, total_batch_size=8 * 16 * 1024).ok()
    assert 'does not fit in 24 GB' in run.out and '--shard=full' in run.out
    small = folder.train(plan='RTX 4090,vocab_size=512', **{**big, 'n_layer': 4}).ok()
    assert ': fits in 24 GB' in small.out and 'assumed' not in small.out.replace('libraries (assumed)', '')


def test_plan_of_the_model_of_a_run(tiny_run):
    """The model is that of the checkpoint, whatever the settings of a new one are."""
    run = tiny_run.train(plan='H100', init_from='out', out_dir='new', n_layer=None, n_embd=None).ok()
    assert ' x 16\n' in run.out and '0M parameters' in run.out
    resumed = tiny_run.train(plan='H100', init_from='resume').ok()
    assert resumed.out.split('plan for')[1] == run.out.split('plan for')[1]


@pytest.mark.parametrize('changes, said', [
    ({'plan': '8xH201'}, "plan='8xH201': expected a GPU such as 'H100'"),
    ({'plan': 'H100,vocab_size=many'}, "vocab_size='many', expected 1 or more"),
    ({'plan': '3xH100'}, 'is not a whole number of sequences'),
    ({'plan': 'H100', 'init_from': 'resume'}, 'no checkpoint at')])
def test_plans_that_can_not_be(folder, changes, said):
    folder.train(**changes).refused(said)


def test_auto_plans_the_run_that_is_there(folder):
    """With RoPE the context of the run, not the default."""
    folder.train(preset='llama', block_size=64, max_iters=1).ok()
    for init_from in ('resume', 'auto'):
        run = folder.start('train.py', plan=True, init_from=init_from, dataset='tiny', preset='llama', device='cpu',
                           total_batch_size=128, batch_size=1).wait().ok()
        assert 'x 1 x 64\n' in run.out, run.out
