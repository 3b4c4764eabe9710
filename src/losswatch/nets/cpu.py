"""Makes training fast on a CPU, by switches of the process while a network trains."""

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
    """Switch oneDNN on or off. Restores the switch on exit."""
    # torch.backends.mkldnn.flags would set more than this, and warn about it.
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = enabled  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Count denormal numbers as 0. Restores the switch on exit.

    When a softmax saturates, gradients are denormal, and each operation on them is 1.4 to 35 times
    as slow as on other numbers.
    """
    # PyTorch cannot tell whether the switch is on, but a product can.
    before = (torch.full((), 1e-40) * 1).item() == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@functools.cache  # once in a process
def keep_memory() -> None:
    """Keep freed memory in the process from now on, because the next step needs as much again.

    By default glibc returns large pieces to the system at once, and the system must clear each page
    of the next piece. This takes a sixth of the time of a U-Net. Pieces above a gigabyte are still
    returned. glibc cannot tell its former settings, so they are not restored.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


@contextmanager
def fast_on_cpu(net: nn.Module) -> Iterator[None]:
    """Set the fastest switches for training `net` on a CPU. Restores all but `keep_memory` on exit.

    On a network as narrow as the article's, convolutions of oneDNN take 2.5 times as long as those
    of PyTorch, but not if the channels come last in memory, and not on volumes. The backward pass
    reads the switch again, so it must be set for whole steps.
    """
    keep_memory()
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    is_narrow = bool(convs) and all(
        m.in_channels <= NARROW and isinstance(m, nn.Conv2d) and m.weight.is_contiguous()
        for m in convs
    )
    with denormals_as_zero(), onednn(bool(torch.backends.mkldnn.enabled) and not is_narrow):
        yield
