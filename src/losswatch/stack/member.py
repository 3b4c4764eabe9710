"""One run of a stack, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from losswatch.checks.first_step import Traits
from losswatch.data.random import ThresholdedImages
from losswatch.disk.checkpoint import load_net, load_optimizer
from losswatch.disk.checkpoint_files import load_checkpoint
from losswatch.disk.event_log import EventLog, open_log
from losswatch.disk.resume import find_start
from losswatch.run.build import make_data, make_net, make_optimizer
from losswatch.run.plan import Plan
from losswatch.stack.flat_parameters import trained_parameters
from losswatch.stack.refusal import NotStackable


@dataclass
class Member:
    """One run of a stack."""

    folder: Path
    net: nn.Module  # holds the initial weights, and at the end the trained ones
    data: ThresholdedImages
    trained: str  # the name of the trained loss
    optimizer: torch.optim.Optimizer  # of `net`; holds settings and moments, and never steps
    logger: EventLog
    record: dict[str, Any]  # what its checkpoints tell of the run (`Settings.as_record`)
    traits: Traits  # what its first step showed
    start: int = 0  # steps done by an earlier attempt; net and optimizer then hold its state
    notice: str | None = None  # what of that attempt is damaged or missing
    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None  # why the run counts as failed
    seconds: float = 0.0  # its share of the stack's time

    def result(self) -> dict[str, float]:
        """The final metrics.

        Raises:
            FloatingPointError: something became NaN or infinite; the message says what and when.
        """
        if self.error:
            raise FloatingPointError(self.error)
        return self.metrics


@dataclass
class Failure:
    """A run that could not be trained in its stack."""

    error: Exception
    notice: str | None = None
    seconds: float = 0.0

    def result(self) -> dict[str, float]:
        """Raise the error of the run.

        Raises:
            Exception: always.
        """
        raise self.error


def make_member(plan: Plan) -> Member:
    """A run, in the state of its newest checkpoint if its folder holds one.

    Raises:
        NotStackable: the checkpoint is that of the last step.
    """
    settings, folder, net = plan.settings, plan.folder, make_net(plan)
    data = plan.data or make_data(settings)
    assert isinstance(data, ThresholdedImages)  # `limits.check_plan`
    assert plan.traits is not None  # the first step was tried
    optimizer = make_optimizer(settings)(list(trained_parameters(net).values()))
    start = find_start(folder)
    if start.step >= plan.steps:
        raise NotStackable("no step is left, only the test")
    if start.path:
        checkpoint = load_checkpoint(start.path)
        load_net(net, checkpoint)
        load_optimizer(optimizer, checkpoint)
    return Member(
        folder=folder,
        net=net,
        data=data,
        trained=settings.trained,
        optimizer=optimizer,
        logger=open_log(settings, start.sizes),
        record=settings.as_record(),
        traits=plan.traits,
        start=start.step,
        notice=start.notice,
    )
