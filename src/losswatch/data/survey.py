"""Reads every file of a folder before training: do they fit, and how rare is each class?"""

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
from joblib import cpu_count

from losswatch.data.cases import Case, Mask, load
from losswatch.data.form import Form
from losswatch.data.labels import Coding, count_classes, distinct_values
from losswatch.data.reading import read
from losswatch.data.splits import Layout
from losswatch.data.tree import parts_of
from losswatch.terminal import followed, say
from losswatch.text import number_of

VERSION = 2  # of `FileStats` in the cache


class FileStats(NamedTuple):
    """What the survey needs to know of one image and its masks."""

    shape: tuple[int, ...]  # [channels, *space]
    lows: tuple[float, ...]  # the smallest intensity of each channel
    highs: tuple[float, ...]
    axes: str  # see `Content`
    masks: tuple[Mask, ...]  # with only the distinct values [V]
    counts: tuple[np.ndarray, ...]  # for each mask, how many pixels have each of its values
    notes: tuple[tuple[str, str], ...]  # see `Content`

    def describe(self) -> str:
        channels, dims = self.shape[0], len(self.shape) - 1
        return f"{number_of(channels, 'channel')} and {dims} dimensions"


def read_stats(cases: Sequence[Case], form: Form | None = None) -> list[FileStats]:
    """The stats of every case. Files that have not changed since an earlier command are not read.

    Args:
        form: that of the network's training data, for images without a mask.

    Raises:
        ValueError: a file is damaged, or an image and its masks do not fit. Names the file.
    """
    expected = (form.in_channels, form.dims) if form else (0, 0)
    stamps = [_stamp(case, expected) for case in cases]
    with _open_cache() as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of libraries about single files
        found = cache.read(stamps)
        todo = [i for i, stamp in enumerate(stamps) if stamp not in found]
        # Not more threads than cores, because each holds an image.
        with ThreadPoolExecutor(cpu_count()) as pool:
            all_stats = pool.map(
                functools.partial(_read_stats, expected=expected), (cases[i] for i in todo)
            )
            try:
                for i, stats in zip(
                    todo, followed(all_stats, len(todo), "images looked at"), strict=True
                ):
                    found[stamps[i]] = stats
            finally:
                pool.shutdown(cancel_futures=True)
                cache.add({stamps[i]: found[stamps[i]] for i in todo if stamps[i] in found})
    return [found[stamp] for stamp in stamps]


def _stamp(case: Case, expected: tuple[int, int]) -> str:
    """A hash of everything that decides the stats of a case: its files with sizes and times."""
    marks: list[object] = [VERSION, *expected]
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


def _read_stats(case: Case, expected: tuple[int, int]) -> FileStats:
    """The stats of a case, read from its files.

    Args:
        expected: the channels and dimensions for which a network was trained; 0, 0: any.
    """
    content = load(case, "", *expected)
    image, notes = content.image, list(content.notes)
    if image.dtype.kind == "f" and (bad := int((~np.isfinite(image)).sum())):
        files = {path: read(path, is_mask=False).array for path in case.images}
        path = next(path for path, array in files.items() if not np.isfinite(array).all())
        raise ValueError(
            f"{path} holds NaN or infinity in {number_of(bad, 'pixel')} of {image.size}; replace "
            "them, by numpy.nan_to_num for example"
        )
    # Channel by channel: that is ten times as fast in numpy as over two axes.
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
    return FileStats(image.shape, lows, highs, content.axes, tuple(masks), tuple(counts), said)


class _Cache:
    """The stats of earlier commands, in a file in the user's cache folder.

    Args:
        base: the file; None if it cannot be used.
    """

    def __init__(self, base: sqlite3.Connection | None) -> None:
        self.base = base

    def read(self, stamps: Sequence[str]) -> dict[str, FileStats]:
        if self.base is None:
            return {}
        found = {}
        for stamp in stamps:
            with suppress(Exception):  # the file is damaged, or of another version
                rows = self.base.execute("SELECT look FROM looks WHERE stamp = ?", (stamp,))
                if row := rows.fetchone():
                    found[stamp] = FileStats(*pickle.loads(row[0]))
        return found

    def add(self, all_stats: Mapping[str, FileStats]) -> None:
        if self.base is not None and all_stats:
            rows = [(stamp, pickle.dumps(tuple(stats))) for stamp, stats in all_stats.items()]
            with suppress(sqlite3.Error), self.base:  # the disk is full
                self.base.executemany("INSERT OR REPLACE INTO looks VALUES (?, ?)", rows)


@contextmanager
def _open_cache() -> Iterator[_Cache]:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "losswatch"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        base = sqlite3.connect(folder / "looks.sqlite", timeout=60)
        base.execute("CREATE TABLE IF NOT EXISTS looks (stamp TEXT PRIMARY KEY, look BLOB)")
    except (OSError, sqlite3.Error):  # the folder cannot be written, or the file is something else
        yield _Cache(None)
        return
    with closing(base):
        yield _Cache(base)


