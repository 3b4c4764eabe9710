"""The tab Losses in TensorBoard.

TensorBoard finds it by the entry point `tensorboard_plugins`. So every TensorBoard beside losswatch
imports this file, also where Plotly is missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tensorboard import plugin_util
from tensorboard.backend.http_util import Respond
from tensorboard.context import RequestContext
from tensorboard.data.provider import RunTagFilter
from tensorboard.plugins.base_plugin import FrontendMetadata, TBContext, TBPlugin
from tensorboard.plugins.scalar.metadata import PLUGIN_NAME as SCALARS
from tensorboard.plugins.text.metadata import PLUGIN_NAME as TEXTS
from werkzeug import Request, Response

from losswatch.board.figure import DICE, draw
from losswatch.board.page import INSTALL, has_plotly
from losswatch.board.trainings import COLUMNS, curves_of, grouped, training_of
from losswatch.disk.curves import (
    COLUMNS_FILE,
    METRICS_FILE,
    ROWS_FILE,
    SIGN_COLUMNS_FILE,
    SIGNS_FILE,
    read_curves,
)
from losswatch.disk.result import Result
from losswatch.doctor.findings import Finding
from losswatch.events.tags import FINDINGS, GRAD_NORM, LOSS, TRAINED, WATCHED
from losswatch.report.diagnosis import as_dicts, findings_of
from losswatch.report.records import read_record
from losswatch.report.runs import as_frame, natural, swept
from losswatch.text import format_value, number_of, one_line, printable, reason, shortened

log = logging.getLogger(__name__)

SAMPLES = 1000  # points of a curve that TensorBoard keeps by default
ALL = "*"  # in place of a sweep: all runs
FINDINGS_TAG, TRAINED_TAG = (f"{tag}/text_summary" for tag in (FINDINGS, TRAINED))  # of add_text
SETTINGS_FILES = ("config.yaml", "overrides.yaml", "hydra.yaml")
FILES = (
    *("result.json", ".hydra", ROWS_FILE, COLUMNS_FILE, METRICS_FILE),
    *(SIGNS_FILE, SIGN_COLUMNS_FILE),
    *(f".hydra/{name}" for name in SETTINGS_FILES),
)


class LossesPlugin(TBPlugin):
    """See `TBPlugin`."""

    plugin_name = "losswatch"

    def __init__(self, context: TBContext) -> None:
        self.data = context.data_provider
        self.logdir = Path(context.logdir).expanduser().resolve() if context.logdir else None
        self.samples = (context.sampling_hints or {}).get(SCALARS, SAMPLES)
        self.records: dict[Path, tuple[tuple[int, ...], Result]] = {}

    def get_plugin_apps(self) -> dict[str, Callable]:
        return {
            "/index.js": _index,
            "/plotly.js": _plotly,
            "/runs": self._answer(self._runs),
            "/figure": self._answer(self._figure),
        }

    def is_active(self) -> bool:
        return self.data is not None and bool(self._list(RequestContext(), ""))

    def frontend_metadata(self) -> FrontendMetadata:
        return FrontendMetadata(es_module_path="/index.js", tab_name="Losses")

    # --- Routes -----------------------------------------------------------------------------------

    def _answer(self, view: Callable[[Choice], dict[str, Any]]) -> Callable:
        """The route that answers with JSON: that of a view, or {"error": a line}."""

        @Request.application
        def route(request: Request) -> Response:
            code = 200
            try:
                if not has_plotly():
                    raise ValueError(f"Plotly is missing: {INSTALL}")
                environ = request.environ
                ctx, experiment = plugin_util.context(environ), plugin_util.experiment_id(environ)
                content = view(self._chosen(ctx, experiment, Options.of(request.args)))
            except ValueError as error:
                content, code = {"error": reason(error)}, 400
            except Exception as error:  # an empty tab would say nothing
                log.exception("the tab Losses")
                content, code = {"error": printable(one_line(error))}, 500
            return Respond(request, json.dumps(content, allow_nan=False), "application/json", code)

        return route

    def _runs(self, chosen: Choice) -> dict[str, Any]:
        """What can be chosen: sweeps, and the values of what was swept in the chosen one."""
        runs, columns = chosen.runs, ["run", "loss", "status"]
        return {
            "sweeps": chosen.sweeps,
            "sweep": chosen.sweep,
            "menus": {name: list(_texts(runs, name).unique()) for name in _menus(runs)},
            "runs": [
                {"name": run, "loss": loss if isinstance(loss, str) else None, "status": status}
                for run, loss, status in (chosen.of_menus()[columns].values if len(runs) else ())
            ],
        }

    def _figure(self, chosen: Choice) -> dict[str, Any]:
        """The figure, and lines that say what it does not show.

        If the figure is still that of `version`, it is left out.
        """
        options, notes = chosen.options, []
        runs = chosen.of_menus()
        columns = grouped(runs) if len(runs) else []
        if not chosen.sweeps:
            notes.append(f"No run has curves {LOSS}<name> or {GRAD_NORM}<name> (yet).")
        elif not columns:
            notes.append("No run is chosen by this expression and these menus.")
        if len(columns) > COLUMNS:
            total = number_of(len(columns), "training")
            notes.append(
                f"The first {COLUMNS} of {total} are shown, {len(columns) - COLUMNS} are not: "
                "choose them by a menu, or by an expression on the names of runs."
            )
        columns = columns[:COLUMNS]
        shown = [run for column in columns for run in column["run"]]
        state = [*options[:-1], notes, [(run, chosen.stamps[run]) for run in shown]]
        version = hashlib.sha256(repr(state).encode()).hexdigest()
        if version == options.version:
            return {"version": version}
        curves = {run: chosen.curves(run) for run in shown}
        sampled = [
            run for run in shown if not chosen.folders[run] and self._is_sampled(curves[run])
        ]
        if sampled:
            names = ", ".join(map(shortened, sampled[:3])) + (" ..." if len(sampled) > 3 else "")
            notes.append(
                f"TensorBoard keeps {self.samples} random points of each curve, so that spikes may "
                f"be missing: {names}"
            )
        trainings = [
            training_of(column, runs, curves.__getitem__, chosen.findings, chosen.told)
            for column in columns
        ]
        figure = draw(trainings, log=options.log, window=options.window, steps=options.steps)
        return {"version": version, "notes": notes, "figure": figure if trainings else None}

    def _is_sampled(self, curves: Mapping[str, pd.Series]) -> bool:
        return 0 < self.samples <= max(map(len, curves.values()), default=0)

    # --- What TensorBoard knows -------------------------------------------------------------------

    def _list(self, ctx: RequestContext, experiment: str) -> dict[str, dict[str, Any]]:
        """The series of each run with a curve of ours, by tag."""
        listed = self.data.list_scalars(ctx, experiment_id=experiment, plugin_name=SCALARS)
        return {
            run: {tag: series for tag, series in tags.items() if _is_shown(tag)}
            for run, tags in listed.items()
            if any(tag.startswith((LOSS, GRAD_NORM)) for tag in tags)
        }

    def _chosen(self, ctx: RequestContext, experiment: str, options: Options) -> Choice:
        listed = self._list(ctx, experiment)
        starts = {
            run.run_name: run.start_time or 0
            for run in self.data.list_runs(ctx, experiment_id=experiment)
        }
        newest: dict[str, float] = {}
        for run in listed:
            newest[_sweep_of(run)] = max(newest.get(_sweep_of(run), 0), starts.get(run, 0))
        sweeps = sorted(sorted(newest, key=natural), key=lambda sweep: -newest[sweep])
        sweep = options.sweep if options.sweep else next(iter(sweeps), ALL)
        names = [
            run for run in sorted(listed, key=natural)
            if sweep in (ALL, _sweep_of(run)) and options.pattern.search(run)
        ]  # fmt: skip
        records = {run: self._record(run) for run in names}
        folders = {run: self._folder(run, needs=ROWS_FILE) for run in names}
        others = [run for run in names if not folders[run]]
        # To the fast loader no runs at all would mean all of them.
        texts = {} if not others else self.data.list_tensors(
            ctx, experiment_id=experiment, plugin_name=TEXTS,
            run_tag_filter=RunTagFilter(others, [FINDINGS_TAG, TRAINED_TAG]),
        )  # fmt: skip
        stamps = {
            run: (
                records[run].status,
                _stamp(folder, (ROWS_FILE, METRICS_FILE, SIGNS_FILE))
                if (folder := folders[run])
                else [
                    (series.max_step, series.max_wall_time)
                    for series in (*listed[run].values(), *texts.get(run, {}).values())
                ],
            )
            for run in names
        }

        def curves(run: str) -> dict[str, pd.Series]:
            if folder := folders[run]:
                return curves_of(read_curves(folder))
            wanted = RunTagFilter([run], list(listed[run]))
            read = self.data.read_scalars(
                ctx, experiment_id=experiment, plugin_name=SCALARS,
                downsample=max(self.samples, 1) if self.samples else 10**7, run_tag_filter=wanted,
            )  # fmt: skip
            return {tag: _series(points) for tag, points in read.get(run, {}).items()}

        def findings(run: str) -> Sequence[Mapping[str, Any]]:
            record = records[run]
            if folder := folders[run]:
                if record.status in ("done", "failed"):
                    return record.findings
                return as_dicts(findings_of(folder, record.choices.get("loss"), is_over=False))
            return as_dicts(_said(read_texts(run, FINDINGS_TAG)))

        def told(run: str) -> str | None:
            return next(iter(read_texts(run, TRAINED_TAG)), None)

        def read_texts(run: str, tag: str) -> list[str]:
            if tag not in texts.get(run, {}):
                return []
            read = self.data.read_tensors(
                ctx, experiment_id=experiment, plugin_name=TEXTS, downsample=10**7,
                run_tag_filter=RunTagFilter([run], [tag]),
            )  # fmt: skip
            points = read.get(run, {}).get(tag, ())
            cells = (cell for point in points for cell in point.numpy.ravel())
            return [cell.decode(errors="replace") for cell in cells if isinstance(cell, bytes)]

        runs = as_frame(names, [records[run] for run in names])
        return Choice(
            options, sweeps, sweep, runs, records, folders, stamps, curves, findings, told
        )

    # --- What lies in the log folder --------------------------------------------------------------

    def _folder(self, run: str, needs: str | None = None) -> Path | None:
        """The folder of a run, if it lies in the log folder and no link leads to it or from it."""
        if self.logdir is None:
            return None
        folder = self.logdir / run
        try:
            if folder.resolve() != folder or not folder.is_relative_to(self.logdir):
                return None
            if any((folder / name).is_symlink() for name in FILES):
                return None
            return folder if (folder / needs if needs else folder).exists() else None
        except (OSError, ValueError):  # a name that is no path
            return None

    def _record(self, run: str) -> Result:
        """What a run says of itself; read again only if its files have changed."""
        if (folder := self._folder(run)) is None:
            return Result()
        stamp = _stamp(folder, ("result.json", *(f".hydra/{name}" for name in SETTINGS_FILES)))
        if folder not in self.records or self.records[folder][0] != stamp:
            self.records[folder] = stamp, read_record(folder)
        return self.records[folder][1]


@Request.application
def _index(request: Request) -> Response:
    text = files("losswatch.board").joinpath("index.js").read_text(encoding="utf-8")
    return Respond(request, text, "text/javascript")


@Request.application
def _plotly(request: Request) -> Response:
    if not has_plotly():
        return Respond(request, "", "text/javascript", code=404)
    from plotly.offline import get_plotlyjs  # an extra

    return Respond(request, get_plotlyjs(), "text/javascript", expires=3600)


class Options(NamedTuple):
    """What a user of the tab has chosen."""

    sweep: str  # the folder of runs; ALL; "" is the newest
    pattern: re.Pattern[str]  # of the names of runs
    menus: tuple[tuple[str, str], ...]  # settings, each with its value as text
    log: bool
    window: int
    steps: tuple[float, float]
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
            window = int(query.get("smooth", 1))
            ends = float(query.get("from", "-inf")), float(query.get("to", "inf"))
        except ValueError as error:
            raise ValueError("smooth, from and to must be numbers") from error
        menus = [(k.removeprefix("set."), v) for k, v in query.items() if k.startswith("set.")]
        is_log, version = query.get("log") == "1", query.get("version", "")
        return cls(query.get("sweep", ""), pattern, tuple(menus), is_log, window, ends, version)


class Choice(NamedTuple):
    """The runs that are chosen by sweep and expression, with the options.

    All from `records` on are by name of a run. A folder is None where only TensorBoard's samples
    are there. A stamp changes with the run's curves and findings.
    """

    options: Options
    sweeps: Sequence[str]  # the newest first
    sweep: str
    runs: pd.DataFrame
    records: Mapping[str, Result]
    folders: Mapping[str, Path | None]
    stamps: Mapping[str, Any]
    curves: Callable[[str], dict[str, pd.Series]]
    findings: Callable[[str], Sequence[Mapping[str, Any]]]
    told: Callable[[str], str | None]  # the trained loss, as a text of TensorBoard tells it

    def of_menus(self) -> pd.DataFrame:
        """The runs that are also chosen by the menus. A setting that was not swept chooses none."""
        runs, menus = self.runs, _menus(self.runs)
        for name, text in self.options.menus:
            if name in menus:
                runs = runs[_texts(runs, name) == text]
        return runs


def _menus(runs: pd.DataFrame) -> list[str]:
    """The settings that differ between runs."""
    if not len(runs):
        return []
    return [*(["loss"] if runs["loss"].nunique(dropna=False) > 1 else []), *swept(runs)]


def _texts(runs: pd.DataFrame, name: str) -> pd.Series:
    return runs[name].map(format_value)


def _is_shown(tag: str) -> bool:
    return tag.startswith(WATCHED) or tag == DICE


def _sweep_of(run: str) -> str:
    """The folder that a run lies in; "." is the log folder."""
    return run.rpartition("/")[0] or "."


def _stamp(folder: Path, names: Sequence[str]) -> tuple[int, ...]:
    """Numbers that change with these files."""
    stats = [path.stat() for path in (folder / name for name in names) if path.exists()]
    return tuple(number for stat in stats for number in (stat.st_mtime_ns, stat.st_size))


def _series(points: Sequence[Any]) -> pd.Series:
    """Points of TensorBoard as a curve. The last one of a step counts."""
    steps = np.array([point.step for point in points], np.int64)
    curve = pd.Series([point.value for point in points], steps, dtype=np.float64)
    return curve[~curve.index.duplicated(keep="last")].sort_index()


def _said(texts: Sequence[str]) -> list[Finding]:
    """The findings in texts of TensorBoard. The last text that names one counts."""
    found = map(Finding.of_lines, texts)
    return list({finding.name: finding for part in found for finding in part}.values())
