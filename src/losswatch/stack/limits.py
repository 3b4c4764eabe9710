"""Checks that runs can be trained as a stack."""

from __future__ import annotations

from collections.abc import Sequence

from losswatch.losses import LossSet
from losswatch.run.plan import Plan
from losswatch.stack.member import Member
from losswatch.stack.refusal import NotStackable

# Options of Lightning's Trainer that a stack does not support, and the value that changes nothing.
_NEEDED = {
    "precision": "32-true",
    "gradient_clip_val": None,
    "accumulate_grad_batches": 1,
    "devices": 1,
    "num_nodes": 1,
    "max_time": None,  # is a limit for one run
    "profiler": None,
}


def check_plan(plan: Plan) -> None:
    """Check that a run asks for nothing that a stack does not support.

    Raises:
        NotStackable: a setting needs the ordinary step.
    """
    settings = plan.settings
    for key, value in _NEEDED.items():
        given = plan.options.get(key, value)
        if str(given) not in (str(value), "32"):
            raise NotStackable(f"trainer.{key}={given} needs the ordinary step")
    if not settings.is_random:
        raise NotStackable("images that are read from files need the ordinary step")
    if batches := settings.data["batches"]:
        raise NotStackable(f"data.batches={batches} needs the ordinary step")
    if settings.scheduler:
        raise NotStackable("a scheduler needs the ordinary step")
    for group in ("logger", "callbacks"):
        for name in settings.chosen(group):
            raise NotStackable(f"{group}={name} needs the ordinary step")


def check_traits(members: Sequence[Member], losses: LossSet) -> None:
    """Check that network and losses are pure functions of what is stacked.

    Raises:
        NotStackable: the network or a loss is not; the message says why.
    """
    net = members[0].net
    named = list(net.named_parameters(remove_duplicate=False))
    if len(named) > len(list(net.parameters())):
        raise NotStackable("the network shares a parameter between layers")
    if any(p.is_complex() for p in net.parameters()):
        raise NotStackable("the network has complex parameters")
    for name in {member.trained for member in members}:
        if any(True for _ in losses.losses[losses.names.index(name)].parameters()):
            raise NotStackable(f"loss {name} has parameters of its own to train")
    for member in members:
        for name in member.traits.draws_random:
            raise NotStackable(f"{_display_name(name)} draws random numbers")
        for name in member.traits.keeps_state:
            raise NotStackable(f"{_display_name(name)} keeps a state of its own")


def _display_name(name: str) -> str:
    return "the network" if name == "model" else f"loss {name}"
