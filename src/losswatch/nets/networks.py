"""The article's plain net and a U-Net, with the article's initialisation.

Both take the input [N, in_channels, *space] and return logits [N, num_classes, *space].
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Up to so many channels a compiled convolution is fastest as plain sums over its taps, which the
# compiler fuses and which stacked runs only make longer. Wider ones are left to the backend's own
# kernels.
NARROW = 8

LANES = 16  # floats in the registers of a CPU with AVX-512


def _taps(x: Tensor, kernel: Sequence[int]) -> list[Tensor]:
    """For each tap of the kernel the pixels that it meets: [N, C, H, W] each, 0 outside.

    The border is concatenated, not padded: the compiler would inline padding into each of the
    taps, and look at every pixel whether it is outside.
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
    """A "same" convolution as a sum over taps and channels."""
    taps = zip(_taps(x, weight.shape[2:]), weight.flatten(2).unbind(2), strict=True)
    terms = [tap.unsqueeze(1) * w[:, :, None, None] for tap, w in taps]
    return functools.reduce(torch.add, terms).sum(2)


class _NarrowConvolution(torch.autograd.Function):
    """`_convolve` with a backward of its own: autograd would scatter where this one gathers."""

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
        # The one part with much to sum: a matrix product, over all pixels.
        columns = torch.stack(_taps(x.transpose(0, 1), weight.shape[2:]), dim=1)
        grad_w = g.transpose(0, 1).flatten(1) @ columns.flatten(2).flatten(0, 1).T
        return grad_x, grad_w.view(weight.shape)


class Conv2d(nn.Conv2d):
    """nn.Conv2d (odd kernel, "same" padding, stride 1) in the form that is fastest where it runs.

    It compiles to sums if it is narrow. On a CPU, where the channels come last in memory, a 1x1
    kernel is a linear layer; and one from many channels to few, which would leave half of each
    register empty in the gradient of its weights, is the same as a transposed convolution by the
    kernel turned around: that one's gradient fills registers with the input's channels.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            if max(self.in_channels, self.out_channels) > NARROW:
                return super().forward(x)
            y = _NarrowConvolution.apply(x, self.weight)
            return y if self.bias is None else y + self.bias[:, None, None]
        if x.is_cpu and x.stride(1) == 1:
            if self.kernel_size == (1, 1):
                y = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
                return y.permute(0, 3, 1, 2)
            if self.out_channels < LANES <= self.in_channels:
                turned = self.weight.transpose(0, 1).flip(2, 3)
                pad = [k // 2 for k in self.kernel_size]
                return F.conv_transpose2d(x, turned, self.bias, padding=pad)
        return super().forward(x)


class _Enlarge(torch.autograd.Function):
    """Nearest-neighbour interpolation to twice the size. PyTorch's own backward would lay out a
    gradient that is a part of another, as behind a concatenation, anew, and its result again."""

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


@contextmanager
def onednn(enabled: bool) -> Iterator[None]:
    """Whether oneDNN computes inside, where PyTorch has it; a switch of the process."""
    # torch.backends.mkldnn.flags would set more than this, and warn of it.
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = enabled  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


@functools.cache  # once a process
def _keep_memory() -> None:
    """Freed memory stays with the process, from now on: the next step needs as much again.

    By default glibc hands large pieces back at once, and the system must clear each page of the
    next ones: a sixth of a U-Net's time. Pieces of over a gigabyte still go back.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # M_... of malloc.h
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


@contextmanager
def fast_on_cpu(net: nn.Module) -> Iterator[None]:
    """Training inside uses what is fastest for `net` on a CPU; these are switches of the process.

    Once the softmax saturates, denormal gradients are 1.4 to 35 times as slow: they count as 0.
    oneDNN's convolutions take 2.5 times as long as PyTorch's own on so narrow a net as the
    article's, but not where the channels come last or in 3-D. Backward looks that switch up again,
    so it must hold for the whole step.
    """
    _keep_memory()
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    narrow = bool(convs) and all(
        m.in_channels <= NARROW and isinstance(m, nn.Conv2d) and m.weight.is_contiguous()
        for m in convs
    )
    torch.set_flush_denormal(True)
    try:
        with onednn(bool(torch.backends.mkldnn.enabled) and not narrow):
            yield
    finally:
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
            x = _Enlarge.apply(narrow(x))
            x = block(torch.cat([x, skips.pop()], dim=1))
        return self.head(x).contiguous()  # the losses read one class after another
