"""What the values of masks mean: the settings data.classes, data.ignore_index, data.nearest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from losswatch.data.cases import Mask
from losswatch.data.labels import (
    REST,
    Classes,
    Coding,
    Range,
    as_read,
    is_colour,
    members,
    owners,
    range_of,
    ranges_of,
)

MOST = 32  # classes, as found; a mask with more values marks objects
FOREGROUND = ">127"  # of masks of 0 and 255 whose values a compression has changed

Masks = Sequence[tuple[Path, Mask]]  # by their files, with the distinct values [V] alone


def check_classes(given: Any, overlap: bool) -> Classes:
    """The setting data.classes as pairs of a class's name and its values in a mask.

    Args:
        overlap: whether classes may overlap.

    Raises:
        ValueError: it is something else, or a value is of two classes that do not overlap.

    >>> check_classes({"background": 0, "polyp": [255, ">127"], "sky": "#ff0000"}, overlap=False)
    (('background', (0,)), ('polyp', (255, '>127')), ('sky', ('#ff0000',)))
    """
    found: list[tuple[str, tuple[Any, ...]]] = []
    entries: Iterable[tuple[Any, Any]] = [(given, None)]
    if isinstance(given, Mapping):
        entries = given.items()
    for name, value in entries:
        is_one = isinstance(value, str) or not isinstance(value, Sequence)
        values: tuple[Any, ...] = (value,) if is_one else tuple(value)
        if not values or not all(v == REST or range_of(v) for v in values):
            raise ValueError(
                "data.classes must map each name to a whole number, a colour, a threshold, a list "
                f"of these, or the word {REST}, as in {{background: 0, nucleus: '>127', vessel: "
                f"'#ff0000', border: [2, 3]}}, got {given}"
            )
        found.append((str(name), values))
    if overlap:
        return tuple(found)
    if sum(REST in values for _, values in found) > 1:
        raise ValueError(f"data.classes: {REST} can stand once, got {given}")
    ranges = [(name, value, r) for name, values in found for value in values
              for r in ranges_of([value])]  # fmt: skip
    for i, (name, value, first) in enumerate(ranges):
        for other, _, second in ranges[:i]:
            if other != name and _clash(first, second):
                raise ValueError(f"data.classes: {value} is of {other} and of {name}; choose one")
    return tuple(found)


def _clash(first: Range, second: Range) -> bool:
    """Whether both are single values or both thresholds, and have a value in common."""
    if first.is_threshold != second.is_threshold:
        return False  # a single value goes before a threshold
    low, high = max(first.low, second.low), min(first.high, second.high)
    return low < high or low == high and not (first.is_open or second.is_open)


def make_coding(
    masks: Masks,
    given: Any = None,
    ignored: Any = None,
    nearest: bool = False,
    named: Mapping[str, Any] | None = None,
    kinds: tuple[str, ...] = (),
    overlap: bool = False,
) -> Coding:
    """How the masks of a data set are read.

    A class is its colours where a mask is in colour, where palettes give one index two colours, or
    where the settings name colours. Compression with loss changes values, so a value belongs to the
    nearest class there.

    Args:
        masks: of the data set.
        given, ignored, nearest: the settings data.classes, data.ignore_index and data.nearest.
        named: the classes as the layout names them, where none are given.
        kinds, overlap: as of `Coding`.

    Raises:
        ValueError: the settings do not fit the masks.
    """
    settings = named if given is None else given
    classes = () if settings is None else check_classes(settings, overlap)
    _check_names(classes, kinds, overlap)
    _check_ignored(ignored, classes)
    colours, greys = _reading(masks)
    if colours and given is None:  # 0 is the background of a folder for each class
        classes = tuple((n, ("#000000",) if v == (0,) else v) for n, v in classes)
    listed = [v for _, values in classes for v in values if v != REST]
    listed += [] if ignored is None else [ignored]
    colours = colours or any(map(is_colour, listed))
    lossy = next((path for path, mask in masks if mask.lossy), None)
    if lossy and (overlap or given is None):  # of such a folder all that is not black is the class
        if colours and kinds:
            raise ValueError(
                f"{lossy} is compressed with loss and in colour, so nobody can tell where the "
                "class ends; save the masks as PNG"
            )
        classes = tuple((n, (FOREGROUND,) if REST in v else v) for n, v in classes)
    if colours:
        _check_colours(masks, listed)
    if lossy and any(REST in values for _, values in classes):
        raise ValueError(
            f"data.classes: {lossy} is compressed with loss (as by JPEG), so {REST} would take "
            "pixels of other classes; give the value that a class had before, or a threshold, as "
            "in 'data.classes={background:0,object:\">127\"}'"
        )
    if settings is None:
        classes = _as_found(masks, ignored, colours, greys)
    thresholds = any(found.is_threshold for found in ranges_of(listed))
    near = nearest or lossy is not None or thresholds
    return Coding(classes, ignored, kinds, overlap, near, colours, greys, settings is None)


def _check_names(classes: Classes, kinds: tuple[str, ...], overlap: bool) -> None:
    """Checks that classes with a folder of masks each are called like the folders.

    Raises:
        ValueError: they are not.
    """
    names = [name for name, _ in classes]
    if overlap and kinds and sorted(names) != sorted(kinds):
        raise ValueError(
            f"data.classes must name the folders of masks, {', '.join(kinds)}, and no other class, "
            f"got {', '.join(names)}"
        )


def _check_ignored(ignored: Any, classes: Classes) -> None:
    """Checks the setting data.ignore_index.

    Raises:
        ValueError: it is no value, or that of a class.
    """
    if ignored is None:
        return
    if type(ignored) is not int and not is_colour(ignored):
        raise ValueError(
            f"data.ignore_index={ignored} must be a whole number, or a colour like '#e0e0c0'"
        )
    for name, values in classes:
        if any(found == range_of(ignored) for found in ranges_of(values)):
            raise ValueError(f"data.ignore_index={ignored} is a value of class {name}; choose one")


def _reading(masks: Masks) -> tuple[bool, bool]:
    """Whether masks are told by colours, and whether palettes by greys."""
    known: dict[int, int] = {}
    palettes = [mask.palette for _, mask in masks if mask.palette]
    pairs = [pair for palette in palettes for pair in palette.items()]
    any_colour = any(mask.colours for _, mask in masks)
    two = any(known.setdefault(index, colour) != colour for index, colour in pairs)
    are_greys = all(colour % 0x010101 == 0 for _, colour in pairs)
    are_told = all(len({*palette.values()}) == len(palette) for palette in palettes)
    greys = bool(palettes) and are_greys and are_told
    return any_colour or two and not greys, greys


def _check_colours(masks: Masks, listed: Sequence[Any]) -> None:
    """Checks that settings and masks can be told by colours.

    Raises:
        ValueError: a setting is no colour, or a mask holds what is no grey.
    """
    if numbers := [value for value in listed if not is_colour(value)]:
        raise ValueError(
            f"the masks in {masks[0][0].parent} are told by colours, since some are in colour or "
            "their palettes differ: data.classes and data.ignore_index must name colours, such as "
            f"\"data.classes={{road:'#804080',sky:'#4682b4'}}\", not {numbers[0]}"
        )
    for path, mask in masks:
        odd = mask.values[(mask.values < 0) | (mask.values > 255) | (mask.values % 1 != 0)]
        if odd.size and not mask.colours:
            raise ValueError(
                f"{path} holds {odd[0]:.6g}, which is no grey of 8 bits, while other masks are in "
                "colour; save all of them in one way"
            )


def _as_found(masks: Masks, ignored: Any, colours: bool, greys: bool) -> Classes:
    """A class for each value in the masks, named like the value.

    Raises:
        ValueError: there is one class alone, or there are too many.
    """
    out = range_of(ignored)
    files: dict[float, Path] = {}  # the first that holds a value
    for file, mask in masks:
        for value in as_read(mask.values, mask, colours, greys).tolist():
            files.setdefault(value, file)
    values = sorted(v for v in files if not (out and v == out.low))
    names = [f"#{int(v):06x}" if colours else v for v in values]
    folder, lossy = masks[0][0].parent, any(mask.lossy for _, mask in masks)
    if fractions := [v for v in values if v != int(v)]:
        raise ValueError(
            f"{files[fractions[0]]} holds {fractions[0]:.6g}, which is no whole number; name the "
            "classes by a threshold, as in \"data.classes={background:'<=0.5',object:'>0.5'}\""
        )
    if len(values) > (2 if lossy else MOST):
        why = "as JPEG makes of a few" if lossy else "as if each object had its own"
        way = threshold = "'data.classes={background:0,object:\">127\"}'"
        if colours:
            way = "\"data.classes={road:'#804080',sky:'#4682b4'}\" data.nearest=true"
        elif not lossy:
            way = f"'data.classes={{background:0,object:{REST}}}', or for noise {threshold}"
        raise ValueError(
            f"{folder}: the masks hold {len(values)} values, {why}; name the classes, as in {way}"
        )
    if len(values) < 2:
        have = f"no value but {names[0]}" if names else "no value that counts"
        raise ValueError(
            f"{folder}: the masks hold {have}; two classes are needed, so look whether these are "
            "the masks"
        )
    return tuple((str(name), (name if colours else int(name),)) for name in names)


def values_of(coding: Coding) -> list[int | str]:
    """The value in a predicted mask of each class, which is read as that class again.

    That is the first of its single values. `REST` and thresholds have 255, 0, 1, 2, ... or a value
    beside a threshold. Colours are written as `#rrggbb`.

    Raises:
        ValueError: a class has no whole number, such as what is between 0.3 and 0.6.
    """
    values: list[int | str] = []
    for label, (name, wanted) in enumerate(coding.classes):
        options = _candidates(wanted, coding)
        value = next((v for v in options if _is_of(v, label, coding)), None)
        if value is None:
            raise ValueError(
                f"data.classes: class {name} has no whole number, which predicted masks need; "
                "give it one, such as [255, ...]"
            )
        values.append(f"#{value:06x}" if coding.colours else value)
    return values


def _candidates(wanted: Sequence[Any], coding: Coding) -> Iterator[int]:
    """Numbers that may be of a class, the most natural ones first."""
    ranges = ranges_of(wanted)
    yield from (int(found.low) for found in ranges if not found.is_threshold)
    below = any(found.low == -math.inf for found in ranges)
    yield from (0, 255) if below else (0xFFFFFF if coding.colours else 255,)
    yield from range(256)
    every = [found for _, values in coding.classes for found in ranges_of(values)]
    ends = [math.floor(x) for found in every for x in (found.low, found.high) if abs(x) < math.inf]
    # Single values and an ignored one may take the next numbers.
    yield from (end + step for step in range(len(ends) + 3) for end in ends)
    yield from (end - step for step in range(len(ends) + 3) for end in ends)


def _is_of(value: int, label: int, coding: Coding) -> bool:
    """Whether a mask's value is read as a class."""
    array = np.array([value])
    if coding.overlap:  # 0 is where there is none of the class
        return value != 0 and bool(members(array, coding.classes[label][1])[0])
    labels, off = owners(array, coding)
    return labels[0] == label and not off[0]
