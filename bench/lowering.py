"""
Count what inductor makes of a training step for a GPU, without a GPU.

    $ pip install --no-deps triton==3.8.0 && python -m bench.lowering
    $ python -m bench.lowering --model=speedrun

It reads the code that is generated for a pretended H200 (bench/pretended.py) for each
kind of block and for the loss, in bf16: launches, the bytes that move outside products
and attention, and the largest memory of head and loss. Nothing runs: the times are the
floors of these counts, with products at PRODUCTS and memory at BANDWIDTH.

Prints a table and, as its last line, a JSON object.
"""

import math
import re
import weakref
from collections import Counter
from typing import Literal
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ops
from bench import common, pretended
from config.presets import PRESETS
from configurator import Count, override
from flatgpt import costs, plan
from flatgpt.flops import GPUS
from flatgpt.quantize import DecodeLinear
from model import GPT, GPTConfig

# Settings -----------------------------------------------------------------------------------------
model: Literal['', 'gpt2', 'modern', 'speedrun'] = ''  # 124M; '': all three
batch_size: Count = 32
block_size: Count = 1024
n_layer: Count = 12
vocab_size: Count = 50304
config = override(globals())
# --------------------------------------------------------------------------------------------------

MODERN = {key: value for key, value in PRESETS['modern'].items()
          if key in GPTConfig.__dataclass_fields__} | {'mlp': 'relu2', 'zero_init': True}
MODELS = {'gpt2': {'bias': False}, 'modern': MODERN, 'speedrun': {
    **MODERN, 'value_embeddings': True, 'residual_lambdas': True, 'window': 256,
    'window_pattern': 'SSSL'}}
SIZES = {name: getattr(torch, name).itemsize for name in (
    'float32', 'bfloat16', 'int64', 'int32', 'int8', 'bool', 'uint64')}
NEW = r"(\w+) = (?:empty_strided_cuda|rand_strided)\(\(([^)]*)\), \([^)]*\),.*torch\.(\w+)\)"
REUSED = r'(\w+) = (?:reinterpret_tensor\()?(\w+)[,;].*del \w+  # reuse'
PRODUCTS = 700e12  # FLOP/s that large products in bf16 reach on an H200
BANDWIDTH = 4.1e12  # bytes/s that an H200's memory reaches of 4.8


def flash_attention(q, k, v, **options):
    """Attend by the operator that torch chooses on an H200."""
    assert options['attn_mask'] is None and not options['enable_gqa']
    causal = options['is_causal']
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[0]


def sizes_of(graph):
    """Return {name: bytes} of a graph's tensors."""
    return {name: math.prod(int(n) for n in shape.split(',') if n.strip()) * SIZES[dtype]
            for name, shape, dtype in re.findall(NEW, graph.code)}


def read(graph):
    """Return (launches, bytes that Triton's kernels move, largest memory allocated)."""
    sizes = sizes_of(graph)
    body = graph.code[graph.code.index('def call('):].split('\nrunner =')[0]
    launches = moved = largest = 0
    alive = {}
    for line in map(str.strip, body.splitlines()):
        if match := re.match(r'(\w+) = empty_strided_cuda', line):
            alive[match[1]] = sizes[match[1]]
            largest = max(largest, sum(alive.values()))
        elif match := re.match(REUSED, line):
            sizes[match[1]] = sizes.get(match[2], 0)
            alive[match[1]] = alive.pop(match[2], 0)
        elif line.startswith('del '):
            alive.pop(line[4:], None)
        elif match := re.match(r'triton_(\w+)\.run\((.*), stream=', line):
            launches += 1
            most = 2**20 if 'gather' in match[1] else math.inf  # rows are looked up, not all read
            n_bytes = (sizes.get(name, 0) for name in set(re.findall(r'\b[a-z]\w*\d\b', match[2])))
            moved += sum(n for n in n_bytes if n <= most)
        elif re.match(r'extern_kernels\.|\w+ = torch\.ops\.', line):
            launches += 1
    return launches, moved, largest


