"""The Dice family as one class, with a knob for each way in which Dice losses differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from losswatch.losses.frozen import (
    parse_choice,
    parse_flag,
    parse_index,
    parse_number,
    parse_numbers,
    parse_per_class,
)
from losswatch.losses.ranks import RankSums, sum_over_ranks, world_size
from losswatch.losses.sums import Recipe
from losswatch.losses.table_loss import TINY, TableLoss, class_tensor, merged

# -log(d) and (1 - d)**power, or their slopes, are infinite at 0: their argument is at least NEAR.
NEAR = 1e-12


class Dice(TableLoss):
    """1 - Dice, with a knob for each way in which Dice losses differ.

    The defaults are those of the study. Per class, and per group of pixels in one sum,

        tp = Σ y·p,  fp = Σ p^exponent - tp,  fn = Σ y^exponent - tp,
        d = (2·tp + smooth_nr) / (2·tp + 2·alpha·fp + 2·beta·fn + smooth_dr)

    and the loss is Σ_c share_c·link(d_c), by default the mean over the kept classes, and then the
    mean over the groups.

    Args:
        activation: makes p from the logits: "softmax", "sigmoid", or "none" for probabilities.
        include_background: keep class 0.
        exponent: of p and y in the denominator, above 0; 1 is Dice, 2 is Milletari's.
        alpha, beta: Tversky's weights of fp and fn; 0.5, 0.5 is Dice, 1, 1 is Jaccard.
        smooth_nr, smooth_dr: added to numerator and denominator; a number or one per class.
        floor: the denominator is at least this.
        over: the pixels of one sum: "row" (the last spatial axis), "sample", "batch" (of this
            rank), "global" (the batches of all ranks).
        joint: one d for all kept classes together (micro average).
        link: "1-d", "-d", "-log" or "power", which is (1 - d)**power.
        power: the exponent of link "power" (focal Tversky).
        weight: one factor per class on link(d).
        weight_normalised: divide by the total weight of the kept classes, not by their number.
        reduction: "mean", or "sum" over classes and groups.
        absent: how classes without a target pixel in a group count: by the formula ("smooth"), as
            0 ("zero"), or not at all in the mean ("skip").
        intersection: tp is the sum of the "product" y·p or of the "minimum" min(y, p). The minimum
            gives loss 0 at p = y for soft labels too. Both are equal for hard labels.
        ignore_index: pixels with this label do not count. For labels [N, C, *space], a softmax
            ignores the pixels with this label in any channel, a sigmoid the single labels.

    A group has loss 0 if all of its pixels are ignored, or if it has no class to average. Where all
    sums and smoothings are 0, d is 0.

    Raises:
        ValueError: a setting is not allowed, shapes or labels do not fit, or, in eager mode on a
            CPU, a logit is NaN.

    Sources: Milletari et al. 2016 (exponent 2), Salehi et al. 2017 (alpha, beta), Abraham and Khan
    2018 (link "power"); conf/loss has the settings that equal other libraries' losses.

    >>> logits, target = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[0, 1]])
    >>> f"{Dice()(logits, target):.4f} {Dice(alpha=1, beta=1)(logits, target):.4f}"  # Dice, Jaccard
    '0.1192 0.2130'
    """

    one_channel = "Dice(activation='sigmoid')"

    def __init__(
        self,
        activation: str = "softmax",
        include_background: bool = True,
        exponent: float = 1,
        alpha: float = 0.5,
        beta: float = 0.5,
        smooth_nr: float | Sequence[float] = 1e-7,
        smooth_dr: float | Sequence[float] = 1e-7,
        floor: float = 0,
        over: str = "global",
        joint: bool = False,
        link: str = "1-d",
        power: float = 1,
        weight: Sequence[float] | None = None,
        weight_normalised: bool = False,
        reduction: str = "mean",
        absent: str = "smooth",
        intersection: str = "product",
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.activation = parse_choice("activation", activation, "softmax", "sigmoid", "none")
        self.include_background = parse_flag("include_background", include_background)
        self.exponent = parse_number("exponent", exponent)
        self.alpha, self.beta = parse_number("alpha", alpha), parse_number("beta", beta)
        self.smooth_nr = parse_numbers("smooth_nr", smooth_nr)
        self.smooth_dr = parse_numbers("smooth_dr", smooth_dr)
        self.floor = parse_number("floor", floor)
        self.over = parse_choice("over", over, "row", "sample", "batch", "global")
        self.joint = parse_flag("joint", joint)
        self.link = parse_choice("link", link, *LINKS)
        self.power = parse_number("power", power)
        self.weight = None if weight is None else parse_per_class("weight", weight)
        self.weight_normalised = parse_flag("weight_normalised", weight_normalised)
        self.reduction = parse_choice("reduction", reduction, "mean", "sum")
        self.absent = parse_choice("absent", absent, "smooth", "zero", "skip")
        self.intersection = parse_choice("intersection", intersection, "product", "minimum")
        self.ignore_index = parse_index("ignore_index", ignore_index)
        if self.exponent == 0:
            raise ValueError("exponent=0: allowed is a number above 0")
        if self.weight and not sum(self._kept(self.weight)):
            raise ValueError(f"weight={weight!r}: at least one kept class needs a weight above 0")
        settings = {name: getattr(self, name) for name in ("smooth_nr", "smooth_dr", "weight")}
        self.lists = {name: value for name, value in settings.items() if isinstance(value, tuple)}
        for name in self.lists:
            if joint:
                raise ValueError(
                    f"{name}: one per class, but joint=True makes one d of all classes"
                )
        if len({len(values) for values in self.lists.values()}) > 1:
            lengths = ", ".join(f"{name} for {len(v)} classes" for name, v in self.lists.items())
            raise ValueError(f"per-class lists of different lengths: {lengths}")
        # The numbers of the quotient with numerator and denominator halved:
        #     d = (tp + half_nr) / (alpha·Σ p^e + beta·Σ y^e + rest·tp + half_dr).
        rest = 1 - self.alpha - self.beta
        half_nr = scaled(self.smooth_nr, 0.5)
        half_dr = scaled(self.smooth_dr, 0.5, least=TINY)  # d is 0 where all sums are
        self.numbers = self.alpha, self.beta, rest, half_nr, half_dr
        self.free = frozenset({"exponent", "alpha", "beta", "smooth_nr", "smooth_dr"})
        if not joint:
            self.free |= {"include_background"}
        self.recipe = Recipe(
            self.activation,
            "batch" if over == "global" else over,
            self.intersection,
            self.ignore_index,
            exponents=(self.exponent,),
        )
        self.freeze(Dice.__init__)

    def _kept(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """The numbers of the classes that count."""
        return values if self.include_background else values[1:]

    def check_channels(self, shape: tuple[int, ...]) -> None:
        if self.over == "row" and len(shape) < 3:
            raise ValueError(f"logits: {shape} have no rows, over='row' needs [N, C, *space]")
        super().check_channels(shape)
        if shape[1] == 1 and not self.include_background:
            raise ValueError(
                f"logits: {shape} have one channel, and include_background=False would leave none"
            )

    def from_sums(self, sums: RankSums) -> Tensor:
        table = sums.joint if self.over == "global" else sums.local
        tp, p, y = table.tp, table.p(self.exponent), table.y(self.exponent)  # [*groups, C]
        if self.joint:
            start = 0 if self.include_background else 1
            tp, p, y = (s[..., start:].sum(-1, keepdim=True) for s in (tp, p, y))
        alpha, beta, rest, half_nr, half_dr = (class_tensor(x, y) for x in self.numbers)
        den = alpha * p + (beta * y + half_dr)
        if self.numbers[2]:
            den = den + rest * tp
        d = (tp + half_nr) / (den.clamp_min(self.floor / 2) if self.floor else den)
        loss = LINKS[self.link](d, self.power)  # [*groups, C]
        classes = loss.shape[-1]
        share: Any = class_tensor(
            merged([m.shares(classes) for m in self.members or (self,)]), loss
        )
        if self.absent != "smooth":
            share = share * (y > 0)
        value = (share * loss).sum(-1)
        if self.absent == "skip":
            value = value / share.sum(-1).clamp_min(TINY)
        if self.ignore_index is not None:
            value = torch.where(table.counted > 0, value, 0.0)
        return value if self.recipe.over == "batch" else self._over_groups(value)

    def shares(self, classes: int) -> tuple[float, ...]:
        """How much each class counts."""
        kept = [1.0] * classes
        if not self.include_background and not self.joint:
            kept[0] = 0.0
        counts = [k * w for k, w in zip(kept, self.weight or kept, strict=True)]
        total = sum(counts) if self.weight_normalised else sum(kept)
        return tuple(counts if self.reduction == "sum" else (c / total for c in counts))

    def _over_groups(self, value: Tensor) -> Tensor:
        """The mean, or the sum, over the groups of all ranks; [*groups] to a scalar."""
        total, count = value.sum(), value.new_full((), value.numel())
        if world_size() > 1:
            total, count = sum_over_ranks(torch.stack([total, count])).unbind()
        return total / count if self.reduction == "mean" else total

    @property
    def is_steady(self) -> bool:
        """Whether the derivative by each tp stays away from 0.

        Its absolute value is at least w·(2 - (2 - 2·beta)·d) / den. So d must stay at most 1: fp
        and fn must not be negative, or (up to exponent 2) have equal weights. And beta must be well
        above 0.
        """
        fixed = self.absent == "smooth" and self.link in ("1-d", "-d")
        fixed &= self.ignore_index is None
        weighty = not self.floor and not (self.weight and min(self.weight) == 0)
        top, bottom = (
            x if isinstance(x, tuple) else (x,) for x in (self.smooth_nr, self.smooth_dr)
        )
        below = max(top) <= min(bottom) or all(map(float.__le__, top, bottom))
        below &= self.exponent <= (2 if self.alpha == self.beta else 1)
        return fixed and weighty and below and self.beta >= 0.05


def scaled(
    value: float | tuple[float, ...], factor: float, least: float = 0
) -> float | tuple[float, ...]:
    """factor·value, but at least `least`, for one number or for one per class."""
    if isinstance(value, tuple):
        return tuple(max(least, factor * v) for v in value)
    return max(least, factor * value)


LINKS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "1-d": lambda d, power: 1 - d,
    "-d": lambda d, power: -d,
    "-log": lambda d, power: -d.clamp_min(NEAR).log(),
    "power": lambda d, power: (1 - d).clamp_min(NEAR) ** power,
}
