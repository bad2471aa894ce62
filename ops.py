import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def visible(query, key, window):
    """
    Whether a query sees a key, given their positions, tensors that broadcast: it sees its own and those before it, with
    a window only the window - 1 before it.
    """
    seen = key <= query
    return seen & (key > query - window) if window else seen


def window_mask(window):
    """visible() as FlexAttention asks for it: of a batch, a head, and the indices of a query and a key."""
    return lambda b, h, query, key: visible(query, key, window)


class Dropout(nn.Dropout):
    """
    nn.Dropout, but cheap in compiled code on the CPU. There torch draws one random number after the other, which would
    take longer than the rest of a training step; instead each element's number is hashed from its index and a random
    key, a few vector instructions that fuse with what surrounds them.
    """

    def forward(self, x):
        if not (self.training and self.p > 0 and x.device.type == 'cpu' and torch.compiler.is_compiling()):
            return super().forward(x)
        h = torch.arange(x.numel(), dtype=torch.int32).view(x.shape) ^ torch.randint(2**31 - 1, (), dtype=torch.int32)
        for _ in range(2):  # multiply and fold the high bits down; 0x45D9F3B after Thomas Mueller's integer hash
            h = (h ^ ((h >> 16) & 0xFFFF)) * 0x45D9F3B
        h = (h ^ ((h >> 16) & 0xFFFF)) & 0x7FFFFFFF
        return torch.where(h >= round(self.p * 2**31), x / (1 - self.p), 0.0)


SHORT = 256  # positions up to which torch's attention on the CPU is faster in fp32, by up to twice (bench/results)


class GELU(nn.GELU):
    """
    GPT-2's GELU, 0.5 x (1 + tanh u) with u = sqrt(2/pi) (x + 0.044715 x^3), which is x sigmoid(2u): compiled for the
    CPU that form, with its one exp, takes half the time ("Gaussian Error Linear Units", Hendrycks & Gimpel 2016).
    """

    def forward(self, x):
        if self.approximate == 'tanh' and x.device.type == 'cpu' and torch.compiler.is_compiling():
            return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))
        return super().forward(x)


def softcapped(logits, cap):
    """Logits that stay within +-cap, in fp32 ("Gemma 2", Team Gemma 2024); with cap 0 as they are."""
    return cap * torch.tanh(logits.float() / cap) if cap else logits


CHUNK = 2**25  # logits that a loss needs at once, in fp32 128 MB; more where 16 compiled chunks don't suffice


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    The head and its cross-entropy in one, for a chunk of rows after the other, so that all logits are never there at
    once: in fp32 those of 64 x 1024 tokens of GPT-2's vocabulary take 13 GB, and their gradient as much again. Each
    chunk's share of the gradients is computed with its loss; to compute its logits again in the backward pass would
    cost a third more ("Cut Your Losses", Wijmans et al. 2024; "Liger Kernel", Hsu et al. 2024). Differentiable once.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, softcap, dtype, needs_gradient, is_frozen):
        """
        x: (N, C). weight: (V, C). targets: (N,), negative for none. dtype: of products. is_frozen: the weight needs no
        gradient. -> sum of losses
        """
        w, ids = weight.to(dtype), torch.arange(len(weight), device=x.device)
        total = torch.zeros((), device=x.device)
        dx, dw = [], torch.zeros_like(weight) if needs_gradient and not is_frozen else None
        n_chunks = -(-len(x) * len(w) // CHUNK)
        if torch.compiler.is_compiling():
            n_chunks = min(16, n_chunks)  # each is code of its own
        for rows, target in zip(x.to(dtype).chunk(n_chunks), targets[:, None].chunk(n_chunks), strict=True):
            logits = softcapped(rows @ w.T, softcap).float()
            log_p, counts = F.log_softmax(logits, dim=-1), target >= 0
            total -= torch.where(counts, log_p.gather(1, target.clamp(min=0)), 0.0).sum()
            if needs_gradient:
                p = log_p.exp()
                d = torch.where(ids == target, p - 1, p)  # by the logits; then by what the softcap took
                d = (d * (1 - (logits / softcap).square()) if softcap else d).to(dtype)
                dx.append((d @ w) * counts)
                if not is_frozen:
                    dw += d.T @ (rows * counts)
        if needs_gradient:
            ctx.save_for_backward(torch.cat(dx).to(x.dtype), dw)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total):
        dx, dw = ctx.saved_tensors
        return d_total * dx, None if dw is None else d_total * dw, None, None, None, None, None
