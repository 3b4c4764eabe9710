"""What evaluation computes: metrics of the predictions, and the means of the losses.

Random images are counted as one image: there is one confusion matrix of all pixels. An ordinary run
and a stack both compute it with `tally`, the stack under torch.func.vmap. Real images are scored
one by one, as the field does, and the mean over images is taken (`ImageScores`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import SumMetric
from torchmetrics.segmentation import DiceScore, MeanIoU

from losswatch.data.form import IGNORED, Form
from losswatch.events.tags import PREDICTED
from losswatch.losses import LossSet
from losswatch.losses.pixels import one_hot
from losswatch.losses.ranks import only_this_rank


class Tally(NamedTuple):
    """Sums over the images evaluated so far. In a stack the first axis is that of the runs."""

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
    values = _values(losses, logits, target)
    if not target.numel():
        # The last batch may have no image for some ranks. They still call the losses, since losses
        # sum over ranks, but there a loss may be NaN.
        values = torch.zeros_like(values)
    return Tally(counts.view(classes, classes), values * target.numel())


def _values(losses: LossSet, logits: Tensor, target: Tensor) -> Tensor:
    """Values [K], float64."""
    with isolate_rng() if losses.foreign else nullcontext():  # some draw random numbers
        return losses(logits, target).double()


def scores(confusion: Tensor) -> dict[str, Tensor]:
    """Dice and IoU on average and of each class, accuracy and what is predicted, by confusion.

    Args:
        confusion: [..., C, C], label by prediction. A class that is in neither counts as perfect.

    Returns:
        float32 [...] each: "dice", "iou", "accuracy" (of pixels), "dice/class_0", ...,
        "iou/class_0", ..., and "predicted/class_0", ...: the share of pixels that are predicted as
        the class.

    >>> scores(torch.tensor([[3, 1], [0, 4]]))["dice/class_1"]
    tensor(0.8889)
    """
    hits = confusion.diagonal(dim1=-2, dim2=-1).double()
    both = (confusion.sum(-1) + confusion.sum(-2)).double()
    pixels = confusion.sum((-1, -2))
    per_class = {
        "dice": torch.where(both > 0, 2 * hits / both, 1.0),
        "iou": torch.where(both > 0, hits / (both - hits), 1.0),
        PREDICTED: confusion.sum(-2) / pixels.unsqueeze(-1),
    }
    out = {name: per_class[name].mean(-1) for name in ("dice", "iou")}
    out["accuracy"] = hits.sum(-1) / pixels
    for name, values in per_class.items():
        out |= {f"{name}/class_{i}": values[..., i] for i in range(values.shape[-1])}
    return {name: value.float() for name, value in out.items()}


def metrics(total: Tally, names: Sequence[str]) -> dict[str, Tensor]:
    """`scores`, and "loss/<name>", the mean over pixels of each of the losses called `names`."""
    means = total.losses / total.confusion.sum((-1, -2)).unsqueeze(-1)
    found = {f"loss/{name}": means[..., k].float() for k, name in enumerate(names)}
    return scores(total.confusion) | found


class PixelScores:
    """The scores of random images: all pixels count as those of one image.

    Args:
        names: of the losses to evaluate.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.total: Tally | None = None

    def add(self, logits: Tensor, target: Tensor, losses: LossSet) -> None:
        """Count a batch; for the arguments see `tally`."""
        found = tally(logits, target, losses)
        self.total = self.total.plus(found) if self.total else found

    def compute_and_reset(self, strategy: Strategy) -> dict[str, Tensor]:
        """`metrics` of what all ranks have counted; then the count starts again."""
        assert self.total is not None
        total = Tally(*(strategy.reduce(t, reduce_op="sum") for t in self.total))
        self.total = None
        return metrics(total, self.names)


class ImageScores(nn.Module):
    """The scores of real images: Dice and IoU of each image and class, averaged over images.

    If a class is neither in an image nor predicted there, the image does not count in the mean of
    the class. If it is only predicted there, it counts as 0, as in nnU-Net. Ignored pixels never
    count. The accuracy, and the share that is predicted as a class, are those of all pixels. A loss
    is the mean of its values, each weighted by the number of pixels of its image. So the scores do
    not depend on the number of devices.

    Args:
        form: of the data.
        names: of the losses to evaluate.
    """

    def __init__(self, form: Form, names: Sequence[str]) -> None:
        super().__init__()
        self.form, self.names, count = form, tuple(names), len(form.classes)
        self.dice = DiceScore(count, average="none")
        self.iou = MeanIoU(count, per_class=True)
        # Sums, because a MeanMetric that keeps NaN ignores weights (torchmetrics 1.9).
        sums = ("right", "pixels", *form.classes, *names)
        metrics = [SumMetric(nan_strategy="disable").set_dtype(torch.float64) for _ in sums]
        self.sums: Any = nn.ModuleList(metrics)

    def add(self, logits: Tensor, target: Tensor, losses: LossSet) -> None:
        """Count a batch.

        Args:
            logits: [N, C, *space].
            target: int64 [N, *space], or [N, C, *space] of zeros and ones where classes overlap.
            losses: to evaluate.
        """
        if self.form.target == "multilabel":
            predicted, labels = logits > 0, target > 0.5
            counted = torch.ones_like(labels[:, :1])
        else:
            counted = (target != IGNORED).unsqueeze(1)
            best = logits.argmax(1, keepdim=True)
            label = target.unsqueeze(1).clamp_min(0)
            predicted, labels = (one_hot(x, logits).bool() & counted for x in (best, label))
        self.dice.update(predicted, labels)
        self.iou.update(predicted, labels)
        same = (predicted == labels) & counted
        if self.form.target == "multilabel":
            right = same.double().mean(1).sum()
        else:
            right = same.all(1).sum()
        pixels = counted.sum()
        with only_this_rank():  # another rank scores another image, or none
            values = _values(losses, logits, target)
        values = torch.where(pixels > 0, values, 0)  # the mean over no pixels may be NaN
        shares = predicted.transpose(0, 1).flatten(1).sum(1)
        new = [right, pixels, *shares, *(values * pixels)]
        for total, value in zip(self.sums, new, strict=True):
            total.update(value)

    def compute_and_reset(self, strategy: Strategy) -> dict[str, Tensor]:
        """The scores over all ranks, by the names of `metrics`; then the count starts again."""
        right, pixels, *totals = (total.compute() for total in self.sums)
        classes = self.form.classes
        shares, totals = totals[: len(classes)], totals[len(classes) :]
        dice, iou = self.dice.compute(), self.iou.compute()
        per_class = {"dice": dice, "iou": torch.where(iou < 0, torch.nan, iou)}
        found = {name: scores.nanmean() for name, scores in per_class.items()}
        found["accuracy"] = right / pixels
        for name, scores in per_class.items():
            for label, score in zip(classes, scores, strict=True):
                if not score.isnan():
                    found[f"{name}/{label}"] = score
        for label, share in zip(classes, shares, strict=True):
            found[f"{PREDICTED}/{label}"] = share / pixels
        for name, total in zip(self.names, totals, strict=True):
            found[f"loss/{name}"] = total / pixels
        for metric in (self.dice, self.iou, *self.sums):
            metric.reset()
        return {name: value.float() for name, value in found.items()}
