"""Makes the objects of a run from its plan. Nothing here trains."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from losswatch import compat
from losswatch.checks.arguments import check_arguments, check_call
from losswatch.config.errors import ConfigError
from losswatch.config.settings import Node, Settings
from losswatch.data.folder import UnlabelledImages
from losswatch.data.form import IGNORED, Form
from losswatch.losses import CrossEntropy, Dice, LossSet, Sum
from losswatch.presets import load_loss
from losswatch.run.plan import Plan
from losswatch.run.randomness import seed_everything
from losswatch.watch.outputs import input_kind, of_each_channel

# --- Nodes ---------------------------------------------------------------------------------------


def _instantiate(what: str, node: Node, kind: type = nn.Module) -> Any:
    """hydra.utils.instantiate, with one line about the config for each error.

    Raises:
        ConfigError: the object cannot be made, or is not of this kind.
    """
    if not _has_target(node):
        raise ConfigError(f"{what} needs a _target_, the class or function that makes it")
    _check_targets(what, node)
    try:
        made = hydra.utils.instantiate(node, _convert_="all")
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__  # the constructor's error; its own causes say less
        why = " ".join(str(cause).split()) or type(cause).__name__
        if what == "model" and "missing" in why and isinstance(cause, TypeError):
            why += "; its file says what it gets, such as in_channels: ${form.in_channels}"
        raise ConfigError(f"{what}: {why}") from error
    _check_kind(what, node, type(made), kind)
    return made


def _check_targets(what: str, node: Any) -> None:
    """Check that a node, and each node in it, names an importable object with fitting arguments.

    Raises:
        ConfigError: an object cannot be imported, or an argument has a wrong type.
    """
    if isinstance(node, list):
        for i, inner in enumerate(node):
            _check_targets(f"{what}[{i}]", inner)
    if isinstance(node, dict):
        for key, inner in node.items():
            _check_targets(f"{what}.{key}", inner)
        if "_target_" in node:
            check_arguments(what, _target(what, node), _arguments(node))


def _target(what: str, node: Node) -> Any:
    """The class or function that the `_target_` of a node names.

    Raises:
        ConfigError: nothing of that name can be imported.
    """
    try:
        return get_object(node["_target_"])
    except Exception as error:
        why = " ".join(str(error).split())
        raise ConfigError(
            f"{what}._target_={node['_target_']} cannot be imported: {why}"
        ) from error


def _arguments(node: Node) -> dict[str, Any]:
    """The keyword arguments that a node gives to its target."""
    return {str(key): value for key, value in node.items() if str(key)[0] != "_"}


def _has_target(node: Any) -> bool:
    return isinstance(node, dict) and "_target_" in node


def _check_kind(what: str, node: Node, made: type, kind: type) -> None:
    """Check that a node makes an object of a kind.

    Raises:
        ConfigError: the node makes an object of another kind.
    """
    if not issubclass(made, kind):
        name = "torch.nn.Module" if kind is nn.Module else kind.__name__
        raise ConfigError(
            f"{what}: {node['_target_']} must make a {name}, it makes a {made.__name__}"
        )


# --- Data ----------------------------------------------------------------------------------------


def make_data(settings: Settings) -> pl.LightningDataModule:
    """The images that `data` describes.

    Raises:
        ConfigError: there are no such images, or losswatch has no such setting.
    """
    if settings.is_ours:
        known = inspect.signature(_target("data", settings.data)).parameters
        for key in _arguments(settings.data):
            if key not in known:
                raise ConfigError(f"unknown setting data.{key}; data has {', '.join(known)}")
    return _instantiate("data", settings.data, pl.LightningDataModule)


def make_unlabelled(settings: Settings, form: Form) -> UnlabelledImages:
    """The images without labels that `data` describes, for a network trained on data of this form.

    Raises:
        ConfigError: there are no such images.
    """
    data = settings.data
    try:
        return UnlabelledImages(
            data["root"], form, data["normalize"], data["patch_size"], data["batch_size"]
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


# --- Network, losses, optimiser ------------------------------------------------------------------


def make_net(plan: Plan) -> nn.Module:
    """The network, with weights drawn from the run's seed.

    Raises:
        ConfigError: the network cannot be made.
    """
    with isolate_rng():
        seed_everything(plan.settings.seed)
        return _instantiate("model", plan.filled(plan.settings.model))


def make_losses(plan: Plan) -> LossSet:
    """The watched losses; the trained one is among them.

    A loss that draws random numbers in its constructor draws the same ones in all runs, so that the
    runs of a stack can share the loss.

    Raises:
        ConfigError: a loss cannot be made.
    """
    made = {}
    with isolate_rng():
        seed_everything(0)
        for name, node in plan.settings.losses.items():
            node = plan.filled(node)
            if plan.form.has_ignored:
                node = _with_ignored(f"loss {name}", node)
            loss = _instantiate(f"loss {name}", node)
            if plan.form.target == "multilabel" and input_kind(loss) == "softmax":
                loss = of_each_channel(loss)
            made[name] = loss
    return LossSet(made)


def _with_ignored(what: str, node: Any) -> Any:
    """The node of a loss; each part of it that is losswatch's own ignores `IGNORED`."""
    if isinstance(node, list):
        return [_with_ignored(f"{what}[{i}]", part) for i, part in enumerate(node)]
    if not isinstance(node, dict):
        return node
    found = {key: _with_ignored(f"{what}.{key}", value) for key, value in node.items()}
    if "_target_" in node and _can_ignore(_target(what, node)):
        found = {"ignore_index": IGNORED} | found
    return found


