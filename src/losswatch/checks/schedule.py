"""Checks that the scheduler of the learning rate can be made and lasts for the whole training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from losswatch.config.errors import ConfigError


def check_scheduler(
    make: Callable[[torch.optim.Optimizer], dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    steps: int,
) -> None:
    """Make a scheduler, and let it take a step.

    Args:
        make: makes Lightning's config of a scheduler from an optimiser.
        optimizer: has taken a step.
        steps: of the training.

    Raises:
        ConfigError: the scheduler cannot be made, or ends before the training.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the order of the two `step` calls
            scheduler = make(optimizer)["scheduler"]
            scheduler.step(*([0.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
    except Exception as error:
        raise ConfigError(f"scheduler: {' '.join(str(error).split())}") from error
    if isinstance(scheduler, OneCycleLR) and scheduler.total_steps < steps:
        raise ConfigError(
            f"scheduler.total_steps={scheduler.total_steps} ends before trainer.max_steps={steps}"
        )
