"""Checks the values of logits and targets, and explains in one line what no loss can take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from losswatch.compat import traced

# The integer types for which PyTorch finds the smallest and the largest value.
_ORDERED = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_inputs(logits: Tensor, target: Tensor, ignore_index: int | None = None) -> None:
    """Check that logits and target have values that losses can take.

    The check reads the data, so it waits for a GPU. Losses call it on a CPU only.

    Raises:
        ValueError: a logit is NaN or infinite, or the target holds a class outside [0, C) or NaN.
    """
    check_logits(logits)
    if target.ndim == logits.ndim:
        if target.is_floating_point() and target.isnan().any():
            raise ValueError("target: holds NaN, none is allowed")
        return
    fault = index_fault(target, logits.shape[1], ignore_index)[1].tolist()
    if fault[0]:
        raise ValueError(explain(fault, logits.shape[1], ignore_index))


def check_logits(logits: Tensor) -> None:
    """Check that logits have values that losses can take.

    Raises:
        ValueError: a logit is NaN or infinite.
    """
    for what, bad in (("NaN", logits.isnan()), ("infinite", logits.isinf())):
        if bad.any():
            count = f"{int(bad.sum())} of {logits.numel()}"
            raise ValueError(f"logits: {count} are {what}, none is allowed")


def evaluate(
    loss: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    target: Tensor,
    ignore_index: int | None,
) -> Tensor:
    """The value of a loss. In eager mode on a CPU, where a check is cheap, bad data is an error.

    Raises:
        ValueError: the data is bad, see `check_inputs`.
    """
    if not logits.is_cpu or traced(logits) or traced(target):
        return loss(logits, target)
    if target.ndim == logits.ndim - 1 and target.numel() and logits.shape[1] > 1:
        low, high = (target if target.dtype in _ORDERED else target.long()).aminmax()
        if low < 0 or high >= logits.shape[1]:
            check_inputs(logits, target, ignore_index)
    value = loss(logits, target)
    if value.isnan():
        check_inputs(logits, target, ignore_index)
    return value


# -- faults, found on the device and explained later ----------------------------------------------
#
# A fault is a float32 vector [3]: one of the numbers below (0: no fault), and the smallest and the
# largest label that counts. The functions read no number from a GPU, which would wait for it.

CLASS, FRACTION, LABEL, SHARES, PROBABILITIES = 1, 2, 3, 4, 5
NEAR = 0.01  # how far sums of shares may be from 1; half precision needs it


def index_fault(target: Tensor, classes: int, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Class indices that a loss can read, int64, and the fault of the target, [3].

    Args:
        target: class indices of any type, floating point included.
        classes: the number of classes. Indices outside of [0, classes) are clamped.
    """
    index = target.long()
    counts = index if ignore_index is None else torch.where(index == ignore_index, 0, index)
    low, high = _range(counts)
    is_whole = not target.is_floating_point()
    if low.is_cpu and is_whole and low.item() >= 0 and high.item() < classes:  # costs nothing
        return index, torch.zeros(3)
    bad = [(CLASS, (low < 0) | (high >= classes))]
    if target.is_floating_point():
        counted = target if ignore_index is None else torch.where(index == ignore_index, 0, target)
        low, high = _range(counted)
        bad.insert(0, (FRACTION, (counted != counts).any()))  # NaN is one
    clean = counts.clamp(0, classes - 1)
    if ignore_index is not None:
        clean = torch.where(index == ignore_index, index, clean)
    return clean, _fault(bad, low, high)


def label_fault(labels: Tensor, ignore_index: int | None, *, are_shares: bool) -> Tensor:
    """The fault of labels [N, C, *space], [3].

    Args:
        are_shares: whether the labels must add to 1 over the channels, as for a softmax.
    """
    x = labels if labels.is_floating_point() else labels.float()
    ignored = None if ignore_index is None else labels == ignore_index
    counted = x if ignored is None else torch.where(ignored, 0, x)
    low, high = _range(counted)
    bad = [(LABEL, ~((low >= -1e-4) & (high <= 1 + 1e-4)))]  # NaN is neither
    if are_shares:
        sums = x.sum(1)
        if ignored is not None:
            sums = torch.where(ignored.any(1), 1, sums)
        bad.append((SHARES, _are_off(sums)))
    return _fault(bad, low, high)


def probability_fault(p: Tensor) -> Tensor:
    """The fault [3] of the probabilities [N, C, *space] of C classes, or of the foreground."""
    low, high = _range(p)
    outside = ~((low >= 0) & (high <= 1))
    bad = [(PROBABILITIES, outside | _are_off(p.sum(1)) if p.shape[1] > 1 else outside)]
    return _fault(bad, low, high)


def first_fault(faults: Sequence[Tensor]) -> Tensor:
    """The first of several faults whose number is not 0."""
    first = faults[0]
    for other in faults[1:]:
        first = torch.where(first[0] > 0, first, other)
    return first


def explain(fault: Sequence[float], classes: int, ignore_index: int | None) -> str:
    """The line about a fault, whose three numbers have been read from the device."""
    number, low, high = fault
    if math.isnan(low):
        return "target: holds NaN, none is allowed"
    hint = "" if ignore_index is None else f" or ignore_index={ignore_index}"
    wrong = low if low < 0 else high
    return {
        CLASS: f"target: holds class {wrong:.0f}, allowed are 0 to {classes - 1}{hint}",
        FRACTION: "target: class indices must be whole numbers; soft labels of two and more "
        f"classes have the shape of the output, [N, {classes}, *space]",
        LABEL: f"target: holds labels from {low:g} to {high:g}, allowed are 0 to 1{hint}",
        SHARES: "target: its labels do not add to 1 over the classes, as a softmax needs; for "
        "classes that overlap take activation='sigmoid'",
        PROBABILITIES: "activation='none' is for probabilities of classes, which lie in [0, 1] and "
        "add to 1 over the channels; for logits take softmax, or sigmoid where classes overlap",
    }[int(number)]


def _range(x: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest number; 0 and 0 if there are none."""
    if not x.numel():
        return x.new_zeros(()), x.new_zeros(())
    low, high = x.aminmax()
    return low, high


def _are_off(sums: Tensor) -> Tensor:
    """Whether sums over the channels are not 1."""
    low, high = _range(sums)
    return ~((low >= 1 - NEAR) & (high <= 1 + NEAR)) if sums.numel() else low > 0


def _fault(bad: Sequence[tuple[int, Tensor]], low: Tensor, high: Tensor) -> Tensor:
    """The fault [3] with the first reason of `bad` that is true."""
    number: Tensor = torch.zeros_like(low, dtype=torch.float32)
    for reason, is_so in reversed(bad):
        number = torch.where(is_so, float(reason), number)
    return torch.stack([number, low.float(), high.float()])
