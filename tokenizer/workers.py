"""Work shared out to processes, its results in order.

    workers = Workers(4)
    for item, result in workers.map(function, items):
        ...
    workers.close()

For work in Python, which threads would not make faster. Ctrl-C ends the main process alone, and the others with it; so
does its being killed.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress

from configurator import UserError

# fork costs nothing, and a script may use it without `if __name__ == '__main__'`; elsewhere it is unsafe or missing
START_METHOD = 'fork' if sys.platform == 'linux' else 'spawn'


def core_count(limit: str = '/sys/fs/cgroup/cpu.max') -> int:
    """Cores that this process may use: those it may run on, and no more than a container allows it the time of."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    with suppress(OSError, ValueError), open(limit) as f:  # '200000 100000': two cores; 'max 100000': all
        quota, period = map(int, f.read().split())
        cores = min(cores, max(1, quota // period))
    return cores


class Workers:
    """`count` processes. Each calls start(*arguments), if there is one, before its first work."""

    def __init__(self, count: int, start=None, *arguments):
        self.count = count
        self.pool = ProcessPoolExecutor(count, multiprocessing.get_context(START_METHOD), begin, (start, *arguments))

    def map(self, function, items):
        """Yield (item, function(item)) for every item, in order; of the items, no more are taken than keep all busy.

        function and each item are sent to the processes, so both have to be picklable. ValueError when one dies.
        """
        waiting = deque()
        try:
            for item in items:
                waiting.append((item, submit(self.pool, function, item)))
                if len(waiting) > 2 * self.count:
                    item, future = waiting.popleft()
                    yield item, future.result()
            while waiting:
                item, future = waiting.popleft()
                yield item, future.result()
        except BrokenProcessPool:
            raise UserError('a worker process was ended from outside, perhaps because memory ran out; '
                             'try again with fewer: --num_proc=1') from None
        finally:
            for _, future in waiting:
                future.cancel()

    def close(self):
        """End the processes, after the work they are at."""
        self.pool.shutdown(cancel_futures=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def submit(pool, *task):
    """pool.submit, which starts processes when there are too few."""
    if os.name != 'posix' or threading.current_thread() is not threading.main_thread():
        return pool.submit(*task)
    # Ctrl-C reaches all processes, and the main one is to end the others. Blocked here, it is blocked for good in those
    # that start now. In this one another thread may still take it: remembered until the pool knows what it has started.
    came = []
    handler = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return pool.submit(*task)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, signal.SIG_DFL if handler is None else handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def begin(start, *arguments):
    """What each process does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows, where `submit` cannot hold it back
    threading.Thread(target=end_with_parent, daemon=True).start()
    if start is not None:
        start(*arguments)


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # the main process was killed: nothing else would end this one