def held(graph):
    """Return (bytes given to a backward graph, most bytes beside them as it runs).

    The gradients that the attention kernel returns are not counted.
    """
    sizes = sizes_of(graph)
    storages = dict(re.findall(r'(\w+) = torch\.as_strided\((\w+),', graph.code))
    body = graph.code[graph.code.index('def call('):].split('\nrunner =')[0]
    names = re.search(r'(\w+(?:, \w+)*),? = args', body)[1].split(', ')
    views = Counter(storages.get(name, name) for name in names)
    alive = {name: sizes[name] for name in views}
    given = most = sum(alive.values())
    for line in map(str.strip, body.splitlines()):
        if match := re.match(r'(\w+) = empty_strided_cuda', line):
            alive[match[1]] = sizes[match[1]]
            most = max(most, sum(alive.values()))
        elif match := re.match(REUSED, line):
            sizes[match[1]] = sizes.get(match[2], 0)
            alive[match[1]] = alive.pop(match[2], 0)
        elif line.startswith('del '):
            name = storages.get(line[4:], line[4:])
            views[name] -= 1
            if views[name] <= 0:
                alive.pop(name, None)
    return given, most - given


class Watch(TorchDispatchMode):
    """Count the launches of eager operators, the bytes they move, their memory."""

    def __init__(self):
        super().__init__()
        self.launches = self.moved = self.held = self.largest = 0
        self.tensors = Counter()  # of each storage

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = [t for t in tree_leaves(result) if torch.is_tensor(t)]
        inputs = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
        storages = {t.untyped_storage()._cdata for t in inputs}
        for t in results:
            storage = t.untyped_storage()
            if not self.tensors[storage._cdata] and storage._cdata not in storages:
                self.held += storage.nbytes()
            self.tensors[storage._cdata] += 1
            weakref.finalize(t, self.free, storage._cdata, storage.nbytes())
        self.largest = max(self.largest, self.held)
        name = str(function)
        if name.startswith('aten') and not function.is_view and 'empty' not in name:
            self.launches += 1
            if 'mm' not in name:
                self.moved += sum(t.nbytes for t in {id(t): t for t in inputs + results}.values()
                                  if 'embedding' not in name or t.is_floating_point())
        return result

    def free(self, storage, n_bytes):
        self.tensors[storage] -= 1
        if not self.tensors[storage]:
            self.held -= n_bytes


def lower_blocks(gpt, idx):
    """Return the figures of blocks, forward and backward, as two lists.

    [(kind of block, how many, launches, bytes)], [(how many, bytes kept, bytes beside them)].
    """
    inputs, kinds, memory = {}, {}, []
    for layer, block in enumerate(gpt.transformer.h):
        name = f'window {block.attn.window}' if block.attn.window else 'block'
        name += ', value embedding' * gpt.config.has_value_embedding(layer)
        kinds.setdefault(name, []).append(block)
        block.forward = lambda x, context, block=block: inputs.setdefault(block, (x, context))[0]
    gpt.hidden(idx)
    rows = []
    for name, blocks in kinds.items():
        del blocks[0].forward  # back to the class's
        torch._dynamo.reset()
        x, context = inputs[blocks[0]]
        step = torch.compile(blocks[0].forward, dynamic=False, fullgraph=True)
        graphs = pretended.lower(step, x.detach().requires_grad_(), context)
        launches, moved, _ = (sum(column) for column in zip(*map(read, graphs), strict=True))
        rows.append((name, len(blocks), launches, moved))
        given, beside = held(graphs[1])
        memory.append((len(blocks), given - x.nbytes, beside + x.nbytes))  # x: of the gradient
    return rows, memory


def lower_loss(gpt, n_tokens):
    """Return (launches, bytes, largest memory) of head and loss, with gradients."""
    head, softcap, chunks = gpt.lm_head.weight, float(gpt.config.logit_softcap), []
    x = torch.empty(n_tokens, gpt.config.n_embd, dtype=torch.bfloat16)

    def chunk(logits, target, softcap):
        """Return tensors like those of the compiled function, which is lowered later."""
        chunks.append((logits.shape, target.shape))
        return torch.empty(()), torch.empty_like(logits)

    with torch.no_grad(), Watch() as watch, mock.patch.object(ops, 'compiled', lambda f: chunk):
        ops.sum_in_chunks(x, head, torch.zeros(n_tokens, dtype=torch.long), softcap, [True, True])
    torch._dynamo.reset()
    logits = torch.empty(chunks[0][0], dtype=torch.bfloat16)
    graph, = pretended.lower(torch.compile(ops.loss_and_gradient, dynamic=False, fullgraph=True),
                             logits, torch.zeros(chunks[0][1], dtype=torch.long), softcap)
    launches, moved, largest = read(graph)
    temporaries = largest - logits.nbytes  # beside the gradient
    return (watch.launches + len(chunks) * launches, watch.moved + len(chunks) * moved,
            watch.largest + temporaries)


