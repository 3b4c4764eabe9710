"""What train.py does with one config: check it, train or test the run, and write how that went.

Everything of losswatch comes together here, so nothing but train.py imports this file.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from losswatch import compat
from losswatch.config.schema import ConfigError
from losswatch.config.settings import plain
from losswatch.disk import checkpoint_files as checkpoints
from losswatch.disk import locks
from losswatch.disk.checkpoint import adopt, data_of, load_net
from losswatch.disk.curves import last_watched, read_curves
from losswatch.disk.growing_files import event_files
from losswatch.disk.result import Reached, Result, finished
from losswatch.disk.resume import check_folder, log_resume
from losswatch.events.encode import append_picture
from losswatch.events.tags import CURVES
from losswatch.run import train as run
from losswatch.run.build import describe_data, make_net, settled_config
from losswatch.run.plan import check
from losswatch.run.process import only_errors, quiet
from losswatch.stack.fit import train_compiled
from losswatch.stack.member import FINISHED
from losswatch.stack.refusal import NotStackable
from losswatch.sweep.command import again, current_sweep
from losswatch.sweep.exit import stop
from losswatch.terminal import say
from losswatch.text import nearby, one_line, parse_overrides

log = logging.getLogger(__name__)

PICTURE = "curves.png"


def run_task(cfg: DictConfig) -> float | None:
    """Check a run, and train or test it unless it is done.

    Returns:
        the score, for sweepers; None if the run failed in a sweep, or is unfinished.

    Raises:
        SystemExit: the config cannot work; or a single run failed or is unfinished.
        KeyboardInterrupt: after Ctrl-C.
    """
    if current_sweep().is_terminated:  # the signal came where Python drops errors
        raise KeyboardInterrupt
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    trained = job.runtime.choices.get("loss") or ""  # `check` says what is wrong with none
    is_single = job.mode == RunMode.RUN
    with quiet():
        try:
            _check(cfg, trained, folder)
        except ConfigError as error:
            stop(str(error))
        if earlier := finished(folder):
            return _skip(earlier, cfg, trained, folder)
        # Lightning starts this program again for each further device. Those processes train, too,
        # and leave everything else to the first one.
        is_first = compat.process_rank() == 0
        try:
            with locks.hold(folder) if is_first else nullcontext():
                # Before it let go, another process may have finished the run, or begun one here.
                check_folder(folder, settled_config(cfg))
                if earlier := finished(folder):
                    return _skip(earlier, cfg, trained, folder)
                return _attempt(cfg, trained, folder, is_first)
        except ConfigError as error:
            if is_single:
                stop(str(error))
            log.error("%s", error)  # true since the sweep began: its other runs go on
            return None


def _check(cfg: DictConfig, trained: str, folder: Path) -> None:
    """See that a single run can work, and that `folder` holds no other one.

    With a checkpoint its settings are taken over first. A run of a sweep is checked in `_work`,
    since an error there is an error of the run and does not end the sweep.

    Raises:
        ConfigError: it cannot, or it does.
    """
    job = HydraConfig.get()
    content = None
    if cfg.checkpoint is not None:
        content = checkpoints.find(cfg.checkpoint)
        adopt(cfg, content, given=parse_overrides(job.overrides.task))
    if job.mode == RunMode.RUN:
        check(cfg, trained)
    if content is not None:
        form = data_of(content)[0] if cfg.mode == "predict" else describe_data(cfg)
        load_net(make_net(cfg, form), content)
    check_folder(folder, settled_config(cfg))


def _skip(result: Result, cfg: DictConfig, trained: str, folder: Path) -> float:
    """Say that the run is done; return its score. Draw its picture if a kill came before that."""
    log.info("done before, skipped: %s", _called(folder))
    is_first = compat.process_rank() == 0
    if is_first and cfg.mode == "train" and not (folder / PICTURE).exists():
        _draw_curves(folder, trained, result.steps or 0)
    return score(result.metrics, cfg)


def score(metrics: Mapping[str, float | None], cfg: DictConfig) -> float:
    """What a search goes by: the value of `cfg.metric`, of the test in mode=test."""
    name = cfg.metric if cfg.mode == "train" else cfg.metric.replace("val/", "test/", 1)
    value = metrics.get(name)
    return float("nan") if value is None else value


# --- One attempt ---------------------------------------------------------------------------------


def _attempt(cfg: DictConfig, trained: str, folder: Path, is_first: bool) -> float | None:
    """Train or test the run, and write how it went."""
    begin = time.perf_counter()
    try:
        with only_errors(not is_first):
            reached, seconds = _work(cfg, trained, folder)
    except BaseException as error:
        _fail(error, cfg, folder, time.perf_counter() - begin, is_first)
        return None
    found = score(reached.metrics, cfg)
    if not is_first:
        return found
    if not reached.is_done:
        _stop_early(reached, cfg, trained, folder, seconds)
        return None
    # In this order: a run that is not done has the checkpoints to go on from, and one that is done
    # stays so whatever becomes of its picture.
    _write(cfg, folder, "done", reached, seconds=seconds)
    if cfg.mode == "train":
        checkpoints.finish(folder, reached.steps)
        _draw_curves(folder, trained, reached.steps)
    what = "predicted"
    if cfg.mode != "predict":
        stage = "val" if cfg.mode == "train" else "test"
        what = f"{stage} accuracy {reached.metrics.get(f'{stage}/accuracy', float('nan')):.4f}"
    log.info("%s in %.1f s: %s", what, seconds, _called(folder))
    return found


def _work(cfg: DictConfig, trained: str, folder: Path) -> tuple[Reached, float]:
    """Train or test, and the seconds that this took.

    A run that the fused launcher has trained only hands over its result.
    """
    if stacked := FINISHED.pop(folder, None):
        log_resume(stacked.notice, step=0)
        return Reached(cfg.trainer.max_steps, stacked.result()), stacked.seconds
    begin = time.perf_counter()
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        check(cfg, trained, multirun=True)
    work = {"train": train, "test": run.test, "predict": run.predict}[cfg.mode]
    return work(cfg, trained, folder), time.perf_counter() - begin


def train(cfg: DictConfig, trained: str, folder: Path) -> Reached:
    """Train one run: by a compiled step if `cfg.compile` asks for it, and it can be compiled.

    Args and returns as of `run.train.train`.
    """
    if cfg.compile:
        try:
            return train_compiled(cfg, trained, folder)
        except NotStackable as error:
            log.warning("not compiled: %s", error)
    return run.train(cfg, trained, folder)


# --- How it went ---------------------------------------------------------------------------------


def _write(
    cfg: DictConfig,
    folder: Path,
    status: str,
    reached: Reached | None = None,
    error: str | None = None,
    seconds: float = 0.0,
) -> None:
    """Write result.json; `seconds` are those of the attempt."""
    job = HydraConfig.get()
    groups = ("loss", "model", "optimizer")
    Result(
        run=folder.name,
        status=status,
        error=error,
        overrides=list(job.overrides.task),
        choices={group: job.runtime.choices.get(group) for group in groups},
        config=plain(cfg),
        steps=reached.steps if reached else None,
        seconds=seconds,
        metrics=reached.metrics if reached else {},
        watched=last_watched(folder),
    ).write(folder)


def _fail(
    error: BaseException, cfg: DictConfig, folder: Path, seconds: float, is_first: bool
) -> None:
    """Record an error, and raise what ends the command: the error of a single run, or Ctrl-C.

    SIGTERM counts as Ctrl-C.
    """
    job, is_terminated = HydraConfig.get(), current_sweep().is_terminated
    # On Ctrl-C Lightning shuts down in order, and then exits.
    is_interrupt = isinstance(error, KeyboardInterrupt | SystemExit) or is_terminated
    text = "interrupted" if is_interrupt else one_line(error)
    if is_first:
        status = "unfinished" if is_interrupt else "failed"
        _write(cfg, folder, status, error=text, seconds=seconds)
    if is_interrupt:
        if is_first:
            _say_how_to_resume(cfg, folder)
        raise KeyboardInterrupt from error
    log.error(
        "failed: %s (traceback in %s)",
        text,
        nearby(folder / f"{job.job.name}.log", Path(job.runtime.cwd)),
    )
    log.debug("".join(traceback.format_exception(error)))
    if job.mode == RunMode.RUN:
        raise SystemExit(1) from error


def _stop_early(
    reached: Reached, cfg: DictConfig, trained: str, folder: Path, seconds: float
) -> None:
    """Record that the time was up before the last step, which ends a single run."""
    what = f"after {reached.steps} of {cfg.trainer.max_steps} steps"
    _write(cfg, folder, "unfinished", reached, error=what, seconds=seconds)
    _draw_curves(folder, trained, reached.steps)
    log.warning("unfinished %s: %s", what, _called(folder))
    if HydraConfig.get().mode == RunMode.RUN:
        _say_how_to_resume(cfg, folder)
        raise SystemExit(1)


def _say_how_to_resume(cfg: DictConfig, folder: Path) -> None:
    """Of a single run; a sweep says it below its table."""
    if HydraConfig.get().mode == RunMode.RUN and cfg.mode == "train":
        say(f"Resume   {again('resume', _called(folder))}")


def _called(folder: Path) -> str:
    """A run as lines call it: its folder, seen from that of the sweep or of the command."""
    job = HydraConfig.get()
    base = Path(job.runtime.cwd, job.sweep.dir if job.mode == RunMode.MULTIRUN else "")
    return nearby(folder, base)


def _draw_curves(folder: Path, trained: str, step: int) -> None:
    """Draw the run's curves into its folder, and for TensorBoard, whose charts colour by run.

    An error is no error of the run: a line tells it.
    """
    file = folder / PICTURE
    try:
        # Imported late: Matplotlib takes a second, and a run that is done before draws nothing.
        from losswatch.report.figures import plot_curves

        plot_curves(read_curves(folder), file, title=folder.name, trained=trained)
        if events := event_files(folder):
            append_picture(max(events), CURVES, file.read_bytes(), step)
    except Exception as error:
        log.warning("%s cannot be drawn: %s", _called(file), one_line(error))
        log.debug("", exc_info=True)
