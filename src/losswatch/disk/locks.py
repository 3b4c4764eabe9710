"""One process at a time trains a run."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import IO

from losswatch.config.errors import ConfigError

try:
    import fcntl
except ImportError:  # on Windows, where nobody is refused
    fcntl = None  # type: ignore[assignment]


def hold(folder: Path) -> IO[bytes]:
    """Keep other processes from training the folder's run, until the file returned is closed.

    Two processes would cut each other's event files. A sweep that was ended by Ctrl-C may still
    have jobs on a cluster when the same command is given again. A process may hold a run twice; the
    first file that is closed lets go of it.

    Raises:
        ConfigError: another process holds it.
    """
    file = (folder / ".lock").open("ab")
    if fcntl is None:
        return file
    # Another process may hold it for a moment, to see whether it is free.
    for attempts_left in range(9, -1, -1):
        try:
            # The lock is this process's alone. A worker of its data loader that outlives a killed
            # run does not hold it.
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
