"""The few rows that span the gradients of all losses of one table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, reduce

import torch
from torch import Tensor

from losswatch.compat import traced
from losswatch.losses.pixels import Pixels, steepness, through_activation
from losswatch.losses.sums import Key, Recipe

Label = tuple[Key, int | None]  # a sum and its class; None: the sum over the classes


@cache
def spanning_sums(recipe: Recipe, classes: int) -> dict[Label, dict[tuple[Key, int], float]]:
    """The few sums whose gradients span those of all sums of the table.

    For hard labels and a softmax over whole batches the gradients of the sums are not independent.
    The sum over the classes of Σ p is the number of pixels, so the first Σ p can be left out. With
    two classes, also Σ p_0 = Σ y_0·p_0 + Σ y_1 - Σ y_1·p_1 and Σ p_0² = Σ p_1² - 2·Σ p_1 + n.

    Returns:
        For each sum that is kept: the sums of the table whose gradients contain its gradient, and
        the factor.
    """
    kept: dict[Label, dict[tuple[Key, int], float]] = {}

    def keep(key: Key, *chosen: int) -> None:
        kept.update({(key, c): {(key, c): 1.0} for c in chosen})

    for key in recipe.keys():
        kind, e = key
        if kind == "log" and not recipe.by_class:
            kept[key, None] = {(key, 0): 1.0}  # the slopes of all classes are equal
        elif kind != "p" or (e != 1 and (e, classes) != (2, 2)):
            keep(key, *range(classes))
        elif classes == 2:
            first, second = kept[("yp", 1.0), 0], kept[("yp", 1.0), 1]
            if e == 1:
                first |= {(key, 0): 1.0, (key, 1): -1.0}
                second |= {(key, 0): -1.0, (key, 1): 1.0}
            else:
                keep(key, 1)
                kept[key, 1][key, 0] = 1.0
                first[key, 0], second[key, 0] = 2.0, -2.0
        else:
            keep(key, *range(1, classes))
            for c in range(1, classes):
                kept[key, c][key, 0] = -1.0
    return kept


def by_spanning_sums(jacobian: Tensor, recipe: Recipe) -> Tensor:
    """From derivatives by all sums of a table, [K, S, C], to those by M `spanning_sums`, [K, M]."""
    classes = jacobian.shape[-1]
    names = [(key, c) for key in recipe.keys() for c in range(classes)]
    slopes = dict(zip(names, jacobian.flatten(1).unbind(1), strict=True))
    columns = []
    for shares in spanning_sums(recipe, classes).values():
        terms = [slopes[n] if share == 1 else share * slopes[n] for n, share in shares.items()]
        columns.append(reduce(torch.add, terms))
    return torch.stack(columns, 1)


def make_rows(labels: Sequence[Label], pixels: Pixels, recipe: Recipe) -> Tensor:
    """The derivatives of M sums by the logits, [N, M, C, *space]."""
    p = pixels.p
    steep = {key: steepness(key, pixels, recipe) for key in dict.fromkeys(k for k, _ in labels)}
    if p.shape[1] == 2:
        ups = []
        for key, c in labels:
            q0, q1 = steep[key].unbind(1)
            if c is None:
                ups.append(q1 * p[:, 0] - q0 * p[:, 1])
            else:
                ups.append(q1 * p[:, 0] if c else -q0 * p[:, 1])
        return antisymmetric(ups)
    units = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
    moves = [unit.view(-1, *(1,) * (p.ndim - 2)) - p for unit in units]  # ∂p_c/∂logits / p_c

    def row(key: Key, c: int | None, out: Tensor | None = None) -> Tensor:
        if c is not None:
            return torch.mul(steep[key][:, c : c + 1], moves[c], out=out)
        total = through_activation(steep[key], p, recipe)
        return total if out is None else out.copy_(total)

    if traced(p):
        return torch.stack([row(*label) for label in labels], 1)
    block = p.new_empty(len(p), len(labels), *p.shape[1:])
    for label, out in zip(labels, block.unbind(1), strict=True):
        row(*label, out)
    return block


def antisymmetric(ups: Sequence[Tensor]) -> Tensor:
    """Rows [N, M, 2, *space] from those for the second logit; the first logit gets minus these."""
    if traced(ups[0]):
        up = torch.stack(list(ups), 1)
        return torch.stack([-up, up], 2)
    n, *space = ups[0].shape
    both = ups[0].new_empty(n, len(ups), 2, *space)
    torch.neg(torch.stack(list(ups), 1, out=both[:, :, 1]), out=both[:, :, 0])
    return both
