"""Cross entropy on the table of sums."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from losswatch.losses.frozen import (
    is_number,
    parse_flag,
    parse_index,
    parse_number,
    parse_per_class,
)
from losswatch.losses.ranks import RankSums
from losswatch.losses.sums import Recipe
from losswatch.losses.table_loss import TINY, TableLoss, class_tensor


class CrossEntropy(TableLoss):
    """Mean over pixels of -Σ_c y_c·log p_c, p the softmax. The defaults give the CCE of the study.

    Args:
        clip: p is clipped to [clip, 1 - clip], with gradient 0 outside; None: log-softmax without
            clipping.
        weight: one factor per class; the mean is then over the pixels' total weight.
        label_smoothing: the share of y that is spread evenly over the classes.
        ignore_index: pixels with this label do not count; for labels [N, C, *space], pixels with
            this label in any channel. If all pixels are ignored, the loss is 0.
        count_ignored: divide by the number of all pixels, with the ignored ones.

    Raises:
        ValueError: see `Dice`.

    Source: torch.nn.CrossEntropyLoss (clip=None), Keras's categorical_crossentropy (clip=1e-7).

    >>> import torch
    >>> logits, target = torch.tensor([[[9.0, 0.0], [0.0, 99.0]]]), torch.tensor([[0, 0]])
    >>> f"{CrossEntropy()(logits, target):.3f} {CrossEntropy(clip=None)(logits, target):.3f}"
    '8.059 49.500'
    """

    one_channel = "torch.nn.BCEWithLogitsLoss()"
    free = frozenset({"clip"})

    def __init__(
        self,
        clip: float | None = 1e-7,
        weight: Sequence[float] | None = None,
        label_smoothing: float = 0,
        ignore_index: int | None = None,
        count_ignored: bool = False,
    ) -> None:
        super().__init__()
        if clip is not None and not (is_number(clip) and 0 < clip < 0.5):
            raise ValueError(f"clip={clip!r}: allowed is a number between 0 and 0.5, or None")
        self.clip = None if clip is None else float(clip)
        self.weight = None if weight is None else parse_per_class("weight", weight)
        self.label_smoothing = parse_number("label_smoothing", label_smoothing, high=1)
        self.ignore_index = parse_index("ignore_index", ignore_index)
        self.count_ignored = parse_flag("count_ignored", count_ignored)
        self.lists = {"weight": self.weight} if self.weight else {}
        self.recipe = Recipe(
            ignore_index=self.ignore_index,
            clips=(self.clip or 0.0,),
            by_class=bool(self.weight or self.label_smoothing),
        )
        self.freeze(CrossEntropy.__init__)

    def from_sums(self, sums: RankSums) -> Tensor:
        table, smoothing = sums.joint, self.label_smoothing
        likelihood = table.log(self.clip or 0.0)  # [C], Σ y·log p
        if smoothing:
            even = table.log_of_all(self.clip or 0.0) / likelihood.shape[-1]
            likelihood = (1 - smoothing) * likelihood + smoothing * even
        count = table.pixels
        if self.weight:
            weight = class_tensor(self.weight, likelihood)
            likelihood = weight * likelihood
        if self.weight and not self.count_ignored:
            count = (weight * table.y()).sum()
        elif self.ignore_index is not None and not self.count_ignored:
            count = table.counted
        # Where no pixel counts, the likelihood is 0, and so is the loss.
        return -likelihood.sum(-1) / (count.clamp_min(TINY) if isinstance(count, Tensor) else count)
