"""Trains the runs of a sweep by another launcher, such as that of a cluster: `launcher.outer`."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from losswatch import compat
from losswatch.config.errors import ConfigError
from losswatch.sweep.groups import group_runs, order_groups
from losswatch.sweep.jobs import Run
from losswatch.sweep.parts import Context, Part, Returned, find_run, prepare, train_in_turn
from losswatch.sweep.split import Options, say_what, split
from losswatch.text import number_of

OUTER_MEMBERS = 32  # runs in a job, because the machines are unknown here


def train_elsewhere(
    runs: Sequence[Run], done: int, context: Context, options: Options
) -> list[Returned]:
    """Train runs by another launcher: each of its jobs is a group that may become a stack."""
    groups, differ = group_runs(runs)
    size = options.max_members or (
        math.ceil(len(runs) / options.workers) if options.workers else OUTER_MEMBERS
    )
    jobs = [job for group in order_groups(groups) for job in split(group, size)]
    launcher = _outer_launcher(options.outer, jobs, context)
    if not jobs:
        return []
    text = f"{number_of(len(jobs), 'job')} of up to {number_of(max(map(len, jobs)), 'run')}"
    text += f", by {type(launcher).__name__}"
    if not (options.workers or options.max_members):
        text += " (hydra.launcher.max_members sets how large)"
    text += f" (they differ in {', '.join(differ)})" if differ else ""
    say_what(text, done)
    # The folder of each job is that of the sweep, and the job writes no config there. So a job
    # leaves only the folders of its runs.
    overrides = ["hydra.sweep.subdir=.", "hydra.output_subdir=null"]
    finished = launcher.launch([overrides] * len(jobs), initial_job_idx=0)
    return [returned for job in finished for returned in job.return_value]


@dataclass
class OuterTask:
    """The task function of another launcher's jobs: its job number i trains group number i.

    The launcher sends all of this with each job, so it holds the overrides and no configs.
    """

    jobs: list[list[tuple[int, tuple[str, ...]]]]  # number and overrides of each run of a job
    context: Context

    def __call__(self, config: DictConfig) -> list[Returned]:
        job = self.jobs[HydraConfig.get().job.num]
        runs = [find_run(index, overrides, self.context) for index, overrides in job]
        for run in runs:
            prepare(run, self.context)
        # Grouped again: if a cluster stops this job and starts it anew, its runs may be at
        # different steps.
        groups, _ = group_runs([run for run in runs if run.plan is not None])
        parts = [Part(group) for group in groups]
        parts += [Part([run], is_stack=False) for run in runs if run.plan is None]
        return train_in_turn(parts, self.context)


def _outer_launcher(outer: Any, jobs: Sequence[Sequence[Run]], context: Context) -> Launcher:
    """The launcher whose jobs are groups of runs.

    Args:
        outer: the name or the config of the launcher.

    Raises:
        ConfigError: `outer` does not name another launcher.
        MissingConfigException: there is no launcher of that name.
    """
    multirun = context.multirun
    if not OmegaConf.is_dict(outer):
        outer = context.hydra.config_loader.load_configuration(
            multirun.hydra.job.config_name, [f"hydra/launcher={outer}"], RunMode.RUN
        ).hydra.launcher
    if outer.get("_target_") in (None, multirun.hydra.launcher._target_):
        raise ConfigError(
            "hydra.launcher.outer takes the name of another launcher (hydra.launcher.outer=ray), "
            "or its config (+hydra/launcher@hydra.launcher.outer=ray)"
        )
    config = copy.deepcopy(multirun)
    with open_dict(config):
        config.hydra.launcher = outer
    runs = [[(run.index, run.overrides) for run in job] for job in jobs]
    return Plugins.instance().instantiate_launcher(
        # The callbacks are called for each run of a job, not for the job.
        hydra_context=replace(context.hydra, callbacks=compat.no_callbacks()),
        task_function=OuterTask(runs, context),
        config=config,
    )
