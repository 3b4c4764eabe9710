"""Which runs of a sweep can be trained together, as one stack (losswatch.stack)."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from typing import Any

from omegaconf import OmegaConf

from losswatch.config.loss_files import read_losses
from losswatch.config.schema import thresholds
from losswatch.disk.resume import find_start
from losswatch.sweep.jobs import Job


def group_jobs(jobs: Sequence[Job]) -> tuple[list[list[Job]], list[str]]:
    """The jobs in groups that can each be one stack, and the keys in which the groups differ.

    Groups are in the order of their first jobs.
    """
    settings = [_common_settings(job) for job in jobs]
    groups: dict[Hashable, list[Job]] = {}
    for job, common in zip(jobs, settings, strict=True):
        groups.setdefault(_frozen(common), []).append(job)
    differ = []
    for name, value in settings[0].items():
        for key in value if isinstance(value, dict) else [None]:
            if len({_frozen(_value(common, name, key)) for common in settings}) > 1:
                differ.append(name if key is None else f"{name}.{key}")
    return list(groups.values()), differ


def order_groups(groups: Sequence[list[Job]]) -> list[list[Job]]:
    """The groups in the order in which to start them, several at once.

    Groups that differ only in the optimiser share the compiled step (losswatch.stack.step). They
    start apart, so that the later one finds the step in the compiler's cache. Of the others the
    last one starts first: a grid often names its larger values last, which take longer.
    """
    return sorted(reversed(groups), key=lambda group: group[0].config.optimizer._target_)


def _common_settings(job: Job) -> dict[str, Any]:
    """What must be equal in all runs of a stack, by name."""
    config: Any = OmegaConf.to_container(job.task, resolve=True)
    per_run = {"lr", "betas", "eps", "weight_decay", "momentum", "nesterov"}
    config["optimizer"] = {k: v for k, v in config["optimizer"].items() if k not in per_run}
    del config["seed"]
    config["data"] = {k: v for k, v in config["data"].items() if k not in ("low", "high")}
    if config["theta"] is not None:
        config["theta"] = f"{len(thresholds(config['theta'])) + 1} classes"
    # A stack watches the losses of all its runs. A trained loss that the command line has changed
    # is another one than the watched loss of the same name.
    loss = config.pop("loss")
    config["watched"] = sorted({*config.pop("watch"), job.loss})
    unchanged = OmegaConf.to_container(read_losses([job.loss], job.task)[job.loss])
    config["changed loss"] = None if loss == unchanged else loss
    config["steps done"] = find_start(job.folder).step
    return config


def _value(settings: dict[str, Any], name: str, key: str | None) -> Any:
    """The setting `name`, or its value under `key`; None where that is absent."""
    value = settings[name]
    if key is None:
        return value
    return value.get(key) if value else None


def _frozen(value: Any) -> Hashable:
    return json.dumps(value, sort_keys=True, default=str)
