"""
Predict the memory and the time of a training step, without taking it.

    setup = Setup(GPTConfig(), batch_size=12, micro_steps=5, n_processes=8)
    need(setup)                                         # {'weights': bytes, ...} of a GPU
    seconds_of_step(setup, machine_named('8xH200'))     # {'products': seconds, ...}

Memory is fullest where the loss is computed, in the backward pass of a block, or in the update.
bench/plan.py compares the prediction with measurements; the figures are in bench/results. Units are
bytes and seconds.
"""

import math
import os
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

import ops
from configurator import UserError
from flatgpt import costs, huggingface, memory, pretrained, runtime
from flatgpt.cut import Stages, cut_step
from flatgpt.entries import glance
from flatgpt.flops import GPU, GPUS, Machine, gpu_named, machine_named
from flatgpt.muon import BATCH, QUINTICS
from model import GPTConfig, padded_vocab_size

# what the libraries take beside tensors: Python and torch; on a GPU CUDA's kernels, cuBLAS and NCCL
LIBRARIES = {'cpu': 0.5e9, 'cuda': 1.2e9}
# shares of a datasheet's peaks that a step reaches (bench/lowering.py has their source)
PRODUCTS, BANDWIDTH, LINK = 0.7, 0.85, 0.7
MOVED = 3  # times that a byte kept for the backward pass is read or written (bench/lowering.py)


@dataclass(frozen=True)
class Setup:
    """Describe a training step on one device."""

    model: GPTConfig
    batch_size: int  # sequences of a micro-batch
    micro_steps: int = 1  # micro-batches of a step, in this process
    n_processes: int = 1
    n_shards: int = 1  # processes that divide weights, gradients and moments among them
    how: costs.How = costs.How()
    optimizer: str = 'adamw'
    recompute: bool = False
    lora: tuple | None = None  # (rank, ends of layer names, bits of frozen weights)
    stages: Stages = Stages()  # of the batch; the step is one of the last

    @property
    def tokens(self):
        """Return the tokens of a micro-batch."""
        return self.batch_size * self.model.block_size

    @property
    def matrices(self):
        """Return the numbers in the matrices of a block."""
        return self.model.n_embd * sum(costs.widths(self.model))

    @property
    def head(self):
        """Return the numbers in the head."""
        return self.model.n_embd * self.model.vocab_size


def parameters(setup):
    """Return (all parameters, the trained ones, those in fewer bits)."""
    c, n = setup.model, sum(costs.parameters(setup.model).values())
    if setup.lora is None:
        return n, n, 0
    rank, targets, bits = setup.lora
    q, qkv, n_in, n_out = costs.widths(c)
    shapes = {f'h.{i}.{name}': shape for i in range(c.n_layer) for name, shape in (
        ('attn.c_attn', (c.n_embd, qkv)), ('attn.c_proj', (q, c.n_embd)),
        ('mlp.c_fc', (c.n_embd, n_in)), ('mlp.c_proj', (n_out, c.n_embd)))}
    shapes['lm_head'] = c.n_embd, c.vocab_size
    chosen = [shape for name, shape in shapes.items()
              if any(f'.{name}'.endswith(f'.{target}') for target in targets)]
    adapters = rank * sum(map(sum, chosen))
    return n + adapters, adapters, (bits < 32) * sum(map(math.prod, chosen))


# Memory -------------------------------------------------------------------------------------------


def need(setup):
    """Return {part: bytes} at the place of a step where memory is fullest."""
    return max(places(setup).values(), key=lambda parts: sum(parts.values()))


