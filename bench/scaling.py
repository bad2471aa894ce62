"""
What a training step costs as the model gets deeper and wider, the context longer, the batch larger.

    $ python -m bench.scaling                                    # 3 minutes on two CPU cores
    $ python -m bench.scaling --axes=context --contexts=256,512,1024,2048
    $ python -m bench.scaling --axes=width --preset=gpt2 --compile=False

Each axis is swept around a base with the others fixed: on a CPU 4 layers, 128 wide, 64 tokens of context, 12 sequences;
on a GPU 12, 768, 1024, 16. A size is the bare step (bare.py), compiled as train.py would, in a process of its own.
'of products' is the speed of the whole step as a share of that of the model's linear layers alone, at that size. Below
each table stands the exponent p of the power law time = a size^p that fits best, next to that of the step's FLOPs:
below it, growing costs less than the arithmetic says, because the processor is used better. Prints a table for each
axis, then a JSON line.
"""

import sys
from functools import cache

from bench import bare, common
from config.presets import PRESETS
from configurator import override
from flatgpt import runtime

# settings ------------------------------------------------------------------------------------------------------------
axes = 'depth,width,context,batch'  # which
depths = 'auto'  # layers: 2,4,8,16; on a GPU 3,6,12,24
widths = 'auto'  # channels, in heads of 32: 64,128,256,512; on a GPU in heads of 64: 384,768,1536,3072
contexts = 'auto'  # tokens: 32,64,128,256; on a GPU 512,1024,2048,4096
batches = 'auto'  # sequences: 3,6,12,24,48; on a GPU 4,8,16,32
base = 'auto'  # layers x width x context x sequences: 4x128x64x12; on a GPU 12x768x1024x16
vocab_size = 0  # 0: 65, characters; on a GPU 50304, GPT-2's
preset = 'modern'
device = 'auto'
dtype = 'auto'
compile: bool | str = 'auto'
seconds = 1.0  # of steps that are timed, at each size
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

NAMES = {'depth': 'n_layer', 'width': 'n_embd', 'context': 'block_size', 'batch': 'batch_size'}


def numbers(name, text, separator=','):
    """'2,4,8' -> [2, 4, 8]; SystemExit for what are no numbers above 0."""
    parts = text.split(separator)
    if not all(part.isdecimal() and int(part) for part in parts):
        raise SystemExit(f'{name}={text!r}: expected whole numbers above 0 with {separator!r} between them, or auto')
    return [int(part) for part in parts]


@cache  # the base is on every axis
def measure(n_layer, n_embd, block_size, batch_size):
    """-> figures of a size, or None if it finds no memory."""
    s = bare.settings(preset, device, dtype, compile, vocab_size=vocab_size, n_layer=n_layer, n_embd=n_embd,
                      n_head=n_embd // head_size, block_size=block_size, batch_size=batch_size)
    return bare.in_own_process(s, seconds=seconds, product_seconds=0.2)


def sweep(axis):
    """-> [(size, figures)] along an axis; a size that finds no memory ends it."""
    results = []
    for size in sizes[axis]:
        print(f'{axis} {size}', file=sys.stderr)
        figures = measure(**{**middle, NAMES[axis]: size})
        if figures is None:
            print(f'{axis} {size}: out of memory', file=sys.stderr)
            break
        results.append((size, figures))
    return results


try:
    device = str(runtime.choose_device(device))
except ValueError as error:
    raise SystemExit(str(error)) from None
on_gpu = device.startswith('cuda')
head_size = 64 if on_gpu else 32
vocab_size = vocab_size or (50304 if on_gpu else 65)
base = ('12x768x1024x16' if on_gpu else '4x128x64x12') if base == 'auto' else base
middle = dict(zip(NAMES.values(), numbers('base', base, 'x'), strict=False))
if len(middle) != 4 or base.count('x') != 3:
    raise SystemExit(f'base={base!r}: expected layers x width x context x sequences, such as 4x128x64x12')
defaults = {'depth': ('2,4,8,16', '3,6,12,24'), 'width': ('64,128,256,512', '384,768,1536,3072'),
            'context': ('32,64,128,256', '512,1024,2048,4096'), 'batch': ('3,6,12,24,48', '4,8,16,32')}
sizes = {axis: numbers(name, defaults[axis][on_gpu] if config[name] == 'auto' else config[name])
         for axis, name in (('depth', 'depths'), ('width', 'widths'), ('context', 'contexts'), ('batch', 'batches'))}
for axis in axes.split(','):
    if axis not in NAMES:
        raise SystemExit(f'axes={axes!r}: {axis!r} is none of {", ".join(NAMES)}')
if preset not in PRESETS:
    raise SystemExit(f'preset={preset!r}: expected {" or ".join(map(repr, PRESETS))}')
for width in {middle['n_embd'], *sizes['width']}:
    if width % head_size:
        raise SystemExit(f'a width of {width} is not a whole number of heads of {head_size} channels')

swept = {axis: sweep(axis) for axis in axes.split(',')}
print(common.heading('scaling'))
print(f'{preset}, base {base} (layers x width x context x sequences), {vocab_size} ids, {device}\n')
figures = {}
for axis, results in swept.items():
    rows = [[axis, 'ms a step', 'tokens/s', 'GFLOP/s', 'of products', 'MFU', 'MB']]
    for size, f in results:
        rows.append([size, f'{f["ms"]["median"]:,.1f}', f'{f["tokens_per_s"]:,}', f'{f["gflops"]:,.0f}',
                     f'{f["share_of_products"]:.0%}', '-' if f['mfu'] is None else f'{f["mfu"]:.0%}',
                     f'{f["peak_memory_mb"]:,}' if f['peak_memory_mb'] else '-'])
    print(common.table(rows))
    figures[axis] = {'sizes': [size for size, _ in results], 'steps': [f for _, f in results]}
    if len(results) > 1:
        time, flops = (bare.exponent(figures[axis]['sizes'], costs) for costs in (
            [f['ms']['median'] for _, f in results], [f['step_flops'] for _, f in results]))
        print(f'time grows with the power {time:.2f} of it, FLOPs with {flops:.2f}')
        figures[axis].update(exponent=round(time, 3), flops_exponent=round(flops, 3))
    print()
common.finish('scaling', 1, preset=preset, base=base, vocab_size=vocab_size, device=device, axes=figures)