def _can_ignore(target: Any) -> bool:
    """Whether a target makes a loss of losswatch, or of a subclass, that takes `ignore_index`."""
    if not (inspect.isclass(target) and issubclass(target, Dice | CrossEntropy | Sum)):
        return target is load_loss
    for base in target.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters
            kinds = {parameter.kind for parameter in parameters.values()}
            # A constructor with **kwargs passes them on, so the next one decides.
            if "ignore_index" in parameters or inspect.Parameter.VAR_KEYWORD not in kinds:
                return "ignore_index" in parameters
    return False


def make_optimizer(settings: Settings) -> Callable[..., torch.optim.Optimizer]:
    """A function that makes the optimiser from parameters.

    Raises:
        ConfigError: the optimiser's `_target_` or the type of a value is wrong.
    """
    _check_targets("optimizer", settings.optimizer)
    return hydra.utils.instantiate(settings.optimizer, _partial_=True, _convert_="all")


def make_scheduler(
    settings: Settings,
) -> Callable[[torch.optim.Optimizer], dict[str, Any]] | None:
    """A function that makes Lightning's config of a scheduler from an optimiser.

    None if the learning rate is constant.

    Raises:
        ConfigError: the scheduler's `_target_` or the type of a value is wrong.
    """
    if not settings.scheduler:
        return None
    _check_targets("scheduler", settings.scheduler)
    make = hydra.utils.instantiate(settings.scheduler, _partial_=True, _convert_="all")

    def scheduler(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        made = make(optimizer)
        # The module steps a plateau at each validation, so Lightning must never step it.
        frequency = sys.maxsize if isinstance(made, ReduceLROnPlateau) else 1
        about = {"interval": "step", "frequency": frequency, "monitor": settings.metric}
        return {"scheduler": made} | about

    return scheduler


# --- Around the training -------------------------------------------------------------------------


def make_loggers(plan: Plan) -> list[Logger]:
    """The loggers of `logger` beside the event file.

    Raises:
        ConfigError: a logger cannot be made.
    """
    return [
        _instantiate(what, plan.filled(node), Logger)
        for what, node in _nodes(plan.settings, "logger")
    ]


def check_loggers(plan: Plan) -> None:
    """Check that `make_loggers` can make the loggers, without making them.

    Some loggers begin a remote run when they are made.

    Raises:
        ConfigError: a logger cannot be made.
    """
    for what, node in _nodes(plan.settings, "logger"):
        node = plan.filled(node)
        _check_targets(what, node)
        target = _target(what, node)
        check_call(what, target, node.get("_args_", []), _arguments(node))
        if inspect.isclass(target):
            _check_kind(what, node, target, Logger)
            if missing := compat.why_not_installed(target):
                raise ConfigError(f"{what}: {missing}")


def make_callbacks(plan: Plan, folder: Path | None = None) -> list[pl.Callback]:
    """The callbacks of `callbacks`.

    Args:
        folder: stands in for the folder of the run.

    Raises:
        ConfigError: a callback cannot be made, or waits for the end of an epoch.
    """
    made = []
    for what, node in _nodes(plan.settings, "callbacks"):
        if "every_n_epochs" in node:
            raise ConfigError(
                f"{what}.every_n_epochs has no use: a training is one epoch here, with a "
                "validation every trainer.val_check_interval steps"
            )
        made.append(_instantiate(what, plan.filled(node, folder), pl.Callback))
    return made


def _nodes(settings: Settings, group: str) -> Iterator[tuple[str, Node]]:
    """The chosen nodes of a group, each with its dotted key.

    Raises:
        ConfigError: a node has no `_target_`.
    """
    for name, node in settings.chosen(group).items():
        if not _has_target(node):
            raise ConfigError(f"{group}.{name} needs a _target_, the class that makes it")
        yield f"{group}.{name}", node
