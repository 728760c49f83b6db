"""The lock on the folder of a run: only one process at a time trains in it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import weakref
from io import BufferedRandom
from pathlib import Path

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)


class RunLock:
    """Holds `run.lock` in a folder until `release` or the end of the process.

    The kernel releases the lock of a killed process. The file remains, and names the last process and its host.

    Raises:
        ValueError: another process holds the lock.
        OSError: the file cannot be opened or written.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "run.lock"
        self._file: BufferedRandom = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666), "r+b")
        _held.add(self)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                print(
                    f"warning: the file system of {folder} has no locks ({error.strerror});"
                    " make sure that no other process trains in it",
                    file=sys.stderr,
                )
                return
            holder = self._file.read(1000).decode(errors="replace").strip() or "another process"
            self.release()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise ValueError(
                f"{folder} is in use by {holder}; wait until it ends or stop it, or choose another --out"
            ) from error
        self._file.truncate()
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._file.flush()

    def release(self) -> None:
        self._file.close()


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _release_all() -> None:
    for each in _held:
        each.release()


# Otherwise a forked worker would hold the lock after the end of this process.
os.register_at_fork(after_in_child=_release_all)
