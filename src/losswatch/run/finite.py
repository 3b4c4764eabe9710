"""Ends training at the first step that is not finite; the error names what is NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor, nn


class Trained(Protocol):
    """The parts of a LightningModule that the check reads."""

    net: nn.Module
    loss: nn.Module

    @property
    def trainer(self) -> pl.Trainer: ...


class FiniteCheck:
    """Checks a run's logits, loss and gradients.

    On a CPU the check raises FloatingPointError at the very step. On a GPU, reading a number waits
    for all work of the GPU. So there a tensor keeps the first bad step until `raise_if_bad`.

    Args:
        trained: the name of the trained loss.
    """

    def __init__(self, trained: str) -> None:
        self.trained = trained
        self.outputs: list[tuple[str, Tensor]] = []
        self.bad_step = torch.tensor(-1)  # the first step that was not finite; -1 if none was

    def check_logits(self, module: Trained, logits: Tensor) -> None:
        """Check the logits on a CPU before the loss gets them, because many losses refuse NaN.

        Raises:
            FloatingPointError: the logits are not finite.
        """
        if logits.is_cpu and not logits.isfinite().all():
            self.outputs = [("the logits", logits)]
            self._raise(module, module.trainer.global_step)

    def keep_outputs(self, logits: Tensor, value: Tensor) -> None:
        """Keep the outputs of a step until `drop_outputs`."""
        self.outputs = [("the logits", logits), (f"the loss {self.trained}", value)]

    def check_step(self, module: Trained, parameters: Iterable[Tensor]) -> None:
        """Check the loss and the gradients, before the optimiser uses them.

        Raises:
            FloatingPointError: on a CPU, one of them is not finite.
        """
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        bad = (norm + self.outputs[-1][1].detach()).isfinite().logical_not()
        before = self.bad_step.to(norm.device)
        self.bad_step = torch.where(bad & (before < 0), module.trainer.global_step, before)
        if norm.is_cpu:
            self.raise_if_bad(module)

    def raise_if_bad(self, module: Trained) -> None:
        """Check all steps so far.

        Raises:
            FloatingPointError: a step was not finite.
        """
        if (step := int(self.bad_step)) >= 0:
            self._raise(module, step)

    def drop_outputs(self) -> None:
        """Drop the outputs of the step, and with them its graph."""
        self.outputs = []

    def _raise(self, module: Trained, step: int) -> None:
        """Name the first tensor that is not finite, in the order of the computation.

        Raises:
            FloatingPointError: always.
        """
        named = [*module.net.named_parameters(), *module.loss.named_parameters()]
        gradients = [(f"the gradient of {name}", p.grad) for name, p in reversed(named)]
        begin = f"trained with {self.trained}, step {step}:"
        for name, tensor in [*named, *self.outputs, *gradients]:
            if tensor is not None and not (finite := tensor.isfinite()).all():
                first = float(tensor.detach()[~finite][0])
                raise FloatingPointError(f"{begin} {name} is {first}")
        raise FloatingPointError(f"{begin} the loss or a gradient was not finite")
