"""Go on where an earlier attempt at a run stopped: what its folder holds, and how to take it up.

A checkpoint is Lightning's, and under "losswatch" holds the run's config and the length of each
event file at that step. Resuming cuts the files to those lengths, so the curves have no doubled
stretch, whoever reads them. Event files are known by the end of their names (`SUFFIX`), so those of
other programs in the same folder are never cut or removed.
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
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from losswatch.events.layout import SUFFIX
from losswatch.files import replace_file, sync
from losswatch.text import printable
from losswatch.train.config import ConfigError

try:
    import fcntl
except ImportError:  # Windows: nobody is refused there
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

KEPT = 2  # checkpoints a run: should the newest be damaged, there is the one before
# What may differ when a run is taken up again.
_FREE = {"resume", "mode", "checkpoint", "trainer.enable_progress_bar", "trainer.max_time"}


# --- Checkpoints ---------------------------------------------------------------------------------

# Whether a checkpoint can be read, as this process found when the file changed last (mtime_ns).
_seen: dict[Path, tuple[int, bool]] = {}


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where a run keeps its checkpoint after `step` steps."""
    return folder / "checkpoints" / f"step={step}.ckpt"


def save(content: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint at once, in the place of any other there, and remove the superseded."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    path.parent.mkdir(exist_ok=True)
    replace_file(path, buffer.getvalue())
    if (step := _step(path)) >= 0:
        _seen[path] = path.stat().st_mtime_ns, True
        prune(path.parent.parent, step)


def prune(folder: Path, step: int, keep: int = KEPT) -> None:
    """Remove the checkpoints of a run that is at `step` but the `keep` newest.

    Those of later steps are of an attempt that was given up. Files that cannot be read stay where
    they are, and do not count.
    """
    good = [path for path in _files(folder) if _is_readable(path)]
    kept = [path for path in good if _step(path) <= step][:keep]
    for path in good:
        if path not in kept:
            path.unlink(missing_ok=True)
            del _seen[path]
    for partial in folder.glob("checkpoints/.step=*.ckpt.*"):  # of a killed process
        partial.unlink(missing_ok=True)


def finish(folder: Path, step: int) -> None:
    """Keep only the last checkpoint of a run that ended at `step`."""
    prune(folder, step, keep=1)
    for path in _files(folder):
        _seen.pop(path, None)


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
        if not path.is_file():  # to open a pipe would wait for its other end
            raise ValueError("it is not a regular file")
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch.load does not look at the checksums
                raise ValueError(f"its part {damaged} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_types(content)
        if _step(path) not in (-1, content["global_step"]):
            raise ValueError(f"it is of step {content['global_step']}")
    except Exception as error:
        why = printable(" ".join(str(error).split())[:200])
        raise ValueError(f"{printable(path)} cannot be read ({why})") from error
    return content


def _check_types(content: dict[str, Any]) -> None:
    """See that a checkpoint holds what is used of it; only losswatch's own hold a record."""
    weights, step = content["state_dict"], content["global_step"]
    states = content.get("optimizer_states", [])
    record = content.get("losswatch", {"config": {}, "events": {}})
    for key, is_right in {
        "global_step": _is_count(step),
        "state_dict": all(
            isinstance(t, Tensor)
            for name, t in weights.items()
            if name.startswith(("net.", "loss."))
        ),
        "optimizer_states": isinstance(states, list) and all(isinstance(s, dict) for s in states),
        "losswatch": (
            isinstance(record["config"], dict)
            and _is_plain(record["config"])
            and all(isinstance(n, str) and _is_count(b) for n, b in record["events"].items())
        ),
    }.items():
        if not is_right:
            raise ValueError(f"its {key} is of another type")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_plain(tree: Any, deepest: int = 20) -> bool:
    """Whether a tree holds only what the config or the result of a run can."""
    if isinstance(tree, dict | list):
        below = [*tree, *tree.values()] if isinstance(tree, dict) else tree
        return deepest > 0 and all(_is_plain(value, deepest - 1) for value in below)
    if isinstance(tree, int):
        return abs(tree) < 2**64
    return tree is None or isinstance(tree, float | str)


def newest(folder: Path, below: float = float("inf")) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint before step `below` that can be read; a warning names the others."""
    passed: list[str] = []
    found = _search(folder, passed, below)
    for reason in passed:
        log.warning("%s; the one before it is used", reason)
    return found


class Start(NamedTuple):
    """From where a run goes on."""

    path: Path | None  # its checkpoint, if there is one
    content: dict[str, Any]  # of that, or empty
    notice: str | None  # what is damaged or missing, and what becomes of it

    @property
    def step(self) -> int:
        return self.content.get("global_step", 0)

    @property
    def events(self) -> dict[str, int]:
        """The event files and their sizes then."""
        return self.content.get("losswatch", {}).get("events", {})

    @property
    def random(self) -> dict[str, Any] | None:
        """The state of the random generators; a stack's checkpoints hold none."""
        return self.content.get("losswatch", {}).get("random")


def take_up(folder: Path, below: int) -> Start:
    """Go on from the newest readable checkpoint before step `below` whose event files are whole."""
    passed: list[str] = []
    try:
        _result(folder)
    except ValueError as error:
        passed.append(str(error))
    path, content = _search(folder, passed, below, with_events=True) or (None, {})
    then = f"goes on from {path.name}" if path else "starts anew"
    return Start(path, content, f"{'; '.join(passed)}; training {then}" if passed else None)


def _search(
    folder: Path, passed: list[str], below: float, with_events: bool = False
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint before step `below` that can be used; why others cannot: `passed`."""
    for path in _files(folder):
        if _step(path) >= below:
            continue
        try:
            content = load(path)
        except ValueError as error:
            passed.append(str(error))
            continue
        if with_events and (lost := _lost_events(folder, content)):
            passed.append(f"{printable(path)} cannot be used ({lost})")
            continue
        return path, content
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
    found = re.fullmatch(r"step=(\d{1,18})\.ckpt", path.name)
    return int(found[1]) if found else -1


def _files(folder: Path) -> list[Path]:
    """All that is named as the run's checkpoints are, the newest first."""
    files = [p for p in folder.glob("checkpoints/*.ckpt") if _step(p) >= 0]
    return sorted(files, key=_step, reverse=True)


def _is_readable(path: Path) -> bool:
    """Whether `load` succeeds; the file is read only if it has changed since it was last seen."""
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return False
    if _seen.get(path, (None, False))[0] != changed:
        try:
            load(path)
        except ValueError:
            _seen[path] = changed, False
        else:
            _seen[path] = changed, True
    return _seen[path][1]


# --- Event files ---------------------------------------------------------------------------------


def _event_files(folder: Path) -> list[Path]:
    """The event files that runs of losswatch began in a folder."""
    return [f for f in folder.glob("events.out.tfevents.*") if f.name.endswith(SUFFIX)]


def event_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each of the run's event files, all of them on the disk."""
    files = _event_files(folder)
    for file in files:
        sync(file)
    return {file.name: file.stat().st_size for file in files}


def _lost_events(folder: Path, content: Mapping[str, Any]) -> str | None:
    """What is missing of the event files that a checkpoint knows."""
    left = {file.name: file.stat().st_size for file in folder.glob("events.out.tfevents.*")}
    for name, size in content.get("losswatch", {}).get("events", {}).items():
        if name not in left:
            return f"the event file {printable(name)} is gone"
        if left[name] < size:
            return f"the event file {printable(name)} was cut from {size} to {left[name]} bytes"
    return None


def rewind(folder: Path, sizes: Mapping[str, int]) -> None:
    """Cut the run's event files to earlier sizes; those that it began later, remove.

    Event files of other programs are left alone, with a warning.
    """
    foreign = []
    for file in folder.glob("events.out.tfevents.*"):
        if file.name in sizes:
            os.truncate(file, sizes[file.name])
        elif file.name.endswith(SUFFIX):
            file.unlink()
        else:
            foreign.append(_short(file.name))
    if foreign:
        log.warning(
            "%s holds event files of another program (%s), left alone; what reads the folder will "
            "take their curves for this run's",
            printable(folder),
            ", ".join(foreign[:3]) + ", ..." * (len(foreign) > 3),
        )


# --- Configs -------------------------------------------------------------------------------------


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The config, without Hydra's own, as plain data: so it stands in checkpoints and results."""
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    return OmegaConf.to_container(own, resolve=True)  # type: ignore[return-value]


def adopt(cfg: DictConfig, content: Mapping[str, Any], given: Collection[str]) -> None:
    """Set θ, seed, data and the model's numbers as in a checkpoint, but for the keys `given`.

    Numbers only: nothing that a file says is ever imported or called.
    """
    saved, now = dict(_flat(_config(content))), dict(_flat(plain(cfg)))
    for key in now:
        group, value = key.split(".")[0], saved.get(key)
        if group not in ("theta", "seed", "data", "model") or key in given:
            continue
        if group == "model" and saved.get("model._target_") != now.get("model._target_"):
            continue
        numbers = value if isinstance(value, list) else [value]
        if all(isinstance(n, int | float) for n in numbers):
            OmegaConf.update(cfg, key, value)


def _config(content: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the run that wrote a checkpoint; empty in one of another program."""
    return content.get("losswatch", {}).get("config", {})


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
            settings = ", ".join(
                f"{_short(key.removeprefix('model.'))}={_short(value)}"
                for key, value in _flat(_config(content))
                if key.startswith("model.")
            )
            raise ConfigError(
                f"checkpoint: {_short(name)} is {there} there and {here} in this model; it was "
                f"trained with {settings or 'another'}"
            )
    net.load_state_dict(state)


def load_loss(loss: nn.Module, content: Mapping[str, Any]) -> None:
    """Load what the trained loss has learnt, where it is the one of the checkpoint."""
    state = {n[5:]: t for n, t in content["state_dict"].items() if n.startswith("loss.")}
    shapes = {n: t.shape for n, t in state.items()}
    if shapes == {n: t.shape for n, t in loss.state_dict().items()}:
        loss.load_state_dict(state)


def finished(folder: Path) -> dict[str, Any] | None:
    """The result.json of a run that is done."""
    try:
        result = _result(folder)
    except ValueError:  # `take_up` names it
        return None
    return result if result and result["status"] == "done" else None


def _result(folder: Path) -> dict[str, Any] | None:
    """What result.json holds; None where there is none.

    Raises:
        ValueError: it is damaged; in one line.
    """
    path = folder / "result.json"
    if not path.exists():
        return None
    try:
        if not path.is_file():
            raise ValueError("it is not a regular file")
        result = json.loads(path.read_text(encoding="utf-8"))
        if not (
            isinstance(result, dict)
            and _is_plain(result)
            and isinstance(result.get("config"), dict)
            and isinstance(result.get("status"), str)
        ):
            raise ValueError("it holds what no run writes")
        metrics = result.get("metrics", {} if result["status"] != "done" else None)
        if not isinstance(metrics, dict) or not all(
            value is None or isinstance(value, int | float) for value in metrics.values()
        ):
            raise ValueError("its metrics are missing or no numbers")
    except (OSError, ValueError, RecursionError) as error:
        why = printable(" ".join(str(error).split())[:200])
        raise ValueError(f"{printable(path)} cannot be read ({why})") from error
    return result


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


def check_run(folder: Path) -> None:
    """See that a folder is that of a run, finished or not.

    Raises:
        ConfigError: it is not; with what it holds.
    """
    if not folder.is_dir():
        raise ConfigError(f"resume={folder}: there is no such run folder")
    with suppress(OSError):
        config = (folder / ".hydra" / "config.yaml").read_text(encoding="utf-8", errors="replace")
        if re.search(r"^theta:", config, re.MULTILINE):
            return
    with suppress(ValueError):
        if _result(folder):
            return
    if _event_files(folder) or any(_config(content) for _, content in _contents(folder)):
        return
    names = sorted(file.name for file in folder.iterdir())
    runs = [name for name in names if (folder / name / ".hydra").is_dir()]
    shown = ", ".join(_short(name) for name in (runs or names)[:5])
    more = ", ..." if len(runs or names) > 5 else ""
    raise ConfigError(
        f"resume={folder} is not the folder of a run; it holds "
        + (f"the runs of a sweep: {shown}{more}" if runs else f"{shown}{more}" or "nothing")
    )


def check_folder(folder: Path, cfg: DictConfig) -> None:
    """See that what the folder holds of an earlier attempt was made with the same config.

    Raises:
        ConfigError: it was not, with the difference; or a checkpoint is of another program.
    """
    result = None
    with suppress(ValueError):
        result = _result(folder)
    earlier = [result["config"]] if result else []
    if not result or result["status"] != "done":
        for path, content in _contents(folder):
            if not _config(content):
                raise ConfigError(
                    f"{path} is a checkpoint of another program, which this run would replace; "
                    "give another folder"
                )
            earlier.append(_config(content))
    new = dict(_flat(plain(cfg)))
    for config in earlier:
        old = dict(_flat(config))
        differ = [
            f"{_short(key)} was {_short(old.get(key, 'not set'))}, now {new.get(key, 'not set')}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
            and not any(f"{key}.".startswith(f"{free}.") for free in _FREE)
        ]
        if differ:
            raise ConfigError(
                f"{folder} holds a run of another config: {'; '.join(differ[:20])}. Give the same "
                "settings to go on with it, or another folder"
            )


def _contents(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The run's checkpoints that can be read."""
    for path in _files(folder):
        with suppress(ValueError):
            yield path, load(path)


def _short(value: Any) -> str:
    """What a file says, as part of a line."""
    text = printable(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
