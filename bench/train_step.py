"""
Compare train.py's step with the bare step, nanoGPT's, and matrix products.

    $ python -m bench.train_step --peer=../nanoGPT              # all: most of an hour on two cores
    $ python -m bench.train_step --cases=small,char             # two models, without nanoGPT
    $ python -m bench.train_step --cases=small --rounds=2 --steps=100   # a quick look

Cases: 'small' is the CPU command of nanoGPT's README (0.8M parameters, 12x64
tokens a step); 'char' its config/train_shakespeare_char.py (10.65M, 64x256; here
config/shakespeare_char_classic.py); 'gpt2' the 124M model on random tokens
(4x1024; on a GPU 12x1024, nanoGPT's micro-batch). 'small-modern' and
'char-modern' have the same sizes, --preset=modern and no dropout; nanoGPT runs
them with the same flags except the preset. train.py runs without --device=cpu
--compile=False, nanoGPT with them unless there is a GPU.

The bars: train.py's step at most 3% slower than the bare forward, backward,
clipping and update of the same model on one fixed batch; on two AMX cores 7
times nanoGPT's tokens/s at 'char' and 6 times at 'gpt2', the optimizer at most
10% of a step of 'char'.

The runs take turns in several rounds, because a machine's speed drifts; ratios
are taken within a round. Where other processes disturb the rounds, the upper end
of the fastest tenth of all steps compares better than medians: noise only adds.
Then a new process takes the bare step apart (bare.py). Prints a table of medians
over the rounds with their range for each case, then a JSON line.
"""

import json
import os
import statistics
import sys
import tempfile

import numpy as np
import torch

from bench import bare, common
from configurator import Count, Fraction, Natural, NonNegative, UserError, override
from data.datasets import load_meta
from flatgpt import runtime
from model import padded_vocab_size

# Settings -----------------------------------------------------------------------------------------
cases = 'small,char,gpt2,small-modern,char-modern'
peer = ''  # path of a nanoGPT checkout; '': without the comparison
rounds: Count = 5
steps: Natural = 0  # in a turn; 0: the case's own number
warmup: Fraction = 0.2  # share of a turn's steps left out of its median; at least one step
wait: NonNegative = 0  # most seconds to wait for a quiet machine before each round
extra = ''  # flags for every training command, such as '--n_layer=2 --compile=False'
config = override(globals())
# --------------------------------------------------------------------------------------------------

on_gpu = runtime.choose_device('auto').type == 'cuda'
MODERN = ['--preset=modern', '--dropout=0.0']
GPT2 = ['--device=cpu', '--compile=False', '--log_interval=1', '--gradient_accumulation_steps=1',
        '--block_size=1024', f'--batch_size={12 if on_gpu else 4}']  # otherwise both's defaults
CASES = {  # flags, steps in a turn on the CPU, on a GPU
    'small': (common.SMALL, 300, 300),
    'char': (common.CHAR, 6, 100),
    'gpt2': (GPT2, 2, 50),
    'small-modern': ([*common.SMALL, *MODERN], 300, 300),
    'char-modern': ([*common.CHAR, *MODERN], 6, 100),
}


def steady(times):
    """Leave out a turn's first steps."""
    return times[max(1, round(warmup * len(times))) :]


