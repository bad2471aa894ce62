"""
Compute a GPT's FLOPs, parameters and memory from its shapes, part by part.

    costs.flops(GPTConfig(), 1024)        # {'projections': ..., 'scores': ..., ...}
    costs.memory(GPTConfig(), 8, 1024)    # {'weights': ..., 'gradients': ..., ...}

B sequences of T positions. Units are bytes and FLOPs, never MB or GFLOP. memory() is that of eager
code without recomputation.
"""

from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ops
from model import GPT

PARTS = ('projections', 'scores', 'MLP', 'head')  # projections and scores are attention


def widths(config):
    """Return the channels of q, of q, k and v, before and after the MLP's activation."""
    c = config
    return (c.n_head * c.head_size, (c.n_head + 2 * c.kv_heads) * c.head_size,
            c.mlp_width * (2 if c.mlp == 'swiglu' else 1), c.mlp_width)


def flops(config, T):
    """Return {part: FLOPs of a token's forward pass in a context of T}.

    A product of (m, k) and (k, n) takes 2 m k n FLOPs. The backward pass takes two such products,
    one for each factor's gradient. Nothing is subtracted for causality, as is customary. Looking up
    an embedding takes no FLOPs.
    """
    c, (q, qkv, n_in, n_out) = config, widths(config)
    seen = sum(min(c.window_of(layer) or T, T) for layer in range(c.n_layer))
    return {'projections': 2 * (c.n_layer * c.n_embd * (qkv + q) + gates(c)),
            'scores': 4 * q * seen,
            'MLP': 2 * c.n_layer * c.n_embd * (n_in + n_out),
            'head': 2 * c.n_embd * c.vocab_size}


def gates(config):
    """Return the parameters of the gates of heads and of value embeddings."""
    c = config
    n_values = sum(map(c.has_value_embedding, range(c.n_layer)))
    return min(12, c.n_embd) * (c.n_layer * c.n_head * c.head_gates
                                + n_values * c.kv_heads * c.value_gates)


def parameters(config):
    """Return {part: parameters}; a tied head counts as embeddings."""
    c, (q, qkv, n_in, n_out) = config, widths(config)
    qkv_bias = c.bias if c.qkv_bias is None else c.qkv_bias
    norm = c.n_embd * (2 if c.norm == 'layernorm' and c.bias else 1)
    n_value_embeddings = sum(map(c.has_value_embedding, range(c.n_layer)))
    positions = c.block_size if c.pos == 'learned' else 0
    return {
        'projections': c.n_layer * (c.n_embd * (qkv + q) + qkv_bias * qkv + c.bias * c.n_embd)
        + gates(c),
        'scores': 0,
        'MLP': c.n_layer * (c.n_embd * (n_in + n_out) + c.bias * (n_in + c.n_embd)),
        'head': 0 if c.tie_embeddings else c.vocab_size * c.n_embd,
        'embeddings': (c.vocab_size + positions) * c.n_embd
        + n_value_embeddings * c.vocab_size * c.kv_heads * c.head_size,
        'norms': (2 * c.n_layer + 1) * norm
        + c.n_layer * (2 * c.head_size * c.qk_norm_weight + 2 * c.residual_lambdas)}


def kv_cache(config, B, T, item=2):
    """Return the bytes of the keys and values, for numbers of `item` bytes."""
    return 2 * config.n_layer * B * T * config.kv_heads * config.head_size * item


class How(NamedTuple):
    """Describe how a step computes."""

    item: int = 2  # bytes of a product's inputs: 2 in bf16 by autocast, 4 in fp32
    compiled: bool = False
    on_gpu: bool = True
    chunked: bool = True  # compute a large loss in chunks, which fp16 excludes

EAGER = How()


def activations(config, B, T, how=EAGER):
    """Return the bytes that autograd keeps: (of one layer, of all else).

    The residual stream and the losses are in fp32. The (T, T) attention weights are not kept where
    kernels compute them twice; see blocked_heads() for the CPU. Holds for the architectures of
    config.presets and similar ones.
    """
    c, (_, _, _, n_out) = config, widths(config)
    is_rms, item = c.norm == 'rmsnorm', how.item
    keeps_output = is_rms and not how.on_gpu  # torch's CPU kernel is made of several operators
    norm = 4 * c.n_embd * (2 if keeps_output else 1)
    logits = 4 * c.vocab_size * (2 if c.logit_softcap else 1)
    if how.chunked and B * T * c.vocab_size > ops.CHUNK:
        # ops.sum_in_chunks() keeps a gradient instead
        logits = item * c.n_embd
    rest = B * T * (norm + item * c.n_embd + logits)
    if how.compiled:
        return compiled_layer(config, B, T, how), rest
    activation = item * (3 if c.mlp == 'swiglu' else 1) * n_out
    mask = (1 if how.on_gpu else item) * 2 * c.n_embd * (c.dropout > 0)
    layer = B * T * (2 * norm + inputs_of_products(c, item) + activation + mask)
    return layer + heads(config, B, T, how), rest


