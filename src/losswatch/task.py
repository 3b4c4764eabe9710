"""What train.py does with one run: plan it, train or test it, and write how that went."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from losswatch import compat
from losswatch.config.errors import ConfigError
from losswatch.config.quoting import resume_command
from losswatch.config.settings import Job, Settings
from losswatch.disk import checkpoint_files, locks
from losswatch.disk.curves import last_watched, read_curves
from losswatch.disk.growing_files import event_files
from losswatch.disk.result import Result, finished
from losswatch.disk.resume import check_folder, check_run, log_resume
from losswatch.doctor.findings import Finding
from losswatch.events.encode import append_picture, append_text
from losswatch.events.tags import CURVES, FINDINGS
from losswatch.report.diagnosis import as_dicts, findings_of
from losswatch.run import train as run
from losswatch.run.plan import Plan
from losswatch.run.process import only_errors, quiet
from losswatch.run.train import Reached
from losswatch.stack.fit import train_compiled
from losswatch.stack.member import Failure, Member
from losswatch.stack.refusal import NotStackable
from losswatch.terminal import say
from losswatch.text import nearby, one_line

if TYPE_CHECKING:
    from losswatch.command import Command

log = logging.getLogger(__name__)

PICTURE = "curves.png"


def run_task(command: Command, cfg: DictConfig) -> float | None:
    """Plan a run, and train or test it unless it is done.

    Returns:
        the score, for sweepers; None if the run cannot work, has failed or is unfinished.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM.
    """
    if command.is_terminated:  # Python has dropped the error of the signal
        raise KeyboardInterrupt
    hydra: Any = HydraConfig.get()
    job = Job.read(hydra)
    if cfg.resume is None:  # otherwise once the folder to resume has been checked
        _say_which(command, job)
    with quiet(), _contained(job):
        return _run(command, cfg, job)
    return None


def _run(command: Command, cfg: DictConfig, job: Job) -> float | None:
    """The work of `run_task`, after the job has been read."""
    checked = command.runs.pop(job.overrides, None)
    plan, settings = (checked.plan, checked.settings) if checked else (None, None)
    try:
        if plan is None:
            read = functools.partial(command.read, cfg, job)
            settings = read()
            if settings.resume:
                _check_resumed(job, settings.resume)
            plan = command.planner(job).plan(settings, read)
    except ConfigError as error:
        if not job.is_sweep:
            command.refuse(str(error))
        elif not finished(job.folder):
            with _held(job.folder):
                _record_failure(job, settings, error, 0.0)
        return None
    try:
        with _held(job.folder):
            # Another process may have finished the run, or begun one here, before it let go.
            check_folder(job.folder, plan.settings.as_config(), job.is_sweep)
            if plan.settings.resume:
                _say_which(command, job)
            if earlier := finished(job.folder):
                return _skip(earlier, plan)
            return _attempt(command, plan, _work)
    except ConfigError as error:
        if job.is_sweep:
            log.error("%s", error)  # the grid was valid when the sweep started
            command.status = 1
        else:
            command.refuse(str(error))
        return None


def _check_resumed(job: Job, resume: str) -> None:
    """Check that `resume` names a run, and that the command works in its folder."""
    folder = job.base / resume
    check_run(folder, resume)
    if folder.resolve() != job.folder.resolve():
        raise ConfigError(
            f"resume={resume} goes on in that folder; "
            "leave out hydra.run.dir, which names another one"
        )


def finish_stacked(
    command: Command, plan: Plan, outcome: Member | Failure, cfg: DictConfig
) -> float | None:
    """Write the result of a run that was trained in a stack.

    Args:
        outcome: of the run; the caller holds its lock.
        cfg: unused; Hydra passes it to each task function.

    For the value returned and the errors see `run_task`.
    """

    def hand_over(plan: Plan) -> tuple[Reached, float]:
        log_resume(outcome.notice, step=0)
        return Reached(plan.steps, outcome.result()), outcome.seconds

    with quiet(), _contained(plan.settings.job):
        return _attempt(command, plan, hand_over)
    return None


@contextmanager
def _contained(job: Job) -> Iterator[None]:
    """Lets a sweep go on after a run whose result cannot be written, or that shows a bug."""
    try:
        yield
    except Exception as error:
        if not job.is_sweep:
            raise
        log.error("%s: %s", job.folder, one_line(error))
        log.debug("", exc_info=True)


def _say_which(command: Command, job: Job) -> None:
    """Say which run starts, in the process of the run's first device."""
    if int(os.environ.get("LOCAL_RANK", 0)) or not command.facts.names_starts:
        return
    total = f" of {command.facts.total}" if command.facts.total else ""
    number = f" {job.number + 1}{total}" if job.is_sweep else ""
    say(f"run{number}: {' '.join(job.overrides) or 'all defaults'}")


