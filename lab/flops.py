"""
Count a transformer's FLOPs and memory by part, and predict a step's time.

    $ python -m lab.flops                                        # 25 seconds
    $ python -m lab.flops --size=175B --batch_size=1 --measure=False
    $ python -m lab.flops --gpu=A100 --utilisation=0.5 --price=4 --measure=False
    $ python -m lab.flops --preset=llama --n_layer=32 --n_head=32 --n_kv_head=8 --n_embd=4096 \\
        --block_size=8192

Counts the FLOPs of a token in the projections of attention, the attention scores, the MLP and the
head, and the memory of each part. torch's own counter checks the result. From GPT-2 to GPT-3 the
MLP takes over (40% of the FLOPs in 124M, 66% in 175B) and the head vanishes. In long contexts the
scores take over (95% in 124M at 128k tokens).

The same formulas give the costs of published models, from GPT-2 to Llama 3: their parameters to the
printed digits, their PF-days, the utilisation that the published GPU hours imply, and the GPU days
and dollars at a price of yours.

Then it predicts the time of a step on four GPUs, and whether the step fits into their memory. The
same prediction for a small model on one core of this CPU, from measured speeds of products and of
memory, is compared with the step itself: 0.92 to 0.99 of it on an AMD EPYC, in eight measurements.

Source: the papers that lab/published.py lists; activations after "Reducing Activation
Recomputation in Large Transformer Models" (Korthikanti et al. 2022). Needs '.[lab]'.
"""

import math
import time
from typing import Literal

import torch
from torch.nn import functional as F

from bench import bare
from bench.common import table
from configurator import Count, Positive, Seed, Share, override
from flatgpt import costs
from flatgpt.flops import GPUS
from lab import common
from lab.published import PF_DAY, PUBLISHED

# Settings -----------------------------------------------------------------------------------------
seed: Seed = 1337
out = 'out-lab'  # folder of the pictures and the numbers
size: Literal['124M', '350M', '774M', '1.5B', '2.7B', '6.7B', '13B', '175B'] = '124M'
preset: Literal['gpt2', 'llama', 'modern'] = 'gpt2'  # the architecture
n_layer: Count | None = None  # these five replace the values of `size` and `preset`
n_head: Count | None = None
n_kv_head: Count | None = None
n_embd: Count | None = None
mlp: Literal['gelu', 'gelu_erf', 'swiglu', 'relu2'] | None = None
vocab_size: Count = 50304
block_size: Count = 1024  # context, tokens
batch_size: Count = 8  # sequences per step
optimizer: Literal['adamw', 'muon'] = 'adamw'
utilisation: Share = 0.4  # assumed share of a device's peak FLOP/s; 0.3 to 0.5 are usual
gpu: Literal['V100', 'A100', 'H100', 'H200', 'B200'] = 'H100'  # to train the published models on
price: Positive = 2.0  # of an hour of that GPU, dollars
measure = True  # predict a step of a small model on this machine, and take it
config = override(globals())
# --------------------------------------------------------------------------------------------------

SIZES = {name.split()[1]: PUBLISHED[name].config for name in (
    'GPT-2 124M', 'GPT-3 350M', 'GPT-2 774M', 'GPT-2 1.5B', 'GPT-3 2.7B', 'GPT-3 6.7B',
    'GPT-3 13B', 'GPT-3 175B')}
DEVICES = ('RTX 4090', 'A100', 'H100', 'H200')
CONTEXTS = [2**i for i in range(7, 18)]
CHECKED = {'n_layer': 4, 'n_head': 6, 'n_embd': 384, 'block_size': 256, 'vocab_size': 4096,
           'batch_size': 4}


# A step on a device -------------------------------------------------------------------------------


def step_flops(config, tokens):
    """Return the FLOPs of a training step on so many tokens."""
    return 3 * sum(costs.flops(config, config.block_size).values()) * tokens


def step_time(config, tokens, peak, bytes_per_s):
    """Return the seconds of a step: products at `utilisation`, then AdamW's memory."""
    return (step_flops(config, tokens) / (utilisation * peak)
            + costs.adamw(config) / bytes_per_s)


