"""Checks of the values of logits and targets: what no loss can take is said in one line."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from losswatch.compat import traced

# The integer types for which PyTorch finds the smallest and the largest value.
_ORDERED = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_inputs(logits: Tensor, target: Tensor, ignore_index: int | None = None) -> None:
    """Look for values that no loss can take.

    It reads the data, so on a GPU it waits for them. Losses call it on a CPU only.

    Raises:
        ValueError: a logit is NaN or infinite, or a label of the target lies outside [0, C).
    """
    for what, bad in (("NaN", logits.isnan()), ("infinite", logits.isinf())):
        if bad.any():
            count = f"{int(bad.sum())} of {logits.numel()}"
            raise ValueError(f"logits: {count} are {what}, none is allowed")
    if target.ndim == logits.ndim:
        if target.is_floating_point() and target.isnan().any():
            raise ValueError("target: holds NaN, none is allowed")
        return
    target = target if target.dtype in _ORDERED else target.long()
    counted = target if ignore_index is None else target[target != ignore_index]
    if counted.numel():
        (low, high), classes = counted.aminmax(), logits.shape[1]
        if low < 0 or high >= classes:
            alternative = "" if ignore_index is None else f" or ignore_index={ignore_index}"
            wrong = int(low if low < 0 else high)
            raise ValueError(
                f"target: holds class {wrong}, allowed are 0 to {classes - 1}{alternative}"
            )


def explained(
    loss: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    target: Tensor,
    ignore_index: int | None,
) -> Tensor:
    """The value of a loss. Bad data is explained where a look is cheap: on a CPU, in eager mode.

    Raises:
        ValueError: see `check_inputs`.
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
