"""Converts the values of masks to the labels that losses read."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from losswatch.data.cases import Mask
from losswatch.data.form import IGNORED
from losswatch.text import number_of

REST = "rest"  # stands for all values of a mask that no other class has
NO_CLASS = IGNORED - 1  # the label of values of no class

# Names of classes, each with its values: whole numbers, colours, thresholds or REST.
Classes = tuple[tuple[str, tuple[Any, ...]], ...]


class Coding(NamedTuple):
    """How the values of masks become labels.

    Attributes:
        classes: see `coding.check_classes`.
        ignored: the value of pixels that do not count, a number or a colour; None: all count.
        kinds: the classes in the order of the masks, if each class has its own mask.
        overlap: whether classes may overlap. A mask may then hold values of no class.
        nearest: whether a value of no class gets the class with the nearest value.
        colours: whether values are colours.
        greys: whether an index of a palette means the grey of that index.
        is_found: whether no setting named the classes, so that each value in the masks is a class.
    """

    classes: Classes
    ignored: Any = None
    kinds: tuple[str, ...] = ()
    overlap: bool = False
    nearest: bool = False
    colours: bool = False
    greys: bool = False
    is_found: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes."""
        return tuple(name for name, _ in self.classes)


# --- Values --------------------------------------------------------------------------------------


class Range(NamedTuple):
    """The values that a number, a colour or a threshold stands for: from low to high.

    Attributes:
        is_open: whether low and high themselves are excluded.
    """

    low: float
    high: float
    is_open: bool = False

    def holds(self, values: np.ndarray) -> np.ndarray:
        """Whether each value is in the range, bool [V]."""
        if self.is_open:
            return (values > self.low) & (values < self.high)
        return (values >= self.low) & (values <= self.high)

    @property
    def is_threshold(self) -> bool:
        return self.low != self.high


def is_colour(value: Any) -> bool:
    """Whether a value is written as a colour, `#rrggbb`."""
    return isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value) is not None


def range_of(value: Any) -> Range | None:
    """The range of a number, a colour or a threshold; None for anything else.

    >>> range_of(3), range_of(">=128")
    (Range(low=3, high=3, is_open=False), Range(low=128.0, high=inf, is_open=False))
    >>> range_of("rest")
    """
    if type(value) is int:
        return Range(value, value)
    if is_colour(value):
        return Range(int(value[1:], 16), int(value[1:], 16))
    text = value if isinstance(value, str) else ""
    found = re.fullmatch(r"\s*([<>])(=?)\s*(-?\d+(?:\.\d*)?)\s*", text)
    if not found:
        return None
    side, equal, number = found[1], found[2], float(found[3])
    ends = (number, math.inf) if side == ">" else (-math.inf, number)
    return Range(*ends, is_open=not equal)


def ranges_of(values: Sequence[Any]) -> list[Range]:
    """The ranges of the values that have one."""
    return [found for value in values if (found := range_of(value))]


def as_read(values: np.ndarray, mask: Mask, colours: bool, greys: bool = False) -> np.ndarray:
    """Values of a mask [V] as int64 or float64, whose differences are exact.

    Args:
        mask: the mask that holds the values.
        colours, greys: see `Coding`; a colour is 0xRRGGBB.
    """
    values = values.astype(np.float64 if values.dtype.kind == "f" else np.int64)
    if mask.palette and (colours or greys):
        found = np.array([mask.palette.get(int(v), 0) for v in values], np.int64)
        return found if colours else found & 255
    return values * 0x010101 if colours and not mask.colours else values


# --- Labels --------------------------------------------------------------------------------------


def owners(values: np.ndarray, coding: Coding) -> tuple[np.ndarray, np.ndarray]:
    """The label of each value of a mask whose classes do not overlap.

    A value that is a single value of one class and within a threshold of another belongs to the
    first class.

    Args:
        values: [V], see `as_read`.

    Returns:
        labels int16 [V], with `IGNORED` for values that do not count and `NO_CLASS` for values of
        no class; and bool [V], whether a value got the label of the nearest class.
    """
    labels = np.full(len(values), NO_CLASS, np.int16)
    ranges = [(i, found) for i, (_, class_values) in enumerate(coding.classes)
              for found in ranges_of(class_values)]  # fmt: skip
    ignored = [(IGNORED, found) for found in ranges_of([coding.ignored])]
    thresholds = [pair for pair in ranges if pair[1].is_threshold]
    singles = [pair for pair in ranges if not pair[1].is_threshold]
    for label, found in (*thresholds, *singles, *ignored):
        labels[found.holds(values)] = label
    for label, (_, class_values) in enumerate(coding.classes):
        if REST in class_values:
            labels[labels == NO_CLASS] = label
    off = (labels == NO_CLASS) & coding.nearest
    # A threshold tells all of its values, so other values get the nearest single value.
    near = (singles or thresholds) if thresholds else singles + ignored
    if off.any() and near:
        distances = [_distance(values[off], found, coding.colours) for _, found in near]
        labels[off] = np.array([label for label, _ in near])[np.argmin(distances, axis=0)]
    return labels, off


