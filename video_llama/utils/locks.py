"""One writer for each output: a second process is refused, and an output that vanishes is noticed."""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from pathlib import Path

from video_llama.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows has no such locks.
    fcntl = None  # type: ignore[assignment]

__all__ = ["OutputLock"]

logger = logging.getLogger(__name__)

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class OutputLock:
    """A lock on an output, held by this process until `release` or its end.

    The lock is the operating system's (POSIX record locks, which NFS has too), so one left by a killed process binds
    nobody. Processes that are forked from this one do not hold it.

    Args:
        path: the lock file; its folder must be there.
        what: the output, in messages.

    Raises:
        ConfigError: another process holds it.
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path, what: Path) -> None:
        self._path, self._what = path, what
        self._file = path.open("a+", encoding="utf-8")
        try:
            self._take()
        except BaseException:
            self._file.close()
            raise
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        self._file.flush()
        self._inode = os.fstat(self._file.fileno()).st_ino

    def check(self) -> None:
        """Check that the output is still where it was.

        Raises:
            ConfigError: its folder was removed, moved or replaced while this process wrote to it.
        """
        try:
            is_there = os.stat(self._path).st_ino == self._inode
        except OSError:
            is_there = False
        if not is_there:
            raise ConfigError(
                f"{self._what}: was removed or moved while it was being written; what was written to it before is not "
                "there any more"
            )

    def release(self) -> None:
        """Give the output free."""
        if self._file.closed:
            return
        # First the name, then the lock: a process that opens the file in between is refused or makes a new one.
        try:
            self.check()
            self._path.unlink()
        except (ConfigError, OSError):
            # The file is another's, or on a disk that cannot be written to any more: nothing is left to tidy up.
            pass
        self._file.close()

    def _take(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self._file.seek(0)
                holder = self._file.read() or "another process"
                raise ConfigError(
                    f"{self._what}: {holder}, writes to it. Wait for it or stop it, or name another output"
                ) from error
            if error.errno not in _UNSUPPORTED:
                raise
            logger.warning("%s: this file system has no locks; let only one process write there", self._what)
