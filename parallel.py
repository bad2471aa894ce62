"""
The machine: which device, which precision, how many processes, and what they say to each other.

Under torchrun every process runs the same script; RANK, LOCAL_RANK and WORLD_SIZE in the environment say which it is.
"""

import ctypes
import hashlib
import os
import shutil
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from workers import core_count

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


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
    raise ValueError(f'process {world.rank} has waited {patience / 60:.0f} minutes for the other {world.size - 1}; '
                     f'look for errors of theirs above or on the other machines, and start all of them again')


def disconnect():
    """Leave together: gloo's threads abort a process whose peers close their connections before it does."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def use_cores():
    """
    Let torch compute on the cores that this process may use, under torchrun on its share of them. torch's own choice,
    one thread for each physical core, does not know of a container's limits, and torchrun's is a single thread.
    OMP_NUM_THREADS decides otherwise, without torchrun, which sets it itself.
    """
    if 'RANK' in os.environ:
        torch.set_num_threads(max(1, core_count() // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))
    elif 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), core_count()))


def choose_device(device, local_rank=0):
    """
    'auto' -> torch.device of the best accelerator here, else the CPU; a name is checked. Under torchrun each process
    takes the GPU of its local rank. Raises ValueError for a device that isn't there.
    """
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device!r} is no device; examples: 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'") from None
    if chosen.type == 'cuda':
        if not torch.cuda.is_available():
            raise ValueError(f'device={device!r}: torch {torch.__version__} finds no CUDA GPU here. Use --device=auto '
                             f'or --device=cpu; for an NVIDIA GPU install a CUDA build of torch (pytorch.org)')
        if chosen.index is None or 'LOCAL_RANK' in os.environ:
            chosen = torch.device('cuda', local_rank)
        if chosen.index >= torch.cuda.device_count():
            raise ValueError(f'device={chosen}: there are {torch.cuda.device_count()} GPUs here; start at most as many '
                             f'processes on this machine (--nproc_per_node)')
    if chosen.type == 'mps' and not torch.backends.mps.is_available():
        raise ValueError(f'device={device!r}: no Apple GPU that torch {torch.__version__} can use; try --device=cpu')
    return chosen


def choose_dtype(dtype, device, has_scaler=True):
    """
    'auto' -> (name in DTYPES, reason). bf16 wherever the hardware multiplies it natively; a GPU without it takes fp16
    if there is a gradient scaler for it; everything else fp32. Raises ValueError for an unknown name.
    """
    if dtype != 'auto':
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: expected 'auto', {', '.join(map(repr, DTYPES))}")
        return dtype, 'as set'
    if device.type == 'cuda':
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return 'bfloat16', 'native on this GPU'
        if has_scaler:
            return 'float16', 'this GPU has no native bf16; with a gradient scaler'
    if device.type == 'cpu' and cpu_multiplies_bf16():
        return 'bfloat16', 'native on this CPU'
    return 'float32', 'no native bf16 here'


def autocast(dtype, device):
    """The context in which torch multiplies in that precision, a name in DTYPES."""
    return nullcontext() if dtype == 'float32' else torch.autocast(device.type, DTYPES[dtype])


def cpu_multiplies_bf16():
    """Whether this CPU has AMX or AVX512-BF16 units. torch names the probes differently from version to version."""
    probes = [getattr(torch.cpu, name, None) for name in ('_is_amx_tile_supported', '_is_avx512_bf16_supported')]
    return any(probe() for probe in probes if probe is not None)


def choose_compile(setting, device, flops):
    """
    'auto' -> (whether to use torch.compile, reason). Compiling takes 10 to 60 s, which a run of few `flops` would not
    earn back; on the CPU it needs a C++ compiler, on a GPU Triton.
    """
    if setting != 'auto':
        if not isinstance(setting, bool):
            raise ValueError(f"compile={setting!r}: expected True, False or 'auto'")
        return setting, 'as set'
    if device.type == 'mps':
        return False, 'not reliable on mps yet'
    if device.type == 'cuda' and (sys.platform == 'win32' or torch.cuda.get_device_capability(device) < (7, 0)):
        return False, 'Triton does not support this GPU or system'
    if device.type == 'cpu':
        compiler = os.environ.get('CXX') or ('cl' if sys.platform == 'win32' else 'g++')
        if not (shutil.which(compiler) or shutil.which('clang++')):
            return False, f'no C++ compiler ({compiler}) here'
    if flops < 60 * (1e11 if device.type == 'cpu' else 5e13):  # what a modest CPU or GPU does in a minute
        return False, 'too short a run'
    return True, 'a long enough run'


def keep_freed_memory():
    """
    Tell glibc to keep freed memory instead of returning it to the kernel, which would hand it out again page by page,
    zeroed: on the CPU that takes a sixth of a training step (bench/results). Nothing happens on other C libraries.
    """
    if sys.platform == 'linux':
        libc = ctypes.CDLL(None)
        if hasattr(libc, 'mallopt'):
            M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def read_later(values):
    """
    Start to copy a tensor to the CPU; -> a function that waits until it is there and gives its numbers. What a GPU was
    told to do after it goes on meanwhile.
    """
    if values.device.type != 'cuda':
        return values.tolist
    copy = values.to('cpu', non_blocking=True)  # into pinned memory
    is_there = torch.cuda.Event()
    is_there.record(torch.cuda.current_stream(values.device))

    def numbers():
        is_there.synchronize()
        return copy.tolist()

    return numbers


def out_of_memory(error):
    """Whether an exception means that memory ran out, on a GPU or on the CPU."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in text for words in ('out of memory', "can't allocate memory", 'not enough memory'))
