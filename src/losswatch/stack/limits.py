"""What cannot be trained as a stack."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig

from losswatch.checks.first_step import try_step
from losswatch.config.schema import RANDOM
from losswatch.data.random import TRAIN
from losswatch.losses import LossSet
from losswatch.run.build import chosen, trainer_options
from losswatch.stack.member import Member
from losswatch.stack.refusal import NotStackable

# Options of Lightning's Trainer that a stack does not have, and the value that changes nothing.
_NEEDED = {
    "precision": "32-true",
    "gradient_clip_val": None,
    "accumulate_grad_batches": 1,
    "devices": 1,
    "num_nodes": 1,
    "max_time": None,  # a limit of each single run
    "profiler": None,
}


def check_options(trainer: Mapping[str, Any]) -> None:
    """See that runs with these options of the Trainer can be trained as a stack.

    Raises:
        NotStackable: they cannot.
    """
    for key, value in _NEEDED.items():
        given = trainer.get(key, value)
        if str(given) not in (str(value), "32"):
            raise NotStackable(f"trainer.{key}={given} needs the ordinary step")


def check_config(cfg: DictConfig) -> None:
    """See that a config asks for nothing that a stack does not have.

    Raises:
        NotStackable: it does.
    """
    check_options(trainer_options(cfg))
    if cfg.data.get("_target_") != RANDOM:
        raise NotStackable("images that are read from files need the ordinary step")
    if cfg.data.batches:
        raise NotStackable(f"data.batches={cfg.data.batches} needs the ordinary step")
    if cfg.scheduler:
        raise NotStackable("a scheduler needs the ordinary step")
    for group in ("logger", "callbacks"):
        for name in chosen(cfg, group):
            raise NotStackable(f"{group}={name} needs the ordinary step")


def check_traits(members: Sequence[Member], losses: LossSet) -> None:
    """See that network and losses are pure functions of what is stacked; try the ordinary step.

    Raises:
        NotStackable: they are not; says what is in the way.
        ConfigError: the ordinary step fails.
    """
    net, data = copy.deepcopy(members[0].net), members[0].data
    named = list(net.named_parameters(remove_duplicate=False))
    if len(named) > len(list(net.parameters())):
        raise NotStackable("the network shares a parameter between layers")
    if any(p.is_complex() for p in net.parameters()):
        raise NotStackable("the network has complex parameters")
    for name in {member.trained for member in members}:
        if any(True for _ in losses.losses[losses.names.index(name)].parameters()):
            raise NotStackable(f"loss {name} has parameters of its own to train")
    batch = data.draw(TRAIN, 0, data.batch_size)
    traits = try_step(net, losses, members[0].trained, torch.optim.SGD, batch, data.form)
    for name in traits.random:
        raise NotStackable(f"{_called(name)} draws random numbers")
    for name in traits.stateful:
        raise NotStackable(f"{_called(name)} keeps a state of its own")


def _called(name: str) -> str:
    return "the network" if name == "model" else f"loss {name}"
