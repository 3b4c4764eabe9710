"""Whether a run can work, checked before anything of it is done."""

from __future__ import annotations

import functools
import json
import logging
import multiprocessing
import os
import tempfile
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.accelerators import CPUAccelerator
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from losswatch import compat
from losswatch.checks.arguments import check_arguments
from losswatch.checks.first_step import try_step
from losswatch.checks.metrics import Metrics, check_callbacks
from losswatch.config.loss_files import loss_nodes
from losswatch.config.schema import ConfigError, check_values
from losswatch.config.settings import plain
from losswatch.data.folder import FolderImages
from losswatch.data.form import Form
from losswatch.data.modules import (
    count_batches,
    first_batch,
    has_test,
    is_ours,
    validation_batch,
)
from losswatch.data.survey import print_survey
from losswatch.disk.checkpoint import data_of
from losswatch.disk.checkpoint_files import AtomicCheckpoints, find
from losswatch.disk.event_log import EventLog
from losswatch.losses import LossSet
from losswatch.run.build import (
    check_loggers,
    describe_data,
    make_callbacks,
    make_data,
    make_losses,
    make_net,
    make_optimizer,
    make_scheduler,
    make_unlabelled,
    missing_classes,
    set_length,
    trainer_options,
)
from losswatch.run.process import quiet
from losswatch.text import one_line

_passed: set[str] = set()  # the first steps that `_try` has found to work, and the data shown

log = logging.getLogger(__name__)


