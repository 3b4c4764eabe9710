"""A look at every file of a folder before training: what fits, and how rare each class is."""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import sqlite3
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from losswatch.data.cases import Case, Mask, load
from losswatch.data.form import Form
from losswatch.data.labels import Coding, count_classes, distinct_values
from losswatch.data.reading import read
from losswatch.data.splits import Layout
from losswatch.data.tree import parts_of
from losswatch.terminal import followed, say
from losswatch.text import number_of

VERSION = 2  # of `Look`, in the file of earlier looks


class Look(NamedTuple):
    """What one image and its masks are."""

    shape: tuple[int, ...]  # [channels, *space]
    lows: tuple[float, ...]  # the smallest intensity of each channel
    highs: tuple[float, ...]
    axes: str  # of `Content`
    masks: tuple[Mask, ...]  # with the distinct values [V] alone
    counts: tuple[np.ndarray, ...]  # of each mask, how many pixels have each of its values
    notes: tuple[tuple[str, str], ...]  # of `Content`

    def describe(self) -> str:
        channels, dims = self.shape[0], len(self.shape) - 1
        return f"{number_of(channels, 'channel')} and {dims} dimensions"


def look_at(cases: Sequence[Case], form: Form | None = None) -> list[Look]:
    """Open every file, unless an earlier command has and its size and time are the same.

    Args:
        form: of the data that a network was trained on, for images without a mask.

    Raises:
        ValueError: a file is damaged, or an image and its masks do not fit; names the file.
    """
    known = (form.in_channels, form.dims) if form else (0, 0)
    stamps = [_stamp(case, known) for case in cases]
    with _earlier_looks() as earlier, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries about single files
        found = earlier.known(stamps)
        todo = [i for i, stamp in enumerate(stamps) if stamp not in found]
        # Not more threads than cores: each holds an image.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            looks = pool.map(functools.partial(_look, known=known), (cases[i] for i in todo))
            try:
                for i, look in zip(
                    todo, followed(looks, len(todo), "images looked at"), strict=True
                ):
                    found[stamps[i]] = look
            finally:
                pool.shutdown(cancel_futures=True)
                earlier.add({stamps[i]: found[stamps[i]] for i in todo if stamps[i] in found})
    return [found[stamp] for stamp in stamps]


