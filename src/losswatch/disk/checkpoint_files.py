"""A run's checkpoints on the disk: written atomically, two kept, damaged ones skipped.

Beside `step=100.ckpt` stands `step=100.json`. It holds what must be known before the checkpoint is
loaded: config, sizes and metrics (checkpoint.py), and a checksum of the .ckpt. It is written last,
so a checkpoint without it is not complete. The .ckpt alone is enough to test or predict.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from losswatch.config.errors import ConfigError
from losswatch.config.kept import Kept
from losswatch.disk.checkpoint import (
    Checkpoint,
    check_types,
    config_of,
    plain_record,
    step_of,
    to_keep,
)
from losswatch.files import read_file, replace_file, replace_files
from losswatch.text import printable, reason, shortened

log = logging.getLogger(__name__)

KEPT = 2  # checkpoints of a run: if the newest one is damaged, the one before it is used


class About(NamedTuple):
    """What the .json beside a checkpoint holds."""

    step: int
    config: dict[str, Any]  # of the run
    sizes: dict[str, int]  # of the files that grow, by name
    metrics: dict[str, float]  # of the validation of these weights; empty if there was none
    checksum: int  # CRC-32 of the .ckpt


# --- Writing -------------------------------------------------------------------------------------


def checkpoint_path(folder: Path, step: int) -> Path:
    """The file of a run's checkpoint after `step` steps."""
    return folder / "checkpoints" / f"step={step}.ckpt"


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a run's checkpoint and the .json beside it, and remove older checkpoints."""
    path, step = checkpoint_path(folder, step_of(checkpoint)), step_of(checkpoint)
    content = _as_bytes(checkpoint)
    about = {"step": step, "metrics": {}, **plain_record(checkpoint)}
    about["checksum"] = zlib.crc32(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_files({path: content, path.with_suffix(".json"): json.dumps(about, indent=2)})
    prune(folder, step)


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint atomically; it replaces another file of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, _as_bytes(checkpoint))


def _as_bytes(checkpoint: Checkpoint) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(checkpoint), buffer)
    return buffer.getvalue()


def prune(folder: Path, step: int, keep: int = KEPT) -> None:
    """Remove the checkpoints of a run that is at `step`, except for the `keep` newest.

    Checkpoints of later steps come from an attempt that was given up; they are removed, too.
    Damaged ones stay, and do not count.
    """
    good = list(saved(folder, reread=False))
    kept = [path for path, about in good if about.step <= step][:keep]
    for path, _ in good:
        if path not in kept:
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)
    for partial in folder.glob("checkpoints/.step=*"):  # a process was killed while writing
        partial.unlink(missing_ok=True)


def finish(folder: Path, step: int) -> None:
    """Keep only the last checkpoint of a run that ended at `step`."""
    prune(folder, step, keep=1)


