"""Go on where an earlier attempt at a run stopped: what its folder holds, and how to take it up.

A checkpoint is Lightning's, and under "losswatch" holds the run's config and the length of each
event file at that step. Resuming cuts the files to those lengths, so the curves have no doubled
stretch, whoever reads them.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import time
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import nn

from losswatch.config import ConfigError
from losswatch.report import replace_file

try:
    import fcntl
except ImportError:  # Windows: nobody is refused there
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

KEPT = 2  # checkpoints a run: should the newest be damaged, there is the one before
# What may differ when a run is taken up again.
_FREE = {"resume", "mode", "checkpoint", "trainer.enable_progress_bar"}


# --- Checkpoints ---------------------------------------------------------------------------------


def save(content: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint at once, and remove those older than the `KEPT` newest."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    path.parent.mkdir(exist_ok=True)
    replace_file(path, buffer.getvalue())
    prune(path.parent.parent, KEPT)


def prune(folder: Path, keep: int) -> None:
    """Remove a run's checkpoints but the `keep` newest."""
    for old in _files(folder)[keep:]:
        old.unlink()


class AtomicCheckpoints(TorchCheckpointIO):
    """`save` for Lightning's own checkpoints."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        save(checkpoint, Path(path))


def load(path: Path) -> dict[str, Any]:
    """A checkpoint's content: tensors and plain data, nothing that could run code.

    Raises:
        ValueError: it is torn, damaged, or not a checkpoint; in one line.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch.load does not look at the checksums
                raise ValueError(f"its part {damaged} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["state_dict"], content["global_step"]
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read ({why})") from error
    return content


def newest(folder: Path, below: float = float("inf")) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint before step `below` that can be read; a warning names the others."""
    for path in _files(folder):
        if _step(path) >= below:
            continue
        try:
            return path, load(path)
        except ValueError as error:
            log.warning("%s; the one before it is used", error)
    return None


def find(place: str) -> dict[str, Any]:
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


def _step(path: Path) -> int:
    found = re.fullmatch(r"step=(\d+)\.ckpt", path.name)
    return int(found[1]) if found else -1


def _files(folder: Path) -> list[Path]:
    files = [p for p in folder.glob("checkpoints/*.ckpt") if _step(p) >= 0]
    return sorted(files, key=_step, reverse=True)


# --- Event files ---------------------------------------------------------------------------------


def event_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each event file, all that was logged being flushed."""
    return {file.name: file.stat().st_size for file in folder.glob("events.out.tfevents.*")}


def rewind(folder: Path, sizes: Mapping[str, int]) -> None:
    """Cut the event files to earlier sizes; those begun later, remove."""
    for file in folder.glob("events.out.tfevents.*"):
        if file.name in sizes:
            os.truncate(file, sizes[file.name])
        else:
            file.unlink()


# --- Configs -------------------------------------------------------------------------------------


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The config, without Hydra's own, as plain data: so it stands in checkpoints and results."""
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    return OmegaConf.to_container(own, resolve=True)  # type: ignore[return-value]


def adopt(cfg: DictConfig, content: Mapping[str, Any], given: Collection[str]) -> None:
    """Set θ, seed, data and the model's numbers as in a checkpoint, but for the keys `given`.

    Numbers only: nothing that a file says is ever imported or called.
    """
    saved = dict(_flat(content.get("losswatch", {}).get("config", {})))
    for key, value in saved.items():
        group = key.split(".")[0]
        if group not in ("theta", "seed", "data", "model") or key in given:
            continue
        if group == "model" and saved.get("model._target_") != cfg.model._target_:
            continue
        numbers = value if isinstance(value, list) else [value]
        if all(isinstance(n, int | float) for n in numbers):
            OmegaConf.update(cfg, key, value)


def load_net(net: nn.Module, content: Mapping[str, Any]) -> None:
    """Load a checkpoint's weights.

    Raises:
        ConfigError: they are not of this net; names the first that differs, and both shapes.
    """
    state = {n[4:]: t for n, t in content["state_dict"].items() if n.startswith("net.")}
    own = net.state_dict()
    for name in own | state:
        here, there = (tuple(s[name].shape) if name in s else "absent" for s in (own, state))
        if here != there:
            model = content.get("losswatch", {}).get("config", {}).get("model", {})
            settings = ", ".join(f"{key}={value}" for key, value in model.items())
            raise ConfigError(
                f"checkpoint: {name} is {there} there and {here} in this model; it was trained "
                f"with {settings or 'another'}"
            )
    net.load_state_dict(state)


def finished(folder: Path) -> dict[str, Any] | None:
    """The result.json of a run that is done."""
    result = _result(folder)
    return result if result and result.get("status") == "done" else None


def _result(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def hold(folder: Path) -> IO[bytes]:
    """Keep other processes from training the folder's run, until the file returned is closed.

    Two would cut each other's event files: a sweep that Ctrl-C ended may still have jobs on a
    cluster when the same command is given again. A process may hold a run twice; the first file
    closed lets go of it.

    Raises:
        ConfigError: another process holds it.
    """
    file = (folder / ".lock").open("ab")
    if fcntl is None:
        return file
    # Another may hold it for a moment, to see whether it is free.
    for patience in range(9, -1, -1):
        try:
            # Of this process alone: a loader's worker that outlives a killed run doesn't hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if patience:
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


def check_folder(folder: Path, cfg: DictConfig) -> None:
    """See that what the folder holds of an earlier attempt was made with the same config.

    Raises:
        ConfigError: it was not; with the difference.
    """
    result = _result(folder)
    earlier = (result or {}).get("config")
    if earlier is None and (found := newest(folder)):
        earlier = found[1].get("losswatch", {}).get("config")
    if earlier is None:
        return
    old, new = (dict(_flat(config)) for config in (earlier, plain(cfg)))
    differ = [
        f"{key} was {old.get(key, 'not set')}, now {new.get(key, 'not set')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in _FREE
    ]
    if differ:
        raise ConfigError(
            f"{folder} holds a run of another config: {'; '.join(differ)}. Give the same settings "
            "to go on with it, or another folder"
        )


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
