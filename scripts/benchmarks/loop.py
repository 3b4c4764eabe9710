"""A training step with `Watch` and its hooks, but without the rest of Lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import Precision
from torch import nn

from benchmarks.timing import Job
from losswatch import LossSet, Watch


def watched_step(
    module: pl.LightningModule,
    losses: LossSet | Mapping[str, nn.Module],
    criterion: str,
    optimizer: torch.optim.Optimizer,
    batch: Callable[[], Any],
    every: int,
    diagnose: bool = False,
    precision: Precision | None = None,
) -> Job:
    """A job that makes one step of a module on a new batch, and observes each `every`-th step.

    Args:
        precision: the plugin with which Lightning would train; float32 if None.
    """
    plugin = precision or Precision()
    watch = Watch(losses, criterion, every_n_steps=every, strict=True, diagnose=diagnose)
    trainer: Any = SimpleNamespace(
        global_step=0, accumulate_grad_batches=1, world_size=1, loggers=[],
        fit_loop=SimpleNamespace(_should_accumulate=lambda: False), is_global_zero=True,
        precision=plugin.precision, precision_plugin=plugin, lightning_module=module,
        callbacks=[watch],
    )  # fmt: skip
    watch.on_fit_start(trainer, module)

    def step() -> None:
        watch.on_train_batch_start(trainer)
        with plugin.forward_context():
            loss: Any = module.training_step(batch(), 0)
        optimizer.zero_grad()
        watch.on_before_backward(trainer, module, loss)
        loss.backward()
        watch.on_after_backward(trainer, module)
        optimizer.step()
        trainer.global_step += 1

    return step
