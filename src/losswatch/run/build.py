"""From a config to the objects of a run. Nothing here trains."""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from losswatch import compat
from losswatch.checks.arguments import check_arguments, check_call
from losswatch.config.schema import RANDOM, ConfigError, check_values, thresholds
from losswatch.config.settings import plain
from losswatch.data.folder import FolderImages, UnlabelledImages
from losswatch.data.form import IGNORED, Form
from losswatch.data.modules import batches_per_epoch, form_of
from losswatch.losses import CrossEntropy, Dice, LossSet, Sum
from losswatch.presets import load_loss
from losswatch.run.randomness import seed_everything
from losswatch.text import one_line
from losswatch.watch.outputs import form as reads
from losswatch.watch.outputs import of_each_channel


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
    values: Any = OmegaConf.to_container(node, resolve=True)
    given = {key: value for key, value in values.items() if not key.startswith("_")}
    check_arguments(what, _target(what, node), given)


def _target(what: str, node: DictConfig) -> Any:
    """The class or function that the `_target_` of a node names.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        return get_object(node._target_)
    except Exception as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{what}._target_={node._target_} cannot be imported: {why}") from error


def _has_target(node: Any) -> bool:
    return OmegaConf.is_dict(node) and "_target_" in node


def _instantiate(what: str, node: Any, kind: type = nn.Module, **kwargs: Any) -> Any:
    """hydra.utils.instantiate, with one line about the config for each of its errors.

    Raises:
        ConfigError: also if it makes anything but an object of this kind.
    """
    if not _has_target(node):
        raise ConfigError(f"{what} needs a _target_, the class or function that makes it")
    _check_target(what, node)
    try:
        made = hydra.utils.instantiate(node, _convert_="all", **kwargs)
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__  # what the constructor raised; its own causes say less
        why = " ".join(str(cause).split()) or type(cause).__name__
        raise ConfigError(f"{what}: {why}") from error
    _check_kind(what, node, type(made), kind)
    return made


def _check_kind(what: str, node: DictConfig, made: type, kind: type) -> None:
    """See that a node makes an object of a kind.

    Raises:
        ConfigError: it makes another one.
    """
    if not issubclass(made, kind):
        name = "torch.nn.Module" if kind is nn.Module else kind.__name__
        raise ConfigError(f"{what}: {node._target_} must make a {name}, it makes a {made.__name__}")


def make_losses(nodes: Mapping[str, DictConfig], form: Form) -> LossSet:
    """The losses that `presets.loss_nodes` describes, for data of this form.

    A loss that draws random numbers in its constructor draws the same ones in all runs, so that the
    runs of a stack may share it.
    """
    made = {}
    with isolate_rng():
        seed_everything(0)
        for name, node in nodes.items():
            if form.has_ignored:
                node = _with_ignored(f"loss {name}", node)
            loss = _instantiate(f"loss {name}", node)
            if form.target == "multilabel" and reads(loss) == "softmax":
                loss = of_each_channel(loss)
            made[name] = loss
    return LossSet(made)


def _with_ignored(what: str, node: Any) -> Any:
    """The config of a loss whose parts, as far as they are of losswatch, ignore `IGNORED`."""
    if OmegaConf.is_list(node):
        return [_with_ignored(f"{what}[{i}]", part) for i, part in enumerate(node)]
    if not OmegaConf.is_dict(node):
        return node
    found = {key: _with_ignored(f"{what}.{key}", value) for key, value in node.items()}
    if "_target_" in node and _can_ignore(_target(what, node)):
        found = {"ignore_index": IGNORED} | found
    return OmegaConf.create(found)


def _can_ignore(target: Any) -> bool:
    """Whether a target makes a loss of losswatch, or of a subclass, that takes `ignore_index`."""
    if not (inspect.isclass(target) and issubclass(target, Dice | CrossEntropy | Sum)):
        return target is load_loss
    for base in target.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters
            kinds = {parameter.kind for parameter in parameters.values()}
            # With **kwargs the next constructor decides, to which these go.
            if "ignore_index" in parameters or inspect.Parameter.VAR_KEYWORD not in kinds:
                return "ignore_index" in parameters
    return False


def make_net(cfg: DictConfig, form: Form) -> nn.Module:
    """The network for data of this form, its weights drawn from `cfg.seed`.

    It gets `in_channels`, `num_classes` (its output channels) and `dims`. The key `_arguments_` of
    its file maps these to other names, or to null where the network takes none of it.
    """
    sizes = {"in_channels": form.in_channels, "num_classes": form.channels, "dims": form.dims}
    node, given = _renamed(cfg.model, sizes)
    with isolate_rng():
        seed_everything(cfg.seed)
        return _instantiate("model", node, **given)


def _renamed(node: Any, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A node without its key `_arguments_`, and the arguments with the names that the key gives."""
    if not OmegaConf.is_dict(node):
        return node, dict(given)
    values: Any = OmegaConf.to_container(node, resolve=True)
    names = values.pop("_arguments_", {})
    renamed = {names.get(key, key): value for key, value in given.items()}
    renamed.pop(None, None)
    return OmegaConf.create(values), renamed


