"""From a checked config to the objects of a run. Nothing here trains."""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf, read_write
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn
from yaml import YAMLError

from losswatch.data.random import TRAIN, ThresholdedImages
from losswatch.losses import LossSet
from losswatch.train import yaml_errors
from losswatch.train.arguments import check_arguments
from losswatch.train.config import ConfigError, check_values, thresholds
from losswatch.train.randomness import seed_everything
from losswatch.train.resume import plain
from losswatch.train.trial import try_step

logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it would say each error twice


def _check_target(what: str, node: Any) -> None:
    """See that a node names what can be imported, with values of the right types; nodes in it too.

    Raises:
        ConfigError: with one line for the user.
    """
    if OmegaConf.is_list(node):
        for i, inner in enumerate(node):
            _check_target(f"{what}[{i}]", inner)
    if not OmegaConf.is_dict(node):
        return
    for key, inner in node.items():
        _check_target(f"{what}.{key}", inner)
    if "_target_" not in node:
        return
    try:
        target = get_object(node._target_)
    except Exception as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{what}._target_={node._target_} cannot be imported: {why}") from error
    values: Any = OmegaConf.to_container(node, resolve=True)
    check_arguments(what, target, {k: v for k, v in values.items() if not k.startswith("_")})


def _instantiate(what: str, node: Any, **kwargs: Any) -> nn.Module:
    """hydra.utils.instantiate, its errors made one line about the config.

    Raises:
        ConfigError: also where it makes anything but a module.
    """
    if not OmegaConf.is_dict(node) or "_target_" not in node:
        raise ConfigError(f"{what} needs a _target_, the class or function that makes it")
    _check_target(what, node)
    try:
        made = hydra.utils.instantiate(node, _convert_="all", **kwargs)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ConfigError(f"{what}: {' '.join(str(cause).split())}") from error
    if not isinstance(made, nn.Module):
        raise ConfigError(
            f"{what}: {node._target_} must make a torch.nn.Module, it makes a {type(made).__name__}"
        )
    return made


def loss_names() -> list[str]:
    """The losses that may be named: those of conf/loss and of each folder added to its search."""
    return _list_losses(*_search())


