"""
Take stdout, stderr or the terminal from every script, and send signals to it.

    $ python -m bench.streams                                 # 39 ways, 17 scripts, 20 minutes
    $ python -m bench.streams --script=rl --way='stdout full'  # one case, with its output

A training run must lose no step: in the end its checkpoints and log are those of an undisturbed
run, or after a signal the checkpoint is of the last step in log.jsonl. A preparation leaves a
whole dataset or none. sample and eval end with an error if their reader has gone or the disk is
full, and else print the same. Nothing prints a traceback.

Prints a table, then a JSON line; exit status 1 if anything was wrong. Needs Linux.
"""

import contextlib
import io
import json
import os
import pty
import shutil
import signal
import sys
import tempfile
import time

from bench import common, victims
from configurator import override
from flatgpt import checkpoint

# Settings -----------------------------------------------------------------------------------------
script = ''  # only the scripts whose name begins with this; '': all
way = ''  # only the ways that begin with this; '': all
folder = ''  # the folder to work in; '': a temporary one
config = override(globals())
# --------------------------------------------------------------------------------------------------

NAMES = ('train', 'train resumed', 'train LoRA', 'reward', 'rl', 'dpo', 'classify',
         'classify, predict', 'pairs', 'batch', 'prepare text',
         'prepare text over another', 'prepare chat', 'clean', 'eval', 'tokenizer view', 'sample')
ENDLESS = ['--max_iters=1000000', '--eval_interval=1000000']  # of a run that gets a signal


# Ways ---------------------------------------------------------------------------------------------
# A way is a function -> (what the child does first, what the parent does meanwhile). The child's
# function returns its streams, or None for those that Python makes of the descriptors.


def closed(*descriptors):
    """Close descriptors."""
    return lambda server: (lambda: [os.close(fd) for fd in descriptors] and None, None)


def opened(path, flags, *descriptors):
    """Let descriptors be a file."""
    def setup():
        for fd in descriptors:
            os.dup2(os.open(path, flags), fd)
    return lambda server: (setup, None)


def piped(n_lines, *descriptors, blocking=True):
    """Let descriptors be a pipe whose reader goes after n lines.

    None: it reads nothing.
    """
    def make(server):
        reading, writing = os.pipe()
        if not blocking:  # and full
            os.set_blocking(writing, False)
            with contextlib.suppress(BlockingIOError):
                while os.write(writing, bytes(4096)):
                    pass

        def setup():
            for fd in descriptors:
                os.dup2(writing, fd)
            os.close(writing)
            os.close(reading)

        def meanwhile(child):
            os.close(writing)
            read_lines(reading, n_lines or 0)
            if n_lines is None:
                server.status = server.wait(child)
            os.close(reading)
        return setup, meanwhile
    return make


def terminal(n_lines, *descriptors, controls=False, nohup=False):
    """Let descriptors be a terminal that is closed after n lines."""
    def make(server):
        master, slave = pty.openpty()

        def setup():
            if nohup:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
            if controls:
                take_terminal(slave)
            for fd in descriptors:
                os.dup2(slave, fd)
            os.close(master)

        def meanwhile(child):
            os.close(slave)
            read_lines(master, n_lines)
            before = len(server.steps())
            while controls and server.is_run and len(server.steps()) <= before + 1:
                read_lines(master, 1)
            os.close(master)
        return setup, meanwhile
    return make


def take_terminal(slave):
    """Make a terminal the controlling one of a new session."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)


def read_lines(descriptor, n):
    """Read n lines, or less where the other end has gone."""
    for _ in range(n):
        try:
            while (char := os.read(descriptor, 1)) != b'\n':
                if not char:
                    return
        except OSError:  # EIO of a terminal
            return


class Broken(io.StringIO):
    """Raise at every write, or at every flush."""

    def __init__(self, error, at='write'):
        super().__init__()
        self.error, self.at = error, at

    def write(self, text):
        if self.at == 'write':
            raise self.error
        return len(text)

    def flush(self):
        raise self.error


class Bare:
    """Be a stream with write() alone, as some notebooks and services have."""

    def __init__(self, descriptor):
        self.descriptor = descriptor

    def write(self, text):
        os.write(self.descriptor, text.encode())

    def flush(self):
        pass


class Notebook(io.StringIO):
    """Be ipykernel's stream: text alone, without a descriptor."""

    def __init__(self, descriptor):
        super().__init__()
        self.descriptor = descriptor

    def write(self, text):
        return os.write(self.descriptor, text.encode())


