import ctypes
import os
import re
import shutil
import sys
from contextlib import nullcontext

import torch

from configurator import UserError
from tokenizer.workers import core_count

# dense bf16 or fp16 FLOP/s of the vendors' datasheets, without sparsity; the first name found in the device's wins
PEAK_FLOPS = {
    'B200': 2250e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12, 'H800': 989e12,
    'H20': 148e12, 'A100': 312e12, 'A800': 312e12, 'A40': 150e12, 'A10G': 70e12, 'A10': 125e12, 'L40S': 362e12,
    'L40': 181e12, 'L4': 121e12, 'RTX 6000 Ada': 364e12, 'RTX A6000': 155e12, 'RTX 5090': 210e12, 'RTX 4090': 165e12,
    'RTX 4080': 97e12, 'RTX 3090': 71e12, 'V100': 125e12, 'T4': 65e12, 'MI300X': 1307e12, 'MI250X': 383e12,
}


def peak_flops(device):
    """Peak FLOP/s of a torch.device in bf16 or fp16, or None if it is not in the table."""
    if device.type != 'cuda':
        return None
    name = torch.cuda.get_device_name(device)
    if 'Laptop' in name:  # same names as the desktop cards, less power
        return None
    return next((peak for key, peak in PEAK_FLOPS.items() if re.search(rf'\b{key}\b', name)), None)


"""
The machine: which device, which precision, how many processes, and what they say to each other.

Under torchrun every process runs the same script; RANK, LOCAL_RANK and WORLD_SIZE in the environment say which it is.
"""


DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


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
        raise UserError(f"device={device!r} is no device; examples: 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'") from None
    if chosen.type == 'cuda':
        if not torch.cuda.is_available():
            raise UserError(f'device={device!r}: torch {torch.__version__} finds no CUDA GPU here. Use --device=auto '
                             f'or --device=cpu; for an NVIDIA GPU install a CUDA build of torch (pytorch.org)')
        if chosen.index is None or 'LOCAL_RANK' in os.environ:
            chosen = torch.device('cuda', local_rank)
        if chosen.index >= torch.cuda.device_count():
            raise UserError(f'device={chosen}: there are {torch.cuda.device_count()} GPUs here; start at most as many '
                             f'processes on this machine (--nproc_per_node)')
    if chosen.type == 'mps' and not torch.backends.mps.is_available():
        raise UserError(f'device={device!r}: no Apple GPU that torch {torch.__version__} can use; try --device=cpu')
    return chosen


def choose_dtype(dtype, device, has_scaler=True):
    """
    'auto' -> (name in DTYPES, reason). bf16 wherever the hardware multiplies it natively; a GPU without it takes fp16
    if there is a gradient scaler for it; everything else fp32. Raises ValueError for an unknown name.
    """
    if dtype != 'auto':
        if dtype not in DTYPES:
            raise UserError(f"dtype={dtype!r}: expected 'auto', {', '.join(map(repr, DTYPES))}")
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
            raise UserError(f"compile={setting!r}: expected True, False or 'auto'")
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


def mfu_of(model, sequences, seconds):
    """
    Model FLOPs utilisation: the share of the device's peak that training on so many sequences of block_size tokens in
    so many seconds amounts to. None on a device whose peak is not known.
    """
    peak = peak_flops(model.lm_head.weight.device)
    return None if peak is None else model.flops_per_token() * model.config.block_size * sequences / seconds / peak


def use_machine(device):
    """Set torch up for the device: threads, freed memory kept on the CPU, TF32 on a GPU."""
    use_cores()
    if device.type == 'cpu':
        keep_freed_memory()
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')  # TF32's ten bits are enough for fp32 products, and faster


def compile_or_eager(try_step):
    """
    Run a step for the first time, which compiles it; -> whether that worked.

    Whatever a compiler raises, a warning says why and torch runs eagerly from here on. A mistake of the user and out of
    memory are raised.
    """
    try:
        try_step()
    except UserError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        why = f'{type(error).__name__}: {(str(error).strip().splitlines() or [""])[0]}'
        print(f'WARNING: torch.compile failed ({why}); continuing without it, slower. --compile=False silences this',
              file=sys.stderr, flush=True)
        torch.compiler.set_stance('force_eager')
        return False
    return True
