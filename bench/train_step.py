"""
The training step: train.py's against the bare arithmetic, against nanoGPT's, and against the matrix products alone.

    $ python bench/train_step.py                                # our step, the bare step, the floor: about 10 minutes
    $ python bench/train_step.py --peer=../nanoGPT              # and nanoGPT's, in a checkout whose data is prepared
    $ python bench/train_step.py --cases=small --rounds=2 --small_steps=100   # a quick look

Cases: 'small' is the CPU command of nanoGPT's README (0.8M parameters, 12x64 tokens a step), 'char' its
config/train_shakespeare_char.py (10.65M, 64x256). train.py runs with 'auto' settings, that is without the flags
--device=cpu --compile=False which nanoGPT needs. The bars: train.py's step at most 3% slower than the bare forward,
backward, clipping and update of the same model on one fixed batch; 4 times nanoGPT's tokens/s at 'char' (on AMX cores).

The runs take turns, several rounds of them, because a machine's speed drifts; ratios are taken within a round. Prints a
table of medians over the rounds (with their range), then a JSON line. Where other processes disturb the rounds, the
fastest tenth of all steps (their upper end) compares better than medians do: noise only ever adds.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext

import torch
from torch.nn import functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # Python looks only beside the script

import dataloader
import optim
import parallel
from bench import common
from configurator import override
from model import GPT, GPTConfig

# settings ------------------------------------------------------------------------------------------------------------
cases = 'small,char'  # which
peer = ''  # path of a nanoGPT checkout; '': without the comparison
rounds = 5  # turns of each
small_steps = 300  # steps in a turn
char_steps = 6
warmup = 0.2  # share of a turn's steps that is left out of its median; at least one step
wait = 0  # seconds to wait before each round, at most, until other processes leave the machine alone
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

CASES = {'small': (common.SMALL, small_steps), 'char': (common.CHAR, char_steps)}
ONCE = ['--eval_iters=1']  # nanoGPT always evaluates before the first step; it need not be long


def steady(times):
    """A turn's steps without the first ones."""
    return times[max(1, round(warmup * len(times))) :]


def bare_step(s):
    """Settings that train.py resolved -> (a function that takes one step and returns its loss, the model)."""
    device = torch.device(s['device'])
    vocab_size = dataloader.load_meta(os.path.join('data', s['dataset']))['vocab_size']
    torch.manual_seed(s['seed'])
    model = GPT(GPTConfig(s['block_size'], vocab_size, s['n_layer'], s['n_head'], s['n_embd'], s['dropout'], s['bias']))
    model.to(device)
    optimizer = optim.adamw(model, s['weight_decay'], s['learning_rate'], (s['beta1'], s['beta2']))
    if device.type == 'cpu':
        parallel.keep_freed_memory()
    autocast = nullcontext() if s['dtype'] == 'float32' else torch.autocast(device.type, parallel.DTYPES[s['dtype']])
    step_model = model
    if s['compile'] and device.type == 'cpu':  # as train.py does
        for block in model.transformer.h:
            block.compile(dynamic=False, options={'fallback_random': True})
    elif s['compile']:
        step_model = torch.compile(model, dynamic=False)
    x, y = torch.randint(vocab_size, (2, s['batch_size'], s['block_size']), device=device)

    def step():
        with autocast:
            loss = step_model(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s['grad_clip'])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device, as reading the loss does in train.py

    return step, model