def streams(make):
    """Let stdout and stderr be streams of Python. make: descriptor -> stream."""
    return lambda server: (lambda: (make(1), make(2)), None)


def closed_streams():
    made = open(1, 'w', closefd=False), open(2, 'w', closefd=False)
    for stream in made:
        stream.close()
    return made


def signalled(name, ignored=False, setup=None):
    """Send a signal when a run has logged a step, or else after a moment."""
    number = getattr(signal, name)

    def make(server):
        def prepare():
            if ignored:
                signal.signal(number, signal.SIG_IGN)
            if setup:
                setup()

        def meanwhile(child):
            end, before = time.monotonic() + 20, len(server.steps())
            while time.monotonic() < end and server.is_run and len(server.steps()) <= before + 1:
                time.sleep(0.01)
            time.sleep(0.1)
            os.kill(child, number)
        return prepare, meanwhile
    return make


def no_reader(*descriptors):
    reading, writing = os.pipe()
    os.close(reading)
    for fd in descriptors:
        os.dup2(writing, fd)
    os.close(writing)


FULL, NULL = '/dev/full', os.devnull
WAYS = {
    'stdin closed': closed(0), 'stdout closed': closed(1), 'stderr closed': closed(2),
    'stdout and stderr closed': closed(1, 2), 'all closed': closed(0, 1, 2),
    'stdout full': opened(FULL, os.O_WRONLY, 1), 'stderr full': opened(FULL, os.O_WRONLY, 2),
    'both full': opened(FULL, os.O_WRONLY, 1, 2), 'stdout read-only': opened(NULL, os.O_RDONLY, 1),
    'pipe without a reader': piped(0, 1), 'stderr pipe without a reader': piped(0, 2),
    'both pipes without a reader': piped(0, 1, 2), 'head -1': piped(1, 1), 'head -4': piped(4, 1),
    '2>&1 head -1': piped(1, 1, 2), '2>&1 head -4': piped(4, 1, 2),
    'stderr head -1': piped(1, 2), 'pipe that is not read, not blocking': piped(None, 1, 2,
                                                                                blocking=False),
    'terminal gone at the start': terminal(0, 0, 1, 2), 'terminal gone': terminal(3, 0, 1, 2),
    'stderr terminal gone': terminal(1, 2),
    'controlling terminal gone': terminal(3, 0, 1, 2, controls=True),
    'nohup, terminal gone': terminal(3, 0, 1, 2, controls=True, nohup=True),
    'closed streams': lambda server: (closed_streams, None),
    'no streams': lambda server: (lambda: (None, None), None),
    'streams raise OSError': streams(lambda fd: Broken(OSError(5, 'Input/output error'))),
    'streams raise ValueError': streams(lambda fd: Broken(ValueError('closed'))),
    'streams raise at flush': streams(lambda fd: Broken(OSError(28, 'No space left'), 'flush')),
    'notebook': streams(Notebook), 'bare streams': streams(Bare),
    'SIGHUP': signalled('SIGHUP'), 'nohup and SIGHUP': signalled('SIGHUP', ignored=True),
    'SIGUSR1': signalled('SIGUSR1'), 'SIGUSR2': signalled('SIGUSR2'),
    'SIGXCPU': signalled('SIGXCPU'), 'SIGTERM': signalled('SIGTERM'),
    'SIGINT': signalled('SIGINT'),
    'SIGTERM, no reader': signalled('SIGTERM', setup=lambda: no_reader(1, 2)),
    'SIGINT, no reader': signalled('SIGINT', setup=lambda: no_reader(1, 2))}
# ways in which sample and eval cannot print anything, and in which they may come to their end
LOSE = ('stdout full', 'both full', 'stdout read-only', 'pipe without', 'both pipes', 'pipe that',
        'terminal gone at', 'streams raise')
