"""The fused launcher's work: it trains the runs of a sweep in groups.

A group is trained as one stack (losswatch.stack). Then each of its runs goes through Hydra's
`run_job` and train.py like any other run. There it is found trained, and its result is written.
Runs that cannot be stacked are trained there.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import joblib
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from losswatch import compat, terminal
from losswatch.config import schema
from losswatch.config.loss_files import loss_nodes
from losswatch.disk.locks import hold
from losswatch.disk.result import finished
from losswatch.run.build import describe_data, make_losses, trainer_options
from losswatch.run.process import quiet
from losswatch.stack.fit import fit
from losswatch.stack.limits import check_config
from losswatch.stack.member import FINISHED, Failure, make_member
from losswatch.stack.refusal import NotStackable
from losswatch.sweep.command import current_sweep
from losswatch.sweep.counting import Counted, collected
from losswatch.sweep.exit import stop
from losswatch.sweep.groups import group_jobs, order_groups
from losswatch.sweep.jobs import Context, Job, make_job
from losswatch.terminal import say
from losswatch.text import number_of, one_line

log = logging.getLogger(__name__)

Returned = tuple[int, JobReturn]  # a run's number, and what its job returned

OUTER_MEMBERS = 32  # runs a group for another launcher, whose machines are not known here
KILLED = "the process that trained it was killed, for want of memory or by a crash in native code"


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
    jobs = [make_job(i, o, context) for i, o in enumerate(job_overrides, initial_job_idx)]
    done: list[Job] = []
    todo: list[Job] = []
    for job in jobs:
        (done if finished(job.folder) else todo).append(job)
    groups, differ = group_jobs(todo) if todo else ([], [])
    uses_gpu = torch.cuda.is_available() and jobs[0].config.trainer.accelerator != "cpu"
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
    earlier = f", {len(done)} done before" if done else ""
    say(
        f"fused: {number_of(len(todo), 'run')} in {number_of(len(parts), 'group')} of up to "
        f"{max(map(len, parts), default=0)}, {place}{reason}{earlier}"
    )

    returns: list[Returned] = []
    if parts and launcher is None:
        total = sum(job.task.trainer.max_steps for job in todo)
        is_shown = todo[0].task.trainer.enable_progress_bar
        with terminal.progress_bar(total, is_shown=is_shown) as bar:
            returns += _run_here(parts, context, at_once, bar)
    elif parts and launcher is not None:
        returns += _run_by(launcher, len(parts))
    returns += run_group(done, context)  # train.py skips each of them
    for _, returned in returns:
        if returned.status is JobStatus.FAILED:  # the sweeper would end the sweep (see `_finish`)
            current_sweep().lacks_runs = True
            returned.status = JobStatus.COMPLETED
    return [returned for _, returned in sorted(returns, key=lambda pair: pair[0])]


def split(jobs: list[Job], size: int) -> list[list[Job]]:
    """The jobs in order, in lists of at most `size`."""
    return [jobs[i : i + size] for i in range(0, len(jobs), size)]


# --- Where groups are trained --------------------------------------------------------------------


def _run_here(
    parts: Sequence[Sequence[Job]], context: Context, at_once: int, bar: terminal.ProgressSink
) -> list[Returned]:
    """On this machine: several groups at once, each in a process of its own; `bar` shows the steps.

    A process that is killed, for want of memory or by a crash in native code, takes the others with
    it, since joblib stops them. It trained one of the first `at_once` groups that did not return.
    Each of these goes on alone, so that only the runs of the killer fail; then come the others.
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
            waiting = [group for group in waiting if group.jobs[0].index not in returned_runs]
            for group in waiting[:at_once]:
                try:
                    for returned in _in_processes([group], at_once):
                        returns += returned
                except BrokenProcessPool:
                    killed = Failure(RuntimeError(KILLED))
                    FINISHED.update({job.folder: killed for job in group.jobs})
                    returns += [(job.index, _finish(job, context)) for job in group.jobs]
            waiting = waiting[at_once:]
    return returns


@dataclass
class _Group:
    """A group of runs for a process of its own."""

    jobs: Sequence[Job]
    file: Path  # where the process counts its steps
    index: int  # of the group there
    context: Context

    def __call__(self, singletons: Any) -> list[Returned]:
        """`run_group` in that process; `singletons` is Hydra's state."""
        setup_globals()
        schema.register()
        Singleton.set_state(singletons)
        with terminal.part_of(Counted(self.file, self.index)):
            return run_group(self.jobs, self.context)


