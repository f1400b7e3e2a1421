"""One process at a time in a folder."""

from __future__ import annotations

import os
import socket
import weakref
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not everywhere: not on Windows
    fcntl = None


class Lock:
    """A file that one process at a time holds.

    It is held by this object: until `release`, the object's end, or the end of the process, however that comes. The
    file stays. Where the file system knows no locks every process gets one.

    Args:
        path: of the file, in a folder that exists.

    Raises:
        ValueError: if another process, or another object in this one, holds it.
        OSError: if the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._close = weakref.finalize(self, os.close, descriptor)
        try:
            _lock(descriptor)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            self.release()
            raise ValueError(
                f"{path.parent} is in use by {holder}: wait until it has ended, or choose another folder"
            ) from error
        with suppress(OSError):  # a full disk: only the name is missing
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Let others have it."""
        self._close()


def _lock(descriptor: int) -> None:
    """Raise BlockingIOError if it is locked. Of the file, not of the process as POSIX's: two in one process differ."""
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # no locks here
        pass
