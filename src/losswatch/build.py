"""From a checked config to the objects of a run. Nothing here trains."""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import nn

from losswatch.config import ConfigError, check_values, thresholds
from losswatch.data import ThresholdedImages
from losswatch.losses import LossSet

logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it would say each error twice


def _instantiate(what: str, node: Any, **kwargs: Any) -> Any:
    """hydra.utils.instantiate, its errors made one line about the config."""
    if not OmegaConf.is_dict(node) or "_target_" not in node:
        raise ConfigError(f"{what} needs a _target_, the class or function that makes it")
    try:
        get_object(node._target_)
    except Exception as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{what}._target_={node._target_} cannot be imported: {why}") from error
    try:
        return hydra.utils.instantiate(node, _convert_="all", **kwargs)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ConfigError(f"{what}: {' '.join(str(cause).split())}") from error


def loss_files(sources: ListConfig | list[Any]) -> dict[str, Path]:
    """Every loss's name and file: those of conf/loss and of each folder added by --config-dir."""
    files: dict[str, Path] = {}
    for source in sources:
        if source.schema == "file":
            for file in sorted(Path(source.path, "loss").glob("*.yaml")):
                files.setdefault(file.stem, file)
    return files


def make_losses(cfg: DictConfig, trained: str, files: Mapping[str, Path]) -> LossSet:
    """The losses watched, in the order of `watch`; the trained one is always among them.

    The trained loss is made from `cfg.loss`, where the command line may have changed it.
    """
    nodes: dict[str, Any] = {}
    if trained not in files:  # loss=[dice,cce], ~loss
        raise ConfigError(f"loss must be one of {', '.join(files)}")
    for name in cfg.watch:
        if not isinstance(name, str) or name not in files:
            raise ConfigError(f"watch: there is no loss {name!r}; known are {', '.join(files)}")
        nodes[name] = cfg.loss if name == trained else OmegaConf.load(files[name])
    nodes.setdefault(trained, cfg.loss)
    return LossSet({name: _instantiate(f"loss {name}", node) for name, node in nodes.items()})


def make_net(cfg: DictConfig) -> nn.Module:
    """The network, its weights drawn from `cfg.seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return _instantiate(
            "model",
            cfg.model,
            in_channels=1,
            num_classes=len(thresholds(cfg.theta)) + 1,
            dims=cfg.data.dims,
        )


def make_data(cfg: DictConfig) -> ThresholdedImages:
    return ThresholdedImages(thresholds(cfg.theta), seed=cfg.seed, **cfg.data)


def make_optimizer(cfg: DictConfig) -> Callable[..., torch.optim.Optimizer]:
    """The function from parameters to an optimiser."""
    return hydra.utils.instantiate(cfg.optimizer, _partial_=True, _convert_="all")


@functools.cache  # one Trainer for all runs of a sweep with the same options
def _check_trainer(options: str, multirun: bool) -> int:
    """Check the options together with this machine; return the number of ranks."""
    quieten()
    asked = json.loads(options)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run's own Trainer says it again
            trainer = pl.Trainer(**{**asked, **quiet, "enable_progress_bar": False})
    except Exception as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    ranks = trainer.num_devices * trainer.num_nodes
    # Lightning would wait for tasks that never come, or train in each of them by itself.
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks != ranks and isinstance(
        trainer._accelerator_connector.cluster_environment, SLURMEnvironment
    ):
        raise ConfigError(
            f"Slurm tasks that run this command: {tasks}, trainer.devices x trainer.num_nodes: "
            f"{ranks}; there must be one for each device, by srun --ntasks-per-node=..."
        )
    on_cpu = isinstance(trainer.accelerator, CPUAccelerator)
    # Lightning would take bfloat16.
    if on_cpu and str(asked.get("precision")) in ("16", "16-mixed"):
        raise ConfigError(
            f"trainer.precision={asked.get('precision')} needs a GPU; on a CPU there is bf16-mixed"
        )
    # A fork of a process with threads hangs; spawned ranks begin again for the test, and their
    # logs are not the run's.
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ConfigError(f"trainer.strategy={asked.get('strategy')} cannot be used here; ddp can")
    # Lightning starts each rank by this process's own command line, here that of the whole sweep.
    if multirun and ranks > 1:
        raise ConfigError(
            f"trainer.devices={asked.get('devices')} works outside of sweeps; give these runs as "
            "single commands, without -m"
        )
    return ranks


def check(cfg: DictConfig, trained: str, files: Mapping[str, Path], multirun: bool = False) -> None:
    """Make everything once on PyTorch's meta device: what cannot work is said before any work.

    Raises:
        ConfigError: with one line for the user.
    """
    check_values(cfg)
    classes = len(thresholds(cfg.theta)) + 1
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # initialising nothing is a no-op
        net = make_net(cfg)
        side = (cfg.data.image_size,) * cfg.data.dims
        try:
            shape = net(torch.empty(2, 1, *side)).shape
        except Exception as error:
            raise ConfigError(f"model: {' '.join(str(error).split())}") from error
    if shape != (2, classes, *side):
        raise ConfigError(
            f"model must return logits of shape {(2, classes, *side)} for images of shape "
            f"{(2, 1, *side)}, it returns {tuple(shape)}"
        )
    _instantiate("optimizer", cfg.optimizer, params=[torch.nn.Parameter(torch.zeros(1))])
    ranks = _check_trainer(json.dumps(trainer_options(cfg)), multirun)
    for key in ("batch_size", "eval_batch_size"):
        if (images := cfg.data[key]) < ranks:
            raise ConfigError(
                f"data.{key} must be at least {ranks}, an image for each device, got {images}"
            )
    losses = make_losses(cfg, trained, files)
    logits = torch.randn(2, classes, *(4,) * cfg.data.dims)
    target = torch.arange(2 * 4**cfg.data.dims).view(2, *(4,) * cfg.data.dims) % classes
    for name, loss in zip(losses.names, losses.losses, strict=True):
        try:
            value = loss(logits, target)
        except Exception as error:
            raise ConfigError(f"loss {name}: {' '.join(str(error).split())}") from error
        if not isinstance(value, torch.Tensor) or value.ndim:
            raise ConfigError(f"loss {name} must return a scalar tensor, it returns {value!r}")


def trainer_options(cfg: DictConfig) -> dict[str, Any]:
    """`cfg.trainer`, the validation interval within the training's length."""
    options: dict[str, Any] = OmegaConf.to_container(cfg.trainer, resolve=True)  # type: ignore
    options["val_check_interval"] = min(options["val_check_interval"], options["max_steps"])
    return options


def quieten() -> None:
    """Keep to itself what libraries say of things that are meant to be so."""
    # TensorBoard's thread on a full disk: its next caller gets the same error, and reports it.
    threading.excepthook = lambda failed: (
        None if isinstance(failed.exc_value, OSError) else threading.__excepthook__(failed)
    )
    for library in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for message in (
        ".*recommended to use .*sync_dist=True.*",  # metrics are summed over ranks before
        ".*does not have many workers.*",  # the images are made, not loaded
        ".*smaller than the logging interval.*",  # the probe has its own
        ".*configure_optimizers.*returned `None`.*",  # a stack's step holds the optimiser
        "The `srun` command is available.*",  # a sweep's jobs are sent by its launcher
        ".*LeafSpec.*is deprecated.*",  # Lightning's own
    ):
        warnings.filterwarnings("ignore", message)
