"""The figure of the tab and of report.html: a column for each training, one colour a loss.

Everything here is plain data for Plotly, so that a test, a page and a tab can use it. Text of run
folders is escaped, because Plotly shows some HTML.
"""

from __future__ import annotations

import html
import textwrap
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from losswatch.events.tags import GRAD_COSINE, GRAD_NORM, LOSS, watched_names
from losswatch.report.runs import loss_order
from losswatch.report.style import Looks, loss_looks
from losswatch.text import number_of, printable

POINTS = 1000  # of a curve, at most
DICE = "val/dice"
ROWS = {
    GRAD_NORM: "gradient norm",
    LOSS: "loss",
    GRAD_COSINE: "cosine to the<br>trained gradient",
    DICE: "validation Dice",
}
# The height of a row, of what stands above and below the rows, and of a line in the legend [px].
ROW, AROUND, LEGEND_LINE = 230, 150, 19.5

Curves = Mapping[str, pd.Series]  # by tag: the values, by step; NaN where there is no number


@dataclass(frozen=True)
class Training:
    """A column of the figure: runs that differ only in the seed.

    Attributes:
        title: what was swept, as text.
        trained: the name of the trained loss; None if it is not known.
        runs: the curves of each run.
        findings: of all runs, each with name, step, text and remedy (doctor/README.md).
    """

    title: str
    trained: str | None
    runs: Sequence[Curves]
    findings: Sequence[Mapping[str, Any]] = ()


def draw(
    trainings: Sequence[Training],
    *,
    points: int = POINTS,
    looks: Looks | None = None,
    log: bool = False,
    window: int = 1,
    steps: tuple[float, float] = (-np.inf, np.inf),
) -> dict[str, Any]:
    """A figure for Plotly, as plain data.

    Above are the gradient norms, then the values, the cosines to the gradient of the trained loss,
    and Dice on the validation images; rows without numbers are left out. Several runs are shown as
    mean and range.

    Args:
        points: of a curve, at most.
        looks: those of at least the losses in the figure, from `loss_looks`.
        log: whether the axis of the gradient norms is logarithmic.
        window: observed steps in the moving mean of norms, values and cosines; 1 is none.
        steps: the first and the last step to show.
    """
    tags = {tag for training in trainings for run in training.runs for tag in run}
    order = loss_order(watched_names(tags))
    if looks is None or not set(order) <= looks.keys():
        looks = loss_looks(order)
    rows = [row for row in ROWS if any(tag.startswith(row) for tag in tags)]
    bands: list[dict[str, Any]] = []
    thin: list[dict[str, Any]] = []
    thick: list[dict[str, Any]] = []
    legend: set[str] = set()
    for column, training in enumerate(trainings):
        for row, prefix in enumerate(rows):
            is_metric = prefix == DICE
            for rank, name in enumerate(["validation Dice"] if is_metric else order):
                tag = DICE if is_metric else _tag(prefix, name, training.trained or order[0], tags)
                curves = [run[tag] for run in training.runs if tag in run]
                if not is_metric:
                    curves = [smooth(curve, window) for curve in curves]
                curves = [curve.loc[slice(*steps)] for curve in curves]
                curves = [curve for curve in curves if len(curve)]
                if not curves:
                    continue
                is_trained = name == training.trained
                line = {"color": "black"} if is_metric else _line(looks[name])
                style = {
                    "xaxis": _axis("x", column),
                    "yaxis": _axis("y", row),
                    "name": plain(name),
                    "legendgroup": plain(name),
                    "legendrank": 2000 if is_metric else rank + 1,
                    "showlegend": name not in legend,
                    "line": line | {"width": 2.5 if is_trained else 1.3},
                }
                *band, mean = _traces(curves, style, points)
                bands += band
                (thick if is_trained else thin).append(mean)
                legend.add(name)
    height = round(max(ROW * len(rows), LEGEND_LINE * len(legend)) + AROUND)
    layout = _layout(trainings, rows, looks, log, steps, height)
    # By default Plotly has a button that sends the data to its makers' site.
    config = {"responsive": True, "displaylogo": False, "showSendToCloud": False}
    data = [*bands, *thin, *thick]  # later ones lie above
    return {"data": data, "layout": layout, "config": config}


