"""Writes files, and appends to them, completely or not at all; reads only ordinary files."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file in one step: no reader, full disk or power cut leaves a part of a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def append(path: Path, content: str | bytes) -> None:
    """Append to a file, or leave it as it was: a full disk does not leave a part of the content."""
    left = memoryview(content.encode() if isinstance(content, str) else content)
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            raise


def sync(path: Path) -> None:
    """Wait until the content of a file or a folder is on the disk."""
    if os.name == "nt":  # Windows cannot open folders, nor sync files that are opened to read
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # the file system cannot sync
            raise
    finally:
        os.close(descriptor)


def read_file(path: Path) -> bytes:
    """The content of an ordinary file.

    Raises:
        OSError: the file cannot be read, or is a pipe or a device, which may have no end.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not an ordinary file")
    return path.read_bytes()
