"""Finds what the values of masks mean, by data.classes, data.ignore_index and data.nearest."""

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

MOST = 32  # at most so many values are taken for classes; more values number objects
FOREGROUND = ">127"  # in masks of 0 and 255 whose values a compression has changed

Masks = Sequence[tuple[Path, Mask]]  # files and masks, which hold only the distinct values [V]


def check_classes(setting: Any, overlap: bool) -> Classes:
    """The setting data.classes as pairs: the name of a class, and its values in a mask.

    Args:
        overlap: whether classes may overlap.

    Raises:
        ValueError: the setting is something else, or classes that do not overlap share a value.

    >>> check_classes({"background": 0, "polyp": [255, ">127"], "sky": "#ff0000"}, overlap=False)
    (('background', (0,)), ('polyp', (255, '>127')), ('sky', ('#ff0000',)))
    """
    found: list[tuple[str, tuple[Any, ...]]] = []
    entries: Iterable[tuple[Any, Any]] = [(setting, None)]
    if isinstance(setting, Mapping):
        entries = setting.items()
    for name, value in entries:
        is_one = isinstance(value, str) or not isinstance(value, Sequence)
        values: tuple[Any, ...] = (value,) if is_one else tuple(value)
        if not values or not all(v == REST or range_of(v) for v in values):
            raise ValueError(
                "data.classes must map each name to a whole number, a colour, a threshold, a list "
                f"of these, or the word {REST}, as in {{background: 0, nucleus: '>127', vessel: "
                f"'#ff0000', border: [2, 3]}}, got {setting}"
            )
        found.append((str(name), values))
    if overlap:
        return tuple(found)
    if sum(REST in values for _, values in found) > 1:
        raise ValueError(f"data.classes: {REST} can stand once, got {setting}")
    ranges = [(name, value, r) for name, values in found for value in values
              for r in ranges_of([value])]  # fmt: skip
    for i, (name, value, first) in enumerate(ranges):
        for other, _, second in ranges[:i]:
            if other != name and _clash(first, second):
                raise ValueError(f"data.classes: {value} is of {other} and of {name}; choose one")
    return tuple(found)


def _clash(first: Range, second: Range) -> bool:
    """Whether both are single values or both are thresholds, and they share a value."""
    if first.is_threshold != second.is_threshold:
        return False  # a single value goes before a threshold
    low, high = max(first.low, second.low), min(first.high, second.high)
    return low < high or low == high and not (first.is_open or second.is_open)


