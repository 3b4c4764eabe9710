"""From the values of masks to the labels that losses read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from losswatch.data.cases import Mask
from losswatch.data.form import IGNORED
from losswatch.text import number_of

REST = "rest"  # stands for all values of a mask that no other class has
NOBODY = IGNORED - 1  # the label of a value that no class has

# From the name of a class to its values: whole numbers, colours, thresholds or REST.
Classes = Mapping[str, tuple[Any, ...]]


class Coding(NamedTuple):
    """How the values of masks become labels.

    Attributes:
        classes: of `check_classes`.
        ignored: the value of pixels that count nowhere, a number or a colour; None: there is none.
        overlap: whether classes may overlap. A mask with values that no class has is then right.
        nearest: whether a value that no class has belongs to the class of the nearest value.
        colours: whether a class is its colours.
        is_found: whether each value that was found is a class.
    """

    classes: Classes
    ignored: Any = None
    overlap: bool = False
    nearest: bool = False
    colours: bool = False
    is_found: bool = False


def is_colour(value: Any) -> bool:
    """Whether a value is written as a colour, `#rrggbb`."""
    return isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value) is not None


def range_of(value: Any) -> tuple[float, float] | None:
    """The smallest and the largest value that a value, a colour or a threshold stands for.

    >>> range_of(3), range_of("#0000ff"), range_of(">=128"), range_of("rest")
    ((3, 3), (255, 255), (128.0, inf), None)
    """
    if type(value) is int:
        return value, value
    if is_colour(value):
        return int(value[1:], 16), int(value[1:], 16)
    found = re.fullmatch(
        r"\s*([<>])(=?)\s*(-?\d+(?:\.\d*)?)\s*", value if isinstance(value, str) else ""
    )
    if not found:
        return None
    side, equal, number = found[1], found[2], float(found[3])
    end = math.inf if side == ">" else -math.inf
    start = number if equal else math.nextafter(number, end)
    return min(start, end), max(start, end)


def ranges_of(values: Sequence[Any]) -> list[tuple[float, float]]:
    """`range_of` each value that has one."""
    return [found for value in values if (found := range_of(value))]


def owners(values: np.ndarray, coding: Coding) -> tuple[np.ndarray, np.ndarray]:
    """The label of each value of a mask whose classes do not overlap.

    Args:
        values: [V], numbers, or colours as 0xRRGGBB.

    Returns:
        labels int16 [V], where `IGNORED` counts nowhere and `NOBODY` belongs to no class; and bool
        [V], whether a value has its label since it is near to a class.
    """
    labels = np.full(len(values), NOBODY, np.int16)
    exact, thresholds = _ranges(coding)
    for label, low, high in (*thresholds, *exact):
        labels[(values >= low) & (values <= high)] = label
    for label, wanted in enumerate(coding.classes.values()):
        if REST in wanted:
            labels[labels == NOBODY] = label
    off = labels == NOBODY
    if not coding.nearest or not (ranges := exact or thresholds):
        return labels, np.zeros_like(off)
    # A threshold has said which values are its own.
    lost = values[off]
    distances = [
        _colour_distance(lost, int(low))
        if coding.colours
        else np.maximum(np.maximum(low - lost, lost - high), 0)
        for _, low, high in ranges
    ]
    labels[off] = np.array([label for label, *_ in ranges])[np.argmin(distances, axis=0)]
    return labels, off


Ranges = list[tuple[int, float, float]]  # label, smallest and largest value


def _ranges(coding: Coding) -> tuple[Ranges, Ranges]:
    """The single values of all classes and of ignored pixels, and the thresholds."""
    given = [*enumerate(coding.classes.values()), (IGNORED, (coding.ignored,))]
    ranges = [(label, low, high) for label, values in given for low, high in ranges_of(values)]
    exact = [found for found in ranges if found[1] == found[2]]
    return exact, [found for found in ranges if found[1] != found[2]]


def _colour_distance(values: np.ndarray, colour: int) -> np.ndarray:
    parts = [((values.astype(int) >> k & 255) - (colour >> k & 255)) ** 2 for k in (16, 8, 0)]
    return sum(parts)  # type: ignore[return-value]


def members(values: np.ndarray, name: str, coding: Coding) -> np.ndarray:
    """Whether each value of a mask [V] is of a class that may overlap with others."""
    wanted = coding.classes[name]
    if REST in wanted:
        return values != 0
    inside = [(values >= low) & (values <= high) for low, high in ranges_of(wanted)]
    return np.any(inside, axis=0)


class Counts(NamedTuple):
    """Pixels of an image."""

    classes: list[int]  # of each class
    ignored: int  # that count nowhere
    off: int  # that have a class since their value is near to it


def count_classes(masks: Sequence[Mask], counts: Sequence[np.ndarray], coding: Coding) -> Counts:
    """How many pixels of an image each class has.

    Args:
        masks: of the image, with the distinct values [V] alone.
        counts: [V] of each mask, how many pixels have each value.

    Raises:
        ValueError: a value belongs to no class.
    """
    if coding.overlap:
        found = []
        for i, name in enumerate(coding.classes):
            at = i if len(masks) > 1 else 0  # a file for each class, or one of regions
            mask, numbers = masks[at], counts[at]
            inside = members(as_read(mask.values, mask, coding.colours), name, coding)
            found.append(int(numbers[inside].sum()))
        return Counts(found, 0, 0)
    values = as_read(masks[0].values, masks[0], coding.colours)
    labels, off = owners(values, coding)
    for value, count in zip(values[labels == NOBODY], counts[0][labels == NOBODY], strict=True):
        shown = f"#{value:06x}" if coding.colours else f"{value:.6g}"
        way = "add it to one" if value == int(value) else "give a threshold, such as '>0.5'"
        raise ValueError(
            f"value {shown}, which no class has; data.classes are {dict(coding.classes)}: {way}, "
            f"or take the nearest by data.nearest=true ({number_of(int(count), 'pixel')})"
        )
    totals = [int(counts[0][labels == i].sum()) for i in range(len(coding.classes))]
    return Counts(totals, int(counts[0][labels == IGNORED].sum()), int(counts[0][off].sum()))


def as_read(values: np.ndarray, mask: Mask, colours: bool) -> np.ndarray:
    """Values of a mask as colours, if it is to be read so, whatever the mode of its file."""
    if colours and mask.palette:
        return np.array([mask.palette.get(int(v), 0) for v in values])
    return values.astype(np.int64) * 0x010101 if colours and not mask.colours else values


def distinct_values(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values [V] of an array, and how many pixels have each."""
    if values.dtype == np.uint8:
        values = values.astype(np.uint16)  # which numpy sorts five times as fast
    return np.unique(values, return_counts=True)


def to_label(masks: Sequence[Mask], coding: Coding) -> np.ndarray:
    """Labels int16 [1, *space], or [K, *space] of zeros and ones where classes overlap.

    Args:
        masks: one of all classes, or one for each class.
    """
    if coding.overlap:
        files = masks if len(masks) > 1 else [masks[0]] * len(coding.classes)
        planes = [
            _looked_up(mask, coding, lambda values, name=name: members(values, name, coding))
            for mask, name in zip(files, coding.classes, strict=True)
        ]
        return np.stack(planes).astype(np.int16)
    return _looked_up(masks[0], coding, lambda values: owners(values, coding)[0])[None]


def _looked_up(mask: Mask, coding: Coding, function: Any) -> np.ndarray:
    """A function of the distinct values of a mask, at each pixel: [*space]."""
    if mask.values.dtype in (np.uint8, np.uint16):
        values = np.arange(int(mask.values.max()) + 1)
        return function(as_read(values, mask, coding.colours))[mask.values]
    values, where = np.unique(mask.values, return_inverse=True)
    return function(as_read(values, mask, coding.colours))[where.reshape(mask.values.shape)]
