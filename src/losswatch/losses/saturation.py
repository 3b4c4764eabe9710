"""Whether a Dice loss has no gradient left, and why."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from losswatch.losses.dice import Dice
from losswatch.losses.sum_table import table
from losswatch.losses.table_loss import TINY, class_tensor, value_and_slope


class Saturation(NamedTuple):
    """What `saturation` finds; `reason` is empty for a healthy loss."""

    value: float  # of 1 - d, averaged as the loss averages
    slope: float  # Σ|∂(1 - d)/∂logits|: its largest change per unit move of all logits
    smoothing: float  # the largest share of smoothing in a kept class's denominator
    reason: str


def saturation(loss: Dice, logits: Tensor, target: Tensor) -> Saturation:
    """Tell whether a Dice loss is near 1 without a gradient, or hidden by its smoothing.

    Args:
        loss: any Dice; its link does not matter.
        logits: [N, C, *space].
        target: class indices [N, *space] or labels [N, C, *space].

    >>> far = torch.tensor([[[999.0, 999.0], [0.0, 0.0]]])
    >>> saturation(Dice(), far, torch.tensor([[1, 1]])).reason
    'value 1.000 with slope 0.0e+00: no gradient leads back'
    """
    plain = Dice(**loss.settings | {"link": "1-d", "reduction": "mean"})
    value, slope = value_and_slope(plain, logits.detach(), target)
    with torch.no_grad():
        sums = table(logits.detach(), target, plain.recipe)
        total = sums.p(plain.exponent) + sums.y(plain.exponent)
        smooth = class_tensor(plain.smooth_dr, total)
        total = total.sum(-1, keepdim=True) if plain.joint else total
        share = (smooth / (total + smooth).clamp_min(TINY)).expand_as(total)
        start = 0 if plain.include_background or plain.joint else 1
        most = share[..., start:].max().item()
    size = slope.abs().sum().item()
    reason = ""
    if value > 0.95 and size < 1e-3:
        reason = f"value {value:.3f} with slope {size:.1e}: no gradient leads back"
    elif most > 0.5:
        reason = f"smoothing makes {most:.0%} of a class's denominator: it hides the sums"
    return Saturation(value.item(), size, most, reason)
