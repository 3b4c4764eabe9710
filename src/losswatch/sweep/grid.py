"""Checks all runs of a sweep over a grid before the first one starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig

from losswatch.config.errors import ConfigError
from losswatch.sweep.jobs import Run, compose_run
from losswatch.terminal import say_for_now
from losswatch.text import number_of

if TYPE_CHECKING:
    from losswatch.command import Command


def compose_grid(
    overrides: Sequence[Sequence[str]], loader: ConfigLoader, multirun: DictConfig
) -> list[Run]:
    """The runs of a grid, composed.

    Args:
        overrides: those of each run.
        loader, multirun: see `compose_run`.

    Raises:
        ConfigError: a run is given twice, or the sweep has a setting for single runs.
        HydraException, OmegaConfBaseException, YAMLError: a config cannot be composed.
    """
    for given, times in Counter(map(tuple, overrides)).items():
        if times > 1:
            raise ConfigError(f"the run {' '.join(given)} is asked for twice; nothing was started")
    if multirun.resume is not None:
        raise ConfigError(
            "resume=... is for one run; a sweep is resumed by hydra.sweep.dir=<its folder>"
        )
    say_for_now(f"checking {number_of(len(overrides), 'run')}")
    return [compose_run(i, of_run, loader, multirun) for i, of_run in enumerate(overrides)]


def check_grid(runs: Sequence[Run], command: Command, is_here: bool) -> dict[tuple[str, ...], Run]:
    """Check the runs of a grid; return them by their overrides.

    Args:
        runs: composed.
        command: the sweep's.
        is_here: see `Planner.plan`.

    Raises:
        ConfigError: a run cannot work, or its folder is that of another run, holds another run or
            a run that another process is training.
        OmegaConfBaseException: a config cannot be resolved.
    """
    checked: dict[tuple[str, ...], Run] = {}
    folders: set[Path] = set()
    for run in runs:
        try:
            if run.folder in folders:
                raise ConfigError(f"another run has the same folder, {run.folder}")
            folders.add(run.folder)
            run.prepare(command, is_here)
            _check_folder(run)
        except ConfigError as error:
            where = " ".join(run.overrides)
            raise ConfigError(f"{error} (in the run {where}; nothing was started)") from error
        checked[run.overrides] = run
    return checked


def _check_folder(run: Run) -> None:
    """Check that the folder of a run holds no other run.

    Raises:
        ConfigError: the folder holds another run, or another process is training the run.
    """
    # Imported late: PyTorch takes seconds, and the command imports this file at its start.
    from losswatch.disk.locks import hold
    from losswatch.disk.result import finished
    from losswatch.disk.resume import check_folder

    assert run.settings is not None
    check_folder(run.folder, run.settings.as_config(), is_sweep=True)
    if run.folder.is_dir() and not finished(run.folder):
        hold(run.folder).close()
