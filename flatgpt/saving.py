"""
Write checkpoints in a thread, from a copy in memory, while training goes on.

    saver = Saver()
    saver.start(write, state)  # returns when `state` may change again
    saver.wait()               # raises what `write` has raised
"""

from concurrent.futures import ThreadPoolExecutor

import torch

from flatgpt import memory, runtime
from flatgpt.owners import local


def tensors_in(value):
    """Yield the tensors of nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    items = value.values() if isinstance(value, dict) else value
    for item in items if isinstance(value, dict | list | tuple) else ():
        yield from tensors_in(item)


def copied(value, former, copies):
    """Return a copy of nested dicts and lists whose tensors are on the CPU.

    former: the copy before, whose memory is used again, since new memory is slow. copies: {} at
    first. Tensors of one place, such as tied weights, stay in one place.
    """
    if isinstance(value, torch.Tensor):
        source = local(value.detach())
        place = source.data_ptr(), source.shape, source.stride()
        if place not in copies or not place[0]:  # an empty tensor has no place
            target = local(former)
            if (isinstance(target, torch.Tensor) and target.shape == source.shape
                    and target.dtype == source.dtype):
                target.copy_(source)
            else:
                former = value.detach().to('cpu', copy=True)
            copies[place] = former
        return copies[place]
    if isinstance(value, dict):
        former = former if isinstance(former, dict) else {}
        return {key: copied(item, former.get(key), copies) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item, None, copies) for item in value)
    return value


class Saver:
    """Run one write at a time, in a thread if memory has room for a copy of its state."""

    def __init__(self):
        self.thread, self.running, self.copy = ThreadPoolExecutor(max_workers=1), None, {}

    def start(self, write, state):
        """Call write(state), now or in a thread."""
        self.wait()
        tensors = list(tensors_in(state))
        n_bytes = sum(local(tensor).nbytes for tensor in tensors)
        if any(tensor is not local(tensor) for tensor in tensors):  # all processes copy at once
            n_bytes *= runtime.machine_size()
        if self.copy or n_bytes < memory.free_memory() / 2:
            try:
                self.copy = copied(state, self.copy, {})
                self.running = self.thread.submit(write, {**self.copy})
                return
            except (RuntimeError, MemoryError):  # no memory for a copy or a thread after all
                # the old pool would still run what it could not start
                self.thread, self.copy = ThreadPoolExecutor(max_workers=1), {}
        write(state)

    def wait(self):
        """Wait until the last write has ended, and raise what it has raised."""
        running, self.running = self.running, None
        if running:
            running.result()
