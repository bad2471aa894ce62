"""workers.py: processes that keep order, and end with the one that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokenizer.workers import Workers, core_count

ROOT = Path(__file__).parent.parent
POSIX = pytest.mark.skipif(os.name != 'posix', reason='needs signals')


def square(number):
    time.sleep(0.01 * (number % 3))  # later ones are done before earlier ones
    return number * number


def die(number):
    os._exit(3)


added = 0


def set_added(number):
    global added
    added = number


def add(number):
    return number + added


@pytest.mark.parametrize('text, cores', [('150000 100000', 1), ('50000 100000', 1),
                                         ('99900000 100000', None),
                                         ('max 100000', None), ('', None), (None, None)])
def test_cores_that_a_container_allows(text, cores, tmp_path):
    """cpu.max as cgroups v2 write it: microseconds of a period, or no limit."""
    if text is not None:
        (tmp_path / 'cpu.max').write_text(text)
    everything = (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity')
                  else os.cpu_count())
    assert core_count(str(tmp_path / 'cpu.max')) == (cores or everything)


def test_results_come_in_order():
    with Workers(2) as workers:
        assert (list(workers.map(square, range(20)))
                == [(number, number * number) for number in range(20)])
        assert list(workers.map(square, [])) == []
        assert list(workers.map(square, [3])) == [(3, 9)]  # the same processes again


def test_start_comes_first():
    with Workers(2, set_added, 10) as workers:
        assert [result for _, result in workers.map(add, range(4))] == [10, 11, 12, 13]


def test_no_more_is_read_than_keeps_them_busy():
    taken = []

    def numbers():
        for number in range(100):
            taken.append(number)
            yield number

    with Workers(2) as workers:
        results = workers.map(square, numbers())
        next(results)
        assert len(taken) == 5
        results.close()


def test_a_process_that_dies_is_an_error_one_can_act_upon():
    with Workers(2) as workers, pytest.raises(ValueError, match='--num_proc=1'):
        list(workers.map(die, [1]))


@POSIX
@pytest.mark.parametrize('sent', [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_main_one(tmp_path, sent):
    """Killed, or interrupted as a terminal does it, which signals all processes at once."""
    script = tmp_path / 'main.py'
    script.write_text('import os, sys, time\n'
                      f'sys.path.insert(0, {str(ROOT)!r})\n'
                      'from tokenizer.workers import Workers\n'
                      'def work(path):\n'
                      '    open(f"{path}/{os.getpid()}", "w").close()\n'
                      '    time.sleep(0.5)\n'
                      'if __name__ == "__main__":\n'
                      '    with Workers(2) as workers:\n'
                      f'        list(workers.map(work, [{str(tmp_path / "pids")!r}] * 1000))\n')
    (tmp_path / 'pids').mkdir()
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    deadline = time.monotonic() + 60
    while len(os.listdir(tmp_path / 'pids')) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    if sent == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, sent)
    errors = process.communicate(timeout=60)[1]
    assert errors.count('Traceback') == (sent == signal.SIGINT)  # the main process's own
    for name in os.listdir(tmp_path / 'pids'):
        while is_running(int(name)):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def is_running(pid):
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError:
        if os.path.isdir('/proc/self'):
            return False
        return subprocess.run(['ps', '-p', str(pid)], capture_output=True).returncode == 0
