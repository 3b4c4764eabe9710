"""The losses that are measured."""

from __future__ import annotations

from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from benchmarks import ROOT
from losswatch.losses import Dice

ARTICLE = ("cce", "dice", "dice_fg", "dice_square", "dice_fg_square")


def preset(name: str) -> nn.Module:
    """The loss of conf/loss/<name>.yaml."""
    return instantiate(OmegaConf.load(ROOT / f"conf/loss/{name}.yaml"))


def article() -> dict[str, nn.Module]:
    """The five losses of the article, by name."""
    return {name: preset(name) for name in ARTICLE}


def variants(count: int) -> list[nn.Module]:
    """Dice losses that all differ in their exponent or their weight of false positives."""
    return [Dice(exponent=1 + i % 2, alpha=0.1 + 0.05 * i) for i in range(count)]
