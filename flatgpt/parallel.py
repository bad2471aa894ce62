import hashlib
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from configurator import UserError


@dataclass
class World:
    """This process among all. rank: 0..size-1 over all machines; local_rank: on this one."""

    rank: int
    local_rank: int
    size: int

    @property
    def is_main(self):
        return self.rank == 0

    def print(self, *args):
        """print, from one process only."""
        if self.is_main:
            print(*args, flush=True)

    def sum(self, values):
        """Sum a list of numbers over the processes; -> list of floats, the same in every process."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total)  # on the CPU, over gloo: no synchronisation with a GPU
        return total.tolist()


def from_environment():
    """-> World as torchrun describes it, or the only process there is."""
    env = os.environ
    return World(int(env.get('RANK', 0)), int(env.get('LOCAL_RANK', 0)), int(env.get('WORLD_SIZE', 1)))


def connect(world, device, backend):
    """Join the other processes, if there are any. backend: 'auto' is nccl between GPUs, gloo between CPUs."""
    if 'RANK' not in os.environ:
        return
    if sys.platform == 'win32':
        os.environ.setdefault('USE_LIBUV', '0')  # torch's Windows builds come without libuv
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        # beside nccl a gloo group, for the few numbers that live on the CPU
        backend = 'gloo' if backend == 'gloo' else f'cpu:gloo,cuda:{"nccl" if backend == "auto" else backend}'
    else:
        if backend not in ('auto', 'gloo'):
            world.print(f'backend {backend} needs GPUs; using gloo')
        backend = 'gloo'
    store = next(rendezvous('env://'))[0]
    store = dist.PrefixStore(meet(store, world), store)  # a corner of its own for each attempt
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)


def meet(store, world, patience=1800):
    """
    Wait until all processes of this attempt are there, `patience` seconds at most; -> a name for the attempt, the same
    in all of them and in no other attempt. Raises ValueError when they don't all come.

    torchrun's store outlives the workers it restarts, with the addresses of the dead ones in it, and
    TORCHELASTIC_RESTART_COUNT does not tell the attempts apart: the agent of each machine counts the failures of its
    own workers, not the restarts that another machine's failure caused (torch 2.6 to 2.13, distributed/elastic/agent).
    So each process writes a name of its own, then all the names it reads. Once all have read the same, all are alive.
    """
    store.set(f'name of {world.rank}', os.urandom(8).hex())
    end = time.monotonic() + patience
    store.set_timeout(timedelta(seconds=patience))  # of multi_get, for a key that is not there yet
    with suppress(dist.DistStoreError):
        while time.monotonic() < end:
            names = b' '.join(store.multi_get([f'name of {rank}' for rank in range(world.size)]))
            store.set(f'names read by {world.rank}', names)
            if set(store.multi_get([f'names read by {rank}' for rank in range(world.size)])) == {names}:
                return f'attempt {hashlib.sha256(names).hexdigest()[:16]}'
            time.sleep(0.1)
    raise UserError(f'process {world.rank} has waited {patience / 60:.0f} minutes for the other {world.size - 1}; '
                     f'look for errors of theirs above or on the other machines, and start all of them again')


def disconnect():
    """Leave together: gloo's threads abort a process whose peers close their connections before it does."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def all_agree(world, exists, path):
    """Return whether `path` exists. Raises UserError if only some of the processes find it."""
    n_found = int(world.sum([exists])[0])
    if n_found not in (0, world.size):
        raise UserError(f'{n_found} of {world.size} processes find {path}; out_dir must be on a disk they share')
    return n_found > 0
