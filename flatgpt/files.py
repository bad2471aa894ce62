"""Write files and folders whole or not at all, and lock them meanwhile."""

import contextlib
import errno
import os
import shutil

from configurator import UserError
from flatgpt.inputs import open_text
from tokenizer.base import temporary_name

MOVING = 'previous.tmp'  # the folder of files that move_aside() is moving
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, quota or file


def read_text(path):
    """Read a text file whole -> text. Raises UserError."""
    try:
        with open_text(os.path.expanduser(path)) as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read: {error}') from error


def no_link(path, flags):
    """Open a file, but not through a symbolic link: open(path, 'ab', opener=no_link)."""
    try:
        return os.open(path, flags | getattr(os, 'O_NOFOLLOW', 0), 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(f'{path} is a symbolic link, which is not followed to write; remove it, or '
                        f'name another path') from None


def create(path):
    """Create a binary file in place of whatever has this name. A link's target stays."""
    remove([path])
    return open(path, 'xb', opener=no_link)


def write_synced(path, content):
    """Write bytes to a new file and wait until the disk has them."""
    with create(path) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path, *more):
    """Yield a binary file that takes the name `path` when the block ends well.

    more: further names of it, given before `path`. After any crash each name has the old file or
    the new one, whole. Until the end the new file has a temporary_name().
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, 'xb', opener=no_link) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        for name in more:
            link_file(temporary, name)
        os.replace(temporary, path)
    except BaseException:
        remove([temporary])
        raise
    sync_folder(os.path.dirname(os.path.abspath(path)))


def replace_file(path, content: bytes):
    """Replace a file by these bytes: see replacing()."""
    with replacing(path) as file:
        file.write(content)


def link_file(path, name):
    """Give a file a second name: a link, or a copy where there are no links."""
    temporary = temporary_name(name)
    try:
        try:
            os.link(path, temporary)
        except OSError:
            with open(path, 'rb') as source, open(temporary, 'xb', opener=no_link) as file:
                shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, name)
    except BaseException:
        remove([temporary])
        raise


def move_aside(folder, names, links=()):
    """Move files of a folder to previous-N in it, all or none; -> that folder.

    links: names of folders that stay, of which previous-N gets linked copies. After a crash or an
    error in between, put_back() restores them.
    """
    n, moving = 1, os.path.join(folder, MOVING)
    while os.path.exists(target := os.path.join(folder, f'previous-{n}')):
        n += 1
    os.makedirs(moving)
    try:
        for name in links:
            shutil.copytree(os.path.join(folder, name), os.path.join(moving, name),
                            copy_function=link_file)
        for name in names:
            os.replace(os.path.join(folder, name), os.path.join(moving, name))
        os.rename(moving, target)
    except OSError:
        put_back(folder, [*names, *links])
        raise
    return target


def put_back(folder, names):
    """Return the files of an unfinished move_aside() to their folder."""
    moving = os.path.join(folder, MOVING)
    if os.path.isdir(moving) and not os.path.islink(moving):
        for name in names:
            if os.path.isdir(os.path.join(folder, name)):  # it is a linked copy
                shutil.rmtree(os.path.join(moving, name), ignore_errors=True)
                continue
            with contextlib.suppress(FileNotFoundError):
                os.replace(os.path.join(moving, name), os.path.join(folder, name))
        os.rmdir(moving)


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
