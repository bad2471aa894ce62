"""
Write checkpoints in a thread, from a copy in memory, while training goes on.

    saver = Saver()
    saver.start(write, state)  # returns when `state` may change again
    saver.wait()               # raises what `write` has raised
"""

from concurrent.futures import ThreadPoolExecutor

import torch

from flatgpt.owners import local


def tensors_in(value):
    """Yield the tensors of nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    items = value.values() if isinstance(value, dict) else value
    for item in items if isinstance(value, dict | list | tuple) else ():
        yield from tensors_in(item)


def copied(value, copies):
    """Return a copy of nested dicts and lists whose tensors are on the CPU.

    copies: {} at first. Tensors of one place, such as tied weights, stay in one place.
    """
    if isinstance(value, torch.Tensor):
        place = local(value).data_ptr(), value.shape, value.stride()
        if place not in copies or not place[0]:  # an empty tensor has no place
            copies[place] = value.detach().to('cpu', copy=True)
        return copies[place]
    if isinstance(value, dict):
        return {key: copied(item, copies) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item, copies) for item in value)
    return value


def free_memory():
    """Return the bytes of memory that are available, 0 where Linux's count is missing."""
    try:
        with open('/proc/meminfo') as file:
            return next(1024 * int(line.split()[1]) for line in file if 'MemAvailable' in line)
    except (OSError, StopIteration):
        return 0


class Saver:
    """Run one write at a time, in a thread if memory has room for a copy of its state."""

    def __init__(self):
        self.thread, self.running = ThreadPoolExecutor(max_workers=1), None

    def start(self, write, state):
        """Call write(state), now or in a thread."""
        self.wait()
        n_bytes = sum(local(tensor).nbytes for tensor in tensors_in(state))
        if n_bytes > free_memory() / 2:
            write(state)
        else:
            self.running = self.thread.submit(write, copied(state, {}))

    def wait(self):
        """Wait until the last write has ended, and raise what it has raised."""
        running, self.running = self.running, None
        if running:
            running.result()