def places(setup):
    """Return {place: {part: bytes}}, the places of a step where memory may be fullest."""
    s, c = setup, setup.model
    n, n_trained, n_rounded = parameters(s)
    matrices = c.n_layer * s.matrices if s.optimizer == 'muon' else 0
    saved = {8: 3, 4: 4 - 9 / 16}.get(s.lora[2], 0) if s.lora else 0  # NF4 has scales
    fixed = {'weights': (4 * n - saved * n_rounded) / s.n_shards,
             'moments': (8 * n_trained - 4 * matrices) / s.n_shards}
    gradients = 4 * n_trained / s.n_shards
    # they stay while micro-batches add up, and in the buckets of DDP
    before = gradients if s.micro_steps > 1 or s.n_shards == 1 < s.n_processes else 0
    layer, rest = costs.activations(c, s.batch_size, c.block_size, s.how)
    residual = 4 * s.tokens * c.n_embd
    tables = sum(map(c.has_value_embedding, range(c.n_layer)))
    inputs = residual * c.residual_lambdas + 4 * s.tokens * c.kv_heads * c.head_size * tables
    kept = residual if s.recompute else layer  # of a block
    copies = s.how.item * s.matrices if s.how.item < 4 and s.n_shards == 1 else 0
    # autocast holds its own copies to the end of the forward pass
    held = copies * (not s.recompute or not s.how.compiled)
    gathered, unsharded = gathered_bytes(s)
    of_block = 4 * s.matrices * (n_trained / n) / s.n_shards
    block = {**fixed, 'activations': layer + inputs, 'temporaries': temporaries(s),
             'gathered weights': gathered + unsharded}
    later = max(before, gradients - of_block * c.n_layer)  # those of the head
    head = head_and_loss(s, n_trained == n)
    return {
        'the loss': {**fixed, 'gradients': before, 'activations': c.n_layer * kept + inputs + rest,
                     'bf16 copies': c.n_layer * held, 'head and loss': head,
                     'gathered weights': gathered},
        'the last block': {**block, 'gradients': later, 'bf16 copies': c.n_layer * copies,
                           'activations': (c.n_layer - 1) * kept + layer + inputs},
        'the first block': {**block, 'gradients': max(before, gradients - of_block),
                            'bf16 copies': copies},
        'the update': {**fixed, 'gradients': gradients, 'temporaries': update(s)}}


def head_and_loss(setup, trains_head):
    """Return the bytes of head and loss beside what the backward pass keeps.

    They are the gradients of the logits, or the chunk of ops.sum_in_chunks() with the gradients
    that it returns.
    """
    s, c, item = setup, setup.model, setup.how.item
    copy = item * s.head if item < 4 else 0
    if s.tokens * c.vocab_size <= ops.CHUNK or not s.how.chunked:
        return 8 * s.tokens * c.vocab_size + copy
    rows = (4 if s.how.on_gpu and s.how.compiled else 1) * ops.CHUNK // c.vocab_size
    logits, gradient = min(rows, s.tokens) * c.vocab_size, 4 * s.head * trains_head
    in_fp32 = 4 * (item < 4 or c.logit_softcap > 0)
    computing = item * logits if s.how.compiled else (17 + in_fp32) * logits
    # the product is added to the gradient; on the CPU a copy in fp32 comes between
    adding = trains_head * s.head * (item * (item == 4 or not s.how.on_gpu)
                                     + 4 * (item < 4 and not s.how.on_gpu))
    chunk = item * logits + max(computing, item * logits + adding)
    return copy + item * s.tokens * c.n_embd + gradient + max(chunk, gradient)


def temporaries(setup):
    """Return the bytes of gradients in the backward pass of a block."""
    c, item, (_, _, n_in, n_out) = setup.model, setup.how.item, costs.widths(setup.model)
    per_token = 4 * c.n_embd + item * (c.n_embd + max(n_in, n_out))
    return setup.tokens * per_token + 4 * c.n_embd * n_in


