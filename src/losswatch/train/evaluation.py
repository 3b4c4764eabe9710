"""What evaluation computes: the confusion matrix, the losses' means, and the metrics from them.

An ordinary run and a stack both evaluate with these functions, a stack under torch.func.vmap.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor

from losswatch.losses import LossSet


class Tally(NamedTuple):
    """Sums over the images evaluated so far; a stack has a further first axis, its runs."""

    confusion: Tensor  # int64 [..., C, C], pixels by label and prediction
    losses: Tensor  # float64 [..., K], the sum of each batch's value times its pixels

    def plus(self, other: Tally) -> Tally:
        return Tally(self.confusion + other.confusion, self.losses + other.losses)


def tally(logits: Tensor, target: Tensor, losses: LossSet) -> Tally:
    """The sums over one batch.

    Args:
        logits: [N, C, *space].
        target: int64 [N, *space], with labels from 0 to C - 1.
        losses: the K losses to evaluate.
    """
    classes = logits.shape[1]
    # On a CPU argmax is ten times as slow as max, unless the classes come last in memory.
    pairs = (target * classes + logits.max(dim=1).indices).flatten()
    # torchmetrics and torch.bincount do not work under vmap.
    counts = pairs.new_zeros(classes**2).scatter_add(0, pairs, torch.ones_like(pairs))
    with isolate_rng() if losses.foreign else nullcontext():  # some draw random numbers
        values = losses(logits, target).double()
    if not target.numel():
        # The last batch may leave no image to some ranks. They call the losses all the same, since
        # those sum over ranks, but a loss may be NaN there.
        values = torch.zeros_like(values)
    return Tally(counts.view(classes, classes), values * target.numel())


def scores(confusion: Tensor) -> dict[str, Tensor]:
    """Pixel accuracy, and Dice and IoU of each class and on average, from confusion matrices.

    Args:
        confusion: [..., C, C], label by prediction. A class in neither counts as perfect.

    Returns:
        float32 [...] each: "accuracy", "dice", "dice/class_0", ..., "iou", "iou/class_0", ...

    >>> scores(torch.tensor([[3, 1], [0, 4]]))["dice/class_1"]
    tensor(0.8889)
    """
    hits = confusion.diagonal(dim1=-2, dim2=-1).double()
    both = (confusion.sum(-1) + confusion.sum(-2)).double()
    per_class = {
        "dice": torch.where(both > 0, 2 * hits / both, 1.0),
        "iou": torch.where(both > 0, hits / (both - hits), 1.0),
    }
    out = {"accuracy": hits.sum(-1) / confusion.sum((-1, -2))}
    for name, values in per_class.items():
        out[name] = values.mean(-1)
        out |= {f"{name}/class_{i}": values[..., i] for i in range(values.shape[-1])}
    return {name: value.float() for name, value in out.items()}


def metrics(total: Tally, names: Sequence[str]) -> dict[str, Tensor]:
    """`scores`, and "loss/<name>", the mean over pixels of each of the losses called `names`."""
    means = total.losses / total.confusion.sum((-1, -2)).unsqueeze(-1)
    found = {f"loss/{name}": means[..., k].float() for k, name in enumerate(names)}
    return scores(total.confusion) | found
