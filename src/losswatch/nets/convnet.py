"""The article's plain network."""

from __future__ import annotations

from torch import nn

from losswatch.nets.layers import block, check_positive, convolution


class ConvNet(nn.Sequential):
    """`depth` 3x3 convolutions of `width` filters, then a 1x1 convolution to the logits.

    Maps images [N, in_channels, *space] of any size to logits [N, num_classes, *space].

    Args:
        in_channels, num_classes: channels of the images and of the logits.
        dims: 2 for images, 3 for volumes.
        width, depth: filters of each 3x3 convolution, and their number.
        batch_norm: normalise before each non-linearity; the convolutions then have no bias.
        bn_momentum: weight of the newest batch in the running statistics.

    Raises:
        ValueError: `width` or `depth` is not a whole number of at least 1.

    >>> sum(p.numel() for p in ConvNet(1, 2).parameters())  # 40 + 148 + 10
    198
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        dims: int = 2,
        width: int = 4,
        depth: int = 2,
        batch_norm: bool = False,
        bn_momentum: float = 0.01,
    ) -> None:
        check_positive("model.width", width)
        check_positive("model.depth", depth)
        super().__init__(
            block(dims, in_channels, width, depth, batch_norm, bn_momentum),
            convolution(dims, width, num_classes, 1, bias=True),
        )
