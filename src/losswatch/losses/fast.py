"""The table of sums and its derivative a second time, as fast as a CPU allows.

The functions here work for class indices, a softmax and eager mode on a CPU. The functions with the
same names in pixels.py are the plain form, and tests/losses/test_losses_fast.py compares both. In
large images allocating a tensor costs more than filling it, so tensors are few and are written in
place. With two classes the labels become one-hot. With more classes they index and scatter instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from losswatch.compat import softmax_backward, traced
from losswatch.losses.pixels import (
    Pixels,
    counted,
    shared_out,
    spread,
    stack_sums,
    unclipped,
    wide,
)
from losswatch.losses.sums import Key, Recipe


def is_fast(logits: Tensor, target: Tensor, recipe: Recipe) -> bool:
    """Whether these functions can be used."""
    usual = recipe.activation == "softmax" and recipe.intersection == "product"
    eager = logits.is_cpu and not traced(logits)
    dense = logits.numel() > 0 and target.ndim < logits.ndim > 2
    return usual and eager and dense and not recipe.by_class


def read_pixels(logits: Tensor, target: Tensor, recipe: Recipe) -> Pixels:
    """See `pixels.read_pixels`; with p of each label, and without y for more than two classes."""
    x, log_p = wide(logits), None
    if 0 in recipe.clips:
        log_p = x.log_softmax(1)
    if x.shape[1] == 2:  # a sigmoid of the difference takes half the time of a softmax
        p = torch.empty_like(x)
        torch.neg(torch.sub(x[:, 1], x[:, 0], out=p[:, 1]), out=p[:, 0])
        p = p.sigmoid_()
    else:
        p = x.softmax(1) if log_p is None else log_p.exp()
    label, valid = counted(target, p, recipe)
    if p.shape[1] > 2:
        p_of_label = p.gather(1, label)
        p_of_label = p_of_label if valid is None else p_of_label * valid
        return Pixels(p, p.new_empty(0), valid, log_p, p_of_label)
    y = torch.empty_like(p)
    torch.sub(1, y[:, 1:].copy_(label), out=y[:, :1])
    y = y if valid is None else y.mul_(valid)
    p_of_label = torch.addcmul(p[:, :1] * y[:, :1], p[:, 1:], y[:, 1:])
    return Pixels(p, y, valid, log_p, p_of_label)


def sums_of(pixels: Pixels, target: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """See `pixels.sums_of`."""
    p, y, valid, log_p, p_of_label = pixels
    assert p_of_label is not None
    space = tuple(range(2, p.ndim))
    axes = {"row": space[-1:], "sample": space, "batch": (0, *space)}[recipe.over]

    def total(x: Tensor, axes: tuple[int, ...] = axes) -> Tensor:
        """[N, C, *space] to [*groups, C]."""
        x = x.sum(axes) if axes else x
        return x.movedim(1, -1) if recipe.over == "row" else x

    def by_label(values: Tensor) -> Tensor:
        """[N, 1, *space] to [*groups, C], each value added to the class of its label.

        Rows are added one by one: scattering adds number after number, and a float32 sum of a
        million numbers would lose digits that way.
        """
        label = counted(target, p, recipe)[0].squeeze(1)
        sums = p.new_zeros(*label.shape[:-1], p.shape[1])
        sums = sums.scatter_add_(-1, label, values.squeeze(1)).movedim(-1, 1)
        return total(sums, axes[:-1])

    weighed = p if valid is None or not recipe.exponents else p * valid

    def entry(kind: str, number: float) -> Tensor:
        if kind == "yp":
            return total(p * y) if y.numel() else by_label(p_of_label)
        if kind == "p" and number == 2:  # row by row; reads p once and writes no p²
            squares = torch.linalg.vector_norm(weighed, dim=-1).square()
            return total(squares, axes[:-1])
        if kind == "p":
            return total(weighed if number == 1 else weighed**number)
        if log_p is None or number:
            log = p_of_label.clamp(number, 1 - number).log_()
        else:
            log = log_p.gather(1, counted(target, p, recipe)[0])
        return shared_out((log if valid is None else log.mul_(valid)).sum(), p)

    one = torch.ones_like(p_of_label) if valid is None else valid
    labels = [total(y) if y.numel() else by_label(one)] * len(recipe.label_exponents(hard=True))
    groups = {"row": (len(p), *p.shape[2:-1]), "sample": (len(p),)}.get(recipe.over, ())
    logit_sums = [entry(*key) for key in recipe.keys()]
    return stack_sums(logit_sums, groups, p), stack_sums(labels, groups, p)


def by_logits(slopes: Tensor, pixels: Pixels, target: Tensor, recipe: Recipe) -> Tensor:
    """See `pixels.by_logits`; sums whose slope is 0 cost no time."""
    if recipe.over == "batch":  # numbers, which are free to read on a CPU
        read: list[Any] = slopes.tolist()
        used = {key: slope for key, slope in zip(recipe.keys(), read, strict=True) if any(slope)}
    else:
        pairs = zip(recipe.keys(), slopes.unbind(-2), strict=True)
        used = {key: spread(slope, pixels.p, recipe).unbind(1) for key, slope in pairs}
    if not used:
        return torch.zeros_like(pixels.p)
    if pixels.p.shape[1] == 2:
        return _of_two(used, pixels)
    return _of_many(used, pixels, counted(target, pixels.p, recipe)[0])


def _of_two(slopes: Mapping[Key, Any], pixels: Pixels) -> Tensor:
    """For two classes: the derivative by the first logit is minus that by the second."""
    p, y, valid, _, p_of_label = pixels
    assert p_of_label is not None
    (p0, p1), (y0, y1) = p.unbind(1), y.unbind(1)
    both = torch.empty_like(p)
    up = both[:, 1].zero_()
    for (kind, e), (a0, a1) in slopes.items():
        if kind == "yp":
            _add_product(_add_product(up, y1, a1), y0, -a0)
        elif kind == "p" and e == 1:
            up.add_(a1 - a0)
        elif kind == "p":
            _add_product(up, p1 if e == 2 else p1.clamp_min(1e-30) ** (e - 1), e * a1)
            _add_product(up, p0 if e == 2 else p0.clamp_min(1e-30) ** (e - 1), -e * a0)
    if any(kind != "log" for kind, _ in slopes):
        up.mul_(p0).mul_(p1)
        if valid is not None:
            up.mul_(valid[:, 0])
    for (kind, clip), (slope, _) in slopes.items():
        if kind == "log":
            row = (y1 * p0).addcmul_(y0, p1, value=-1)
            row = row.mul_(unclipped(p_of_label[:, 0], clip)) if clip else row
            up.add_(row, alpha=slope)
    torch.neg(up, out=both[:, 0])
    return both


def _of_many(slopes: Mapping[Key, Any], pixels: Pixels, label: Tensor) -> Tensor:
    """For any number of classes: terms of the label alone are scattered to its channel."""
    p, _, valid, _, p_of_label = pixels
    assert p_of_label is not None
    field: Tensor | None = None  # the derivative by p
    for (kind, e), slope in slopes.items():
        if kind != "p":
            continue
        slope = as_tensor(slope, p)
        if e == 1:
            field = slope.expand_as(p).contiguous() if field is None else field.add_(slope)
        else:
            power = p if e == 2 else p.clamp_min(1e-30) ** (e - 1)
            field = e * slope * power if field is None else field.addcmul_(power, slope, value=e)
    if (slope := slopes.get(("yp", 1.0))) is not None:
        if isinstance(slope[0], Tensor):
            at_label = as_tensor(slope, p).expand_as(p).gather(1, label)
        else:
            at_label = torch.take(p.new_tensor(slope), label)
        field = torch.zeros_like(p) if field is None else field
        field = field.scatter_add_(1, label, at_label)
    gradient: Tensor | None = None
    if field is not None:
        gradient = softmax_backward(field if valid is None else field.mul_(valid), p)
    for (kind, clip), slope in slopes.items():
        if kind == "log":
            share = unclipped(p_of_label, clip) if clip else torch.ones_like(p_of_label)
            share = share.mul_(slope[0]) if valid is None else share.mul_(slope[0]).mul_(valid)
            gradient = -share * p if gradient is None else gradient.addcmul_(share, p, value=-1)
            gradient.scatter_add_(1, label, share)
    assert gradient is not None
    return gradient


def as_tensor(slope: Any, p: Tensor) -> Tensor:
    """The slopes of the classes, to broadcast with p [N, C, *space]."""
    if isinstance(slope[0], Tensor):
        return torch.stack(list(slope), 1)
    return p.new_tensor(slope).view(-1, *(1,) * (p.ndim - 2))


def _add_product(total: Tensor, x: Tensor, factor: float | Tensor) -> Tensor:
    """total + factor·x, in place."""
    if isinstance(factor, Tensor):
        return total.addcmul_(x, factor.expand_as(x))
    return total.add_(x, alpha=factor)
