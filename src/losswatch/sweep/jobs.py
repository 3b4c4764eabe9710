"""One run of a sweep: its config, composed once, with its settings and its plan."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from losswatch.config.settings import Job, Settings, task_overrides

if TYPE_CHECKING:
    from losswatch.command import Command
    from losswatch.run.plan import Plan


@dataclass
class Run:
    """One run of a sweep.

    Attributes:
        index: the number of the run in the sweep, from 0.
        config: with the section `hydra`.
        folder: where the run writes everything; absolute.
        settings, plan: of the run; None if this process has not made them.
    """

    index: int
    config: DictConfig
    folder: Path
    settings: Settings | None = None
    plan: Plan | None = None

    @property
    def overrides(self) -> tuple[str, ...]:
        """The overrides of the run."""
        return task_overrides(self.config.hydra)

    def prepare(self, command: Command, is_here: bool = True) -> None:
        """Read the settings, and make the plan.

        Args:
            command: the sweep's.
            is_here: see `Planner.plan`.

        Raises:
            ConfigError: the run cannot work.
        """
        _make_current(self.config)
        job = Job.read(self.config.hydra, self.folder)
        read = functools.partial(command.read, self.config, job)
        self.settings = read()
        plan = command.planner(job).plan(self.settings, read, is_here)
        self.settings = plan.settings
        # Otherwise the process that works on the run plans it: a plan to test holds the network.
        self.plan = plan if is_here and self.settings.mode == "train" else None


def compose_run(
    index: int, overrides: Sequence[str], loader: ConfigLoader, multirun: DictConfig
) -> Run:
    """Compose a run of a sweep.

    Args:
        index: the number of the run in the sweep.
        overrides: those of the run.
        loader: Hydra's.
        multirun: the config of the sweep.

    Raises:
        HydraException, OmegaConfBaseException, YAMLError: the config cannot be composed.
    """
    config = loader.load_sweep_config(multirun, list(overrides))
    with open_dict(config):
        config.hydra.job.id = str(index)
        config.hydra.job.num = index
        # The name that was resolved for the sweep; another process would use another time.
        config.hydra.sweep.dir = multirun.hydra.sweep.dir
    _make_current(config)
    return Run(index, config, Path(config.hydra.sweep.dir, config.hydra.sweep.subdir).absolute())


def _make_current(config: DictConfig) -> None:
    """Let `${hydra:...}` have the values of a run."""
    HydraConfig.instance().set_config(config)
    OmegaConf.set_readonly(config.hydra, None)  # `set_config` protects it; launchers change it


class ComposedOnce:
    """A config loader that gives a launcher the configs that were checked.

    For launchers of this process it replaces Hydra's loader, which takes 70 ms for each config.
    """

    def __init__(self, loader: ConfigLoader, runs: dict[tuple[str, ...], Run]) -> None:
        self.loader, self.runs = loader, runs

    def load_sweep_config(self, multirun: DictConfig, overrides: list[str]) -> DictConfig:
        run = self.runs.get(tuple(overrides))
        return run.config if run else self.loader.load_sweep_config(multirun, overrides)

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)

    def __reduce__(self) -> tuple:
        """Another process composes its own configs."""
        return ComposedOnce, (self.loader, {})
