"""A small network, a batch for it, losses to watch on it, and what an observer must have seen."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

LOSSES = ["cce", "dice", "dice_fg", "dice_square", "dice_monai"]


class Focal(nn.Module):
    """A loss of somebody else."""

    def forward(self, logits, target):
        each = F.cross_entropy(logits, target, reduction="none")
        return ((1 - (-each).exp()) ** 2 * each).mean()


def assert_seen(seen, wanted, tolerance=1e-9):
    for found, right in zip(seen[1:], wanted, strict=True):
        assert found.dtype == right.dtype
        torch.testing.assert_close(found, right, rtol=tolerance, atol=tolerance)


def small(channels=2, device="cpu"):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, channels, 1)
    ).to(device, torch.float64)


def batch(classes=2, size=8, device="cpu"):
    g = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, size, size, generator=g, dtype=torch.float64)
    target = torch.randint(0, classes, (2, size, size), generator=g)
    return images.to(device), target.to(device)


def foreground_dice(p, y):
    return 1 - (2 * (p * y).sum() + 1e-7) / (p.sum() + y.sum() + 1e-7)


class Drawing(nn.Module):
    """A loss that draws random numbers and counts its calls."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, logits, target):
        self.calls += 1
        noise = torch.rand_like(logits) + random.random() + np.random.rand()
        return F.cross_entropy(logits + noise, target)


class Checkpointed(nn.Module):
    """Computes batch norm and dropout again in each backward pass."""

    def __init__(self, reentrant=False):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.middle = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.3))
        self.reentrant = reentrant

    def forward(self, x):
        return self.last(checkpoint(self.middle, self.first(x), use_reentrant=self.reentrant))