def matmul_speed(s, model):
    """
    -> (FLOP/s of the model's linear layers alone, forward and backward, weighted by how often each occurs,
    {'inxout': FLOP/s}), with as many rows as a step has tokens, in the step's dtype.
    """
    device, dtype, rows = torch.device(s['device']), parallel.DTYPES[s['dtype']], s['batch_size'] * s['block_size']
    shapes = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    seconds, speeds = 0.0, {}
    for n_in, n_out in sorted(set(shapes)):
        x = torch.randn(rows, n_in, device=device, dtype=dtype, requires_grad=True)
        w = torch.randn(n_out, n_in, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn(rows, n_out, device=device, dtype=dtype)
        flops, times = 6 * rows * n_in * n_out, []  # a product each for y, dx and dw
        while sum(times) < 0.7 or len(times) < 5:
            t0 = time.perf_counter()
            torch.autograd.grad(F.linear(x, w), (x, w), dy)
            if device.type == 'cuda':
                torch.cuda.synchronize()
            times.append(time.perf_counter() - t0)
        best = min(times)  # a floor: noise can only add
        speeds[f'{n_in}x{n_out}'] = flops / best
        seconds += shapes.count((n_in, n_out)) * best
    return sum(6 * rows * n_in * n_out for n_in, n_out in shapes) / seconds, speeds


def measure(case, folder):
    """Take turns, -> the figures of one case."""
    arguments, n = CASES[case]
    ours = common.train_command([*arguments, '--eval_first=False', f'--out_dir={folder}/ours'], auto=True)
    theirs = common.train_command([*arguments, *ONCE, f'--out_dir={folder}/peer'])
    step, turns = None, {'ours': [], 'bare': [], 'peer': []}
    for turn in range(rounds):
        print(f'{case}: round {turn + 1} of {rounds}', file=sys.stderr)
        common.wait_for_quiet(wait)
        turns['ours'].append(common.step_times(ours, n))
        if step is None:
            with open(f'{folder}/ours/config.json', encoding='utf-8') as f:
                s = json.load(f)  # with 'auto' resolved
            step, model = bare_step(s)
            step()  # compiles
        times = []
        for _ in range(n):
            t0 = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - t0))
        turns['bare'].append(times)
        if peer:
            turns['peer'].append(common.step_times(theirs, n, cwd=peer))

    medians = {name: [statistics.median(steady(times)) for times in of] for name, of in turns.items()}
    fast = {name: statistics.quantiles([ms for times in of for ms in steady(times)], n=10)[0]
            for name, of in turns.items() if of}
    tokens = s['batch_size'] * s['block_size']
    flops = model.flops_per_token() * tokens
    speed, speeds = matmul_speed(s, model)
    figures = {'device': s['device'], 'dtype': s['dtype'], 'compile': s['compile'], 'tokens_per_step': tokens,
               'steps_per_turn': n,
               'ours_ms': common.spread(medians['ours']), 'bare_ms': common.spread(medians['bare']),
               'overhead': common.spread([a / b - 1 for a, b in zip(medians['ours'], medians['bare'], strict=True)], 4),
               'overhead_fast': round(fast['ours'] / fast['bare'] - 1, 4),
               'tokens_per_s': round(1e3 * tokens / statistics.median(medians['ours'])),
               'matmul_gflops': round(speed / 1e9, 1), 'matmul_gflops_by_shape':
               {shape: round(value / 1e9, 1) for shape, value in speeds.items()},
               'step_gflop': round(flops / 1e9, 2), 'floor_ms': round(1e3 * flops / speed, 3)}
    figures['share_of_floor'] = round(figures['floor_ms'] / figures['ours_ms']['median'], 3)
    if peer:
        figures['peer_ms'] = common.spread(medians['peer'])
        figures['speedup'] = common.spread([b / a for a, b in zip(medians['ours'], medians['peer'], strict=True)])
        figures['speedup_fast'] = round(fast['peer'] / fast['ours'], 3)
    return figures


os.chdir(common.ROOT)  # datasets are found from there
for case in cases.split(','):
    if case not in CASES:
        raise SystemExit(f'cases={cases!r}: {case!r} is none of {", ".join(CASES)}')
if peer:
    common.check_peer(peer)
rows, figures = [['', *cases.split(',')]], {}
for case in cases.split(','):
    with tempfile.TemporaryDirectory() as folder:
        figures[case] = measure(case, folder)

print(common.heading('train_step'))
for label, text in (
    ('tokens a step', lambda f: f'{f["tokens_per_step"]:,}'),
    ('train.py: dtype, compile', lambda f: f'{f["dtype"]}, {f["compile"]}'),
    ('train.py, ms a step', lambda f: common.show(f['ours_ms'])),
    ('bare step, ms', lambda f: common.show(f['bare_ms'])),
    ('train.py slower by (bar: 3%)', lambda f: common.show(f['overhead'], form='{:.1%}')),
    ('  by the fastest tenth of steps', lambda f: f'{f["overhead_fast"]:.1%}'),
    ('train.py, tokens/s', lambda f: f'{f["tokens_per_s"]:,}'),
    ('nanoGPT, ms a step', lambda f: common.show(f['peer_ms']) if peer else '-'),
    ('times as fast as nanoGPT', lambda f: common.show(f['speedup'], form='{:.2f}') if peer else '-'),
    ('  by the fastest tenth of steps', lambda f: f'{f["speedup_fast"]:.2f}' if peer else '-'),
    ('linear layers alone, GFLOP/s', lambda f: f'{f["matmul_gflops"]:,.0f}'),
    ('all FLOPs at that speed, ms', lambda f: f'{f["floor_ms"]:,.1f}'),
    ('that floor / our step', lambda f: f'{f["share_of_floor"]:.0%}'),
):
    rows.append([label, *(text(figures[case]) for case in cases.split(','))])
print(common.table(rows))
common.finish('train_step', rounds, **figures)
