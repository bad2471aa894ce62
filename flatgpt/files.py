"""Files and folders that are whole or not there, and locked while they are written."""

import errno
import os

from configurator import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the errors of a disk, a quota and a file that are full


def read_text(path):
    """Read a UTF-8 file -> text. Raises UserError."""
    try:
        with open(path, encoding='utf-8') as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read: {error}') from error


def write_synced(path, content):
    with open(path, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path, content: bytes):
    """Write a file anew: whenever the process or the power fails, it is the old one or the new one, whole.

    Another process must not do the same at the same time: both would write to {path}.tmp.
    """
    try:
        write_synced(f'{path}.tmp', content)
        os.replace(f'{path}.tmp', path)
    except BaseException:
        remove([f'{path}.tmp'])
        raise
    sync_folder(os.path.dirname(os.path.abspath(path)))


def sync_folder(path):
    """Make renames in a folder survive a power cut. Windows cannot open folders, and does not need it."""
    if os.name == 'posix':
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove(paths):
    for path in paths:
        try:
            os.remove(path)
        except FileNotFoundError:
            pass


class Busy(UserError):
    """Another process holds the lock of a folder."""


def lock_folder(path, doing='preparing'):
    """
    Keep other processes from writing into this folder for as long as this one lives; returns the descriptor that holds
    the lock. Raises Busy, saying that another process is `doing` the folder, if one is.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise Busy(f'another process is {doing} {path} right now; wait until it has finished') from None
    except OSError:  # some network file systems have no locks
        pass
    return folder


def unlock(lock):
    """Let go of what lock_folder() returned."""
    if lock is not None:
        os.close(lock)
