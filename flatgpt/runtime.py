"""Choose and set up the machine: device, precision, compilation, memory."""

import ctypes
import os
import shutil
import sys
from contextlib import nullcontext

import torch

import ops
from configurator import UserError
from flatgpt.cores import share_cores
from tokenizer.workers import core_count

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def choose_device(device, local_rank=None):
    """Return the torch.device of a setting; 'auto': the best accelerator, or the CPU.

    Under torchrun each process takes the GPU of its local rank. A GPU becomes the current device.
    Raises UserError for a device that is not here, and under torchrun without a local_rank.
    """
    n_processes = int(os.environ.get('WORLD_SIZE', 1))
    if local_rank is None and n_processes > 1:
        raise UserError(f'{n_processes} processes were started, but this script runs in one; start '
                        f'it with python in place of torchrun')
    if device == 'auto':
        has_mps = torch.backends.mps.is_available()
        device = 'cuda' if torch.cuda.is_available() else 'mps' if has_mps else 'cpu'
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device={device!r} is no device; expected one such as 'auto', 'cpu', "
                        f"'cuda', 'cuda:1', 'mps'") from None
    if chosen.type == 'cuda':
        if not torch.cuda.is_available():
            raise UserError(f'device={device!r}: torch {torch.__version__} finds no CUDA GPU here. '
                            f'Use --device=auto or --device=cpu; for an NVIDIA GPU install a CUDA '
                            f'build of torch (pytorch.org)')
        if chosen.index is None or 'LOCAL_RANK' in os.environ:
            # srun --gpus-per-task=1 shows each task a GPU of its own
            is_task = os.environ.get('SLURM_LOCALID') == os.environ.get('LOCAL_RANK', '')
            is_alone = is_task and torch.cuda.device_count() == 1
            chosen = torch.device('cuda', 0 if is_alone else local_rank or 0)
        if chosen.index >= torch.cuda.device_count():
            raise UserError(f'device={chosen}: this machine has {torch.cuda.device_count()} GPUs; '
                            f'start at most as many processes on it (--nproc_per_node)')
        torch.cuda.set_device(chosen)  # streams, graphs and synchronize() take the current one
    if chosen.type == 'mps' and not torch.backends.mps.is_available():
        raise UserError(f'device={device!r}: torch {torch.__version__} can use no Apple GPU here; '
                        f'use --device=cpu')
    return chosen


def choose_dtype(dtype, device, has_scaler=True):
    """Return (name in DTYPES, reason) of a setting.

    'auto' is bf16 where the hardware multiplies it natively; fp16 on a GPU without bf16 if there is
    a gradient scaler for it; else fp32.
    """
    if dtype != 'auto':
        return dtype, 'as set'
    if device.type == 'cuda':
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return 'bfloat16', 'native on this GPU'
        if has_scaler:
            return 'float16', 'no native bf16 on this GPU; with a gradient scaler'
    if device.type == 'cpu' and cpu_multiplies_bf16():
        return 'bfloat16', 'native on this CPU'
    return 'float32', 'no native bf16 here'


def cpu_multiplies_bf16():
    """Return whether this CPU has AMX or AVX512-BF16 units."""
    # torch's versions name the probes differently
    names = ('_is_amx_tile_supported', '_is_avx512_bf16_supported')
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def autocast(dtype, device):
    """Return the context in which torch multiplies in `dtype`, a name in DTYPES."""
    return nullcontext() if dtype == 'float32' else torch.autocast(device.type, DTYPES[dtype])


def choose_compile(setting, device, flops):
    """Return (whether to use torch.compile, reason) of a setting.

    'auto' compiles if a run of so many `flops` earns back the 10 to 60 s of compilation. It also
    needs the compiler: a C++ compiler for the CPU, Triton for a GPU.
    """
    if setting != 'auto':
        return setting, 'as set'
    if device.type == 'mps':
        return False, 'not reliable on mps yet'
    if device.type == 'cuda' and (sys.platform == 'win32'
                                  or torch.cuda.get_device_capability(device) < (7, 0)):
        return False, 'Triton does not support this GPU or system'
    if device.type == 'cpu':
        compiler = os.environ.get('CXX') or ('cl' if sys.platform == 'win32' else 'g++')
        if not (shutil.which(compiler) or shutil.which('clang++')):
            return False, f'no C++ compiler ({compiler}) here'
    if flops < 60 * (1e11 if device.type == 'cpu' else 5e13):  # a minute of a modest CPU or GPU
        return False, 'too short a run'
    return True, 'a long enough run'


