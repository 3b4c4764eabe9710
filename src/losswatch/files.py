"""Writes files, and appends to them, completely or not at all; reads only ordinary files."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file in one step: no reader, full disk or power cut leaves a part of a file."""
    replace_files({path: content})


def replace_files(contents: Mapping[Path, str | bytes]) -> None:
    """Write files of one folder, each in one step; a later file exists only if the earlier ones do.

    All of them are on the disk before the first one gets its name.
    """
    partial = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in contents}
    try:
        for path, content in contents.items():
            with partial[path].open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            os.replace(partial[path], path)
        sync(next(iter(contents)).parent)
    finally:
        for file_left in partial.values():
            file_left.unlink(missing_ok=True)


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