def update(setup):
    """Return the bytes that the optimizer computes with: Muon's batches of matrices."""
    c, item, (q, qkv, n_in, n_out) = setup.model, setup.how.item, costs.widths(setup.model)
    if setup.optimizer != 'muon':
        return 0
    counts, most, before = {}, 0, 0
    for n, rows in ((2, q), (2, (qkv - q) // 2), (n_in // n_out + 1, n_out)):
        shape = tuple(sorted((rows, c.n_embd)))  # wide, as Muon computes
        counts[shape] = counts.get(shape, 0) + n * c.n_layer
    for (m, n), count in counts.items():
        count = min(count, max(1, BATCH // (m * n)))
        numbers, gram = count * m * n, count * m * m
        is_wide = item == 4 and n > 1.3 * m  # orthogonalize() keeps a product of polynomials too
        held = max(2 * numbers + (3 + is_wide) * gram, numbers + (4 + 2 * is_wide) * gram)
        # directions come in fp32; the batch before is still held
        most = max(most, item * before + max((4 + item * (item < 4)) * numbers, item * held))
        before = numbers
    return most


def gathered_bytes(setup):
    """Return the bytes of gathered weights: (always, in a backward pass).

    Two blocks are gathered in the precision of products, the next while one computes; embeddings
    and head in fp32. A block's gradients are whole until each process has its part of their sum.
    """
    s = setup
    if s.n_shards == 1:
        return 0, 0
    root = sum(costs.parameters(s.model).values()) - s.model.n_layer * s.matrices
    return 3 * s.how.item * s.matrices + 4 * root, (s.how.item + 4) * s.matrices + 4 * root


# Time ---------------------------------------------------------------------------------------------


def seconds_of_step(setup, machine):
    """Return {'products', 'memory', 'update', 'exchange': seconds} of a step.

    The exchange counts as far as it does not overlap with computation.
    """
    s, c, gpu = setup, setup.model, machine.gpu
    forward = costs.flops(c, c.block_size)
    all_forward, again = sum(forward.values()), forward['projections'] + forward['scores']
    again = s.recompute * (again + forward['MLP'])
    # frozen weights need no gradients
    flops = (2 if s.lora else 3) * all_forward + again
    layer, rest = costs.activations(c, s.batch_size, c.block_size, s.how)
    moved = MOVED * (c.n_layer * layer + rest + s.how.item * s.tokens * c.vocab_size)
    products = s.tokens * flops / (PRODUCTS * gpu.flops)
    memory = moved * (1 + s.recompute / 3) / (BANDWIDTH * gpu.bandwidth)
    n_trained = parameters(s)[1]
    update = 40 * n_trained / s.n_shards / (BANDWIDTH * gpu.bandwidth)
    if s.optimizer == 'muon':
        update += orthogonalization(s) / s.n_processes / (PRODUCTS * gpu.flops)
    return {'products': s.micro_steps * products, 'memory': s.micro_steps * memory,
            'update': update, 'exchange': exchange(s, machine, products + memory)}


def orthogonalization(setup):
    """Return the FLOPs of Muon's products over all matrices, as on a GPU in bf16."""
    c, (q, qkv, n_in, _) = setup.model, costs.widths(setup.model)
    rows = [q, q, (qkv - q) // 2, (qkv - q) // 2] + [c.mlp_width] * (n_in // c.mlp_width + 1)
    pairs = [sorted((n, c.n_embd)) for n in rows]
    return c.n_layer * sum(2 * len(QUINTICS) * m * m * (2 * n + m) for m, n in pairs)


def exchange(setup, machine, seconds):
    """Return the seconds of exchanges that a step waits for.

    seconds: of the computation of a micro-batch. DDP sums gradients in the last backward pass.
    Shards are gathered twice in each micro-batch, and their gradients divided once.
    """
    s, gpu = setup, machine.gpu
    if s.n_processes == 1:
        return 0.0
    n, n_trained, _ = parameters(s)
    between = gpu.network if machine.n_machines > 1 else gpu.link
    if s.n_shards == 1:
        sent = 2 * 4 * n_trained / (LINK * between)
        return max(0.0, sent - seconds * 2 / 3)
    inside = gpu.link if s.n_shards <= machine.n_gpus else gpu.network
    sent = (2 * s.how.item + 4) * n / (LINK * inside)
    replicated = 2 * 4 * n / s.n_shards / (LINK * gpu.network) * (s.n_shards < s.n_processes)
    return s.micro_steps * max(0.0, sent - seconds) + replicated


# A run --------------------------------------------------------------------------------------------


def model_of(config, n_ids):
    """Return the GPTConfig of a run, and of its vocabulary a line if it is assumed.

    n_ids: of the dataset; None: not known. Weights are not read, nor downloaded.
    """
    init_from, out_dir = config['init_from'], config['out_dir']
    fields = GPTConfig.__dataclass_fields__
    if init_from == 'scratch':
        line = '' if n_ids else (f"GPT-2's vocabulary of 50,257, since the dataset "
                                 f'{config["dataset"]} is not prepared; '
                                 f'another one: --plan=8xH200,vocab_size=N')
        vocab_size = padded_vocab_size(n_ids or 50257)
        return GPTConfig(**{name: config[name] for name in fields if name in config},
                         vocab_size=vocab_size), line
    which = 'last' if init_from == 'resume' else 'best'
    pretrained.check_source(init_from, os.path.join(out_dir, 'ckpt.pt'))
    path = pretrained.checkpoint_path(init_from, out_dir, which)
    if path:
        arguments = {**glance(path)['model_args'], 'dropout': config['dropout']}
        if unknown := sorted(set(arguments) - set(fields)):
            raise UserError(f'{path} holds no model of this repository or of nanoGPT: model_args '
                            f'has {unknown[0]}')
        return GPTConfig(**arguments), ''
    folder = huggingface.find(init_from, may_download=False)
    described = huggingface.fields_of(huggingface.read_config(folder), folder)
    return GPTConfig(**described, dropout=config['dropout']), ''


def machine_here(device, dtype, n_processes):
    """Return this process's Machine: a GPU's datasheet, or a CPU's measures."""
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
        gpu = gpu_named(name) or GPU(math.nan, 0, math.nan)
        return Machine(name, gpu._replace(memory=torch.cuda.mem_get_info(device)[1]))
    x = torch.ones(1024, 1024, dtype=runtime.DTYPES[dtype])
    y = torch.ones(2**23)
    flops, n_bytes = 2 * 1024**3 / fastest(lambda: x @ x), 12 * 2**23 / fastest(lambda: y + y)
    gpu = GPU(flops / PRODUCTS, memory.free_memory() / n_processes, n_bytes / BANDWIDTH, math.inf,
              math.inf)
    return Machine(f'this {device.type.upper()}', gpu)


def fastest(function):
    """Return the least seconds of four calls."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def setup_of(config, model, machine, how):
    """Return the Setup of train.py's settings on a Machine."""
    cut = cut_step(config, model.block_size, machine.size)
    n_shards = {'none': 1, 'full': machine.size, 'hybrid': machine.n_gpus}[
        config.get('shard', 'none')]
    targets = [target.strip() for target in config['lora_targets'].split(',')]
    rank = config['lora_rank']
    return Setup(model, cut.batch_size, cut.micro_steps, machine.size, n_shards, how,
                 config['optimizer'], config['recompute'] == 'block',
                 (rank, targets, config['lora_bits']) if rank else None, cut.stages)


def room(machine, how):
    """Return the bytes that tensors may take on a device."""
    return machine.gpu.memory - LIBRARIES['cuda' if how.on_gpu else 'cpu']


def total(setup):
    """Return the bytes of a step where memory is fullest."""
    return sum(need(setup).values())


def divisors(n):
    """Return the divisors of n, the largest first."""
    return [i for i in range(n, 0, -1) if n % i == 0]


def largest_batch(setup, most):
    """Return the largest batch_size that fits into `most` bytes, or 0."""
    sequences = setup.batch_size * setup.micro_steps
    return next((n for n in divisors(sequences // setup.stages.n) if total(
        replace(setup, batch_size=n, micro_steps=sequences // n)) <= most), 0)


def remedies(setup, most, n_shards):
    """Return settings that let a step fit into `most` bytes, fewest first."""
    options = {'--recompute=block': {'recompute': True}, '--shard=full': {'n_shards': n_shards}}
    if setup.recompute:
        del options['--recompute=block']
    if setup.lora or not setup.n_shards == 1 < n_shards:
        del options['--shard=full']
    lines = []
    for names in [(), *((name,) for name in options), tuple(options)]:
        changes = {key: value for name in names for key, value in options[name].items()}
        if batch_size := largest_batch(replace(setup, **changes), most):
            if batch_size < setup.batch_size:  # the total stays
                tokens = setup.tokens * setup.micro_steps * setup.n_processes
                names += f'--batch_size={batch_size}', f'--total_batch_size={tokens}'
            if not any(set(fewer) < set(names) for fewer in lines):
                lines.append(names)
    return [' '.join(names) for names in sorted(lines, key=len)]


def explain_plan(config, sizes, world):
    """Return the text of --plan: memory by part, whether it fits, and time.

    config: train.py's settings; sizes: data.datasets.sizes_of(). Raises UserError for an unknown
    machine and for settings that training refuses too.
    """
    n_ids, row = sizes
    if config['init_from'] == 'auto':
        has_run = os.path.exists(os.path.join(config['out_dir'], 'ckpt.pt'))
        config['init_from'] = 'resume' if has_run else 'scratch'
    if config['dropout'] == 'auto':  # any above 0 takes the same memory
        config['dropout'] = 0.1
    model, assumed = model_of(config, named_machine(config)[1] or n_ids)
    context = pretrained.context_of(SimpleNamespace(config=model), config, config['init_from'],
                                    {'row': row})
    model = replace(model, block_size=context)
    machine, precision, how = machine_of(config, world)
    setup = setup_of(config, model, machine, how)
    most = room(machine, how)
    if config['batch_size'] == 'auto':
        batch_size = largest_batch(setup, most) or 1
        setup = replace(setup, batch_size=batch_size, micro_steps=setup.micro_steps // batch_size)
    parts = need(setup)
    place = next(name for name, other in places(setup).items() if other == parts)
    needed, n = sum(parts.values()), parameters(setup)[0]
    tokens = setup.tokens * setup.micro_steps * setup.n_processes
    lines = [f'plan for {machine.name}: {n / 1e6:,.0f}M parameters, {precision}, '
             f'{"compiled" if how.compiled else "not compiled"}',
             f'a step of {tokens:,} tokens = {setup.n_processes} process(es) x '
             f'{setup.micro_steps} micro-batch(es) x {setup.batch_size} x {context}', '',
             f'memory of a process at its fullest, in {place}:']
    parts = {**parts, 'libraries (assumed)': machine.gpu.memory - most}
    lines += [f'  {name:20} {n_bytes / 1e9:8.2f} GB' for name, n_bytes in parts.items() if n_bytes]
    needed += machine.gpu.memory - most
    fits = needed <= machine.gpu.memory
    lines += [f'  {"together":20} {needed / 1e9:8.2f} GB: {"fits" if fits else "does not fit"} in '
              f'{machine.gpu.memory / 1e9:,.0f} GB']
    if fits:
        lines.append(f'the largest batch_size that fits: {largest_batch(setup, most)}')
    else:
        lines.append('what would fit:')
        lines += [f'  {line}' for line in remedies(setup, most, machine.size)] or [
            '  nothing here: use more GPUs with --shard=full, or a smaller model or block_size']
    lines += ['', *explain_time(setup, machine, config['max_iters'], how.on_gpu)]
    return '\n'.join(lines + ['', f'assumed: {assumed}'] * bool(assumed))


def named_machine(config):
    """Return --plan's (machine, ids of the vocabulary): '8xH200,vocab_size=128256'."""
    name, _, n_ids = str(config['plan']).replace('True', '').partition(',vocab_size=')
    if n_ids and not (n_ids.isdecimal() and int(n_ids)):
        raise UserError(f'plan={config["plan"]!r}: vocab_size={n_ids!r}, expected 1 or more')
    return name, int(n_ids or 0)


def machine_of(config, world):
    """Return (Machine, name of the precision, How) of train.py's settings."""
    if name := named_machine(config)[0]:
        machine = machine_named(name)
        precision = config['dtype']
        if precision == 'auto':  # before Ampere there was no bf16
            precision = 'float16' if machine.gpu in (GPUS['V100'], GPUS['T4']) else 'bfloat16'
        on_gpu, compiled = True, bool(config['compile'])
    else:
        device = runtime.choose_device(config['device'], world.local_rank)
        runtime.use_machine(device)
        precision, _ = runtime.choose_dtype(config['dtype'], device)
        machine = machine_here(device, precision, world.size)._replace(n_gpus=world.size)
        on_gpu = device.type == 'cuda'
        compiled, _ = runtime.choose_compile(config['compile'], device, math.inf)
    item = runtime.DTYPES[precision].itemsize
    return machine, precision, costs.How(item, compiled, on_gpu, precision != 'float16')


def explain_time(setup, machine, max_iters, has_peak):
    """Return the lines about the time of a step and of the run."""
    seconds = seconds_of_step(setup, machine)
    step = sum(seconds.values())
    if math.isnan(step):
        return [f'{machine.name} is not in the table of flatgpt/flops.py: no time is predicted']
    fixed = seconds['update'] + seconds['exchange']  # alike in steps of a part of the batch
    parts_of_batch = setup.stages.until(max_iters) / setup.stages.n
    in_all = parts_of_batch * (step - fixed) + max_iters * fixed
    tokens = setup.tokens * setup.micro_steps
    flops = 3 * sum(costs.flops(setup.model, setup.model.block_size).values())
    mfu = f', MFU {flops * tokens / step / machine.gpu.flops:.0%}' if has_peak else ''
    parts = ', '.join(f'{name} {1e3 * part:,.0f}' for name, part in seconds.items() if part)
    bound = 'at least' if has_peak else 'about'  # by a datasheet, or by measured speeds
    return [f'a step takes {bound} {1e3 * step:,.0f} ms ({parts})',
            f'that is {tokens * setup.n_processes / step:,.0f} tokens/s{mfu}; '
            f'{max_iters:,} steps take {duration(in_all)}']


def duration(seconds):
    """Format seconds as '3.2 days', '5.1 hours', '12.0 minutes' or '8.4 seconds'."""
    for name, unit in (('days', 86400), ('hours', 3600), ('minutes', 60)):
        if seconds >= unit:
            return f'{seconds / unit:,.1f} {name}'
    return f'{seconds:.1f} seconds'
