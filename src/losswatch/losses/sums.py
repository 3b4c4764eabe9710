"""The sums over pixels that losses read, by name.

A Dice loss or a cross entropy reads the logits only through a few sums over pixels, such as
Σ y·p and Σ p of each class. So there are two steps:

    logits, target  --sum_table.py-->  `Sums`  --a loss's `from_sums`-->  its value

The first step is one `torch.autograd.Function`, with the only derivative by pixels in this package.
The second step is ordinary differentiable code on tensors of C numbers.

With y the target as one-hot or soft labels and p the probabilities, the sums are:

    key           sum                                      summand's derivative by p, times p
    ("yp", 1)     Σ y·p, or Σ min(y, p)                    y·p
    ("p", e)      Σ p^e                                    e·p^e
    ("log", c)    Σ y·log p, p clipped to [c, 1 - c]       y where p is not clipped
    ("all", c)    Σ log p, likewise                        1 where p is not clipped

and Σ y^e, which does not depend on the logits. With q the last column, weighted by the derivative
of the loss by each sum, the derivative by the logits is q - p·Σ_c q for a softmax and q·(1 - p) for
a sigmoid.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from torch import Tensor

Key = tuple[str, float]


class Recipe(NamedTuple):
    """Which sums a table holds, and how they are computed from the pixels."""

    activation: str = "softmax"  # "softmax", "sigmoid" or "none": how p is computed from the logits
    over: str = "batch"  # the pixels of one sum: "row", "sample" or "batch"
    intersection: str = "product"  # "product" or "minimum"
    ignore_index: int | None = None  # pixels with this label do not count
    exponents: tuple[float, ...] = ()  # e of Σ p^e and Σ y^e
    clips: tuple[float, ...] = ()  # c of Σ y·log p; 0: no clipping, log p by log-softmax
    by_class: bool = False  # Σ y·log p class by class, and Σ log p; else only the total

    @property
    def family(self) -> tuple:
        """Recipes with equal families can share a table."""
        return self.activation, self.over, self.intersection, self.ignore_index

    def union(self, others: Iterable[Recipe]) -> Recipe:
        """The recipe of a table with the sums of this recipe and of others of its family."""
        recipes = [self, *others]
        return self._replace(
            exponents=tuple(sorted({e for r in recipes for e in r.exponents})),
            clips=tuple(sorted({c for r in recipes for c in r.clips})),
            by_class=any(r.by_class for r in recipes),
        )

    @cache  # noqa: B019 - a handful of recipes in a process
    def keys(self) -> tuple[Key, ...]:
        """The sums that depend on the logits, in the table's order."""
        dice = [("yp", 1.0), *(("p", e) for e in self.exponents)] if self.exponents else []
        logs = [("log", clip) for clip in self.clips]
        of_all = [("all", clip) for clip in self.clips if self.by_class]
        return *dice, *logs, *of_all

    @cache  # noqa: B019
    def label_exponents(self, hard: bool) -> tuple[float, ...]:
        """e of the sums Σ y^e, in the table's order. For hard labels each of these sums is Σ y.

        For labels [N, C, *space], e = 0 stands for the number of pixels that are not ignored.
        """
        exponents = set() if hard else set(self.exponents)
        if self.by_class or self.ignore_index is not None or (hard and self.exponents):
            exponents |= {1.0}
        if self.ignore_index is not None and not hard:
            exponents |= {0.0}
        return tuple(sorted(exponents))


class Sums(NamedTuple):
    """The sums of a batch by name, each [*groups, C]; groups is (), [N] or [N, *space[:-1]]."""

    logit_sums: dict[Key, Tensor]  # those that depend on the logits, by `Recipe.keys`
    labels: dict[float, Tensor]  # Σ y^e by e (`Recipe.label_exponents`)
    pixels: float | Tensor  # the number of pixels, with ignored ones

    @property
    def tp(self) -> Tensor:
        """Σ y·p, or Σ min(y, p)."""
        return self.logit_sums["yp", 1.0]

    def p(self, exponent: float) -> Tensor:
        """Σ p^exponent."""
        return self.logit_sums["p", exponent]

    def y(self, exponent: float = 1.0) -> Tensor:
        """Σ y^exponent."""
        return self.labels[exponent] if exponent in self.labels else self.labels[1.0]

    @property
    def counted(self) -> Tensor:
        """How many pixels are not ignored, [*groups]. Exists only with an `ignore_index`.

        Where each channel ignores its own pixels, this is the largest number of any channel.
        """
        return self.labels[0.0].amax(-1) if 0.0 in self.labels else self.y().sum(-1)

    def log(self, clip: float) -> Tensor:
        """Σ y·log p; without `Recipe.by_class`, each class has a C-th of the total."""
        return self.logit_sums["log", clip]

    def log_of_all(self, clip: float) -> Tensor:
        """Σ log p."""
        return self.logit_sums["all", clip]
