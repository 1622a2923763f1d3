"""Locks that the kernel releases however their process ends: for the folder that a command writes, and for temporary
files, so that those of killed processes can be removed.

They work between the processes of one host, and across hosts if the file system supports flock (NFS 4, Lustre mounted
with flock, GPFS). On file systems without locks, and across hosts on gs:// and s3://, two owners are not detected
(docs/long-runs.md).
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator

from kd_jax.runtime.copies import on_this_host
from kd_jax.runtime.paths import make_folder
from kd_jax.types import UserError

_SECONDS_TO_WAIT = 2.0  # for a lock that another process holds for an instant, to test whether it is free
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # from file systems without locks


@contextlib.contextmanager
def owned(folder: pathlib.Path, part: str = "") -> Iterator[None]:
    """Makes this process the only one that writes in `folder`, or in that part of it; creates the folder if needed.

    Raises UserError with host, process and age of another owner. The lock's file is removed at the end.
    """
    folder = on_this_host(folder)
    make_folder(folder)
    path = folder / f".owner{part}"
    try:
        descriptor = _locked(path)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        values = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(values).encode(), 0)
        yield
    finally:
        # Before the lock is released, since a later removal may hit another owner's file.
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        os.close(descriptor)


def tidy(folder: pathlib.Path) -> None:
    """Removes what killed processes left below a folder: temporary files, and `.owner` files.

    The lock on each tells whether its process is alive, so this is safe while others write there.
    """
    folder = on_this_host(folder)
    for pattern in (".*.tmp", ".owner*"):
        for path in folder.rglob(pattern):
            with contextlib.suppress(OSError):  # it is gone, or on a read-only disk
                descriptor = os.open(path, os.O_RDWR)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                        path.unlink()
                finally:
                    os.close(descriptor)


def _locked(path: pathlib.Path) -> int:
    """The descriptor of the file at `path`, locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not take(descriptor):
            os.close(descriptor)
            raise UserError(f"{path.parent}: {_owner(path)}; wait until it ends, stop it, or choose another folder")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # the previous owner has removed the file in the meantime, so this lock protects nothing


def _owner(path: pathlib.Path) -> str:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        minutes = max(time.time() - values["started"], 0.0) / 60  # clocks jump
        return f"process {values['pid']} on {values['host']} has been writing here for {minutes:.0f} minutes"
    except (OSError, ValueError, KeyError):  # it is gone, or not yet written
        return "another process is writing here"


def take(descriptor: int) -> bool:
    """Whether this process now has the lock of an open file, or the file system has no locks."""
    until = time.monotonic() + _SECONDS_TO_WAIT
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in _NO_LOCKS or time.monotonic() > until:
                return error.errno in _NO_LOCKS
        time.sleep(0.05)


def is_free(descriptor: int) -> bool:
    """Whether no process has the lock; False where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return True
