"""From the values of masks to the labels that losses read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from losswatch.data.form import IGNORED
from losswatch.data.layouts import REST, Classes

MOST = 32  # classes, as found; a mask with more values marks objects


def check_classes(given: Any, overlap: bool) -> dict[str, Any]:
    """The setting data.classes: from the name of a class to its values in a mask.

    Args:
        overlap: whether classes may overlap.

    Raises:
        ValueError: it is something else.
    """
    found: dict[str, Any] = {}
    for name, value in given.items() if isinstance(given, Mapping) else [(given, None)]:
        values = list(value) if isinstance(value, Sequence) and value != REST else [value]
        if not all(v == REST or type(v) is int for v in values):
            raise ValueError(
                f"data.classes must map each name to a value, a list of values or the word {REST}, "
                f"as in {{background: 0, nucleus: {REST}}}, got {given}"
            )
        found[str(name)] = value if value == REST else tuple(values)
    if [*found.values()].count(REST) > 1 and not overlap:
        raise ValueError(f"data.classes: {REST} can stand once, got {given}")
    return found


def classes_as_found(values: Sequence[int]) -> dict[str, Any]:
    """A class for each value in the masks, named like the value.

    Raises:
        ValueError: there is one class alone, or there are too many.
    """
    if len(values) > MOST:
        raise ValueError(
            f"the masks hold {len(values)} values, as if each object had its own; name the "
            f"classes, as in 'data.classes={{background:0,object:{REST}}}'"
        )
    if len(values) < 2:
        raise ValueError(f"the masks hold no value but {values[0]}; two classes are needed")
    return {str(value): (value,) for value in values}


def values_of(classes: Classes) -> list[int]:
    """The value in a predicted mask of each class: the first that it has in masks.

    That of `REST` is the first of 255, 1, 2, ... that no other class has.
    """
    taken = {value for values in classes.values() if values != REST for value in values}
    free = next(value for value in (255, *range(1, 256)) if value not in taken)
    return [free if values == REST else values[0] for values in classes.values()]


def counts_of_classes(
    counts: Sequence[Mapping[int, int]], classes: Classes, ignored: int | None, overlap: bool
) -> list[int]:
    """How many pixels of an image each class has.

    Args:
        counts: for each mask of the image, how many pixels have each value.

    Raises:
        ValueError: a value belongs to no class.
    """
    found = dict.fromkeys(classes, 0)
    for i, mask in enumerate(counts):
        names = [list(classes)[i]] if len(counts) > 1 else list(classes)
        for value, count in mask.items():
            if value == ignored:
                continue
            owners = [name for name in names if _has(classes, name, value, overlap)]
            if not owners and not overlap:
                raise ValueError(f"value {value}, which no class has; data.classes are {classes}")
            for name in owners:
                found[name] += count
    return list(found.values())


def _has(classes: Classes, name: str, value: int, overlap: bool) -> bool:
    values = classes[name]
    if values != REST:
        return value in values
    if overlap:
        return value != 0
    return not any(value in other for other in classes.values() if other != REST)


def to_label(
    masks: Sequence[np.ndarray], classes: Classes, ignored: int | None, overlap: bool
) -> np.ndarray:
    """Labels int16 [1, *space], or [K, *space] of zeros and ones where classes overlap.

    Args:
        masks: one of all classes, or one for each class; [*space] each.
    """
    values = np.unique(np.concatenate([np.unique(mask) for mask in masks]))
    names = list(classes)
    member = {n: [v for v in values.tolist() if _has(classes, n, v, overlap)] for n in names}
    if overlap:
        files = masks if len(masks) > 1 else [masks[0]] * len(names)
        planes = [np.isin(mask, member[n]) for mask, n in zip(files, names, strict=True)]
        return np.stack(planes).astype(np.int16)
    label = np.zeros(masks[0].shape, np.int16)
    for i, name in enumerate(names):
        label[np.isin(masks[0], member[name])] = i
    if ignored is not None:
        label[masks[0] == ignored] = IGNORED
    return label[None]
