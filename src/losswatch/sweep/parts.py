"""Trains a part of a sweep in one process: runs that are one stack, or a single run.

A stack is trained by losswatch.stack. Then Hydra's `run_job` is called for each of its runs, with a
task function that writes the result. For a single run the task function is the command, which
trains it.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, run_job
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from losswatch.config.errors import ConfigError
from losswatch.disk.locks import hold
from losswatch.disk.result import finished
from losswatch.run.build import make_losses
from losswatch.run.process import quiet
from losswatch.stack.fit import fit
from losswatch.stack.limits import check_plan
from losswatch.stack.member import Failure, Member, make_member
from losswatch.stack.refusal import NotStackable
from losswatch.sweep.jobs import Run, compose_run
from losswatch.task import finish_stacked, record_interrupt
from losswatch.terminal import say
from losswatch.text import number_of, one_line

if TYPE_CHECKING:
    from losswatch.command import Command

log = logging.getLogger(__name__)

Returned = tuple[int, JobReturn]  # a run's number, and what its job returned
Outcomes = dict[Path, Member | Failure]  # how runs of a stack ended, by folder


class Context(NamedTuple):
    """What Hydra gives the launcher."""

    hydra: HydraContext  # composes configs, and calls the callbacks
    command: Command  # the task function
    multirun: DictConfig  # the config of the sweep, with the section `hydra`


@dataclass
class Part:
    """Runs that one process trains.

    Attributes:
        runs: as one stack, if there are several.
        is_stack: whether a single run, too, is a stack.
    """

    runs: list[Run]
    is_stack: bool = True


def find_run(index: int, overrides: Sequence[str], context: Context) -> Run:
    """A run that was checked before; in a search or another process it is composed now."""
    if run := context.command.runs.pop(tuple(overrides), None):
        return run
    return compose_run(index, overrides, context.hydra.config_loader, context.multirun)


def prepare(run: Run, context: Context, is_here: bool = True) -> None:
    """Read the settings and make the plan of a run that was not checked before.

    If the settings of a run of a search cannot work, `settings` stays None.

    Args:
        is_here: see `Planner.plan`.
    """
    if run.settings is None:
        with suppress(ConfigError):
            run.prepare(context.command, is_here)


def train_in_turn(parts: Iterable[Part], context: Context) -> list[Returned]:
    """Train parts in this process, one after the other."""
    waiting, returns = deque(parts), []
    while waiting:
        part = waiting.popleft()
        result = train_part(part, context)
        if isinstance(result, NotStackable):
            waiting.extendleft(reversed(single_parts(part, result)))
        else:
            returns += result
    return returns


def train_part(part: Part, context: Context) -> list[Returned] | NotStackable:
    """Train the runs of a part that are not done, and write the results of all.

    The results of the runs that an error stops hold the error. Other runs go on.

    Returns:
        what the job of each run returned; or why the runs cannot be a stack. Then nothing was done.
    """
    outcomes: Outcomes = {}
    with quiet(), ExitStack() as locks:
        todo = [run for run in part.runs if part.is_stack and _lock(run, locks)]
        try:
            if todo:
                HydraConfig.instance().set_config(todo[0].config)
                _train(todo, outcomes)
        except NotStackable as error:
            return error
        except Exception as error:
            for run in todo:
                outcomes.setdefault(run.folder, Failure(error))
        except (KeyboardInterrupt, SystemExit):  # Lightning turns one into the other
            for run in todo:
                assert run.settings is not None
                record_interrupt(run.settings)
            raise
        return [(run.index, finish(run, context, outcomes.get(run.folder))) for run in part.runs]


def single_parts(part: Part, reason: NotStackable) -> list[Part]:
    """The runs of a part that turned out to be no stack."""
    say(f"{number_of(len(part.runs), 'run')} trained one by one: {reason}")
    return [Part([run], is_stack=False) for run in part.runs]


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


def finish(run: Run, context: Context, outcome: Member | Failure | None = None) -> JobReturn:
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
