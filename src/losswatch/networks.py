"""The article's plain net and a U-Net, with the article's initialisation.

Both take the input [N, in_channels, *space] and return logits [N, num_classes, *space].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# With so few input channels a compiled convolution is fastest as one matrix product over its
# shifted inputs, which stacked runs turn into one batched product. Wider ones are left to the
# backend's own kernels.
GEMM_CHANNELS = 8


def _columns(x: Tensor, kernel: Sequence[int]) -> Tensor:
    """[N, C, H, W] -> [C·taps, N·H·W]: for each tap of the kernel, the pixel that it meets."""
    n, c, h, w = x.shape
    kh, kw = kernel
    x = F.pad(x.transpose(0, 1), (kw // 2, kw // 2, kh // 2, kh // 2))
    taps = [x[:, :, i : i + h, j : j + w] for i in range(kh) for j in range(kw)]
    return torch.stack(taps, dim=1).reshape(c * kh * kw, n * h * w)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """A "same" convolution as one matrix product."""
    n, _, h, w = x.shape
    y = weight.flatten(1) @ _columns(x, weight.shape[2:])
    return y.reshape(-1, n, h, w).transpose(0, 1)


class _MatrixConvolution(torch.autograd.Function):
    """`_product` with a backward of products too: autograd would scatter where this one gathers,
    which costs half of a compiled step."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return _product(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad_x = _product(g, weight.transpose(0, 1).flip(2, 3))
        grad_w = g.transpose(0, 1).flatten(1) @ _columns(x, weight.shape[2:]).T
        return grad_x, grad_w.view(weight.shape)


class Conv2d(nn.Conv2d):
    """nn.Conv2d (odd kernel, "same" padding, stride 1) that compiles to matrix products."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() or self.in_channels > GEMM_CHANNELS:
            return super().forward(x)
        y = _MatrixConvolution.apply(x, self.weight)
        return y if self.bias is None else y + self.bias[:, None, None]


@contextmanager
def fast_on_cpu(net: nn.Module) -> Iterator[None]:
    """Training inside uses what is fastest for `net` on a CPU; these are switches of the process.

    Once the softmax saturates, denormal gradients are 1.4 to 35 times as slow: they count as 0.
    oneDNN's convolutions take 2.5 times as long as PyTorch's own on so narrow a net as the
    article's. Backward looks that switch up again, so it must hold for the whole step.
    """
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    narrow = bool(convs) and max(m.in_channels for m in convs) <= GEMM_CHANNELS
    before = torch.backends.mkldnn.enabled
    torch.set_flush_denormal(True)
    torch.backends.mkldnn.enabled = before and not narrow  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before
        torch.set_flush_denormal(False)


_CONV = {2: Conv2d, 3: nn.Conv3d}
_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _conv(dims: int, inputs: int, outputs: int, kernel: int, bias: bool) -> nn.Module:
    conv = _CONV[dims](inputs, outputs, kernel, padding=kernel // 2, bias=bias)
    nn.init.xavier_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _block(
    dims: int, inputs: int, outputs: int, convs: int, batch_norm: bool, bn_momentum: float
) -> nn.Sequential:
    """`convs` times convolution 3x3, batch norm where asked for, ReLU."""
    layers: list[nn.Module] = []
    for i in range(convs):
        layers.append(_conv(dims, outputs if i else inputs, outputs, 3, bias=not batch_norm))
        if batch_norm:
            layers.append(_NORM[dims](outputs, eps=1e-3, momentum=bn_momentum))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


class ConvNet(nn.Sequential):
    """The article's net: `depth` 3x3 convolutions of `width` filters, then 1x1 to the logits.

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
        _positive("model.width", width)
        _positive("model.depth", depth)
        super().__init__(
            _block(dims, in_channels, width, depth, batch_norm, bn_momentum),
            _conv(dims, width, num_classes, 1, bias=True),
        )


class UNet(nn.Module):
    """A U-Net (Ronneberger et al. 2015) of `len(widths)` levels with "same" padding.

    Raises:
        ValueError: `widths` is empty, or an input side is not divisible by 2^(levels - 1).
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
            _positive("each of model.widths", width)
        _positive("model.convs", convs)
        inputs = [in_channels, *widths]
        self.down = nn.ModuleList(
            _block(dims, i, o, convs, batch_norm, bn_momentum)
            for i, o in zip(inputs, widths, strict=False)
        )
        steps_up = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        # The 1x1 convolution and the interpolation make the "up-convolution"; in this order it
        # costs a quarter (an eighth in 3-D) and computes the same.
        self.narrow = nn.ModuleList(_conv(dims, deep, w, 1, bias=True) for deep, w in steps_up)
        self.up = nn.ModuleList(
            _block(dims, 2 * w, w, convs, batch_norm, bn_momentum) for _, w in steps_up
        )
        self.head = _conv(dims, widths[0], num_classes, 1, bias=True)
        self.pool = F.max_pool2d if dims == 2 else F.max_pool3d
        if dims == 2:
            # A third faster on a CPU than PyTorch's default layout, forward and backward.
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        factor = 2 ** len(self.up)
        if any(side % factor for side in x.shape[2:]):
            raise ValueError(
                f"a U-Net of {len(self.down)} levels takes image sizes divisible by {factor}, "
                f"got {tuple(x.shape[2:])}; change data.image_size or model.widths"
            )
        skips = []
        for level, block in enumerate(self.down):
            x = block(self.pool(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for narrow, block in zip(self.narrow, self.up, strict=True):
            x = F.interpolate(narrow(x), scale_factor=2.0)
            x = block(torch.cat([x, skips.pop()], dim=1))
        return self.head(x)