def inputs_of_products(config, item):
    """Return the bytes per token of the inputs of a layer's four products."""
    q, _, _, n_out = widths(config)
    return item * (2 * config.n_embd + q + n_out)


def heads(config, B, T, how):
    """Return the bytes that torch's attention kernels keep, without output."""
    c, item, (q, qkv, *_) = config, how.item, widths(config)
    qk = (qkv + q) // 2
    is_short = not how.on_gpu and T <= ops.SHORT  # ops.plain_attention computes these in fp32
    kept = 4 * c.n_head + item * (c.pos == 'rope') * qk  # rotated q and k are copies
    kept += item * c.head_gates * q  # beside the gated output
    kept += item * qkv + 4 * qk * (c.qk_norm and item < 4)  # normed ones are copies in fp32
    kept += is_short * (item < 4) * ((4 - item) * qkv + 4 * q)
    if c.dropout and not how.on_gpu:  # torch writes it out: weights, random numbers, their product
        kept += 3 * c.n_head * T * (4 if is_short else item)
    return B * T * kept


def compiled_layer(config, B, T, how):
    """Return the bytes that a compiled block keeps, without copies of its weights.

    It computes norms and activation functions again in the backward pass, from the inputs and
    outputs of its products. Attention is ops.blocked_attention() on the CPU in short contexts.
    """
    c, item, (q, qkv, n_in, _) = config, how.item, widths(config)
    stats = 4 * (2 if c.norm == 'layernorm' else 1)
    qk, n_heads = (qkv + q) // 2, c.n_head + c.kv_heads
    kept = 4 * c.n_embd + 2 * stats + inputs_of_products(c, item) + item * (c.n_embd + n_in)
    if not how.on_gpu and (T <= ops.CACHED or c.dropout):
        kept += c.qk_norm * (item * qkv + 4 * n_heads)
        return B * T * kept + blocked_heads(config, B, T, item)
    kept += item * qkv + (c.pos == 'rope') * item * qk + 4 * c.n_head + 4 * n_heads * c.qk_norm
    return B * T * kept


def blocked_heads(config, B, T, item):
    """Return the bytes that ops.blocked_attention() keeps, with copies of q, k, v."""
    c, size = config, max(64, T // 8)
    ends = [min(start + size, T) for start in range(0, T, size)]
    pairs = sum(min(size, T - (end - size)) * end for end in ends)
    weights = c.n_head * pairs * (4 + item * (item < 4 or c.dropout > 0))
    return B * (weights + item * c.head_size * (c.n_head * T + 2 * c.kv_heads * sum(ends)))


def memory(config, B, T, optimizer='adamw'):
    """Return {part: bytes} of training in bf16 with fp32 weights and moments."""
    n = sum(parameters(config).values())
    # Muon has one moment for a matrix, AdamW two
    matrices = config.n_layer * config.n_embd * sum(widths(config)) if optimizer == 'muon' else 0
    layer, rest = activations(config, B, T)
    return {'weights': 6 * n, 'gradients': 4 * n,
            'moments': 8 * n - 4 * matrices, 'activations': config.n_layer * layer + rest}


def counted(config, B, T):
    """Return the FLOPs of the forward and of the backward pass by torch's own counter."""
    # fake tensors have shapes and no numbers; the counter cannot look into attention kernels
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        model, (x, y) = GPT(config), torch.zeros(2, B, T, dtype=torch.long)
        with FlopCounterMode(display=False) as forward:
            loss = model(x, y)[1]
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def element_wise(config):
    """Return the bytes per token that a step moves beside its products.

    Each operation reads and writes whole tensors: norms (2 forward, 3 backward), additions to the
    residual stream (3, 3), the activation, gradients of q, k, v and of biases, the loss.
    """
    c, (_, qkv, n_in, n_out) = config, widths(config)
    layer = (22 * c.n_embd + 3 * n_in + 2 * n_out + 2 * qkv
             + c.bias * (qkv + n_in + 2 * c.n_embd))
    return 4 * (c.n_layer * layer + 6 * c.vocab_size)


def adamw(config):
    """Return the bytes of an AdamW step: 4 tensors read, 3 written, 3 to clip."""
    return 40 * sum(parameters(config).values())
