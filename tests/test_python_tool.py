"""python_tool.py: a model's code, and what it cannot do. Run: pytest tests/test_python_tool.py"""

import os
import socket
import time

import pytest

from posttrain import python_tool
from posttrain.python_tool import MOST_OUTPUT, run_python, sandbox_failure

needs_sandbox = pytest.mark.skipif(bool(sandbox_failure()), reason=f'no sandbox: {sandbox_failure()}')
# the limits of a process hold with and without the sandbox
EITHER = pytest.mark.parametrize('is_sandboxed', [pytest.param(True, marks=needs_sandbox), False])


@EITHER
@pytest.mark.parametrize('code, output', [
    ('1 + 1', '2'), ('print(1)\n"a"', "1\n'a'"), ('x = 5', ''), ('x = 5\nx', '5'), ('None', ''), ('', ''),
    ('import math\ndef f(n):\n    return math.comb(n, 2)\nf(5)', '10'), ('print("é", end="")', 'é'),
    ('print("\\ud800")', '\\ud800'), ('print(1)\n1 / 0', '1\nZeroDivisionError: division by zero'), ('raise KeyError', 'KeyError'),
    ('def f(:', 'SyntaxError: invalid syntax (<unknown>, line 1)'), ('input()', 'EOFError: EOF when reading a line'),
    ('print(1)\nraise SystemExit(3)', '1'), ('open("a", "w").write("bc")\nopen("a").read()', "'bc'")])
def test_output_as_a_repl_shows_it(code, output, is_sandboxed):
    assert run_python(code, is_sandboxed) == output


@EITHER
@pytest.mark.parametrize('code, said', [
    pytest.param('import time\ntime.sleep(60)', 'error: not done in 1 seconds', marks=pytest.mark.slow),
    ('print(7, flush=True)\nwhile True: pass', '7\nerror: not done in 1 seconds'),
    ('x = "x" * 10**9', 'MemoryError'), ('x = []\nwhile True: x.append(bytes(10**7))', 'MemoryError'),
    ('open("a", "wb").write(bytes(10**8))', 'OSError: [Errno 27] File too large'),
    ('import os\nos.abort()', 'error: the process was killed'), ('f = lambda: f()\nf()', 'RecursionError'), ('x' * 10**5, 'error: 100,000 characters')])
def test_limits(code, said, is_sandboxed, monkeypatch):
    monkeypatch.setattr(python_tool, 'SECONDS', 1)
    started = time.monotonic()
    assert said in run_python(code, is_sandboxed) and time.monotonic() - started < 4


@EITHER
def test_a_flood_is_cut(is_sandboxed):
    output = run_python('while True: print("x" * 1000)', is_sandboxed)
    assert output.startswith('x' * 1000) and len(output) < MOST_OUTPUT + 100


@EITHER
@pytest.mark.parametrize('code', ['import os\nos.fork()', 'import subprocess\nsubprocess.run(["ls"])',
                                  'import threading\nthreading.Thread(target=print).start()'])
def test_no_second_process(code, is_sandboxed):
    """A fork bomb fails at its first fork; only root has no such limit outside of the sandbox."""
    if not is_sandboxed and os.geteuid() == 0:
        pytest.skip('root has no limit of processes')
    assert 'Resource temporarily unavailable' in (said := run_python(code, is_sandboxed)) or "can't start" in said


@EITHER
def test_the_environment_is_empty(is_sandboxed, monkeypatch):
    monkeypatch.setenv('SECRET_KEY', 'hunter2')
    assert 'hunter2' not in run_python('import os\nprint(os.environ)', is_sandboxed)


def processes_with(mark):
    """Return the ids of the processes whose command line has a text."""
    ids = [name for name in os.listdir('/proc') if name.isdigit()]

    def command(i):
        try:
            with open(f'/proc/{i}/cmdline', 'rb') as file:
                return file.read()
        except OSError:
            return b''
    return [i for i in ids if mark.encode() in command(i)]


@needs_sandbox
def test_nothing_survives(monkeypatch):
    """Neither a process that left its group nor the folder."""
    monkeypatch.setattr(python_tool, 'SECONDS', 1)
    monkeypatch.setattr(python_tool, 'MOST_FILE', 1234567)  # stands in the command line
    assert run_python('import os, time\nos.setsid()\ntime.sleep(60)') == 'error: not done in 1 seconds'
    deadline = time.monotonic() + 5
    while processes_with('1234567') and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_with('1234567')


@needs_sandbox
def test_files(tmp_path):
    """It reads no home folder, no other process, and writes to /tmp alone, which ends with it."""
    (tmp_path / 'key').write_text('secret')
    for path in (tmp_path / 'key', os.path.expanduser('~/.bashrc'), __file__, '/etc/passwd', '/proc/1/environ',
                 f'/proc/{os.getpid()}/environ', '/dev/sda'):
        assert run_python(f'open({str(path)!r}).read()').startswith('FileNotFoundError')
    for path in ('/usr/x', '/x', '/etc/x', f'{python_tool.PREFIX}/x'):
        assert 'Read-only file system' in run_python(f'open({path!r}, "a")')
    assert run_python('import os\nopen("/tmp/left", "w").write("x")\nos.getcwd()') == "'/tmp'"
    assert not os.path.exists('/tmp/left') and run_python('import os\nos.listdir("/tmp")') == '[]'
    many = 'import os\nfor i in range({n}): open(f"/tmp/{{i}}", "wb").write(bytes({size}))'
    assert 'No space left' in run_python(many.format(n=100, size=10**6))
    assert 'No space left' in run_python(many.format(n=2000, size=0))


@needs_sandbox
def test_network():
    """Not even a server of this machine can be reached."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
        said = run_python(f'import socket\nsocket.create_connection(("127.0.0.1", {port}), 1)')
        assert 'Network is unreachable' in said
    assert 'unreachable' in run_python('import socket\nsocket.create_connection(("1.1.1.1", 53), 1)')


@needs_sandbox
def test_no_rights():
    """No capability, so no mount, no other root folder, no other namespace, no debugger of the shell."""
    said = run_python('import ctypes, resource\nc = ctypes.CDLL(None)\n'
                      'print(c.chroot(b"/tmp"), c.mount(b"none", b"/tmp", b"tmpfs", 0, None), c.unshare(0x10000000), '
                      'c.ptrace(16, 1, 0, 0))\nresource.setrlimit(resource.RLIMIT_NPROC, (99, 99))')
    assert said.startswith('-1 -1 -1 -1\nValueError: not allowed to raise')


def test_without_a_sandbox(monkeypatch):
    """Code runs unsandboxed only where that is asked for."""
    monkeypatch.setattr(python_tool, 'sandbox_failure', lambda: 'there is no unshare')
    with pytest.raises(ValueError, match='no sandbox .*there is no unshare.*--tools=unsandboxed_python'):
        run_python('1')
    assert run_python('1', is_sandboxed=False) == '1'
