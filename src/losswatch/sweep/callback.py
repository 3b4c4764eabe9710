"""What surrounds the runs: the whole grid checked first, which run of how many, the table last.

And the exit status of the command: 0, all is done; 1, a run is not, or a file or the table cannot
be written; 2, bad input; 130, Ctrl-C.
"""

from __future__ import annotations

import copy
import functools
import io
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, TextIO

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)
from rich.console import Console
from yaml import YAMLError

from losswatch.train.config import ConfigError, file_read, misread, run_name

log = logging.getLogger(__name__)

EXTRAS = ("joblib", "submitit", "ray", "optuna")  # of pyproject.toml
TOTAL = "LOSSWATCH_RUNS"  # the number of runs, for job processes on this machine


def open_streams() -> None:
    """Make the standard streams usable, however the command was begun (`2>&-`, an ASCII terminal).

    Where a descriptor is closed, the next file opened would take its number, and with it all that
    libraries and further processes print.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(null, True)
            setattr(sys, name, open(null, "r" if name == "stdin" else "w"))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def _flush(stream: TextIO) -> OSError | None:
    """Why a stream cannot be written; it is given up then.

    Else what it holds would fail again wherever it is flushed: when joblib starts a process, and at
    the end of this one, with exit status 120.
    """
    try:
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None


def say(message: str) -> None:
    """A line to the user, if it can be written: no run fails because nobody reads of it."""
    with suppress(OSError):
        print(message, file=sys.stderr)
    _flush(sys.stderr)


def stop(message: str) -> None:
    """One clear line, and a non-zero exit that passes through Hydra's error reports."""
    say(f"losswatch: {message}")
    raise SystemExit(2)


