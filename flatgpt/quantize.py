"""
Weights for decoding: a token costs reading all of them once, so half the bytes are nearly twice the speed.

    quantize.for_decoding(model, torch.bfloat16)                    # or torch.int8
    quantize.for_decoding(model, torch.bfloat16, compile=True)      # many tokens to come: seconds now, fewer later

The residual stream and norms stay in fp32. int8 is weight-only: each row of a matrix, the weights of one output, is
rounded to 255 steps of its own size, absmax / 127 ("LLM.int8()", Dettmers et al. 2022, whose activations stay as they
are here); what is not compiled multiplies in bf16.
"""

import mmap
from contextlib import suppress

import torch
import torch._inductor.config
from torch import nn
from torch.nn import functional as F

# of inductor: to write what a product reads over and over to memory, instead of computing it anew for every row of the
# matrix, which it would do with norms and activations. An older torch lacks some, and is slower then
COMPILE_OPTIONS = {name: value for name, value in {
    'deterministic': True, 'realize_reads_threshold': 1, 'size_asserts': False}.items()
    if hasattr(torch._inductor.config, name)}


def has_bf16_products():
    """Whether this torch multiplies bf16 matrices on this CPU by its own instructions."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class DecodeLinear(nn.Module):
    """
    nn.Linear for inference. weight: (N, K) in fp32, bf16, fp16 or int8, then with scale: (N,), of its rows.

    The product of one position is a matrix times a vector, which torch's libraries read at 40 to 70% of a CPU's memory
    bandwidth; multiply and sum, compiled, at 85% (bench/results). More positions go to the libraries: on the CPU in
    bf16 with weights packed beforehand, unless the step of one position is compiled.
    """

    def __init__(self, linear, dtype, is_packed):
        super().__init__()
        self.dtype = dtype
        weight, scale = linear.weight.detach(), None
        if dtype == torch.int8:
            weight, scale = quantize_rows(weight.float())
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        self.register_buffer('scale', scale)
        bias_dtype = torch.float32 if dtype == torch.int8 else dtype
        self.register_buffer('bias', None if linear.bias is None else linear.bias.detach().to(bias_dtype))
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.data, 16) if is_packed else None

    def forward(self, x):
        shape, x = x.shape[:-1], x.flatten(0, -2)  # (positions, K)
        n = len(x)
        if n == 1 and x.device.type == 'cpu' and torch.compiler.is_compiling():
            y = (x.float() * self.weight.float()).sum(-1)
            y = y if self.scale is None else y * self.scale
            y = y if self.bias is None else y + self.bias
        elif self.packed is not None:
            rows = F.pad(x, (0, 0, 0, 4 - n)) if n < 4 else x  # of 4 rows and less, 4 are the fastest
            y = torch.ops.mkldnn._linear_pointwise(rows.to(self.dtype), self.packed, None, 'none', [], '')[:n]
            y = y if self.bias is None else y + self.bias
        elif self.scale is None:
            y = F.linear(x.to(self.dtype), self.weight, self.bias)
        else:
            y = F.linear(x.bfloat16(), self.weight.bfloat16()) * self.scale
            y = y if self.bias is None else y + self.bias
        return y.view(*shape, -1)


def quantize_rows(weight):
    """weight: (N, K) -> (N, K) of int8 and (N,), the size of a step, so that their product is nearly the weight."""
    scale = weight.abs().amax(1).clamp(min=1e-12) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def move_together(weights):
    """
    The weights of a CPU into one block of memory, in the order in which a step reads them, of pages of 2 MB where Linux
    grants them: with those of 4 KB a processor stops at each to look up the next, which costs a quarter of a token.
    """
    if not hasattr(mmap, 'MADV_HUGEPAGE'):
        return
    sizes = [-(-weight.numel() * weight.element_size() // 64) * 64 for weight in weights]
    block = mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        block.madvise(mmap.MADV_HUGEPAGE)
    start = 0
    for weight, size in zip(weights, sizes, strict=True):
        moved = torch.frombuffer(block, dtype=weight.dtype, count=weight.numel(), offset=start).view_as(weight)
        weight.data = moved.copy_(weight)
        start += size


@torch.no_grad()
def for_decoding(model, dtype, compile=False):
    """
    Make a GPT, in place, one that only decodes: its matrices in dtype (fp32, bf16, fp16 or int8), everything else in
    fp32, and with compile=True its steps of a single position compiled.

    Compiling takes seconds, the less the oftener it was done on this machine, and brings on the CPU nearly half the
    time of a token in bf16; int8 without it is slower than bf16.
    """
    device = model.lm_head.weight.device
    is_packed = device.type == 'cpu' and dtype == torch.bfloat16 and not compile and has_bf16_products()
    model.float().requires_grad_(False)
    tables = [model.transformer.wte, *(model.transformer['vte'].values() if 'vte' in model.transformer else ())]
    model.lm_head = DecodeLinear(model.lm_head, dtype, is_packed)
    for table in tables:  # rows are looked up, not multiplied
        table.weight.data = table.weight.data.to(torch.bfloat16 if dtype == torch.int8 else dtype)
    weights = []
    for block in model.transformer.h:
        for part, name in ((block.attn, 'c_attn'), (block.attn, 'c_proj'), (block.mlp, 'c_fc'), (block.mlp, 'c_proj')):
            linear = DecodeLinear(getattr(part, name), dtype, is_packed)
            setattr(part, name, linear)
            weights.append(linear.weight)
            if is_packed:
                linear.weight = None  # the packed one is all that is read
    if compile:
        if device.type == 'cpu':
            move_together([*weights, model.lm_head.weight])
        # each kind of block, windows or not and so on, is compiled for each size of the cache
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
        options = COMPILE_OPTIONS if device.type == 'cpu' else None
        for module in (*model.transformer.h, model.lm_head):
            module.compile(options=options)
    if model.config.tie_embeddings and dtype != torch.int8:
        model.transformer.wte.weight = model.lm_head.weight
    model.has_compiled_step = compile
    return model
