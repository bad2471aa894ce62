"""parallel.py: what 'auto' chooses, what is refused, who may speak. Run: pytest tests/test_parallel.py"""

import contextlib
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from chat_models import make_chats
from conftest import ROOT, environments

from flatgpt import parallel, runtime
from flatgpt.parallel import World, meet
from flatgpt.runtime import choose_compile, choose_device, choose_dtype

CPU, CUDA, MPS = torch.device('cpu'), torch.device('cuda'), torch.device('mps')


@pytest.fixture
def gpus(monkeypatch):
    """Pretend to a machine with two GPUs, or as many as called with, of some compute capability."""
    def pretend(count=2, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: count > 0)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, 'set_device', lambda device: monkeypatch.setenv('CURRENT', str(device)))
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    pretend()
    return pretend


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)


def test_device_without_a_gpu(no_gpu, monkeypatch):
    assert choose_device('auto') == choose_device('cpu') == CPU
    for name in ('cuda', 'cuda:1'):
        with pytest.raises(ValueError, match=f"device='{name}'.*no CUDA GPU.*--device=cpu"):
            choose_device(name)
    with pytest.raises(ValueError, match="device='mps'.*--device=cpu"):
        choose_device('mps')
    for name in ('gpu', '', 'cuda:x', 'CPU 1'):
        with pytest.raises(ValueError, match="is no device; expected one such as 'auto', 'cpu'"):
            choose_device(name)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert choose_device('auto') == choose_device('mps') == MPS


def test_device_with_gpus(gpus, monkeypatch):
    assert choose_device('auto') == choose_device('cuda') == torch.device('cuda:0')
    assert choose_device('cuda:1') == torch.device('cuda:1') and choose_device('cpu') == CPU
    assert os.environ['CURRENT'] == 'cuda:1'  # streams and CUDA graphs take the current device
    with pytest.raises(ValueError, match='device=cuda:2: this machine has 2 GPUs'):
        choose_device('cuda:2')
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert choose_device('auto', 1) == choose_device('cuda', 1) == choose_device('cuda:0', 1) == torch.device('cuda:1')
    with pytest.raises(ValueError, match='--nproc_per_node'):
        choose_device('cuda', 2)
    gpus(count=1)
    monkeypatch.setenv('SLURM_LOCALID', '1')  # srun --gpus-per-task=1
    assert choose_device('auto', 1) == torch.device('cuda:0')


def test_scripts_of_one_process_refuse_torchrun(tmp_path, monkeypatch):
    folder = make_chats(tmp_path)
    for script in ('sample.py', 'posttrain.chat'):
        folder.start(script, out_dir='chat', env=environments(2)[1]).refused(
            '2 processes were started, but this script runs in one; start it with python in place of torchrun')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert choose_device('cpu', 1) == CPU


@pytest.mark.parametrize('capability, expected', [((9, 0), 'bfloat16'), ((8, 0), 'bfloat16'), ((7, 5), 'float16'),
                                                  ((6, 1), 'float16')])
def test_dtype_on_gpus(gpus, capability, expected):
    gpus(capability=capability)
    assert choose_dtype('auto', CUDA)[0] == expected
    without_scaler = 'float32' if expected == 'float16' else expected
    assert choose_dtype('auto', CUDA, has_scaler=False)[0] == without_scaler


def test_dtype_elsewhere(monkeypatch):
    assert choose_dtype('auto', MPS)[0] == 'float32'
    for has_units, expected in ((True, 'bfloat16'), (False, 'float32')):
        monkeypatch.setattr(runtime, 'cpu_multiplies_bf16', lambda has_units=has_units: has_units)
        assert choose_dtype('auto', CPU)[0] == expected
    for name in runtime.DTYPES:
        assert choose_dtype(name, CPU) == (name, 'as set')



def test_probes_of_the_cpu(monkeypatch):
    """torch's probes come and go with its versions; one that says yes is enough, none is no."""
    for name in ('_is_amx_tile_supported', '_is_avx512_bf16_supported'):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert not runtime.cpu_multiplies_bf16()
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: True, raising=False)
    assert runtime.cpu_multiplies_bf16()
    monkeypatch.delattr(torch.cpu, '_is_amx_tile_supported', raising=False)
    monkeypatch.delattr(torch.cpu, '_is_avx512_bf16_supported', raising=False)
    assert not runtime.cpu_multiplies_bf16()


def test_compile(gpus, monkeypatch):
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setattr(shutil, 'which', lambda name: '/usr/bin/' + name)
    assert choose_compile(True, CPU, 0) == (True, 'as set') and choose_compile(False, CUDA, 1e30) == (False, 'as set')
    assert choose_compile('auto', CPU, 1e15)[0] and choose_compile('auto', CUDA, 1e18)[0]
    for device, flops, why in ((CPU, 1e10, 'short'), (CUDA, 1e10, 'short'), (MPS, 1e30, 'mps')):
        chosen, reason = choose_compile('auto', device, flops)
        assert not chosen and why in reason
    gpus(capability=(6, 1))
    assert choose_compile('auto', CUDA, 1e18) == (False, 'Triton does not support this GPU or system')
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    assert choose_compile('auto', CPU, 1e15) == (False, 'no C++ compiler (g++) here')