def _held(folder: Path) -> AbstractContextManager[Any]:
    """The lock of a run.

    Lightning starts this program again for each further device. Those processes train, too. The
    first process does everything else, such as locking.
    """
    return locks.hold(folder) if compat.process_rank() == 0 else nullcontext()


def _skip(result: Result, plan: Plan) -> float:
    """Say that the run is done, and return its score. Draw its picture if a kill prevented that."""
    log.info("done before, skipped: %s", _display_name(plan.settings.job))
    is_trained = compat.process_rank() == 0 and plan.settings.mode == "train"
    if is_trained and not (plan.folder / PICTURE).exists():
        _draw_curves(plan, result.steps or 0, result.findings)
    return result.score(plan.settings.metric)


# --- One attempt ---------------------------------------------------------------------------------


def _attempt(
    command: Command, plan: Plan, work: Callable[[Plan], tuple[Reached, float]]
) -> float | None:
    """Train or test the run, and write how it went.

    Args:
        work: trains or tests; returns what was reached, and the seconds that this took.
    """
    settings, begin = plan.settings, time.perf_counter()
    is_first = compat.process_rank() == 0
    try:
        with only_errors(not is_first):
            reached, seconds = work(plan)
    except BaseException as error:
        _fail(command, plan, error, time.perf_counter() - begin, is_first)
        return None
    status = "done" if reached.is_done else "unfinished"
    result = _result(settings.job, settings, status, seconds, reached)
    if not is_first:
        return result.score(settings.metric)
    if not reached.is_done:
        _stop_early(command, plan, result)
        return None
    # The result is written before earlier checkpoints are removed and the picture is drawn. So a
    # kill leaves a run that is done, or one that has the checkpoints to go on from.
    result.write(plan.folder)
    if settings.mode == "train":
        checkpoint_files.finish(plan.folder, reached.steps)
        _draw_curves(plan, reached.steps, result.findings)
    what = "predicted" if settings.mode == "predict" else result.headline()
    log.info("%s in %.1f s: %s", what, seconds, _display_name(settings.job))
    for finding in result.findings:
        log.warning("%s", Finding(**finding).line())
    return result.score(settings.metric)


def _work(plan: Plan) -> tuple[Reached, float]:
    """Train or test; return what was reached, and the seconds that this took."""
    begin = time.perf_counter()
    work = {"train": train, "test": run.test, "predict": run.predict}[plan.settings.mode]
    return work(plan), time.perf_counter() - begin


def train(plan: Plan) -> Reached:
    """Train one run, by a compiled step if the settings ask for it and the step can be compiled."""
    if plan.settings.compile:
        try:
            return train_compiled(plan)
        except NotStackable as error:
            log.warning("not compiled: %s", error)
    return run.train(plan)


# --- How it went ---------------------------------------------------------------------------------


def _result(
    job: Job,
    settings: Settings | None,
    status: str,
    seconds: float | None,
    reached: Reached | None = None,
    error: str | None = None,
) -> Result:
    """The result of an attempt; `seconds` is how long it took, if that is known."""
    return Result(
        run=job.folder.name,
        status=status,
        error=error,
        overrides=list(job.overrides),
        choices={group: job.choices.get(group) for group in ("loss", "model", "optimizer")},
        config=settings.as_config() if settings else {},
        steps=reached.steps if reached else None,
        seconds=seconds,
        metrics=reached.metrics if reached else {},
        watched=last_watched(job.folder),
        findings=as_dicts(_findings(settings)),
    )


