"""The tab Losses in TensorBoard: its routes.

TensorBoard finds it by the entry point `tensorboard_plugins`. So every TensorBoard beside losswatch
imports this file, also where Plotly is missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from tensorboard import plugin_util
from tensorboard.backend.http_util import Respond
from tensorboard.plugins.base_plugin import FrontendMetadata, TBContext, TBPlugin
from tensorboard.plugins.scalar.metadata import PLUGIN_NAME as SCALARS
from werkzeug import Request, Response

from losswatch.board.chosen import Chosen, Options
from losswatch.board.figure import POINTS, draw
from losswatch.board.page import INSTALL, has_plotly
from losswatch.board.sources import Events, LogFolder
from losswatch.board.trainings import COLUMNS, grouped, training_of
from losswatch.events.tags import GRAD_NORM, LOSS
from losswatch.text import number_of, one_line, printable, reason, shortened

log = logging.getLogger(__name__)

SAMPLES = 1000  # points of a curve that TensorBoard keeps by default


class LossesPlugin(TBPlugin):
    """See `TBPlugin`."""

    plugin_name = "losswatch"

    def __init__(self, context: TBContext) -> None:
        self.data = context.data_provider
        self.samples = (context.sampling_hints or {}).get(SCALARS, SAMPLES)
        path = Path(context.logdir).expanduser().resolve() if context.logdir else None
        self.logs = LogFolder(path)

    def get_plugin_apps(self) -> dict[str, Callable]:
        figure = Request.application(self._answer)
        return {"/index.js": _index, "/plotly.js": _plotly, "/figure": figure}

    def is_active(self) -> bool:
        return self.data is not None and bool(Events(self.data, self.samples).curves_listed())

    def frontend_metadata(self) -> FrontendMetadata:
        return FrontendMetadata(es_module_path="/index.js", tab_name="Losses")

    def _answer(self, request: Request) -> Response:
        """Answer with JSON: what `_view` gives, or {"error": a line}."""
        code = 200
        try:
            if not has_plotly():
                raise ValueError(f"Plotly is missing: {INSTALL}")
            content = self._view(request)
        except ValueError as error:
            content, code = {"error": reason(error)}, 400
        except Exception as error:  # an empty tab would say nothing
            log.exception("the tab Losses")
            content, code = {"error": printable(one_line(error))}, 500
        return Respond(request, json.dumps(content, allow_nan=False), "application/json", code)

    def _view(self, request: Request) -> dict[str, Any]:
        """What can be chosen, the figure of what is chosen, and lines that say what it lacks.

        If the figure is still that of the request's `version`, it and the lines are left out.
        """
        environ = request.environ
        context, experiment = plugin_util.context(environ), plugin_util.experiment_id(environ)
        events = Events(self.data, self.samples, context, experiment)
        options = Options.of(request.args)
        chosen = Chosen(options, events, self.logs)
        every = grouped(chosen.runs) if len(chosen.runs) else []
        columns = every[:COLUMNS]
        shown = [run for column in columns for run in column["run"]]
        state = [*options[:-1], len(chosen.sweeps), len(every)]
        state += [(run, chosen.stamp(run)) for run in shown]
        digest = hashlib.sha256(repr(state).encode()).hexdigest()
        choices = {"sweeps": chosen.sweeps, "sweep": chosen.sweep, "menus": chosen.menus}
        if digest == options.version:
            return choices | {"version": digest}
        curves = {run: chosen.curves(run) for run in shown}
        figure = None
        if columns:
            trainings = [
                training_of(
                    column, chosen.runs, curves.__getitem__, chosen.findings, chosen.trained
                )
                for column in columns
            ]  # fmt: skip
            # A minimum and a maximum for each pixel, as far as a curve may have so many points.
            points = max(100, min(POINTS, 2 * options.width // len(columns)))
            figure = draw(
                trainings,
                points=points,
                log=options.log,
                window=options.window,
                steps=options.steps,
            )
        sampled = [r for r in shown if not chosen.has_record(r) and events.is_sampled(curves[r])]
        notes = _notes(chosen, len(every), sampled, self.samples)
        return choices | {"version": digest, "notes": notes, "figure": figure}


def _notes(chosen: Chosen, columns: int, sampled: list[str], samples: int) -> list[str]:
    """Lines that say what the figure of so many columns does not show, or not whole."""
    notes = []
    if not chosen.sweeps:
        notes.append(f"No run has curves {LOSS}<name> or {GRAD_NORM}<name> (yet).")
    elif not columns:
        notes.append("No run is chosen by this expression and these menus.")
    if columns > COLUMNS:
        notes.append(
            f"The first {COLUMNS} of {number_of(columns, 'training')} are shown, "
            f"{columns - COLUMNS} are not: choose them by a menu, or by an expression on the names "
            "of runs."
        )
    if sampled:
        names = ", ".join(map(shortened, sampled[:3])) + (" ..." if len(sampled) > 3 else "")
        notes.append(
            f"TensorBoard keeps {samples} random points of each curve, so that spikes may be "
            f"missing: {names}"
        )
    return notes


@Request.application
def _index(request: Request) -> Response:
    text = files("losswatch.board").joinpath("index.js").read_text(encoding="utf-8")
    if has_plotly():  # a browser may keep this version only as long as it is installed
        text = text.replace("./plotly.js", f"./plotly.js?{version('plotly')}")
    return Respond(request, text, "text/javascript")


@Request.application
def _plotly(request: Request) -> Response:
    if not has_plotly():
        return Respond(request, "", "text/javascript", code=404)
    from plotly.offline import get_plotlyjs  # an extra

    # With this line Chromium compiles the script in the background, so that it starts in half the
    # time. From an earlier visit it has the result, and starts the script in a tenth of the time.
    script = f"//# allFunctionsCalledOnLoad\n{get_plotlyjs()}"
    return Respond(request, script, "text/javascript", expires=30 * 24 * 3600)
