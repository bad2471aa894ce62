"""
Where a transformer's FLOPs and memory go, part by part, and how long a step must take.

    $ python -m lab.flops                                        # 25 seconds
    $ python -m lab.flops --size=175B --batch_size=1 --measure=False
    $ python -m lab.flops --preset=llama --n_layer=32 --n_head=32 --n_kv_head=8 --n_embd=4096 --block_size=8192

Counts what a token costs in the projections of attention, in its scores (each position with all others), in the MLP and
in the head, forward and backward, and what each part holds in memory; and has torch count the same. As models grow from
GPT-2 to GPT-3, the MLP takes most (40% of the FLOPs in 124M, 66% in 175B) and the head nothing; as the context grows,
scores take all (95% in 124M at 128k tokens). Then how long a step must take on a few GPUs, and whether it fits; and the
same prediction for a small model on one core of this CPU, made of measured products and memory bandwidth, beside the
step itself: 0.92 to 0.99 of it on an AMD EPYC, in eight measurements.

Source: the sizes are those of "Language Models are Unsupervised Multitask Learners" (GPT-2, Radford et al. 2019) and
"Language Models are Few-Shot Learners" (GPT-3, Brown et al. 2020, table 2.1); counting what is kept for the backward
pass, of "Reducing Activation Recomputation in Large Transformer Models" (Korthikanti et al. 2022). Needs '.[lab]'.
"""

import sys
import time

import torch
from torch.nn import functional as F

from bench import bare
from bench.common import table
from config.presets import PRESETS
from configurator import explain_errors, override
from flatgpt.flops import PEAK_FLOPS
from lab import common, costs
from model import GPTConfig

# settings ------------------------------------------------------------------------------------------------------------
seed = 1337
out = 'out-lab'  # folder of the pictures and the numbers
size = '124M'  # of GPT-2: 124M, 350M, 774M, 1.5B; of GPT-3: 2.7B, 6.7B, 13B, 175B
preset = 'gpt2'  # or llama, modern: the architecture
n_layer: int | None = None  # these, where given, instead of the size's
n_head: int | None = None
n_kv_head: int | None = None
n_embd: int | None = None
mlp: str | None = None
vocab_size = 50304
block_size = 1024  # context, tokens
batch_size = 8  # sequences of a step
optimizer = 'adamw'  # or muon
utilisation = 0.4  # share of its peak that a device is assumed to reach over a step; 0.3 to 0.5 are usual
measure = True  # calibrate this machine, predict a step of a small model, and take it
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

SIZES = {'124M': (12, 12, 768), '350M': (24, 16, 1024), '774M': (36, 20, 1280), '1.5B': (48, 25, 1600),
         '2.7B': (32, 32, 2560), '6.7B': (32, 32, 4096), '13B': (40, 40, 5120),  # printed as 5140: 40 heads of 128
         '175B': (96, 96, 12288)}  # layers, heads, channels
# of the datasheets: memory in bytes, and what can be read of it a second
DEVICES = {'RTX 4090': (24e9, 1.01e12), 'A100': (80e9, 2.04e12), 'H100': (80e9, 3.35e12), 'H200': (141e9, 4.8e12)}
CONTEXTS = [2**i for i in range(7, 18)]
CHECKED = {'n_layer': 4, 'n_head': 6, 'n_embd': 384, 'block_size': 256, 'vocab_size': 4096, 'batch_size': 4}


# a step on a device ---------------------------------------------------------------------------------------------------


def step_time(config, tokens, peak, bytes_per_s):
    """-> seconds of a step: products at `utilisation` of the peak FLOP/s, then AdamW reads and writes its tensors."""
    products = 3 * sum(costs.flops(config, config.block_size).values()) * tokens
    return products / (utilisation * peak) + costs.adamw(config) / bytes_per_s


def fastest(f, least=5, seconds=0.1):
    """
    -> seconds of CPU time that f() takes, the least of several. On one thread and with nobody else there that is its
    time; what other processes do meanwhile counts little, unlike on a clock.
    """
    times = []
    while len(times) < least or sum(times) < seconds:
        start = time.process_time()
        f()
        times.append(time.process_time() - start)
    return min(times)


