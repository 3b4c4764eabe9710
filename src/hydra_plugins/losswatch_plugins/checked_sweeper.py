"""`hydra/sweeper=basic`: a sweep over a grid that checks all runs before the first one starts.

Hydra imports this file whenever it starts, so the file imports nothing slow.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from losswatch.compat import basic_sweeper
from losswatch.sweep.grid import check_grid
from losswatch.sweep.jobs import ComposedOnce
from losswatch.terminal import say
from losswatch.text import number_of

if TYPE_CHECKING:
    from losswatch.command import Command

BasicSweeper: Any = basic_sweeper()


class CheckedSweeper(BasicSweeper):
    """Hydra's sweeper over a grid, which here checks the whole grid first."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.command = cast("Command", task_function)
        self.loader = hydra_context.config_loader
        composed: Any = ComposedOnce(self.loader, self.command.runs)
        context = dataclasses.replace(hydra_context, config_loader=composed)
        super().setup(hydra_context=context, task_function=task_function, config=config)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Check all runs of the sweep, before its first batch. Hydra calls this for each batch.

        Raises:
            Exception: a run cannot work; see `check_grid`. Hydra has made the sweep's folder by
                then; it is removed if it holds no run.
        """
        if self.command.folder is not None:
            return
        runs = [overrides for part in self.overrides for overrides in part]
        folder = Path(self.config.hydra.sweep.dir)
        is_here = _trains_here(self.config.hydra.launcher)
        try:
            checked = check_grid(runs, self.command, self.loader, self.config, is_here)
        except BaseException:
            _discard(folder)
            raise
        self.command.begin_sweep(folder, checked)
        say(f"{number_of(len(runs), 'run')}; table and runs go to {folder}")


def _trains_here(launcher: DictConfig) -> bool:
    """Whether a launcher trains on this machine. Others send jobs to machines unknown here."""
    name = launcher._target_.rpartition(".")[2]
    if name == "FusedLauncher":
        return launcher.outer is None
    return name in ("BasicLauncher", "JoblibLauncher")


def _discard(folder: Path) -> None:
    """Remove the folder of a sweep that was refused, unless it holds an earlier sweep's runs."""
    if [file.name for file in folder.iterdir()] == ["multirun.yaml"]:
        with suppress(OSError):
            (folder / "multirun.yaml").unlink()
            folder.rmdir()
            if folder.parent == Path("outputs"):
                folder.parent.rmdir()  # if it is empty