def fastest(f, least=5, seconds=0.1):
    """Return the least CPU time of several calls; other processes affect it little."""
    times = []
    while len(times) < least or sum(times) < seconds:
        start = time.process_time()
        f()
        times.append(time.process_time() - start)
    return min(times)


def bandwidth(n=2**23):
    """Return the bytes per second of c = a + b, arrays of 32 MB, beyond the caches."""
    a, b, c = torch.ones(3, n)
    return 12 * n / fastest(lambda: torch.add(a, b, out=c))


def product_time(rows, n_in, n_out):
    """Return the seconds of a linear layer's three products, forward and backward."""
    shapes = ((rows, n_in), (n_out, n_in), (rows, n_out))
    x, w, dy = (torch.randn(shape, requires_grad=True) for shape in shapes)
    return fastest(lambda: torch.autograd.grad(F.linear(x, w), (x, w), dy))


def attention_time(config, B, T):
    """Return the seconds of one layer's attention kernel, forward and backward."""
    q, dy = torch.randn(2, B, config.n_head, T, config.head_size)
    k, v = torch.randn(2, B, config.kv_heads, T, config.head_size)
    for x in (q, k, v):
        x.requires_grad_()

    def attend():
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                           enable_gqa=config.kv_heads < config.n_head)
        torch.autograd.grad(y, (q, k, v), dy)

    return fastest(attend)


def check_step(rounds=4):
    """Predict and measure a step of AdamW in fp32 on one core of this CPU.

    Returns {part: predicted seconds}, the measured seconds, and the FLOP/s. The prediction adds up
    the times of the step's products, of the attention kernel and of memory traffic, each measured
    alone. All take turns, and the fastest of each counts.
    """
    step = bare.Step(bare.settings('gpt2', device='cpu', dtype='float32', compile=False, seed=seed,
                                   **CHECKED))
    torch.set_num_threads(1)
    config, tokens = step.model.config, step.tokens
    B, T = CHECKED['batch_size'], CHECKED['block_size']
    layers = [(m.in_features, m.out_features) for m in step.model.modules()
              if isinstance(m, torch.nn.Linear)]
    step(), step()  # the second has the optimizer's state, as the later ones have
    alone, steps = [], []
    for i in range(rounds):
        print(f'round {i + 1} of {rounds}', flush=True)
        alone.append({**{shape: product_time(tokens, *shape) for shape in set(layers)},
                      'attention': attention_time(config, B, T), 'byte': 1 / bandwidth()})
        steps.append(fastest(step, least=3))
    best = {name: min(times[name] for times in alone) for name in alone[0]}
    parts = {'products': sum(best[shape] for shape in layers),
             'attention': config.n_layer * best['attention'],
             'element-wise': costs.element_wise(config) * tokens * best['byte'],
             'AdamW': costs.adamw(config) * best['byte']}
    return parts, min(steps), step_flops(config, tokens) / min(steps)


# Tables -------------------------------------------------------------------------------------------


def config_of(name, **changes):
    """Return the GPTConfig of a size with the architecture of the settings."""
    shape = SIZES[name]
    return common.gpt_config(preset, **{
        'n_layer': shape.n_layer, 'n_head': shape.n_head, 'n_embd': shape.n_embd,
        'vocab_size': vocab_size, 'block_size': block_size, **changes})


def shares(config, T):
    """Return {part: percent of the FLOPs}."""
    f = costs.flops(config, T)
    return {part: 100 * f[part] / sum(f.values()) for part in f}


