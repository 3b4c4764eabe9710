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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, run_job, setup_globals
from omegaconf import DictConfig, OmegaConf, open_dict

from losswatch import config as schema
from losswatch import fuse, resume
from losswatch.build import loss_files, make_losses, quieten, trainer_options

log = logging.getLogger(__name__)


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
    found = resume.newest(job.folder, below=config["trainer"]["max_steps"])
    config["steps done"] = found[1]["global_step"] if found else 0
    return config


def _changed(job: Job, trained: dict[str, Any]) -> bool:
    """Whether the command line changed the trained loss from what its file says."""
    files = loss_files(job.config.hydra.runtime.config_sources)
    return trained != OmegaConf.to_container(OmegaConf.load(files[job.loss]))


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


def _train(jobs: Sequence[Job]) -> None:
    """Train the jobs as one stack, in halves where the memory does not hold them."""
    first = jobs[0]
    options = trainer_options(first.task)
    if why := fuse.obstacle(options):
        raise NotImplementedError(f"{why} needs the ordinary step")
    files = loss_files(first.config.hydra.runtime.config_sources)
    losses = make_losses(first.task, first.loss, files)
    members = []
    for job in jobs:
        job.folder.mkdir(parents=True, exist_ok=True)
        members.append(fuse.make_member(job.task, job.loss, job.folder))
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


def _execute(jobs: Sequence[Job], context: Any, singletons: Any) -> list[JobReturn]:
    """One group, in a process of its own or in this one."""
    hydra_context, task_function, _ = context
    if singletons is not None:  # a fresh process
        setup_globals()
        schema.register()
        Singleton.set_state(singletons)
    quieten()
    todo = [job for job in jobs if not resume.finished(job.folder)]
    try:
        if todo:
            HydraConfig.instance().set_config(todo[0].config)
            _train(todo)
    except RuntimeError as error:  # of torch.vmap's, Dynamo's and the compiler's too
        reason = " ".join(str(error).split())[:200]
        print(f"{_count(len(todo), 'run')} trained one by one: {reason}", file=sys.stderr)
    returns = []
    for job in jobs:
        HydraConfig.instance().set_config(job.config)
        returns.append(
            run_job(
                hydra_context=hydra_context,
                task_function=task_function,
                config=job.config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
        )
    return returns


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _split(jobs: list[Job], size: int) -> list[list[Job]]:
    return [jobs[i : i + size] for i in range(0, len(jobs), size)]


def launch(
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
    context: Any,
    max_members: int | None,
    workers: int | None,
) -> list[JobReturn]:
    """Run all jobs; their returns in the order given.

    Args:
        job_overrides: of each job.
        initial_job_idx: the number of the first.
        context: Hydra's context, the task function and the multirun's config.
        max_members, workers: of the launcher's config.
    """
    hydra_context, _, config = context
    jobs = []
    for index, overrides in enumerate(job_overrides, start=initial_job_idx):
        job = hydra_context.config_loader.load_sweep_config(config, list(overrides))
        with open_dict(job):
            job.hydra.job.id = str(index)
            job.hydra.sweep.dir = config.hydra.sweep.dir  # a new process would make another name
            job.hydra.job.num = index
        HydraConfig.instance().set_config(job)  # what ${hydra:...} in the folder's name refers to
        folder = Path(job.hydra.sweep.dir, job.hydra.sweep.subdir).absolute()
        jobs.append(Job(index, list(overrides), job, folder))
    done: list[Job] = []
    todo: list[Job] = []
    for job in jobs:
        (done if resume.finished(job.folder) else todo).append(job)
    alike, differ = groups(todo) if todo else ([], [])
    on_gpu = torch.cuda.is_available() and jobs[0].config.trainer.accelerator != "cpu"
    workers = workers or (1 if on_gpu else os.cpu_count() or 1)
    # On a CPU a group takes one core, so what could be one group is made as many as there are.
    size = max_members or (len(todo) if on_gpu else -(-len(todo) // workers))
    parts = [part for group in alike for part in _split(group, size)]
    because = f" (they differ in {', '.join(differ)})" if differ else ""
    before = f", {len(done)} done before" if done else ""
    print(
        f"fused: {_count(len(todo), 'run')} in {_count(len(parts), 'group')} of up to "
        f"{max(map(len, parts), default=0)}, {min(workers, len(parts))} at once{because}{before}",
        file=sys.stderr,
    )
    if done:  # train.py finds that too
        parts.append(done)
    if workers == 1 or len(parts) == 1:
        returns = [r for part in parts for r in _execute(part, context, None)]
    else:
        singletons = Singleton.get_state()
        with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
            finished = joblib.Parallel(n_jobs=workers)(
                joblib.delayed(_execute)(part, context, singletons) for part in parts
            )
        returns = [r for part in finished for r in part]
    order = [job.index for part in parts for job in part]
    return [r for _, r in sorted(zip(order, returns, strict=True), key=lambda pair: pair[0])]
