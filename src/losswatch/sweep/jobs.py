"""One run of a sweep, as the fused launcher handles it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from losswatch.sweep.command import current_sweep


class Context(NamedTuple):
    """What Hydra gives a launcher."""

    hydra: HydraContext  # composes configs, and calls the callbacks
    task_function: TaskFunction  # train.py's main
    multirun: DictConfig  # the config of the sweep, with the `hydra` section


@dataclass
class Job:
    """One run of a sweep."""

    index: int  # its number in the sweep, from 0
    overrides: list[str]
    config: DictConfig  # with the `hydra` section
    folder: Path  # absolute

    @functools.cached_property
    def task(self) -> DictConfig:
        """The config without the `hydra` section, which train.py's main gets."""
        task = copy.deepcopy(self.config)
        with open_dict(task):
            del task["hydra"]
        return task

    @property
    def loss(self) -> str:
        """The name of the trained loss."""
        return self.config.hydra.runtime.choices.loss


def make_job(index: int, overrides: Sequence[str], context: Context) -> Job:
    """Run number `index` of a sweep, its config composed."""
    multirun = context.multirun
    config = current_sweep().configs.pop(tuple(overrides), None)
    if config is None:  # in another process, or in a sweep by a sweeper that searches
        config = context.hydra.config_loader.load_sweep_config(multirun, list(overrides))
    with open_dict(config):
        config.hydra.job.id = str(index)
        config.hydra.job.num = index
        # As resolved for the sweep: another process would take another time for its name.
        config.hydra.sweep.dir = multirun.hydra.sweep.dir
    HydraConfig.instance().set_config(config)  # for ${hydra:...} in the folder's name
    folder = Path(config.hydra.sweep.dir, config.hydra.sweep.subdir).absolute()
    return Job(index, list(overrides), config, folder)
