"""The typed schema of conf/config.yaml, its checks, and the names of run folders.

Light to import (no torch): `train.py --help` and a misspelt key answer at once.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import re
import struct
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from yaml import MarkedYAMLError, YAMLError
from yaml.reader import Reader, ReaderError


class ConfigError(ValueError):
    """A value that cannot work; the message is one line for the user."""


def misread(error: YAMLError | UnicodeDecodeError) -> str:
    """Which line of which file is no YAML, and why."""
    if isinstance(error, MarkedYAMLError) and (mark := error.problem_mark):
        start = error.context_mark
        since = f" ({error.context}, line {start.line + 1})" if start else ""
        return f"{mark.name}, line {mark.line + 1}: {error.problem}{since}"
    if file := file_read(error):
        for number, line in enumerate(Path(file).read_bytes().split(b"\n"), start=1):
            try:
                Reader(line.decode())
            except UnicodeDecodeError as found:
                return f"{file}, line {number}: byte {line[found.start]:#04x} is not UTF-8"
            except ReaderError as found:
                return f"{file}, line {number}: YAML has no character {found.character:#04x}"
    return " ".join(str(error).split())


def file_read(error: Exception) -> str | None:
    """The file from whose reading an error came."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for value in frame.f_locals.values():
            if isinstance(value, io.TextIOWrapper) and Path(value.name).is_file():
                return str(value.name)
    return None


# Types only: defaults and comments stand in conf/config.yaml, in one place.
@dataclass
class DataConfig:
    image_size: int = MISSING
    dims: int = MISSING
    low: float = MISSING
    high: float = MISSING
    batch_size: int = MISSING
    val_size: int = MISSING
    test_size: int = MISSING
    eval_batch_size: int = MISSING
    num_workers: int = MISSING


@dataclass
class ProbeConfig:
    every_n_steps: int = MISSING
    cosines: bool = MISSING


@dataclass
class Config:
    theta: Any = MISSING
    seed: int = MISSING
    watch: list[Any] = MISSING
    threads: int = MISSING
    compile: bool = MISSING
    mode: str = MISSING
    resume: str | None = None
    checkpoint: str | None = None
    loss: dict[str, Any] = MISSING
    model: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    data: DataConfig = MISSING
    probe: ProbeConfig = MISSING
    trainer: dict[str, Any] = MISSING


LEVELS = 2**24  # values that a pixel of a random image can take, evenly spaced on [0, 1)
FLOAT32_MAX = (2 - 2**-23) * 2.0**127


def thresholds(theta: Any) -> list[float]:
    """θ as a list of numbers.

    Raises:
        ConfigError: not a number in (0, 1), nor a strictly increasing list of such, or so close to
            1 or to each other that a class between them would have no pixel.

    >>> thresholds(0.5), thresholds([0.3, 0.6])
    ([0.5], [0.3, 0.6])
    """
    values = list(theta) if isinstance(theta, Sequence) and not isinstance(theta, str) else [theta]
    numbers = [float(v) for v in values if _is_number(v)]
    if (
        not numbers
        or len(numbers) < len(values)
        or not all(0 < v < 1 for v in numbers)
        or any(a >= b for a, b in zip(numbers, numbers[1:], strict=False))
    ):
        raise ConfigError(
            "theta must be a number strictly between 0 and 1, or a strictly increasing list of "
            f"such (quoted: 'theta=[0.3,0.6]'), got {theta}"
        )
    # Pixels and thresholds are float32; the levels above a threshold begin with the next one.
    rounded = struct.unpack(f"{len(numbers)}f", struct.pack(f"{len(numbers)}f", *numbers))
    ends = [math.floor(v * LEVELS) for v in rounded]
    if any(a >= b for a, b in zip(ends, [*ends[1:], LEVELS - 1], strict=True)):
        raise ConfigError(
            "theta must leave room for each class: thresholds at least 2^-23 (1.2e-7) apart and "
            f"below 1, for pixels are multiples of 2^-24, got {theta}"
        )
    return numbers