def fastest(times):
    """Return the upper end of the fastest tenth."""
    return sorted(times)[len(times) // 10]


def write_random_tokens(folder):
    """Write a dataset of GPT-2's ids without meta; return the flag that names it."""
    os.makedirs(folder)
    random = np.random.default_rng(0)
    for split, n in (('train', 2**20), ('val', 2**14)):
        random.integers(50257, size=n, dtype=np.uint16).tofile(f'{folder}/{split}.bin')
    return f'--dataset={folder}'


def commands(case, folder):
    """Return train.py's command and nanoGPT's for a case."""
    arguments = [*CASES[case][0], *extra.split()]
    if case == 'gpt2':
        arguments.append(write_random_tokens(f'{folder}/tokens'))
    ours = common.train_command([*common.classic(arguments), '--eval_first=False',
                                 f'--out_dir={folder}/ours'], auto=True)
    theirs = [a for a in arguments if not a.startswith('--preset=')]
    # nanoGPT always evaluates before the first step; one batch is enough here
    theirs = common.train_command([*theirs, '--eval_iters=1', f'--out_dir={folder}/peer'], on_gpu)
    return ours, theirs


def measure(case, folder):
    """Take turns; return the figures of one case."""
    ours, theirs = commands(case, folder)
    n = steps or CASES[case][2 if on_gpu else 1]
    step, turns = None, {'ours': [], 'bare': [], 'peer': []}
    for turn in range(rounds):
        print(f'{case}: round {turn + 1} of {rounds}', file=sys.stderr)
        common.wait_for_quiet(wait)
        turns['ours'].append(common.step_times(ours, n))
        if step is None:
            with open(f'{folder}/ours/config.json', encoding='utf-8') as f:
                s = json.load(f)  # with 'auto' resolved
            ids = load_meta(os.path.join('data', s['dataset']))['vocab_size']
            s['vocab_size'] = padded_vocab_size(ids or 50257)  # GPT-2's without a meta.json
            torch.compiler.reset()  # torch limits the compilations of a function
            step = bare.Step(s)
            step()  # compiles
        turns['bare'].append([bare.milliseconds(step) for _ in range(n)])
        if peer:
            turns['peer'].append(common.step_times(theirs, n, cwd=peer))
    step = None  # frees its memory for the next process
    if on_gpu:
        torch.cuda.empty_cache()
    inside = bare.in_own_process(s)

    def ratio(a, b):
        return [x / y for x, y in zip(medians[a], medians[b], strict=True)]

    turns = {name: [steady(times) for times in of] for name, of in turns.items() if of}
    medians = {name: [statistics.median(times) for times in of] for name, of in turns.items()}
    fast = {name: fastest([ms for times in of for ms in times]) for name, of in turns.items()}
    ms = statistics.median(medians['ours'])
    floor_ms = inside['step_flops'] / inside['product_gflops'] / 1e6
    figures = {
        **{key: s[key] for key in ('device', 'dtype', 'compile', 'preset', 'optimizer')},
        'steps_per_turn': n, 'parameters': inside['parameters'],
        'tokens_per_step': inside['tokens_per_step'], 'ours_ms': common.spread(medians['ours']),
        'bare_ms': common.spread(medians['bare']),
        'overhead': common.spread([share - 1 for share in ratio('ours', 'bare')], 4),
        'overhead_fast': round(fast['ours'] / fast['bare'] - 1, 4),
        'tokens_per_s': round(1e3 * inside['tokens_per_step'] / ms),
        'floor_ms': round(floor_ms, 3), 'share_of_floor': round(floor_ms / ms, 3),
        'mfu': inside['mfu'] and round(inside['mfu'] * inside['ms']['median'] / ms, 4),
        'bare': inside}
    if peer:
        figures |= {'peer_ms': common.spread(medians['peer']),
                    'speedup': common.spread(ratio('peer', 'ours')),
                    'speedup_fast': round(fast['peer'] / fast['ours'], 3)}
    return figures


def rows_of(case, f):
    """Return the rows of a case."""
    inside, split = f['bare'], f['bare']['parts_ms']
    total = sum(split.values())
    size, compiled = f'{f["parameters"] / 1e6:.2f}M', 'compiled' if f['compile'] else 'not compiled'
    rows = [[case, f'{size} parameters, preset {f["preset"]}, {f["optimizer"]}'],
            ['on', f'{f["device"]}, {f["dtype"]}, {compiled}'],
            ['tokens a step', f'{f["tokens_per_step"]:,}'],
            ['train.py, ms a step', common.show(f['ours_ms'])],
            ['train.py, tokens/s', f'{f["tokens_per_s"]:,}'],
            ['bare step, ms', common.show(f['bare_ms'])],
            ['train.py slower by (bar: 3%)', common.show(f['overhead'], form='{:.1%}')],
            ['  by the fastest tenth of steps', f'{f["overhead_fast"]:.1%}']]
    if peer:
        rows += [['nanoGPT, ms a step', common.show(f['peer_ms'])],
                 ['times as fast as nanoGPT', common.show(f['speedup'], form='{:.2f}')],
                 ['  by the fastest tenth of steps', f'{f["speedup_fast"]:.2f}']]
    if f['mfu'] is not None:
        rows.append(['MFU', f'{f["mfu"]:.1%}'])
    rows += [['linear layers alone, GFLOP/s', f'{inside["product_gflops"]:,.0f}'],
             ['all FLOPs at that speed, ms', f'{f["floor_ms"]:,.1f}'],
             ['that floor / our step', f'{f["share_of_floor"]:.0%}']]
    rows += [[f'bare step: {part}', f'{ms:,.2f} ms, {ms / total:.1%}']
             for part, ms in split.items()]
    rows += [[f'  forward + backward: {part}', f'{share:.0%}']
             for part, share in inside['forward_backward_shares'].items()]
    if inside['peak_memory_mb']:
        rows.append(['bare step: peak memory', f'{inside["peak_memory_mb"]:,} MB'])
    return rows


# check the settings
os.chdir(common.ROOT)  # datasets are found from there
for case in cases.split(','):
    if case not in CASES:
        raise UserError(f'cases={cases!r}: {case!r} is none of {", ".join(CASES)}')
if steps == 1:
    raise UserError('steps=1: expected 2 or more, because the first is left out; or 0 for the '
                    "case's own number")
if peer:
    common.check_peer(peer, '' if cases == 'gpt2' else 'shakespeare_char')

# measure and report
figures = {}
for case in cases.split(','):
    with tempfile.TemporaryDirectory() as folder:
        figures[case] = measure(case, folder)
print(common.heading('train_step'))
for case, f in figures.items():
    print(common.table(rows_of(case, f)) + '\n')
common.finish('train_step', rounds, **figures)
