"""From pixels to sums, and from the derivatives by the sums back to the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losswatch.compat import traced
from losswatch.losses.sums import Key, Recipe


class Pixels(NamedTuple):
    """The inputs of the sums and of their derivative, pixel by pixel."""

    p: Tensor  # [N, C, *space] probabilities
    y: Tensor  # [N, C, *space] labels, 0 where ignored
    valid: Tensor | None  # [N, 1 or C, *space] 0 where ignored, else 1; None: no pixel is ignored
    log_p: Tensor | None = None  # [N, C, *space] by log-softmax; None: not needed
    p_of_label: Tensor | None = None  # [N, 1, *space], 0 where ignored; only fast.py has it


def is_hard(logits: Tensor, target: Tensor) -> bool:
    """Whether the target holds class indices."""
    return target.ndim < logits.ndim


def wide(x: Tensor) -> Tensor:
    """float32, or float64 where x is float64."""
    return x if x.dtype == torch.float64 else x.float()


def read_pixels(logits: Tensor, target: Tensor, recipe: Recipe) -> Pixels:
    """Probabilities and labels. Logits [N, C] get a spatial axis with one pixel."""
    x = wide(logits)
    x = x.unsqueeze(-1) if x.ndim == 2 else x.view_as(x)
    log_p = x.log_softmax(1) if 0 in recipe.clips else None
    if recipe.activation != "softmax":
        p = x.sigmoid() if recipe.activation == "sigmoid" else x
    elif x.shape[1] == 2:  # exact for both classes, where 1 - p would lose a small p
        difference = x[:, 1] - x[:, 0]
        p = torch.stack([-difference, difference], 1).sigmoid()
    else:
        p = x.softmax(1) if log_p is None else log_p.exp()
    if not is_hard(logits, target):
        y, valid = counted_labels(target, p, recipe)
        return Pixels(p, y, valid, log_p)
    label, valid = counted(target, p, recipe)
    return Pixels(p, one_hot(label, p, valid), valid, log_p)


def counted_labels(target: Tensor, p: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor | None]:
    """Labels [N, C, *space], 0 where ignored, and which count (None: all of them).

    A softmax ignores a whole pixel if any of its labels is `ignore_index`. Otherwise each channel
    ignores its own pixels.
    """
    y = target.to(p.dtype).view(p.shape)
    if recipe.ignore_index is None:
        return y, None
    keep = y.ne(recipe.ignore_index)
    if recipe.activation == "softmax":
        keep = keep.all(1, keepdim=True)
    return torch.where(keep, y, 0), keep.to(p.dtype)


def counted(target: Tensor, p: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor | None]:
    """Class indices as [N, 1, *space], 0 where ignored, and which count (None: all of them)."""
    label = target.long().unsqueeze(1)
    label = label.unsqueeze(-1) if label.ndim < p.ndim else label
    if recipe.ignore_index is None:
        return label, None
    keep = label.ne(recipe.ignore_index)
    return torch.where(keep, label, 0), keep.to(p.dtype)


def one_hot(label: Tensor, p: Tensor, valid: Tensor | None = None) -> Tensor:
    """Labels [N, 1, *space] as 0 and 1 [N, C, *space] with the type of p; 0 where not `valid`."""
    classes = torch.arange(p.shape[1], device=label.device).view(-1, *(1,) * (p.ndim - 2))
    if traced(label):  # without a comparison: a compiler would keep its bits, slow to read on a CPU
        y = (1 - (label.to(p.dtype) - classes.to(p.dtype)).abs()).clamp_min(0)
    else:
        y = (label == classes).to(p.dtype)
    return y if valid is None else y * valid


def unclipped(p: Tensor, clip: float) -> Tensor:
    """1 where p lies in [clip, 1 - clip], else 0."""
    if traced(p):  # without a comparison, as in `one_hot`
        return 1 - (p - p.clamp(clip, 1 - clip)).sign().abs()
    return (p == p.clamp(clip, 1 - clip)).to(p.dtype)


# -- sums ------------------------------------------------------------------------------------------


def sums_of(pixels: Pixels, recipe: Recipe, hard: bool) -> tuple[Tensor, Tensor]:
    """The sums that depend on the logits, and those of the labels, each [*groups, S, C]."""
    p, y, valid, log_p, _ = pixels

    def total(x: Tensor) -> Tensor:
        """[N, C, *space] to [*groups, C]."""
        if recipe.over == "row":
            return x.sum(-1).movedim(1, -1)
        axes = [*range(2, x.ndim)]
        return x.sum(axes if recipe.over == "sample" else [0, *axes])

    def entry(kind: str, number: float) -> Tensor:
        if kind == "yp":
            return total(torch.minimum(p, y) if recipe.intersection == "minimum" else p * y)
        if kind == "p":
            power = p if number == 1 else p**number
            return total(power if valid is None else power * valid)
        log = p.clamp(number, 1 - number).log() if number or log_p is None else log_p
        if kind == "all":
            return total(log if valid is None else log * valid)
        log = torch.where(y > 0, y * log, 0.0)
        # Sum rows first: the order that a compiler takes loses two digits more.
        return total(log) if recipe.by_class else shared_out(log.sum(1).sum(-1).sum(), p)

    groups = {"row": (len(p), *p.shape[2:-1]), "sample": (len(p),)}.get(recipe.over, ())
    counts = p.new_ones(()) if valid is None else valid
    powers = {0.0: counts.expand_as(p), 1.0: y}
    labels = [total(powers[e] if e in powers else y**e) for e in recipe.label_exponents(hard)]
    logit_sums = [entry(*key) for key in recipe.keys()]
    return stack_sums(logit_sums, groups, p), stack_sums(labels, groups, p)


def shared_out(total: Tensor, p: Tensor) -> Tensor:
    """A scalar as [C]: each class gets a C-th of it."""
    return (total / p.shape[1]).expand(p.shape[1])


def stack_sums(sums: Sequence[Tensor], groups: tuple[int, ...], p: Tensor) -> Tensor:
    """S sums [*groups, C] as [*groups, S, C]; there may be none."""
    return torch.stack(list(sums), -2) if sums else p.new_empty(*groups, 0, p.shape[1])


def steepness(key: Key, pixels: Pixels, recipe: Recipe) -> Tensor:
    """The derivative by p of the summands of a sum, times p, [N, C, *space].

    Without an activation (the logits are p), the derivative itself.
    """
    (kind, number), (p, y, valid, _, p_of_label) = key, pixels
    if kind == "yp" and recipe.intersection == "minimum":
        y = 0.5 * (1 - torch.sign(p - y))  # derivative of min(y, p); 1/2 where both are equal
    elif kind == "p":
        # p^e has no derivative at p = 0 for e < 1, but an activation's derivative is 0 there.
        base = p if recipe.activation == "none" else p.clamp_min(1e-30)
        if number in (1, 2):
            y = torch.ones_like(p) if number == 1 else 2 * p
        else:
            y = number * base ** (number - 1)
        y = y if valid is None else y * valid
    elif kind == "all":
        y = torch.ones_like(p) if valid is None else valid.expand_as(p)
    if kind in ("log", "all"):
        clipped = p if p_of_label is None or kind == "all" else p_of_label
        return y * unclipped(clipped, number) if number else y
    return y if recipe.activation == "none" else y * p


def by_logits(slopes: Tensor, pixels: Pixels, recipe: Recipe) -> Tensor:
    """The derivative by the logits [N, C, *space], from the derivatives `slopes` by the sums.

    Args:
        slopes: [*groups, S, C], by the sums of `recipe.keys`.
    """
    p = pixels.p
    q = torch.zeros_like(p)
    for key, slope in zip(recipe.keys(), slopes.unbind(-2), strict=True):
        q = q + spread(slope, p, recipe) * steepness(key, pixels, recipe)
    return through_activation(q, p, recipe)


def spread(slope: Tensor, p: Tensor, recipe: Recipe) -> Tensor:
    """[*groups, C] in a shape that broadcasts with p [N, C, *space]."""
    if recipe.over == "row":
        return slope.movedim(-1, 1).unsqueeze(-1)
    return slope.view(*slope.shape, *(1,) * (p.ndim - 2))


def through_activation(q: Tensor, p: Tensor, recipe: Recipe) -> Tensor:
    """From p times the derivative by p to the derivative by the logits."""
    if recipe.activation == "none":
        return q
    if recipe.activation == "sigmoid":
        return q * (1 - p)
    if p.shape[1] == 2:  # equal to the last line, but without a difference of two close numbers
        up = q[:, 1] * p[:, 0] - q[:, 0] * p[:, 1]
        return torch.stack([-up, up], 1)
    return q - p * q.sum(1, keepdim=True)