_AT_LEAST = {
    "seed": 0,
    "threads": 1,
    "data.image_size": 1,
    "data.batch_size": 1,
    "data.val_size": 1,
    "data.test_size": 1,
    "data.eval_batch_size": 1,
    "data.num_workers": 0,
    "probe.every_n_steps": 0,
    "trainer.max_steps": 1,
    "trainer.val_check_interval": 1,
    "trainer.accumulate_grad_batches": 1,
}
# Lightning's options by which training would end before trainer.max_steps, and what they must be.
_NO_SHORTCUTS = {"fast_dev_run": False, "limit_train_batches": 1.0, "overfit_batches": 0.0}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_values(cfg: DictConfig) -> None:
    """Check every number's range.

    Raises:
        ConfigError: naming the key, what is allowed and what was seen.
    """
    thresholds(OmegaConf.to_object(cfg.theta) if OmegaConf.is_config(cfg.theta) else cfg.theta)
    for key, least in _AT_LEAST.items():
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{key} must be a whole number of at least {least}, got {value}")
    for option, harmless in _NO_SHORTCUTS.items():
        value = cfg.trainer.get(option)
        if value is not None and repr(value) != repr(harmless):
            raise ConfigError(
                f"trainer.{option}={value} would end training before trainer.max_steps, which "
                "alone says how long it is"
            )
    if cfg.seed >= 2**63:
        raise ConfigError(f"seed must be less than 2^63, got {cfg.seed}")
    if cfg.data.dims not in (2, 3):
        raise ConfigError(f"data.dims must be 2 or 3, got {cfg.data.dims}")
    low, high = cfg.data.low, cfg.data.high
    for key, number in (("data.low", low), ("data.high", high), ("high - low", high - low)):
        if not abs(number) <= FLOAT32_MAX:
            raise ConfigError(
                f"{key} must be a finite number, got {number} (float32 ends at 3.4e38)"
            )
    lr = cfg.optimizer.get("lr")
    if not _is_number(lr) or not 0 < lr < math.inf:
        raise ConfigError(f"optimizer.lr must be a number greater than 0, got {lr}")
    clip = cfg.trainer.get("gradient_clip_val")
    if clip is not None and not (_is_number(clip) and 0 <= clip < math.inf):
        raise ConfigError(
            f"trainer.gradient_clip_val must be null or a number of at least 0, got {clip}"
        )
    if cfg.mode not in ("train", "test"):
        raise ConfigError(f"mode must be train or test, got {cfg.mode}")
    if (cfg.mode == "test") != (cfg.checkpoint is not None):
        raise ConfigError("mode=test and checkpoint=<file or run folder> go together")
    if not cfg.watch:
        raise ConfigError("watch must name at least one loss, got []")


@functools.cache
def sweep_name() -> str:
    """A folder name for this command: its time, and a suffix where that is taken.

    Creating the folder is what claims it, so two sweeps begun in one second get two folders.
    """
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 1000):
        name = stamp if attempt == 1 else f"{stamp}-{attempt}"
        try:
            Path("outputs", name).mkdir(parents=True)
        except FileExistsError:
            continue
        return name
    raise ConfigError(f"outputs/ holds too many folders that begin with {stamp}")


def run_folder(resume: str | None, overrides: Sequence[str]) -> str:
    """Where one run goes: the folder that it resumes, or one of its own in a new sweep's folder."""
    return resume or str(Path("outputs", sweep_name(), run_name(overrides)))


def quoted(argument: str) -> str:
    """A path on the command line as Hydra takes it: run folders' names hold "=" and ",".

    >>> quoted("resume=outputs/a/loss=dice,theta=0.5"), quoted("theta=0.5")
    ("resume='outputs/a/loss=dice,theta=0.5'", 'theta=0.5')
    """
    key, _, value = argument.partition("=")
    if key not in ("resume", "checkpoint") or value in ("", "null") or value[0] in "\"'":
        return argument
    return f"{key}='{value}'"


_LONGEST = 150  # bytes; most file systems take 255 a name, and checkpoints sit below
# Commas only inside brackets: a row of such overrides joined by commas is read in one way only.
_PLAIN = re.compile(r"(?:[\w.=+~@-]|\[[\w.,=+~@-]*\])+")


def run_name(overrides: Sequence[str]) -> str:
    """The run's folder name: its overrides, unique, safe and never too long.

    >>> run_name(["loss=dice", "theta=0.05"])
    'loss=dice,theta=0.05'
    >>> run_name([])
    'default'
    """
    named = sorted(overrides)
    name = ",".join(named) or "default"
    if all(map(_PLAIN.fullmatch, named)) and len(name.encode()) <= _LONGEST:
        return name
    digest = hashlib.sha256(repr(named).encode()).hexdigest()[:8]
    safe = re.sub(r"[^\w.,=+~@\[\]-]", "_", name)
    return safe.encode()[: _LONGEST - 9].decode(errors="ignore") + "-" + digest


def register() -> None:
    """Make the schema and the resolvers known to Hydra; train.py calls it first."""
    ConfigStore.instance().store(name="schema", node=Config)
    # Cached in the config, which Hydra hands to the processes of other launchers: one sweep, one
    # folder.
    OmegaConf.register_new_resolver("sweep_name", sweep_name, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("run_folder", run_folder, use_cache=True, replace=True)
