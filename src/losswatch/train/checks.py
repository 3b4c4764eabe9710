"""Whether a run can work, checked before anything of it is done."""

from __future__ import annotations

import functools
import json
import os
import warnings
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.accelerators import CPUAccelerator

from losswatch import compat
from losswatch.data.random import TRAIN
from losswatch.losses import LossSet
from losswatch.train.arguments import check_arguments
from losswatch.train.build import (
    make_data,
    make_losses,
    make_net,
    make_optimizer,
    trainer_options,
)
from losswatch.train.config import ConfigError, check_values, thresholds
from losswatch.train.presets import loss_nodes
from losswatch.train.process import quiet
from losswatch.train.settings import plain
from losswatch.train.trial import try_step

_passed: set[str] = set()  # the first steps that `_try` has found to work


def check(cfg: DictConfig, trained: str, multirun: bool = False) -> None:
    """See that a run can work before anything of it is done.

    Args:
        cfg: of the run.
        trained: the name of the trained loss.
        multirun: whether it is one of a sweep.

    Raises:
        ConfigError: with one line for the user.
    """
    with quiet():
        _check_names()
        check_values(cfg)
        options = trainer_options(cfg)
        check_arguments("trainer", pl.Trainer, options)
        trainer = _check_trainer(json.dumps(options), multirun)
        for key in ("batch_size", "eval_batch_size"):
            if (images := cfg.data[key]) < _ranks(trainer):
                raise ConfigError(
                    f"data.{key} must be at least {_ranks(trainer)}, an image for each device, "
                    f"got {images}"
                )
        # Runs that differ only in these two do the same in their first step.
        same = plain(cfg) | {"theta": len(thresholds(cfg.theta)), "seed": 0}
        nodes = loss_nodes(cfg, trained)
        step = OmegaConf.to_yaml(OmegaConf.create([same, trained, nodes]))
        if step not in _passed:
            _try(cfg, trained, make_losses(nodes), trainer)
            _passed.add(step)


def _check_names() -> None:
    """See that no file of the user's has the name of a built-in one, which Hydra would use instead.

    Raises:
        ConfigError: naming both.
    """
    sources = compat.config_loader().get_sources()
    folders = [Path(source.path).resolve() for source in sources if source.scheme() == "file"]
    for built_in in sorted(folders[0].rglob("*.yaml")) if folders else []:
        for folder in dict.fromkeys(folders[1:]):
            file = folder / built_in.relative_to(folders[0])
            if file != built_in and file.exists():
                raise ConfigError(f"{file} would not be used, but {built_in}; give it another name")


def _ranks(trainer: pl.Trainer) -> int:
    return trainer.num_devices * trainer.num_nodes


@functools.cache  # one Trainer for all runs of a sweep with the same options
def _check_trainer(options: str, multirun: bool) -> pl.Trainer:
    """Check the Trainer's options on this machine.

    Args:
        options: as JSON.
        multirun: as of `check`.

    Returns:
        a Trainer of these options.

    Raises:
        ConfigError: with one line for the user.
    """
    asked = json.loads(options)
    silent = {
        "logger": False, "enable_checkpointing": False, "enable_model_summary": False,
        "enable_progress_bar": False,
    }  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run's own Trainer will give the same
            trainer = pl.Trainer(**{**asked, **silent})
    except Exception as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    # Lightning would wait for tasks that never come, or train the whole run in each of them.
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks != _ranks(trainer) and compat.is_started_by_slurm(trainer):
        raise ConfigError(
            f"Slurm tasks that run this command: {tasks}, trainer.devices x trainer.num_nodes: "
            f"{_ranks(trainer)}; there must be one for each device, by srun --ntasks-per-node=..."
        )
    # On a CPU Lightning would take bfloat16.
    precision = asked.get("precision")
    if isinstance(trainer.accelerator, CPUAccelerator) and str(precision) in ("16", "16-mixed"):
        raise ConfigError(
            f"trainer.precision={precision} needs a GPU; on a CPU there is bf16-mixed"
        )
    # The fork of a process with threads hangs. Spawned ranks start anew for the test, and their
    # logs are not the run's.
    if compat.forks_or_spawns(trainer):
        raise ConfigError(f"trainer.strategy={asked.get('strategy')} cannot be used here; ddp can")
    # Lightning starts each rank by the command line of this process, here that of the whole sweep.
    if multirun and _ranks(trainer) > 1:
        raise ConfigError(
            f"trainer.devices={asked.get('devices')} works outside of sweeps; give these runs as "
            "single commands, without -m"
        )
    return trainer


def _try(cfg: DictConfig, trained: str, losses: LossSet, trainer: pl.Trainer) -> None:
    """Do a run's first step, with the share of the batch that its last rank gets."""
    precision, device = trainer.strategy.precision_plugin, trainer.strategy.root_device
    images, target = make_data(cfg).draw(TRAIN, 0, cfg.data.batch_size // _ranks(trainer))
    net = make_net(cfg)
    for module in (net, losses):
        precision.convert_module(module).to(device)
    batch = precision.convert_input((images.to(device), target.to(device)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself will give them
        try_step(
            net, losses, trained, make_optimizer(cfg), batch, len(thresholds(cfg.theta)) + 1,
            precision.forward_context(),
        )  # fmt: skip