def explain_choices(device, dtype, compile):
    """Return a line about the machine. dtype, compile: (what was chosen, reason)."""
    n = torch.get_num_threads()
    shared = ', shared with other programs' if n > 1 and share_cores() else ''
    threads = f' (threads: {n}{shared})' if device.type == 'cpu' else ''
    return (f'device {device}{threads}, dtype {dtype[0]} ({dtype[1]}), '
            f'compile {compile[0]} ({compile[1]})')


def use_machine(device, deterministic=False):
    """Set torch up for the device: threads and kept memory on a CPU, TF32 on a GPU.

    deterministic: give the same bits in each run on a GPU too, where the order of additions is
    free in fast kernels. Raises RuntimeError at an operation that has no such kernel.
    """
    use_cores()
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read at cuBLAS's first call
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    if device.type == 'cpu':
        keep_freed_memory()
    if device.type == 'cuda':
        expand_segments()
        # TF32 keeps ten bits of fp32 factors, which is enough, and multiplies much faster
        torch.set_float32_matmul_precision('high')


def expand_segments():
    """Let segments of a GPU's memory grow, unless the user set the allocator up.

    Tensors of changing sizes then leave smaller gaps. Works before the first tensor, on Linux.
    """
    names = ('PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF', 'PYTORCH_HIP_ALLOC_CONF')
    if sys.platform == 'linux' and not any(name in os.environ for name in names):
        # before torch 2.9 it had the other name
        apply = getattr(torch._C, '_accelerator_setAllocatorSettings', None)
        (apply or torch.cuda.memory._set_allocator_settings)('expandable_segments:True')


def machine_size():
    """Return the number of processes of torchrun on this machine."""
    return int(os.environ.get('LOCAL_WORLD_SIZE', 1))


def use_cores():
    """Give torch this process's cores, and share them with other programs.

    torch miscounts them in containers and torchrun.
    """
    if 'RANK' in os.environ:
        torch.set_num_threads(max(1, core_count() // machine_size()))
    elif 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), core_count()))
    if torch.get_num_threads() > 1:
        share_cores()


def keep_freed_memory():
    """Make glibc keep freed memory, since the kernel zeroes each page it hands out.

    That takes a sixth of a training step on the CPU (bench/results). Other C libraries ignore it.
    """
    if sys.platform == 'linux':
        libc = ctypes.CDLL(None)
        if hasattr(libc, 'mallopt'):
            M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def compile_or_eager(try_step):
    """Run a step for the first time, which compiles it; -> whether that worked.

    An exception of the compiler becomes a warning, and torch runs eagerly from then on. A UserError
    and out of memory are raised.
    """
    try:
        try_step()
    except UserError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        why = f'{type(error).__name__}: {(str(error).strip().splitlines() or [""])[0]}'
        print(f'WARNING: torch.compile failed ({why}); continuing without it, slower. '
              f'--compile=False silences this', file=sys.stderr, flush=True)
        torch.compiler.set_stance('force_eager')
        return False
    return True


def compile_training(model, try_step):
    """Compile the blocks and the loss of a model in place, if that works.

    try_step: function that takes a first step. Blocks of one kind share a compilation, which takes
    a fifth of the whole model's; each block's gradients are ready for DDP when its backward ends.
    """
    # ops.Dropout needs fallback_random on the CPU
    on_cpu = model.lm_head.weight.device.type == 'cpu'
    for block in model.transformer.h:
        # not block.compile(), which would compile FSDP's hooks too
        block.forward = torch.compile(block.forward, dynamic=False, fullgraph=not on_cpu,
                                      options={'fallback_random': True} if on_cpu else None)
    ops.is_training_compiled = True
    ops.is_training_compiled = compile_or_eager(try_step)


def read_later(values):
    """Start to copy a tensor to the CPU; -> function that waits and returns a list."""
    if values.device.type != 'cuda':
        return values.tolist
    copy = values.to('cpu', non_blocking=True)  # into pinned memory
    is_copied = torch.cuda.Event()
    is_copied.record(torch.cuda.current_stream(values.device))

    def numbers():
        is_copied.synchronize()
        return copy.tolist()

    return numbers


def out_of_memory(error):
    """Return whether an exception means that memory ran out, on a GPU or on the CPU."""
    words = ('out of memory', "can't allocate memory", 'not enough memory')
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
