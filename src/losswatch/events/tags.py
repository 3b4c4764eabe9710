"""The names of what training writes.

Imports nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

# What is observed while training, each followed by a loss's name, or by two as in "a~b".
LOSS, GRAD_NORM, GRAD_COSINE = "loss/", "grad_norm/", "grad_cosine/"
WATCHED = (LOSS, GRAD_NORM, GRAD_COSINE)

PREDICTED = "predicted"  # val/predicted/<class>: the share of pixels that get the class
PICTURES = "images/input_label_prediction"  # of each validation
FINDINGS = "findings"  # a text, see doctor/README.md
TRAINED = "trained"  # a text: the name of the trained loss of a training without train.py
CURVES = "images/curves"  # of the whole run: each loss in a colour of its own


def watched_tags(names: Sequence[str], cosines: bool) -> list[str]:
    """The scalars of one step: values, norms, and the cosines of all pairs.

    >>> watched_tags(["cce", "dice"], cosines=True)
    ['loss/cce', 'loss/dice', 'grad_norm/cce', 'grad_norm/dice', 'grad_cosine/cce~dice']
    """
    pairs = combinations(names, 2) if cosines else ()
    return [
        *(f"{LOSS}{name}" for name in names),
        *(f"{GRAD_NORM}{name}" for name in names),
        *(f"{GRAD_COSINE}{a}~{b}" for a, b in pairs),
    ]


def watched_names(tags: Iterable[str]) -> set[str]:
    """The losses that have a value or a gradient norm among these tags.

    >>> sorted(watched_names(["loss/dice", "grad_norm/cce", "grad_norm/dice", "val/loss/iou"]))
    ['cce', 'dice']
    """
    return {
        tag.removeprefix(LOSS).removeprefix(GRAD_NORM)
        for tag in tags
        if tag.startswith((LOSS, GRAD_NORM))
    }
