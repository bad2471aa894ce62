"""
Stop OpenMP's spinning while other programs wait for a core.

    share_cores()    # once; from then on a thread looks twice a second

At the end of each parallel region libgomp's threads spin for some milliseconds, because the next
region usually begins sooner. If another program needs the core, a spinning thread keeps it from the
thread that has the work, and a training step takes ten times as long. libgomp all but stops to spin
once it manages more threads than there are cores (`do_spin` in libgomp/config/linux/wait.h). So
share_cores() adds idle threads while this process waits for cores, and removes them afterwards.
bench/busy.py measures it. It works on Linux with libgomp, where OMP_WAIT_POLICY and GOMP_SPINCOUNT
are not set.
"""

import ctypes
import functools
import glob
import os
import sys
import threading
import time
from contextlib import suppress

import torch

INTERVAL = 0.5  # seconds between two looks
BUSY, QUIET = 0.3, 0.15  # seconds that the threads waited for a core, per second
PATIENCE = 10  # quiet looks in a row before OpenMP spins again


@functools.cache
def share_cores():
    """Start the thread that looks for other programs; -> whether that is possible."""
    if sys.platform != 'linux' or {'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'} & os.environ.keys():
        return False
    try:
        libgomp = ctypes.CDLL('libgomp.so.1', os.RTLD_NOLOAD | os.RTLD_NOW)
        seconds_waited()
    except (OSError, ValueError):
        return False
    threading.Thread(target=watch, args=(libgomp,), daemon=True).start()
    return True


def seconds_waited():
    """Return the seconds that this process's threads waited for a core.

    Raises OSError where the kernel does not count them.
    """
    paths, nanoseconds = glob.glob('/proc/self/task/*/schedstat'), 0
    if not paths:
        raise OSError('/proc/self/task has no schedstat')
    for path in paths:
        with suppress(FileNotFoundError, ProcessLookupError), open(path, 'rb') as file:
            nanoseconds += int(file.read().split()[1])
    return nanoseconds / 1e9


def watch(libgomp):
    """Add idle threads while others use the cores, and remove them afterwards."""
    idle, n_quiet, waited, then = None, 0, seconds_waited(), time.monotonic()
    while True:
        time.sleep(INTERVAL)
        before, since, waited, then = waited, then, seconds_waited(), time.monotonic()
        share = (waited - before) / (then - since)
        n_quiet = n_quiet + 1 if share < QUIET else 0
        if share > BUSY and not idle:
            idle = IdleThreads(libgomp)
        elif n_quiet >= PATIENCE and idle:
            idle.end()
            idle = None


class IdleThreads:
    """Hold more threads of libgomp than there are cores."""

    def __init__(self, libgomp):
        self.is_begun, self.is_over = threading.Event(), threading.Event()
        n = max(2, len(os.sched_getaffinity(0)) - torch.get_num_threads() + 2)
        self.thread = threading.Thread(target=self.hold, args=(libgomp, n), daemon=True)
        self.thread.start()

    def hold(self, libgomp, n):
        """Begin a parallel region of n threads that does nothing, and keep its threads."""
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # free(NULL)
        libgomp.GOMP_parallel(nothing, None, n, 0)
        self.is_begun.set()
        self.is_over.wait()  # libgomp ends the threads of a thread that ends

    def end(self):
        """Remove the threads."""
        self.is_over.set()
        self.thread.join()
