"""
What a GPT costs, from its shapes alone: FLOPs, parameters and memory, part by part. flops.py draws it.

    costs.flops(GPTConfig(), 1024)        # {'projections': ..., 'scores': ..., 'MLP': ..., 'head': ...}
    costs.memory(GPTConfig(), 8, 1024)    # {'weights': ..., 'gradients': ..., 'moments': ..., 'activations': ...}

B sequences, T positions, in layers of n_embd channels; bytes or FLOPs everywhere, never MB or GFLOP. Memory is that of
code which is not compiled, without dropout and without recomputation.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import GPT
from ops import CHUNK

PARTS = ('projections', 'scores', 'MLP', 'head')  # the first two are attention; scores: and values mixed by them


def widths(config):
    """-> channels of queries, of queries, keys and values together, before the MLP's activation and after it."""
    c = config
    return (c.n_head * c.head_size, (c.n_head + 2 * c.kv_heads) * c.head_size,
            c.mlp_width * (2 if c.mlp == 'swiglu' else 1), c.mlp_width)


def flops(config, T):
    """
    -> {part: FLOPs of a token's forward pass through all layers, in a context of T}. A product of (m, k) and (k, n) is
    2 m k n of them. A backward pass is two such products, for the gradients of both factors: twice as many. Nothing
    off for causality, as is customary. Looking up an embedding is no arithmetic.
    """
    c, (q, qkv, n_in, n_out) = config, widths(config)
    seen = sum(min(c.window_of(layer) or T, T) for layer in range(c.n_layer))
    return {'projections': 2 * c.n_layer * c.n_embd * (qkv + q), 'scores': 4 * q * seen,
            'MLP': 2 * c.n_layer * c.n_embd * (n_in + n_out), 'head': 2 * c.n_embd * c.vocab_size}


def parameters(config):
    """-> {part: parameters}; biases with their matrices. Their sum is model.get_num_params(non_embedding=False)."""
    c, (q, qkv, n_in, n_out) = config, widths(config)
    qkv_bias = c.bias if c.qkv_bias is None else c.qkv_bias
    norm = c.n_embd * (2 if c.norm == 'layernorm' and c.bias else 1)
    return {'projections': c.n_layer * (c.n_embd * (qkv + q) + qkv_bias * qkv + c.bias * c.n_embd), 'scores': 0,
            'MLP': c.n_layer * (c.n_embd * (n_in + n_out) + c.bias * (n_in + c.n_embd)),
            'head': 0 if c.tie_embeddings else c.vocab_size * c.n_embd,
            'embeddings': (c.vocab_size + (c.block_size if c.pos == 'learned' else 0)) * c.n_embd
            + sum(map(c.has_value_embedding, range(c.n_layer))) * c.vocab_size * c.kv_heads * c.head_size,
            'norms': (2 * c.n_layer + 1) * norm + c.n_layer * (2 * c.head_size * c.qk_norm_weight
                                                              + 2 * c.residual_lambdas)}


def kv_cache(config, B, T, item=2):
    """-> bytes of the keys and values of B sequences of T tokens, numbers of `item` bytes."""
    return 2 * config.n_layer * B * T * config.kv_heads * config.head_size * item


def activations(config, B, T, item=2):
    """
    -> (bytes of a layer, bytes of the rest) that autograd keeps from the forward pass for the backward pass, in
    model.PRESETS and their like. item: bytes of what a product reads, 2 in bf16 by autocast; the residual stream and
    the losses are in fp32. The (T, T) weights of attention are not kept: the kernels compute them twice.
    """
    c, (q, qkv, _, n_out) = config, widths(config)
    qk = (qkv + q) // 2
    norm = 4 * c.n_embd * (2 if c.norm == 'rmsnorm' else 1)  # its input; on CPUs RMSNorm keeps it normalised, too
    inputs = item * (2 * c.n_embd + q + n_out)  # of the four linear layers
    heads = item * (qkv + (c.pos == 'rope') * qk) + 4 * c.n_head  # rotated ones are another copy
    heads += 4 * qk * (c.qk_norm and item < 4)  # and so are those that are normed, in fp32
    bent = item * (3 if c.mlp == 'swiglu' else 1) * n_out  # for the activation function's gradient
    logits = 4 * c.vocab_size * (2 if c.logit_softcap else 1)
    if B * T * c.vocab_size > CHUNK:  # model.ChunkedCrossEntropy keeps a gradient instead
        logits = 4 * c.n_embd
    return B * T * (2 * norm + inputs + heads + bent), B * T * (norm + item * c.n_embd + logits)


def memory(config, B, T, optimizer='adamw', item=2):
    """-> {part: bytes} of training: weights, gradients and moments in fp32, products in numbers of `item` bytes."""
    each = parameters(config)
    n = sum(each.values())
    matrices = config.n_layer * config.n_embd * sum(widths(config)) if optimizer == 'muon' else 0  # have one moment
    layer, rest = activations(config, B, T, item)
    return {'weights': 4 * n + (item * n if item < 4 else 0), 'gradients': 4 * n, 'moments': 8 * n - 4 * matrices,
            'activations': config.n_layer * layer + rest}


def counted(config, B, T):
    """-> FLOPs of the forward and of the backward pass of B sequences of T tokens, as torch counts them."""
    # fake tensors are shapes without numbers; the counter sees products, not what is inside torch's attention kernels
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        model, (x, y) = GPT(config), torch.zeros(2, B, T, dtype=torch.long)
        with FlopCounterMode(display=False) as forward:
            loss = model(x, y)[1]
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def element_wise(config):
    """
    -> bytes a token that a step moves beside its products, uncompiled and in fp32, each operation reading and writing
    whole tensors: norms 2 forward and 3 backward, sums into the residual stream 3 and 3, the activation function, the
    gradients of q, k and v side by side, those of biases, the loss.
    """
    c, (_, qkv, n_in, n_out) = config, widths(config)
    layer = 22 * c.n_embd + 3 * n_in + 2 * n_out + 2 * qkv + c.bias * (qkv + n_in + 2 * c.n_embd)
    return 4 * (c.n_layer * layer + 6 * c.vocab_size)


def adamw(config):
    """-> bytes of an AdamW step: weights, two moments, read and written, gradients read, and 3 more to clip them."""
    return 40 * sum(parameters(config).values())
