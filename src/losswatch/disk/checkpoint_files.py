"""A run's checkpoints on the disk: written whole, two kept, and the damaged ones passed over."""

from __future__ import annotations

import io
import logging
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from losswatch.config.errors import ConfigError
from losswatch.disk.checkpoint import Content, check_types, step_of, to_keep
from losswatch.files import replace_file
from losswatch.text import printable, reason

log = logging.getLogger(__name__)

KEPT = 2  # checkpoints of a run: if the newest one is damaged, there is the one before

# Whether a checkpoint could be read when the file changed last (mtime_ns), of those that this
# process has read or written.
_readable: dict[Path, tuple[int, bool]] = {}


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where a run keeps its checkpoint after `step` steps."""
    return folder / "checkpoints" / f"step={step}.ckpt"


def save(content: Content, folder: Path) -> None:
    """Write a run's checkpoint as a whole, and remove those that it supersedes."""
    path = checkpoint_path(folder, step_of(content))
    write(content, path)
    _readable[path] = path.stat().st_mtime_ns, True
    prune(folder, step_of(content))


def write(content: Content, path: Path) -> None:
    """Write a checkpoint as a whole; it replaces any other of its name."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, buffer.getvalue())


def prune(folder: Path, step: int, keep: int = KEPT) -> None:
    """Remove the checkpoints of a run that is at `step`, except for the `keep` newest.

    Those of later steps are left from an attempt that was given up. Files that cannot be read stay
    where they are, and do not count.
    """
    good = [path for path in _files(folder) if _is_readable(path)]
    kept = [path for path in good if step_in_name(path) <= step][:keep]
    for path in good:
        if path not in kept:
            path.unlink(missing_ok=True)
            del _readable[path]
    for partial in folder.glob("checkpoints/.step=*.ckpt.*"):  # of a process that was killed
        partial.unlink(missing_ok=True)


def finish(folder: Path, step: int) -> None:
    """Keep only the last checkpoint of a run that ended at `step`."""
    prune(folder, step, keep=1)
    for path in _files(folder):
        _readable.pop(path, None)


class AtomicCheckpoints(TorchCheckpointIO):
    """Makes Lightning write checkpoints by `save`, those of the user's callbacks by `write`.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        if Path(path) == checkpoint_path(self.folder, step_of(checkpoint)):
            save(checkpoint, self.folder)
        else:
            write(checkpoint, Path(path))


def load(path: Path) -> Content:
    """What a checkpoint holds: tensors and plain data, nothing that could run code.

    Raises:
        ValueError: it is torn, damaged, or not a checkpoint; in one line.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for its other end
            raise ValueError("it is not a regular file")
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch.load does not look at the checksums
                raise ValueError(f"its part {damaged} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        check_types(content)
        if step_in_name(path) not in (-1, step_of(content)):
            raise ValueError(f"it is of step {step_of(content)}")
    except Exception as error:
        raise ValueError(f"{printable(path)} cannot be read ({reason(error)})") from error
    return content


def readable(folder: Path, damaged: list[str] | None = None) -> Iterator[tuple[Path, Content]]:
    """A run's checkpoints that can be read, the newest first.

    `damaged` gets a line about each of the others that was passed over.
    """
    for path in _files(folder):
        try:
            content = load(path)
        except ValueError as error:
            if damaged is not None:
                damaged.append(str(error))
        else:
            yield path, content


def newest(folder: Path) -> tuple[Path, Content] | None:
    """The newest checkpoint that can be read; a warning names the others."""
    damaged: list[str] = []
    found = next(readable(folder, damaged), None)
    for line in damaged:
        log.warning("%s; the one before it is used", line)
    return found


def find(place: str) -> Content:
    """The checkpoint that a file or a run's folder holds.

    Raises:
        ConfigError: there is none that can be read.
    """
    path = Path(place)
    if path.is_dir():
        found = newest(path)
        if not found:
            raise ConfigError(f"checkpoint={place}: the folder holds no readable checkpoint")
        return found[1]
    if not path.exists():
        raise ConfigError(f"checkpoint={place}: there is no such file or run folder")
    try:
        return load(path)
    except ValueError as error:
        raise ConfigError(f"checkpoint={error}") from error


def settings_to_keep(place: str) -> dict[str, Any]:
    """What a test takes over from the config of a checkpoint, by dotted key.

    Args:
        place: see `find`.

    Raises:
        ConfigError: there is no checkpoint that can be read.
    """
    return to_keep(find(place))


def step_in_name(path: Path) -> int:
    """The step that a checkpoint's name tells; -1 for another name."""
    match = re.fullmatch(r"step=(\d{1,18})\.ckpt", path.name)
    return int(match[1]) if match else -1


def _files(folder: Path) -> list[Path]:
    """Everything that has the name of a run's checkpoint, the newest first."""
    files = [path for path in folder.glob("checkpoints/*.ckpt") if step_in_name(path) >= 0]
    return sorted(files, key=step_in_name, reverse=True)


def _is_readable(path: Path) -> bool:
    """Whether `load` succeeds. The file is read only if it has changed since the last time."""
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return False
    if _readable.get(path, (None, False))[0] != changed:
        try:
            load(path)
        except ValueError:
            _readable[path] = changed, False
        else:
            _readable[path] = changed, True
    return _readable[path][1]
