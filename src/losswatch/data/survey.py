"""A look at every file of a folder before training: what pairs, and how rare each class is."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from joblib import Memory

from losswatch.data.labels import counts_of_classes
from losswatch.data.layouts import Case, Classes, Layout
from losswatch.data.reading import read
from losswatch.terminal import say
from losswatch.text import number_of


@dataclass(frozen=True)
class Look:
    """What one image and its masks are."""

    shape: tuple[int, ...]  # [channels, *space]
    low: float
    high: float
    counts: tuple[dict[int, int], ...]  # of each mask: its values, and how many pixels have them

    def describe(self) -> str:
        channels, dims = self.shape[0], len(self.shape) - 1
        return f"{number_of(channels, 'channel')} and {dims} dimensions"


@cache
def _memory() -> Memory:
    """Looks of earlier commands, in the user's cache folder."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Memory(folder / "losswatch", verbose=0)


def look_at(cases: Sequence[Case]) -> list[Look]:
    """Open every file, unless an earlier command has and its size and time are the same.

    Raises:
        ValueError: a file is damaged, or an image and its masks do not fit; names the file.
    """

    def look(case: Case) -> Look:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # joblib's, of a folder it cannot write
            return _memory().cache(_look)(*(tuple(map(_stamp, part)) for part in case[1:]))

    with ThreadPoolExecutor() as pool:
        return list(pool.map(look, cases))


def _stamp(path: Path) -> tuple[str, int, int]:
    state = path.stat()
    return str(path.resolve()), state.st_size, state.st_mtime_ns


def _look(images: Sequence[tuple[str, int, int]], masks: Sequence[tuple[str, int, int]]) -> Look:
    image = read_image([Path(name) for name, *_ in images])
    counts = []
    for name, *_ in masks:
        mask = read(Path(name), is_mask=True)
        if mask.shape != image.shape[1:]:
            size, wanted = (" x ".join(map(str, x)) for x in (mask.shape, image.shape[1:]))
            raise ValueError(f"{name} is of {size}, its image {images[0][0]} of {wanted}")
        values, numbers = np.unique(mask.astype(np.int64), return_counts=True)
        counts.append(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
    if not np.isfinite(image.astype(np.float64)).all():
        raise ValueError(f"{images[0][0]} holds NaN or infinity")
    return Look(image.shape, float(image.min()), float(image.max()), tuple(counts))


def read_image(files: Sequence[Path]) -> np.ndarray:
    """An image [channels, *space] from one file, or from one for each channel."""
    parts = [read(file, is_mask=False) for file in files]
    if len({part.shape[1:] for part in parts}) > 1:
        raise ValueError(f"{files[0]} and the other channels differ in size")
    return np.concatenate(parts)


def check_alike(cases: Sequence[Case], looks: Sequence[Look]) -> None:
    """See that all images have the same channels and axes.

    Raises:
        ValueError: naming the first that differs.
    """
    first, *_ = looks
    for case, look in zip(cases, looks, strict=True):
        if look.shape[0] != first.shape[0] or len(look.shape) != len(first.shape):
            raise ValueError(
                f"{case.images[0]} has {look.describe()}, {cases[0].images[0]} {first.describe()}"
            )


@dataclass(frozen=True)
class Survey:
    """How often each class occurs in each split.

    Attributes:
        splits: a row for each split: "images", "pixels", "low" and "high" (the intensities).
        classes: a row for each split and class: "share" of the pixels that count, and the number of
            images "without" it.
    """

    splits: pd.DataFrame
    classes: pd.DataFrame


def survey(
    layout: Layout, looks: Mapping[str, Sequence[Look]], classes: Classes, ignored: int | None
) -> Survey:
    """Count the pixels of each class.

    Raises:
        ValueError: a mask holds a value that no class has; names the mask.
    """
    splits, rows = [], []
    for split, seen in looks.items():
        table = []
        for case, look in zip(layout.cases[split], seen, strict=True):
            try:
                table.append(counts_of_classes(look.counts, classes, ignored, layout.overlap))
            except ValueError as error:
                raise ValueError(f"{case.masks[0]} holds {error}") from None
        counts = np.array(table)
        # Ignored pixels of the one mask count nowhere.
        pixels = sum(np.prod(look.shape[1:]) - look.counts[0].get(ignored, 0) for look in seen)  # type: ignore
        splits.append({
            "split": split, "images": len(seen), "pixels": int(pixels),
            "low": min(look.low for look in seen), "high": max(look.high for look in seen),
        })  # fmt: skip
        rows += [
            {"split": split, "class": name, "share": total / max(pixels, 1), "without": int(absent)}
            for name, total, absent in zip(
                classes, counts.sum(0), (counts == 0).sum(0), strict=True
            )
        ]
    return Survey(pd.DataFrame(splits).set_index("split"), pd.DataFrame(rows))


def show(found: Survey, root: Any) -> None:
    """Print the survey to standard error."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{root}: share of pixels (images without the class)", title_justify="left")
    table.add_column("class")
    for split, row in found.splits.iterrows():
        table.add_column(f"{split}, {int(row['images'])} images", justify="right")
    for name, rows in found.classes.groupby("class", sort=False):
        cells = [f"{r.share:.3%} ({r.without})" for r in rows.itertuples()]
        table.add_row(str(name), *cells)
    low, high = found.splits["low"].min(), found.splits["high"].max()
    console = Console(stderr=True)
    with console.capture() as printed:
        console.print(table)
    say(printed.get() + f"intensities from {low:g} to {high:g}")