def make_coding(
    masks: Masks,
    setting: Any = None,
    ignored: Any = None,
    nearest: bool = False,
    default: Mapping[str, Any] | None = None,
    kinds: tuple[str, ...] = (),
    overlap: bool = False,
) -> Coding:
    """How the values of a data set's masks become labels.

    The values are colours if a mask is in colour, if palettes give one index two colours, or if the
    settings name colours. Compression with loss changes values, so each value then belongs to the
    nearest class.

    Args:
        masks: of the data set.
        setting, ignored, nearest: data.classes, data.ignore_index and data.nearest.
        default: the classes that the layout names, used if there is no `setting`.
        kinds, overlap: see `Coding`.

    Raises:
        ValueError: the settings do not fit the masks.
    """
    entries = default if setting is None else setting
    classes = () if entries is None else check_classes(entries, overlap)
    _check_names(classes, kinds, overlap)
    _check_ignored(ignored, classes)
    colours, greys = _reading(masks)
    if colours and setting is None:  # the layout calls the background 0
        classes = tuple((n, ("#000000",) if v == (0,) else v) for n, v in classes)
    listed = [v for _, values in classes for v in values if v != REST]
    listed += [] if ignored is None else [ignored]
    colours = colours or any(map(is_colour, listed))
    lossy = next((path for path, mask in masks if mask.lossy), None)
    if lossy and (
        overlap or setting is None
    ):  # in a class's own folder, all that is not black is the class
        if colours and kinds:
            raise ValueError(
                f"{lossy} is compressed with loss and in colour, so the border of the class "
                "is unknown; save the masks as PNG"
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
    if entries is None:
        classes = _as_found(masks, ignored, colours, greys)
    thresholds = any(found.is_threshold for found in ranges_of(listed))
    near = nearest or lossy is not None or thresholds
    return Coding(classes, ignored, kinds, overlap, near, colours, greys, entries is None)


def _check_names(classes: Classes, kinds: tuple[str, ...], overlap: bool) -> None:
    """Check that classes with one folder of masks each have the names of the folders.

    Raises:
        ValueError: a class and the folders have different names.
    """
    names = [name for name, _ in classes]
    if overlap and kinds and sorted(names) != sorted(kinds):
        raise ValueError(
            f"data.classes must name the folders of masks, {', '.join(kinds)}, and no other class, "
            f"got {', '.join(names)}"
        )


def _check_ignored(ignored: Any, classes: Classes) -> None:
    """Check the setting data.ignore_index.

    Raises:
        ValueError: the setting is not a value, or it is the value of a class.
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
    """Whether the values of masks are colours, and whether those of palettes are greys."""
    colour_of: dict[int, int] = {}
    palettes = [mask.palette for _, mask in masks if mask.palette]
    pairs = [pair for palette in palettes for pair in palette.items()]
    any_colour = any(mask.colours for _, mask in masks)
    differ = any(colour_of.setdefault(index, colour) != colour for index, colour in pairs)
    are_greys = all(colour % 0x010101 == 0 for _, colour in pairs)
    are_told = all(len({*palette.values()}) == len(palette) for palette in palettes)
    greys = bool(palettes) and are_greys and are_told
    return any_colour or differ and not greys, greys


def _check_colours(masks: Masks, settings: Sequence[Any]) -> None:
    """Check that all settings and masks can be read as colours.

    Raises:
        ValueError: a setting is not a colour, or a mask holds a value that is not a grey.
    """
    if numbers := [value for value in settings if not is_colour(value)]:
        raise ValueError(
            f"the masks in {masks[0][0].parent} are read as colours, because some are in colour "
            "or their palettes differ: data.classes and data.ignore_index must name colours, such "
            f"as \"data.classes={{road:'#804080',sky:'#4682b4'}}\", not {numbers[0]}"
        )
    for path, mask in masks:
        odd = mask.values[(mask.values < 0) | (mask.values > 255) | (mask.values % 1 != 0)]
        if odd.size and not mask.colours:
            raise ValueError(
                f"{path} holds {odd[0]:.6g}, which is not a grey of 8 bits, but other masks are "
                "in colour; save all of them in one way"
            )


def _as_found(masks: Masks, ignored: Any, colours: bool, greys: bool) -> Classes:
    """A class for each value in the masks, named like the value.

    Raises:
        ValueError: there is only one value, too many, or one that is not a whole number.
    """
    out = range_of(ignored)
    files: dict[float, Path] = {}  # by value, the first file that holds it
    for file, mask in masks:
        for value in as_read(mask.values, mask, colours, greys).tolist():
            files.setdefault(value, file)
    values = sorted(v for v in files if not (out and v == out.low))
    names = [f"#{int(v):06x}" if colours else v for v in values]
    folder, lossy = masks[0][0].parent, any(mask.lossy for _, mask in masks)
    if fractions := [v for v in values if v != int(v)]:
        raise ValueError(
            f"{files[fractions[0]]} holds {fractions[0]:.6g}, which is not a whole number; name "
            "the classes by a threshold, as in \"data.classes={background:'<=0.5',object:'>0.5'}\""
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
            f"{folder}: the masks hold {have}; two classes are needed; check that these are the "
            "masks"
        )
    return tuple((str(name), (name if colours else int(name),)) for name in names)


def values_of(coding: Coding) -> list[int | str]:
    """For each class the value in a predicted mask, which would be read as that class again.

    This is the first of its single values. `REST` and thresholds get 255, 0, 1, 2, ... or a value
    beside a threshold. Colours are written as `#rrggbb`.

    Raises:
        ValueError: a class contains no whole number, such as the values between 0.3 and 0.6.
    """
    values: list[int | str] = []
    for label, (name, class_values) in enumerate(coding.classes):
        options = _candidates(class_values, coding)
        value = next((v for v in options if _is_of(v, label, coding)), None)
        if value is None:
            raise ValueError(
                f"data.classes: class {name} has no whole number, which predicted masks need; "
                "give it one, such as [255, ...]"
            )
        values.append(f"#{value:06x}" if coding.colours else value)
    return values


def _candidates(class_values: Sequence[Any], coding: Coding) -> Iterator[int]:
    """Numbers that may belong to a class, the most natural ones first."""
    ranges = ranges_of(class_values)
    yield from (int(found.low) for found in ranges if not found.is_threshold)
    below = any(found.low == -math.inf for found in ranges)
    yield from (0, 255) if below else (0xFFFFFF if coding.colours else 255,)
    yield from range(256)
    every = [found for _, values in coding.classes for found in ranges_of(values)]
    ends = [math.floor(x) for found in every for x in (found.low, found.high) if abs(x) < math.inf]
    # Other single values and an ignored value may occupy the numbers next to an end.
    yield from (end + step for step in range(len(ends) + 3) for end in ends)
    yield from (end - step for step in range(len(ends) + 3) for end in ends)


def _is_of(value: int, label: int, coding: Coding) -> bool:
    """Whether a mask's value is read as a class."""
    array = np.array([value])
    if coding.overlap:  # 0 means that the pixel is not of the class
        return value != 0 and bool(members(array, coding.classes[label][1])[0])
    labels, off = owners(array, coding)
    return labels[0] == label and not off[0]