def bandwidth(n=2**23):
    """-> bytes a second of c = a + b, arrays of n numbers in fp32: 96 MB, as a step's tensors are seldom in a cache."""
    a, b, c = torch.ones(3, n)
    return 12 * n / fastest(lambda: torch.add(a, b, out=c))


def product_time(rows, n_in, n_out):
    """-> seconds of a linear layer's three products, forward and backward."""
    x, w, dy = (torch.randn(shape, requires_grad=True) for shape in ((rows, n_in), (n_out, n_in), (rows, n_out)))
    return fastest(lambda: torch.autograd.grad(F.linear(x, w), (x, w), dy))


def attention_time(config, B, T):
    """-> seconds of a layer's attention kernel, forward and backward."""
    q, dy = torch.randn(2, B, config.n_head, T, config.head_size)
    k, v = torch.randn(2, B, config.kv_heads, T, config.head_size)
    for x in (q, k, v):
        x.requires_grad_()

    def attend():
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=config.kv_heads < config.n_head)
        torch.autograd.grad(y, (q, k, v), dy)

    return fastest(attend)


def check_step(rounds=4):
    """
    -> {part: seconds} predicted of a step of AdamW in fp32 on one core of this CPU, the seconds it takes, its FLOP/s.
    Predicted from what products of its shapes, the attention kernel and a sum of two arrays take by themselves. All are
    measured in turns, and the fastest of each counts.
    """
    step = bare.Step(bare.settings('gpt2', device='cpu', dtype='float32', compile=False, seed=seed, **CHECKED))
    torch.set_num_threads(1)
    config, tokens, B, T = step.model.config, step.tokens, CHECKED['batch_size'], CHECKED['block_size']
    layers = [(m.in_features, m.out_features) for m in step.model.modules() if isinstance(m, torch.nn.Linear)]
    step(), step()  # the second meets the state of the optimizer as the others do
    alone, steps = [], []
    for i in range(rounds):
        print(f'round {i + 1} of {rounds}', flush=True)
        alone.append({**{shape: product_time(tokens, *shape) for shape in set(layers)},
                      'attention': attention_time(config, B, T), 'byte': 1 / bandwidth()})
        steps.append(fastest(step, least=3))
    best = {name: min(times[name] for times in alone) for name in alone[0]}
    parts = {'products': sum(best[shape] for shape in layers), 'attention': config.n_layer * best['attention'],
             'element-wise': costs.element_wise(config) * tokens * best['byte'],
             'AdamW': costs.adamw(config) * best['byte']}
    return parts, min(steps), 3 * sum(costs.flops(config, T).values()) * tokens / min(steps)


# tables ---------------------------------------------------------------------------------------------------------------


def config_of(name, **changes):
    """GPTConfig of a size under the chosen architecture."""
    layers, heads, channels = SIZES[name]
    return GPTConfig(**{**PRESETS[preset], 'n_layer': layers, 'n_head': heads, 'n_embd': channels,
                        'vocab_size': vocab_size, 'block_size': block_size, **changes})


def shares(config, T):
    """-> {part: percent of the FLOPs}"""
    f = costs.flops(config, T)
    return {part: 100 * f[part] / sum(f.values()) for part in f}


