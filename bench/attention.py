"""
Measure attention by torch's kernels and ours, and the effect of freed memory.

    $ python -m bench.attention                       # 5 minutes on two CPU cores
    $ python -m bench.attention --n=5 --kept=False    # a quick look at the attention alone

On a GPU: forward and backward of causal attention in bf16 at the shape of GPT-2
124M, by each kernel of scaled_dot_product_attention and by compiled
FlexAttention; also with a sliding window. '-' marks a kernel that this GPU or
torch lacks. FLOPs count the keys that a query sees.

On the CPU: forward and backward of causal attention in bf16, without dropout
and with 0.2, in turns: scaled_dot_product_attention, ops.attention compiled as
in train.py, and ops.attention eager. Then a step of the 10.65M model (dropout
0.2) with and without runtime.keep_freed_memory, in processes that alternate.
Prints tables, then a JSON line.
"""

import statistics
import sys
from functools import partial

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import ops
from bench import bare, common
from configurator import Count, NonNegative, override
from flatgpt import runtime
from model import GPT, GPTConfig

# Settings -----------------------------------------------------------------------------------------
# batch x heads x length x channels of a head; 'auto': 12x4x64x32,16x4x80x48,64x6x256x64,
# 16x6x256x64,4x12x1024x64, on a GPU 16x12x1024x64
shapes = 'auto'
windows = '0,256'  # GPU: positions that a query sees; 0: all before it
dropouts = '0.0,0.2'  # CPU
n: Count = 20  # measurements of each
kept = True  # also measure the effect of keeping freed memory
processes: Count = 3  # of each kind, for that
steps: Count = 5  # timed steps in each such process, with 64x256 tokens each
wait: NonNegative = 0  # most seconds to wait for a quiet machine before each measurement
only = ''  # internal, for those processes: 'keep' or 'return'
config = override(globals())
# --------------------------------------------------------------------------------------------------

COMPILE = {'dynamic': False, 'options': {'fallback_random': True}}  # as train.py, on the CPU


def inputs(shape, device):
    """Return q, k, v as projected, (B, T, 3, H, D), and dy, (B, H, T, D)."""
    B, H, T, D = shape
    qkv = torch.randn(B, T, 3, H, D, device=device, dtype=torch.bfloat16, requires_grad=True)
    return qkv, torch.randn(B, H, T, D, device=device, dtype=torch.bfloat16)


def attention_on_cpu(shape, p):
    """Return the ms of torch's attention, ours compiled, ours eager, as spreads."""
    qkv, dy = inputs(shape, 'cpu')
    ours = partial(ops.attention, dropout=p)
    torch_s = partial(F.scaled_dot_product_attention, is_causal=True, dropout_p=p)

    def step(f):
        return lambda: torch.autograd.grad(f(*qkv.permute(2, 0, 3, 1, 4)), qkv, dy)

    ways = [step(torch_s), step(torch.compile(ours, **COMPILE)), step(ours)]
    for f in ways:
        f(), f()
    times = [[bare.milliseconds(f) for f in ways] for _ in range(n)]
    return [common.spread(column) for column in zip(*times, strict=True)]


def kernels(T, window, device):
    """Return {name: causal attention of (q, k, v)} on a GPU."""
    def with_backend(backend, mask=None):
        def attend(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask,
                                                      is_causal=mask is None)
        return attend

    def is_visible(b, h, query, key):
        return ops.visible(query, key, window)

    block_mask = create_block_mask(is_visible, None, None, T, T, device=device)
    flex = torch.compile(flex_attention, dynamic=False)
    positions = torch.arange(T, device=device)
    mask = ops.visible(positions[:, None], positions, window) if window else None
    backends = {'flash': SDPBackend.FLASH_ATTENTION, 'cudnn': SDPBackend.CUDNN_ATTENTION,
                'efficient': SDPBackend.EFFICIENT_ATTENTION, 'math': SDPBackend.MATH}
    return {'flex': partial(flex, block_mask=block_mask),
            **{name: with_backend(backend, mask) for name, backend in backends.items()}}


