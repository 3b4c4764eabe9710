"""The record that findings are made from: numbers by tag and step, and what is known of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from losswatch.events.tags import GRAD_COSINE, GRAD_NORM, LOSS

# What a network may end in; the sign "ends_in" is an index.
ENDS = ("something else", "softmax", "sigmoid", "ReLU", "tanh", "a clamp", "a normalisation")
SIGN, ANSWER, BODY = "sign/", "answer/", "body/"


@dataclass(frozen=True)
class History:
    """T observations of a training.

    Attributes:
        steps: [T], increasing.
        numbers: [T] for each tag; NaN where there is none.
        kinds: of each watched loss, in order: "ce", "dice", "dice_fg" or "other" for the losses of
            this package, "own" for any other.
        trained: the name of the loss that trains, or None.
        terms: the names of the losses that the trained loss is a sum of, as far as they are known.
        activation: see `Observer`.
        ignore_index: see `Observer`.
        heads: the number of observed outputs.
        classes: the number of classes.
        errors: what could not be observed: the step and the line.
        counts_steps: whether `steps` are those of the training, and not a count of observations.
        is_over: whether the training has ended. Before that, findings wait until they are certain.
    """

    steps: np.ndarray
    numbers: Mapping[str, np.ndarray]
    kinds: Mapping[str, str]
    trained: str | None
    terms: tuple[str, ...] = ()
    activation: str = "softmax"
    ignore_index: int | None = None
    heads: int = 1
    classes: int = 2
    errors: tuple[tuple[int, str], ...] = ()
    is_over: bool = True
    counts_steps: bool = False

    def __len__(self) -> int:
        return len(self.steps)

    def get(self, tag: str) -> np.ndarray:
        """The numbers [T] of a tag; NaN if there are none."""
        missing = np.full(len(self.steps), np.nan)
        return self.numbers.get(tag, missing)

    def named(self, name: str, head: int = 0) -> str:
        """The name of a watched loss at a head."""
        return f"{name}.{head}" if f"{LOSS}{name}.{head}" in self.numbers else name

    def value(self, name: str, head: int = 0) -> np.ndarray:
        """The values [T] of a watched loss."""
        return self.get(f"{LOSS}{self.named(name, head)}")

    def norm(self, name: str, head: int = 0) -> np.ndarray:
        """The norms [T] of its gradient."""
        return self.get(f"{GRAD_NORM}{self.named(name, head)}")

    def has_norm(self, name: str) -> bool:
        """Whether the gradient of a watched loss is observed."""
        return f"{GRAD_NORM}{self.named(name)}" in self.numbers

    def cosine(self, a: str, b: str) -> np.ndarray:
        """The cosines [T] between the gradients of two watched losses."""
        a, b = self.named(a), self.named(b)
        if a == b:
            return np.ones(len(self.steps))
        tag = f"{GRAD_COSINE}{a}~{b}"
        return self.get(tag if tag in self.numbers else f"{GRAD_COSINE}{b}~{a}")

    def sign(self, name: str, head: int = 0) -> np.ndarray:
        """A sign [T] (signs.py), one of each head."""
        return self.get(f"{SIGN}{name}.{head}")

    def by_class(self, name: str, head: int = 0) -> np.ndarray:
        """A sign of each class, [T, C]."""
        return np.stack([self.sign(f"{name}/{c}", head) for c in range(self.classes)], 1)

    def answer(self, name: str) -> float:
        """What the trained loss says of a known answer (answers.py); NaN if it was not asked."""
        return first(self.get(f"{ANSWER}{name}"))

    def of_kind(self, *kinds: str) -> list[str]:
        """The names of watched losses of these kinds, without the trained one."""
        return [n for n, kind in self.kinds.items() if kind in kinds and n != self.trained]

    def yard_norm(self, *kinds: str) -> np.ndarray:
        """The largest norm [T] of the watched losses of this package that do not train.

        NaN where it is so small that a ratio to it says nothing.
        """
        names = self.of_kind(*(kinds or ("ce", "dice", "dice_fg", "other")))
        if not names:
            return np.full(len(self), np.nan)
        norm = np.fmax.reduce([self.norm(name) for name in names])
        return np.where(norm > 1e-6, norm, np.nan)

    def start(self) -> float:
        """The first value of the trained loss."""
        return first(self.value(self.trained)) if self.trained else float("nan")

    def best_perfect(self) -> float:
        """The value of the trained loss at a perfect answer, the smallest of three."""
        values = [self.answer(name) for name in ("perfect", "perfect_half", "perfect_quarter")]
        return min(values) if np.isfinite(values).all() else float("nan")

    def foreground(self, name: str, head: int = 0) -> np.ndarray:
        """The share [T] of all classes but the background."""
        return 1 - self.by_class(name, head)[:, 0]

    def is_one_class(self) -> np.ndarray:
        """Whether a batch [T] holds one class only: then a constant answer is a perfect one."""
        return self.by_class("label").max(1) > 1 - 1e-6

    def since(self, is_so: np.ndarray) -> int | None:
        """The first step at which something is so, or None."""
        places = np.flatnonzero(is_so)
        return int(self.steps[places[0]]) if len(places) else None


# -- numbers of which some are NaN -----------------------------------------------------------------


def known(x: np.ndarray) -> np.ndarray:
    """The numbers of x, of any shape, that are not NaN."""
    return x[~np.isnan(x)]


def first(x: np.ndarray) -> float:
    """The first number that is not NaN; NaN if there is none."""
    return float(known(x)[0]) if len(known(x)) else float("nan")


def last(x: np.ndarray) -> float:
    """The last number that is not NaN; NaN if there is none."""
    return float(known(x)[-1]) if len(known(x)) else float("nan")


def lowest(x: np.ndarray) -> float:
    """The smallest number that is not NaN; NaN if there is none."""
    return float(known(x).min()) if len(known(x)) else float("nan")


def highest(x: np.ndarray) -> float:
    """The largest number that is not NaN; NaN if there is none."""
    return float(known(x).max()) if len(known(x)) else float("nan")


def average(x: np.ndarray) -> float:
    """The mean of the numbers that are not NaN; NaN if there are none."""
    return float(known(x).mean()) if len(known(x)) else float("nan")


def middle(x: np.ndarray) -> float:
    """The median of the numbers that are not NaN; NaN if there are none."""
    return float(np.median(known(x))) if len(known(x)) else float("nan")


def holds(is_so: np.ndarray, x: np.ndarray, least: int = 1) -> bool:
    """Whether something is so wherever x is known, which it is at least so often."""
    there = ~np.isnan(x)
    return bool(there.sum() >= least and is_so[there].all())
