"""
Speed decoding up: weights of fewer bits, and compiled code for a token.

    for_decoding(model, torch.bfloat16)
    for_decoding(model, torch.int8, compile=True)

A token costs reading all weights once, so half the bytes are nearly twice the speed. The residual
stream and the norms stay in fp32. int8 rounds weights only, each row of a matrix to 255 steps of
its own, absmax / 127 ("LLM.int8()", Dettmers et al. 2022); eager products are in bf16.
"""

import itertools
import mmap
from contextlib import suppress

import torch
from torch import nn
from torch.nn import functional as F

from flatgpt import products, step

# the levels of NF4: quantiles of the normal distribution, scaled to -1 to 1
NF4 = torch.tensor([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
                    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
                    0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
                    0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                    0.7229568362236023, 1.0])


def has_bf16_products():
    """Return whether torch multiplies bf16 matrices by instructions of this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class DecodeLinear(nn.Module):
    """Multiply like nn.Linear, for inference.

    weight: (N, K) in fp32, bf16, fp16 or int8; scale: (N,), the step of each int8 row, or None.
    On a CPU few positions go to products.py if `is_direct`. More go to the library, in bf16 with
    weights packed beforehand if `is_packed`.
    """

    def __init__(self, linear, dtype, is_packed=False, is_direct=False):
        super().__init__()
        weight, scale = linear.weight.detach(), None
        if dtype == torch.int8:
            weight, scale = quantize_rows(weight.float())
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        self.register_buffer('scale', scale)
        is_direct = is_direct and products.Product.fits(self.weight)
        bias_dtype = torch.float32 if dtype == torch.int8 or is_direct else dtype
        bias = None if linear.bias is None else linear.bias.detach().to(bias_dtype)
        self.register_buffer('bias', bias)
        self.packed = self.product = None
        # rows that products.py multiplies
        self.most = 0 if not is_direct else 1 if is_packed else products.MOST_ROWS
        if is_packed:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.data, 16)
        # without instructions for fewer bits a CPU multiplies these more slowly than fp32
        is_slow = linear.weight.device.type == 'cpu' and dtype != torch.float32
        self.dtype = torch.float32 if is_slow and not has_bf16_products() else (
            torch.bfloat16 if dtype == torch.int8 else dtype)

    def forward(self, x):
        shape = x.shape[:-1]
        if shape.numel() <= self.most:
            # made late: move_together() moves the weight
            self.product = self.product or products.Product(self.weight, self.scale, self.bias)
            return self.product(x)
        x = x.flatten(0, -2)  # (positions, K)
        n, scale, bias = len(x), self.scale, self.bias
        if self.packed is not None:
            rows = F.pad(x, (0, 0, 0, 4 - n)) if n < 4 else x  # 4 rows are faster than fewer
            y = torch.ops.mkldnn._linear_pointwise(
                rows.to(self.dtype), self.packed, None, 'none', [], '')[:n]
        elif n == 1 and scale is not None and torch.compiler.is_compiling():
            # a GPU's library would need the int8 weights in bf16, written first
            y = (x.float() * self.weight.float()).sum(-1)
        elif scale is None:
            bias = None if bias is None else bias.to(self.dtype)
            y, bias = F.linear(x.to(self.dtype), self.weight.to(self.dtype), bias), None
        else:
            y = F.linear(x.to(self.dtype), self.weight.to(self.dtype))
        y = y if scale is None else y * scale
        y = y if bias is None else y + bias
        return y.view(*shape, -1)


def quantize_rows(weight):
    """Round (N, K) -> (N, K) of int8 and (N,), the step of each row."""
    scale = weight.abs().amax(1).clamp(min=1e-12) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def quantize_nf4(weight):
    """Round a weight (N, K) to NF4.

    -> two numbers a byte, (blocks, 32), and absmax of each block of 64. The blocks follow one
    another in the flattened weight. Source: "QLoRA", Dettmers et al. 2023.
    """
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    bounds = (NF4[1:] + NF4[:-1]).to(weight.device) / 2
    codes = torch.bucketize(blocks / absmax.clamp(min=1e-38), bounds)
    return (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), absmax


def weights_of_nf4(codes, absmax, n):
    """Return the n numbers in fp32 of what quantize_nf4() returned."""
    pairs = torch.cartesian_prod(NF4, NF4).to(codes.device)  # (256, 2), of each byte
    return (F.embedding(codes.int(), pairs).flatten(1) * absmax).flatten()[:n]


def move_together(weights):
    """Move a CPU's weights into one block of memory, in the order of reading.

    The block has pages of 2 MB where Linux grants them: the look-ups of 4 KB pages cost a quarter
    of a token's time.
    """
    if not hasattr(mmap, 'MADV_HUGEPAGE'):
        return
    sizes = [-(-weight.numel() * weight.element_size() // 64) * 64 for weight in weights]
    block = mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        block.madvise(mmap.MADV_HUGEPAGE)
    for weight, offset in zip(weights, itertools.accumulate(sizes, initial=0), strict=False):
        moved = torch.frombuffer(block, dtype=weight.dtype, count=weight.numel(), offset=offset)
        weight.data = moved.view_as(weight).copy_(weight)


@torch.no_grad()
def for_decoding(model, dtype, compile=False, any_rows=False):
    """Convert a GPT in place to one that only decodes; -> the model.

    dtype: of the matrices, fp32, bf16, fp16 or int8; everything else is in fp32. compile: compile
    the step of one position; on a CPU, products.cpp, a second that halves the time of a token or
    more. any_rows: a step has one row or several; on a CPU with instructions for bf16 the weights
    then take twice the memory.
    """
    device, blocks = model.lm_head.weight.device, model.transformer.h
    is_direct = compile and device.type == 'cpu' and products.load() is not None
    is_packed = (device.type == 'cpu' and dtype == torch.bfloat16 and has_bf16_products()
                 and (any_rows or not is_direct))
    how = {'is_packed': is_packed, 'is_direct': is_direct}
    model.float().requires_grad_(False)
    value_tables = model.transformer['vte'].values() if 'vte' in model.transformer else ()
    model.lm_head = DecodeLinear(model.lm_head, dtype, **how)
    for table in (model.transformer.wte, *value_tables):  # rows are looked up, not multiplied
        table.weight.data = table.weight.data.to(torch.bfloat16 if dtype == torch.int8 else dtype)
    weights = []
    for block in blocks:
        for part, name in ((block.attn, 'c_attn'), (block.attn, 'c_proj'),
                           (block.mlp, 'c_fc'), (block.mlp, 'c_proj')):
            linear = DecodeLinear(getattr(part, name), dtype, **how)
            setattr(part, name, linear)
            weights.append(linear.weight)
            if is_packed and not is_direct:
                linear.weight = None  # a second copy that nothing reads
    model.has_compiled_step = compile and device.type != 'cpu'
    if is_direct:
        move_together([*weights, model.lm_head.weight])
        for block in blocks:
            step.replace(block, model.config.mlp)
    elif model.has_compiled_step:  # each kind of block is compiled for each size of the cache
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
        for module in (*blocks, model.lm_head):
            module.compile()
    if model.config.tie_embeddings and dtype != torch.int8:
        model.transformer.wte.weight = model.lm_head.weight
    return model


class GraphStep:
    """Replay the step of one token as a CUDA graph: logits (B, V) after ids (B, 1).

    The GPU launches all of its hundreds of kernels at once; launches one by one take longer than
    the kernels do.
    """

    def __init__(self, model, cache, ids):
        self.cache, self.input, length = cache, ids.clone(), cache.length
        stream = torch.cuda.Stream()  # a capture needs a warm-up in a stream of its own
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(self.input, cache=cache)
                cache.go_back_to(length)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = model(self.input, cache=cache)[0][:, -1]
        cache.go_back_to(length)

    def __call__(self, ids):
        self.input.copy_(ids)
        self.graph.replay()
        self.cache.length += 1  # the graph advances cache.next_slot, on the device
        return self.output
