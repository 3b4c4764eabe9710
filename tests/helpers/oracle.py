"""The oracle: one `torch.autograd.grad` for each loss, in float64, without losswatch's probe."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor


def gradients(values: Iterable[Tensor], parameters: Iterable[Tensor]) -> Tensor:
    """Gradients [K, P] of K scalars by all parameters that are trained, as real numbers.

    They are zero where a scalar does not depend on a parameter. The graph is kept.
    """
    trained = [p for p in parameters if p.requires_grad]

    def flat(value: Tensor) -> Tensor:
        found = [None] * len(trained)
        if value.requires_grad:
            found = torch.autograd.grad(value, trained, retain_graph=True, allow_unused=True)
        parts = [
            torch.zeros_like(p) if g is None else g.to_dense()
            for p, g in zip(trained, found, strict=True)
        ]
        return torch.cat([
            (torch.view_as_real(g) if g.is_complex() else g).flatten() for g in parts
        ])  # fmt: skip

    return torch.stack([flat(value) for value in values])


class Truth(NamedTuple):
    """What an observation must have seen: values [K], norms [K], cosines [K, K]."""

    values: Tensor
    norms: Tensor
    cosines: Tensor

    def row(self) -> Tensor:
        """All numbers in the order of their tags: values, norms, cosines of pairs."""
        a, b = torch.triu_indices(*self.cosines.shape, 1)
        return torch.cat([self.values, self.norms, self.cosines[a, b]])


def truth(values: Sequence[Tensor] | Tensor, gradients: Tensor) -> Truth:
    """The truth of values [K] and gradients [K, P]."""
    norms = gradients.norm(dim=1)
    unit = gradients / norms[:, None]
    return Truth(torch.stack([v.detach() for v in values]), norms, unit @ unit.T)


def expected(losses: Iterable, output: Tensor, target: Tensor, parameters: Iterable) -> Truth:
    """The truth of losses of one output and target, both of any form."""
    values = [loss(output, target) for loss in losses]
    return truth(values, gradients(values, parameters))


class Oracle(pl.Callback):
    """The truth at each optimiser step of a run, from copies of its network and losses.

    It must stand before the probe. Accumulated batches are averaged.
    """

    def __init__(self):
        self.rows, self.parts = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        precision = trainer.precision_plugin.forward_context()  # makes new tensors float64
        with isolate_rng(), torch.enable_grad(), precision:
            self.parts.append(by_copies(module.net, module.losses.losses, *batch))
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            values, found = (torch.stack(part).mean(0) for part in zip(*self.parts, strict=True))
            self.rows.append(truth(values, found).row())
            self.parts = []

    def table(self) -> Tensor:
        """The rows [steps, tags]."""
        return torch.stack(self.rows)


def by_copies(net, losses, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Values [K] and gradients [K, P], from a copy of the network and of the loss for each loss."""
    state, values, found = torch.get_rng_state(), [], []
    for loss in losses:
        torch.set_rng_state(state)
        own, loss = copy.deepcopy((net, loss))
        with isolate_rng():
            value = loss(own(images), target)
        values.append(value.detach())
        found.append(gradients([value], own.parameters())[0])
    return torch.stack(values), torch.stack(found)
