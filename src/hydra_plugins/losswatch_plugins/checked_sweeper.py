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
from losswatch.sweep.grid import check_grid, compose_grid
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

    def sweep(self, arguments: list[str]) -> Any:
        """Check and launch the runs. A sweep that is refused leaves its folder as it was."""
        folder = Path(self.config.hydra.sweep.dir)
        record = folder / "multirun.yaml"  # Hydra writes it before the check
        earlier = record.read_bytes() if record.exists() else None
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        if folder.parent == Path("outputs"):  # `sweep_name` has made both
            made = [folder, folder.parent]
        try:
            return super().sweep(arguments)
        except BaseException:
            if self.command.folder is None:
                _restore(record, earlier, made)
            raise
        finally:
            if hasattr(self.launcher, "stop"):
                self.launcher.stop()

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Check all runs of the sweep, before its first batch. Hydra calls this for each batch.

        Raises:
            Exception: a run cannot work; see `check_grid`.
        """
        if self.command.folder is not None:
            return
        overrides = [overrides for part in self.overrides for overrides in part]
        runs = compose_grid(overrides, self.loader, self.config)
        if hasattr(self.launcher, "start"):  # ours; Hydra loads its class twice
            self.launcher.start([run.config for run in runs])
        checked = check_grid(runs, self.command, _trains_here(self.config.hydra.launcher))
        folder = Path(self.config.hydra.sweep.dir)
        self.command.begin_sweep(folder, checked)
        say(f"{number_of(len(runs), 'run')}; table and runs go to {folder}")


def _trains_here(launcher: DictConfig) -> bool:
    """Whether a launcher trains on this machine. Others send jobs to machines unknown here."""
    name = launcher._target_.rpartition(".")[2]
    if name == "AutoLauncher":
        return launcher.outer is None
    return name in ("BasicLauncher", "JoblibLauncher")


def _restore(file: Path, content: bytes | None, made: Sequence[Path]) -> None:
    """Give a file its earlier content; remove it if there was none, and then the folders `made`."""
    with suppress(OSError):  # a folder is not empty
        if content is not None:
            file.write_bytes(content)
            return
        file.unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()
