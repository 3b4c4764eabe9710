"""What a run's folder holds of earlier attempts: whether it can be trusted, and where to go on."""

from __future__ import annotations

import copy
import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig

from losswatch.config.schema import ConfigError
from losswatch.config.settings import differences
from losswatch.disk.checkpoint import Content, config_of, events_of, step_of
from losswatch.disk.checkpoint_files import readable
from losswatch.disk.event_files import event_files, lost_events
from losswatch.disk.result import Result
from losswatch.run.build import set_length
from losswatch.text import printable, shortened

log = logging.getLogger(__name__)


class Start(NamedTuple):
    """Where a run begins: at a checkpoint, or anew."""

    path: Path | None  # the checkpoint
    content: Content  # of the checkpoint; empty without one
    notice: str | None  # what of the earlier attempt is damaged or missing, and what follows

    @property
    def step(self) -> int:
        return step_of(self.content)

    @property
    def events(self) -> dict[str, int]:
        return events_of(self.content)


def take_up(folder: Path) -> Start:
    """Where a run goes on: at its newest checkpoint with whole event files."""
    passed: list[str] = []
    try:
        Result.read(folder)
    except ValueError as error:
        passed.append(str(error))
    for path, content in readable(folder, passed):
        lost = lost_events(folder, events_of(content))
        if not lost:
            break
        passed.append(f"{printable(path)} cannot be used ({lost})")
    else:
        path, content = None, {}
    then = f"goes on from {path.name}" if path else "starts anew"
    return Start(path, content, f"{'; '.join(passed)}; training {then}" if passed else None)


def announce(notice: str | None, step: int) -> None:
    """Say where a run goes on, and what of an earlier attempt is damaged or missing."""
    if notice:
        log.warning("%s", notice)
    if step:
        log.info("resumed from step %d", step)


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
        if Result.read(folder):
            return
    if event_files(folder) or any(config_of(content) for _, content in readable(folder)):
        return
    names = sorted(file.name for file in folder.iterdir())
    runs = [name for name in names if (folder / name / ".hydra").is_dir()]
    shown = ", ".join(shortened(name) for name in (runs or names)[:5])
    more = ", ..." if len(runs or names) > 5 else ""
    raise ConfigError(
        f"resume={folder} is not the folder of a run; it holds "
        + (f"the runs of a sweep: {shown}{more}" if runs else f"{shown}{more}" or "nothing")
    )


def check_folder(folder: Path, cfg: DictConfig) -> None:
    """See that what the folder holds of an earlier attempt was made with the same config.

    Epochs must also be as long as they were (`set_length`).

    Raises:
        ConfigError: it was not, with the differences; or a checkpoint is of another program.
    """
    result = None
    with suppress(ValueError):
        result = Result.read(folder)
    configs = [result.config] if result else []
    if not result or not result.is_done:
        for path, content in readable(folder):
            if not config_of(content):
                raise ConfigError(
                    f"{path} is a checkpoint of another program, which this run would replace; "
                    "give another folder"
                )
            configs.append(config_of(content))
    if configs and cfg.trainer.max_epochs is not None:
        cfg = copy.deepcopy(cfg)  # Hydra writes this config to the folder as it was given
        set_length(cfg)
    for config in configs:
        if differ := differences(config, cfg):
            raise ConfigError(
                f"{folder} holds a run of another config: {'; '.join(differ[:20])}. Give the same "
                "settings to go on with it, or another folder"
            )
