"""What a checkpoint holds. This is the one place that knows its keys.

A checkpoint is Lightning's, of a `SegmentationModule`. Under "losswatch" it also holds the run's
config, the size of each of its event files at that step, the metrics of a validation at that step,
and, of an ordinary run, the form of its data and the state of the random generators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from losswatch.config.errors import ConfigError
from losswatch.config.ranges import FOLDER
from losswatch.config.settings import flatten
from losswatch.data.coding import check_classes
from losswatch.data.form import NORMALISATIONS, TARGETS, Form
from losswatch.data.labels import is_colour
from losswatch.data.volumes import is_orientation
from losswatch.losses import LossSet
from losswatch.text import shortened

Content = dict[str, Any]

_RECORD = "losswatch"
_NET, _LOSSES, _LOSS = "net.", "losses.", "loss."  # attributes of `SegmentationModule`

# --- Writing -------------------------------------------------------------------------------------


def add_record(
    content: Content,
    config: dict[str, Any],
    events: dict[str, int],
    data: dict[str, Any] | None = None,
    random: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
) -> None:
    """Put into a checkpoint what resuming needs.

    Args:
        content: of the checkpoint.
        config: the run's, as plain data.
        events: bytes of each of its event files by name.
        data: what `data_of` needs, as plain data.
        random: `randomness.get_state`.
        metrics: of the validation of these weights; None if there was none.
    """
    record = {
        "config": config, "events": events, "data": data, "random": random, "metrics": metrics,
    }  # fmt: skip
    content[_RECORD] = {key: value for key, value in record.items() if value is not None}
    # A run that is resumed has all of its time again.
    states = content.get("callbacks", {})
    content["callbacks"] = {name: s for name, s in states.items() if not name.startswith("Timer")}


def as_of_lightning(
    net: nn.Module,
    losses: LossSet,
    trained: str,
    optimizer: torch.optim.Optimizer,
    step: int,
    loops: dict[str, Any],
) -> Content:
    """What Lightning would save of a run at a step: a stack's members are no modules of Lightning.

    Args:
        net, losses, trained, optimizer: the run's, in their state at that step.
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


def check_types(content: Content) -> None:
    """See that a checkpoint holds what is used of it. Another program's has no record of ours.

    Raises:
        Exception: it does not, with the reason in its text.
    """
    weights, step = content["state_dict"], content["global_step"]
    states = content.get("optimizer_states", [])
    record = content.get(_RECORD, {"config": {}, "events": {}})
    for key, is_right in {
        "global_step": _is_count(step),
        "state_dict": all(
            isinstance(t, Tensor)
            for name, t in weights.items()
            if name.startswith((_NET, _LOSS))
        ),
        "optimizer_states": isinstance(states, list) and all(isinstance(s, dict) for s in states),
        _RECORD: (
            isinstance(record["config"], dict)
            and is_plain(record["config"])
            and all(isinstance(n, str) and _is_count(b) for n, b in record["events"].items())
            and all(isinstance(value, float) for value in record.get("metrics", {}).values())
        ),
    }.items():  # fmt: skip
        if not is_right:
            raise ValueError(f"its {key} is of another type")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def is_plain(tree: Any, deepest: int = 20) -> bool:
    """Whether a tree holds only what the config or the result of a run can hold."""
    if isinstance(tree, dict | list):
        below = [*tree, *tree.values()] if isinstance(tree, dict) else tree
        return deepest > 0 and all(is_plain(value, deepest - 1) for value in below)
    if isinstance(tree, int):
        return abs(tree) < 2**64
    return tree is None or isinstance(tree, float | str)


def step_of(content: Content) -> int:
    """The number of steps done; 0 for no checkpoint."""
    return content.get("global_step", 0)


def config_of(content: Content) -> dict[str, Any]:
    """The config of the run that wrote the checkpoint; empty in one of another program."""
    return content.get(_RECORD, {}).get("config", {})