def thinned(curve: pd.Series, points: int = POINTS) -> pd.Series:
    """At most so many points of a curve: minimum and maximum in each of many equal ranges of steps.

    So no spike vanishes. The first and the last point stay. NaN and infinity become NaN, which is
    drawn as a gap; a range that holds some keeps one.

    >>> thinned(pd.Series([0.0, 1.0, 9.0, 1.0, -5.0, 1.0, 2.0]), points=4).tolist()
    [0.0, 9.0, -5.0, 2.0]
    """
    values, steps = curve.to_numpy(np.float64), curve.index.to_numpy()
    values = np.where(np.isfinite(values), values, np.nan)
    if len(values) > points:
        missing = np.isnan(values)
        ranges = (points - 2) // (3 if missing.any() else 2)
        place = ((steps - steps[0]) / (steps[-1] - steps[0]) * ranges).astype(int)
        place = place.clip(max=ranges - 1)
        starts = np.flatnonzero(np.diff(place, prepend=-1))
        lengths = np.diff(starts, append=len(place))
        low, high = (np.repeat(f.reduceat(values, starts), lengths) for f in (np.fmin, np.fmax))

        def first(is_kept: np.ndarray) -> np.ndarray:
            """The first such point of each range."""
            found = np.flatnonzero(is_kept)
            return found[np.unique(place[found], return_index=True)[1]]

        chosen = map(first, (values == low, values == high, missing))
        kept = np.unique(np.concatenate([[0, len(values) - 1], *chosen]))
        values, steps = values[kept], steps[kept]
    return pd.Series(values, steps)


def smooth(curve: pd.Series, window: int) -> pd.Series:
    """The centred moving mean over `window` points, shorter at the ends; gaps stay."""
    if window <= 1:
        return curve
    known = curve.where(np.isfinite(curve))
    return known.rolling(window, center=True, min_periods=1).mean().where(known.notna())


def plain(text: object) -> str:
    """Text that Plotly shows as it is.

    >>> plain("<b>x")
    '&lt;b&gt;x'
    """
    return html.escape(printable(text), quote=False)


# --- What is watched ------------------------------------------------------------------------------


def _tag(prefix: str, name: str, trained: str, tags: Iterable[str]) -> str:
    """The tag of a loss's curve; a cosine is that to the gradient of the trained loss."""
    if prefix != GRAD_COSINE:
        return f"{prefix}{name}"
    tag = f"{prefix}{trained}~{name}"
    return tag if tag in tags else f"{prefix}{name}~{trained}"


# --- Plotly ---------------------------------------------------------------------------------------


def _traces(
    curves: Sequence[pd.Series], style: dict[str, Any], points: int
) -> list[dict[str, Any]]:
    """The line of one loss: a curve, or the mean and the range of several."""
    if len(curves) == 1:
        return [_trace(curves[0], style, points)]
    # Up to the step that all runs reach: the mean of the others would jump there.
    end = min(curve.index[-1] for curve in curves)
    table = pd.concat(curves, axis=1).sort_index().loc[:end]
    values = table.to_numpy()
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):  # a step without any number
        mean = pd.Series(np.where(known, values, 0).sum(1) / known.sum(1), table.index)
    values = np.where(known, values, np.nan)
    low, high = (pd.Series(f.reduce(values, axis=1), table.index) for f in (np.fmin, np.fmax))
    edge = style | {"showlegend": False, "hoverinfo": "skip"}
    edge |= {"line": {"width": 0, "color": style["line"]["color"]}}
    return [
        _trace(low, edge, points),
        _trace(high, edge, points)
        | {"fill": "tonexty", "fillcolor": _faint(style["line"]["color"])},
        _trace(mean, style, points),
    ]


def _trace(curve: pd.Series, style: dict[str, Any], points: int) -> dict[str, Any]:
    curve = thinned(curve, points)
    steps = curve.index.to_numpy()
    is_small = not len(steps) or abs(steps).max() < 2**31
    return style | {
        "type": "scatter",
        "mode": "lines+markers" if len(curve) < 3 else "lines",  # one point has no line
        "x": _packed(steps, "i4" if is_small else "f8"),
        "y": _packed(curve.to_numpy(), "f4"),
    }


def _packed(numbers: np.ndarray, dtype: str) -> dict[str, str]:
    """Numbers as Plotly takes them in JSON, which has no NaN."""
    with np.errstate(over="ignore"):  # of float32; an event file holds nothing else
        data = numbers.astype(f"<{dtype}").tobytes()
    return {"dtype": dtype, "bdata": b64encode(data).decode()}


def _line(look: dict[str, Any]) -> dict[str, Any]:
    """A look of Matplotlib as one of Plotly."""
    dash = look["linestyle"]
    dash = dash if dash == "solid" else ",".join(f"{2 * length:g}px" for length in dash[1])
    return {"color": look["color"], "dash": dash}


def _faint(color: str) -> str:
    red, green, blue = (0, 0, 0) if color == "black" else bytes.fromhex(color[1:])
    return f"rgba({red},{green},{blue},0.18)"


def _axis(letter: str, index: int) -> str:
    return letter if index == 0 else f"{letter}{index + 1}"


