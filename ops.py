"""
Compute what model.py defines, faster: attention, dropout, GELU, cross-entropy.

Each has a plain form, torch's own, and forms that are faster in some situation. The form is chosen
here, by device, precision, size and compiler. tests/test_ops.py compares values and gradients with
those of the plain form; bench/results has the times behind each choice. Shapes: as in model.py.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.flex_attention import (
    BlockMask,
    create_block_mask,
    flex_attention,
)

SHORT = 256  # positions up to which CPU attention in fp32 beats bf16, by up to twice
CACHED = 512  # positions up to which the weights of blocked attention stay in the CPU's cache
DOCUMENT = 32  # bits of an id; the number of its document may come above them
is_training_compiled = False  # runtime.compile_training() sets it
CHUNK = 2**25  # logits that a loss holds at once, four times as many on a GPU: 128 MB in fp32
# torch adds products of bf16 to fp32 on an NVIDIA GPU
ADDS_IN_FP32 = torch.__version__ >= (2, 10) and torch.version.hip is None


@cache
def compiled(function):
    """Return a function, compiled for the shapes of each call."""
    return torch.compile(function, dynamic=False)


# Attention ----------------------------------------------------------------------------------------


class InDocuments(NamedTuple):
    """Hide the keys of other documents from a query, in a window or (0) without one."""

    window: int
    documents: Tensor  # (B, T), the number of each position's document


class InPieces(NamedTuple):
    """Divide the T queries of one row among sequences that keep their keys in rows.

    pieces: (start, end, row, n_keys) each: queries start:end attend to the first n_keys of a row.
    """

    window: int
    pieces: list


def attention(q, k, v, mask=0, dropout=0.0):
    """Attend from each query to the keys up to its own position; -> (B, H, T, D).

    q: (B, H, T, D), the last T of S positions. k, v: (B, G, S, D), each for H / G query heads.
    mask: the window, the number of positions a query sees, its own included, 0 for all; or
    (B or 1, 1, T, S) of bool, True where a query sees a key; or InDocuments; or what
    mask_in_window() returns; or InPieces, for q (1, H, T, D) and k, v (rows, G, S, D); or a
    function of q, k and v that attends. dropout: probability of each weight.
    """
    if callable(mask):
        return mask(q, k, v)
    if isinstance(mask, InPieces):
        return torch.cat([attention(q[:, :, start:end], k[row : row + 1, :, :n_keys],
                                    v[row : row + 1, :, :n_keys], mask.window)
                          for start, end, row, n_keys in mask.pieces], dim=2)
    form, T, is_compiled = plain_attention, q.size(2), torch.compiler.is_compiling()
    if isinstance(mask, BlockMask):
        form = flex_attention_in_window
    elif q.device.type == 'cpu':
        # the mask is of a whole sequence without a cache
        is_square = is_compiled and not torch.is_tensor(mask) and T == k.size(2)
        window = mask[0] if isinstance(mask, InDocuments) else mask
        if is_square and (min(T, window or T) <= CACHED or dropout):
            form = blocked_attention
        elif T == 1 and torch.is_tensor(mask) and not dropout:
            form = single_query_attention
    return form(q.to(k.dtype), k, v, mask, dropout).to(q.dtype)  # cached keys may have fewer bits


def plain_attention(q, k, v, mask, dropout):
    """Attend by torch's kernels, the reference for the other forms."""
    T, is_causal = q.size(2), False
    if q.device.type == 'cpu' and q.dtype == torch.bfloat16 and T <= SHORT:
        with torch.autocast('cpu', enabled=False):
            return plain_attention(q.float(), k.float(), v.float(), mask, dropout)
    if isinstance(mask, InDocuments):
        positions = torch.arange(T, device=q.device)
        mask = visible(positions[:, None], positions, mask.window) & same_document(
            mask.documents, slice(None), slice(None))  # (B, 1, T, T)
    if not torch.is_tensor(mask):
        window, mask = mask, None
        if window:  # skip the keys that no query sees
            k, v = k[:, :, -(T + window - 1) :], v[:, :, -(T + window - 1) :]
        S = k.size(2)
        is_causal = T == S and (not window or T <= window)
        if T > 1 and not is_causal:  # a single query sees all keys that are left
            positions = torch.arange(S, device=q.device)
            mask = visible(positions[-T:, None], positions, window)  # (T, S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal,
                                          dropout_p=dropout, enable_gqa=k.size(1) < q.size(1))