def _stamp(case: Case, known: tuple[int, int]) -> str:
    """What a look depends on: the files of a case as they are now."""
    marks: list[object] = [VERSION, *known]
    for paths in (case.images, *case.masks):
        marks.append("|")
        for path in paths:
            try:
                states = [(file.name, file.stat()) for file in parts_of(path)]
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {error.strerror}; remove it") from error
            marks.append(os.path.abspath(path))
            marks += [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    return hashlib.sha256(repr(marks).encode(errors="surrogateescape")).hexdigest()


def _look(case: Case, known: tuple[int, int]) -> Look:
    content = load(case, "", *known)
    image, notes = content.image, list(content.notes)
    if image.dtype.kind == "f" and (bad := int((~np.isfinite(image)).sum())):
        files = {path: read(path, is_mask=False).array for path in case.images}
        path = next(path for path, array in files.items() if not np.isfinite(array).all())
        raise ValueError(
            f"{path} holds NaN or infinity in {number_of(bad, 'pixel')} of {image.size}; replace "
            "them, by numpy.nan_to_num for example"
        )
    # Channel by channel, in which numpy is ten times as fast as over two axes.
    lows, highs = zip(*((float(plane.min()), float(plane.max())) for plane in image), strict=True)
    largest = max(map(abs, (*lows, *highs)))
    if largest > np.finfo(np.float32).max:
        raise ValueError(f"{case.images[0]} holds {largest:g}, which float32 cannot; scale it down")
    if any(0 < high - low < abs(high) / 2**16 for low, high in zip(lows, highs, strict=True)):
        note = "its intensities differ too little for float32; subtract an offset from them"
        notes.append((note, case.images[0]))
    masks, counts = [], []
    for paths, mask in zip(case.masks, content.masks, strict=True):
        values, numbers = distinct_values(mask.values)
        if len(values) > 2**16:
            raise ValueError(f"{paths[0]} is a mask of {len(values)} values; is it an image?")
        palette = mask.palette and {int(v): mask.palette.get(int(v), 0) for v in values}
        masks.append(mask._replace(values=values, palette=palette))
        counts.append(numbers)
    said = tuple((note, str(path)) for note, path in notes)
    return Look(image.shape, lows, highs, content.axes, tuple(masks), tuple(counts), said)


class _Earlier:
    """Looks of earlier commands, in a file in the user's cache folder; None: it cannot be used."""

    def __init__(self, base: sqlite3.Connection | None) -> None:
        self.base = base

    def known(self, stamps: Sequence[str]) -> dict[str, Look]:
        if self.base is None:
            return {}
        found = {}
        for stamp in stamps:
            with suppress(Exception):  # of a file that is damaged, or of another version
                row = self.base.execute("SELECT look FROM looks WHERE stamp = ?", (stamp,))
                if found_look := row.fetchone():
                    found[stamp] = Look(*pickle.loads(found_look[0]))
        return found

    def add(self, looks: Mapping[str, Look]) -> None:
        if self.base is not None and looks:
            rows = [(stamp, pickle.dumps(tuple(look))) for stamp, look in looks.items()]
            with suppress(sqlite3.Error), self.base:  # of a full disk
                self.base.executemany("INSERT OR REPLACE INTO looks VALUES (?, ?)", rows)


@contextmanager
def _earlier_looks() -> Iterator[_Earlier]:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "losswatch"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        base = sqlite3.connect(folder / "looks.sqlite", timeout=60)
        base.execute("CREATE TABLE IF NOT EXISTS looks (stamp TEXT PRIMARY KEY, look BLOB)")
    except (OSError, sqlite3.Error):  # a folder that cannot be written, a file of something else
        yield _Earlier(None)
        return
    with closing(base):
        yield _Earlier(base)


def check_alike(cases: Sequence[Case], looks: Sequence[Look], channels: int | None = None) -> None:
    """See that all images have the same channels and axes.

    Args:
        channels: that the layout says an image has.

    Raises:
        ValueError: naming the first that differs.
    """
    first, *_ = looks
    for case, look in zip(cases, looks, strict=True):
        if look.shape[0] != first.shape[0] or len(look.shape) != len(first.shape):
            raise ValueError(
                f"{case.images[0]} has {look.describe()}, {cases[0].images[0]} {first.describe()}; "
                "all images need the same, so convert or remove one"
            )
    if channels is not None and first.shape[0] != channels:
        raise ValueError(
            f"{cases[0].images[0]} has {first.describe()}, but dataset.json names "
            f"{number_of(channels, 'channel')}; name as many as an image has"
        )


def shape_in(look: Look, axes: str) -> tuple[int, ...]:
    """The shape [channels, *space] of an image that is turned to an orientation."""
    if not look.axes or not axes or len(look.shape) < 4:
        return look.shape
    pairs = [next(pair for pair in ("RL", "AP", "SI") if letter in pair) for letter in look.axes]
    order = [next(i for i, pair in enumerate(pairs) if letter in pair) for letter in axes]
    return (look.shape[0], *(look.shape[1 + i] for i in order))


def most_common_axes(looks: Sequence[Look]) -> str:
    """The orientation that most volumes have; "" where none has one."""
    counts = Counter(look.axes for look in looks if look.axes)
    return counts.most_common(1)[0][0] if counts else ""


@dataclass(frozen=True)
class Survey:
    """How often each class occurs in each split.

    Attributes:
        splits: a row for each split: "images", "pixels", "low" and "high" (the intensities).
        classes: a row for each split and class: "share" of the pixels that count, and the number of
            images "without" it.
        notes: what was done with files that their owner should know, a line each.
    """

    splits: pd.DataFrame
    classes: pd.DataFrame
    notes: tuple[str, ...] = ()


def survey(
    layout: Layout, looks: Mapping[str, Sequence[Look]], coding: Coding, axes: str
) -> Survey:
    """Count the pixels of each class.

    Args:
        axes: the orientation to which volumes are brought.

    Raises:
        ValueError: a mask holds a value that no class has; names the mask.
    """
    splits, rows, off = [], [], 0
    for split, seen in looks.items():
        table, ignored = [], 0
        for case, look in zip(layout.cases[split], seen, strict=True):
            try:
                found = count_classes(look.masks, look.counts, coding)
            except ValueError as error:
                raise ValueError(f"{case.masks[0][0]} holds {error}") from None
            table.append(found.classes)
            ignored, off = ignored + found.ignored, off + found.off
        counts = np.array(table)
        pixels = sum(int(np.prod(look.shape[1:])) for look in seen) - ignored
        splits.append({
            "split": split, "images": len(seen), "pixels": pixels,
            "low": min(min(look.lows) for look in seen),
            "high": max(max(look.highs) for look in seen),
        })  # fmt: skip
        rows += [
            {"split": split, "class": name, "share": total / max(pixels, 1), "without": int(absent)}
            for name, total, absent in zip(
                coding.names, counts.sum(0), (counts == 0).sum(0), strict=True
            )
        ]
    notes = (*layout.notes, *_notes(looks, coding, axes, off))
    if coding.overlap:
        notes += tuple(
            f"all pixels of {row['split']} are of class {row['class']}; are its masks inverted?"
            for row in rows
            if row["share"] == 1
        )
    return Survey(pd.DataFrame(splits).set_index("split"), pd.DataFrame(rows), notes)


def _notes(
    looks: Mapping[str, Sequence[Look]], coding: Coding, axes: str, off: int
) -> Iterator[str]:
    """What was done with the files, a line each.

    Args:
        axes: as of `survey`.
        off: pixels whose value is none of a class.
    """
    seen = [look for part in looks.values() for look in part]
    files: dict[str, list[str]] = {}
    for look in seen:
        for note, path in look.notes:
            files.setdefault(note, []).append(path)
    for note, paths in files.items():
        more = f" and {len(paths) - 1} more" if paths[1:] else ""
        yield f"{paths[0]}{more}: {note}"
    if other := Counter(look.axes for look in seen if look.axes not in ("", axes)):
        counted = ", ".join(f"{count} were {name}" for name, count in other.items())
        yield f"volumes are turned to the orientation {axes}: {counted}"
    if rounded := sum(mask.rounded for look in seen for mask in look.masks):
        yield f"{number_of(rounded, 'pixel')} of masks were nearly whole numbers, and are rounded"
    if off:
        yield f"{number_of(off, 'pixel')} of masks have values of no class, and get the nearest one"
    if coding.is_found and (first := coding.names[0]) not in ("0", "#000000"):
        yield (
            f"class 0, which losses of the foreground leave out, is {first}: data.classes sets the "
            "order"
        )
    for i, (low, high) in enumerate(
        zip(np.min([k.lows for k in seen], 0), np.max([k.highs for k in seen], 0), strict=True)
    ):
        if low == high:
            yield f"channel {i} of all images is constantly {low:g}: it tells the network nothing"


def show(found: Survey, root: Any) -> None:
    """Print the survey to standard error."""
    from rich.console import Console
    from rich.table import Table

    for note in found.notes:
        say(f"note: {note}")
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
