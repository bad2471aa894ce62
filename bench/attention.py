"""
Attention: on the CPU torch's and ours, and what keeping freed memory is worth there; on a GPU torch's kernels.

    $ python -m bench.attention                       # 5 minutes on two CPU cores
    $ python -m bench.attention --n=5 --kept=False    # a quick look at the attention alone

On a GPU: forward and backward of causal attention in bf16 at the shape of GPT-2 124M, by each of the kernels behind
torch's scaled_dot_product_attention and by FlexAttention, compiled; with a sliding window by FlexAttention, and by
scaled_dot_product_attention with that mask written out. A kernel that this GPU or torch lacks is '-'. FLOPs count the
keys that a query sees.

On the CPU: forward and backward of causal attention in bf16: torch's scaled_dot_product_attention against
CausalSelfAttention.attend_in_blocks compiled as train.py compiles it and .attend, which is what runs uncompiled,
without dropout and with 0.2, in turns. Then a step of the 10.65M model (dropout 0.2) forward and backward, with and
without parallel.keep_freed_memory, each in processes of their own, alternating. Prints tables, then a JSON line.
"""

import statistics
import sys

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench import bare, common
from configurator import override
from flatgpt import runtime
from model import GPT, CausalSelfAttention, GPTConfig
from ops import window_mask

# settings ------------------------------------------------------------------------------------------------------------
# batch x heads x length x channels of a head; 'auto': 12x4x64x32,16x4x80x48,64x6x256x64,16x6x256x64,4x12x1024x64, on
# a GPU 16x12x1024x64
shapes = 'auto'
windows = '0,256'  # GPU: positions that a query sees; 0: all before it
dropouts = '0.0,0.2'  # CPU
n = 20  # measurements of each; on the CPU in turns
kept = True  # also measure the effect of keeping freed memory
processes = 3  # of each kind, for that
steps = 5  # timed steps in each such process, with 64x256 tokens each
wait = 0  # seconds to wait before each measurement, at most, until other processes leave the machine alone
only = ''  # internal, for those processes: 'keep' or 'return'
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

def inputs(shape, device):
    """-> q, k and v of (B, H, T, D) side by side, as they come from the projection, and the gradient of the result."""
    B, H, T, D = shape
    qkv = torch.randn(B, T, 3, H, D, device=device, dtype=torch.bfloat16, requires_grad=True)
    return qkv, torch.randn(B, H, T, D, device=device, dtype=torch.bfloat16)


def attention(shape, p):
    """-> (ms of torch's, of attend_in_blocks, of attend), spreads over n calls forward and backward."""
    B, H, T, D = shape
    module = CausalSelfAttention(GPTConfig(block_size=T, n_head=H, n_embd=H * D, dropout=p)).train()
    in_blocks = torch.compile(module.attend_in_blocks, **bare.COMPILE)
    qkv, dy = inputs(shape, 'cpu')

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)

    def step(f):
        return lambda: torch.autograd.grad(f(*qkv.permute(2, 0, 3, 1, 4)), qkv, dy)

    ways = [step(sdpa), step(in_blocks), step(module.attend)]
    for f in ways:
        f(), f()
    times = [[bare.milliseconds(f) for f in ways] for _ in range(n)]
    return [common.spread(column) for column in zip(*times, strict=True)]