class AtomicCheckpoints(TorchCheckpointIO):
    """Makes Lightning write by `save_checkpoint`, and checkpoints of other callbacks by `write`.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        if Path(path) == checkpoint_path(self.folder, step_of(checkpoint)):
            save_checkpoint(checkpoint, self.folder)
        else:
            write(checkpoint, Path(path))


# --- Reading -------------------------------------------------------------------------------------


def load_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint: tensors and plain data, nothing that could run code.

    Raises:
        ValueError: the file is cut short, damaged, or not a checkpoint. The message is one line.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for a writer
            raise ValueError("it is not a regular file")
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch.load does not look at the checksums
                raise ValueError(f"its part {damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        check_types(checkpoint)
        if step_in_name(path) not in (-1, step_of(checkpoint)):
            raise ValueError(f"it is of step {step_of(checkpoint)}")
    except Exception as error:
        raise ValueError(f"{printable(path)} cannot be read ({reason(error)})") from error
    return checkpoint


def read_about(path: Path) -> About:
    """Read the .json beside the checkpoint at `path`. The checkpoint itself is not read.

    Raises:
        ValueError: the .json is missing or damaged. The message is one line.
    """
    file = path.with_suffix(".json")
    try:
        parts = json.loads(read_file(file))
        about = About(**{name: parts[name] for name in About._fields})
        sizes = about.sizes.values()
        if not (isinstance(about.config, dict) and all(type(n) is int and n >= 0 for n in sizes)):
            raise ValueError("it holds something else")
        if about.step != step_in_name(path):
            raise ValueError(f"it is of step {about.step}")
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{printable(path)} cannot be read ({file.name}: {reason(error)})"
        ) from error
    return about


def check(path: Path, reread: bool = True) -> About:
    """Read the .json beside a checkpoint, and compare the checksum of the checkpoint.

    Args:
        reread: see `saved`.

    Raises:
        ValueError: one of the two files is missing or damaged. The message is one line.
    """
    about = read_about(path)
    try:
        now = path.stat()
        stamp = (now.st_ino, now.st_size, now.st_mtime_ns)
        if (_checksum(path) if reread else _known_checksum(path, *stamp)) != about.checksum:
            raise ValueError("its checksum differs")
    except (OSError, ValueError) as error:
        raise ValueError(f"{printable(path)} cannot be read ({reason(error)})") from error
    return about


def _checksum(path: Path) -> int:
    return zlib.crc32(read_file(path))


@functools.lru_cache(maxsize=1024)
def _known_checksum(path: Path, *stamp: int) -> int:
    """The checksum of a file, read again only if `stamp` says that the file has changed."""
    return _checksum(path)


def saved(
    folder: Path, damaged: list[str] | None = None, reread: bool = True
) -> Iterator[tuple[Path, About]]:
    """A run's undamaged checkpoints, the newest first. None of them is loaded.

    Args:
        damaged: gets a line about each damaged one that was skipped.
        reread: whether to read also what this process has read before, and whose inode, size and
            time are still the same.
    """
    for path in files(folder):
        try:
            about = check(path, reread)
        except ValueError as error:
            if damaged is not None:
                damaged.append(str(error))
        else:
            yield path, about


def saved_configs(folder: Path) -> Iterator[dict[str, Any]]:
    """The config of each of a run's checkpoints that can be read.

    Raises:
        ConfigError: another program wrote a checkpoint, and this run would replace it.
    """
    for path in files(folder):
        try:
            yield read_about(path).config
        except ValueError:
            try:
                checkpoint = load_checkpoint(path)
            except ValueError:
                continue
            if not config_of(checkpoint):
                raise ConfigError(
                    f"{path} is a checkpoint of another program, which this run would replace; "
                    "give another folder"
                ) from None
            yield config_of(checkpoint)


def newest(folder: Path, damaged: list[str] | None = None) -> tuple[Path, Checkpoint] | None:
    """The newest checkpoint that can be loaded; a warning names each newer one that cannot.

    Args:
        damaged: gets a line about each one that cannot be loaded.
    """
    lines = [] if damaged is None else damaged
    for path in files(folder):
        try:
            found = path, load_checkpoint(path)
        except ValueError as error:
            lines.append(str(error))
        else:
            for line in lines:
                _warn_once(f"{line}; the one before it is used")
            return found
    return None


@functools.cache
def _warn_once(line: str) -> None:
    log.warning("%s", line)


def find_checkpoint(place: str) -> Checkpoint:
    """The checkpoint that a file or a run's folder holds.

    Raises:
        ConfigError: there is no checkpoint that can be read.
    """
    path = Path(place)
    if path.is_dir():
        damaged: list[str] = []
        if found := newest(path, damaged):
            return found[1]
        if damaged or holds_run(path):
            why = "; ".join(["the run holds no readable checkpoint", *damaged])
        else:
            why = f"it is not the folder of a run; {what_it_holds(path)}"
        raise ConfigError(f"checkpoint={place}: {why}")
    if not path.exists():
        raise ConfigError(f"checkpoint={place}: there is no such file or run folder")
    try:
        return load_checkpoint(path)
    except ValueError as error:
        raise ConfigError(f"checkpoint={error}") from error


def settings_to_keep(place: str) -> Kept:
    """The settings that a test takes from a checkpoint.

    Args:
        place: see `find_checkpoint`.

    Raises:
        ConfigError: there is no checkpoint that can be read.
    """
    return to_keep(find_checkpoint(place))


def holds_run(folder: Path) -> bool:
    """Whether a folder has the config of a run."""
    with suppress(OSError):
        config = (folder / ".hydra" / "config.yaml").read_text(encoding="utf-8", errors="replace")
        return re.search(r"^theta:", config, re.MULTILINE) is not None
    return False


def what_it_holds(folder: Path) -> str:
    """What a folder that is not that of a run holds: the runs of a sweep, or other files."""
    names = sorted(file.name for file in folder.iterdir())
    runs = [name for name in names if (folder / name / ".hydra").is_dir()]
    shown = ", ".join(shortened(name) for name in (runs or names)[:5])
    more = ", ..." if len(runs or names) > 5 else ""
    return "it holds " + (
        f"the runs of a sweep: {shown}{more}" if runs else f"{shown}{more}" or "nothing"
    )


def step_in_name(path: Path) -> int:
    """The step in a checkpoint's name; -1 if the name is another one."""
    match = re.fullmatch(r"step=(\d{1,18})\.ckpt", path.name)
    return int(match[1]) if match else -1


def files(folder: Path) -> list[Path]:
    """All files with the name of a run's checkpoint, the newest first."""
    found = [path for path in folder.glob("checkpoints/*.ckpt") if step_in_name(path) >= 0]
    return sorted(found, key=step_in_name, reverse=True)
