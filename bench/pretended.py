"""
Pretend to one H200, to read the code that inductor generates for it.

    pretend()                                 # before torch compiles anything
    with FakeTensorMode():
        graphs = lower(function, *inputs)     # the wrapper code, forward and backward

Dynamo and inductor lower what they would lower on an H200. No kernel is translated to machine code,
and none runs: order, launches, bytes and memory are real, times and numbers are not. Needs g++ and
Triton, which torch's CPU build leaves out: pip install --no-deps triton. It patches torch's
internals: it is made for torch 2.13.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch.utils import cpp_extension

from configurator import UserError

H200 = SimpleNamespace(
    name='NVIDIA H200, pretended', major=9, minor=0, multi_processor_count=132,
    total_memory=141 * 2**30, warp_size=32, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=60 * 2**20, clock_rate=1_980_000, gcnArchName='')


@dataclass
class Graph:
    """Hold the wrapper code of a lowered graph."""

    is_backward: bool
    code: str


class Lowered(Exception):
    """Interrupt the call of a compiled graph, whose kernels cannot run."""


GRAPHS = []


def missing():
    """Return what this machine lacks to pretend, or ''."""
    if torch.version.cuda or torch.__version__ < (2, 13):
        return f"this is torch {torch.__version__}; expected 2.13's build for the CPU"
    if not shutil.which('g++'):
        return 'there is no g++; install it'
    if importlib.util.find_spec('triton') is None:
        return 'there is no Triton: pip install --no-deps triton'
    return ''


def build_stub(folder):
    """Compile pretended.cpp into a folder; -> the library."""
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'pretended.cpp')
    libraries = os.path.join(os.path.dirname(torch.__file__), 'lib')
    stub = os.path.join(folder, 'pretended.so')
    subprocess.run(
        ['g++', '-O1', '-shared', '-fPIC', '-std=c++20',
         f'-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}',
         *(f'-I{path}' for path in cpp_extension.include_paths()), source, f'-L{libraries}',
         f'-Wl,-rpath,{libraries}', '-ltorch_cpu', '-lc10', '-o', stub], check=True)
    return stub


def pretend():
    """Give this process a device like one H200, for the compiler alone.

    It starts the process again: the device must be there before torch is imported. Raises UserError
    where it lacks something.
    """
    if lack := missing():
        raise UserError(f'no GPU can be pretended: {lack}')
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    if 'pretended.so' not in os.environ.get('LD_PRELOAD', ''):
        with tempfile.TemporaryDirectory() as folder:
            raise SystemExit(subprocess.run([sys.executable, *sys.orig_argv[1:]], env={
                **os.environ, 'LD_PRELOAD': build_stub(folder),
                'TORCHINDUCTOR_FORCE_DISABLE_CACHES': '1'}).returncode)
    del os.environ['LD_PRELOAD']  # for processes that this one starts
    state = torch.zeros(16, dtype=torch.uint8)
    answers = {
        'is_available': True, 'device_count': 1, 'current_device': 0, 'is_initialized': True,
        'get_device_properties': H200, 'get_device_capability': (9, 0), '_lazy_init': None,
        'get_device_name': H200.name, 'synchronize': None, 'is_bf16_supported': True,
        'set_device': None, 'is_tf32_supported': True, 'get_arch_list': ['sm_90'],
        '_exchange_device': 0, '_maybe_exchange_device': 0, 'get_rng_state': state,
        'mem_get_info': (140 * 2**30, 141 * 2**30), 'is_current_stream_capturing': False,
        'set_rng_state': None}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    for name in ('get_rng_state', 'set_rng_state'):
        setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    torch.version.cuda = '13.0'
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch._C._cuda_getCurrentStream = lambda device: (0, 0, 1)
    torch._C._cuda_getDevice, torch._C._cuda_getDeviceCount = lambda: 0, lambda: 1

    # dynamo, inductor and Triton
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import async_compile, output_code
    from torch._inductor.fx_passes import pad_mm
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    for name in ('current_device', 'set_device', 'device_count', 'synchronize',
                 'get_device_properties', 'is_bf16_supported'):
        setattr(CudaInterface, name, staticmethod(getattr(torch.cuda, name)))
    for name in ('get_raw_stream', 'exchange_device', 'maybe_exchange_device'):
        setattr(CudaInterface, name, staticmethod(lambda device: 0))
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    driver.set_active(SimpleNamespace(
        get_current_target=lambda: GPUTarget('cuda', 90, 32), get_current_device=lambda: 0,
        get_current_stream=lambda device: 0, get_device_interface=lambda: torch.cuda,
        get_active_torch_device=lambda: torch.device('cuda', 0)))
    functorch.force_non_lazy_backward_lowering = True  # no backward pass will ask for it
    inductor.joint_graph_constant_folding = False  # it would compute them
    pad_mm._should_pad = lambda *args, **kwargs: False  # it would time products
    kernel = SimpleNamespace(run=lambda *args, **kwargs: None)
    async_compile.AsyncCompile.triton = lambda self, *args, **kwargs: kernel
    async_compile.AsyncCompile.wait = lambda self, scope: None
    generate = GraphLowering.codegen

    def keep(self, *args, **kwargs):
        result = generate(self, *args, **kwargs)
        GRAPHS.append(Graph(self.is_backward, getattr(result[0], 'value', result[0])))
        return result

    def interrupt(self, inputs):
        raise Lowered

    GraphLowering.codegen = keep
    output_code.CompiledFxGraph.__call__ = interrupt


def lower(function, *inputs):
    """Lower a compiled function for these inputs; -> its Graphs, forward and backward."""
    GRAPHS.clear()
    with suppress(Lowered):
        function(*inputs)
    return list(GRAPHS)