def blocked_attention(q, k, v, mask, dropout):
    """Attend by blocks of queries, without the keys after them and before the window.

    Compiled for the CPU it takes half the time of torch's flash kernel up to CACHED positions, and
    half of torch's form with dropout. Half of the (B, H, T, T) weights are kept.
    """
    T, D, G = q.size(2), q.size(3), k.size(1)
    window, documents = mask if isinstance(mask, InDocuments) else (mask, None)
    y, start = [], 0
    for q_block in q.split(max(64, T // 8), dim=2):
        n = q_block.size(2)
        first, end = max(0, start - window + 1) if window else 0, start + n
        keys, values = k[:, :, first:end], v[:, :, first:end]
        # the queries that share a head of keys are rows of one product
        rows = q_block.unflatten(1, (G, -1)).flatten(2, 3)  # (B, G, H / G * n, D)
        scores = (rows @ keys.transpose(2, 3)).float()  # (B, G, H / G * n, keys)
        scores = scores.unflatten(2, (-1, n)) * D**-0.5  # (B, G, H / G, n, keys)
        positions = torch.arange(first, end, device=q.device)
        hidden = ~visible(positions[-n:, None], positions, window)
        if documents is not None:
            same = same_document(documents, slice(start, end), slice(first, end))
            hidden = hidden | ~same[:, :, None]  # (B, 1, 1, n, keys)
        weights = drop(scores.masked_fill(hidden, -math.inf).softmax(dim=-1), dropout)
        mixed = weights.to(v.dtype).flatten(2, 3) @ values  # (B, G, H / G * n, D)
        y.append(mixed.unflatten(2, (-1, n)).flatten(1, 2))  # (B, H, n, D)
        start = end
    return torch.cat(y, dim=2)


def single_query_attention(q, k, v, mask, dropout=0.0):
    """Attend from one query, q (B, H, 1, D), by products written out, without dropout.

    torch's kernel for the CPU takes several times as long in bf16.
    """
    q = q.unflatten(1, (k.size(1), -1)).squeeze(3)  # (B, G, H / G, D)
    if torch.compiler.is_compiling():  # fused into one pass over the keys, and one over the values
        scores = (q.unsqueeze(3).float() * k.unsqueeze(2).float()).sum(-1)
    else:
        scores = (q @ k.transpose(2, 3)).float()  # (B, G, H / G, S)
    weights = (scores * q.size(3) ** -0.5).masked_fill(~mask, -math.inf).softmax(dim=-1)
    if torch.compiler.is_compiling():
        y = (weights.unsqueeze(4) * v.unsqueeze(2).float()).sum(3)
    else:
        y = weights.to(v.dtype) @ v
    return y.flatten(1, 2).unsqueeze(2)  # (B, H, 1, D)


def flex_attention_in_window(q, k, v, blocks, dropout=0.0):
    """Attend by FlexAttention, which skips keys outside the window, without dropout.

    A mask of all pairs would cost as much as attention to all ("Flex Attention", Dong et al. 2024).
    """
    return flex_attention(q, k, v, block_mask=blocks, enable_gqa=k.size(1) < q.size(1))


def mask_in_window(window, T, config, device, documents=None):
    """Return attention()'s mask of T positions, computed once for all layers.

    It is the window, or InDocuments; or FlexAttention's blocks of keys to train compiled blocks on
    a GPU. config: a GPTConfig; documents: (B, T), see InDocuments.
    """
    can_flex = (device.type == 'cuda' and config.head_size in (16, 32, 64, 128, 256)
                and not config.dropout and is_training_compiled and torch.is_grad_enabled())
    if documents is not None:
        return blocks_in_documents(window, documents) if can_flex else InDocuments(window,
                                                                                   documents)
    return blocks_in_window(window, T, device) if can_flex and 0 < window < T else window


def blocks_in_documents(window, documents):
    """Return the blocks in which a query sees a key of its document, of each sequence."""
    B, T = documents.shape

    def is_seen(b, h, i, j):
        return visible(i, j, window) & (documents[b, i] == documents[b, j])

    return compiled(create_block_mask)(is_seen, B, None, T, T, documents.device)


def split_documents(idx, has_numbers):
    """Split ids (B, T) from the numbers of documents above their DOCUMENT bits.

    -> ids, documents, positions in the documents, (B, T) each; without numbers the ids, None, and
    the positions (T,).
    """
    positions = torch.arange(idx.size(1), device=idx.device)
    if not has_numbers:
        return idx, None, positions
    documents = idx >> DOCUMENT
    is_first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    starts = (positions * is_first).cummax(dim=1).values
    return idx & (1 << DOCUMENT) - 1, documents, positions - starts


def same_document(documents, queries, keys):
    """Return whether slices of positions share documents, (B, 1, queries, keys)."""
    return documents[:, None, queries, None] == documents[:, None, None, keys]


@cache
def blocks_in_window(window, T, device):
    """Return the blocks of (T, T) in which a query sees a key of its window."""
    # eager, it holds several T x T tensors
    create = compiled(create_block_mask) if T > 8192 else create_block_mask
    return create(lambda b, h, i, j: visible(i, j, window), None, None, T, T, device)


def visible(query, key, window):
    """Return whether a query sees a key: its own, and all or window - 1 before it."""
    seen = key <= query
    return seen & (key > query - window) if window else seen


# Dropout and GELU ---------------------------------------------------------------------------------


def drop(x, p):
    """Set elements to 0 with probability p, and scale the others by 1 / (1 - p).

    torch compiled for the CPU draws its random numbers one by one, which takes longer than the rest
    of a training step. There each element's number is a hash of its index and one random key.
    """
    if not (p > 0 and x.device.type == 'cpu' and torch.compiler.is_compiling()):
        return F.dropout(x, p)
    index = torch.arange(x.numel(), dtype=torch.int32).view(x.shape)
    h = index ^ torch.randint(2**31 - 1, (), dtype=torch.int32)
    for _ in range(2):  # multiply and fold the high bits down, as Thomas Mueller's integer hash
        h = (h ^ ((h >> 16) & 0xFFFF)) * 0x45D9F3B
    h = (h ^ ((h >> 16) & 0xFFFF)) & 0x7FFFFFFF
    return torch.where(h >= round(p * 2**31), x / (1 - p), 0.0)


class Dropout(nn.Dropout):
    """Apply drop() in training."""

    def forward(self, x):
        return drop(x, self.p) if self.training else x


def tanh_gelu(x):
    """Compute GELU's tanh form (Hendrycks & Gimpel 2016).

    0.5 x (1 + tanh u), u = sqrt(2/pi) (x + 0.044715 x^3), is x sigmoid(2u). Compiled for the CPU
    that takes half the time: it has one exponential.
    """
    if x.device.type == 'cpu' and torch.compiler.is_compiling():
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))
    return F.gelu(x, approximate='tanh')