def _findings(settings: Settings | None) -> list[Finding]:
    """What is wrong with a training, from its record."""
    if settings is None or settings.mode != "train":
        return []
    try:
        return findings_of(settings.job.folder, settings.trained)
    except Exception as error:
        log.warning("no findings: %s", one_line(error))
        log.debug("", exc_info=True)
        return []


def _fail(
    command: Command, plan: Plan, error: BaseException, seconds: float, is_first: bool
) -> None:
    """Record an error; pass on Ctrl-C and SIGTERM.

    Raises:
        KeyboardInterrupt: the error is Ctrl-C or SIGTERM.
        ConfigError: the input of a single run is bad, and only the work could find that.
    """
    job = plan.settings.job
    # On Ctrl-C Lightning shuts down in order, and then exits.
    if isinstance(error, KeyboardInterrupt | SystemExit) or command.is_terminated:
        if is_first:
            record_interrupt(plan.settings, seconds)
            _say_how_to_resume(plan)
        raise KeyboardInterrupt from error
    if isinstance(error, ConfigError) and not job.is_sweep:
        raise error
    if is_first:
        _record_failure(job, plan.settings, error, seconds)
    command.status = 1


def record_interrupt(settings: Settings, seconds: float | None = None) -> None:
    """Write that Ctrl-C or SIGTERM has ended a run, whose lock the caller holds."""
    result = _result(settings.job, settings, "unfinished", seconds, error="interrupted")
    result.write(settings.job.folder)


def _record_failure(
    job: Job, settings: Settings | None, error: BaseException, seconds: float
) -> None:
    """Write the result of a run that failed, and say why."""
    text = one_line(error)
    _result(job, settings, "failed", seconds, error=text).write(job.folder)
    log_file = nearby(job.folder / job.log)
    log.error("failed: %s (traceback in %s)", text, log_file)
    log.debug("".join(traceback.format_exception(error)))


def _stop_early(command: Command, plan: Plan, result: Result) -> None:
    """Record that the time was up before the last step."""
    what = f"after {result.steps} of {plan.steps} steps"
    dataclasses.replace(result, error=what).write(plan.folder)
    _draw_curves(plan, result.steps or 0, result.findings)
    log.warning("unfinished %s: %s", what, _display_name(plan.settings.job))
    _say_how_to_resume(plan)
    command.status = 1


def _say_how_to_resume(plan: Plan) -> None:
    """Print the command that resumes a single run. A sweep prints its own below its table."""
    job = plan.settings.job
    if not job.is_sweep and plan.settings.mode == "train":
        say(f"Resume   {resume_command('resume', _display_name(job))}")


def _display_name(job: Job, file: str = "") -> str:
    """A run, or a file of it, as lines name it: the path from the sweep's or the working folder."""
    return nearby(job.folder / file, job.base)


def _draw_curves(plan: Plan, step: int, findings: Sequence[Mapping[str, Any]] = ()) -> None:
    """Draw the run's curves with its findings: into its folder, and for TensorBoard.

    A run that observes nothing has no picture. An error becomes a warning: it does not make the run
    a failed one.
    """
    if not plan.settings.probe.every_n_steps:
        return
    file = plan.folder / PICTURE
    try:
        # Imported late: Matplotlib takes a second, and a run that was done before draws nothing.
        from losswatch.report.figures import plot_curves

        curves = read_curves(plan.folder)
        trained = plan.settings.trained
        plot_curves(curves, file, title=plan.folder.name, trained=trained, findings=findings)
        if events := event_files(plan.folder):
            append_picture(max(events), CURVES, file.read_bytes(), step)
            if findings:
                text = "\n\n".join(Finding(**finding).line() for finding in findings)
                append_text(max(events), FINDINGS, text, step)
    except Exception as error:
        name = _display_name(plan.settings.job, PICTURE)
        log.warning("%s cannot be drawn: %s", name, one_line(error))
        log.debug("", exc_info=True)
