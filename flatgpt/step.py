"""
Run a block of a GPT on a few tokens by one call of products.cpp.

    step.replace(block, config.mlp)  # of a model for decoding

A step by torch's operations costs a call of Python for each, in all as long as half of the
products of a GPT of 124M parameters on two cores. Gates, and whatever else the call does not fit,
go to the block.
"""

import ctypes

import torch

from flatgpt import products
from flatgpt.products import FewQueries, address_of

MLPS = 'gelu', 'gelu_erf', 'swiglu', 'relu2'
ADDRESS, NUMBER = ctypes.c_void_p, ctypes.c_ssize_t


class Linear(ctypes.Structure):
    """Describe a DecodeLinear to products.cpp."""

    _fields_ = [*((name, ADDRESS) for name in ('weight', 'scale', 'bias')),
                *((name, NUMBER) for name in ('N', 'K', 'bytes'))]


class Norm(ctypes.Structure):
    """Describe a norm."""

    _fields_ = [('weight', ADDRESS), ('bias', ADDRESS), ('is_rms', NUMBER),
                ('eps', ctypes.c_double)]


class Block(ctypes.Structure):
    """Describe a block."""

    _fields_ = [*((name, Linear) for name in ('c_attn', 'attn_proj', 'c_fc', 'mlp_proj')),
                *((name, Norm) for name in ('ln_1', 'ln_2', 'q_norm', 'k_norm')),
                ('lambdas', ADDRESS), *((name, NUMBER) for name in 'HGD'), ('mlp', NUMBER)]


class Step(ctypes.Structure):
    """Describe the tokens, and where their keys and values are."""

    _fields_ = [('B', NUMBER), ('x', ADDRESS), ('x0', ADDRESS), ('value_embedding', ADDRESS),
                ('y', ADDRESS), ('cos', ADDRESS), ('sin', ADDRESS), ('rotation_step', NUMBER),
                ('slots', ADDRESS), ('slot_step', NUMBER), ('k', ADDRESS), ('v', ADDRESS),
                ('bytes', NUMBER), ('seen', ADDRESS), ('sizes', ADDRESS)]


def linear_of(linear):
    """Return the Linear of a DecodeLinear."""
    weight = linear.weight
    return Linear(weight.data_ptr(), address_of(linear.scale), address_of(linear.bias),
                  *weight.shape, weight.element_size())


def norm_of(norm):
    """Return the Norm of an nn.LayerNorm or nn.RMSNorm."""
    return Norm(norm.weight.data_ptr(), address_of(getattr(norm, 'bias', None)),
                isinstance(norm, torch.nn.RMSNorm), norm.eps)


def block_of(block, mlp):
    """Return the Block of a block of a model for decoding."""
    attn = block.attn
    norms = [norm_of(norm) if norm is not None else Norm(None, None, True, 1e-6 * attn.qk_norm)
             for norm in (attn.q_norm, attn.k_norm)]
    return Block(linear_of(attn.c_attn), linear_of(attn.c_proj), linear_of(block.mlp.c_fc),
                 linear_of(block.mlp.c_proj), norm_of(block.ln_1), norm_of(block.ln_2), *norms,
                 address_of(block.lambdas), attn.n_head, attn.n_kv_head, attn.head_size,
                 MLPS.index(mlp))


def replace(block, mlp):
    """Let block(x, context) run by products.cpp where it can. mlp: GPTConfig's."""
    linears = block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj
    most, plain = min(linear.most for linear in linears), block.forward
    described = block_of(block, mlp)

    def forward(x, context):
        n_rows = x.numel() // x.size(-1)
        if not isinstance(context.mask, FewQueries) or n_rows > most or x.dtype != torch.float32:
            return plain(x, context)
        x, seen, past = x.contiguous(), context.mask, context.past
        y, rotation, embedding = torch.empty_like(x), context.rotation, context.value_embedding
        embedding = None if embedding is None else embedding.float().contiguous()
        cos, sin = (None, None) if rotation is None else (part.contiguous() for part in rotation)
        n_slots = past.slots.numel()
        step = Step(n_rows, x.data_ptr(), address_of(context.x0), address_of(embedding),
                    y.data_ptr(), address_of(cos), address_of(sin),
                    0 if cos is None or cos.numel() * 2 == described.D else described.D // 2,
                    past.slots.data_ptr(), int(n_slots > 1), past.k.data_ptr(), past.v.data_ptr(),
                    past.k.element_size(), seen.seen.data_ptr(),
                    ctypes.addressof(seen.sizes_of(described.H, past.k)))
        products.load().run_block(ctypes.byref(described), ctypes.byref(step))
        return y

    has_gates = block.attn.head_gate is not None or block.attn.value_gate is not None
    if most and not has_gates:
        block.forward = forward
