"""What surrounds the runs: the whole grid checked first, which run of how many, the table last."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from losswatch.config import ConfigError

TOTAL = "LOSSWATCH_RUNS"  # the number of runs, for job processes on this machine


def stop(message: str) -> None:
    """One clear line, and a non-zero exit that passes through Hydra's error reports."""
    print(f"losswatch: {message}", file=sys.stderr)
    raise SystemExit(2)


def grid(config: DictConfig) -> list[list[str]]:
    """The overrides of each job of a multirun, as Hydra's basic sweeper will launch them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    arguments = [f"{key}={value}" for key, value in params.items()]
    arguments += OmegaConf.to_object(config.hydra.overrides.task)
    overrides = OverridesParser.create().parse_overrides(arguments)
    [batch] = BasicSweeper.split_arguments(overrides, None)
    return batch


class SweepCallback(Callback):
    """Hydra calls it around a run or a sweep (conf/config.yaml, hydra.callbacks)."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if not config.hydra.sweeper._target_.endswith("BasicSweeper"):
            return
        from losswatch.build import check, loss_files

        jobs = grid(config)
        os.environ[TOTAL] = str(len(jobs))
        loader = GlobalHydra.instance().config_loader()
        for overrides in jobs:
            try:
                job = loader.load_sweep_config(config, overrides)
            except Exception:
                return  # Hydra's sweeper finds the same, and says it well
            files = loss_files(job.hydra.runtime.config_sources)
            try:
                check(job, job.hydra.runtime.choices.loss, files)
            except ConfigError as error:
                stop(f"{error} (in the run {' '.join(overrides)}; nothing was started)")

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        overrides = " ".join(config.hydra.overrides.task) or "all defaults"
        which = ""
        if config.hydra.mode.name == "MULTIRUN":
            of = f" of {os.environ[TOTAL]}" if TOTAL in os.environ else ""
            which = f" {config.hydra.job.num + 1}{of}"
        print(f"run{which}: {overrides}", file=sys.stderr)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from losswatch.report import summary_table, write_summary

        folder = Path(config.hydra.sweep.dir)
        runs = write_summary(folder)
        # Off a terminal rich would fold the table at 80 columns.
        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(summary_table(runs))
        console.print(f"[bold]Summary[/]  {folder / 'summary.csv'}", highlight=False)
        console.print(f"[bold]Browse[/]   tensorboard --logdir {folder}", highlight=False)
        if (runs.status != "done").any():
            raise SystemExit(1)
