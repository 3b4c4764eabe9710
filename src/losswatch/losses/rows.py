"""The few rows that span the gradients of all losses of one table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from losswatch.losses.pixels import Pixels, one_hot, steepness, through_activation
from losswatch.losses.sums import Key, Recipe

Label = tuple[Key, int | None]  # a sum and its class; None: the sum over classes


def fold(jacobian: Tensor, recipe: Recipe) -> dict[Label, Tensor]:
    """Derivatives of losses by few sums, whose rows span the gradients of all of them.

    For hard labels and a softmax over whole batches the gradients of the sums are not independent.
    The sum over classes of Σ p is the number of pixels, so the first one can be left out. With two
    classes, moreover, Σ p_0 = Σ y_0·p_0 + Σ y_1 - Σ y_1·p_1 and Σ p_0² = Σ p_1² - 2·Σ p_1 + n.

    Args:
        jacobian: [K, S, C], derivatives of K losses by the table.

    Returns:
        [K] for each sum that is kept.
    """
    slopes = dict(zip(recipe.keys(), jacobian.unbind(-2), strict=True))
    kept: dict[Label, Tensor] = {}
    by_p = {key: slope.unbind(-1) for key, slope in slopes.items() if key[0] == "p"}
    if recipe.exponents:
        hits = list(slopes["yp", None].unbind(-1))
        if len(hits) == 2:
            for e, (first, second) in by_p.items():
                if e[1] in (1, 2):
                    shift = first - second if e[1] == 1 else 2 * first
                    hits = [hits[0] + shift, hits[1] - shift]
        kept |= {(("yp", None), c): slope for c, slope in enumerate(hits)}
    for key, (first, *others) in by_p.items():
        if len(others) == 1 and key[1] in (1, 2):
            if key[1] == 2:
                kept[key, 1] = first + others[0]
        elif key[1] == 1:
            kept |= {(key, c): slope - first for c, slope in enumerate(others, start=1)}
        else:
            kept |= {(key, c): slope for c, slope in enumerate((first, *others))}
    for key, slope in slopes.items():
        if key[0] == "log" and not recipe.by_class:
            kept[key, None] = slope[..., 0]  # all are equal
        elif key[0] in ("log", "all"):
            kept |= {(key, c): part for c, part in enumerate(slope.unbind(-1))}
    return kept


def rows(labels: Sequence[Label], pixels: Pixels, recipe: Recipe) -> Tensor:
    """The derivatives of M sums by the logits, [N, M, C, *space]."""
    p = pixels.p
    steep = {key: steepness(key, pixels, recipe) for key in dict.fromkeys(k for k, _ in labels)}
    if p.shape[1] == 2:
        ups = []
        for key, c in labels:
            q0, q1 = steep[key].unbind(1)
            first, second = -q0 * p[:, 1], q1 * p[:, 0]
            ups.append(first + second if c is None else (first, second)[c])
        up = torch.stack(ups, 1)
        return torch.stack([-up, up], 2)
    moves = []
    for key, c in labels:
        if c is None:
            moves.append(through_activation(steep[key], p, recipe))
        else:
            unit = one_hot(torch.full_like(p[:1, :1], c, dtype=torch.int64), p)
            moves.append(steep[key][:, c : c + 1] * (unit - p))
    return torch.stack(moves, 1)
