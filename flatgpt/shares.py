"""
Share the items of a step among processes, and put the results together.

    world, device = join('auto')                       # under torchrun only one process prints
    results = gather(compute(items[world.rank :: world.size]), world)  # in the order of items
    add_gradients(model, world)                        # as if one process had seen all items
    agree_to_stop(run)

Every process has all items of a step and computes every world.size-th of them. Each of these
functions must be called by all processes.
"""

import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist

from flatgpt import parallel, runtime

AT_ONCE = 2**25  # numbers in an exchange: 128 MB in fp32


def join(device):
    """Join the processes of torchrun; -> (World, torch.device of this process).

    The standard output of all but the main process is dropped. Raises UserError for a device that
    is not here.
    """
    world = parallel.from_environment()
    torch_device = runtime.choose_device(device, world.local_rank)
    if not world.is_main:
        sys.stdout = open(os.devnull, 'w', encoding='utf-8')
    parallel.connect(world, torch_device, 'auto')
    return world, torch_device


def gather(results, world):
    """Return the results of all processes, a list in the order of the items.

    results: one of each item in items[world.rank :: world.size].
    """
    parts = [results] * world.size
    if world.size > 1:
        dist.all_gather_object(parts, results)
    whole = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        whole[rank :: world.size] = part
    return whole


@torch.no_grad()
def add_up(tensors, world):
    """Add tensors of one dtype and device up over the processes, in place.

    Small ones share an exchange. Where each process has filled rows of zeros of its own, the sum
    has all rows, bit for bit.
    """
    if world.size == 1:
        return
    buckets, room = [], 0
    for tensor in tensors:
        if not buckets or tensor.numel() > room:
            buckets.append([])
            room = AT_ONCE
        buckets[-1].append(tensor)
        room -= tensor.numel()
    for bucket in buckets:
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def add_gradients(model, world):
    """Add a model's gradients up over the processes, zeros where there are none."""
    if world.size == 1:
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    add_up([p.grad for p in trained], world)


@contextmanager
def together(world):
    """End all processes if the block raises an error in one, which alone prints it.

    The block must not exchange anything with the other processes.
    """
    error = None
    try:
        yield
    except (Exception, SystemExit) as raised:
        error = raised
    n_failed = sum(world.sum([error is not None]))
    if error is not None:
        raise error
    if n_failed:
        raise SystemExit(1)


def agree_to_stop(run):
    """Stop the run after this step in all processes if one of them was asked to."""
    if sum(run.world.sum([run.requested is not None])):
        run.stop_reason = run.requested or 'stopped by SIGTERM'  # another process's
