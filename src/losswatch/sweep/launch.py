"""The work of the fused launcher: it trains the runs of a sweep in groups.

A group is trained as one stack (losswatch.stack). Then Hydra's `run_job` is called for each of its
runs, with a task function that writes the result. For a run that cannot be stacked the task
function is the command, which trains it.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import joblib
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from losswatch import compat, terminal
from losswatch.config.errors import ConfigError
from losswatch.disk.locks import hold
from losswatch.disk.result import finished
from losswatch.run.build import make_losses
from losswatch.run.process import quiet
from losswatch.stack.fit import fit
from losswatch.stack.limits import check_plan
from losswatch.stack.member import Failure, Member, make_member
from losswatch.stack.refusal import NotStackable
from losswatch.sweep.counting import Counted, collected
from losswatch.sweep.groups import group_runs, order_groups
from losswatch.sweep.jobs import Run, compose_run
from losswatch.task import finish_stacked
from losswatch.terminal import say
from losswatch.text import number_of, one_line

if TYPE_CHECKING:
    from losswatch.command import Command

log = logging.getLogger(__name__)

Returned = tuple[int, JobReturn]  # a run's number, and what its job returned
Outcomes = dict[Path, Member | Failure]  # how runs of a stack ended, by folder

OUTER_MEMBERS = 32  # runs in a group for another launcher, whose machines are unknown here
KILLED = "the process that trained it was killed, because it lacked memory or native code crashed"


class Context(NamedTuple):
    """What Hydra gives the launcher."""

    hydra: HydraContext  # composes configs, and calls the callbacks
    command: Command  # the task function
    multirun: DictConfig  # the config of the sweep, with the section `hydra`


def launch(
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
    context: Context,
    max_members: int | None,
    workers: int | None,
    outer: Any,
) -> list[JobReturn]:
    """Run all jobs of a sweep; return what they return, in the order given.

    Args:
        job_overrides: the overrides of each job.
        initial_job_idx: the number of the first job.
        context: what Hydra gave the launcher.
        max_members, workers, outer: of the launcher's config (`FusedConf`).
    """
    is_here = outer is None
    runs = [
        _find_run(i, overrides, context, is_here)
        for i, overrides in enumerate(job_overrides, initial_job_idx)
    ]
    todo: list[Run] = []
    others: list[Run] = []  # the command skips a run that is done, and fails one that cannot work
    for run in runs:
        (others if run.settings is None or finished(run.folder) else todo).append(run)
    groups, differ = group_runs(todo) if todo else ([], [])
    uses_gpu = torch.cuda.is_available() and runs[0].config.trainer.accelerator != "cpu"
    at_once = workers or (1 if uses_gpu else os.cpu_count() or 1)
    if outer is not None and not workers:
        size = OUTER_MEMBERS
    elif outer is None and uses_gpu:
        size = len(todo)
    else:  # a group takes one CPU core, so there are at least as many groups as cores
        size = -(-len(todo) // at_once)
    parts = [part for group in order_groups(groups) for part in split(group, max_members or size)]

    launcher = None if outer is None else _outer_launcher(outer, parts, context)
    if launcher is None:
        place = f"{min(at_once, len(parts))} at once"
    else:
        advice = "" if max_members or workers else " (hydra.launcher.max_members sets how large)"
        place = f"jobs of {type(launcher).__name__}{advice}"
    reason = f" (they differ in {', '.join(differ)})" if differ else ""
    earlier = f", {len(others)} done before" if others else ""
    if parts:
        say(
            f"fused: {number_of(len(todo), 'run')} in {number_of(len(parts), 'group')} of up to "
            f"{max(map(len, parts))}, {place}{reason}{earlier}"
        )

    returns: list[Returned] = []
    if parts and launcher is None:
        total = sum(run.config.trainer.max_steps for run in todo)
        is_shown = todo[0].config.trainer.enable_progress_bar
        with terminal.progress_bar(total, is_shown=is_shown) as bar:
            returns += _run_here(parts, context, at_once, bar)
    elif parts and launcher is not None:
        returns += _run_by(launcher, len(parts))
    returns += run_group(others, context)
    for _, returned in returns:
        if returned.status is JobStatus.FAILED:  # the sweeper would end the sweep (see `_finish`)
            context.command.lacks_runs = True
            returned.status = JobStatus.COMPLETED
    return [returned for _, returned in sorted(returns, key=lambda pair: pair[0])]


def _find_run(index: int, overrides: Sequence[str], context: Context, is_here: bool) -> Run:
    """A run that was checked before. In a search or another process it is composed now.

    If the settings of a run of a search cannot work, `settings` is None.
    """
    command = context.command
    if run := command.runs.pop(tuple(overrides), None):
        return run
    run = compose_run(index, overrides, context.hydra.config_loader, context.multirun)
    with suppress(ConfigError):
        run.prepare(command, is_here)
    return run


def split(runs: list[Run], size: int) -> list[list[Run]]:
    """The runs in order, in lists of at most `size`."""
    return [runs[i : i + size] for i in range(0, len(runs), size)]


# --- Where groups are trained --------------------------------------------------------------------


def _run_here(
    parts: Sequence[Sequence[Run]], context: Context, at_once: int, bar: terminal.ProgressSink
) -> list[Returned]:
    """Train groups on this machine, several at once, each in its own process.

    `bar` shows the steps.

    If a process is killed, because it lacks memory or native code crashes, joblib stops the others,
    too. The killed one trained one of the first `at_once` groups that have not returned. Each of
    these is then trained alone, so that only the runs of one group fail. The other groups follow.
    """
    if at_once == 1 or len(parts) == 1:
        return [returned for part in parts for returned in run_group(part, context)]
    returns: list[Returned] = []
    with collected(bar, len(parts)) as file:
        waiting = [_Group(part, file, i, context) for i, part in enumerate(parts)]
        while waiting:
            with suppress(BrokenProcessPool):
                for returned in _in_processes(waiting, at_once):
                    returns += returned
            returned_runs = {index for index, _ in returns}
            waiting = [group for group in waiting if group.runs[0].index not in returned_runs]
            for group in waiting[:at_once]:
                try:
                    for returned in _in_processes([group], at_once):
                        returns += returned
                except BrokenProcessPool:
                    killed = Failure(RuntimeError(KILLED))
                    returns += [(run.index, _finish(run, context, killed)) for run in group.runs]
            waiting = waiting[at_once:]
    return returns


@dataclass
class _Group:
    """A group of runs that its own process trains."""

    runs: Sequence[Run]
    file: Path  # where the process counts its steps
    index: int  # of the group there
    context: Context

    def __call__(self, singletons: Any) -> list[Returned]:
        """`run_group` in that process; `singletons` is Hydra's state."""
        setup_globals()
        Singleton.set_state(singletons)
        with terminal.part_of(Counted(self.file, self.index)):
            return run_group(self.runs, self.context)


