"""One writer at a time: a lock of the file system, or a file that names its owner.

The lock of the file system (`flock`) ends with its process. Some shared file systems have none:
there the process that writes makes a file of its own, which stays if the process is killed. Another
process on the same host then removes that file, because it can see that the owner is gone.
"""

import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from probattn.inference.runs.files import RunError, write_errors

OWNER = "lock.owner"
"""Beside a lock file, where the file system has no locks."""

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_LOOK_AGAIN = 0.05  # seconds between two tries
_held = threading.local()  # its attributes are the lock files that this thread holds


@contextmanager
def hold(path: Path, *, wait: float = 0.0) -> Iterator[bool]:
    """Hold a lock file, which is made if need be and stays; a thread may hold it twice.

    Args:
        path: the lock file, in the run directory that it is for.
        wait: seconds to wait for whoever else holds it.

    Yields:
        Whether this thread did not hold it before.

    Raises:
        RunError: if another process or thread holds it.
        WriteError: if nothing can be written there.
    """
    name = str(path.resolve())
    if name in vars(_held):
        yield False
        return
    ends = time.monotonic() + wait
    while True:
        with write_errors(path):
            release = _lock(path)
        if release is not None:
            break
        if time.monotonic() >= ends:
            raise RunError(f"{path.parent}: another process is writing to this run{_who(path)}")
        time.sleep(_LOOK_AGAIN)
    setattr(_held, name, True)
    try:
        yield True
    finally:
        delattr(_held, name)
        release()


def _lock(path: Path) -> Callable[[], None] | None:
    """Take the lock and return what releases it, or None where somebody else holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_there(path, descriptor):  # and was not removed with its run while this waited
            return lambda: _unlock(descriptor)
    except BlockingIOError:
        pass
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return _own(path.with_name(OWNER))
    os.close(descriptor)
    return None


def _is_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _unlock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that was forked may have it open too
    finally:
        os.close(descriptor)


def _own(path: Path) -> Callable[[], None] | None:
    """Make the file that names this process, unless that of a living process is there."""
    for _ in range(2):
        try:
            with path.open("x", encoding="utf-8") as stream:
                inode = os.fstat(stream.fileno()).st_ino
                stream.write(f"{os.getpid()} {inode} {socket.gethostname()}")
        except FileExistsError:
            if not _is_abandoned(path):
                return None
            path.unlink(missing_ok=True)
        else:
            return lambda: path.unlink(missing_ok=True)
    return None


def _is_abandoned(path: Path) -> bool:
    """Tell whether the owner is gone, as far as this host can see, or the file came by a copy."""
    try:
        pid, inode, host = _owner(path)
        if int(inode) != path.stat().st_ino:
            return True
    except FileNotFoundError:
        return True
    except ValueError:  # it is being written
        return False
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it is another user's process
        pass
    return False


def _owner(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as stream:
        return stream.read(1000).split()  # of a run from somebody else it may hold anything


def _who(path: Path) -> str:
    """Say who holds a lock where a file names its owner, which a kill may have left."""
    try:
        pid, _, host = _owner(path.with_name(OWNER))
    except (FileNotFoundError, ValueError):
        return ""
    return f": process {pid} on {host}; if it is gone, remove {path.with_name(OWNER)}"
