"""`hydra/launcher=fused`: the runs of a multirun trained together (losswatch.stack.fuse).

Hydra imports this file whenever it starts, so what takes long to import stays inside `launch`.
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
    _target_: str = "hydra_plugins.losswatch_launcher.fused_launcher.FusedLauncher"
    max_members: int | None = None  # runs a group; null: what keeps all CPU cores, or the GPU, busy
    workers: int | None = None  # groups at once; null: one a CPU core, one for a GPU
    # Another launcher, each of whose jobs is a group. By name, with that launcher's defaults:
    #   hydra.launcher.outer=ray
    # or as its config, to set any of it:
    #   +hydra/launcher@hydra.launcher.outer=submitit_slurm hydra.launcher.outer.partition=gpu
    # `workers` is then how many groups to make; without it and max_members they are of up to 32.
    outer: Any = None
    _recursive_: bool = False  # the launcher makes `outer`, with the groups


ConfigStore.instance().store(group="hydra/launcher", name="fused", node=FusedConf)


class FusedLauncher(Launcher):
    """Groups the runs that can be stacked; see `losswatch.sweep.launch`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings  # FusedConf's

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from losswatch.sweep.launch import launch

        context: Any = (self.hydra_context, self.task_function, self.config)
        return launch(job_overrides, initial_job_idx, context, **self.settings)
