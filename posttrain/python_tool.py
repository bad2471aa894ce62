"""Run Python code that a model wrote, in a sandbox of Linux namespaces.

    run_python('import math\\nmath.comb(5, 2)')  # -> '10'

The code gets one process and one thread, SECONDS, MEMORY, an empty environment, and no network. It
can read the standard library and /usr, and can write to /tmp alone, which is in memory and is gone
afterwards. That needs `unshare` and `setpriv` of util-linux, and the permission to make namespaces
(user_namespaces(7)). A kernel exploit leaves any such sandbox: a virtual machine is stronger.

Without a sandbox the limits of time, memory, processes and output remain. They stop accidents and
are no security boundary: the code can read and delete the user's files, send them elsewhere, and
start processes if the user is root.
"""

import contextlib
import functools
import inspect
import os
import shutil
import signal
import subprocess
import sys
import tempfile

from configurator import UserError

SECONDS = 5  # from the start of the sandbox to the end of the code
MEMORY = 512 * 2**20  # bytes of address space
MOST_FILE = 2**20  # bytes of a file, and of the output
MOST_OUTPUT = 2000  # characters of the output that are returned
MOST_CODE = 20_000  # characters
PREFIX = os.path.realpath(sys.base_prefix)  # the standard library
PYTHON = os.path.join(PREFIX, 'bin', f'python{sys.version_info[0]}.{sys.version_info[1]}')

# Build a root folder from read-only parts of this machine, and start the command in it without any
# capability. The shell stays process 1 of its namespace: all others end when it does.
ENTER = """
set -e
root=$1 prefix=$2 user=$3
shift 3
mount -t tmpfs -o size=1m,mode=755 none "$root"
for path in /usr /bin /sbin /lib /lib32 /lib64 "$prefix"; do
    if [ -L "$path" ]; then
        ln -s "$(readlink "$path")" "$root$path"
    elif [ -d "$path" ] && [ ! -d "$root$path" ]; then
        mkdir -p "$root$path"
        mount --rbind "$path" "$root$path"
    fi
done
mkdir "$root/etc" "$root/tmp"
if [ -f /etc/ld.so.cache ]; then
    : > "$root/etc/ld.so.cache"
    mount --bind /etc/ld.so.cache "$root/etc/ld.so.cache"
fi
while read -r _ _ _ _ path _; do
    case $path in "$root"/*) mount -o remount,bind,ro,nosuid,nodev "$(printf %b "$path")" ;; esac
done < /proc/self/mountinfo
mount -t tmpfs -o size=32m,nr_inodes=1000,mode=1777,nosuid,nodev none "$root/tmp"
mount -o remount,bind,ro,nosuid,nodev "$root"
drop="--bounding-set=-all --inh-caps=-all --no-new-privs"
if [ "$user" = 0 ]; then drop="$drop --reuid=65534 --regid=65534 --clear-groups"; fi
chroot "$root" setpriv $drop -- "$@"
exit $?
"""


def run_python(code, is_sandboxed=True):
    """Run code; -> what it prints, and the value of a last expression, as a REPL shows them.

    An exception adds its last line, and code that is stopped a line that begins with 'error:'.
    Raises UserError for a sandbox that this machine does not have.
    """
    if is_sandboxed:
        check_sandbox()
    return output_of(code, is_sandboxed)


def output_of(code, is_sandboxed):
    """Run code in a process of its own; -> its output, cut to MOST_OUTPUT characters."""
    if len(code) > MOST_CODE:
        return f'error: {len(code):,} characters; expected at most {MOST_CODE:,}'
    source = f'{inspect.getsource(child)}\nchild({SECONDS}, {MEMORY}, {MOST_FILE})'
    with (tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
          tempfile.TemporaryFile() as printed):
        folder = os.path.realpath(folder)
        command = [PYTHON, '-I', '-S', '-B', '-X', 'utf8', '-c', source]
        if is_sandboxed:
            user = os.geteuid()
            namespaces = ['--mount', '--pid', '--net', '--ipc', '--uts', '--kill-child']
            command = ['unshare', *namespaces, *(['--user', '--map-root-user'] if user else []),
                       'sh', '-c', ENTER, 'sh', folder, PREFIX, str(user), *command]
        environment = {'PATH': '/usr/sbin:/usr/bin:/sbin:/bin',
                       'HOME': '/tmp' if is_sandboxed else folder}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=printed, stderr=printed,
                                   cwd=folder, env=environment, start_new_session=True)
        end = ''
        try:
            process.communicate(code.encode('utf-8', 'replace'), SECONDS)
            if process.returncode:
                end = 'error: the process was killed'
        except subprocess.TimeoutExpired:
            end = f'error: not done in {SECONDS} seconds'
        finally:
            with contextlib.suppress(ProcessLookupError):  # also what it may have started
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # it may have left its group
            process.wait()
        printed.seek(0)
        text = printed.read(MOST_FILE).decode('utf-8', 'replace').rstrip('\n')
    text = text if len(text) <= MOST_OUTPUT else f'{text[:MOST_OUTPUT]}...'
    return '\n'.join(part for part in (text, end) if part)


def child(seconds, memory, most_file):
    """Limit this process, then run the code on its standard input.

    The source of this function alone is what the new process gets.
    """
    import ast
    import contextlib
    import os
    import resource
    import sys

    limits = {'CPU': seconds, 'AS': memory, 'FSIZE': most_file, 'NPROC': 1, 'NOFILE': 32, 'CORE': 0}
    for name, most in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS refuses AS
            resource.setrlimit(getattr(resource, f'RLIMIT_{name}'), (most, most))
    os.chdir(os.environ['HOME'])
    sys.stdout.reconfigure(errors='backslashreplace')
    names = {'__name__': '__main__'}
    try:
        body = ast.parse(sys.stdin.read()).body
        last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        # the model's code: this process exists to run it, within its limits
        exec(compile(ast.Module(body, []), '<model>', 'exec'), names)
        if last:
            sys.displayhook(eval(compile(ast.Expression(last.value), '<model>', 'eval'), names))
    except SystemExit:
        pass
    except BaseException as error:
        print(f'{type(error).__name__}: {error}'.removesuffix(': '))


@functools.lru_cache
def sandbox_failure():
    """Return why code cannot run in the sandbox here, or ''."""
    missing = [name for name in ('unshare', 'setpriv', 'chroot')
               if not shutil.which(name, path='/usr/sbin:/usr/bin:/sbin:/bin')]
    if missing:
        return f'there is no {", ".join(missing)}'
    output = output_of('1 + 1', True)
    return '' if output == '2' else output.partition('\n')[0]


def check_sandbox():
    """Raise UserError if this machine has no sandbox."""
    if failure := sandbox_failure():
        raise UserError(f'python: this machine has no sandbox for the code of a model ({failure}); '
                        f'expected Linux that lets this user make namespaces; '
                        f'--tools=unsandboxed_python runs it without one, with all rights of this '
                        f'user')
