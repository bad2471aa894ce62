"""
Measure a training step as depth, width, context and batch grow.

    $ python -m bench.scaling                                    # 3 minutes on two CPU cores
    $ python -m bench.scaling --axes=context --contexts=256,512,1024,2048
    $ python -m bench.scaling --axes=width --preset=gpt2 --compile=False

Each axis varies around a base: on a CPU 4 layers, 128 channels, a context of 64
and 12 sequences; on a GPU 12, 768, 1024, 16. Each size is the bare step
(bare.py), compiled as in train.py, in a new process. 'of products' compares the
speed of the step with that of the model's linear layers alone. Below each table
is the exponent p of the best fit time = a size^p, and that of the FLOPs. A
smaller p than theirs means that larger sizes use the processor better. Prints a
table for each axis, then a JSON line.
"""

import sys
from functools import cache
from typing import Literal

from bench import bare, common
from configurator import Natural, Positive, UserError, override
from flatgpt import runtime

# Settings -----------------------------------------------------------------------------------------
axes = 'depth,width,context,batch'
depths = 'auto'  # layers: 2,4,8,16; on a GPU 3,6,12,24
widths = 'auto'  # channels, in heads of 32: 64,128,256,512; on a GPU of 64: 384,768,1536,3072
contexts = 'auto'  # tokens: 32,64,128,256; on a GPU 512,1024,2048,4096
batches = 'auto'  # sequences: 3,6,12,24,48; on a GPU 4,8,16,32
base = 'auto'  # layers x width x context x sequences: 4x128x64x12; on a GPU 12x768x1024x16
vocab_size: Natural = 0  # 0: 65, characters; on a GPU 50304, GPT-2's
preset: Literal['gpt2', 'llama', 'modern'] = 'modern'
device = 'auto'
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
compile: bool | Literal['auto'] = 'auto'
seconds: Positive = 1.0  # of timed steps at each size
config = override(globals())
# --------------------------------------------------------------------------------------------------

NAMES = {'depth': 'n_layer', 'width': 'n_embd', 'context': 'block_size', 'batch': 'batch_size'}
DEFAULTS = {'depths': ('2,4,8,16', '3,6,12,24'), 'widths': ('64,128,256,512', '384,768,1536,3072'),
            'contexts': ('32,64,128,256', '512,1024,2048,4096'),
            'batches': ('3,6,12,24,48', '4,8,16,32')}  # on a CPU, on a GPU


def numbers(name, text, separator=','):
    """Turn '2,4,8' into [2, 4, 8]. Raises UserError unless all are whole and above 0."""
    parts = text.split(separator)
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f'{name}={text!r}: expected whole numbers above 0 with {separator!r} '
                        f'between them, or auto')
    return [int(part) for part in parts]


@cache  # each axis has the base
def measure(n_layer, n_embd, block_size, batch_size):
    """Return the figures of a size, or None if memory runs out."""
    s = bare.settings(preset, device, dtype, compile, vocab_size=vocab_size, n_layer=n_layer,
                      n_embd=n_embd, n_head=n_embd // head_size, block_size=block_size,
                      batch_size=batch_size)
    return bare.in_own_process(s, seconds=seconds, product_seconds=0.2)


def sweep(axis):
    """Return [(size, figures)] along an axis, until memory runs out."""
    results = []
    for size in sizes[axis]:
        print(f'{axis} {size}', file=sys.stderr)
        figures = measure(**{**middle, NAMES[axis]: size})
        if figures is None:
            print(f'{axis} {size}: out of memory', file=sys.stderr)
            break
        results.append((size, figures))
    return results


# resolve the settings
device = str(runtime.choose_device(device))
on_gpu = device.startswith('cuda')
head_size = 64 if on_gpu else 32
vocab_size = vocab_size or (50304 if on_gpu else 65)
base = ('12x768x1024x16' if on_gpu else '4x128x64x12') if base == 'auto' else base
middle = dict(zip(NAMES.values(), numbers('base', base, 'x'), strict=False))
if base.count('x') != 3:
    raise UserError(f'base={base!r}: expected layers x width x context x sequences, such as '
                    f'4x128x64x12')
sizes = {axis: numbers(name, both[on_gpu] if config[name] == 'auto' else config[name])
         for axis, (name, both) in zip(NAMES, DEFAULTS.items(), strict=True)}
for axis in axes.split(','):
    if axis not in NAMES:
        raise UserError(f'axes={axes!r}: {axis!r} is none of {", ".join(NAMES)}')
for width in {middle['n_embd'], *sizes['width']}:
    if width % head_size:
        raise UserError(f'a width of {width} is not a whole number of heads of {head_size} '
                        f'channels')

# measure and report
swept = {axis: sweep(axis) for axis in axes.split(',')}
print(common.heading('scaling'))
print(f'{preset}, base {base} (layers x width x context x sequences), {vocab_size} ids, {device}\n')
figures = {}
for axis, results in swept.items():
    rows = [[axis, 'ms a step', 'tokens/s', 'GFLOP/s', 'of products', 'MFU', 'MB']]
    for size, f in results:
        rows.append([size, f'{f["ms"]["median"]:,.1f}', f'{f["tokens_per_s"]:,}',
                     f'{f["gflops"]:,.0f}', f'{f["share_of_products"]:.0%}',
                     '-' if f['mfu'] is None else f'{f["mfu"]:.0%}',
                     f'{f["peak_memory_mb"]:,}' if f['peak_memory_mb'] else '-'])
    print(common.table(rows))
    measured = [size for size, _ in results]
    figures[axis] = {'sizes': measured, 'steps': [f for _, f in results]}
    if len(results) > 1:
        time = bare.exponent(measured, [f['ms']['median'] for _, f in results])
        flops = bare.exponent(measured, [f['step_flops'] for _, f in results])
        print(f'time grows with the power {time:.2f} of it, FLOPs with {flops:.2f}')
        figures[axis].update(exponent=round(time, 3), flops_exponent=round(flops, 3))
    print()
common.finish('scaling', 1, preset=preset, base=base, vocab_size=vocab_size, device=device,
              axes=figures)
