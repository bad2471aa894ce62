"""
Attention on the CPU, and what keeping freed memory is worth there: why model.py and train.py do what they do.

    $ python bench/attention.py                       # 5 minutes
    $ python bench/attention.py --n=5 --kept=False    # a quick look at the attention alone

Forward and backward of causal attention in bf16: torch's scaled_dot_product_attention against
CausalSelfAttention.attend_in_blocks compiled as train.py compiles it, without dropout and with 0.2, in turns. Then
a step of config/train_shakespeare_char.py's model (10.65M parameters, dropout 0.2) forward and backward, with and
without parallel.keep_freed_memory, each in processes of their own, alternating. Prints tables, then a JSON line.
"""

import os
import statistics
import sys
import time

import torch
from torch.nn import functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # Python looks only beside the script

import parallel
from bench import common
from configurator import override
from model import GPT, CausalSelfAttention, GPTConfig

# settings ------------------------------------------------------------------------------------------------------------
shapes = '12x4x64x32,64x6x256x64,16x6x256x64,4x12x1024x64'  # batch x heads x length x channels of a head
dropouts = '0.0,0.2'
n = 20  # calls of each, alternating
kept = True  # also measure the effect of keeping freed memory
processes = 3  # of each kind, for that
steps = 5  # timed steps in each such process, with 64x256 tokens each
wait = 0  # seconds to wait before each measurement, at most, until other processes leave the machine alone
only = ''  # internal, for those processes: 'keep' or 'return'
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

COMPILE = {'dynamic': False, 'options': {'fallback_random': True}}  # train.py's


def milliseconds(f):
    t0 = time.perf_counter()
    f()
    return 1e3 * (time.perf_counter() - t0)


def attention(shape, p):
    """-> (ms of torch's, ms of attend_in_blocks), spreads over n calls forward and backward."""
    B, H, T, D = shape
    module = CausalSelfAttention(GPTConfig(block_size=T, n_head=H, n_embd=H * D, dropout=p)).train()
    in_blocks = torch.compile(module.attend_in_blocks, **COMPILE)
    # as they come from the projection: (B, T, 3, H, D) seen as three of (B, H, T, D)
    qkv = torch.randn(B, T, 3, H, D, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(B, H, T, D, dtype=torch.bfloat16)

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)

    def step(f):
        return lambda: torch.autograd.grad(f(*qkv.permute(2, 0, 3, 1, 4)), qkv, dy)

    both = [step(sdpa), step(in_blocks)]
    for f in both:
        f(), f()
    times = [[milliseconds(f) for f in both] for _ in range(n)]
    return [common.spread(column) for column in zip(*times, strict=True)]


def one_step_process():
    """Print the median ms of forward and backward of the 10.65M model, with memory kept or returned as `only` says."""
    if only == 'keep':
        parallel.keep_freed_memory()
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, 65, 6, 6, 384, dropout=0.2, bias=False))
    for block in model.transformer.h:
        block.compile(**COMPILE)
    x, y = torch.randint(65, (2, 64, 256))

    def step():
        with torch.autocast('cpu', torch.bfloat16):
            loss = model(x, y)[1]
        loss.backward()
        model.zero_grad(set_to_none=True)

    step(), step()
    print(statistics.median(milliseconds(step) for _ in range(steps)))


if only:
    one_step_process()
    raise SystemExit

rows, figures = [['B x H x T x D', 'dropout', 'torch, ms', 'blocks, ms', 'ratio']], []
for text in shapes.split(','):
    for p in map(float, dropouts.split(',')):
        print(f'{text}, dropout {p}', file=sys.stderr)
        common.wait_for_quiet(wait)
        theirs, ours = attention(tuple(map(int, text.split('x'))), p)
        ratio = theirs['median'] / ours['median']
        rows.append([text, p, common.show(theirs, form='{:.1f}'), common.show(ours, form='{:.1f}'), f'{ratio:.2f}'])
        figures.append({'shape': text, 'dropout': p, 'sdpa_ms': theirs, 'blocks_ms': ours, 'ratio': round(ratio, 2)})
memory = {'return': [], 'keep': []}
for i in range(processes if kept else 0):
    for kind, times in memory.items():
        print(f'memory {kind}: {i + 1} of {processes}', file=sys.stderr)
        common.wait_for_quiet(wait)
        times.append(float(common.run([sys.executable, __file__, f'--only={kind}', f'--steps={steps}']).split()[-1]))
memory = {kind: common.spread(times) for kind, times in memory.items() if times}

print(common.heading('attention'))
print(common.table(rows))
if kept:
    rows = [['64x256 tokens forward and backward, 10.65M', 'ms'],
            ['freed memory goes back to the kernel', common.show(memory['return'])],
            ['it is kept (parallel.keep_freed_memory)', common.show(memory['keep'])]]
    print('\n' + common.table(rows))
common.finish('attention', n, attention=figures, step_ms_memory=memory)