def bytes_per_int8_weight():
    """Return the bytes that a product of one position moves for each int8 weight."""
    torch._dynamo.reset()
    with FakeTensorMode(), torch.device('cuda'), torch.no_grad():
        linear = DecodeLinear(torch.nn.Linear(768, 3072), torch.int8)
        graph, = pretended.lower(torch.compile(linear), torch.empty(1, 1, 768))
    return read(graph)[1] / linear.weight.numel()


def measure(name):
    """Return the figures of a model's forward and backward pass."""
    c = GPTConfig(**{**MODELS[name], 'n_layer': n_layer, 'vocab_size': vocab_size,
                     'block_size': block_size})
    n_tokens = batch_size * block_size
    with FakeTensorMode(), torch.device('cuda'):
        gpt = GPT(c)
        idx = torch.zeros(batch_size, block_size, dtype=torch.long)
        with torch.autocast('cuda', torch.bfloat16):
            blocks, memory = lower_blocks(gpt, idx)
            for block in gpt.transformer.h:
                block.forward = lambda x, context: x
            with Watch() as watch:
                gpt.hidden(idx).sum().backward()
        loss_launches, loss_moved, loss_memory = lower_loss(gpt, n_tokens)
    planned = plan.places(plan.Setup(c, batch_size, how=costs.How(compiled=True)))
    fixed = planned['the loss']['weights'] + planned['the loss']['moments']
    kept = sum(n * given for n, given, _ in memory) + watch.largest
    generated = fixed + kept + max(loss_memory, *(beside for *_, beside in memory))
    parts = [(f'{n} x {kind}', n * launches, n * moved) for kind, n, launches, moved in blocks]
    parts += [('head and loss', loss_launches, loss_moved),
              ('embeddings and last norm', watch.launches, watch.moved)]
    launches, moved = (sum(part[i] for part in parts) for i in (1, 2))
    flops = gpt.flops_per_token() * n_tokens
    seconds = flops / PRODUCTS + moved / BANDWIDTH
    mfu = flops / GPUS['H200'].flops / seconds
    return {'parts': parts, 'launches': launches, 'moved_gb': round(moved / 1e9, 1),
            'loss_mb': round(loss_memory / 2**20), 'step_gb': round(generated / 1e9, 2),
            'planned_gb': round(max(sum(p.values()) for p in planned.values()) / 1e9, 2),
            'ms': round(seconds * 1e3, 1),
            'tokens_per_s': round(n_tokens / seconds), 'mfu': round(mfu, 3)}


def main():
    pretended.pretend()
    ops.is_training_compiled = True
    F.scaled_dot_product_attention = flash_attention
    results = {name: measure(name) for name in ([model] if model else MODELS)}
    rows = [['', 'launches', 'GB moved']]
    for name, figures in results.items():
        rows += [[f'{name}: {part}', n, f'{n_bytes / 1e9:.1f}']
                 for part, n, n_bytes in figures['parts']]
        rows.append([f'{name}: all', figures['launches'], figures['moved_gb']])
    print(common.heading('lowering'))
    print(common.table(rows))
    for name, f in results.items():
        print(f'{name}: head and loss hold {f["loss_mb"]:,} MB; at least {f["ms"]} ms, at most '
              f'{f["tokens_per_s"]:,} tokens/s, MFU {f["mfu"]:.1%}')
        print(f'{name}: a step with AdamW holds {f["step_gb"]} GB, --plan predicts '
              f'{f["planned_gb"]} GB')
    per_weight = bytes_per_int8_weight()
    print(f'decoding in int8: {per_weight:.2f} bytes a weight')
    common.finish('lowering', 1, settings=dict(config), results=results, int8_bytes=per_weight)


if __name__ == '__main__':
    main()
