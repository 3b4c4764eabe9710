"""The schema of conf/config.yaml: the type of each setting, and the resolvers that its files use.

Only conf/ says what each setting means, and its default. This file imports nothing slow (no torch),
so `train.py --help` and a misspelt key get their answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import MISSING, OmegaConf

from losswatch.config import names


@dataclass
class Probe:
    every_n_steps: int = MISSING
    cosines: bool = MISSING


@dataclass
class Config:
    theta: Any = None  # for data=random only
    seed: int = MISSING
    watch: list[Any] = MISSING
    metric: str = MISSING
    tags: list[str] = field(default_factory=list)
    threads: Any = MISSING  # a whole number or auto
    compile: bool = MISSING
    mode: str = MISSING
    resume: str | None = None
    checkpoint: str | None = None
    loss: dict[str, Any] = MISSING
    model: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    data: Any = MISSING
    scheduler: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    probe: Probe = MISSING
    trainer: dict[str, Any] = MISSING


@dataclass
class Grid:
    _target_: str = "hydra_plugins.losswatch_plugins.checked_sweeper.CheckedSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = None


def use_checked_sweeper() -> None:
    """Make `hydra/sweeper=basic`, the default, the sweeper that checks all runs first.

    Our sweeper replaces Hydra's own of that name. If it had another name, conf/config.yaml would
    choose it, and an experiment such as conf/experiment/optuna.yaml could not choose another one.
    """
    Plugins.instance()  # this stores Hydra's own, so ours must come after it
    ConfigStore.instance().store(group="hydra/sweeper", name="basic", node=Grid)


def register() -> None:
    """Make the schema and the resolvers of conf/config.yaml known to Hydra."""
    ConfigStore.instance().store(name="schema", node=Config)
    # `use_cache` keeps the names in the config. Hydra sends the config to the processes of a
    # launcher, so all of them write to the folder of the same sweep.
    for name, function, is_kept in (
        ("sweep_name", names.sweep_name, True),
        ("run_folder", names.run_folder, True),
        ("run_name", names.run_name, False),
        ("output_subdir", names.output_subdir, False),
        ("mode_of", mode_of, False),
    ):
        OmegaConf.register_new_resolver(name, function, use_cache=is_kept, replace=True)


def mode_of(metric: str) -> str:
    """ "max" if a larger value of a metric is better, "min" if a smaller one is.

    >>> mode_of("val/dice"), mode_of("val/loss/cce")
    ('max', 'min')
    """
    return "min" if metric.startswith("val/loss/") else "max"
