"""What makes training fast on a CPU: switches of the process, set while a network trains."""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from losswatch.nets.layers import NARROW


@contextmanager
def onednn(enabled: bool) -> Iterator[None]:
    """Switch oneDNN on or off inside, where PyTorch has it, and back again at the end."""
    # torch.backends.mkldnn.flags would set more than this, and warn about it.
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = enabled  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Count denormal numbers as 0 inside.

    Once the softmax saturates, gradients are denormal, and each operation on them is 1.4 to 35
    times as slow as on other numbers.
    """
    # PyTorch does not tell whether the switch is on, but a product does.
    before = (torch.full((), 1e-40) * 1).item() == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@functools.cache  # once in a process
def keep_memory() -> None:
    """Keep freed memory in the process from now on: the next step needs as much again.

    By default glibc hands large pieces back to the system at once, and the system must clear each
    page of the next piece: a sixth of the time of a U-Net. Pieces above a gigabyte still go back.
    glibc cannot tell its former settings, so they are not restored.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


@contextmanager
def fast_on_cpu(net: nn.Module) -> Iterator[None]:
    """Set what is fastest for training `net` on a CPU; all but `keep_memory` is restored.

    oneDNN's convolutions take 2.5 times as long as PyTorch's own on a network as narrow as the
    article's, but not where the channels come last in memory, nor on volumes. The backward pass
    reads that switch again, so it must hold for whole steps.
    """
    keep_memory()
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    is_narrow = bool(convs) and all(
        m.in_channels <= NARROW and isinstance(m, nn.Conv2d) and m.weight.is_contiguous()
        for m in convs
    )
    with denormals_as_zero(), onednn(bool(torch.backends.mkldnn.enabled) and not is_narrow):
        yield
