"""flatgpt/cores.py: threads do not spin while others use the cores. Run: pytest tests/test_cores.py"""

import ctypes
import itertools
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT

from flatgpt import cores

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='libgomp of Linux')


class Stop(Exception):
    pass


def test_idle_threads_come_and_go():
    """libgomp has as many threads more as make it stop spinning, until they end."""
    libgomp = ctypes.CDLL('libgomp.so.1', os.RTLD_NOLOAD | os.RTLD_NOW)
    before = set(os.listdir('/proc/self/task'))
    idle = cores.IdleThreads(libgomp)
    idle.is_begun.wait()
    new = set(os.listdir('/proc/self/task')) - before
    assert len(new) >= 2 and len(new) + torch.get_num_threads() - 1 > len(os.sched_getaffinity(0))
    idle.end()
    end = time.monotonic() + 20
    while new & set(os.listdir('/proc/self/task')):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_waits_decide(monkeypatch):
    """Threads are added once this process waits, and removed after quiet looks alone."""
    shares = [0.0, 0.2, 0.5, 0.0, 0.5, *[0.1] * cores.PATIENCE, 0.0, 0.4]
    seconds = itertools.count()
    waited = itertools.accumulate([0.0, *shares])
    events = []

    def next_waited():
        events.append('|')
        value = next(waited, None)
        if value is None:
            raise Stop
        return value

    class Idle:
        def __init__(self, libgomp):
            events.append('add')

        def end(self):
            events.append('end')

    monkeypatch.setattr(cores, 'IdleThreads', Idle)
    monkeypatch.setattr(cores, 'seconds_waited', next_waited)
    monkeypatch.setattr(cores.time, 'sleep', lambda seconds: None)
    monkeypatch.setattr(cores.time, 'monotonic', lambda: next(seconds))
    with pytest.raises(Stop):
        cores.watch(None)
    assert ''.join(events) == '||||add' + '||' + '|' * cores.PATIENCE + 'end' + '||add|'


def test_waiting_is_measured():
    """Two busy threads of one core wait for about as long as they run."""
    code = ('import os, time; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); pid = os.fork()\n'
            'end = time.monotonic() + 1\n'
            'while time.monotonic() < end: pass\n'
            'from flatgpt.cores import seconds_waited\n'
            'if pid: os.wait(); print(seconds_waited())')
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert float(out.stdout) > 0.2, out.stderr


@pytest.mark.parametrize('name', ['OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'])
def test_settings_of_the_user_win(monkeypatch, name):
    monkeypatch.setenv(name, '5')
    n_threads = threading.active_count()
    assert cores.share_cores.__wrapped__() is False and threading.active_count() == n_threads