def check(cfg: DictConfig, trained: str, multirun: bool = False) -> None:
    """See that a run can work before anything of it is done; set its length (`set_length`).

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
        set_length(cfg)
        options = trainer_options(cfg)
        check_arguments("trainer", pl.Trainer, options)
        trainer = _check_trainer(json.dumps(options), multirun)
        if cfg.mode == "predict":
            make_unlabelled(cfg, data_of(find(cfg.checkpoint))[0])
            return
        for key in ("batch_size", "eval_batch_size"):
            if (images := cfg.data.get(key, _ranks(trainer))) < _ranks(trainer):
                raise ConfigError(
                    f"data.{key} must be at least {_ranks(trainer)}, an image for each device, "
                    f"got {images}"
                )
        _show_data(cfg, _ranks(trainer))
        if cfg.mode == "test" and not has_test(make_data(cfg)):
            raise ConfigError("mode=test: the data have no images for a test")
        _check_shares(cfg, _ranks(trainer))
        form = describe_data(cfg)
        missing = missing_classes(cfg) if cfg.mode == "train" else []
        metrics = Metrics.of(form.classes, list(dict.fromkeys((*cfg.watch, trained))), missing)
        metrics.check(f"metric={cfg.metric}", cfg.metric)
        check_loggers(cfg)
        if cfg.callbacks and (key := f"{cfg.callbacks} of {metrics}") not in _passed:
            with tempfile.TemporaryDirectory() as folder:
                made = make_callbacks(cfg, Path(folder))
                check_callbacks(made, metrics, Path(folder).resolve(), multirun)
            _passed.add(key)
        # Runs that differ only in these two do the same in their first step.
        same = plain(cfg) | {"theta": form.channels, "seed": 0}
        nodes = loss_nodes(cfg, trained)
        step = OmegaConf.to_yaml(OmegaConf.create([same, trained, nodes]))
        if step not in _passed:
            _try(cfg, trained, make_losses(nodes, form), trainer, form)
            _check_scheduler(cfg)
            _passed.add(step)


def _check_scheduler(cfg: DictConfig) -> None:
    """See that the scheduler can be made, take a step, and last as long as the training.

    Raises:
        ConfigError: it cannot.
    """
    make = make_scheduler(cfg)
    if make is None:
        return
    try:
        optimizer = make_optimizer(cfg)([nn.Parameter(torch.zeros(1))])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the optimiser has taken no step
            scheduler = make(optimizer)["scheduler"]
            scheduler.step(*([0.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
    except Exception as error:
        raise ConfigError(f"scheduler: {' '.join(str(error).split())}") from error
    steps = cfg.trainer.max_steps
    if isinstance(scheduler, OneCycleLR) and scheduler.total_steps < steps:
        raise ConfigError(
            f"scheduler.total_steps={scheduler.total_steps} ends before trainer.max_steps={steps}"
        )


def _show_data(cfg: DictConfig, ranks: int) -> None:
    """Say once how long epochs are, how rare each class is, and what a split lacks.

    Raises:
        ConfigError: a split has fewer images than there are devices.
    """
    # Not in the processes of a launcher: the first process has said it.
    if multiprocessing.parent_process() or compat.process_rank():
        return
    if (epochs := cfg.trainer.max_epochs) is not None and cfg.mode == "train":
        length = f"trainer.max_epochs={epochs} sets trainer.max_steps={cfg.trainer.max_steps}"
        if length not in _passed:
            _passed.add(length)
            log.info(length)
    # A data module of the user's is made once for this, and not for each run of a sweep.
    key = f"{plain(cfg)['data']} on {ranks}"
    if key in _passed:
        return
    data = make_data(cfg)
    if not is_ours(data):
        _check_module(data, ranks)
    if isinstance(data, FolderImages):
        for split, cases in data.layout.cases.items():
            if len(cases) < ranks:
                raise ConfigError(
                    f"{split} has {len(cases)} images, fewer than the {ranks} devices"
                )
        if (text := str(data.survey)) not in _passed:
            _passed.add(text)
            print_survey(data.survey, data.root)
            for split, name in data.missing:
                log.warning(
                    "no image of %s has class %s; its metrics leave the class out", split, name
                )
    _passed.add(key)


def _check_shares(cfg: DictConfig, ranks: int) -> None:
    """See that a share of the validation or the test is at least one batch of each device.

    Raises:
        ConfigError: it is not.
    """
    for split in ("val", "test"):
        option = f"trainer.limit_{split}_batches"
        share = cfg.trainer.get(f"limit_{split}_batches")
        if not isinstance(share, float) or not 0 < share < 1:
            continue
        data = make_data(cfg)
        if split == "test" and not has_test(data):
            continue
        try:
            batches = count_batches(data, split)
        except Exception as error:
            raise ConfigError(
                f"{option}={share} needs batches that can be counted: {one_line(error)}"
            ) from error
        if isinstance(data, FolderImages):
            batches //= ranks  # of images
        if share * batches < 1:
            raise ConfigError(
                f"{option}={share} of {batches} is less than one batch; whole numbers count batches"
            )


def _check_module(data: pl.LightningDataModule, ranks: int) -> None:
    """See that a data module of the user's can be trained with.

    Raises:
        ConfigError: it cannot.
    """
    try:
        validation_batch(data)
    except Exception as error:
        raise ConfigError(
            f"data: its val_dataloader gives no batch to validate on: {one_line(error)}"
        ) from error
    if ranks > 1:
        raise ConfigError(
            f"trainer.devices x trainer.num_nodes is {ranks}: a data module of yours is trained on "
            "one device; data=random and data=folder share their batches among devices, and "
            "losswatch.Watch works in a Trainer of yours"
        )


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
    # As in the run, because Lightning refuses some options together with these. Nothing is written.
    ours = {
        "logger": EventLog("."), "plugins": [AtomicCheckpoints(Path())], "num_sanity_val_steps": 0,
        "use_distributed_sampler": False, "enable_model_summary": False,
        "enable_progress_bar": False,
    }  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run's own Trainer will give the same
            trainer = pl.Trainer(**{**asked, **ours})
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


def _try(cfg: DictConfig, trained: str, losses: LossSet, trainer: pl.Trainer, form: Form) -> None:
    """Do a run's first step, with the share of the batch that its last rank gets."""
    precision, device = trainer.strategy.precision_plugin, trainer.strategy.root_device
    data = make_data(cfg)
    try:
        images, target = first_batch(data, _ranks(trainer))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except Exception as error:  # of a module of the user's
        raise ConfigError(f"data: its first batch: {one_line(error)}") from error
    net = make_net(cfg, form)
    for what, module in (("model", net), ("losses", losses)):
        try:
            precision.convert_module(module).to(device)
        except Exception as error:
            raise ConfigError(f"{what}: {one_line(error)}") from error
    batch = precision.convert_input((images.to(device), target.to(device)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself will give them
        try_step(
            net, losses, trained, make_optimizer(cfg), batch, form,
            precision.forward_context(),
        )  # fmt: skip