def attention_on_gpu(shape, window, device):
    """Return {kernel: (spread of ms, TFLOP/s)}, None for a kernel that fails."""
    B, H, T, D = shape
    qkv, dy = inputs(shape, device)
    seen = sum(min(t + 1, window or T) for t in range(T))  # pairs of a query and a key
    flops = 12 * B * H * D * seen  # two products forward, four backward, 2 FLOPs each
    results = {}
    for name, attend in kernels(T, window, device).items():
        def calls(attend=attend):
            for _ in range(10):  # per synchronization, which costs time
                torch.autograd.grad(attend(*qkv.permute(2, 0, 3, 1, 4)), qkv, dy)
            bare.synchronize(device)

        try:
            calls()  # compiles
        except Exception as error:  # each kernel refuses a GPU, a shape or a mask in its own way
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f'{name}: {reason}', file=sys.stderr)
            results[name] = None
            continue
        ms = common.spread([bare.milliseconds(calls) / 10 for _ in range(n)])
        results[name] = ms, round(flops / ms['median'] / 1e9, 1)
    return results


def shape_of(text):
    return tuple(map(int, text.split('x')))


def gpu_tables(device):
    """Print a table for each shape; return the figures."""
    figures = []
    for text in (shapes if shapes != 'auto' else '16x12x1024x64').split(','):
        rows = [[f'{text}, bf16', 'window', 'ms', 'TFLOP/s']]
        for window in map(int, windows.split(',')):
            print(f'{text}, window {window}', file=sys.stderr)
            for name, result in attention_on_gpu(shape_of(text), window, device).items():
                ms, tflops = result or (None, None)
                rows.append([name, window or 'all', common.show(ms, form='{:.3f}') if ms else '-',
                             tflops or '-'])
                figures.append({'shape': text, 'window': window, 'kernel': name, 'ms': ms,
                                'tflops': tflops})
        print(common.table(rows) + '\n')
    return figures


def one_step_process():
    """Print the median ms of a step of the 10.65M model, with memory kept or returned."""
    if only == 'keep':
        runtime.keep_freed_memory()
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
    print(statistics.median(bare.milliseconds(step) for _ in range(steps)))


def cpu_tables():
    """Measure and print everything on the CPU; return the figures."""
    # attention
    texts = ('12x4x64x32,16x4x80x48,64x6x256x64,16x6x256x64,4x12x1024x64' if shapes == 'auto'
             else shapes)
    rows = [['BxHxTxD', 'dropout', 'torch, ms', 'compiled, ms', 'faster', 'eager, ms', 'faster']]
    figures = []
    for text in texts.split(','):
        for p in map(float, dropouts.split(',')):
            print(f'{text}, dropout {p}', file=sys.stderr)
            common.wait_for_quiet(wait)
            sdpa, *ours = attention_on_cpu(shape_of(text), p)
            ratios = [sdpa['median'] / times['median'] for times in ours]
            row = [text, p, common.show(sdpa)]
            for times, ratio in zip(ours, ratios, strict=True):
                row += [common.show(times), f'{ratio:.2f}x']
            rows.append(row)
            figures.append({'shape': text, 'dropout': p, 'sdpa_ms': sdpa, 'compiled_ms': ours[0],
                            'eager_ms': ours[1], 'compiled_ratio': round(ratios[0], 2),
                            'eager_ratio': round(ratios[1], 2)})

    # freed memory
    memory = {'return': [], 'keep': []}
    for i in range(processes if kept else 0):
        for kind, times in memory.items():
            print(f'memory {kind}: {i + 1} of {processes}', file=sys.stderr)
            common.wait_for_quiet(wait)
            printed = common.run([sys.executable, '-m', 'bench.attention', f'--only={kind}',
                                  f'--steps={steps}'])
            times.append(float(printed.split()[-1]))
    memory = {kind: common.spread(times) for kind, times in memory.items() if times}

    # report
    print(common.heading('attention'))
    print(common.table(rows))
    if kept:
        print('\n' + common.table([
            ['64x256 tokens forward and backward, 10.65M', 'ms'],
            ['freed memory goes back to the kernel', common.show(memory['return'])],
            ['it is kept (runtime.keep_freed_memory)', common.show(memory['keep'])]]))
    return {'attention': figures, 'step_ms_memory': memory}


if __name__ == '__main__':
    device = runtime.choose_device('auto')
    if only:
        one_step_process()
    elif device.type == 'cuda':
        print(common.heading('attention'))
        common.finish('attention', n, attention=gpu_tables(device))
    else:
        common.finish('attention', n, **cpu_tables())
