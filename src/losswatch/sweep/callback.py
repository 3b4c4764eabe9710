"""What happens before, between and after the runs: Hydra calls it (conf/config.yaml)."""

from __future__ import annotations

import copy
import functools
import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from losswatch import compat, terminal
from losswatch.config.schema import ConfigError, mode_of
from losswatch.sweep.command import current_sweep, silence_logging
from losswatch.sweep.exit import escaping, stop
from losswatch.sweep.grid import check_grid, grid
from losswatch.terminal import say
from losswatch.text import number_of, one_line, parse_overrides

log = logging.getLogger(__name__)


class SweepCallback(Callback):
    """Checks runs before they start, says which run starts, and keeps a sweep going.

    Args:
        total: the number of runs of the sweep, if it is known.
        steps: how many steps are done one after the other in the whole sweep, if that is known.
            Steps of runs that are trained side by side count once.
    """

    def __init__(self, total: int | None = None, steps: int | None = None) -> None:
        self.total, self.steps = total, steps

    def __reduce__(self) -> Any:
        """Launchers send the callback along with each job that they give to another process."""
        return _in_other_process, (self.total, self.steps)

    @escaping()
    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check a run that is to be resumed, before Hydra replaces the config in its folder."""
        if config.resume is None:
            return
        # Imported late: torch takes seconds, and train.py imports this file at its start.
        from losswatch.disk.resume import check_folder, check_run
        from losswatch.run.build import settled_config

        try:
            check_run(Path(config.resume))
            check_folder(Path(config.resume), settled_config(config))
        except ConfigError as error:
            stop(str(error))

    @escaping()
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check all runs of a sweep."""
        sweep, folder = current_sweep(), Path(config.hydra.sweep.dir)
        # For ${hydra:...} in folders' names. A copy, because `set_config` makes it read-only.
        HydraConfig.instance().set_config(copy.deepcopy(config))
        launcher = config.hydra.launcher
        at_once = 0  # unknown
        if launcher._target_.endswith("BasicLauncher"):
            at_once = 1
        else:
            compat.initialize_workers(end_in_time)
        if launcher._target_.endswith("JoblibLauncher"):
            import joblib  # imported late: single runs need no joblib

            at_once = joblib.effective_n_jobs(launcher.n_jobs)
        # A sweeper that searches chooses its runs as it goes; train.py checks each of them.
        if config.hydra.sweeper._target_.endswith("BasicSweeper"):
            if config.resume is not None:
                stop(
                    "resume=... is for one run; a sweep is resumed by hydra.sweep.dir=<its folder>"
                )
            runs = grid(config)
            self.total = len(runs)
            try:
                configs = check_grid(config, runs)
            except ConfigError as error:
                stop(str(error))
            sweep.is_checked = True
            if at_once:
                lengths = [run.trainer.max_steps for run in configs]
                self.steps = max([math.ceil(sum(lengths) / at_once), *lengths])
            if launcher._target_.endswith("FusedLauncher"):
                sweep.configs = dict(zip(map(tuple, runs), configs, strict=True))
        _check_direction(config)
        sweep.folder = folder
        runs_known = number_of(self.total, "run") if self.total else "a search"
        say(f"{runs_known}; table and runs go to {folder}")

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Say which run starts."""
        if int(os.environ.get("LOCAL_RANK", 0)):  # the first process of a run's devices says it
            return
        overrides = " ".join(config.hydra.overrides.task) or "all defaults"
        number = ""
        if config.hydra.mode.name == "MULTIRUN":
            of_total = f" of {self.total}" if self.total else ""
            number = f" {config.hydra.job.num + 1}{of_total}"
            is_first = config.hydra.job.num == 0
            if self.total and self.steps and (is_first or terminal.expected.runs):
                left = self.total - config.hydra.job.num
                terminal.expected = terminal.Runs(left, math.ceil(self.steps * left / self.total))
        say(f"run{number}: {overrides}")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Let a sweep go on after a run that raised an error, such as a result not written."""
        # Launchers keep what jobs return until the sweep ends. Nobody reads these configs, which
        # take 0.2 MB a run.
        job_return.cfg = job_return.hydra_cfg = None
        if config.hydra.mode.name == "MULTIRUN" and job_return.status is JobStatus.FAILED:
            error = compat.job_error(job_return)
            log.error("%s: %s", config.hydra.runtime.output_dir, one_line(error))
            log.debug("", exc_info=error)
            # A sweeper that searches gets no score for this run.
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None


def _check_direction(config: DictConfig) -> None:
    """See that a search, such as optuna's, goes to the better end of its metric."""
    metric = parse_overrides(config.hydra.overrides.task).get("metric", config.metric)
    wanted = {"max": "maximize", "min": "minimize"}[mode_of(metric)]
    found = config.hydra.sweeper.get("direction")
    found = getattr(found, "name", found)
    if found in ("maximize", "minimize") and found != wanted:
        stop(f"a search by metric={metric} needs hydra.sweeper.direction={wanted}, got {found}")


def _in_other_process(total: int | None, steps: int | None) -> SweepCallback:
    """Construct the callback in a process that a launcher started, and set up that process."""
    silence_logging()
    return SweepCallback(total, steps)


@functools.cache  # one thread a process
def end_in_time() -> None:
    """End this process, if joblib started it, by SIGTERM, or when its parent ends, even by kill -9.

    Otherwise it would go on training and keep its runs locked. The jobs of other launchers are
    meant to outlive the command, or their launcher ends them.
    """
    if (parent := multiprocessing.parent_process()) is None:
        return
    # At once: Lightning, in the place of the default handler, would let the batch end, and a worker
    # of the loader that the signal ended, too, would make the run a failed one.
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))

    def watch() -> None:
        while os.getppid() == parent.pid:
            time.sleep(0.3)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