def explain(error: Exception) -> str:
    """Hydra's complaint about an override or a file, in one line that names what is allowed."""
    if isinstance(error, YAMLError | UnicodeDecodeError):
        return misread(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        known = ", ".join(error.options or [])
        extra = choice.partition("_")[0]  # submitit_slurm comes with submitit
        more = f'; pip install -e ".[{extra}]" adds {choice}' if extra in EXTRAS else ""
        return f"there is no {group}={choice}; {group} is one of {known}{more}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        parent, _, _ = cause.full_key.rpartition(".")
        keys = cause.parent_node.keys() if OmegaConf.is_dict(cause.parent_node) else []
        known = ", ".join(str(key) for key in keys if key != "hydra")
        return f"there is no {cause.full_key}; {parent or 'the config'} has {known or 'no keys'}"
    lines = [str(error)] if cause is error else [str(error), str(cause).split("\n")[0]]
    noise = ("https://", "full_key:", "object_type=", "reference_type=")
    said = [line for t in lines for line in t.splitlines() if not any(n in line for n in noise)]
    said.insert(0, file_read(error) or "")
    return ": ".join(line.strip().rstrip(".:") for line in said if line.strip())


class Escaped(BaseException):
    """Carries an error of a callback past Hydra, which would make a warning of it and go on."""


@contextmanager
def escaping() -> Iterator[None]:
    """Around a callback whose errors end the command."""
    try:
        yield
    except Exception as error:
        raise Escaped(error) from error


def verdict(error: BaseException) -> tuple[str, int] | None:
    """The line that tells of an error, and the exit status; None where it is a fault of ours."""
    if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
        code = error.code  # of `stop`, say, which has written its line
        return ("", code or 0) if isinstance(code, int | None) else (str(code), 1)
    if isinstance(error, KeyboardInterrupt | SystemExit):  # Lightning makes the one of the other
        return "interrupted", 130
    cause: BaseException | None = error
    while isinstance(cause, InterpolationResolutionError):  # of a folder's name
        cause = cause.__cause__ or cause.__context__
    # A full disk, a folder without permission. Hydra's missing config is one by its class.
    if isinstance(cause, OSError) and not isinstance(cause, HydraException):
        return f"a file cannot be read or written: {cause}", 1
    if isinstance(error, HydraException | OmegaConfBaseException | YAMLError | UnicodeDecodeError):
        return explain(error), 2
    if isinstance(error, ValueError) and str(error).startswith("Config group override"):
        return "a group, such as loss or model, takes the name of one of its files, as text", 2
    if SweepCallback.folder is None or not isinstance(error, Exception):
        return None
    # Of a launcher or sweeper; those of the runs are theirs. Submitit's have the job's whole log.
    return f"the sweep ended early: {_one_line(error)[:300]}", 1


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def clear_errors() -> Iterator[None]:
    """Around Hydra's main: an error becomes one line, a sweep ends with its table; exit statuses.

    Hydra makes warnings of its callbacks' errors, so none of this can be done in one. With
    HYDRA_FULL_ERROR=1 set, errors stay as they are.
    """
    verbose = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # that is, Hydra raises them instead of printing them
    line, status = "", 0
    try:
        yield
    except BaseException as raised:
        error = raised.args[0] if isinstance(raised, Escaped) else raised
        known = verdict(error)
        if known is None or (verbose and isinstance(error, Exception)):
            raise
        line, status = known
    finally:
        if not verbose:
            del os.environ["HYDRA_FULL_ERROR"]
    if SweepCallback.folder is not None:
        try:
            done = show_table(SweepCallback.folder)
        except (Exception, KeyboardInterrupt) as error:
            if verbose:
                raise
            # What ended the sweep is told rather, and has often the same cause.
            done, line = False, line or f"the sweep's summary cannot be written: {_one_line(error)}"
        status = status or int(not done)
    if failed := _flush(sys.stdout):
        line, status = line or f"the output cannot be written: {failed}", status or 1
    if line:
        say(f"losswatch: {line}")
    _flush(sys.stderr)
    if status:
        raise SystemExit(status)


def grid(config: DictConfig) -> list[list[str]]:
    """The overrides of each job of a multirun, as Hydra's basic sweeper will launch them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    arguments = [f"{key}={value}" for key, value in params.items()]
    arguments += list(config.hydra.overrides.task)
    overrides = OverridesParser.create().parse_overrides(arguments)
    [batch] = BasicSweeper.split_arguments(overrides, None)
    return batch


def checked(sweep: DictConfig, overrides: list[str], folder: Path) -> DictConfig | None:
    """The config of one run of a sweep; None if Hydra cannot compose it.

    Raises:
        ConfigError: its settings don't fit, or `folder` holds another run, or one under way.
    """
    from losswatch.train.build import check
    from losswatch.train.resume import check_folder, finished, hold

    try:
        job = GlobalHydra.instance().config_loader().load_sweep_config(sweep, overrides)
    except Exception:
        return None
    check(job, job.hydra.runtime.choices.get("loss"), multirun=True)
    check_folder(folder, job)
    if folder.is_dir() and not finished(folder):
        hold(folder).close()
    return job


@functools.cache  # once a process
def end_with_parent() -> None:
    """End this process, if joblib began it, when the one that did so has ended, be it by kill -9.

    It would go on, and hold its runs. Jobs of other launchers are meant to, or look after it.
    """
    if (parent := multiprocessing.parent_process()) is None:
        return

    def watch() -> None:
        while os.getppid() == parent.pid:
            time.sleep(0.3)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_workers_with_parent() -> None:
    """Have each process that joblib starts from here on call `end_with_parent` at its start.

    `_sent` comes with a job. A process that waits for its first one would outlive a killed parent.
    """
    import joblib  # takes a while, and most sweeps start no processes
    from joblib.parallel import LokyBackend

    backend = functools.partial(LokyBackend, initializer=end_with_parent)
    joblib.register_parallel_backend("loky", backend)


def _sent() -> SweepCallback:
    end_with_parent()
    return SweepCallback()


class SweepCallback(Callback):
    """Hydra calls it around a run or a sweep (conf/config.yaml, hydra.callbacks)."""

    folder: Path | None = None  # of the sweep under way, once its grid is checked
    # The config of each run by its overrides, until the fused launcher takes it: making one takes
    # 70 ms. Other launchers make their own, some of them elsewhere.
    configs: ClassVar[dict[tuple[str, ...], DictConfig]] = {}

    def __reduce__(self) -> Any:
        """Hydra sends its callbacks along with each job that it gives to another process."""
        return _sent, ()

    @escaping()
    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before Hydra writes the new config over that of a run which is to be resumed."""
        if config.resume is None:
            return
        from losswatch.train.resume import check_folder, check_run

        try:
            check_run(Path(config.resume))
            check_folder(Path(config.resume), config)
        except ConfigError as error:
            stop(str(error))

    @escaping()
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        if not config.hydra.launcher._target_.endswith("BasicLauncher"):
            end_workers_with_parent()
        HydraConfig.instance().set_config(copy.deepcopy(config))  # it makes it read-only
        # Processes of a sweep that are killed leave semaphores. Python removes them, and warns.
        ignored = "ignore:resource_tracker:UserWarning"
        filters = [os.environ.get("PYTHONWARNINGS"), ignored]
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, filters))
        if not config.hydra.sweeper._target_.endswith("BasicSweeper"):
            # One that searches chooses its runs as it goes, and each is checked then.
            SweepCallback.folder = folder
            return
        jobs = grid(config)
        if config.resume is not None:
            stop("resume=... is for one run; a sweep is resumed by hydra.sweep.dir=<its folder>")
        os.environ[TOTAL] = str(len(jobs))
        names = [run_name(overrides) for overrides in jobs]
        for overrides, name in zip(jobs, names, strict=True):
            if names.count(name) > 1:
                stop(f"the run {' '.join(overrides)} is asked for twice; nothing was started")
        fused = config.hydra.launcher._target_.endswith("FusedLauncher")
        try:
            with Console(stderr=True).status(f"checking {len(jobs)} runs"):
                for overrides, name in zip(jobs, names, strict=True):
                    job = checked(config, overrides, folder / name)
                    if job is None:
                        return  # Hydra's sweeper finds the same, and says it well
                    if fused:
                        SweepCallback.configs[tuple(overrides)] = job
        except ConfigError as error:
            stop(f"{error} (in the run {' '.join(overrides)}; nothing was started)")
        # It would compose all of them once more, to see whether that can be done. (In the base
        # class, since Hydra loads another copy of BasicSweeper's module.)
        Sweeper.validate_batch_is_legal = lambda *_: None  # type: ignore[method-assign]
        SweepCallback.folder = folder

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        # On a full disk the run fails, and says so; its log would add 40 lines to each of its own.
        logging.raiseExceptions = False
        if int(os.environ.get("LOCAL_RANK", 0)):  # one of many processes that train one run
            return
        overrides = " ".join(config.hydra.overrides.task) or "all defaults"
        which = ""
        if config.hydra.mode.name == "MULTIRUN":
            of = f" of {os.environ[TOTAL]}" if TOTAL in os.environ else ""
            which = f" {config.hydra.job.num + 1}{of}"
        say(f"run{which}: {overrides}")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        # Launchers keep these until the sweep ends, and nobody asks for the configs: 0.2 MB a run.
        job_return.cfg = job_return.hydra_cfg = None
        if config.hydra.mode.name == "MULTIRUN" and job_return.status is JobStatus.FAILED:
            # Such as a result that cannot be written. The sweep goes on, without a score of it.
            error = job_return._return_value
            log.error("%s: %s", config.hydra.runtime.output_dir, _one_line(error))
            log.debug("", exc_info=error)
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None


def show_table(folder: Path) -> bool:
    """Write summary.csv and print the table of a sweep's runs; whether all of them are done.

    Raises:
        OSError: it cannot be written, or printed; what can be is.
    """
    from losswatch.report.report import read_runs, summary_table, write_summary

    failed = None
    try:
        runs = write_summary(folder)
    except OSError as error:
        runs, failed = read_runs(folder), error
    # Off a terminal rich would fold the table at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 160)
    with console.capture() as shown:  # rich itself would exit where a pipe is closed
        console.print(summary_table(runs))
        console.print(f"[bold]Summary[/]  {folder / 'summary.csv'}", highlight=False)
        console.print(f"[bold]Browse[/]   tensorboard --logdir {folder}", highlight=False)
    print(shown.get(), end="", flush=True)
    if failed:
        raise failed
    return bool((runs.status == "done").all())
