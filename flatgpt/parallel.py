"""
Connect several processes, and sum numbers over them.

Under torchrun every process runs the same script. RANK, LOCAL_RANK and WORLD_SIZE in the
environment identify it.
"""

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
from torch.nn.parallel import DistributedDataParallel as DDP

from configurator import UserError, fit

# settings that may differ between machines
LOCAL = {'out_dir', 'dataset', 'anneal_dataset', 'init_from', 'device'}


@dataclass
class World:
    """Describe this process. rank: over all machines; local_rank: on this one.

    writers: the group in which threads write a sharded checkpoint.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    writers: object = None

    @property
    def is_main(self):
        return self.rank == 0

    def print(self, *texts):
        """Print texts from one process only, each in lines of at most 80 columns."""
        if self.is_main:
            print(*(fit(text, indent='  ') for text in texts), sep='\n', flush=True)

    def sum(self, values):
        """Sum a list of numbers over the processes; -> list of floats, equal in all."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total)  # on the CPU, over gloo: no synchronisation with a GPU
        return total.tolist()

    def mean(self, numbers):
        """Average a tensor over the processes, on its device and without waiting for it."""
        if self.size > 1:
            dist.all_reduce(numbers.div_(self.size))
        return numbers

    def from_main(self, value):
        """Return the main process's value in all processes."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def check_alike(self, facts):
        """Compare {name: value} over the processes. Raises UserError if they differ."""
        everyone = [facts] * self.size
        if self.size > 1:
            dist.all_gather_object(everyone, facts)
        for rank, others in enumerate(everyone):
            for name in facts:
                if name not in LOCAL and repr(others[name]) != repr(everyone[0][name]):
                    raise UserError(f'process {rank} has {name}={others[name]!r}, expected '
                                    f'{everyone[0][name]!r} as in process 0: start all with one '
                                    f'command, and out_dir and dataset on a disk that they share')


def from_environment():
    """Return the World that torchrun describes, or that of a single process."""
    defaults = {'RANK': 0, 'LOCAL_RANK': 0, 'WORLD_SIZE': 1}
    return World(*(int(os.environ.get(name, default)) for name, default in defaults.items()))


def connect(world, device, backend):
    """Join the other processes. backend: 'auto' is nccl between GPUs, else gloo."""
    if 'RANK' not in os.environ:
        return
    if sys.platform == 'win32':
        os.environ.setdefault('USE_LIBUV', '0')  # torch's Windows builds have no libuv
    on_gpu = device.type == 'cuda'
    if backend == 'nccl' and not on_gpu:
        world.print('backend nccl needs GPUs; using gloo')
    # gloo beside nccl, for the few numbers that live on the CPU
    backend = 'cpu:gloo,cuda:nccl' if on_gpu and backend != 'gloo' else 'gloo'
    store = next(rendezvous('env://'))[0]
    store = dist.PrefixStore(meet(store, world), store)  # each attempt has its own keys
    # one process may prepare data or save for hours; torchrun ends all of them when one dies
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size,
                            timeout=timedelta(days=1), device_id=device if on_gpu else None)


def average_gradients(model, world, device):
    """Wrap a model so that its backward pass averages gradients over the processes."""
    if world.size == 1 or hasattr(next(model.parameters()), 'device_mesh'):  # FSDP does it itself
        return model
    return DDP(model, [device] if device.type == 'cuda' else None, gradient_as_bucket_view=True)


def clip(params, most):
    """Scale gradients down to a norm of `most`; -> the norm before.

    most: 0 scales nothing. It is the norm of all gradients together, over all processes where they
    are sharded.
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    norm = norm.full_tensor() if hasattr(norm, 'full_tensor') else norm
    if most and (norm.is_cuda or norm > most):  # no wait for a GPU's norm
        torch.nn.utils.clip_grads_with_norm_(params, most, norm)
    return norm


def meet(store, world, patience=1800):
    """Wait for all processes of this attempt; -> a name that only this attempt has.

    Raises UserError when some do not come within `patience` seconds.

    torchrun's store outlives the workers that it restarts and still holds the addresses of the dead
    ones; TORCHELASTIC_RESTART_COUNT differs between machines (torch 2.6 to 2.13). So each process
    writes a name of its own, then all the names that it reads. Once all have read the same names,
    all are alive.
    """
    store.set(f'name of {world.rank}', os.urandom(8).hex())
    end = time.monotonic() + patience
    store.set_timeout(timedelta(seconds=patience))  # for multi_get of a key that does not exist yet
    ranks = range(world.size)
    with suppress(dist.DistStoreError):
        while time.monotonic() < end:
            names = b' '.join(store.multi_get([f'name of {rank}' for rank in ranks]))
            store.set(f'names read by {world.rank}', names)
            if set(store.multi_get([f'names read by {rank}' for rank in ranks])) == {names}:
                return f'attempt {hashlib.sha256(names).hexdigest()[:16]}'
            time.sleep(0.1)
    raise UserError(f'process {world.rank} has waited {patience / 60:.0f} minutes for the other '
                    f'{world.size - 1}; look for their errors above or on the other machines, and '
                    f'start all of them again')


def disconnect():
    """Leave together: gloo aborts a process if another closes its connection first."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