def chosen(cfg: DictConfig, group: str) -> dict[str, Any]:
    """The nodes of a group of which several can be chosen, by name."""
    return {str(name): node for name, node in cfg[group].items() if node is not None}


def _nodes(cfg: DictConfig, group: str) -> dict[str, DictConfig]:
    """The nodes that are `chosen`.

    Raises:
        ConfigError: one makes nothing.
    """
    nodes = chosen(cfg, group)
    for name, node in nodes.items():
        if not _has_target(node):
            raise ConfigError(f"{group}.{name} needs a _target_, the class that makes it")
    return nodes


def make_loggers(cfg: DictConfig, folder: Path) -> list[Logger]:
    """The loggers of `cfg.logger` beside the event file, for a run in `folder`.

    Each gets a folder in it as `save_dir`, unless its file says otherwise, and the run's name under
    the name that `_arguments_` gives.
    """
    return [
        _instantiate(what, node, Logger, **given)
        for what, node, given in _logger_nodes(cfg, folder)
    ]


def check_loggers(cfg: DictConfig) -> None:
    """See that `make_loggers` can make the loggers. None is made: some would begin a remote run.

    Raises:
        ConfigError: it cannot.
    """
    for what, node, given in _logger_nodes(cfg, Path("run")):
        _check_target(what, node)
        target, values = _target(what, node), OmegaConf.to_container(node, resolve=True)
        assert isinstance(values, dict)
        given |= {str(key): value for key, value in values.items() if str(key)[0] != "_"}
        check_call(what, target, values.get("_args_", []), given)
        if inspect.isclass(target):
            _check_kind(what, node, target, Logger)
            if missing := compat.why_not_installed(target):
                raise ConfigError(f"{what}: {missing}")


