"""A lock that lets one process at a time train a run."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import IO

from losswatch.config.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows has no such locks; there no process is refused
    fcntl = None  # type: ignore[assignment]


def hold(folder: Path) -> IO[bytes]:
    """Lock the run of a folder for this process, until the file returned is closed.

    Two processes would cut each other's record. This can happen if a sweep is ended by Ctrl-C, has
    jobs on a cluster still, and the same command is given again. The lock belongs to the process:
    closing any of its files releases the lock.

    Raises:
        ConfigError: another process holds the lock.
    """
    file = (folder / ".lock").open("ab")
    if fcntl is None:
        return file
    # Another process may hold the lock for a moment, to check that it is free.
    for attempts_left in range(9, -1, -1):
        try:
            # The lock is not inherited. So a worker of the data loader that outlives a killed run
            # does not hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if attempts_left:
                time.sleep(0.1)
                continue
            file.close()
            raise ConfigError(
                f"{folder}: another process is training this run; let it finish, or end it first"
            ) from None
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                break  # a file system without locks
            file.close()
            raise
    return file
