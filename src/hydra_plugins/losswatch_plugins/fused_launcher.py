"""`hydra/launcher=fused`: the runs of a sweep, trained together in groups.

Hydra imports this file whenever it starts, so it imports nothing slow here: `launch` imports torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class FusedConf:
    _target_: str = "hydra_plugins.losswatch_plugins.fused_launcher.FusedLauncher"
    # Runs in a group. null: as many as keep all CPU cores, or the GPU, busy.
    max_members: int | None = None
    # Groups trained at once. null: one for each CPU core, or one if there is a GPU.
    workers: int | None = None
    # Another launcher; each of its jobs is a group. By its name, with its default settings:
    #   hydra.launcher.outer=ray
    # or as its config, to change a setting:
    #   +hydra/launcher@hydra.launcher.outer=submitit_slurm hydra.launcher.outer.partition=gpu
    # Then `workers` is the number of groups to make. If neither `workers` nor `max_members` is set,
    # a group has up to 32 runs.
    outer: Any = None
    _recursive_: bool = False  # Hydra must not construct `outer`: the launcher does, for its groups


ConfigStore.instance().store(group="hydra/launcher", name="fused", node=FusedConf)


class FusedLauncher(Launcher):
    """Trains the runs of a sweep in groups, as stacks where it can (losswatch.sweep.launch)."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings  # the fields of FusedConf

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.given: Any = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from losswatch.sweep.launch import Context, launch

        return launch(job_overrides, initial_job_idx, Context(*self.given), **self.settings)
