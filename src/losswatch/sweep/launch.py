"""The fused launcher's work: which runs of a multirun are trained together, and where.

A group is trained as one stack (fuse.py). Then each of its runs goes through Hydra's own `run_job`
like any other, where train.py finds it finished and writes its result. What cannot be stacked is
trained there instead.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
import sys
from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import joblib
import torch
from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from losswatch.stack import fuse
from losswatch.stack.step import NotStackable
from losswatch.sweep.callback import SweepCallback, say, stop
from losswatch.train import config as schema
from losswatch.train import resume
from losswatch.train.build import loss_nodes, make_losses, quieten, read_losses, trainer_options

log = logging.getLogger(__name__)

Returned = tuple[int, JobReturn]  # of the run of that number

OUTER_MEMBERS = 32  # runs a group, for machines that this one knows nothing of


@dataclass
class Job:
    index: int
    overrides: list[str]
    config: DictConfig  # with its hydra section
    folder: Path

    @functools.cached_property
    def task(self) -> DictConfig:
        """What train.py's main gets: the config without the hydra section."""
        task = copy.deepcopy(self.config)
        with open_dict(task):
            del task["hydra"]
        return task

    @property
    def loss(self) -> str:
        return self.config.hydra.runtime.choices.loss


def make_job(index: int, overrides: Sequence[str], context: Any) -> Job:
    """One run of the multirun."""
    hydra_context, _, config = context
    job = SweepCallback.configs.pop(tuple(overrides), None)
    if job is None:  # in another process, or the sweep is an optimiser's
        job = hydra_context.config_loader.load_sweep_config(config, list(overrides))
    with open_dict(job):
        job.hydra.job.id = str(index)
        job.hydra.sweep.dir = config.hydra.sweep.dir  # a new process would make another name
        job.hydra.job.num = index
    HydraConfig.instance().set_config(job)  # what ${hydra:...} in the folder's name refers to
    folder = Path(job.hydra.sweep.dir, job.hydra.sweep.subdir).absolute()
    return Job(index, list(overrides), job, folder)


def _key(job: Job) -> dict[str, Any]:
    """What must be equal for two runs to be stacked, by name."""
    config: Any = OmegaConf.to_container(job.task, resolve=True)
    per_run = {"lr", "betas", "eps", "weight_decay", "momentum", "nesterov"}
    config["optimizer"] = {k: v for k, v in config["optimizer"].items() if k not in per_run}
    del config["seed"], config["data"]["low"], config["data"]["high"]
    config["theta"] = f"{len(schema.thresholds(config['theta'])) + 1} classes"
    # The trained loss as it would be among those watched.
    trained = config.pop("loss")
    config["watched"] = sorted({*config.pop("watch"), job.loss})
    config["changed loss"] = trained if _changed(job, trained) else None
    config["steps done"] = resume.take_up(job.folder, config["trainer"]["max_steps"]).step
    return config


def _changed(job: Job, trained: dict[str, Any]) -> bool:
    """Whether the command line changed the trained loss from what its file says."""
    return trained != OmegaConf.to_container(read_losses([job.loss], job.task)[job.loss])


def _frozen(value: Any) -> Hashable:
    return json.dumps(value, sort_keys=True, default=str)


def groups(jobs: Sequence[Job]) -> tuple[list[list[Job]], list[str]]:
    """The jobs by what must be equal, and the keys that told them apart."""
    keys = [_key(job) for job in jobs]
    found: dict[Hashable, list[Job]] = {}
    for job, key in zip(jobs, keys, strict=True):
        found.setdefault(_frozen(key), []).append(job)
    differ = [
        f"{name}.{sub}" if sub else name
        for name in keys[0]
        for sub in (keys[0][name] if isinstance(keys[0][name], dict) else [""])
        if len({_frozen(k[name].get(sub) if sub and k[name] else k[name]) for k in keys}) > 1
    ]
    return list(found.values()), differ


