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
        found = self.get(f"{ANSWER}{name}")
        found = found[~np.isnan(found)]
        return float(found[0]) if len(found) else float("nan")

    def of_kind(self, *kinds: str) -> list[str]:
        """The names of watched losses of these kinds, without the trained one."""
        return [n for n, kind in self.kinds.items() if kind in kinds and n != self.trained]