# Cross-entropy ------------------------------------------------------------------------------------


def softcapped(logits, cap):
    """Cap logits at +-cap, in fp32 ("Gemma 2", Team Gemma 2024). cap 0: unchanged."""
    return cap * torch.tanh(logits.float() / cap) if cap else logits


def cross_entropy(logits, targets):
    """Return the mean cross-entropy in nats of logits (B, T, V), of targets >= 0."""
    return total_cross_entropy(logits, targets) / n_targets(targets)


def total_cross_entropy(logits, targets):
    """Return the summed cross-entropy of logits (..., V), of targets >= 0."""
    # in fp32: a bf16 log-sum-exp would round the loss itself to three digits
    logits, ids = logits.float().view(-1, logits.size(-1)), targets.reshape(-1).clamp(min=-1)
    return F.cross_entropy(logits, ids, ignore_index=-1, reduction='sum')


def capped_cross_entropy(logits, targets, softcap):
    """Return cross_entropy() of capped logits."""
    return cross_entropy(softcapped(logits, softcap), targets)


def head_cross_entropy(x, head, targets, softcap):
    """Return cross_entropy(softcapped(head(x), softcap), targets), in chunks if large.

    x: (B, T, C), the input of the head. head: a module, C -> V channels.
    """
    is_large = type(head) is nn.Linear and targets.numel() * head.out_features > CHUNK
    # in fp16 a GradScaler's factor would come too late for the gradients computed here
    if not is_large or product_dtype(head.weight) == torch.float16:
        compute = capped_cross_entropy
        if x.is_cuda and is_training_compiled and torch.is_grad_enabled():
            compute = compiled(compute)
        return compute(head(x), targets, softcap)
    is_training = torch.is_grad_enabled()
    needs = [is_training, is_training and head.weight.requires_grad]
    rows, ids = x.flatten(0, 1).to(product_dtype(head.weight)), targets.flatten()  # (N, C), (N,)
    return sum_cross_entropy(rows, head.weight, ids, softcap, needs)[0] / n_targets(targets)