def check_alike(
    cases: Sequence[Case], all_stats: Sequence[FileStats], channels: int | None = None
) -> None:
    """Check that all images have the same number of channels and of axes.

    Args:
        channels: the number that the layout names, if it does.

    Raises:
        ValueError: an image differs. Names the first that does.
    """
    first, *_ = all_stats
    for case, stats in zip(cases, all_stats, strict=True):
        if stats.shape[0] != first.shape[0] or len(stats.shape) != len(first.shape):
            raise ValueError(
                f"{case.images[0]} has {stats.describe()}, {cases[0].images[0]} "
                f"{first.describe()}; all images need the same, so convert or remove one"
            )
    if channels is not None and first.shape[0] != channels:
        raise ValueError(
            f"{cases[0].images[0]} has {first.describe()}, but dataset.json names "
            f"{number_of(channels, 'channel')}; name as many as an image has"
        )


def shape_in(stats: FileStats, axes: str) -> tuple[int, ...]:
    """The shape [channels, *space] of an image after it is turned to an orientation."""
    if not stats.axes or not axes or len(stats.shape) < 4:
        return stats.shape
    pairs = [next(pair for pair in ("RL", "AP", "SI") if letter in pair) for letter in stats.axes]
    order = [next(i for i, pair in enumerate(pairs) if letter in pair) for letter in axes]
    return (stats.shape[0], *(stats.shape[1 + i] for i in order))


def most_common_axes(all_stats: Sequence[FileStats]) -> str:
    """The orientation of most volumes; "" if no volume has stats."""
    counts = Counter(stats.axes for stats in all_stats if stats.axes)
    return counts.most_common(1)[0][0] if counts else ""


@dataclass(frozen=True)
class Survey:
    """How often each class occurs in each split.

    Attributes:
        splits: a row for each split: "images", "pixels", "low" and "high" (the intensities).
        classes: a row for each split and class: its "share" of the pixels that count, and the
            number of images "without" it.
        notes: what the owner of the files should know about how they were read, a line each.
    """

    splits: pd.DataFrame
    classes: pd.DataFrame
    notes: tuple[str, ...] = ()


def survey(
    layout: Layout, all_stats: Mapping[str, Sequence[FileStats]], coding: Coding, axes: str
) -> Survey:
    """Count the pixels of each class.

    Args:
        axes: the orientation to which volumes are turned.

    Raises:
        ValueError: a mask holds a value of no class. Names the mask.
    """
    splits, rows, off = [], [], 0
    for split, seen in all_stats.items():
        table, ignored = [], 0
        for case, stats in zip(layout.cases[split], seen, strict=True):
            try:
                found = count_classes(stats.masks, stats.counts, coding)
            except ValueError as error:
                raise ValueError(f"{case.masks[0][0]} holds {error}") from None
            table.append(found.classes)
            ignored, off = ignored + found.ignored, off + found.off
        counts = np.array(table)
        pixels = sum(int(np.prod(stats.shape[1:])) for stats in seen) - ignored
        splits.append({
            "split": split, "images": len(seen), "pixels": pixels,
            "low": min(min(stats.lows) for stats in seen),
            "high": max(max(stats.highs) for stats in seen),
        })  # fmt: skip
        rows += [
            {"split": split, "class": name, "share": total / max(pixels, 1), "without": int(absent)}
            for name, total, absent in zip(
                coding.names, counts.sum(0), (counts == 0).sum(0), strict=True
            )
        ]
    notes = (*layout.notes, *_notes(all_stats, coding, axes, off))
    if coding.overlap:
        notes += tuple(
            f"all pixels of {row['split']} are of class {row['class']}; are its masks inverted?"
            for row in rows
            if row["share"] == 1
        )
    return Survey(pd.DataFrame(splits).set_index("split"), pd.DataFrame(rows), notes)


def _notes(
    all_stats: Mapping[str, Sequence[FileStats]], coding: Coding, axes: str, off: int
) -> Iterator[str]:
    """What the owner of the files should know about how they were read, a line each.

    Args:
        axes: see `survey`.
        off: the number of pixels whose value belongs to no class.
    """
    seen = [stats for part in all_stats.values() for stats in part]
    files: dict[str, list[str]] = {}
    for stats in seen:
        for note, path in stats.notes:
            files.setdefault(note, []).append(path)
    for note, paths in files.items():
        more = f" and {len(paths) - 1} more" if paths[1:] else ""
        yield f"{paths[0]}{more}: {note}"
    if other := Counter(stats.axes for stats in seen if stats.axes not in ("", axes)):
        counted = ", ".join(f"{count} were {name}" for name, count in other.items())
        yield f"volumes are turned to the orientation {axes}: {counted}"
    if rounded := sum(mask.rounded for stats in seen for mask in stats.masks):
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


def print_survey(result: Survey, root: Any) -> None:
    """Print the survey to standard error."""
    from rich.console import Console
    from rich.table import Table

    for note in result.notes:
        say(f"note: {note}")
    table = Table(title=f"{root}: share of pixels (images without the class)", title_justify="left")
    table.add_column("class")
    for split, row in result.splits.iterrows():
        table.add_column(f"{split}, {int(row['images'])} images", justify="right")
    for name, rows in result.classes.groupby("class", sort=False):
        cells = [f"{r.share:.3%} ({r.without})" for r in rows.itertuples()]
        table.add_row(str(name), *cells)
    low, high = result.splits["low"].min(), result.splits["high"].max()
    console = Console(stderr=True)
    with console.capture() as printed:
        console.print(table)
    say(printed.get() + f"intensities from {low:g} to {high:g}")
