"""Write files and folders whole or not at all, and lock them meanwhile."""

import contextlib
import errno
import os
import shutil

from configurator import UserError
from flatgpt.inputs import open_text

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, quota or file


def read_text(path):
    """Read a text file whole -> text. Raises UserError."""
    try:
        with open_text(path) as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read: {error}') from error


def write_synced(path, content):
    """Write bytes to a file and wait until the disk has them."""
    with open(path, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path, content: bytes):
    """Replace a file: after any crash it is the old one or the new one, whole.

    Only one process may do this at a time, because the new content goes to {path}.tmp first.
    """
    try:
        write_synced(f'{path}.tmp', content)
        os.replace(f'{path}.tmp', path)
    except BaseException:
        remove([f'{path}.tmp'])
        raise
    sync_folder(os.path.dirname(os.path.abspath(path)))


def sync_folder(path):
    """Make renames in a folder survive a power cut. Windows has no way to do this."""
    if os.name == 'posix':
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove(paths):
    """Remove the files that exist among these paths."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


@contextlib.contextmanager
def explain_full_disk(folder, content):
    """Raise UserError for a full disk. content: the name of the data without room."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        free = shutil.disk_usage(folder).free / 1e6
        raise UserError(f'{folder} has no room for {content} ({error.strerror}; {free:,.0f} MB '
                        f'free). Free some space and run the same command again, or write to '
                        f'another disk') from None


class Busy(UserError):
    """Report that another process holds the lock of a folder."""


def lock_folder(path, doing='preparing'):
    """Lock a folder or file until unlock() or the end of this process.

    doing: the verb of the error message. -> the descriptor that holds the lock, None without
    locks. Raises Busy when another process holds the lock.
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
        raise Busy(f'another process is {doing} {path} right now; '
                   f'wait until it has finished') from None
    except OSError:  # some network file systems have no locks
        pass
    return folder


def unlock(lock):
    """Release a lock of lock_folder()."""
    if lock is not None:
        os.close(lock)
