"""A small U-Net."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losswatch.nets.layers import Enlarge, block, check_positive, convolution


class UNet(nn.Module):
    """A U-Net (Ronneberger et al. 2015) of `len(widths)` levels with "same" padding.

    Maps images [N, in_channels, *space] to logits [N, num_classes, *space].

    Args:
        in_channels, num_classes: channels of the images and of the logits.
        dims: 2 for images, 3 for volumes.
        widths: filters of each level, the finest first.
        convs: 3x3 convolutions of each block.
        batch_norm: normalise before each non-linearity; these convolutions then have no bias.
        bn_momentum: weight of the newest batch in the running statistics.

    Raises:
        ValueError: `widths` is empty, a number is not a whole number of at least 1, or (when
            called) a side of the image is not divisible by 2^(levels - 1).
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        dims: int = 2,
        widths: Sequence[int] = (8, 16, 32),
        convs: int = 2,
        batch_norm: bool = True,
        bn_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        widths = list(widths)
        if not widths:
            raise ValueError("model.widths must name the filters of at least one level, got []")
        for width in widths:
            check_positive("each of model.widths", width)
        check_positive("model.convs", convs)
        inputs = [in_channels, *widths]
        self.down = nn.ModuleList(
            block(dims, i, o, convs, batch_norm, bn_momentum)
            for i, o in zip(inputs, widths, strict=False)
        )
        steps_up = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        # A 1x1 convolution and an interpolation make the "up-convolution". The convolution comes
        # first: the result is the same, at a quarter of the cost (an eighth for volumes).
        self.narrow = nn.ModuleList(
            convolution(dims, deep, w, 1, bias=True) for deep, w in steps_up
        )
        self.up = nn.ModuleList(
            block(dims, 2 * w, w, convs, batch_norm, bn_momentum) for _, w in steps_up
        )
        self.head = convolution(dims, widths[0], num_classes, 1, bias=True)
        self.pool = F.max_pool2d if dims == 2 else F.max_pool3d
        if dims == 2:
            # On a CPU a third faster than PyTorch's default layout, forward and backward.
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        factor = 2 ** len(self.up)
        if any(side % factor for side in x.shape[2:]):
            raise ValueError(
                f"a U-Net of {len(self.down)} levels takes image sizes divisible by {factor}, "
                f"got {tuple(x.shape[2:])}; change data.image_size or model.widths"
            )
        skips = []
        for level, layers in enumerate(self.down):
            x = layers(self.pool(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for narrow, layers in zip(self.narrow, self.up, strict=True):
            x = Enlarge.apply(narrow(x))
            x = layers(torch.cat([x, skips.pop()], dim=1))
        return self.head(x).contiguous()  # the losses read one class after another