def kernels(T, window, device):
    """-> {name: causal attention of (q, k, v)} on a GPU."""
    def with_backend(backend, mask=None):
        def attend(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return attend

    is_visible = window_mask(window or T)
    block_mask = create_block_mask(is_visible, None, None, T, T, device=device)
    flex = torch.compile(flex_attention, dynamic=False)
    named = {'flex': lambda q, k, v: flex(q, k, v, block_mask=block_mask)}
    positions = torch.arange(T, device=device)
    mask = is_visible(None, None, positions[:, None], positions) if window else None
    for name, backend in (('flash', SDPBackend.FLASH_ATTENTION), ('cudnn', SDPBackend.CUDNN_ATTENTION),
                          ('efficient', SDPBackend.EFFICIENT_ATTENTION), ('math', SDPBackend.MATH)):
        named[name] = with_backend(backend, mask)
    return named


def attention_on_gpu(shape, window, device):
    """-> {kernel: (spread of ms forward and backward over n calls, TFLOP/s), or None where it refuses}."""
    B, H, T, D = shape
    qkv, dy = inputs(shape, device)
    seen = sum(min(t + 1, window or T) for t in range(T))  # pairs of a query and a key
    flops = 12 * B * H * D * seen  # two products forward, twice as many backward, 2 FLOPs each
    results = {}
    for name, attend in kernels(T, window, device).items():
        def calls(attend=attend):
            for _ in range(10):  # between two waits, or launching would be what is measured
                torch.autograd.grad(attend(*qkv.permute(2, 0, 3, 1, 4)), qkv, dy)
            bare.synchronize(device)

        try:
            calls()  # compiles
        except Exception as error:  # each says in its own way that it is not for this GPU, this shape or a mask
            print(f'{name}: {(str(error).splitlines() or [type(error).__name__])[0]}', file=sys.stderr)
            results[name] = None
            continue
        ms = common.spread([bare.milliseconds(calls) / 10 for _ in range(n)])
        results[name] = ms, round(flops / ms['median'] / 1e9, 1)
    return results


def gpu_tables(device):
    """Print a table for each shape; -> the figures."""
    figures = []
    for text in (shapes if shapes != 'auto' else '16x12x1024x64').split(','):
        shape, rows = tuple(map(int, text.split('x'))), [[f'{text}, bf16', 'window', 'ms', 'TFLOP/s']]
        for window in map(int, windows.split(',')):
            print(f'{text}, window {window}', file=sys.stderr)
            for name, result in attention_on_gpu(shape, window, device).items():
                ms, tflops = result or (None, None)
                rows.append([name, window or 'all', common.show(ms, form='{:.3f}') if ms else '-', tflops or '-'])
                figures.append({'shape': text, 'window': window, 'kernel': name, 'ms': ms, 'tflops': tflops})
        print(common.table(rows) + '\n')
    return figures


def one_step_process():
    """Print the median ms of forward and backward of the 10.65M model, with memory kept or returned as `only` says."""
    if only == 'keep':
        runtime.keep_freed_memory()
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, 65, 6, 6, 384, dropout=0.2, bias=False))
    for block in model.transformer.h:
        block.compile(**bare.COMPILE)
    x, y = torch.randint(65, (2, 64, 256))

    def step():
        with torch.autocast('cpu', torch.bfloat16):
            loss = model(x, y)[1]
        loss.backward()
        model.zero_grad(set_to_none=True)

    step(), step()
    print(statistics.median(bare.milliseconds(step) for _ in range(steps)))


if only:
    one_step_process()
    raise SystemExit

device = runtime.choose_device('auto')
if device.type == 'cuda':
    print(common.heading('attention'))
    common.finish('attention', n, attention=gpu_tables(device))
    raise SystemExit

shapes = '12x4x64x32,16x4x80x48,64x6x256x64,16x6x256x64,4x12x1024x64' if shapes == 'auto' else shapes
rows, figures = [['BxHxTxD', 'dropout', 'torch, ms', 'blocks, ms', 'faster', 'attend, ms', 'faster']], []
for text in shapes.split(','):
    for p in map(float, dropouts.split(',')):
        print(f'{text}, dropout {p}', file=sys.stderr)
        common.wait_for_quiet(wait)
        theirs, *ours = attention(tuple(map(int, text.split('x'))), p)
        ratios = [theirs['median'] / of['median'] for of in ours]
        rows.append([text, p, common.show(theirs, form='{:.1f}')])
        for of, ratio in zip(ours, ratios, strict=True):
            rows[-1] += [common.show(of, form='{:.1f}'), f'{ratio:.2f}x']
        figures.append({'shape': text, 'dropout': p, 'sdpa_ms': theirs, 'blocks_ms': ours[0], 'attend_ms': ours[1],
                        'blocks_ratio': round(ratios[0], 2), 'attend_ratio': round(ratios[1], 2)})
memory = {'return': [], 'keep': []}
for i in range(processes if kept else 0):
    for kind, times in memory.items():
        print(f'memory {kind}: {i + 1} of {processes}', file=sys.stderr)
        common.wait_for_quiet(wait)
        times.append(float(common.run([sys.executable, '-m', 'bench.attention', f'--only={kind}', f'--steps={steps}']).split()[-1]))
memory = {kind: common.spread(times) for kind, times in memory.items() if times}

print(common.heading('attention'))
print(common.table(rows))
if kept:
    rows = [['64x256 tokens forward and backward, 10.65M', 'ms'],
            ['freed memory goes back to the kernel', common.show(memory['return'])],
            ['it is kept (parallel.keep_freed_memory)', common.show(memory['keep'])]]
    print('\n' + common.table(rows))
common.finish('attention', n, attention=figures, step_ms_memory=memory)
