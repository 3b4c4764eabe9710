"""From a config to the objects of a run. Nothing here trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import hydra
import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from losswatch.data.random import ThresholdedImages
from losswatch.losses import LossSet
from losswatch.train.arguments import check_arguments
from losswatch.train.config import ConfigError, thresholds
from losswatch.train.randomness import seed_everything


def _check_target(what: str, node: Any) -> None:
    """See that a node, and each node in it, names an importable object and fits its arguments.

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
    """hydra.utils.instantiate, with one line about the config for each of its errors.

    Raises:
        ConfigError: also if it makes anything but a module.
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


def make_losses(nodes: Mapping[str, DictConfig]) -> LossSet:
    """The losses that `presets.loss_nodes` describes.

    A loss that draws random numbers in its constructor draws the same ones in all runs, so that the
    runs of a stack may share it.
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
    """The images that `cfg.theta`, `cfg.seed` and `cfg.data` describe."""
    return ThresholdedImages(thresholds(cfg.theta), seed=cfg.seed, **cfg.data)


def make_optimizer(cfg: DictConfig) -> Callable[..., torch.optim.Optimizer]:
    """The function from parameters to an optimiser.

    Raises:
        ConfigError: its `_target_` or the type of a value is wrong.
    """
    _check_target("optimizer", cfg.optimizer)
    return hydra.utils.instantiate(cfg.optimizer, _partial_=True, _convert_="all")


def trainer_options(cfg: DictConfig) -> dict[str, Any]:
    """`cfg.trainer`, with a validation interval of at most the training's length."""
    options: dict[str, Any] = OmegaConf.to_container(cfg.trainer, resolve=True)  # type: ignore
    options["val_check_interval"] = min(options["val_check_interval"], options["max_steps"])
    return options