def n_targets(targets):
    """Count the targets, at least 1."""
    return (targets >= 0).sum().clamp(min=1)


def product_dtype(weight):
    """Return the precision in which a linear layer with this weight multiplies."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def loss_and_gradient(logits, target, softcap):
    """Return the summed cross-entropy of logits (N, V), and its gradient by them.

    target: (N, 1). softcap: see softcapped(); here tanh(x) is 2 sigmoid(2x) - 1, which compiles to
    half as many instructions.
    """
    ids, counts = torch.arange(logits.size(1), device=logits.device), target >= 0
    at_target = softcapped(logits.gather(1, target.clamp(min=0)), softcap).float()
    if 0 < softcap <= 64:  # then no exponential overflows, and no pass for the highest is needed
        z, highest = softcap * (2 * torch.sigmoid(2 / softcap * logits.float()) - 1), 0.0
    else:
        z = softcapped(logits, softcap).float()
        highest = z.amax(-1, keepdim=True)
    e = (z - highest).exp()
    total = e.sum(-1, keepdim=True)
    p = e * (counts / total)  # 0 in rows without a target
    d = torch.where(ids == target, p - 1, p)  # by the capped logits, then by the logits
    d = d * (1 - (z / softcap).square()) if softcap else d
    loss = torch.where(counts, total.log() + highest - at_target, 0.0).sum()
    return loss, d.to(logits.dtype)


def sum_in_chunks(x, weight, targets, softcap, needs):
    """Sum the cross-entropy of N rows in chunks, without holding all logits at once.

    x: (N, C), in the precision of the products; weight: (V, C); targets: (N,). needs: whether to
    compute dx, dw. -> the sum, dx (N, C), dw (V, C). The fp32 logits of 64 x 1024 tokens of GPT-2
    take 13 GB, and their gradient as much. Gradients are computed with the loss: to compute the
    logits again in the backward pass would cost a third more ("Cut Your Losses", Wijmans et al.
    2024; "Liger Kernel", Hsu et al. 2024).
    """
    w, (total, dx, dw) = weight.to(x.dtype), shapes_of_sum(x, weight, targets, softcap, needs)
    total.zero_(), dw.zero_()
    compute = compiled(loss_and_gradient) if is_training_compiled else loss_and_gradient
    # a GPU's products need more rows; compiled, no temporaries come with them
    n = max(1, (4 if x.is_cuda and is_training_compiled else 1) * CHUNK // len(w))
    for start in range(0, len(x), n):
        rows, target = x[start : start + n], targets[start : start + n, None]
        logits = rows @ w.T  # (n, V)
        if needs[0]:
            loss, d = compute(logits, target, softcap)
            torch.mm(d, w, out=dx[start : start + n])
            if needs[1] and x.is_cuda and x.dtype != dw.dtype and ADDS_IN_FP32:
                torch.addmm(dw, d.T, rows, out_dtype=dw.dtype, out=dw)
            elif needs[1]:
                dw += d.T @ rows
            del d
        else:
            loss = total_cross_entropy(softcapped(logits, softcap), target)
        total += loss
        del logits  # the next ones would be held beside them
    return total, dx, dw


def shapes_of_sum(x, weight, targets, softcap, needs):
    """Return tensors of the shapes that sum_in_chunks() returns."""
    dx, dw = (torch.empty_like(y) if is_needed else y.new_empty(0)
              for y, is_needed in zip((x, weight), needs, strict=True))
    return x.new_empty((), dtype=torch.float32), dx, dw


def keep_gradients(ctx, inputs, output):
    """Save dx and dw for the backward pass."""
    ctx.set_materialize_grads(False)  # no zeros for the gradients by dx and dw
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


@once_differentiable
def scale_gradients(ctx, d_total, *_):
    """Return the gradients by the inputs of sum_in_chunks()."""
    dx, dw = ctx.saved_tensors
    d_weight = d_total * dw if ctx.needs_input_grad[1] else None
    return d_total * dx, d_weight, None, None, None


# an operator of its own: torch.compile would merge the chunks of a function, and hold all of them
sum_cross_entropy = torch.library.custom_op(
    'flatgpt::sum_in_chunks', sum_in_chunks, mutates_args=(), schema='(Tensor x, Tensor weight, '
    'Tensor targets, float softcap, bool[] needs) -> (Tensor, Tensor, Tensor)')
sum_cross_entropy.register_fake(shapes_of_sum)
sum_cross_entropy.register_autograd(scale_gradients, setup_context=keep_gradients)


# Positions ----------------------------------------------------------------------------------------

def fill_yarn(scaling):
    """Fill in YaRN's numbers that a scaling lacks, as transformers does; -> dict."""
    factor = scaling.get('factor')
    is_number = isinstance(factor, int | float) and factor > 0
    attention = {'attention_factor': 0.1 * math.log(max(factor, 1.0)) + 1} if is_number else {}
    given = {name: value for name, value in scaling.items() if value is not None}
    return {'beta_fast': 32.0, 'beta_slow': 1.0, **attention, **given}