def _layout(
    trainings: Sequence[Training],
    rows: Sequence[str],
    looks: Looks,
    log: bool,
    steps: tuple[float, float],
    height: int,
) -> dict[str, Any]:
    layout: dict[str, Any] = {
        # Columns share the axes of rows, and rows those of columns: x, x2, ... and y, y2, ...
        "grid": {
            "rows": max(len(rows), 1),
            "columns": len(trainings),
            "pattern": "coupled",
            "xgap": 0.09,
        },
        "hovermode": "x unified",
        "hoverlabel": {"namelength": -1},  # whole names
        "height": height,
        "margin": {"l": 75, "r": 20, "t": 80, "b": 45},
        "template": {"layout": {"paper_bgcolor": "white", "plot_bgcolor": "white"}},
        "legend": {"itemsizing": "constant", "groupclick": "togglegroup", "tracegroupgap": 0},
        # New data leave zoom and legend as they are.
        "uirevision": f"{log} {[training.title for training in trainings]}",
        "annotations": [],
        "shapes": [],
    }
    grid = {"gridcolor": "#e5e5e5", "zeroline": False}
    for row, prefix in enumerate(rows):
        axis: dict[str, Any] = {"title": {"text": ROWS[prefix]}, "hoverformat": ".5~g"} | grid
        if prefix == GRAD_NORM and log:
            axis |= {"type": "log", "exponentformat": "power"}
        elif prefix == GRAD_COSINE:
            axis |= {"range": [-1.05, 1.05]}
        elif prefix == DICE:  # a constant curve, too, stays in its range
            axis |= {"autorangeoptions": {"clipmin": 0, "clipmax": 1.02}}
        else:
            axis |= {"rangemode": "tozero"}
        layout[f"yaxis{row + 1 if row else ''}"] = axis
    for column, training in enumerate(trainings):
        x = _axis("x", column)
        layout[f"xaxis{column + 1 if column else ''}"] = grid | {
            "title": {"text": "step"},
            "matches": "x" if column else None,
            "hoverformat": "d",
            # Plotly finds both ends where one is not given, also after the user has zoomed.
            **({"range": list(steps)} if np.isfinite(steps).all() else {"autorange": True}),
            "uirevision": f"{steps}",
        }
        layout["annotations"].append(_title(training, x, looks, len(trainings)))
        for place, finding in enumerate(_found(training)):
            mark = {"x": finding["step"], "xref": x, "yref": "paper"}
            layout["annotations"].append(mark | _finding(training, finding, place))
            line = {"color": "#555", "width": 1, "dash": "dot"}
            ends = {"x0": finding["step"], "x1": finding["step"], "y0": 0, "y1": 1}
            layout["shapes"].append(
                {"type": "line", "xref": x, "yref": "paper", "line": line, **ends}
            )
    return layout


def _title(training: Training, x: str, looks: Looks, columns: int) -> dict[str, Any]:
    """The title of one of so many columns."""
    trained = training.trained
    text = f"<b>trained with {plain(trained)}</b>" if trained else "the trained loss is not known"
    # As wide as its column; "optimiser = adam" stays together.
    title = training.title.replace(",", ", ").replace(
        " = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"
    )
    lines = textwrap.wrap(title, max(27, 150 // columns), max_lines=3, placeholder=" ...")
    lines = [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]
    if len(training.runs) > 1:
        lines.append(f"mean and range of {number_of(len(training.runs), 'run')}")
    return {
        "text": "<br>".join([text, *map(plain, lines)]),
        "font": {"size": 12, "color": looks.get(trained or "", {}).get("color", "#333")},
        "x": 0.5,
        "xref": f"{x} domain",
        "y": 1,
        "yref": "paper",
        "yanchor": "bottom",
        "showarrow": False,
    }


def _found(training: Training) -> list[dict[str, Any]]:
    """The findings by name, each with its first step and the number of runs that have it."""
    found: dict[str, dict[str, Any]] = {}
    for finding in sorted(training.findings, key=lambda finding: finding["step"]):
        first = found.setdefault(finding["name"], dict(finding) | {"number": 0})
        first["number"] += 1
    return list(found.values())


def _finding(training: Training, finding: Mapping[str, Any], place: int) -> dict[str, Any]:
    """The mark of a finding: its name, and its text where the mouse is over it."""
    text, number = f"{finding['text']} {finding['remedy']}", len(training.runs)
    if number > 1:
        text = f"In {finding['number']} of {number} runs, first: {text}"
    end = max(
        (run[tag].index[-1] for run in training.runs for tag in run if len(run[tag])), default=0
    )
    return {
        "text": plain(finding["name"]),
        "hovertext": "<br>".join(map(plain, textwrap.wrap(f"step {finding['step']}: {text}", 60))),
        "captureevents": True,
        "font": {"size": 11, "color": "#333"},
        "bgcolor": "rgba(255,255,255,0.8)",
        "showarrow": False,
        "y": 1,
        "yanchor": "top",
        "yshift": -16 * place,
        "xanchor": "right" if finding["step"] > 0.6 * end else "left",
    }