MAY_LOSE = ('head', '2>&1 head', 'terminal gone', 'controlling', 'nohup, t', 'SIG')
GONE = ('stdout', 'all', 'no streams', 'closed streams')  # from the start: all is dropped
STOP = ('SIG', 'controlling')  # ways that stop a run


# Cases --------------------------------------------------------------------------------------------


class Server(victims.Server):
    """Run the scripts in these ways."""

    def steps(self):
        """Return the steps in the log of the run."""
        path = f'{self.place}/w/out/log.jsonl'
        if not os.path.exists(path):
            return []
        with open(path, encoding='utf-8') as file:
            records = [json.loads(line) for line in file if line.endswith('\n')]
        return [record['step'] for record in records if 'loss' in record]

    def try_way(self, script, name, command):
        """Run a command in one of the WAYS; -> (exit status, output)."""
        self.status, self.is_run = None, script.result is victims.run_result
        setup, meanwhile = WAYS[name](self)
        output = f'{self.place}/w/out.txt' if script.prints else None
        child = self.start(command, output=output, setup=setup)
        if meanwhile:
            meanwhile(child)
        code = self.wait(child) if self.status is None else self.status
        return code, self.printed(output)


def try_case(server, case, name, folder, expected):
    """Yield what is wrong with a script in one of the WAYS, and what it printed last."""
    server.reset(folder)
    is_run, is_stopped = case.result is victims.run_result, name.startswith(STOP)
    command = case.command + ENDLESS * (is_run and is_stopped)
    code, text = server.try_way(case, name, command)
    if 'Traceback' in text or 'Exception ignored' in text:
        yield 'a traceback'
    if code is None:
        yield 'it hangs'
    if is_run and is_stopped:
        steps, path = server.steps(), f'{server.place}/w/out/ckpt.pt'
        saved = checkpoint.load(path)['iter_num'] if os.path.exists(path) else 0
        if code != 0 or not steps or saved != len(steps) or steps != list(range(saved)):
            yield f'exit status {code}, steps to {steps[-1:]} in the log, step {saved} in ckpt.pt'
    elif case.prints:
        with open(f'{server.place}/w/out.txt', encoding='utf-8') as file:
            is_whole = victims.without_numbers(file.read()) == expected
        if name.startswith(LOSE) and code == 0:
            yield 'exit status 0, but the output is lost'
        if not name.startswith((*LOSE, *MAY_LOSE, *GONE)) and (code or not is_whole):
            yield f'exit status {code}, the output is ' + ('whole' if is_whole else 'not whole')
    elif is_stopped or name.startswith('nohup, t') and code:
        if case.once and victims.result_of(case, server.place) == expected:
            return  # it refuses to write over its result
        again, more = server.run(case)
        if again != 0 or case.result(server.place) != expected:
            yield f'again: exit status {again}, or another result'
            text += more
    elif code != 0:
        yield f'exit status {code}'
    elif case.result(server.place) != expected:
        yield 'another result'
    if way:
        print(text, file=sys.stderr)


place, wrong, n = tempfile.mkdtemp(dir=folder or None), {}, 0
try:
    server = Server(victims.make_place(place))
    rows = [['', 'ways', 'wrong']]
    for case in victims.scripts():
        if case.name not in NAMES or not case.name.startswith(script):
            continue
        before = server.prepare(case, f'{place}/{case.name}')
        server.run(case)
        expected, n_wrong = case.result(place), len(wrong)
        ways = [name for name in WAYS if name.startswith(way)]
        for name in ways:
            if problems := [*try_case(server, case, name, before, expected)]:
                wrong[f'{case.name}, {name}'] = problems
                print(f'{case.name}, {name}: {"; ".join(problems)}', file=sys.stderr)
        rows.append([case.name, len(ways), len(wrong) - n_wrong])
        n += len(ways)
finally:
    shutil.rmtree(place)

# report
print(common.heading('streams'))
print(common.table([*rows, ['all', n, len(wrong)]]))
print(*(f'{label}: {"; ".join(problems)}' for label, problems in wrong.items()), sep='\n')
common.finish('streams', n, wrong=len(wrong))
raise SystemExit(bool(wrong))
