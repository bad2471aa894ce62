"""
Keep keys and values, so that a new token costs one position, not the context.

    cache = KVCache(model.config, batch_size=2)
    logits, _ = model(prompt, cache=cache)   # (2, T)
    logits, _ = model(next_id, cache=cache)  # (2, 1), which continues the prompt
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from flatgpt import products
from ops import visible


class LayerCache(NamedTuple):
    """Hold k and v of one layer, (B, G, S, D), and the slots (T,) of new tokens.

    A block takes this instead of the cache and its number: each number would be compiled anew.
    """

    k: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor

    def update(self, k, v):
        """Write the new tokens' (B, G, T, D); -> those of all tokens, (B, G, S, D)."""
        self.k.index_copy_(2, self.slots, k.to(self.k.dtype))
        self.v.index_copy_(2, self.slots, v.to(self.v.dtype))
        return self.k, self.v


class KVCache:
    """Keep keys and values of all layers and tokens.

    k, v: (n_layer, B, G, S, D), of which `length` slots are filled. S grows up to max_length.
    padding: None, or (B,), the empty slots before each row's first token; all rows end together.
    Memory: 2 n_layer B S G D numbers; GPT-2 (124M) with 1 x 1024 tokens in fp32: 75 MB.
    """

    def __init__(self, config, batch_size, device=None, dtype=None, max_length=None):
        self.max_length = max_length or config.block_size
        shape = config.n_layer, batch_size, config.kv_heads, 0, config.head_size
        self.k, self.v = torch.zeros(2, *shape, device=device, dtype=dtype)
        self.length, self.padding = 0, None
        self.next_slot = torch.zeros(1, dtype=torch.long, device=device)  # length, in a CUDA graph

    def restart(self, padding=None):
        """Empty the cache in place, since a CUDA graph records addresses."""
        self.go_back_to(0)
        if self.padding is None or padding is None:
            self.padding = padding
        else:
            self.padding.copy_(padding)

    def go_back_to(self, length):
        """Forget all but the first `length` tokens."""
        self.length = length
        self.next_slot.fill_(length)

    def make_room(self, B, T):
        """Grow to hold T more tokens of B rows. Raises ValueError past max_length."""
        rows, S, needed = self.k.size(1), self.k.size(3), self.length + T
        if B != rows:
            raise ValueError(f'the cache was made for a batch of {rows}, but the tokens are a '
                             f'batch of {B}')
        if needed > self.max_length:
            raise ValueError(f'the cache has room for {self.max_length} tokens, but {self.length} '
                             f'+ {T} are needed: expected max_length={needed} or more')
        if needed > S:
            more = min(self.max_length, -(-needed // 128) * 128) - S
            self.k, self.v = (F.pad(part, (0, 0, 0, more)) for part in (self.k, self.v))

    def start(self, B, T):
        """Make room for T tokens of B rows; -> positions, (T,), or (B, T) behind padding."""
        self.make_room(B, T)
        self.slots = self.next_slot + torch.arange(T, device=self.k.device)
        return self.slots if self.padding is None else (
            self.slots - self.padding[:, None]).clamp(min=0)

    def layer(self, layer, T):
        """Return the LayerCache for the T tokens that start() made room for."""
        S = self.k.size(3) if T == 1 else self.length + T  # all S: one shape for a compiled step
        return LayerCache(self.k[layer, :, :, :S], self.v[layer, :, :, :S], self.slots)

    def advance(self, T):
        """Count T slots as filled."""
        self.length += T
        self.next_slot += T

    def mask(self, T, window):
        """Return the mask of T queries for ops.attention().

        It is (B or 1, 1, T, S) of bool, a function, or None: causal.
        """
        fits = products.FewQueries.fits(self.k, self.k.size(1), T)
        if T > 1 and self.padding is None and not fits:
            return None
        slots = torch.arange(self.k.size(3) if T == 1 else self.length + T, device=self.k.device)
        queries = (self.next_slot + slots[:T])[:, None]
        seen = visible(queries, slots, window)
        if self.padding is None:
            seen = seen[None, None]
        else:  # padding attends to itself, since a softmax over nothing is NaN
            seen = (seen & (slots >= self.padding[:, None, None]) | (slots == queries))[:, None]
        return products.FewQueries(seen) if fits else seen

    def keep(self, rows):
        """Keep these rows, a tensor of numbers, without the slots that are padding in all."""
        unused = 0
        if self.padding is not None:
            self.padding = self.padding[rows]
            unused = min(int(self.padding.min()), self.length)
            self.padding -= unused
        self.k, self.v = self.k[:, rows, :, unused:], self.v[:, rows, :, unused:]
        self.go_back_to(self.length - unused)

    def fill(self, rows, part, T):
        """Copy a cache of some rows so that it ends at slot T; then advance(T)."""
        self.make_room(self.k.size(1), T)
        for whole, new in ((self.k, part.k), (self.v, part.v)):
            whole[:, rows, :, T - part.length : T] = new[:, :, :, : part.length]