def _distance(values: np.ndarray, target: Range, colours: bool) -> np.ndarray:
    """The distances of values [V] from a range; for colours the squares of the distances."""
    if not colours:
        return np.maximum(np.maximum(target.low - values, values - target.high), 0)
    parts = [((values >> k & 255) - (int(target.low) >> k & 255)) ** 2 for k in (16, 8, 0)]
    return np.sum(parts, axis=0)


def members(values: np.ndarray, class_values: Sequence[Any]) -> np.ndarray:
    """Whether each value of a mask [V] belongs to a class that may overlap others, bool [V]."""
    if REST in class_values:
        return values != 0
    return np.any([found.holds(values) for found in ranges_of(class_values)], axis=0)


def _number(name: str, coding: Coding) -> int:
    """The index of the mask from which a class is read."""
    return coding.kinds.index(name) if coding.overlap and coding.kinds else 0


class Counts(NamedTuple):
    """Numbers of pixels of an image.

    Attributes:
        classes: pixels of each class.
        ignored: pixels that do not count.
        off: pixels of no class that got the nearest one.
    """

    classes: list[int]
    ignored: int = 0
    off: int = 0


def count_classes(masks: Sequence[Mask], counts: Sequence[np.ndarray], coding: Coding) -> Counts:
    """The numbers of pixels of an image by class.

    Args:
        masks: of the image, with only the distinct values [V].
        counts: for each mask, how many pixels have each value, [V].

    Raises:
        ValueError: a value belongs to no class.
    """
    read = [as_read(mask.values, mask, coding.colours, coding.greys) for mask in masks]
    if coding.overlap:
        found = []
        for name, class_values in coding.classes:
            i = _number(name, coding)
            found.append(int(counts[i][members(read[i], class_values)].sum()))
        return Counts(found)
    labels, off = owners(read[0], coding)
    for value, count in zip(
        read[0][labels == NO_CLASS], counts[0][labels == NO_CLASS], strict=True
    ):
        shown = f"#{value:06x}" if coding.colours else f"{value:.6g}"
        way = "add it to one" if value == int(value) else "give a threshold, such as '>0.5'"
        raise ValueError(
            f"value {shown}, which no class has; data.classes are {dict(coding.classes)}: {way}, "
            f"or take the nearest by data.nearest=true ({number_of(int(count), 'pixel')})"
        )
    totals = [int(counts[0][labels == i].sum()) for i in range(len(coding.classes))]
    return Counts(totals, int(counts[0][labels == IGNORED].sum()), int(counts[0][off].sum()))


def distinct_values(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values [V] of an array, and how many pixels have each value."""
    if values.dtype == np.uint8:
        values = values.astype(np.uint16)  # which numpy sorts five times as fast
    return np.unique(values, return_counts=True)


def to_label(masks: Sequence[Mask], coding: Coding) -> np.ndarray:
    """Labels int16 [1, *space], or zeros and ones [K, *space] if classes overlap.

    Args:
        masks: one mask with all classes, or one mask for each class.
    """
    if not coding.overlap:
        return _look_up(masks[0], coding, lambda values: owners(values, coding)[0])[None]
    planes = []
    for name, class_values in coding.classes:
        mask = masks[_number(name, coding)]
        is_member = functools.partial(members, class_values=class_values)
        planes.append(_look_up(mask, coding, is_member))
    return np.stack(planes).astype(np.int16)


def _look_up(mask: Mask, coding: Coding, function: Any) -> np.ndarray:
    """The result of a function of a mask's distinct values, at each pixel: [*space]."""
    if mask.values.dtype in (np.uint8, np.uint16):
        values = np.arange(int(mask.values.max()) + 1)
        return function(as_read(values, mask, coding.colours, coding.greys))[mask.values]
    values, where = np.unique(mask.values, return_inverse=True)
    found = function(as_read(values, mask, coding.colours, coding.greys))
    return found[where.reshape(mask.values.shape)]