def in_turn(found: Sequence[list[Job]]) -> list[list[Job]]:
    """The groups in the order in which to begin them, several at once.

    Those that differ in the optimiser alone share a compiled step (step.py), which the later ones
    find in the compiler's cache. What a grid names last is often the larger, and takes longer: it
    begins first.
    """
    return sorted(reversed(found), key=lambda group: group[0].config.optimizer._target_)


def _describe(job: Job) -> None:
    """Write what Hydra will when the run is finished: else nothing would say what was cut off."""
    if (name := job.config.hydra.output_subdir) is None:
        return
    (folder := job.folder / name).mkdir(parents=True, exist_ok=True)
    OmegaConf.save(job.task, folder / "config.yaml")
    OmegaConf.save(OmegaConf.masked_copy(job.config, "hydra"), folder / "hydra.yaml")
    OmegaConf.save(job.config.hydra.overrides.task, folder / "overrides.yaml")


def _train(jobs: Sequence[Job]) -> None:
    """Train the jobs as one stack, in halves where the memory does not hold them."""
    first = jobs[0]
    options = trainer_options(first.task)
    fuse.check_options(options)
    torch.set_num_threads(first.task.threads)
    losses = make_losses(loss_nodes(first.task, first.loss))
    members = []
    for job in jobs:
        try:
            _describe(job)
            members.append(fuse.make_member(job.task, job.loss, job.folder))
        except Exception as error:
            fuse.FINISHED[job.folder] = fuse.Failure(error)
    if not members:
        return
    if start := members[0].start:  # of all: it is one of the keys
        print(f"{_count(len(members), 'run')} resumed from step {start}", file=sys.stderr)
    try:
        fuse.fit(members, losses, options, compile=bool(first.task.compile), **first.task.probe)
    except torch.OutOfMemoryError:
        if len(jobs) == 1:
            raise
        log.warning("%d runs do not fit into memory; trying half as many at once", len(jobs))
        half = len(jobs) // 2
        for part in (jobs[:half], jobs[half:]):
            _train(part)
        return
    for member in members:
        fuse.FINISHED[member.folder] = member


