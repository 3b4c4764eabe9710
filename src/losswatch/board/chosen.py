"""The runs that a user of the tab has chosen."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd

from losswatch.board.sources import FINDINGS_TAG, TRAINED_TAG, Events, LogFolder, Series, stamp
from losswatch.board.trainings import curves_of
from losswatch.disk.curves import METRICS_FILE, ROWS_FILE, SIGNS_FILE, read_curves
from losswatch.disk.result import Result
from losswatch.doctor.findings import Finding
from losswatch.report.diagnosis import as_dicts, findings_of
from losswatch.report.runs import as_frame, natural, swept
from losswatch.text import format_value

ALL = "*"  # in place of a sweep: all runs


class Options(NamedTuple):
    """What a user of the tab has chosen."""

    sweep: str  # the folder of runs; ALL; "" is the newest
    pattern: re.Pattern[str]  # of the names of runs
    menus: tuple[tuple[str, str], ...]  # settings, each with its value as text
    log: bool
    window: int
    steps: tuple[float, float]
    width: int  # of the figure [px]
    version: str  # of the figure that is shown

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Options:
        """The options of an address.

        Raises:
            ValueError: one of them has a wrong value. The message is one line.
        """
        try:
            pattern = re.compile(query.get("runs", ""))
        except re.error as error:
            raise ValueError(f"runs: not a regular expression ({error})") from error
        try:
            window, width = int(query.get("smooth", 1)), int(query.get("width", 1200))
            ends = float(query.get("from", "-inf")), float(query.get("to", "inf"))
        except ValueError as error:
            raise ValueError("smooth, width, from and to must be numbers") from error
        menus = tuple((k.removeprefix("set."), v) for k, v in query.items() if k.startswith("set."))
        is_log, version = query.get("log") == "1", query.get("version", "")
        return cls(query.get("sweep", ""), pattern, menus, is_log, window, ends, width, version)


class Chosen:
    """The runs that options choose, and what is known of them.

    A run's own record is read where its folder has one; of other runs, what TensorBoard holds.

    Attributes:
        sweeps: the folders of runs, the newest first.
        sweep: the chosen one, or ALL.
        menus: by name of a setting that differs between the runs of the sweep: its values.
        runs: the chosen runs, as rows of `report.runs.as_frame`.
    """

    def __init__(self, options: Options, events: Events, logs: LogFolder) -> None:
        self._events = events
        self._listed = events.curves_listed()
        self.sweeps = _newest_first(self._listed, events.starts())
        self.sweep = options.sweep or next(iter(self.sweeps), ALL)
        names = [
            run for run in sorted(self._listed, key=natural)
            if self.sweep in (ALL, _sweep_of(run)) and options.pattern.search(run)
        ]  # fmt: skip
        folders = {run: logs.folder(run) for run in names}
        self._records = {run: logs.record(at) if at else Result() for run, at in folders.items()}
        self._folders = {run: at for run, at in folders.items() if at and (at / ROWS_FILE).exists()}
        self.runs = as_frame(names, [self._records[run] for run in names])
        settings = _that_differ(self.runs)
        self.menus = {name: list(_as_texts(self.runs, name).unique()) for name in settings}
        for name, text in options.menus:
            if name in self.menus:  # a setting that was not swept chooses none
                self.runs = self.runs[_as_texts(self.runs, name) == text]

    def has_record(self, run: str) -> bool:
        """Whether all points of a run's curves are known, from its own record."""
        return run in self._folders

    def stamp(self, run: str) -> Any:
        """Numbers that change with a run's curves and findings."""
        if folder := self._folders.get(run):
            return self._records[run].status, stamp(folder, (ROWS_FILE, METRICS_FILE, SIGNS_FILE))
        series = (*self._listed[run].values(), *self._told.get(run, {}).values())
        return self._records[run].status, [(s.max_step, s.max_wall_time) for s in series]

    def curves(self, run: str) -> dict[str, pd.Series]:
        if folder := self._folders.get(run):
            return curves_of(read_curves(folder))
        return self._events.curves(run, self._listed[run])

    def findings(self, run: str) -> Sequence[Mapping[str, Any]]:
        """Those of `result.json` of a run that has ended; else what is certain by now."""
        if folder := self._folders.get(run):
            record = self._records[run]
            if record.status in ("done", "failed"):
                return record.findings
            return as_dicts(findings_of(folder, record.choices.get("loss"), is_over=False))
        found = map(Finding.of_lines, self._texts(run, FINDINGS_TAG))
        # The last text that names a finding counts.
        return as_dicts([*{finding.name: finding for part in found for finding in part}.values()])

    def trained(self, run: str) -> str | None:
        """The trained loss of a run that train.py did not make, as the run tells TensorBoard."""
        return next(iter(self._texts(run, TRAINED_TAG)), None)

    def _texts(self, run: str, tag: str) -> list[str]:
        return self._events.texts(run, tag) if tag in self._told.get(run, {}) else []

    @cached_property
    def _told(self) -> Mapping[str, Series]:
        """The texts of the chosen runs without a record of their own."""
        return self._events.texts_listed([r for r in self.runs["run"] if r not in self._folders])


def _newest_first(runs: Mapping[str, Any], starts: Mapping[str, float]) -> list[str]:
    """The folders of runs, by the start of the newest run in each."""
    newest: dict[str, float] = {}
    for run in runs:
        newest[_sweep_of(run)] = max(newest.get(_sweep_of(run), 0), starts.get(run, 0))
    return sorted(sorted(newest, key=natural), key=lambda sweep: -newest[sweep])


def _sweep_of(run: str) -> str:
    """The folder that a run lies in; "." is the log folder."""
    return run.rpartition("/")[0] or "."


def _that_differ(runs: pd.DataFrame) -> list[str]:
    """The settings that differ between runs."""
    if not len(runs):
        return []
    return [*(["loss"] if runs["loss"].nunique(dropna=False) > 1 else []), *swept(runs)]


def _as_texts(runs: pd.DataFrame, name: str) -> pd.Series:
    return runs[name].map(format_value)
