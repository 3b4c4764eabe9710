"""Finds what earlier attempts left in a run's folder, checks it, and says where to go on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from losswatch.config.errors import ConfigError
from losswatch.config.settings import differences
from losswatch.disk.checkpoint_files import holds_run, saved, saved_configs, what_it_holds
from losswatch.disk.curves import OLD, was_written_by_0_1
from losswatch.disk.growing_files import event_files, what_is_lost
from losswatch.disk.result import Result
from losswatch.text import printable

log = logging.getLogger(__name__)


class Start(NamedTuple):
    """Where a run begins: at a checkpoint, or anew."""

    path: Path | None = None  # the checkpoint
    step: int = 0  # steps done
    sizes: Mapping[str, int] = MappingProxyType({})  # of the files that grow, by name
    metrics: Mapping[str, float] = MappingProxyType({})  # of the validation of that step
    notice: str | None = None  # says what is damaged or missing, and where training goes on


def find_start(folder: Path) -> Start:
    """Where a run goes on: at its newest undamaged checkpoint whose record is complete.

    No checkpoint is loaded; each .ckpt is only read for its checksum.
    """
    passed: list[str] = []
    try:
        Result.read(folder)
    except ValueError as error:
        passed.append(str(error))
    start = Start()
    for path, about in saved(folder, passed):
        lost = what_is_lost(folder, about.sizes)
        if not lost:
            start = Start(path, about.step, about.sizes, about.metrics)
            break
        passed.append(f"{printable(path)} cannot be used ({lost})")
    then = f"goes on from {start.path.name}" if start.path else "starts anew"
    return start._replace(notice=f"{'; '.join(passed)}; training {then}" if passed else None)


def log_resume(notice: str | None, step: int) -> None:
    """Say where a run goes on, and what of an earlier attempt is damaged or missing."""
    if notice:
        log.warning("%s", notice)
    if step:
        log.info("resumed from step %d", step)


def check_run(folder: Path, name: str) -> None:
    """Check that a folder is that of a run, finished or not.

    Args:
        name: the folder as the user has named it.

    Raises:
        ConfigError: the folder is not that of a run; the message says what it holds.
    """
    if not folder.is_dir():
        raise ConfigError(f"resume={name}: there is no such run folder")
    if holds_run(folder):
        return
    with suppress(ValueError):
        if Result.read(folder):
            return
    if event_files(folder) or any(saved(folder)):
        return
    raise ConfigError(f"resume={name} is not the folder of a run; {what_it_holds(folder)}")


def check_folder(folder: Path, config: Mapping[str, Any], is_sweep: bool = False) -> None:
    """Check that an earlier attempt in the folder had the same config.

    Args:
        folder: of the run; it may be missing.
        config: of this command (`Settings.as_config`), with the number of steps.
        is_sweep: whether the run is one of a sweep, whose names tell what is swept alone.

    Raises:
        ConfigError: the folder holds a run with another config (the message lists the differences),
            one of an older losswatch that is not done, or a checkpoint of another program.
    """
    result = None
    with suppress(ValueError):
        result = Result.read(folder)
    configs = [result.config] if result and result.config else []
    if not result or not result.is_done:
        if was_written_by_0_1(folder):
            raise ConfigError(f"{folder} {OLD}")
        configs += saved_configs(folder)
    for earlier in configs:
        if differ := differences(earlier, config):
            others = (
                "sweep what differs, or give another hydra.sweep.dir"
                if is_sweep
                else "or give another folder"
            )
            raise ConfigError(
                f"{folder} holds a run of another config: {'; '.join(differ[:20])}. Give the same "
                f"settings to go on with it, {others}"
            )
