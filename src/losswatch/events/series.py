"""The event files of a run, in order, as one frame of scalars."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from losswatch.events.decode import Block, read_blocks, read_last
from losswatch.events.layout import PREFIX
from losswatch.events.tags import WATCHED

Columns = dict[str, dict[int, float]]  # a value by tag and step


def read_scalars(run_dir: str | Path) -> pd.DataFrame:
    """The scalars in a run's event files: a row for each step (int64), a column for each tag.

    Values are float64, NaN where a tag has no value at a step. Of several values of a tag at a step
    the last one counts.

    A resumed run has several files. A later file replaces all that the earlier ones hold from the
    first step that it observed on, and so does a restart that is marked within a file. A file is
    later than others if it begins at a step that they have not reached: it continues them, whatever
    the clock was. The clock decides between files that could both come next, such as two attempts
    that began at the same step.

    A torn end and a file that cannot be read are left out with a warning. The frame is empty if
    there are no scalars.
    """
    columns: Columns = {}
    files = map(_read_file, sorted(Path(run_dir).glob(f"{PREFIX}*")))
    for file in _in_order([file for file in files if file]):
        if file.marked is not None:
            _forget(columns, file.marked)
        # Metrics alone are no restart: testing a finished run again writes them, too.
        if file.observed is not None:
            # A step is observed before it is taken, and validated after it. So a run that goes on
            # from a step observes this step again, but does not validate it again.
            _forget({t: c for t, c in columns.items() if t.startswith(WATCHED)}, file.observed)
            _forget(columns, file.observed + 1)
        for tag, column in file.columns.items():
            columns.setdefault(tag, {}).update(column)

    frame = pd.DataFrame({tag: pd.Series(c, dtype=np.float64) for tag, c in columns.items() if c})
    frame.index = pd.Index(frame.index, dtype=np.int64, name="step")
    return frame.sort_index()


def read_last_step(run_dir: str | Path) -> dict[str, float]:
    """What was watched at the last step observed, by tag; empty if there is nothing.

    Much faster than `read_scalars`, since only the ends of the files are decoded. Of several files
    the one that got furthest counts, among equals the one written last. What cannot be read is left
    out silently: `read_scalars` names it.
    """
    last: Block | None = None
    for path in Path(run_dir).glob(f"{PREFIX}*"):
        try:
            block = read_last(path, WATCHED)
        except OSError:
            continue
        if block and (
            last is None or (block.steps, block.wall_time) > (last.steps, last.wall_time)
        ):
            last = block
    return {tag: values[0] for tag, values in last.values.items()} if last else {}


class EventFile(NamedTuple):
    """The scalars of an event file, and what tells its place among the files of the run."""

    columns: Columns
    begun: float  # seconds since the epoch, by the clock of the machine that wrote it
    first: int  # step at which it begins: of what is observed, if anything is
    following: int  # step that would come after its last one
    observed: int | None  # first step observed
    marked: int | None  # first step of a marked restart


def _read_file(path: Path) -> EventFile | None:
    """An event file; None if it holds no scalars and marks no restart."""
    columns: Columns = {}
    begun = marked = None
    for block in read_blocks(path):
        if begun is None:
            begun = block.wall_time
        if block.restart:
            [step] = block.steps
            marked = step if marked is None else min(marked, step)
            _forget(columns, step)
        _add(columns, block)
    columns = {tag: column for tag, column in columns.items() if column}
    if begun is None or not (columns or marked is not None):
        return None
    observed = min((min(c) for t, c in columns.items() if t.startswith(WATCHED)), default=None)
    starts = [step for step in (observed, marked) if step is not None]
    first = min(starts or map(min, columns.values()))
    last = max(map(max, columns.values()), default=first)
    longest: dict[int, float] = max(columns.values(), key=len, default={first: 0.0})
    ends = sorted(longest)[-2:]
    following = last + (ends[-1] - ends[0] or 1)  # the last two steps tell how far apart steps are
    return EventFile(columns, begun, first, following, observed, marked)


def _in_order(files: list[EventFile]) -> Iterator[EventFile]:
    """The files one after another, by the rule of `read_scalars`."""
    waiting = sorted(files, key=lambda file: file.begun)
    reached = min((file.first for file in files), default=0)
    while waiting:
        ready = (file for file in waiting if file.first <= reached)
        # If steps are missing, no file continues the others: then the one that begins first.
        file = next(ready, None) or min(waiting, key=lambda file: file.first)
        waiting.remove(file)
        reached = max(reached, file.following)
        yield file


def _forget(columns: Columns, step: int) -> None:
    """Drop all values from a step on."""
    for column in columns.values():
        for stale in [s for s in column if s >= step]:
            del column[stale]


def _add(columns: Columns, block: Block) -> None:
    """Add the values of a block to the columns."""
    for tag, values in block.values.items():
        column, steps = columns.setdefault(tag, {}), block.steps
        if steps[0] == 0 and any(column):
            # A value at step 0 after later ones is a final metric, which HParams repeat at step 0.
            steps, values = steps[1:], values[1:]
        column.update(zip(steps, values, strict=True))
