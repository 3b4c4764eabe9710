"""The probe: the value and the gradient norm of each watched loss, at little cost.

All losses share one forward pass, and their gradients share most of the backward passes. A loss
sends its derivative by the logits back into the network, and these derivatives lie in a small space
(`LossSet.rows`): for two classes, four rows span those of cross entropy and of any number of Dice
variants. One backward pass for each row gives a matrix J [rows, parameters], and the gradient of
loss k is exactly `coefficients[k] @ J`.

One row, the pivot, needs no backward pass: training computes the gradient of the trained loss
anyway, and that gradient less the share of the other rows is the pivot's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import combinations
from typing import Any, Protocol, cast

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn

from losswatch import compat
from losswatch.events.encode import write_scalars
from losswatch.events.layout import GRAD_COSINE, GRAD_NORM, LOSS
from losswatch.losses import LossSet
from losswatch.watch.watcher import Watcher

log = logging.getLogger(__name__)


def tags(names: Sequence[str], cosines: bool) -> list[str]:
    """The scalars of one step, in the order of `observe`.

    >>> tags(["cce", "dice"], cosines=True)
    ['loss/cce', 'loss/dice', 'grad_norm/cce', 'grad_norm/dice', 'grad_cosine/cce~dice']
    """
    pairs = combinations(names, 2) if cosines else ()
    return [
        *(f"{LOSS}{name}" for name in names),
        *(f"{GRAD_NORM}{name}" for name in names),
        *(f"{GRAD_COSINE}{a}~{b}" for a, b in pairs),
    ]


def observe(values: Tensor, gradients: Tensor, cosines: bool) -> Tensor:
    """Values [K], norms of gradients [K, P], and the cosines of their pairs, as one vector.

    The cosine with a gradient that vanishes is NaN.
    """
    norms = torch.linalg.vector_norm(gradients, dim=1)
    parts = [values, norms]
    if cosines:
        unit = gradients / norms[:, None]
        a, b = torch.triu_indices(len(norms), len(norms), offset=1, device=norms.device)
        parts.append((unit @ unit.T)[a, b])
    return torch.cat(parts)


class Watchable(Protocol):
    """What the probe needs of a LightningModule."""

    net: nn.Module
    losses: LossSet
    trained: str
    watchers: list[Watcher]


class Probe(pl.Callback):
    """Observes each `every_n_steps`-th training step, before clipping, and never changes it.

    The norms are those of the gradient that the optimiser would get if that loss were the trained
    one: averaged over accumulated batches and over ranks. Observations stay on the device and are
    written to TensorBoard in blocks, and before each checkpoint.

    A callback for modules with `net`, `losses`, `trained` and `watchers` (`Watchable`), as
    `train.module.SegmentationModule`.

    Args:
        every_n_steps: at least 1.
        cosines: also observe the cosine between the gradients of each pair of losses.
    """

    BLOCK = 500  # observations between two writes

    def __init__(self, every_n_steps: int = 1, cosines: bool = False) -> None:
        self.every_n_steps, self.cosines = every_n_steps, cosines

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        watched = cast(Watchable, module)
        self.losses, self.trained = watched.losses, watched.trained
        if self not in watched.watchers:
            watched.watchers.append(self)
        self.outputs: tuple[Tensor, Tensor, Tensor] | None = None
        self.tags = tags(self.losses.names, self.cosines)
        self.block = torch.empty(self.BLOCK, len(self.tags), device=module.device)
        self.steps: list[int] = []
        self.warned: set[str] = set()
        self.parameters = [p for p in watched.net.parameters() if p.requires_grad]
        self.size = len(self._flat(self.parameters))
        # The trained gradient gives the pivot only where it is the plain gradient of this batch.
        self.reuse = (
            trainer.accumulate_grad_batches == 1
            and trainer.world_size == 1
            and trainer.precision != "16-mixed"
        )
        self.gradients = self.values = torch.zeros(())
        self.newest = torch.empty(0)

    def see(self, logits: Tensor, target: Tensor, value: Tensor) -> None:
        """Keep the outputs of a step until its backward pass begins (`watch.watcher.Watcher`)."""
        self.outputs = logits, target, value

    def on_before_backward(
        self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor
    ) -> None:
        assert self.outputs is not None
        logits, target, value = self.outputs
        self.outputs = None
        if trainer.global_step % self.every_n_steps:
            return
        known = {}
        # A loss that draws random numbers or keeps state would differ if it were called again.
        if self.losses.is_foreign(self.trained) and logits.dtype != torch.float16:
            slope = torch.autograd.grad(value, logits, retain_graph=True)[0]
            known[self.trained] = (value.detach(), slope)
        aside = isolate_rng() if self.losses.foreign else nullcontext()
        with trainer.precision_plugin.forward_context(), aside:  # as the trained loss is called
            values, rows, coefficients = self.losses.rows(logits, target, known)
        if logits.dtype == torch.float16:
            rows, coefficients = _scaled(rows, coefficients)
        self.pivot = self.losses.pivot(self.trained, logits.shape[1]) if self.reuse else None
        jacobian = coefficients.new_zeros(len(rows), self.size)
        for i, row in enumerate(rows):
            if i != self.pivot:
                jacobian[i] = self._flat(
                    torch.autograd.grad(
                        logits,
                        self.parameters,
                        row.to(logits.dtype),
                        retain_graph=True,
                        allow_unused=True,
                    )
                )
        self.jacobian, self.coefficients = jacobian, coefficients
        share = 1 / trainer.accumulate_grad_batches
        self.values = self.values + share * values
        if self.pivot is None:
            # Summed over accumulated batches, as the optimiser's gradient is.
            self.gradients = self.gradients + share * (coefficients @ jacobian)

    def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step % self.every_n_steps or compat.is_accumulating(trainer):
            return
        if self.pivot is not None:
            trained = self.coefficients[self.losses.names.index(self.trained)]
            gradient = self._flat([p.grad for p in self.parameters])
            rest = gradient.to(trained.dtype) - trained @ self.jacobian
            self.jacobian[self.pivot] = rest / trained[self.pivot]
            self.gradients = self.coefficients @ self.jacobian
        # A loss of a rank's own batch has a value on each rank; the optimiser follows their mean.
        self.values = trainer.strategy.reduce(self.values, reduce_op="mean")
        self.gradients = trainer.strategy.reduce(self.gradients, reduce_op="mean")
        self.newest = observe(self.values, self.gradients, self.cosines)
        self.block[len(self.steps)] = self.newest
        self.steps.append(trainer.global_step)
        self.gradients = self.values = self.jacobian = torch.zeros((), device=module.device)
        if len(self.steps) == self.BLOCK:
            self.flush(trainer)

    def _flat(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """One vector of all gradients; a complex number counts as its two parts."""
        parts = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(self.parameters, gradients, strict=True)
        ]
        real = [torch.view_as_real(g) if g.is_complex() else g for g in parts]
        return torch.cat([g.flatten() for g in real])

    def latest(self) -> dict[str, float]:
        """The values of the last observation, for the progress bar."""
        names = [tag for tag in self.tags if tag.startswith(LOSS)]
        return dict(zip(names, self.newest.tolist(), strict=False))

    def flush(self, trainer: pl.Trainer) -> None:
        """Write what was observed since the last time."""
        if not self.steps:
            return
        values = self.block[: len(self.steps)].cpu().numpy()
        for tag, column in zip(self.tags, values.T, strict=True):
            bad = [(s, v) for s, v in zip(self.steps, column, strict=True) if not abs(v) < 1e38]
            if bad and tag not in self.warned and not tag.startswith(GRAD_COSINE):
                self.warned.add(tag)
                log.warning("%s is %s at step %d", tag, bad[0][1], bad[0][0])
        if isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
            write_scalars(trainer.logger.experiment, self.tags, np.array(self.steps), values)
        self.steps = []

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.flush(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.flush(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.flush(trainer)

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        if hasattr(self, "steps"):
            self.flush(trainer)


def _scaled(rows: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a size that float16 holds, and the coefficients that make up for it.

    Sums over the pixels of a row would overflow there, or the row's numbers vanish. The factors are
    powers of two, which round nothing.
    """
    _, exponent = rows.abs().flatten(1).sum(1).frexp()
    scale = torch.exp2(10 - exponent)
    return rows * scale.view(-1, *[1] * (rows.ndim - 1)), coefficients / scale
