"""
Weights for decoding: a token costs reading all of them once, so half the bytes are twice the speed.

    quantize.for_decoding(model, torch.bfloat16)                    # or torch.int8
    quantize.for_decoding(model, torch.bfloat16, compile=True)      # many tokens to come: seconds now, fewer later

Activations and norms stay in fp32. int8 is weight-only: each row of a matrix, the weights of one output, is rounded to
255 steps of its own size, absmax / 127 ("LLM.int8()", Dettmers et al. 2022, whose activations stay whole here).
"""

import torch
from torch import nn
from torch.nn import functional as F

# of inductor: to write what a product reads over and over to memory, instead of computing it anew for every row of the
# matrix, which it would do with norms and activations
COMPILE_OPTIONS = {'deterministic': True, 'realize_reads_threshold': 1, 'size_asserts': False}


class DecodeLinear(nn.Module):
    """
    nn.Linear for inference. weight: (N, K) in fp32, bf16, fp16 or int8, then with scale: (N,), of its rows.

    The product of one position is a matrix times a vector, which torch's libraries read at a third to half of a CPU's
    memory bandwidth; multiply and sum, compiled, at four fifths (bench/results). More positions go to the libraries:
    on the CPU in bf16 with weights packed beforehand, unless one position is all that is ever asked for.
    """

    def __init__(self, linear, dtype, packed):
        super().__init__()
        weight, scale = linear.weight.detach(), None
        if dtype == torch.int8:
            weight, scale = quantize_rows(weight.float())
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        self.register_buffer('scale', scale)
        self.register_buffer('bias', None if linear.bias is None else linear.bias.detach().float())
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.data, 16) if packed else None

    def forward(self, x):
        shape, x = x.shape[:-1], x.flatten(0, -2)  # (positions, K)
        n = len(x)
        if n == 1 and x.device.type == 'cpu' and torch.compiler.is_compiling():
            y = (x.float() * self.weight.float()).sum(-1)
        elif self.packed is not None:
            rows = F.pad(x, (0, 0, 0, max(0, 4 - n))).to(self.weight.dtype)  # of 4 rows and less, 4 are the fastest
            y = torch.ops.mkldnn._linear_pointwise(rows, self.packed, None, 'none', [], '')[:n]
        elif self.scale is not None:
            y = F.linear(x.bfloat16(), self.weight.bfloat16())
        else:
            y = F.linear(x.to(self.weight.dtype), self.weight)
        y = y.float().view(n, -1)
        y = y if self.scale is None else y * self.scale
        y = y if self.bias is None else y + self.bias
        return y.view(*shape, -1)


def quantize_rows(weight):
    """weight: (N, K) -> (N, K) of int8 and (N,), the size of a step, so that their product is nearly the weight."""
    scale = weight.abs().amax(1).clamp(min=1e-12) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


@torch.no_grad()
def for_decoding(model, dtype, compile=False):
    """
    Make a GPT, in place, one that only decodes: its matrices in dtype (fp32, bf16, fp16 or int8), everything else in
    fp32, and with compile=True its steps of a single position compiled.

    Compiling takes seconds, the less the oftener it was done on this machine, and brings on the CPU a third of the time
    of a token in bf16; int8 without it is slower than bf16.
    """
    device = model.lm_head.weight.device
    is_packed = (device.type == 'cpu' and dtype == torch.bfloat16 and not compile
                 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    model.float().requires_grad_(False)
    model.lm_head = DecodeLinear(model.lm_head, dtype, is_packed)
    tables = [model.transformer.wte, *model.transformer['vte'].values()] if 'vte' in model.transformer else [
        model.transformer.wte]
    for table in tables:  # rows are looked up, not multiplied
        table.weight.data = table.weight.data.to(torch.bfloat16 if dtype == torch.int8 else dtype)
    if model.config.tie_embeddings and dtype != torch.int8:
        model.lm_head.weight = model.transformer.wte.weight
    for block in model.transformer.h:
        for part, name in ((block.attn, 'c_attn'), (block.attn, 'c_proj'), (block.mlp, 'c_fc'), (block.mlp, 'c_proj')):
            setattr(part, name, DecodeLinear(getattr(part, name), dtype, is_packed))
        if compile:
            block.compile(dynamic=False, options=COMPILE_OPTIONS if device.type == 'cpu' else None)
    if compile:
        model.lm_head.compile(dynamic=False, options=COMPILE_OPTIONS if device.type == 'cpu' else None)
    model.has_compiled_step = compile
    return model
