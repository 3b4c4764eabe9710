"""The losses of the benchmarks."""

from __future__ import annotations

from torch import nn

from losswatch import Dice, load_loss

ARTICLE = ("cce", "dice", "dice_fg", "dice_square", "dice_fg_square")


def article() -> dict[str, nn.Module]:
    """The five losses of the article, by name."""
    return {name: load_loss(name) for name in ARTICLE}


def variants(count: int) -> list[nn.Module]:
    """Dice losses that all differ in their exponent or their weight of false positives."""
    return [Dice(exponent=1 + i % 2, alpha=0.1 + 0.05 * i) for i in range(count)]