def events_of(content: Content) -> dict[str, int]:
    """The run's event files by name, and their sizes then."""
    return content.get(_RECORD, {}).get("events", {})


def random_of(content: Content) -> dict[str, Any] | None:
    """The state of the random generators; the checkpoints of a stack hold none."""
    return content.get(_RECORD, {}).get("random")


def metrics_of(content: Content) -> dict[str, float]:
    """The metrics of the validation of these weights; empty if there was none."""
    return content.get(_RECORD, {}).get("metrics", {})


def data_of(content: Content) -> tuple[Form, list[int | str]]:
    """The form of the data that a network was trained on, and the value in a mask of each class.

    The values are as of `coding.values_of`.

    Raises:
        ConfigError: the checkpoint holds no such thing, or something else.
    """
    record = content.get(_RECORD, {}).get("data")
    try:
        if not is_plain(record):
            raise TypeError
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
            "checkpoint: it does not say what classes it knows; mode=predict needs one of a run "
            "with data=folder"
        ) from None
    return form, values


def to_keep(content: Content) -> dict[str, Any]:
    """What a test of a checkpoint's network takes over from its config, by dotted key.

    Only numbers are taken, so that nothing in a file is ever imported or called; and of data=folder
    the settings in `_WORDS`, if they are what is allowed there.
    """
    config = config_of(content)
    kept = {}
    for key, value in flatten(config):
        numbers = value if isinstance(value, list) else [value]
        is_theirs = key.split(".")[0] in ("theta", "seed", "data", "model")
        if is_theirs and all(isinstance(n, int | float) for n in numbers):
            kept[key] = value
    for group in ("data", "model"):
        kept[f"{group}._target_"] = (config.get(group) or {}).get("_target_")
    if kept["data._target_"] == FOLDER:
        kept |= {
            f"data.{name}": config["data"].get(name)
            for name, is_allowed in _WORDS.items()
            if is_allowed(config["data"].get(name))
        }
        axes = (content[_RECORD].get("data") or {}).get("axes")
        if is_orientation(axes):  # which the network has seen
            kept["data.axes"] = axes
    return kept


def _are_classes(value: Any) -> bool:
    try:
        return bool(check_classes(value, overlap=True)) and "$" not in str(value)
    except ValueError:
        return False


# Settings of data=folder that are no numbers and that a test needs as they were in the training.
_WORDS: dict[str, Callable[[Any], bool]] = {
    "normalize": NORMALISATIONS.__contains__,
    "target": TARGETS.__contains__,
    "classes": _are_classes,
    "ignore_index": is_colour,
}


def load_net(net: nn.Module, content: Mapping[str, Any]) -> None:
    """Load the network's weights.

    Raises:
        ConfigError: they are of another network; names the first that differs, and both shapes.
    """
    state = _part(content, _NET)
    expected = net.state_dict()
    for name in expected | state:
        here, there = (tuple(s[name].shape) if name in s else "absent" for s in (expected, state))
        if here != there:
            settings = ", ".join(
                f"{shortened(key.removeprefix('model.'))}={shortened(value)}"
                for key, value in flatten(config_of(dict(content)))
                if key.startswith("model.")
            )
            raise ConfigError(
                f"checkpoint: {shortened(name)} is {there} there and {here} in this model; it was "
                f"trained with {settings or 'another'}"
            )
    net.load_state_dict(state)


def load_loss(loss: nn.Module, content: Content) -> None:
    """Load what the trained loss has learnt, if the checkpoint is of a loss like this one."""
    state = _part(content, _LOSS)
    shapes = {n: t.shape for n, t in state.items()}
    if shapes == {n: t.shape for n, t in loss.state_dict().items()}:
        loss.load_state_dict(state)


def load_optimizer(optimizer: torch.optim.Optimizer, content: Content) -> None:
    """Load the optimiser's moments and numbers."""
    optimizer.load_state_dict(content["optimizer_states"][0])


def _part(content: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    state = content["state_dict"]
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
