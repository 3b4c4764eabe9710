"""Where the tab reads: what TensorBoard holds, and what lies in the log folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tensorboard.context import RequestContext
from tensorboard.data.provider import DataProvider, RunTagFilter
from tensorboard.plugins.scalar.metadata import PLUGIN_NAME as SCALARS
from tensorboard.plugins.text.metadata import PLUGIN_NAME as TEXTS

from losswatch.board.figure import DICE
from losswatch.disk.curves import (
    COLUMNS_FILE,
    METRICS_FILE,
    ROWS_FILE,
    SIGN_COLUMNS_FILE,
    SIGNS_FILE,
)
from losswatch.disk.result import Result
from losswatch.events.tags import FINDINGS, GRAD_NORM, LOSS, TRAINED, WATCHED
from losswatch.report.records import read_record

FINDINGS_TAG, TRAINED_TAG = (f"{tag}/text_summary" for tag in (FINDINGS, TRAINED))  # of add_text
SETTINGS_FILES = tuple(f".hydra/{name}.yaml" for name in ("config", "overrides", "hydra"))
FILES = (
    *("result.json", ".hydra", *SETTINGS_FILES, ROWS_FILE, COLUMNS_FILE, METRICS_FILE),
    *(SIGNS_FILE, SIGN_COLUMNS_FILE),
)
ALL_POINTS = 10**7

Series = Mapping[str, Any]  # by tag: what TensorBoard says of a series


@dataclass(frozen=True)
class Events:
    """What TensorBoard holds of an experiment.

    Attributes:
        samples: the number of points of a curve that TensorBoard keeps; 0: all.
    """

    data: DataProvider
    samples: int
    context: RequestContext = field(default_factory=RequestContext)
    experiment: str = ""

    def curves_listed(self) -> dict[str, Series]:
        """The curves that the tab shows, of each run with a value or norm of a loss."""
        listed = self.data.list_scalars(
            self.context, experiment_id=self.experiment, plugin_name=SCALARS
        )
        return {
            run: {tag: s for tag, s in tags.items() if tag.startswith(WATCHED) or tag == DICE}
            for run, tags in listed.items()
            if any(tag.startswith((LOSS, GRAD_NORM)) for tag in tags)
        }

    def starts(self) -> dict[str, float]:
        """The time of each run's first event [s]; 0: unknown."""
        runs = self.data.list_runs(self.context, experiment_id=self.experiment)
        return {run.run_name: run.start_time or 0 for run in runs}

    def texts_listed(self, runs: Sequence[str]) -> Mapping[str, Series]:
        """The findings and the trained loss of runs that wrote them as texts."""
        if not runs:  # to TensorBoard's fast loader no runs mean all
            return {}
        return self.data.list_tensors(
            self.context, experiment_id=self.experiment, plugin_name=TEXTS,
            run_tag_filter=RunTagFilter(runs, [FINDINGS_TAG, TRAINED_TAG]),
        )  # fmt: skip

    def curves(self, run: str, tags: Iterable[str]) -> dict[str, pd.Series]:
        """The points that TensorBoard keeps of a run's curves."""
        read = self.data.read_scalars(
            self.context, experiment_id=self.experiment, plugin_name=SCALARS,
            downsample=self.samples or ALL_POINTS, run_tag_filter=RunTagFilter([run], list(tags)),
        )  # fmt: skip
        return {tag: _curve(points) for tag, points in read.get(run, {}).items()}

    def is_sampled(self, curves: Mapping[str, pd.Series]) -> bool:
        """Whether TensorBoard may have dropped points of these curves."""
        return 0 < self.samples <= max(map(len, curves.values()), default=0)

    def texts(self, run: str, tag: str) -> list[str]:
        read = self.data.read_tensors(
            self.context, experiment_id=self.experiment, plugin_name=TEXTS,
            downsample=ALL_POINTS, run_tag_filter=RunTagFilter([run], [tag]),
        )  # fmt: skip
        points = read.get(run, {}).get(tag, ())
        cells = (cell for point in points for cell in point.numpy.ravel())
        return [cell.decode(errors="replace") for cell in cells if isinstance(cell, bytes)]


def _curve(points: Sequence[Any]) -> pd.Series:
    """Points of TensorBoard as a curve. The last one of a step counts."""
    steps = np.array([point.step for point in points], np.int64)
    curve = pd.Series([point.value for point in points], steps, dtype=np.float64)
    return curve[~curve.index.duplicated(keep="last")].sort_index()


@dataclass(frozen=True)
class LogFolder:
    """The folders of runs inside the log folder; None: TensorBoard reads no folder."""

    path: Path | None
    _records: dict[Path, tuple[tuple[int, ...], Result]] = field(default_factory=dict)

    def folder(self, run: str) -> Path | None:
        """The folder of a run, if it lies in the log folder and no link leads to it or from it."""
        if self.path is None:
            return None
        folder = self.path / run
        try:
            if folder.resolve() != folder or not folder.is_relative_to(self.path):
                return None
            if any((folder / name).is_symlink() for name in FILES):
                return None
            return folder if folder.exists() else None
        except (OSError, ValueError):  # a name that is no path
            return None

    def record(self, folder: Path) -> Result:
        """What a run says of itself; read again only if its files have changed."""
        now = stamp(folder, ("result.json", *SETTINGS_FILES))
        if folder not in self._records or self._records[folder][0] != now:
            self._records[folder] = now, read_record(folder)
        return self._records[folder][1]


def stamp(folder: Path, names: Sequence[str]) -> tuple[int, ...]:
    """Numbers that change with these files."""
    stats = [path.stat() for path in (folder / name for name in names) if path.exists()]
    return tuple(number for stat in stats for number in (stat.st_mtime_ns, stat.st_size))
