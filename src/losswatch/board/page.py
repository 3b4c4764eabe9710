"""report.html: what report.md says, and the figure with a mouse, in one file without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import jinja2
import pandas as pd

from losswatch.board.figure import draw
from losswatch.board.trainings import curves_of, grouped, in_parts, training_of
from losswatch.disk.curves import read_curves
from losswatch.files import replace_file
from losswatch.report.records import read_record
from losswatch.report.runs import done
from losswatch.report.style import Looks
from losswatch.report.tables import finding_table, run_table
from losswatch.text import printable

INSTALL = 'pip install "losswatch[board]"'  # what to say where Plotly is missing


def has_plotly() -> bool:
    return find_spec("plotly") is not None


def write_page(
    sweep: Path,
    runs: pd.DataFrame,
    sentences: Sequence[str],
    comparisons: Mapping[str, pd.DataFrame],
    looks: Looks,
) -> Path:
    """Write report.html into a sweep's folder.

    Args:
        runs: rows of `read_runs(sweep)`.
        sentences: what the runs show, in words.
        comparisons: tables of text, by title.
        looks: those of all losses, from `loss_looks`.

    Raises:
        OSError: the file cannot be written.
    """
    from plotly.offline import get_plotlyjs  # an extra

    def curves(name: str):
        return curves_of(read_curves(sweep / name))

    def found(name: str):
        return read_record(sweep / name).findings

    figures = []
    for part in in_parts(grouped(done(runs))):
        trainings = [training_of(column, done(runs), curves, found) for column in part]
        settings = "; ".join(dict.fromkeys(t.title for t in trainings))
        # Of the same settings, parts show different losses.
        losses = ", ".join(dict.fromkeys(t.trained for t in trainings if t.trained))
        label = ": ".join(filter(None, (settings, losses)))
        figures.append({"label": printable(label), "figure": draw(trainings, looks=looks)})
    names = run_table(runs).assign(**{"folder": runs["run"].map(printable).tolist()})
    findings = finding_table(sweep, runs)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("losswatch.board", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("report.html.j2").render(
        title=printable(sweep.resolve().name),
        sentences=sentences,
        tables={"Runs": names, "What is wrong": findings} | dict(comparisons),
        figures=figures,
        plotly=get_plotlyjs(),
    )
    path = sweep / "report.html"
    replace_file(path, text)
    return path
