"""`hydra/launcher=auto` and `hydra/launcher=fused`: the runs of a sweep on all cores, or in stacks.

Hydra imports this file whenever it starts, so it imports nothing slow here: `start` imports torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from losswatch.sweep.workers import Workers


@dataclass
class AutoConf:
    _target_: str = "hydra_plugins.losswatch_plugins.launchers.AutoLauncher"
    # Runs that are trained together, as one stack of tensors. faster: where that is faster than a
    # run on each core; all: wherever it is possible.
    stack: str = "faster"
    # Runs in a stack. null: as many as keep all CPU cores, or the GPU, busy.
    max_members: int | None = None
    # Processes that train at the same time. null: one for each CPU core, or one if there is a GPU.
    workers: int | None = None
    # Another launcher; each of its jobs is a group of runs. By its name, with its default settings:
    #   hydra.launcher.outer=ray
    # or as its config, to change a setting:
    #   +hydra/launcher@hydra.launcher.outer=submitit_slurm hydra.launcher.outer.partition=gpu
    # Then `workers` is the number of jobs to make. If neither `workers` nor `max_members` is set,
    # a job has up to 32 runs.
    outer: Any = None
    _recursive_: bool = False  # Hydra must not construct `outer`: the launcher does, for its groups


@dataclass
class FusedConf(AutoConf):
    stack: str = "all"


store = ConfigStore.instance().store
store(group="hydra/launcher", name="auto", node=AutoConf)
store(group="hydra/launcher", name="fused", node=FusedConf)


class AutoLauncher(Launcher):
    """Trains the runs of a sweep on all cores, or in stacks (losswatch.sweep.launch)."""

    def __init__(self, **options: Any) -> None:
        self.options = options  # the fields of AutoConf
        self.workers: Workers | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.given: Any = hydra_context, task_function, config

    def start(self, configs: Sequence[DictConfig]) -> "Workers | None":
        """The processes for these runs. The sweeper starts them before it checks the runs."""
        from losswatch.sweep.launch import Options, start_workers

        if self.workers is None:
            self.workers = start_workers(configs, Options(**self.options))
        return self.workers

    def stop(self) -> None:
        """End the processes. Idle ones would keep their memory."""
        if self.workers is not None:
            self.workers.stop()
            self.workers = None

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from losswatch.sweep.launch import Context, Options, launch

        context, options = Context(*self.given), Options(**self.options)
        return launch(job_overrides, initial_job_idx, context, options, self.start)