def _in_processes(groups: Sequence[_Group], at_once: int) -> Iterator[list[Returned]]:
    """What `run_group` returns for each group, as soon as it returns.

    Raises:
        BrokenProcessPool: one of the processes was killed.
    """
    singletons = Singleton.get_state()
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        yield from joblib.Parallel(n_jobs=at_once, return_as="generator_unordered")(
            joblib.delayed(group)(singletons) for group in groups
        )


@dataclass
class OuterTask:
    """The task function of another launcher's jobs: its job number i is group number i.

    The launcher sends all of this with each job, so it holds the overrides and no configs.
    """

    parts: list[list[tuple[int, tuple[str, ...]]]]  # number and overrides of each run of a group
    context: Context

    def __call__(self, config: DictConfig) -> list[Returned]:
        part = self.parts[HydraConfig.get().job.num]
        runs = [_find_run(index, overrides, self.context, True) for index, overrides in part]
        # Grouped again: if a cluster stops this job and starts it anew, its runs may be at
        # different steps.
        able = [run for run in runs if run.settings is not None]
        groups = group_runs(able)[0] if able else []
        groups.append([run for run in runs if run.settings is None])
        return [returned for group in groups for returned in run_group(group, self.context)]


def _outer_launcher(outer: Any, parts: Sequence[Sequence[Run]], context: Context) -> Launcher:
    """The launcher whose jobs are the groups.

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
    runs = [[(run.index, run.overrides) for run in part] for part in parts]
    return Plugins.instance().instantiate_launcher(
        # The callbacks are called for each run of a group, not for the group.
        hydra_context=replace(context.hydra, callbacks=compat.no_callbacks()),
        task_function=OuterTask(runs, context),
        config=config,
    )


def _run_by(launcher: Launcher, count: int) -> list[Returned]:
    """Train groups by another launcher, each as one of its jobs.

    The folder of each job is that of the sweep, and the job writes no config there. So a group
    leaves only the folders of its runs.
    """
    overrides = ["hydra.sweep.subdir=.", "hydra.output_subdir=null"]
    finished = launcher.launch([overrides] * count, initial_job_idx=0)
    return [returned for part in finished for returned in part.return_value]


# --- One group -----------------------------------------------------------------------------------


def run_group(runs: Sequence[Run], context: Context) -> list[Returned]:
    """Train the runs of a group that are not done, and write the results of all.

    The results of the runs that an error stops hold the error. Other runs go on.
    """
    outcomes: Outcomes = {}
    with quiet(), ExitStack() as locks:
        todo = [run for run in runs if _lock(run, locks)]
        try:
            if todo:
                HydraConfig.instance().set_config(todo[0].config)
                _train(todo, outcomes)
        except NotStackable as error:
            say(f"{number_of(len(todo), 'run')} trained one by one: {error}")
        except Exception as error:
            for run in todo:
                outcomes.setdefault(run.folder, Failure(error))
        return [(run.index, _finish(run, context, outcomes.get(run.folder))) for run in runs]


def _lock(run: Run, locks: ExitStack) -> bool:
    """Whether this process trains the run. If so, the run is locked until `locks` is closed.

    It does not train a run that cannot be planned or is done, that another process trains, or whose
    folder cannot be made. The command or Hydra finds the same later, and says so.
    """
    if run.plan is None or finished(run.folder):
        return False
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        locks.enter_context(hold(run.folder))
    except (ConfigError, OSError):
        return False
    return not finished(run.folder)  # another process may have finished it meanwhile


def _train(runs: Sequence[Run], outcomes: Outcomes) -> None:
    """Train runs as one stack, or in halves of it if they do not fit into memory.

    Args:
        outcomes: gets how the runs ended.

    Raises:
        NotStackable: the runs need the ordinary training loop.
    """
    plan = runs[0].plan
    assert plan is not None
    check_plan(plan)
    losses = make_losses(plan)
    members = []
    for run in runs:
        try:
            _describe(run)
            assert run.plan is not None
            members.append(make_member(run.plan))
        except NotStackable:
            raise
        except Exception as error:
            outcomes[run.folder] = Failure(error)
    if not members:
        return
    if start := members[0].start:  # the same for all runs of a group
        say(f"{number_of(len(members), 'run')} resumed from step {start}")
    try:
        fit(members, losses, plan)
    except torch.OutOfMemoryError:
        if len(runs) == 1:
            raise
        log.warning("%d runs do not fit into memory; trying half as many at once", len(runs))
        half = len(runs) // 2
        for part in (runs[:half], runs[half:]):
            _train(part, outcomes)
        return
    outcomes |= {member.folder: member for member in members}


def _describe(run: Run) -> None:
    """Write a run's config before it is trained.

    Hydra writes the same files when the run is finished. If the run is killed before that, these
    files tell its settings.
    """
    if (name := run.config.hydra.output_subdir) is None:
        return
    (folder := run.folder / name).mkdir(parents=True, exist_ok=True)
    own = OmegaConf.masked_copy(run.config, [str(key) for key in run.config if key != "hydra"])
    OmegaConf.save(own, folder / "config.yaml")
    OmegaConf.save(OmegaConf.masked_copy(run.config, "hydra"), folder / "hydra.yaml")
    OmegaConf.save(run.config.hydra.overrides.task, folder / "overrides.yaml")


def _finish(run: Run, context: Context, outcome: Member | Failure | None) -> JobReturn:
    """Let Hydra call the task function of a run, which writes its result.

    If there is no outcome, the task function trains the run. The job fails and returns nothing if
    Hydra cannot write the run's folder or config.
    """
    task: TaskFunction = context.command
    if outcome is None:
        context.command.runs[run.overrides] = run
    else:
        assert run.plan is not None
        task = functools.partial(finish_stacked, context.command, run.plan, outcome)
    HydraConfig.instance().set_config(run.config)
    try:
        return run_job(
            hydra_context=context.hydra,
            task_function=task,
            config=run.config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
    except Exception as error:
        say(f"{run.folder}: {one_line(error)}")
        return JobReturn(overrides=list(run.overrides), status=JobStatus.FAILED)
