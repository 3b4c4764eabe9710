"""What a checkpoint holds. Only this file knows the keys.

Lightning makes the checkpoint of a `SegmentationModule`. Under "losswatch" it also holds the config
of the run, the size of each growing file at that step (growing_files.py), and the metrics of a
validation at that step. That of an ordinary run holds the form of the data and the state of the
random generators, too.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import get_object
from torch import Tensor, nn

from losswatch.config.errors import ConfigError
from losswatch.config.kept import Kept
from losswatch.config.ranges import FOLDER
from losswatch.config.settings import flatten_keys
from losswatch.data.coding import check_classes
from losswatch.data.form import NORMALISATIONS, TARGETS, Form
from losswatch.data.labels import is_colour
from losswatch.data.volumes import is_orientation
from losswatch.losses import LossSet
from losswatch.presets import load_loss
from losswatch.text import shortened

Checkpoint = dict[str, Any]

_RECORD = "losswatch"
_NET, _LOSSES, _LOSS = "net.", "losses.", "loss."  # attributes of `SegmentationModule`

# --- Writing -------------------------------------------------------------------------------------


def add_record(
    checkpoint: Checkpoint,
    run: dict[str, Any],
    sizes: dict[str, int],
    data: dict[str, Any] | None = None,
    random: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
) -> None:
    """Put into a checkpoint what resuming needs.

    Args:
        checkpoint: Lightning's; this function changes it.
        run: what it tells of its run (`Settings.as_record`).
        sizes: bytes of each file that grows, by name.
        data: what `data_of` needs, as plain data.
        random: `randomness.get_state`.
        metrics: of the validation of these weights; None if there was none.
    """
    record = run | {"sizes": sizes, "data": data, "random": random, "metrics": metrics}
    checkpoint[_RECORD] = {key: value for key, value in record.items() if value is not None}
    # A resumed run has its full time limit again.
    states = checkpoint.get("callbacks", {})
    checkpoint["callbacks"] = {
        name: s for name, s in states.items() if not name.startswith("Timer")
    }


def make_checkpoint(
    net: nn.Module,
    losses: LossSet,
    trained: str,
    optimizer: torch.optim.Optimizer,
    step: int,
    loops: dict[str, Any],
) -> Checkpoint:
    """The checkpoint that Lightning would make of a run. The runs of a stack have no Trainer.

    Args:
        net, losses, trained, optimizer: those of the run, in their state at that step.
        step: number of steps done.
        loops: `compat.loop_state(step)`.
    """
    loss = losses.losses[losses.names.index(trained)]
    parts = {_NET: net, _LOSSES: losses, _LOSS: loss}
    state = {f"{k}{n}": t.cpu() for k, part in parts.items() for n, t in part.state_dict().items()}
    return {
        "epoch": 0,
        "global_step": step,
        "pytorch-lightning_version": pl.__version__,
        "state_dict": state,
        "loops": {"fit_loop": loops},
        "callbacks": {},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
    }


# --- Reading -------------------------------------------------------------------------------------


def check_types(checkpoint: Checkpoint) -> None:
    """Check the parts of a checkpoint that are used. Another program's may lack our record.

    Raises:
        Exception: a part is missing or of another type; the text says which.
    """
    weights, step = checkpoint["state_dict"], checkpoint["global_step"]
    states = checkpoint.get("optimizer_states", [])
    record = checkpoint.get(_RECORD, {"config": {}})
    for key, is_right in {
        "global_step": type(step) is int and step >= 0,
        "state_dict": all(
            isinstance(t, Tensor)
            for name, t in weights.items()
            if name.startswith((_NET, _LOSS))
        ),
        "optimizer_states": isinstance(states, list) and all(isinstance(s, dict) for s in states),
        _RECORD: isinstance(record["config"], dict)
        and all(isinstance(value, float) for value in record.get("metrics", {}).values()),
    }.items():  # fmt: skip
        if not is_right:
            raise ValueError(f"its {key} is of another type")


def step_of(checkpoint: Checkpoint) -> int:
    """The number of steps done; 0 if the checkpoint is empty."""
    return checkpoint.get("global_step", 0)


def config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config of the run that wrote the checkpoint; empty if another program wrote it."""
    return checkpoint.get(_RECORD, {}).get("config", {})


def plain_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """The record without the state of the random generators; the rest is plain data."""
    record = checkpoint.get(_RECORD, {})
    return {key: value for key, value in record.items() if key != "random"}


def random_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The state of the random generators; None in the checkpoint of a stack's run."""
    return checkpoint.get(_RECORD, {}).get("random")


def metrics_of(checkpoint: Checkpoint) -> dict[str, float]:
    """The metrics of the validation of these weights; empty if there was none."""
    return checkpoint.get(_RECORD, {}).get("metrics", {})


def data_of(checkpoint: Checkpoint) -> tuple[Form, list[int | str]]:
    """The form of the data that a network was trained on, and the value of each class in a mask.

    For the values see `coding.values_of`.

    Raises:
        ConfigError: the checkpoint does not hold them.
    """
    record = checkpoint.get(_RECORD, {}).get("data")
    try:
        values = [value if is_colour(value) else int(value) for value in record["values"]]
        form = Form(
            in_channels=int(record["in_channels"]),
            classes=tuple(map(str, record["classes"])),
            dims=int(record["dims"]),
            target=str(record["target"]),
            has_ignored=bool(record["has_ignored"]),
            axes=str(record.get("axes", "")),
        )
    except (TypeError, KeyError, ValueError):
        raise ConfigError(
            "checkpoint: the file does not say what classes it knows; mode=predict needs one of a "
            "run with data=folder"
        ) from None
    return form, values


