"""Images of a bright disk on noise, and their masks: a stand-in for your own data and network."""

import torch
from torch import Tensor, nn


def disks(count: int, size: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images [count, 1, size, size] and class indices [count, size, size]; 4 % is foreground."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centre = torch.randint(6, size - 6, (2, count, 1, 1), generator=g)
    masks = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < 30
    images = masks.unsqueeze(1) + 0.5 * torch.randn(count, 1, size, size, generator=g)
    return images, masks.long()


def network(channels: int = 2) -> nn.Module:
    """A small network from images [N, 1, H, W] to logits [N, channels, H, W]."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, channels, 1),
    )  # fmt: skip
