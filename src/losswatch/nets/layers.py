"""The building blocks of the networks: convolution, block and enlargement, for images and volumes.

The initial weights are those of the article: Glorot's uniform distribution, with biases of 0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A compiled convolution of at most this many channels is fastest as a plain sum over the kernel's
# positions: the compiler fuses the sum, and stacking runs only makes its loops longer. A wider
# convolution uses the kernels of the backend.
NARROW = 8

LANES = 16  # float32 numbers in one register of a CPU with AVX-512


def shifted(x: Tensor, kernel: Sequence[int]) -> list[Tensor]:
    """For each position of the kernel the image shifted there, [N, C, H, W], with 0 outside.

    The border is concatenated, not padded. The compiler would inline padding into each of the
    shifted images and test for each pixel whether it lies outside.
    """
    *_, h, w = x.shape
    kh, kw = kernel
    if kw > 1:
        border = x.new_zeros(*x.shape[:3], kw // 2)
        x = torch.cat([border, x, border], dim=3)
    if kh > 1:
        border = x.new_zeros(*x.shape[:2], kh // 2, x.shape[3])
        x = torch.cat([border, x, border], dim=2)
    return [x[:, :, i : i + h, j : j + w] for i in range(kh) for j in range(kw)]


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    """A "same" convolution as a sum over the kernel's positions and the channels."""
    pairs = zip(shifted(x, weight.shape[2:]), weight.flatten(2).unbind(2), strict=True)
    terms = [pixels.unsqueeze(1) * w[:, :, None, None] for pixels, w in pairs]
    return functools.reduce(torch.add, terms).sum(2)


class NarrowConvolution(torch.autograd.Function):
    """`_convolve` with its own derivative, which gathers. That of autograd would scatter."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return _convolve(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad_x = _convolve(g, weight.transpose(0, 1).flip(2, 3))
        # The gradient of the weights sums over all pixels, so it is written as a matrix product.
        columns = torch.stack(shifted(x.transpose(0, 1), weight.shape[2:]), dim=1)
        grad_w = g.transpose(0, 1).flatten(1) @ columns.flatten(2).flatten(0, 1).T
        return grad_x, grad_w.view(weight.shape)


class Conv2d(nn.Conv2d):
    """nn.Conv2d (odd kernel, "same" padding, stride 1), computed in the fastest way.

    - If compiled, a narrow convolution is a plain sum (`NarrowConvolution`).
    - On a CPU with the channels last in memory, a 1x1 kernel is a linear layer. And a convolution
      from many channels to few is a transposed convolution by the flipped kernel: its gradient by
      the weights fills the registers with the channels of the input, and not only half of them.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            if max(self.in_channels, self.out_channels) > NARROW:
                return super().forward(x)
            y = NarrowConvolution.apply(x, self.weight)
            return y if self.bias is None else y + self.bias[:, None, None]
        if x.is_cpu and x.stride(1) == 1:
            if self.kernel_size == (1, 1):
                y = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
                return y.permute(0, 3, 1, 2)
            if self.out_channels < LANES <= self.in_channels:
                flipped = self.weight.transpose(0, 1).flip(2, 3)
                padding = [k // 2 for k in self.kernel_size]
                return F.conv_transpose2d(x, flipped, self.bias, padding=padding)
        return super().forward(x)


class Enlarge(torch.autograd.Function):
    """Nearest-neighbour interpolation to twice the size.

    After a concatenation the gradient is a part of a larger tensor. PyTorch's own derivative would
    copy that part to a new layout, and then copy the result. This one makes no copies.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        for dim in range(2, g.ndim):
            even, odd = g.unflatten(dim, (-1, 2)).unbind(dim + 1)
            g = even + odd
        return g


_CONV = {2: Conv2d, 3: nn.Conv3d}
_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def convolution(dims: int, inputs: int, outputs: int, kernel: int, bias: bool) -> nn.Module:
    """A "same" convolution of `dims` (2 or 3) spatial axes with the article's initial weights."""
    conv = _CONV[dims](inputs, outputs, kernel, padding=kernel // 2, bias=bias)
    nn.init.xavier_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def block(
    dims: int, inputs: int, outputs: int, convs: int, batch_norm: bool, bn_momentum: float
) -> nn.Sequential:
    """`convs` times a 3x3 convolution, batch norm if `batch_norm`, and ReLU."""
    layers: list[nn.Module] = []
    for i in range(convs):
        layers.append(convolution(dims, outputs if i else inputs, outputs, 3, bias=not batch_norm))
        if batch_norm:
            layers.append(_NORM[dims](outputs, eps=1e-3, momentum=bn_momentum))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def check_positive(name: str, value: object) -> None:
    """Check a setting.

    Raises:
        ValueError: `value` is not a whole number of at least 1. Names the setting.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
