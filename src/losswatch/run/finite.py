"""Training ends at the first step that is not finite, with the name of what was NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor, nn


class Trained(Protocol):
    """What of a LightningModule is looked at."""

    net: nn.Module
    loss: nn.Module

    @property
    def trainer(self) -> pl.Trainer: ...


class FiniteCheck:
    """Checks a run's logits, loss and gradients.

    On a CPU it raises FloatingPointError in the very step. On a GPU a look at a number would wait
    for all work of the GPU, so the first bad step is kept in a tensor there, until `look`.

    Args:
        trained: the name of the trained loss.
    """

    def __init__(self, trained: str) -> None:
        self.trained = trained
        self.outputs: list[tuple[str, Tensor]] = []
        self.bad_step = torch.tensor(-1)  # the first step that was not finite

    def check_logits(self, module: Trained, logits: Tensor) -> None:
        """Check the logits of a step on a CPU before the loss gets them: many losses refuse NaN."""
        if logits.is_cpu and not logits.isfinite().all():
            self.outputs = [("the logits", logits)]
            self._stop(module, module.trainer.global_step)

    def see(self, logits: Tensor, value: Tensor) -> None:
        """Keep the outputs of a step until `forget`."""
        self.outputs = [("the logits", logits), (f"the loss {self.trained}", value)]

    def check_step(self, module: Trained, parameters: Iterable[Tensor]) -> None:
        """Check the loss and the gradients, before the optimiser uses them."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        bad = (norm + self.outputs[-1][1].detach()).isfinite().logical_not()
        before = self.bad_step.to(norm.device)
        self.bad_step = torch.where(bad & (before < 0), module.trainer.global_step, before)
        if norm.is_cpu:
            self.look(module)

    def look(self, module: Trained) -> None:
        """Raise FloatingPointError if any step so far was not finite."""
        if (step := int(self.bad_step)) >= 0:
            self._stop(module, step)

    def forget(self) -> None:
        """Drop the outputs of the step, and with them its graph."""
        self.outputs = []

    def _stop(self, module: Trained, step: int) -> None:
        """Name the first tensor that is not finite, in the order of the computation."""
        named = [*module.net.named_parameters(), *module.loss.named_parameters()]
        gradients = [(f"the gradient of {name}", p.grad) for name, p in reversed(named)]
        begin = f"trained with {self.trained}, step {step}:"
        for name, tensor in [*named, *self.outputs, *gradients]:
            if tensor is not None and not (finite := tensor.isfinite()).all():
                first = float(tensor.detach()[~finite][0])
                raise FloatingPointError(f"{begin} {name} is {first}")
        raise FloatingPointError(f"{begin} the loss or a gradient was not finite")