def _logger_nodes(cfg: DictConfig, folder: Path) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Of each logger how messages call it, its node, and what else it gets."""
    for name, node in _nodes(cfg, "logger").items():
        given = {} if "save_dir" in node else {"save_dir": str(folder / name)}
        if "run" in node.get("_arguments_", {}):
            given["run"] = folder.name
        yield f"logger.{name}", *_renamed(node, given)


def make_callbacks(cfg: DictConfig, folder: Path) -> list[pl.Callback]:
    """The callbacks of `cfg.callbacks`, for a run in `folder`.

    One whose `_arguments_` ask for the folder of checkpoints gets that of the run, unless its file
    names another one, which lies in the run's folder if it is relative.
    """
    made = []
    for name, node in _nodes(cfg, "callbacks").items():
        if "every_n_epochs" in node:
            raise ConfigError(
                f"callbacks.{name}.every_n_epochs has no use: a training is one epoch here, with a "
                "validation every trainer.val_check_interval steps"
            )
        given = {}
        if name_there := node.get("_arguments_", {}).get("checkpoints"):
            given["checkpoints"] = str(folder / (node.get(name_there) or "checkpoints"))
        node, given = _renamed(node, given)
        made.append(_instantiate(f"callbacks.{name}", node, pl.Callback, **given))
    return made


def make_scheduler(cfg: DictConfig) -> Callable[[torch.optim.Optimizer], dict[str, Any]] | None:
    """From an optimiser to Lightning's config of its scheduler; None for a constant rate.

    Raises:
        ConfigError: its `_target_` or the type of a value is wrong.
    """
    if not cfg.scheduler:
        return None
    _check_target("scheduler", cfg.scheduler)
    make = hydra.utils.instantiate(cfg.scheduler, _partial_=True, _convert_="all")

    def scheduler(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        made = make(optimizer)
        # The module steps a plateau at each validation, so Lightning must never do so.
        frequency = sys.maxsize if isinstance(made, ReduceLROnPlateau) else 1
        settings = {"interval": "step", "frequency": frequency, "monitor": cfg.metric}
        return {"scheduler": made} | settings

    return scheduler


def make_data(cfg: DictConfig) -> pl.LightningDataModule:
    """The images that `cfg.data` describes, with `cfg.theta` and `cfg.seed` where it takes them.

    Raises:
        ConfigError: there are no such images, or they have no θ.
    """
    node = cfg.data
    given: dict[str, Any] = {"seed": cfg.seed}
    if OmegaConf.is_dict(node) and node.get("_target_") == RANDOM:
        given["thresholds"] = thresholds(cfg.theta)
    elif cfg.theta is not None:
        raise ConfigError(f"theta={cfg.theta} belongs to data=random alone; remove it")
    if "_target_" in node:
        _check_target("data", node)
        taken = inspect.signature(get_object(node._target_)).parameters
        given = {key: v for key, v in given.items() if key in taken and key not in node}
    return _instantiate("data", node, pl.LightningDataModule, **given)


def make_unlabelled(cfg: DictConfig, form: Form) -> UnlabelledImages:
    """The images without labels that `cfg.data` describes, for a network trained on this form.

    Raises:
        ConfigError: there are no such images.
    """
    data = cfg.data
    try:
        return UnlabelledImages(data.root, form, data.normalize, data.patch_size, data.batch_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def describe_data(cfg: DictConfig) -> Form:
    """The form of the images that `cfg.data` describes. One look serves all runs of a sweep."""
    return _look(cfg, form_of)


def missing_classes(cfg: DictConfig) -> list[str]:
    """The classes of which no validation image has a pixel; only of data=folder it is known."""
    return _look(cfg, _missing)


def _missing(data: pl.LightningDataModule) -> list[str]:
    pairs = data.missing if isinstance(data, FolderImages) else []
    return [name for split, name in pairs if split == "val"]


def _look(cfg: DictConfig, function: Callable[[pl.LightningDataModule], Any]) -> Any:
    """What a function finds in the images that `cfg.data` describes.

    Raises:
        ConfigError: they cannot be trained with.
    """
    known = plain(cfg)
    key = repr((known["data"], known["theta"], function.__name__))
    if key not in _looks:
        data = make_data(cfg)
        try:
            _looks[key] = function(data)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        except Exception as error:  # of a module of the user's
            raise ConfigError(
                f"data: before training, without a trainer, its batches cannot be looked at: "
                f"{one_line(error)}"
            ) from error
    return _looks[key]


_looks: dict[str, Any] = {}  # what this process has found in the images


def set_length(cfg: DictConfig) -> None:
    """Set `cfg.trainer.max_steps` to the steps of `max_epochs`, if these are given.

    From then on `max_steps` alone says how long the training is.

    Raises:
        ConfigError: the data have no epochs, or a value of the config cannot work.
    """
    if (epochs := cfg.trainer.max_epochs) is None or cfg.mode != "train":
        return
    check_values(cfg)
    batches = _look(cfg, batches_per_epoch)
    if not batches:
        raise ConfigError(
            f"trainer.max_epochs={epochs} needs training batches that can be counted, which these "
            "data do not have; set trainer.max_steps"
        )
    cfg.trainer.max_steps = math.ceil(epochs * batches / cfg.trainer.accumulate_grad_batches)
    check_values(cfg)


def settled_config(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain data, with the steps of `max_epochs` (`set_length`); cfg stays as it is.

    Raises:
        ConfigError: as of `set_length`.
    """
    if cfg.trainer.max_epochs is not None:
        cfg = copy.deepcopy(cfg)  # Hydra writes this config to the folder as it was given
        set_length(cfg)
    return plain(cfg)


def make_optimizer(cfg: DictConfig) -> Callable[..., torch.optim.Optimizer]:
    """The function from parameters to an optimiser.

    Raises:
        ConfigError: its `_target_` or the type of a value is wrong.
    """
    _check_target("optimizer", cfg.optimizer)
    return hydra.utils.instantiate(cfg.optimizer, _partial_=True, _convert_="all")


def trainer_options(cfg: DictConfig) -> dict[str, Any]:
    """`cfg.trainer` after `set_length`, with a validation interval of at most its length."""
    options: dict[str, Any] = OmegaConf.to_container(cfg.trainer, resolve=True)  # type: ignore
    options.pop("max_epochs", None)
    options["val_check_interval"] = min(options["val_check_interval"], options["max_steps"])
    return options
