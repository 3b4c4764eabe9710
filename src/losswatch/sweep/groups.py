"""Finds the runs of a sweep that can be trained together, as one stack (losswatch.stack)."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from typing import Any

from losswatch.config.ranges import thresholds
from losswatch.disk.resume import find_start
from losswatch.sweep.jobs import Run


def group_runs(runs: Sequence[Run]) -> tuple[list[list[Run]], list[str]]:
    """Groups of runs that can each be one stack, and the keys in which the groups differ.

    Groups are in the order of their first runs.
    """
    settings = [_common_settings(run) for run in runs]
    groups: dict[Hashable, list[Run]] = {}
    for run, common in zip(runs, settings, strict=True):
        groups.setdefault(_frozen(common), []).append(run)
    differ = []
    for name, value in settings[0].items() if settings else ():
        for key in value if isinstance(value, dict) else [None]:
            if len({_frozen(_value(common, name, key)) for common in settings}) > 1:
                differ.append(name if key is None else f"{name}.{key}")
    return list(groups.values()), differ


def order_groups(groups: Sequence[list[Run]]) -> list[list[Run]]:
    """The groups in the order in which to start them.

    Groups that differ only in the optimiser share the compiled step (losswatch.stack.step). They
    do not start together, so that the later one finds the step in the compiler's cache. The other
    groups start in reverse: a grid often names larger values last, and those take longer.
    """
    return sorted(reversed(groups), key=lambda group: group[0].config.optimizer._target_)


def _common_settings(run: Run) -> dict[str, Any]:
    """The settings that must be equal in all runs of a stack, by name."""
    settings = run.settings
    assert settings is not None
    config = settings.as_config()
    per_run = {"lr", "betas", "eps", "weight_decay", "momentum", "nesterov"}
    config["optimizer"] = {k: v for k, v in config["optimizer"].items() if k not in per_run}
    del config["seed"]
    of_run = ("low", "high", "noise", "theta_spread", "seed", "thresholds")
    config["data"] = {k: v for k, v in config["data"].items() if k not in of_run}
    if settings.theta is not None:
        config["theta"] = f"{len(thresholds(settings.theta)) + 1} classes"
    # A stack watches the losses of all its runs. If the command line has changed the trained loss,
    # it differs from the watched loss of the same name.
    loss = config.pop("loss")
    config["watched"] = sorted({*config.pop("watch"), settings.trained})
    config["changed loss"] = loss if settings.has_own_loss else None
    config["steps done"] = find_start(run.folder).step
    return config


def _value(settings: dict[str, Any], name: str, key: str | None) -> Any:
    """The setting `name`, or its value under `key`; None if it has no such key."""
    value = settings[name]
    if key is None:
        return value
    return value.get(key) if value else None


def _frozen(value: Any) -> Hashable:
    return json.dumps(value, sort_keys=True, default=str)
