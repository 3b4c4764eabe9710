"""What the values of masks mean: the settings data.classes, data.ignore_index, data.nearest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from losswatch.data.cases import Mask
from losswatch.data.labels import REST, Classes, Coding, as_read, is_colour, range_of, ranges_of

MOST = 32  # classes, as found; a mask with more values marks objects
FOREGROUND = ">127"  # of masks of 0 and 255 whose values a compression has changed


def check_classes(given: Any, overlap: bool) -> Classes:
    """The setting data.classes: from the name of a class to its values in a mask.

    Args:
        overlap: whether classes may overlap.

    Raises:
        ValueError: it is something else.

    >>> check_classes({"background": 0, "polyp": [255, ">127"], "sky": "#ff0000"}, overlap=False)
    {'background': (0,), 'polyp': (255, '>127'), 'sky': ('#ff0000',)}
    """
    found: dict[str, tuple[Any, ...]] = {}
    entries: Iterable[tuple[Any, Any]] = [(given, None)]
    if isinstance(given, Mapping):
        entries = given.items()
    for name, value in entries:
        is_one = isinstance(value, str) or not isinstance(value, Sequence)
        values: tuple[Any, ...] = (value,) if is_one else tuple(value)
        if not values or not all(v == REST or range_of(v) for v in values):
            raise ValueError(
                "data.classes must map each name to a value, a colour, a threshold, a list of "
                f"these, or the word {REST}, as in {{background: 0, nucleus: '>127', vessel: "
                f"'#ff0000', border: [2, 3]}}, got {given}"
            )
        found[str(name)] = values
    if sum(REST in values for values in found.values()) > 1 and not overlap:
        raise ValueError(f"data.classes: {REST} can stand once, got {given}")
    return found


def make_coding(
    masks: Sequence[tuple[Path, Mask]],
    given: Any = None,
    ignored: Any = None,
    nearest: bool = False,
    named: Mapping[str, Any] | None = None,
    overlap: bool = False,
) -> Coding:
    """How the masks of a data set are read.

    A class is its colours where a mask is in colour, where palettes give one index two colours, or
    where the settings name colours. JPEG changes values, so a value belongs to the nearest class.

    Args:
        masks: by their files, with the distinct values [V] alone.
        given, ignored, nearest: the settings data.classes, data.ignore_index and data.nearest.
        named: the classes as the layout names them, where none are given.
        overlap: whether classes may overlap.

    Raises:
        ValueError: the settings do not fit the masks.
    """
    every = [mask for _, mask in masks]
    lossy, two = any(mask.lossy for mask in every), not overlap and _palettes_differ(every)
    if ignored is not None and not (type(ignored) is int or is_colour(ignored)):
        raise ValueError(
            f"data.ignore_index={ignored} must be a whole number, or a colour like '#e0e0c0'"
        )
    settings = named if given is None else given
    classes: Classes | None = None if settings is None else check_classes(settings, overlap)
    if classes is not None:
        if lossy and (overlap or given is None):  # the foreground of a folder for each class
            classes = {n: (FOREGROUND,) if REST in v else v for n, v in classes.items()}
    colours = two or any(mask.colours for mask in every)
    if colours and classes and given is None:  # as 0 is the background of such a folder
        classes = {n: ("#000000",) if v == (0,) else v for n, v in classes.items()}
    listed = [v for values in (classes or {}).values() for v in values if v != REST]
    listed += [] if ignored is None else [ignored]
    colours = colours or any(map(is_colour, listed))
    if colours and not overlap and (numbers := [v for v in listed if not is_colour(v)]):
        why = "their palettes differ" if two else "some are in colour"
        raise ValueError(
            f"the masks in {masks[0][0].parent} must be told by colours, since {why}: data.classes "
            "and data.ignore_index must name colours, such as "
            f"\"data.classes={{road:'#804080',sky:'#4682b4'}}\", not {numbers[0]}"
        )
    for path, mask in masks if colours else ():
        odd = mask.values[(mask.values < 0) | (mask.values > 255) | (mask.values % 1 != 0)]
        if odd.size and not mask.colours:
            raise ValueError(
                f"{path} holds {odd[0]:.6g}, which is no grey of 8 bits, while other masks are in "
                "colour; save all of them in one way"
            )
    if lossy and any(REST in values for values in (classes or {}).values()):
        file = next(path for path, mask in masks if mask.lossy)
        raise ValueError(
            f"data.classes: {file} is JPEG, which changes values a little, so {REST} would take "
            "many of them; give the value that a class had before, or a threshold, as in "
            "'data.classes={background:0,object:\">127\"}'"
        )
    if classes is None:
        classes = _as_found(masks, ignored, colours, lossy)
    thresholds = any(low != high for low, high in ranges_of(listed))
    return Coding(
        classes, ignored, overlap, nearest or lossy or thresholds, colours, settings is None
    )


def _palettes_differ(masks: Sequence[Mask]) -> bool:
    """Whether an index that masks use stands for two colours, or for a grey of other masks."""
    known: dict[int, int] = {}
    if any(known.setdefault(index, colour) != colour
           for mask in masks for index, colour in (mask.palette or {}).items()):  # fmt: skip
        return True
    colours = set(known.values())
    return any(v not in known and v * 0x010101 in colours
               for mask in masks if not mask.palette for v in mask.values.tolist())  # fmt: skip


def _as_found(
    masks: Sequence[tuple[Path, Mask]], ignored: Any, colours: bool, lossy: bool
) -> Classes:
    """A class for each value in the masks, named like the value.

    Raises:
        ValueError: there is one class alone, or there are too many.
    """
    out = range_of(ignored)
    files: dict[float, Path] = {}  # the first that holds a value
    for file, mask in masks:
        for value in as_read(mask.values, mask, colours).tolist():
            files.setdefault(value, file)
    values = sorted(v for v in files if not (out and v == out[0]))
    names = [f"#{int(v):06x}" if colours else v for v in values]
    folder = masks[0][0].parent
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
    return {str(name): (name if colours else int(name),) for name in names}


def values_of(coding: Coding) -> list[int | str]:
    """The value in a predicted mask of each class: the first that it has in masks.

    That of `REST` and of thresholds is the first of 255, 1, 2, ... that no other class has; of a
    threshold from above the first of 0, 1, 2, ... Colours are written as `#rrggbb`.
    """
    ranges = [ranges_of(values) for values in coding.classes.values()]
    every = {low for found in ranges for low, high in found if low == high}
    values: list[int | str] = []
    for found in ranges:
        taken = set() if coding.overlap else every  # a file for each class
        value = next((low for low, high in found if low == high), None)
        if value is None:
            first = 0 if found and found[0][0] == -math.inf else 0xFFFFFF if coding.colours else 255
            value = next(v for v in (first, *range(1, 256)) if v not in taken)
            taken.add(value)
        values.append(f"#{int(value):06x}" if coding.colours else int(value))
    return values
