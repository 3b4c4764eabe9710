"""What surrounds the runs: the whole grid checked first, which run of how many, the table last."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.errors import HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from rich.console import Console

from losswatch.config import ConfigError, run_name

EXTRAS = ("joblib", "submitit", "ray", "optuna")  # of pyproject.toml
TOTAL = "LOSSWATCH_RUNS"  # the number of runs, for job processes on this machine


def stop(message: str) -> None:
    """One clear line, and a non-zero exit that passes through Hydra's error reports."""
    print(f"losswatch: {message}", file=sys.stderr)
    raise SystemExit(2)


def explain(error: Exception) -> str:
    """Hydra's complaint about an override in one line that names what is allowed."""
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
    noise = ("https://", "full_key:", "object_type=")
    said = [line for t in lines for line in t.splitlines() if not any(n in line for n in noise)]
    return ": ".join(line.strip().rstrip(".:") for line in said if line.strip())


@contextmanager
def clear_errors() -> Iterator[None]:
    """Hydra's errors as one line (with HYDRA_FULL_ERROR=1 set, as they are), and Ctrl-C too."""
    verbose = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # that is, Hydra raises them instead of printing them
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        if verbose:
            raise
        stop(explain(error))
    except KeyboardInterrupt:
        if SweepCallback.folder is not None:
            show_table(SweepCallback.folder)
        print("losswatch: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:  # a full disk, a folder without permission
        if verbose:
            raise
        if SweepCallback.folder is not None:
            with suppress(OSError):
                show_table(SweepCallback.folder)
        print(f"losswatch: a file cannot be written: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except Exception as error:  # of a launcher or sweeper; those of the runs are theirs
        if verbose or SweepCallback.folder is None:
            raise
        show_table(SweepCallback.folder)
        said = " ".join(str(error).split())[:300]  # submitit's goes on with the job's whole log
        print(f"losswatch: the sweep ended early: {type(error).__name__}: {said}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        if not verbose:
            del os.environ["HYDRA_FULL_ERROR"]


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
    from losswatch.build import check
    from losswatch.resume import check_folder, finished, hold

    try:
        job = GlobalHydra.instance().config_loader().load_sweep_config(sweep, overrides)
    except Exception:
        return None
    check(job, job.hydra.runtime.choices.get("loss"), multirun=True)
    check_folder(folder, job)
    if folder.is_dir() and not finished(folder):
        hold(folder).close()
    return job


class SweepCallback(Callback):
    """Hydra calls it around a run or a sweep (conf/config.yaml, hydra.callbacks)."""

    folder: Path | None = None  # of the sweep under way
    # The config of each run by its overrides, until the fused launcher takes it: making one takes
    # 70 ms. Other launchers make their own, some of them elsewhere.
    configs: ClassVar[dict[tuple[str, ...], DictConfig]] = {}

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before Hydra writes the new config over that of a run which is to be resumed."""
        if config.resume is None:
            return
        from losswatch.resume import check_folder, check_run

        try:
            check_run(Path(config.resume))
            check_folder(Path(config.resume), config)
        except ConfigError as error:
            stop(str(error))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        SweepCallback.folder = Path(config.hydra.sweep.dir)
        HydraConfig.instance().set_config(copy.deepcopy(config))  # it makes it read-only
        if not config.hydra.sweeper._target_.endswith("BasicSweeper"):
            return  # one that searches chooses its runs as it goes, and each is checked then
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
                    job = checked(config, overrides, SweepCallback.folder / name)
                    if job is None:
                        return  # Hydra's sweeper finds the same, and says it well
                    if fused:
                        SweepCallback.configs[tuple(overrides)] = job
        except ConfigError as error:
            stop(f"{error} (in the run {' '.join(overrides)}; nothing was started)")
        # It would compose all of them once more, to see whether that can be done. (In the base
        # class, since Hydra loads another copy of BasicSweeper's module.)
        Sweeper.validate_batch_is_legal = lambda *_: None  # type: ignore[method-assign]

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if int(os.environ.get("LOCAL_RANK", 0)):  # one of many processes that train one run
            return
        overrides = " ".join(config.hydra.overrides.task) or "all defaults"
        which = ""
        if config.hydra.mode.name == "MULTIRUN":
            of = f" of {os.environ[TOTAL]}" if TOTAL in os.environ else ""
            which = f" {config.hydra.job.num + 1}{of}"
        print(f"run{which}: {overrides}", file=sys.stderr)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        # Launchers keep these until the sweep ends, and nobody asks for the configs: 0.2 MB a run.
        job_return.cfg = job_return.hydra_cfg = None

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if show_table(Path(config.hydra.sweep.dir)):
            raise SystemExit(1)


def show_table(folder: Path) -> bool:
    """Write summary.csv and print the table of a sweep's runs; whether any did not finish."""
    from losswatch.report import summary_table, write_summary

    runs = write_summary(folder)
    # Off a terminal rich would fold the table at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(summary_table(runs))
    console.print(f"[bold]Summary[/]  {folder / 'summary.csv'}", highlight=False)
    console.print(f"[bold]Browse[/]   tensorboard --logdir {folder}", highlight=False)
    return bool((runs.status != "done").any())
