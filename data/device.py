"""Keep the tokens of a split in a GPU's memory, and cut its windows there."""

import numpy as np
import torch

from data.tokens import Rows, Shards, open_tokens, to_device, unknown_id


def open_splits(data_dir, meta, block_size, device, n_ids):
    """Open {'train': tokens, 'val': tokens}; on a GPU as DeviceTokens if they fit."""
    splits = {split: open_tokens(data_dir, split, meta, block_size) for split in ('train', 'val')}
    if fits_on(device, splits.values()):
        splits = {split: DeviceTokens(tokens, device, n_ids) for split, tokens in splits.items()}
    return splits


def fits_on(device, splits):
    """Return whether DeviceTokens of all splits are worth their memory.

    They are on a GPU for running text below a tenth of its free memory and below a gigabyte. More
    would take seconds to read before the first step.
    """
    if device.type != 'cuda' or any(isinstance(tokens, Rows) for tokens in splits):
        return False
    arrays = [array for tokens in splits for array in arrays_of(tokens)]
    if any(array.dtype not in (np.uint16, np.uint32) for array in arrays):
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return sum(array.nbytes for array in arrays) < min(2**30, free / 10)


def arrays_of(tokens):
    """Return the arrays that tokens are made of."""
    return tokens.arrays if isinstance(tokens, Shards) else [tokens]


class DeviceTokens:
    """Keep the tokens of a split in a GPU's memory, and cut its windows there.

    The CPU only sends their first positions, so it stays ahead of steps of a few milliseconds.
    """

    def __init__(self, tokens, device, vocab_size):
        """Copy the tokens. Raises UserError on an id that the model has no embedding for."""
        arrays, chunk = arrays_of(tokens), 2**24
        bits = 8 * arrays[0].itemsize
        self.mask = 2**bits - 1
        # torch computes little with unsigned integers: the bits are kept as signed ones
        self.ids = torch.empty(len(tokens), dtype=getattr(torch, f'int{bits}'), device=device)
        position = 0
        for piece in (array[i : i + chunk] for array in arrays
                      for i in range(0, len(array), chunk)):
            if piece.max() >= vocab_size:
                raise unknown_id(position + piece.argmax(), piece.max(), vocab_size)
            end = position + len(piece)
            self.ids[position:end] = torch.from_numpy(piece.astype(f'int{bits}'))
            position = end

    def __len__(self):
        return len(self.ids)

    def gather(self, starts, block_size):
        """Return gather()'s x and y, on the device."""
        starts, = to_device((torch.from_numpy(starts),), self.ids.device)
        index = starts[:, None] + torch.arange(block_size + 1, device=starts.device)
        ids = self.ids[index.clamp(max=len(self) - 1)].long() & self.mask
        is_outside = index >= len(self)
        x = ids[:, :-1].masked_fill(is_outside[:, :-1], 0)
        return x, ids[:, 1:].masked_fill(is_outside[:, 1:], -1)
