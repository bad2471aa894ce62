"""Turn signals into requests that a loop obeys between two steps."""

import os
import signal
import socket
import threading
import time
from contextlib import suppress

STOP = ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU')
AT_ONCE = (signal.SIGINT, signal.SIGTERM)  # at the second one


def catch(request, is_main):
    """Let the signals in STOP call request('stopped by SIGTERM'), once or more.

    A second Ctrl-C or SIGTERM, more than a second after the first, ends the process. is_main:
    whether to print that to a user of Ctrl-C. A signal that nohup ignores stays ignored.
    """
    is_first = True

    def on_signal(number, frame):
        nonlocal is_first
        if is_main and is_first and number == signal.SIGINT:
            with suppress(OSError):  # not print, which the signal may have interrupted
                os.write(2, b'\nfinishing this step, then saving; Ctrl-C again stops at once\n')
        is_first = False
        request(f'stopped by {signal.Signals(number).name}')

    for name in STOP:
        number = getattr(signal, name, None)  # Windows has two of them
        if number and (name == 'SIGINT' or signal.getsignal(number) != signal.SIG_IGN):
            signal.signal(number, on_signal)
    # Python runs no handler while it waits in C++ for another process, but a thread can
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    if hasattr(os, 'register_at_fork'):  # else a child's signals would be written there too
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=obey_second, args=(reader, is_main), daemon=True).start()


def obey_second(reader, is_main):
    """End the process at the second Ctrl-C or SIGTERM, read from a socket."""
    first = {}
    while numbers := reader.recv(64):
        for number in numbers:
            now = time.monotonic()
            # torchrun and a shell may both forward one signal
            if number in AT_ONCE and now - first.setdefault(number, now) > 1:
                if is_main:
                    with suppress(OSError):
                        os.write(2, b'\nstopped at once, without saving\n')
                os._exit(128 + number)
