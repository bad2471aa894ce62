"""
Share work among processes, with results in order.

    with Workers(4) as workers:
        for item, result in workers.map(function, items):
            ...

For Python code, which threads do not speed up. Ctrl-C interrupts the main process alone; the
others end with it, however it ends.
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

import numpy as np

from configurator import UserError
from tokenizer.patterns import batches

# fork costs nothing and needs no `if __name__ == '__main__'`; elsewhere it is unsafe or missing
START_METHOD = 'fork' if sys.platform == 'linux' else 'spawn'


def core_count(limit: str = '/sys/fs/cgroup/cpu.max') -> int:
    """Count the cores that this process may use, by affinity and container limit."""
    cores = (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity')
             else os.cpu_count() or 1)
    with suppress(OSError, ValueError), open(limit) as f:  # '200000 100000': 2 cores; 'max': all
        quota, period = map(int, f.read().split())
        cores = min(cores, max(1, quota // period))
    return cores


class Workers:
    """Run `count` processes; each calls start(*arguments) before its first work."""

    def __init__(self, count: int, start=None, *arguments):
        self.count = count
        self.pool = ProcessPoolExecutor(count, multiprocessing.get_context(START_METHOD), begin,
                                        (start, *arguments))

    def map(self, function, items):
        """Yield (item, function(item)) for every item, in order.

        Takes no more items in advance than keep all processes busy. function and items must be
        picklable. Raises UserError when a process is killed.
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
            raise UserError('a worker process was killed, perhaps because memory ran out; use '
                            'fewer: --num_proc=1') from None
        finally:
            for _, future in waiting:
                future.cancel()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.pool.shutdown(cancel_futures=True)  # once their present work is done


def submit(pool, *task):
    """Call pool.submit(*task), which may start processes, so that they ignore Ctrl-C."""
    if os.name != 'posix' or threading.current_thread() is not threading.main_thread():
        return pool.submit(*task)
    # A terminal sends Ctrl-C to all processes. Processes that start now inherit the blocked signal.
    # Another thread of this process may still receive it; it is raised again after pool.submit().
    received = []
    handler = signal.signal(signal.SIGINT, lambda *_: received.append(True))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return pool.submit(*task)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, signal.SIG_DFL if handler is None else handler)
        if received:
            signal.raise_signal(signal.SIGINT)


def begin(start, *arguments):
    """Prepare a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for Windows, where submit() blocks nothing
    threading.Thread(target=end_with_parent, daemon=True).start()
    if start is not None:
        start(*arguments)


def end_with_parent():
    """End this process when the main process is gone, even killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


worker_tokenizer = None  # in a worker process: its tokenizer


def start_worker(tokenizer):
    """Keep the tokenizer in a worker process."""
    global worker_tokenizer
    worker_tokenizer = tokenizer


def encode_in_worker(texts: list[str]) -> list[np.ndarray]:
    """Encode texts in a worker process."""
    return [worker_tokenizer.encode_array(text) for text in texts]


def encode_in_processes(tokenizer, texts: list[str], count: int | None) -> list[np.ndarray]:
    """Apply encode_array() to each text, in `count` processes (None: one per core)."""
    count = count or core_count()
    if count == 1 or sum(map(len, texts)) < 1 << 21:
        return [tokenizer.encode_array(text) for text in texts]
    if tokenizer.workers is None or tokenizer.workers.count != count:
        tokenizer.workers = Workers(count, start_worker, tokenizer)
    groups = tokenizer.workers.map(encode_in_worker, batches(texts, 1 << 18))
    return [ids for _, group in groups for ids in group]