# kinds of GPTConfig.rope_scaling, and the numbers that each needs
ROPE_SCALINGS = {
    'linear': ('factor',),
    'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'),
    'yarn': ('factor', 'beta_fast', 'beta_slow', 'original_max_position_embeddings',
             'attention_factor')}


def fault_of_scaling(scaling, pos):
    """Return what is wrong with a GPTConfig's rope_scaling, None if nothing is."""
    for name in ROPE_SCALINGS.get(str(scaling.get('rope_type')), ['rope_type']):
        value = scaling.get(name)
        if pos != 'rope' or not (isinstance(value, int | float) and 0 < value < 1e30):
            return (f'rope_scaling: {name} is {value!r}, expected a number above 0 and below 1e30, '
                    f"beside pos='rope'; known are {ROPE_SCALINGS}")
    return None


def slow_down(frequencies, base, scaling):
    """Divide RoPE's frequencies (D/2,) by the factor of a longer context.

    'linear' divides all of them ("Position Interpolation", Chen et al. 2023). 'llama3' and 'yarn'
    keep those that turn often in the original context, and blend the two between two numbers of
    turns: 'llama3' linearly in the turns ("The Llama 3 Herd of Models", 2024, and its code),
    'yarn' linearly in the channel, from whole channels on ("YaRN", Peng et al. 2023).
    """
    slow = frequencies / scaling['factor']
    if scaling['rope_type'] == 'linear':
        return slow
    turns = scaling['original_max_position_embeddings'] / (2 * math.pi)  # at frequency 1
    if scaling['rope_type'] == 'llama3':
        low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
        kept = ((turns * frequencies - low) / (high - low)).clamp(0, 1)
    else:
        n = 2 * len(frequencies)
        first, last = (n * math.log(turns / scaling[name]) / (2 * math.log(base))
                       for name in ('beta_fast', 'beta_slow'))
        first, last = max(math.floor(first), 0), min(math.ceil(last), n - 1)
        channels = torch.arange(n // 2, device=frequencies.device)
        kept = 1 - ((channels - first) / max(last - first, 0.001)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * slow