@pytest.mark.skipif(not hasattr(os, 'sched_setaffinity'), reason='this system does not bind processes to cores')
@pytest.mark.parametrize('env, kept', [({}, False), ({'OMP_NUM_THREADS': '2'}, True), ({'RANK': '0'}, False),
                                       ({'RANK': '0', 'OMP_NUM_THREADS': '2', 'LOCAL_WORLD_SIZE': '2'}, False)])
def test_threads_follow_the_cores(env, kept):
    """In a process that torch gave two threads before it was bound to a single core."""
    code = ('import os, torch; from flatgpt import runtime; torch.set_num_threads(2)\n'
            'os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); runtime.use_cores()\n'
            'print(torch.get_num_threads())')
    clean = {key: value for key, value in os.environ.items() if key not in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')}
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env={**clean, **env}, capture_output=True, text=True)
    assert out.stdout == ('2\n' if kept else '1\n'), out.stderr


def test_world_alone(monkeypatch, capsys):
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    world = parallel.from_environment()
    assert world == World(0, 0, 1) and world.is_main
    parallel.connect(world, CPU, 'auto')
    assert not torch.distributed.is_initialized()
    assert world.sum([1, 2.5, True]) == [1.0, 2.5, 1.0]
    parallel.disconnect()
    world.print('one 2')
    World(1, 0, 2).print('unheard')
    assert capsys.readouterr().out == 'one 2\n'


def test_numbers_read_later():
    values = torch.tensor([1.5, -math.inf])
    assert runtime.read_later(values)() == [1.5, -math.inf]


def test_world_of_torchrun(monkeypatch):
    for name, value in (('RANK', '5'), ('LOCAL_RANK', '1'), ('WORLD_SIZE', '8')):
        monkeypatch.setenv(name, value)
    assert parallel.from_environment() == World(5, 1, 8) and not parallel.from_environment().is_main


@pytest.mark.parametrize('error, expected', [
    (torch.OutOfMemoryError('CUDA out of memory'), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried to "
                  'allocate 8000000000000 bytes. Error code 12 (Cannot allocate memory)'), True),
    (RuntimeError('DefaultCPUAllocator: not enough memory: you tried to allocate 80 bytes.'), True),
    (RuntimeError('mat1 and mat2 shapes cannot be multiplied'), False), (ValueError('memory of an elephant'), False)])
def test_out_of_memory(error, expected):
    assert runtime.out_of_memory(error) == expected


def test_out_of_memory_of_this_torch():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert runtime.out_of_memory(error.value)


# processes that meet --------------------------------------------------------------------------------------------------

def test_attempts_get_names_of_their_own():
    """
    All processes of an attempt agree, and no two attempts do, whatever those before them left in the store: of more or
    fewer processes, killed as soon as they had written their own name, or the names they had read.
    """
    store, rng, seen = torch.distributed.HashStore(), random.Random(0), set()

    def go(rank, size, names):
        time.sleep(rng.uniform(0, 0.05))
        names[rank] = meet(store, World(rank, rank, size))

    for size, dies in ((3, None), (3, 'name'), (1, None), (4, 'read'), (2, 'name'), (4, None)):
        if dies:
            store.set('name of 1', 'dead')
        if dies == 'read':
            store.set('names read by 1', b' '.join(store.multi_get([f'name of {rank}' for rank in range(3)])))
        names = [None] * size
        threads = [threading.Thread(target=go, args=(rank, size, names), daemon=True) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(set(names)) == 1 and None not in names and names[0] not in seen
        seen.add(names[0])


@pytest.mark.parametrize('left', [{}, {'name of 1': 'dead'}, {'name of 1': 'dead', 'names read by 1': 'dead too'}])
def test_a_process_that_does_not_come(left):
    """Whatever one of an earlier attempt has left in the store."""
    store = torch.distributed.HashStore()
    for key, value in left.items():
        store.set(key, value)
    with pytest.raises(ValueError, match='process 0 has waited 0 minutes for the other 1;'):
        meet(store, World(0, 0, 2), patience=0.2)


@pytest.mark.slow
def test_one_of_two_machines_restarts(tmp_path):
    """
    Two agents of a real torchrun, as on two machines. A worker of the first dies while that of the second computes; the
    first agent counts a restart, the second one follows without counting, and still their workers meet again.
    """
    (tmp_path / 'worker.py').write_text(f'''\
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
from flatgpt import parallel
world = parallel.from_environment()
parallel.connect(world, torch.device('cpu'), 'auto')
assert world.sum([1, world.rank]) == [2.0, 1.0]
if not os.path.exists('marker'):
    if os.environ['MACHINE'] == '0':
        open('marker', 'w').close()
        os._exit(9)
    time.sleep(60)  # its agent ends it before
print('met again, restart', os.environ['TORCHELASTIC_RESTART_COUNT'], flush=True)
parallel.disconnect()
''')
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    agents = [subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1', '--max-restarts=2',
         '--monitor-interval=0.1', '--rdzv_backend=c10d', f'--rdzv_endpoint=localhost:{port}', 'worker.py'],
        cwd=tmp_path, env={**os.environ, 'MACHINE': str(machine)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True) for machine in range(2)]
    try:
        outs = [agent.communicate(timeout=60)[0] for agent in agents]
    finally:
        for agent in agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
    assert [agent.returncode for agent in agents] == [0, 0], '\n'.join(outs)
    assert 'met again, restart 1' in outs[0] and 'met again, restart 0' in outs[1]
