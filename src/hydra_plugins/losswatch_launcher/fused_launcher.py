"""`hydra/launcher=fused`: the runs of a multirun trained together (losswatch.fuse).

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


ConfigStore.instance().store(group="hydra/launcher", name="fused", node=FusedConf)


class FusedLauncher(Launcher):
    """Groups the runs that can be stacked; see `losswatch.launch`."""

    def __init__(self, max_members: int | None, workers: int | None) -> None:
        self.max_members, self.workers = max_members, workers

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from losswatch.launch import launch

        context: Any = (self.hydra_context, self.task_function, self.config)
        return launch(job_overrides, initial_job_idx, context, self.max_members, self.workers)