def _execute(jobs: Sequence[Job], context: Any, singletons: Any) -> list[Returned]:
    """One group, in a process of its own or in this one."""
    hydra_context, task_function, _ = context
    if singletons is not None:  # a fresh process
        setup_globals()
        schema.register()
        Singleton.set_state(singletons)
    quieten()
    with ExitStack() as held:
        todo = [job for job in jobs if not resume.finished(job.folder) and _hold(job, held)]
        try:
            if todo:
                HydraConfig.instance().set_config(todo[0].config)
                _train(todo)
        except NotStackable as error:
            print(f"{_count(len(todo), 'run')} trained one by one: {error}", file=sys.stderr)
        except Exception as error:  # theirs alone: other groups go on
            for job in todo:
                fuse.FINISHED.setdefault(job.folder, fuse.Failure(error))
        returns = []
        for job in jobs:
            HydraConfig.instance().set_config(job.config)
            returned = run_job(
                hydra_context=hydra_context,
                task_function=task_function,
                config=job.config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
            returns.append((job.index, returned))
        return returns


def _hold(job: Job, held: ExitStack) -> bool:
    """Whether the run is ours to train, until `held` is left or train.py has finished it."""
    job.folder.mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(resume.hold(job.folder))
    except schema.ConfigError:
        return False  # train.py will say so
    return not resume.finished(job.folder)  # by another process, before it let go


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _split(jobs: list[Job], size: int) -> list[list[Job]]:
    return [jobs[i : i + size] for i in range(0, len(jobs), size)]


# --- Where the groups are trained ----------------------------------------------------------------


def _here(parts: Sequence[Sequence[Job]], context: Any, workers: int) -> list[Returned]:
    """On this machine: some groups at once, each in a process of its own."""
    if workers == 1 or len(parts) == 1:
        return [r for part in parts for r in _execute(part, context, None)]
    singletons = Singleton.get_state()
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        finished = joblib.Parallel(n_jobs=workers)(
            joblib.delayed(_execute)(part, context, singletons) for part in parts
        )
    return [r for part in finished for r in part]


@dataclass
class Groups:
    """The task of an outer launcher's jobs: job number i is group number i.

    Every job is sent all of this, so it holds what configs are made from, and not the configs.
    """

    parts: list[list[tuple[int, list[str]]]]  # number and overrides of each run
    context: Any

    def __call__(self, _: DictConfig) -> list[Returned]:
        runs = self.parts[HydraConfig.get().job.num]
        jobs = [make_job(index, overrides, self.context) for index, overrides in runs]
        # A cluster may have stopped this job and begun it again, its runs at different steps.
        return [r for part in groups(jobs)[0] for r in _execute(part, self.context, None)]


def _outer(outer: Any, parts: Sequence[Sequence[Job]], context: Any) -> Launcher:
    """The launcher whose jobs are the groups, set up with them.

    Raises:
        MissingConfigException: there is none of that name.
    """
    hydra_context, _, config = context
    if not OmegaConf.is_dict(outer):  # the name of a choice
        outer = hydra_context.config_loader.load_configuration(
            config.hydra.job.config_name, [f"hydra/launcher={outer}"], RunMode.RUN
        ).hydra.launcher
    if outer.get("_target_") in (None, config.hydra.launcher._target_):
        stop(
            "hydra.launcher.outer takes the name of another launcher (hydra.launcher.outer=ray), "
            "or its config (+hydra/launcher@hydra.launcher.outer=ray)"
        )
    config = copy.deepcopy(config)
    with open_dict(config):
        config.hydra.launcher = outer
    return Plugins.instance().instantiate_launcher(
        # A group is no run: the callbacks are for the runs in it.
        hydra_context=replace(hydra_context, callbacks=Callbacks()),
        task_function=Groups([[(j.index, j.overrides) for j in part] for part in parts], context),
        config=config,
    )


def launch(
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
    context: Any,
    max_members: int | None,
    workers: int | None,
    outer: Any,
) -> list[JobReturn]:
    """Run all jobs; their returns in the order given.

    Args:
        job_overrides: of each job.
        initial_job_idx: the number of the first.
        context: Hydra's context, the task function and the multirun's config.
        max_members, workers, outer: of the launcher's config.
    """
    jobs = [make_job(i, o, context) for i, o in enumerate(job_overrides, start=initial_job_idx)]
    done: list[Job] = []
    todo: list[Job] = []
    for job in jobs:
        (done if resume.finished(job.folder) else todo).append(job)
    alike, differ = groups(todo) if todo else ([], [])
    on_gpu = torch.cuda.is_available() and jobs[0].config.trainer.accelerator != "cpu"
    at_once = workers or (1 if on_gpu else os.cpu_count() or 1)
    if outer is not None and not workers:
        size = OUTER_MEMBERS
    elif outer is None and on_gpu:
        size = len(todo)
    else:  # on a CPU a group takes one core; what could be one is made as many as there are
        size = -(-len(todo) // at_once)
    parts = [part for group in in_turn(alike) for part in _split(group, max_members or size)]
    if outer is not None:
        launcher = _outer(outer, parts, context)
        where = f"jobs of {type(launcher).__name__}"
        if not (max_members or workers):
            where += " (hydra.launcher.max_members sets how large)"
    else:
        where = f"{min(at_once, len(parts))} at once"
    because = f" (they differ in {', '.join(differ)})" if differ else ""
    before = f", {len(done)} done before" if done else ""
    say(
        f"fused: {_count(len(todo), 'run')} in {_count(len(parts), 'group')} of up to "
        f"{max(map(len, parts), default=0)}, {where}{because}{before}"
    )
    if not parts:
        returns = []
    elif outer is not None:
        # In the sweep's own folder, without a config there: a group leaves nothing but its runs.
        own = ["hydra.sweep.subdir=.", "hydra.output_subdir=null"]
        finished = launcher.launch([own] * len(parts), initial_job_idx=0)
        returns = [r for part in finished for r in part.return_value]
    else:
        returns = _here(parts, context, at_once)
    returns += _execute(done, context, None)  # train.py finds that they are
    return [r for _, r in sorted(returns, key=lambda pair: pair[0])]