def short(n, digits=3):
    """Format 124439808 as '124M'."""
    exponent = max(0, (len(f'{n:.0f}') - 1) // 3)
    n /= 1000**exponent
    return f'{n:.{max(digits, len(f"{n:.0f}"))}g}{["", "k", "M", "G", "T", "P"][exponent]}'


def thousands(T):
    """Format 2048 as '2k'."""
    return f'{T // 1024}k' if T >= 1024 else str(T)


def print_parts(config):
    """Print the model's parameters and FLOPs, and torch's count; return figures."""
    T, f, n = config.block_size, costs.flops(config, config.block_size), costs.parameters(config)
    total, n_total = sum(f.values()), sum(n.values())
    rows = [['', 'parameters', 'share', 'forward', 'a layer', 'backward', 'share']]
    for part in n:
        forward = f.get(part, 0)
        per_layer = short(forward / config.n_layer) if part in costs.PARTS[:3] else '-'
        rows.append([part, f'{n[part]:,}', f'{n[part] / n_total:.1%}', short(forward), per_layer,
                     short(2 * forward), f'{forward / total:.1%}'])
    rows.append(['all', f'{n_total:,}', '', short(total), '', short(2 * total), ''])
    print(f'\n{preset}, {config.n_layer} layers, {config.n_head} heads, {config.n_embd} channels;\n'
          f'FLOPs of a token in a context of {T:,}\n\n{table(rows)}')
    forward, backward = costs.counted(config, 1, T)
    print(f"\nby torch's counter: forward {forward / total / T - 1:+.2%}, "
          f'backward {backward / 2 / total / T - 1:+.2%}')
    return {'parameters': n, 'forward_flops_of_a_token': f,
            'counted': {'forward': forward, 'backward': backward}}


def print_sizes():
    """Print FLOPs and memory of the published sizes."""
    rows = [['', 'FLOPs', 'attention', 'MLP', 'head', 'weights', 'AdamW', 'Muon', 'kept',
             'KV cache']]
    for name in SIZES:
        config = config_of(name)
        share, n = shares(config, block_size), costs.memory(config, 1, block_size)
        in_bytes = (n['weights'] + n['gradients'], n['moments'],
                    costs.memory(config, 1, block_size, 'muon')['moments'], n['activations'],
                    costs.kv_cache(config, 1, block_size))
        rows.append([name, short(step_flops(config, 1)),
                     f'{share["projections"] + share["scores"]:.0f}%', f'{share["MLP"]:.0f}%',
                     f'{share["head"]:.0f}%', *map(short, in_bytes)])
    print(f'\nsizes of GPT-2 and GPT-3 as {preset} with a context of {block_size:,}: training\n'
          f'FLOPs per token; bytes of the weights with their gradients, of the moments, of\n'
          f'the activations kept for a sequence, and of its KV cache\n\n{table(rows)}')


def print_devices(config):
    """Print a step's time on each device, and whether it fits; return figures."""
    tokens = batch_size * config.block_size
    need = costs.memory(config, batch_size, config.block_size, optimizer)
    per_sequence = costs.memory(config, 1, config.block_size, optimizer)['activations']
    total = sum(need.values())
    fixed = total - need['activations']
    rows, figures = [['', 'memory', 'fits', 'at most', 'AdamW step', 'tokens a second']], {}
    for name in DEVICES:
        gpu, room = GPUS[name], GPUS[name].memory
        seconds = figures[name] = step_time(config, tokens, gpu.flops, gpu.bandwidth)
        rows.append([name, f'{short(room)}B', 'yes' if total <= room else 'no',
                     f'{max(0, room - fixed) // per_sequence:,.0f} sequences',
                     f'{1e3 * seconds:,.0f} ms', f'{tokens / seconds:,.0f}'])
    parts = ', '.join(f'{part} {short(value)}B' for part, value in need.items())
    print(f'\nthe same trained by {optimizer} on {batch_size} sequences a step, in bf16 by '
          f'autocast:\n{parts},\ntogether {short(total)}B; products at {utilisation:.0%} of the '
          f'peak\n\n{table(rows)}')
    return {'memory': need, 'step_seconds': figures}


def print_step(chosen):
    """Print the predicted and the measured step on this CPU; return the figures."""
    print('\na step of {n_layer} layers, {n_embd} channels, {batch_size} x {block_size} tokens, in '
          'fp32 on one core of this CPU:'.format(**CHECKED))
    parts, measured, speed = check_step()
    predicted = sum(parts.values())
    rows = [['', 'ms'], *([part, f'{1e3 * seconds:.1f}'] for part, seconds in parts.items()),
            ['predicted', f'{1e3 * predicted:.1f}'], ['measured', f'{1e3 * measured:.1f}']]
    seconds = step_flops(chosen, batch_size * block_size) / speed
    print(f'\n{table(rows)}\n\npredicted / measured: {predicted / measured:.2f}\nat these '
          f'{short(speed)}FLOP/s a step of the chosen model would take {seconds:,.0f} s')
    return {'parts': parts, 'predicted': predicted, 'measured': measured, 'flops_per_s': speed}


# Published models ---------------------------------------------------------------------------------


def as_printed(n, printed):
    """Format 174604259328 as '174.6B', with the digits and the unit of `printed`."""
    digits = len(printed[:-1].partition('.')[2])
    return f'{n / {"M": 1e6, "B": 1e9}[printed[-1]]:.{digits}f}{printed[-1]}'


def cost(model):
    """Return the costs of a Published model's training, computed and published.

    gpu_days and dollars are those on `gpu` at `utilisation` and `price`. mfu is the utilisation
    that the published GPU hours imply.
    """
    n_flops = step_flops(model.config, model.tokens)
    n = sum(costs.parameters(model.config).values())
    seconds = n_flops / (utilisation * GPUS[gpu].flops)
    mfu = None
    if model.gpu_hours:
        mfu = n_flops / (3600 * model.gpu_hours * GPUS[model.gpu].flops)
    return {'pf_days': n_flops / PF_DAY, 'pf_days_by_6ND': 6 * n * model.tokens / PF_DAY,
            'published_pf_days': model.pf_days, 'mfu': mfu, 'gpu_days': seconds / 86400,
            'dollars': price * seconds / 3600}


def print_published():
    """Print shapes and training of the published models; return their parameters."""
    rows = [['', 'layers', 'width', 'heads', 'batch', 'rate', 'tokens', 'parameters', 'printed']]
    parameters = {}
    for name, model in PUBLISHED.items():
        n = parameters[name] = sum(costs.parameters(model.config).values())
        mark = ' ' if as_printed(n, model.parameters) == model.parameters else '*'
        rate = f'{1e4 * model.learning_rate:g}e-4' if model.learning_rate else '-'
        tokens = short(model.tokens).replace('G', 'B') if model.tokens else '-'
        rows.append([name, model.config.n_layer, model.config.n_embd, model.config.n_head,
                     f'{model.batch / 1e6:g}M', rate, tokens, f'{n / 1e6:,.0f}M',
                     model.parameters + mark])
    print(f'\npublished models: tokens of a step, highest learning rate, tokens in all,\n'
          f'parameters computed from the shapes and as the papers print them\n\n{table(rows)}\n\n'
          "* GPT-2's paper miscounts; its repository corrects this. Chinchilla has 5.4B\n"
          '  more, for relative positions. 65.2B and 405B are cut off, 70B is rounded up.\n\n'
          "GPT-3's table 2.1 prints 24 heads of 128 for a width of 2048, and a width of\n"
          '5140 for 40 heads of 128. 16 heads and 5120 give the parameters of table D.1.')
    return parameters


def print_costs():
    """Print what training the published models takes; return figures."""
    rows, figures = [['', 'PF-days', '6ND', 'printed', 'GPU days', 'MFU', f'{gpu} days', '$']], {}
    for name, model in PUBLISHED.items():
        if model.tokens is None:
            continue
        c = figures[name] = cost(model)
        days, mfu = '-', '-'
        if model.gpu_hours:
            days, mfu = f'{rounded(model.gpu_hours / 24)} {model.gpu}', f'{c["mfu"]:.0%}'
        rows.append([name, rounded(c['pf_days']), rounded(c['pf_days_by_6ND']),
                     rounded(model.pf_days) if model.pf_days else '-', days, mfu,
                     rounded(c['gpu_days']), short(c['dollars'])])
    print(f'\ncosts of their training: PF-days (1e15 FLOP/s for a day) by the products, by\n'
          f'6 x parameters x tokens, and as printed; published GPU days, and the MFU that\n'
          f'they imply; {gpu} days at {utilisation:.0%} of its peak, and dollars at '
          f'${price:.2f} an hour\n\n{table(rows)}')
    return figures


def rounded(value):
    """Format 3636.9 as '3,640', 2.6 as '2.60': three digits."""
    return f'{float(f"{value:.3g}"):,.{max(0, 2 - math.floor(math.log10(value)))}f}'


# Pictures -----------------------------------------------------------------------------------------


def draw_shares(plt, by_size, by_context):
    """Draw shares of the FLOPs, {column: {part: percent}}, by size and context."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.8), sharey=True)
    colors = (common.ORANGE, common.RED, common.BLUE, common.PURPLE)
    names = ('attention projections', 'attention scores', 'MLP', 'head')
    for ax, columns in ((left, by_size), (right, by_context)):
        heights = [[column[part] for column in columns.values()] for part in costs.PARTS]
        ax.stackplot(range(len(columns)), heights, colors=colors, alpha=0.8)
        ax.set_xticks(range(len(columns)), columns)
        ax.margins(0)
        ax.grid(False)
        bottom = [0] * len(columns)
        for name, row in zip(names, heights, strict=True):
            widest = max(range(2, len(row) - 2), key=row.__getitem__)  # has room for the name
            ax.text(widest, bottom[widest] + row[widest] / 2, name, ha='center', va='center')
            bottom = [b + h for b, h in zip(bottom, row, strict=True)]
    left.set(title=f'Larger models: the MLP grows (context {block_size:,})',
             xlabel='parameters of GPT-2 and GPT-3', ylabel='share of the FLOPs, %')
    right.set(title='Longer contexts: the scores of attention grow', xlabel='context, tokens')
    common.save(figure, out, 'flops')


def draw_memory(plt):
    """Draw the memory of training by part, and the KV cache against the context."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.8))
    needs = [costs.memory(config_of(name), batch_size, block_size, optimizer) for name in SIZES]
    bottom = [0] * len(SIZES)
    colors = (common.BLUE, common.SKY, common.ORANGE, common.RED)
    for part, color in zip(needs[0], colors, strict=True):
        heights = [100 * need[part] / sum(need.values()) for need in needs]
        left.bar(range(len(SIZES)), heights, bottom=bottom, color=color, alpha=0.8)
        left.text(len(SIZES) - 0.5, bottom[-1] + heights[-1] / 2, part, va='center')
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    for i, need in enumerate(needs):
        left.text(i, 101, f'{short(sum(need.values()), 2)}B', ha='center', fontsize=8)
    left.set_xlim(-0.6, len(SIZES) + 1.4)
    left.set_xticks(range(len(SIZES)), SIZES, fontsize=8)
    left.grid(False)
    left.set(title=f'Training on {batch_size} x {block_size:,} tokens', ylim=(0, 108),
             xlabel='parameters of GPT-2 and GPT-3', ylabel='share of the memory, %')
    for name, color in zip(('124M', '1.5B', '13B', '175B'), common.COLORS, strict=False):
        gigabytes = [costs.kv_cache(config_of(name), 1, T) / 1e9 for T in CONTEXTS]
        right.plot(CONTEXTS, gigabytes, color=color)
        right.annotate(name, (CONTEXTS[-1], gigabytes[-1]), (4, -3), textcoords='offset points',
                       color=color)
    right.axhline(80, color='0.5', linestyle='--')
    right.text(CONTEXTS[0], 90, 'all the memory of an H100', color='0.4')
    right.set_xscale('log', base=2)
    right.set_xticks(CONTEXTS[::2], [thousands(T) for T in CONTEXTS[::2]])
    right.margins(x=0.1)
    right.set(yscale='log', title='KV cache of one sequence, in bf16', xlabel='context, tokens',
              ylabel='GB')
    common.save(figure, out, 'flops_memory')


def main():
    common.start(out)
    plt = common.pyplot()
    changes = {name: config[name] for name in ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'mlp')}
    chosen = config_of(size, **{key: value for key, value in changes.items() if value is not None})
    figures = {**print_parts(chosen), **print_devices(chosen),
               'shares_by_size': {name: shares(config_of(name), block_size) for name in SIZES},
               'shares_by_context': {thousands(T): shares(chosen, T) for T in CONTEXTS}}
    print_sizes()
    figures['published_parameters'], figures['published_costs'] = print_published(), print_costs()
    draw_shares(plt, figures['shares_by_size'], figures['shares_by_context'])
    draw_memory(plt)
    if measure:
        figures['step'] = print_step(chosen)
    common.record(out, 'flops', **figures)


if __name__ == '__main__':
    main()