def to_keep(checkpoint: Checkpoint) -> Kept:
    """The settings that a test of a network takes from its checkpoint.

    Anybody may have written the file. So a `_target_` in it may name a module, and no other code,
    and a text may refer to `${form...}` and `${run...}` only.
    """
    record = checkpoint.get(_RECORD, {})
    config, values = config_of(checkpoint), {}
    theta, seed, watch = (config.get(key) for key in ("theta", "seed", "watch"))
    if _is_numbers(theta):
        values["theta"] = theta
    if isinstance(seed, int):
        values["seed"] = seed
    nodes = {g: node for g in ("model", "data") if isinstance(node := config.get(g), dict)}
    choices = {k: v for k, v in _mapping(record.get("choices")).items() if isinstance(v, str)}
    losses = {k: v for k, v in _mapping(record.get("losses")).items() if isinstance(v, dict)}
    is_watched = isinstance(watch, list) and all(name in [*losses] for name in watch)
    if choices.get("loss") in losses and is_watched:
        values["watch"] = watch
    else:
        losses = {}
    file = "give its file again, by --config-dir <folder> and"
    instead = {
        "model": f"{file} model={shortened(choices.get('model', '<name>'))}",
        "data": f"{file} data=<name>",
        "losses": f"{file} loss=<name> 'watch=[...]'",
    }
    refused = {
        what: f"checkpoint: its {what} {why}; {instead[what]}"
        for what, node in {**nodes, "losses": losses}.items()
        if (why := _refusal(node))
    }
    data = nodes.get("data", {})
    numbers = {key: value for key, value in flatten_keys(nodes) if _is_numbers(value)}
    words = {}
    if data.get("_target_") == FOLDER:
        words = {
            f"data.{name}": data.get(name)
            for name, is_allowed in _WORDS.items()
            if is_allowed(data.get(name))
        }
        axes = _mapping(record.get("data")).get("axes")
        if is_orientation(axes):  # the network was trained on volumes in this orientation
            words["data.axes"] = axes
            nodes["data"] = data | {"axes": axes}
    return Kept(values, nodes, losses, choices, numbers, words, refused)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_numbers(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return all(isinstance(number, int | float) for number in numbers)


def _refusal(node: Any) -> str | None:
    """Why a node of a file may not be used; None if it may."""
    if isinstance(node, str) and "${" in re.sub(r"\$\{(form|run)\.\w+\}", "", node):
        return f"refers to {shortened(node)}"
    if isinstance(node, list):
        return next(filter(None, map(_refusal, node)), None)
    if not isinstance(node, dict):
        return None
    if "_target_" in node and not _makes_module(node["_target_"]):
        return f"is made by {shortened(node['_target_'])}, which is not a class of modules"
    return _refusal([*node.values()])


def _makes_module(target: Any) -> bool:
    """Whether a target is a class of networks, losses or data modules, or cannot be imported.

    What cannot be imported is refused later, as in any config. A function may do anything, even if
    its annotation promises a module: `torch.fx.graph_module.reduce_graph_module` runs any text as
    code.
    """
    try:
        found = get_object(target)
    except Exception:
        return True
    is_module = inspect.isclass(found) and issubclass(found, nn.Module | pl.LightningDataModule)
    return is_module or found is torch.tensor or found is load_loss


def _are_classes(value: Any) -> bool:
    try:
        return bool(check_classes(value, overlap=True)) and "$" not in str(value)
    except ValueError:
        return False


# Settings of data=folder that are text, and that a test must have as the training had them.
_WORDS: dict[str, Callable[[Any], bool]] = {
    "normalize": NORMALISATIONS.__contains__,
    "target": TARGETS.__contains__,
    "classes": _are_classes,
    "ignore_index": is_colour,
}


def load_net(net: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Load the network's weights.

    Raises:
        ConfigError: the weights are those of another network; the message names the first one that
            differs, and both shapes.
    """
    state = _part(checkpoint, _NET)
    expected = net.state_dict()
    for name in expected | state:
        here, there = (tuple(s[name].shape) if name in s else "absent" for s in (expected, state))
        if here != there:
            settings = ", ".join(
                f"{shortened(key.removeprefix('model.'))}={shortened(value)}"
                for key, value in flatten_keys(config_of(dict(checkpoint)))
                if key.startswith("model.") and "${form." not in str(value)
            )
            raise ConfigError(
                f"checkpoint: {shortened(name)} is {there} there and {here} in this model; it was "
                f"trained with {settings or 'another'}"
            )
    net.load_state_dict(state)


def load_loss_state(loss: nn.Module, checkpoint: Checkpoint) -> None:
    """Load what the trained loss has learnt, if the checkpoint holds a loss of the same shapes."""
    state = _part(checkpoint, _LOSS)
    shapes = {n: t.shape for n, t in state.items()}
    if shapes == {n: t.shape for n, t in loss.state_dict().items()}:
        loss.load_state_dict(state)


def load_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Load the optimiser's moments and numbers."""
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])


def _part(checkpoint: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    state = checkpoint["state_dict"]
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