def _search() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Where Hydra searches: the overrides that add to it, and the folders known before."""
    given = HydraConfig.get().overrides.hydra if HydraConfig.initialized() else []
    added = tuple(override for override in given if "hydra.searchpath" in override)
    sources = GlobalHydra.instance().config_loader().get_sources()
    return added, tuple(source.path for source in sources)


@functools.cache  # listing takes 4 ms, composing 70
def _list_losses(added: tuple[str, ...], folders: tuple[str, ...]) -> list[str]:
    loader = GlobalHydra.instance().config_loader()
    return loader.get_group_options("loss", config_name="config", overrides=list(added))


@functools.cache
def _compose_loss(name: str, added: tuple[str, ...], folders: tuple[str, ...]) -> DictConfig:
    return hydra.compose("config", [f"loss={name}", *added]).loss


def read_losses(names: Sequence[str], cfg: DictConfig) -> dict[str, DictConfig]:
    """What losses would be in this config by their files alone: composed by Hydra, and resolved.

    So a file may have a `defaults` list, and refer to other keys, as in `${seed}`.

    Raises:
        ConfigError: a file is no YAML; with its line.
    """
    search = _search()
    config = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    nodes = {}
    with read_write(config):
        for name in names:
            try:
                config.loss = _compose_loss(name, *search)
            except (YAMLError, UnicodeDecodeError) as error:
                raise ConfigError(yaml_errors.describe(error)) from error
            nodes[name] = _resolved(config.loss)
    return nodes


def _resolved(node: DictConfig) -> DictConfig:
    values: Any = OmegaConf.to_container(node, resolve=True)
    return OmegaConf.create(values)


def loss_nodes(cfg: DictConfig, trained: str) -> dict[str, DictConfig]:
    """The configs of the losses watched, in the order of `watch`; the trained one is among them.

    The trained loss is `cfg.loss`, where the command line may have changed it.

    Raises:
        ConfigError: there is no such loss.
    """
    known = loss_names()
    if trained not in known:  # loss=[dice,cce], ~loss
        raise ConfigError(f"loss must be one of {', '.join(known)}")
    if not OmegaConf.is_dict(cfg.loss):
        raise ConfigError(f"the file of loss {trained} must hold keys and values, got {cfg.loss}")
    for name in cfg.watch:
        if not isinstance(name, str) or name not in known:
            raise ConfigError(f"watch: there is no loss {name!r}; known are {', '.join(known)}")
    nodes = read_losses([name for name in cfg.watch if name != trained], cfg)
    nodes[trained] = _resolved(cfg.loss)
    return {name: nodes[name] for name in (*cfg.watch, trained)}


def make_losses(nodes: Mapping[str, DictConfig]) -> LossSet:
    """The losses that `loss_nodes` describes.

    What they draw at construction is the same in all runs, which may share them in a stack.
    """
    with isolate_rng():
        seed_everything(0)
        return LossSet({name: _instantiate(f"loss {name}", node) for name, node in nodes.items()})


def make_net(cfg: DictConfig) -> nn.Module:
    """The network, its weights drawn from `cfg.seed`."""
    with isolate_rng():
        seed_everything(cfg.seed)
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
    """The function from parameters to an optimiser.

    Raises:
        ConfigError: its `_target_` or the type of a value is wrong.
    """
    _check_target("optimizer", cfg.optimizer)
    return hydra.utils.instantiate(cfg.optimizer, _partial_=True, _convert_="all")


@functools.cache  # one Trainer for all runs of a sweep with the same options
def _check_trainer(options: str, multirun: bool) -> pl.Trainer:
    """Check the options together with this machine; return a Trainer of them."""
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
    return trainer


def check(cfg: DictConfig, trained: str, multirun: bool = False) -> None:
    """See that a run can work before anything of it is done.

    Raises:
        ConfigError: with one line for the user.
    """
    _check_names()
    check_values(cfg)
    options = trainer_options(cfg)
    check_arguments("trainer", pl.Trainer, options)
    trainer = _check_trainer(json.dumps(options), multirun)
    ranks = trainer.num_devices * trainer.num_nodes
    for key in ("batch_size", "eval_batch_size"):
        if (images := cfg.data[key]) < ranks:
            raise ConfigError(
                f"data.{key} must be at least {ranks}, an image for each device, got {images}"
            )
    # Runs that differ in nothing else do the same in their first step.
    same = plain(cfg) | {"theta": len(thresholds(cfg.theta)), "seed": 0}
    nodes = loss_nodes(cfg, trained)
    step = OmegaConf.to_yaml(OmegaConf.create([same, trained, nodes]))
    if step not in _TRIED:
        _try(cfg, trained, make_losses(nodes), trainer)
        _TRIED.add(step)


_TRIED: set[str] = set()  # first steps that have passed `_try`


def _try(cfg: DictConfig, trained: str, losses: LossSet, trainer: pl.Trainer) -> None:
    """Do a run's first step, with the share of the batch that the last of its ranks gets."""
    precision, device = trainer.strategy.precision_plugin, trainer.strategy.root_device
    share = cfg.data.batch_size // (trainer.num_devices * trainer.num_nodes)
    images, target = make_data(cfg).draw(TRAIN, 0, share)
    net = make_net(cfg)
    for module in (net, losses):
        precision.convert_module(module).to(device)
    batch = precision.convert_input((images.to(device), target.to(device)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself gives them
        try_step(
            net, losses, trained, make_optimizer(cfg), batch, len(thresholds(cfg.theta)) + 1,
            precision.forward_context(),
        )  # fmt: skip


def _check_names() -> None:
    """See that no file of one's own has the name of a built-in one, which Hydra finds first.

    Raises:
        ConfigError: naming both.
    """
    sources = GlobalHydra.instance().config_loader().get_sources()
    folders = [Path(source.path).resolve() for source in sources if source.scheme() == "file"]
    for built_in in sorted(folders[0].rglob("*.yaml")) if folders else []:
        for folder in dict.fromkeys(folders[1:]):
            file = folder / built_in.relative_to(folders[0])
            if file != built_in and file.exists():
                raise ConfigError(f"{file} would not be used, but {built_in}; give it another name")


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