def short(n, digits=3):
    """124439808 -> '124M'"""
    exponent = max(0, (len(f'{n:.0f}') - 1) // 3)
    n /= 1000**exponent
    return f'{n:.{max(digits, len(f"{n:.0f}"))}g}{["", "k", "M", "G", "T", "P"][exponent]}'


def thousands(T):
    """2048 -> '2k'"""
    return f'{T // 1024}k' if T >= 1024 else str(T)


def print_parts(config):
    """Parameters and FLOPs of the chosen model part by part, and what torch counts; -> its figures."""
    T, f, n = config.block_size, costs.flops(config, config.block_size), costs.parameters(config)
    rows = [['', 'parameters', 'share', 'forward', 'a layer', 'backward', 'share']]
    for part in n:
        forward = f.get(part, 0)
        rows.append([part, f'{n[part]:,}', f'{n[part] / sum(n.values()):.1%}', short(forward),
                     short(forward / config.n_layer) if part in costs.PARTS[:3] else '-', short(2 * forward),
                     f'{forward / sum(f.values()):.1%}'])
    total = sum(f.values())
    rows.append(['all', f'{sum(n.values()):,}', '', short(total), '', short(2 * total), ''])
    print(f'\n{preset}, {config.n_layer} layers, {config.n_head} heads, {config.n_embd} channels;\n'
          f'FLOPs of a token in a context of {T:,}\n\n{table(rows)}')
    counted = dict(zip(('forward', 'backward'), costs.counted(config, 1, T), strict=True))
    print(f"\ntorch's counter beside these: forward {counted['forward'] / total / T - 1:+.2%}, backward "
          f'{counted["backward"] / 2 / total / T - 1:+.2%}')
    return {'parameters': n, 'forward_flops_of_a_token': f, 'counted': counted}


def print_sizes():
    """FLOPs and memory of the published sizes."""
    rows = [['', 'FLOPs', 'attention', 'MLP', 'head', 'weights', 'AdamW', 'Muon', 'kept', 'KV cache']]
    for name in SIZES:
        config = config_of(name)
        share, n = shares(config, block_size), costs.memory(config, 1, block_size)
        rows.append([name, short(3 * sum(costs.flops(config, block_size).values())),
                     f'{share["projections"] + share["scores"]:.0f}%', f'{share["MLP"]:.0f}%', f'{share["head"]:.0f}%',
                     *map(short, (n['weights'] + n['gradients'], n['moments'],
                                  costs.memory(config, 1, block_size, 'muon')['moments'], n['activations'],
                                  costs.kv_cache(config, 1, block_size)))])
    print(f'\nsizes of GPT-2 and GPT-3 as {preset} with a context of {block_size:,}: FLOPs to train on\na token; bytes '
          'of the weights with their gradients, of the optimizer, of what a\nsequence keeps for the backward pass, and '
          f'of its KV cache\n\n{table(rows)}')


def print_devices(config):
    """How long a step of the chosen model takes where, and whether it fits; -> figures."""
    tokens = batch_size * config.block_size
    need, one = (costs.memory(config, B, config.block_size, optimizer) for B in (batch_size, 1))
    fixed = sum(need.values()) - need['activations']
    rows, figures = [['', 'memory', 'fits', 'at most', 'AdamW step', 'tokens a second']], {}
    for name, (room, bytes_per_s) in DEVICES.items():
        seconds = figures[name] = step_time(config, tokens, PEAK_FLOPS[name], bytes_per_s)
        rows.append([name, f'{short(room)}B', 'yes' if sum(need.values()) <= room else 'no',
                     f'{max(0, room - fixed) // one["activations"]:,.0f} sequences', f'{1e3 * seconds:,.0f} ms',
                     f'{tokens / seconds:,.0f}'])
    print(f'\nthe same trained by {optimizer} on {batch_size} sequences a step, in bf16 by autocast:\n'
          + ', '.join(f'{part} {short(value)}B' for part, value in need.items())
          + f',\ntogether {short(sum(need.values()))}B; products at {utilisation:.0%} of the peak\n\n{table(rows)}')
    return {'memory': need, 'step_seconds': figures}


# pictures -------------------------------------------------------------------------------------------------------------


def draw_shares(plt, by_size, by_context):
    """Who does the arithmetic, as the model grows and as the context grows: {column: {part: percent}}."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.8), sharey=True)
    colors = (common.ORANGE, common.RED, common.BLUE, common.PURPLE)
    for ax, columns in ((left, by_size), (right, by_context)):
        heights = [[shares[part] for shares in columns.values()] for part in costs.PARTS]
        ax.stackplot(range(len(columns)), heights, colors=colors, alpha=0.8)
        ax.set_xticks(range(len(columns)), columns)
        ax.margins(0)
        ax.grid(False)
        bottom = [0] * len(columns)
        for name, row in zip(('attention projections', 'attention scores', 'MLP', 'head'), heights, strict=True):
            widest = max(range(2, len(row) - 2), key=lambda k, row=row: row[k])  # where there is room for its name
            ax.text(widest, bottom[widest] + row[widest] / 2, name, ha='center', va='center')
            bottom = [b + h for b, h in zip(bottom, row, strict=True)]
    left.set(title=f'Larger models: the MLP grows (context {block_size:,})', xlabel='parameters of GPT-2 and GPT-3',
             ylabel='share of the FLOPs, %')
    right.set(title='Longer contexts: the scores of attention grow', xlabel='context, tokens')
    common.save(figure, out, 'flops')


def draw_memory(plt):
    """What training needs, part by part, and what generating needs beside the weights."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.8))
    needs = [costs.memory(config_of(name), batch_size, block_size, optimizer) for name in SIZES]
    bottom = [0] * len(SIZES)
    for part, color in zip(needs[0], (common.BLUE, common.SKY, common.ORANGE, common.RED), strict=True):
        heights = [100 * need[part] / sum(need.values()) for need in needs]
        left.bar(range(len(SIZES)), heights, bottom=bottom, color=color, alpha=0.8)
        left.text(len(SIZES) - 0.5, bottom[-1] + heights[-1] / 2, part, va='center')
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    for i, need in enumerate(needs):
        left.text(i, 101, f'{short(sum(need.values()), 2)}B', ha='center', fontsize=8)
    left.set_xlim(-0.6, len(SIZES) + 1.4)
    left.set_xticks(range(len(SIZES)), SIZES, fontsize=8)
    left.grid(False)
    left.set(title=f'Training on {batch_size} x {block_size:,} tokens', xlabel='parameters of GPT-2 and GPT-3',
             ylabel='share of the memory, %', ylim=(0, 108))
    for name, color in zip(('124M', '1.5B', '13B', '175B'), common.COLORS, strict=False):
        gigabytes = [costs.kv_cache(config_of(name), 1, T) / 1e9 for T in CONTEXTS]
        right.plot(CONTEXTS, gigabytes, color=color)
        right.annotate(name, (CONTEXTS[-1], gigabytes[-1]), (4, -3), textcoords='offset points', color=color)
    right.axhline(80, color='0.5', linestyle='--')
    right.text(CONTEXTS[0], 90, 'all the memory of an H100', color='0.4')
    right.set_xscale('log', base=2)
    right.set_xticks(CONTEXTS[::2], [thousands(T) for T in CONTEXTS[::2]])
    right.margins(x=0.1)
    right.set(yscale='log', title='KV cache of one sequence, in bf16', xlabel='context, tokens', ylabel='GB')
    common.save(figure, out, 'flops_memory')


def check_settings():
    """SystemExit for a setting that can't be."""
    for name, choices in (('size', SIZES), ('preset', PRESETS), ('optimizer', ('adamw', 'muon'))):
        if config[name] not in choices:
            raise SystemExit(f'--{name}={config[name]}: expected one of {", ".join(choices)}')
    if batch_size < 1:
        raise SystemExit(f'--batch_size={batch_size}: expected 1 or more')
    if not 0 < utilisation <= 1:
        raise SystemExit(f'--utilisation={utilisation}: expected a share, above 0 and at most 1')


def main():
    check_settings()
    common.start(out, seed)
    plt = common.pyplot()
    changes = {name: config[name] for name in ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'mlp')}
    chosen = config_of(size, **{name: value for name, value in changes.items() if value is not None})
    figures = {**print_parts(chosen), **print_devices(chosen),
               'shares_by_size': {name: shares(config_of(name), block_size) for name in SIZES},
               'shares_by_context': {thousands(T): shares(chosen, T) for T in CONTEXTS}}
    print_sizes()
    draw_shares(plt, figures['shares_by_size'], figures['shares_by_context'])
    draw_memory(plt)
    if measure:
        print('\na step of {n_layer} layers, {n_embd} channels, {batch_size} x {block_size} tokens, in fp32 on one '
              'core of this CPU:'.format(**CHECKED))
        parts, measured, speed = check_step()
        predicted = sum(parts.values())
        rows = [['', 'ms'], *([part, f'{1e3 * seconds:.1f}'] for part, seconds in parts.items()),
                ['predicted', f'{1e3 * predicted:.1f}'], ['measured', f'{1e3 * measured:.1f}']]
        here = 3 * sum(costs.flops(chosen, block_size).values()) * batch_size * block_size / speed
        print(f'\n{table(rows)}\n\npredicted / measured: {predicted / measured:.2f}\nat these {short(speed)}FLOP/s a '
              f'step of the chosen model would take {here:,.0f} s')
        figures['step'] = {'parts': parts, 'predicted': predicted, 'measured': measured, 'flops_per_s': speed}
    common.record(out, 'flops', **figures)


if __name__ == '__main__':
    sys.excepthook = explain_errors
    main()
