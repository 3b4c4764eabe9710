"""The work of the launchers `auto` and `fused`: where the runs of a sweep are trained, and how.

Runs of a small network are faster as one stack. Other runs are trained one by one, a run on each
free core.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import joblib
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from omegaconf import DictConfig, OmegaConf

from losswatch import terminal
from losswatch.config.errors import ConfigError
from losswatch.disk.locks import hold
from losswatch.disk.result import finished
from losswatch.stack.member import Failure
from losswatch.stack.refusal import NotStackable
from losswatch.sweep.counting import Counted, collected
from losswatch.sweep.jobs import Run
from losswatch.sweep.outer import train_elsewhere
from losswatch.sweep.parts import (
    Context,
    Part,
    Returned,
    find_run,
    finish,
    prepare,
    single_parts,
    train_in_turn,
    train_part,
)
from losswatch.sweep.split import Options, make_parts, say_what, steps_of, uses_gpu
from losswatch.sweep.workers import Workers
from losswatch.task import record_interrupt

KILLED = "the process that trained it was killed, because it lacked memory or native code crashed"
PROCESS_MB = 600  # memory of a process that trains, without the images that it keeps


# --- Which processes -----------------------------------------------------------------------------


def start_workers(configs: Sequence[DictConfig], options: Options) -> Workers | None:
    """Processes for the runs of these configs, which need not have been checked.

    None if this process trains the runs one after the other.
    """
    count = min(_at_once(configs, options), len(configs))
    if count == 1 or options.outer is not None:
        return None
    forks = not uses_gpu(configs) and all(_setting(c, "threads", 1) == 1 for c in configs)
    return Workers(count, max(1, joblib.cpu_count() // count), forks)


def _at_once(configs: Sequence[DictConfig], options: Options) -> int:
    """How many processes train at the same time."""
    if options.workers:
        return options.workers
    if uses_gpu(configs):
        return 1
    threads = max(_setting(config, "threads", 1) for config in configs)
    kept = max(_setting(config, "data.cache_mb", 0) for config in configs)
    cores = joblib.cpu_count()  # those that this process may use, also in a container
    return max(1, min(cores // threads, _memory_mb() // (PROCESS_MB + kept)))


def _setting(config: DictConfig, key: str, default: int) -> int:
    """A whole number in a config; the default if it is something else, such as `auto`."""
    value = OmegaConf.select(config, key, throw_on_missing=False)
    return value if isinstance(value, int) and value > 0 else default


def _memory_mb() -> int:
    """The memory of this machine, or of this container, in MB."""
    limits = [2**62]
    if hasattr(os, "sysconf"):  # not on Windows
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup 2, cgroup 1
        with suppress(OSError, ValueError):  # there is none, or it is "max"
            limits.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(limits) // 2**20


# --- Which runs together -------------------------------------------------------------------------


def launch(
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
    context: Context,
    options: Options,
    start: Callable[[Sequence[DictConfig]], Workers | None],
) -> list[JobReturn]:
    """Run all jobs of a sweep; return what they return, in the order given.

    Args:
        job_overrides: the overrides of each job.
        initial_job_idx: the number of the first job.
        context: what Hydra gave the launcher.
        options: of the launcher.
        start: gives the workers (`start_workers`), and starts them if that has not been done.
    """
    runs = [
        find_run(index, overrides, context)
        for index, overrides in enumerate(job_overrides, initial_job_idx)
    ]
    workers = start([run.config for run in runs])
    todo: list[Run] = []
    others: list[Run] = []  # the command skips a run that is done, and fails one that cannot work
    for run in runs:
        prepare(run, context, is_here=options.outer is None)
        (others if run.settings is None or finished(run.folder) else todo).append(run)
    if len(runs) > 1:
        context.command.facts = replace(context.command.facts, names_starts=False)

    returns: list[Returned] = []
    if options.outer is not None:
        returns += train_elsewhere(todo, len(others), context, options)
    elif todo:
        returns += _train_here(todo, len(others), context, options, workers)
    returns += train_in_turn([Part([run], is_stack=False) for run in others], context)
    for _, returned in returns:
        if returned.status is JobStatus.FAILED:  # the sweeper would end the sweep (see `finish`)
            context.command.lacks_runs = True
            returned.status = JobStatus.COMPLETED
    return [returned for _, returned in sorted(returns, key=lambda pair: pair[0])]


# --- On this machine -----------------------------------------------------------------------------


def _train_here(
    runs: Sequence[Run], done: int, context: Context, options: Options, workers: Workers | None
) -> list[Returned]:
    """Train runs in the workers, or in this process; one bar shows all their steps."""
    parts, text = make_parts(runs, workers.count if workers else 1, options)
    if len(runs) > 1:  # the command names a single run
        say_what(text, done)
    total = sum(map(steps_of, runs))
    with terminal.progress_bar(total, is_shown=runs[0].config.trainer.enable_progress_bar) as bar:
        if workers is None or len(parts) == 1:
            return train_in_turn(parts, context)
        try:
            with collected(bar, len(parts) + len(runs)) as file:
                return _side_by_side(parts, context, workers, file)
        except BaseException:
            workers.stop()
            raise


def _record_interrupts(parts: Iterable[Part]) -> None:
    """Write that Ctrl-C or SIGTERM has ended the runs that the workers had begun."""
    for run in itertools.chain.from_iterable(part.runs for part in parts):
        if run.settings is None or not (run.folder / ".hydra").is_dir() or finished(run.folder):
            continue
        with suppress(ConfigError, OSError), hold(run.folder):
            record_interrupt(run.settings)


def _side_by_side(
    parts: Iterable[Part], context: Context, workers: Workers, file: Path
) -> list[Returned]:
    """Train parts in the workers, each as soon as one is free.

    If a process is killed, because it lacks memory or native code crashes, the others end, too.
    Then each part that was at work is trained while no other is, so that only the runs of one part
    fail.

    Args:
        file: where the workers count their steps.
    """
    returns: list[Returned] = []
    rows = itertools.count()
    waiting = deque(zip(parts, rows, strict=False))
    suspects: deque[tuple[Part, int]] = deque()  # one of them has killed its process
    at_work: dict[Future, tuple[Part, int, bool]] = {}  # with whether no other part is
    try:
        while waiting or suspects or at_work:
            alone = bool(suspects)
            source = suspects if alone else waiting
            while source and len(at_work) < (1 if alone else workers.count):
                part, row = source.popleft()
                task = _Task(part, file, row, context, Singleton.get_state())
                # By cloudpickle, because Hydra's state holds functions that have no name.
                at_work[workers.submit(joblib.wrap_non_picklable_objects(task))] = part, row, alone
            for future in wait(at_work, return_when=FIRST_COMPLETED).done:
                part, row, was_alone = at_work.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    if not was_alone:
                        suspects.append((part, row))
                        continue
                    killed = Failure(RuntimeError(KILLED))
                    result = [(run.index, finish(run, context, killed)) for run in part.runs]
                if isinstance(result, NotStackable):
                    waiting.extend(zip(single_parts(part, result), rows, strict=False))
                else:
                    returns += result
    except KeyboardInterrupt:
        workers.stop()  # first, so that they write nothing more
        begun = [part for part, _, _ in at_work.values()] + [part for part, _ in suspects]
        _record_interrupts(begun)
        raise
    return returns


@dataclass
class _Task:
    """A part, to be trained in another process.

    Attributes:
        file, row: where the process counts its steps.
        singletons: Hydra's state.
    """

    part: Part
    file: Path
    row: int
    context: Context
    singletons: Any

    def __call__(self) -> list[Returned] | NotStackable:
        setup_globals()
        Singleton.set_state(self.singletons)
        with terminal.part_of(Counted(self.file, self.row)):
            return train_part(self.part, self.context)
