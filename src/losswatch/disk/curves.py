"""The run's own record of observations and validations, in files that only grow.

    curves.f32     a row for each step observed: the step (int64), then K values (float32), all
                   little-endian
    curves.json    the names of the K columns, as a list of {"start": byte, "columns": [tag, ...]}:
                   an attempt that observes other losses than the one before begins a new part
    signs.f32, signs.json
                   likewise, what the doctor sees (doctor/signs.py), at fewer steps
    metrics.jsonl  a line for each validation and test: {"step": 100, "val/dice": 0.97, ...};
                   null stands for NaN and infinity

A row or a line that a kill has cut short is not read. A resumed run cuts the files to the sizes
that its checkpoint holds (growing_files.py).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from losswatch.disk.result import as_json
from losswatch.events.layout import PREFIX, SUFFIX
from losswatch.events.tags import GRAD_COSINE
from losswatch.files import append, read_file, replace_file
from losswatch.text import printable, reason

log = logging.getLogger(__name__)

ROWS_FILE, COLUMNS_FILE, METRICS_FILE = "curves.f32", "curves.json", "metrics.jsonl"
SIGNS_FILE, SIGN_COLUMNS_FILE = "signs.f32", "signs.json"


def _row_type(columns: int) -> np.dtype:
    return np.dtype([("step", "<i8"), ("values", "<f4", (columns,))])


class Curves:
    """Writes the record of a run.

    Args:
        folder: of the run.
        rows, columns: the names of the two files.
    """

    def __init__(self, folder: Path, rows: str = ROWS_FILE, columns: str = COLUMNS_FILE) -> None:
        self.folder, self.rows_file, self.columns_file = folder, rows, columns
        self.columns: list[str] = []  # of the rows that are being appended

    def append(self, tags: Sequence[str], steps: np.ndarray, values: np.ndarray) -> None:
        """Append rows.

        Args:
            tags: K names.
            steps: [B] whole numbers.
            values: [B, K], rounded to float32.
        """
        if list(tags) != self.columns:
            self._begin_part(list(tags))
        rows = np.empty(len(steps), _row_type(len(tags)))
        rows["step"], rows["values"] = steps, values
        append(self.folder / self.rows_file, rows.tobytes())

    def _begin_part(self, columns: list[str]) -> None:
        path = self.folder / self.rows_file
        size = path.stat().st_size if path.exists() else 0
        earlier = _read_parts(self.folder / self.columns_file)
        parts = [part for part in earlier if part["start"] < size]  # a resume cut off the others
        if not parts or parts[-1]["columns"] != columns:
            parts.append({"start": size, "columns": columns})
        if parts != earlier:
            replace_file(self.folder / self.columns_file, json.dumps(parts))
        self.columns = columns

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line with the metrics of a validation or a test, by tag."""
        append(self.folder / METRICS_FILE, json.dumps({"step": step, **as_json(metrics)}) + "\n")


def read_curves(run_dir: str | Path) -> pd.DataFrame:
    """A run's curves and metrics: a row for each step (int64), a column for each tag.

    Values are float64, NaN where a tag has no value at a step. If a tag has several values at a
    step, the last one counts. A file that cannot be read is left out with a warning. The frame is
    empty if there are no values.
    """
    folder = Path(run_dir)
    frames = _frames(folder, ROWS_FILE, COLUMNS_FILE)
    lines = _read_metrics(folder)
    frames.append(pd.DataFrame(lines, [line.pop("step") for line in lines], dtype=np.float64))
    frame = pd.concat([frame for frame in frames if len(frame)] or frames)
    frame.index = pd.Index(frame.index, dtype=np.int64, name="step")
    if frame.empty and was_written_by_0_1(folder):
        log.warning("%s %s", printable(folder), OLD)
    return frame.groupby("step").last()


def read_signs(run_dir: str | Path) -> pd.DataFrame:
    """What the doctor saw of a run, as `read_curves` gives the curves; may be empty."""
    frames = _frames(Path(run_dir), SIGNS_FILE, SIGN_COLUMNS_FILE)
    frame = pd.concat(frames) if frames else pd.DataFrame()
    frame.index = pd.Index(frame.index, dtype=np.int64, name="step")
    return frame.groupby("step").last()


def _frames(folder: Path, rows_file: str, columns_file: str) -> list[pd.DataFrame]:
    return [
        pd.DataFrame(rows["values"].astype(np.float64), rows["step"], columns)
        for columns, rows in _read_rows(folder / rows_file, folder / columns_file)
    ]


def last_watched(run_dir: str | Path) -> dict[str, float]:
    """Values and gradient norms of the last step with a number, by tag; empty if there is none."""
    folder = Path(run_dir)
    for columns, rows in reversed(_read_rows(folder / ROWS_FILE, folder / COLUMNS_FILE)):
        tags = [tag for tag in columns if not tag.startswith(GRAD_COSINE)]
        values = rows["values"][:, [columns.index(tag) for tag in tags]]
        with_number = np.flatnonzero((~np.isnan(values)).any(1))
        if len(with_number):
            return dict(zip(tags, values[with_number[-1]].tolist(), strict=True))
    return {}


OLD = "was written by an older losswatch (0.1); that version can resume and read it"


def was_written_by_0_1(folder: Path) -> bool:
    """Whether a folder holds a run without a record: its curves are in its event files alone."""
    has_record = any((folder / name).exists() for name in (ROWS_FILE, COLUMNS_FILE, METRICS_FILE))
    return not has_record and any(folder.glob(f"{PREFIX}*{SUFFIX}"))


def _read_rows(rows_file: Path, columns_file: Path) -> list[tuple[list[str], np.ndarray]]:
    """The columns and the rows of each part."""
    if not (parts := _read_parts(columns_file)):
        return []
    try:
        data = read_file(rows_file)
    except OSError as error:
        _warn(rows_file, error)
        return []
    ends = [*(part["start"] for part in parts[1:]), len(data)]
    found = []
    for part, end in zip(parts, ends, strict=True):
        row = _row_type(len(part["columns"]))
        if (count := (min(end, len(data)) - part["start"]) // row.itemsize) > 0:
            found.append((part["columns"], np.frombuffer(data, row, count, part["start"])))
    return found


def _read_parts(path: Path) -> list[dict[str, Any]]:
    """The parts of the rows, in order: where each starts, and its columns."""
    try:
        parts = json.loads(read_file(path))
        for part in parts:
            start, columns = part["start"], part["columns"]
            is_whole = type(start) is int and start >= 0 and isinstance(columns, list)
            if not is_whole or not all(isinstance(tag, str) for tag in columns):
                raise ValueError("a part has no start or no names of columns")
            if len(set(columns)) < len(columns):
                raise ValueError("a column is named twice")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        _warn(path, error)
        return []
    return parts


def _read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics. Text after the last line break is a line cut short, and not read."""
    path = folder / METRICS_FILE
    try:
        lines = [json.loads(line) for line in read_file(path).split(b"\n")[:-1]]
        for line in lines:
            if type(line["step"]) is not int:
                raise ValueError("a line has no step")
            line |= {tag: math.nan if v is None else float(v) for tag, v in line.items()
                     if tag != "step"}  # fmt: skip
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        _warn(path, error)
        return []
    return lines


def _warn(path: Path, error: Exception) -> None:
    log.warning("%s: left out, cannot be read (%s)", printable(path), reason(error))
