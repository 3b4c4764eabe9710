"""Splits a sweep into parts, each for one process: stacks and single runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from losswatch.config.errors import ConfigError
from losswatch.stack.limits import check_plan
from losswatch.stack.refusal import NotStackable
from losswatch.sweep.groups import group_runs, order_groups
from losswatch.sweep.jobs import Run
from losswatch.sweep.parts import Part
from losswatch.terminal import say
from losswatch.text import number_of

# Floating-point operations of a layer in a forward pass of a batch, from which on a stack is slower
# on a CPU (`python scripts/benchmark.py stack`). That of the default U-Net has 7.5 million.
LARGE_LAYER = 10e6


@dataclass(frozen=True)
class Options:
    """The launcher's config; src/hydra_plugins/losswatch_plugins/launchers.py explains each."""

    stack: str
    max_members: int | None
    workers: int | None
    outer: Any

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: a setting of the launcher has a value that is not allowed.
        """
        if self.stack not in ("faster", "all"):
            raise ConfigError(f"hydra.launcher.stack must be faster or all, got {self.stack}")
        for key in ("max_members", "workers"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"hydra.launcher.{key} must be at least 1, or null, got {value}")


def make_parts(runs: Sequence[Run], at_once: int, options: Options) -> tuple[list[Part], str]:
    """The runs of a sweep in parts, each for one process; and what is done and why, in words.

    Args:
        runs: those that are not done.
        at_once: how many processes train at the same time.
    """
    size = options.max_members or math.ceil(len(runs) / at_once)
    groups, differ = group_runs([run for run in runs if run.plan is not None])
    stacks: list[Part] = []
    singles = [run for run in runs if run.plan is None]  # of mode=test
    reasons = []
    for group in order_groups(groups):
        reason = _why_single(group, size, options)
        if reason is None:
            for part in split(group, size):
                if len(part) > 1 or options.stack == "all":
                    stacks.append(Part(part))
                else:
                    singles += part
        else:
            singles += group
            reasons.append(reason)
    singles.sort(key=lambda run: (-steps_of(run), run.index))  # a long run must not be the last
    what, notes = [], []
    if stacks:
        largest = max(len(part.runs) for part in stacks)
        what.append(f"{number_of(len(stacks), 'stack')} of up to {number_of(largest, 'run')}")
        if len(groups) - len(reasons) > 1:  # groups of stacks
            notes.append(f"they differ in {', '.join(differ)}")
        notes.append("a run by itself is rounded differently")
    if singles:
        what.append(number_of(len(singles), "single run"))
    text = f"{' and '.join(what)}, {min(at_once, len(stacks) + len(singles))} at once"
    if why := "; ".join(dict.fromkeys(filter(None, notes + reasons))):
        text += f" ({why})"
    return stacks + [Part([run], is_stack=False) for run in singles], text


def _why_single(group: Sequence[Run], size: int, options: Options) -> str | None:
    """Why the runs of a group are trained one by one; None if they become stacks of this size.

    The reason is empty if it needs no words: there are as many processes as runs.
    """
    plan = group[0].plan
    assert plan is not None and plan.traits is not None
    try:
        check_plan(plan)
    except NotStackable as error:
        return str(error)
    if options.stack == "all":
        return None
    if min(size, len(group)) == 1:
        return ""
    is_large = plan.traits.layer_flops > LARGE_LAYER
    if is_large and not plan.settings.compile and not uses_gpu([group[0].config]):
        return "layers of this size are not faster in a stack"
    return None


def split(runs: list[Run], size: int) -> list[list[Run]]:
    """The runs in order, in lists of at most `size`."""
    return [runs[i : i + size] for i in range(0, len(runs), size)]


def steps_of(run: Run) -> int:
    return run.config.trainer.max_steps


def say_what(text: str, done: int) -> None:
    say(f"training {text}" + (f"; {number_of(done, 'run')} done before" if done else ""))


def uses_gpu(configs: Sequence[DictConfig]) -> bool:
    """Whether runs are trained on a GPU. Unlike `is_available`, this allows a fork afterwards."""
    asked = (OmegaConf.select(config, "trainer.accelerator") != "cpu" for config in configs)
    return any(asked) and torch.cuda.device_count() > 0
