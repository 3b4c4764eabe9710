"""Checks that this machine can do what the options of Lightning's Trainer ask for."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.accelerators import CPUAccelerator

from losswatch import compat
from losswatch.config.errors import ConfigError
from losswatch.disk.checkpoint_files import AtomicCheckpoints
from losswatch.disk.event_log import EventLog


def ranks_of(trainer: pl.Trainer) -> int:
    """How many devices train one run together."""
    return trainer.num_devices * trainer.num_nodes


def check_machine(options: Mapping[str, Any], is_sweep: bool) -> pl.Trainer:
    """Make a Trainer of these options, for checks only.

    Args:
        options: of pytorch_lightning.Trainer.
        is_sweep: whether the run is one of a sweep.

    Raises:
        ConfigError: the Trainer cannot be made, or would not train as one run on this machine.
    """
    # The same as in the run, because Lightning refuses some options beside these. Nothing is
    # written.
    ours = {
        "logger": EventLog("."), "plugins": [AtomicCheckpoints(Path())], "num_sanity_val_steps": 0,
        "use_distributed_sampler": False, "enable_model_summary": False,
        "enable_progress_bar": False,
    }  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run's own Trainer gives the same warnings
            trainer = pl.Trainer(**{**options, **ours})
    except Exception as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    # With too few Slurm tasks Lightning waits for ever; with too many, each task trains the whole
    # run.
    tasks, ranks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)), ranks_of(trainer)
    if tasks != ranks and compat.is_started_by_slurm(trainer):
        raise ConfigError(
            f"Slurm tasks that run this command: {tasks}, trainer.devices x trainer.num_nodes: "
            f"{ranks}; there must be one for each device, by srun --ntasks-per-node=..."
        )
    # On a CPU Lightning would use bfloat16 instead.
    precision = options.get("precision")
    if isinstance(trainer.accelerator, CPUAccelerator) and str(precision) in ("16", "16-mixed"):
        raise ConfigError(
            f"trainer.precision={precision} needs a GPU; on a CPU there is bf16-mixed"
        )
    if isinstance(trainer.accelerator, CPUAccelerator) and options.get("sync_batchnorm"):
        raise ConfigError(
            "trainer.sync_batchnorm=true needs GPUs, as in PyTorch; on CPUs give "
            "trainer.sync_batchnorm=false: each device then has its own batch statistics"
        )
    # The fork of a process with threads hangs. Spawned ranks start anew for the test, and their
    # logs are not the run's.
    if compat.forks_or_spawns(trainer):
        strategy = options.get("strategy")
        raise ConfigError(f"trainer.strategy={strategy} cannot be used here; ddp can")
    # Lightning starts each rank with the command line of this process. In a sweep that would start
    # the whole sweep again.
    if is_sweep and ranks > 1:
        raise ConfigError(
            f"trainer.devices={options.get('devices')} works outside of sweeps; give these runs as "
            "single commands, without -m"
        )
    return trainer