def _in_processes(groups: Sequence[_Group], at_once: int) -> Iterator[list[Returned]]:
    """What `run_group` returns for each group, as soon as it is there.

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

    parts: list[list[tuple[int, list[str]]]]  # number and overrides of each run of each group
    context: Context

    def __call__(self, config: DictConfig) -> list[Returned]:
        runs = self.parts[HydraConfig.get().job.num]
        jobs = [make_job(index, overrides, self.context) for index, overrides in runs]
        # Grouped again: if a cluster stops this job and starts it anew, its runs may be at
        # different steps.
        groups, _ = group_jobs(jobs)
        return [returned for group in groups for returned in run_group(group, self.context)]


def _outer_launcher(outer: Any, parts: Sequence[Sequence[Job]], context: Context) -> Launcher:
    """The launcher whose jobs are the groups, set up with them.

    Args:
        outer: its name, or its config.

    Raises:
        MissingConfigException: there is no launcher of that name.
    """
    multirun = context.multirun
    if not OmegaConf.is_dict(outer):
        outer = context.hydra.config_loader.load_configuration(
            multirun.hydra.job.config_name, [f"hydra/launcher={outer}"], RunMode.RUN
        ).hydra.launcher
    if outer.get("_target_") in (None, multirun.hydra.launcher._target_):
        stop(
            "hydra.launcher.outer takes the name of another launcher (hydra.launcher.outer=ray), "
            "or its config (+hydra/launcher@hydra.launcher.outer=ray)"
        )
    config = copy.deepcopy(multirun)
    with open_dict(config):
        config.hydra.launcher = outer
    runs = [[(job.index, job.overrides) for job in part] for part in parts]
    return Plugins.instance().instantiate_launcher(
        # The callbacks are called for each run of a group, and not for the group.
        hydra_context=replace(context.hydra, callbacks=compat.no_callbacks()),
        task_function=OuterTask(runs, context),
        config=config,
    )


def _run_by(launcher: Launcher, count: int) -> list[Returned]:
    """By another launcher: each group is one of its jobs.

    Their folder is that of the sweep, and they write no config there: of a group only the folders
    of its runs remain.
    """
    overrides = ["hydra.sweep.subdir=.", "hydra.output_subdir=null"]
    finished = launcher.launch([overrides] * count, initial_job_idx=0)
    return [returned for part in finished for returned in part.return_value]


# --- One group -----------------------------------------------------------------------------------


def run_group(jobs: Sequence[Job], context: Context) -> list[Returned]:
    """Train the runs of a group that are not done, and let train.py write the results of all.

    An error is that of the runs that it stops, and is in their results: other runs go on.
    """
    with quiet(), ExitStack() as locks:
        todo = [job for job in jobs if _lock(job, locks)]
        try:
            if todo:
                HydraConfig.instance().set_config(todo[0].config)
                _train(todo)
        except NotStackable as error:
            say(f"{number_of(len(todo), 'run')} trained one by one: {error}")
        except Exception as error:
            for job in todo:
                FINISHED.setdefault(job.folder, Failure(error))
        return [(job.index, _finish(job, context)) for job in jobs]


def _lock(job: Job, locks: ExitStack) -> bool:
    """Whether the run is ours to train; then it is locked until `locks` is closed.

    It is not if it is done, if another process trains it, or if its folder cannot be made.
    train.py or Hydra finds the same later, and says so.
    """
    if finished(job.folder):
        return False
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        locks.enter_context(hold(job.folder))
    except (schema.ConfigError, OSError):
        return False
    return not finished(job.folder)  # another process may have finished it meanwhile


def _train(jobs: Sequence[Job]) -> None:
    """Train runs as one stack, or in halves of it if they do not fit into memory.

    The results are in `FINISHED`.

    Raises:
        NotStackable: the runs need the ordinary training loop.
    """
    first = jobs[0]
    options = trainer_options(first.task)
    check_config(first.task)
    losses = make_losses(loss_nodes(first.task, first.loss), describe_data(first.task))
    members = []
    for job in jobs:
        try:
            _describe(job)
            members.append(make_member(job.task, job.loss, job.folder))
        except NotStackable:
            raise
        except Exception as error:
            FINISHED[job.folder] = Failure(error)
    if not members:
        return
    if start := members[0].start:  # the same in all of a group
        say(f"{number_of(len(members), 'run')} resumed from step {start}")
    try:
        fit(
            members, losses, options, first.task.threads,
            compile=bool(first.task.compile), **first.task.probe,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        if len(jobs) == 1:
            raise
        log.warning("%d runs do not fit into memory; trying half as many at once", len(jobs))
        half = len(jobs) // 2
        for part in (jobs[:half], jobs[half:]):
            _train(part)
        return
    for member in members:
        FINISHED[member.folder] = member


def _describe(job: Job) -> None:
    """Write a run's config before it is trained.

    Hydra writes the same files when the run is finished. A run that is cut off needs them to be
    known by its settings.
    """
    if (name := job.config.hydra.output_subdir) is None:
        return
    (folder := job.folder / name).mkdir(parents=True, exist_ok=True)
    OmegaConf.save(job.task, folder / "config.yaml")
    OmegaConf.save(OmegaConf.masked_copy(job.config, "hydra"), folder / "hydra.yaml")
    OmegaConf.save(job.config.hydra.overrides.task, folder / "overrides.yaml")


def _finish(job: Job, context: Context) -> JobReturn:
    """Let Hydra run train.py for a run; what failed there is no error to Hydra (callback.py).

    The job has failed, with no return value, if Hydra cannot write the run's folder or its config.
    """
    HydraConfig.instance().set_config(job.config)
    try:
        return run_job(
            hydra_context=context.hydra,
            task_function=context.task_function,
            config=job.config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
    except Exception as error:
        say(f"{job.folder}: {one_line(error)}")
        return JobReturn(overrides=job.overrides, status=JobStatus.FAILED)
