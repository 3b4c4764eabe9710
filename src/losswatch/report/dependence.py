"""Draws Dice and accuracy over a swept number, with a line for each training loss."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from matplotlib.transforms import ScaledTranslation

from losswatch.report.compare import COMPARED, t_test
from losswatch.report.figures import describe, figures_folder
from losswatch.report.runs import LABELS, done, loss_order, swept
from losswatch.report.style import Looks, draw_files, loss_looks, plain_axes, show_literally
from losswatch.text import file_name, format_value, printable


def plot_dependence(
    sweep_dir: str | Path,
    runs: pd.DataFrame,
    *,
    looks: Looks | None = None,
    formats: Sequence[str] = ("png",),
    into: str | Path | None = None,
) -> dict[str, Path]:
    """Draw the final Dice and accuracy over `swept_number`, if there is one.

    There is a figure for each combination of the other swept settings. A point is the mean over the
    seeds, its bar is the 95 % interval; a single seed has no bar.

    Args:
        runs: rows of `read_runs(sweep_dir)`; runs that are not done are left out.
        looks, formats, into: see `figures.plot_sweep`.

    Returns:
        A file of each figure by title, see `figures.plot_sweep`.

    Raises:
        OSError: the folder cannot be written, or the sweep's `figures` is a link.
    """
    runs = done(runs[runs["loss"].notna()])
    number = swept_number(runs)
    if number is None:
        return {}
    folder = figures_folder(Path(sweep_dir), into)
    looks = looks or loss_looks(runs["loss"])
    others = [c for c in swept(runs) if c not in ("seed", number)]
    names = [
        ",".join(f"{c}={format_value(run[c])}" for c in others) for run in runs.to_dict("records")
    ]
    paths = {}
    for name, group in runs.groupby(pd.Series(names, index=runs.index), sort=False):
        if group[number].nunique() > 1:
            what = f"Dice and accuracy over {LABELS.get(number, number)}"
            title = "   ".join(filter(None, [what, describe(group, others)]))
            stem = folder / file_name(f"over_{number}{',' if name else ''}{name}")
            figure = partial(draw, group, number, title, looks)
            paths[title] = draw_files(figure, stem, formats)
    return {title: path for title, path in paths.items() if path}


def swept_number(runs: pd.DataFrame) -> str | None:
    """θ, or the only other swept number, without the seed; None if there is no such number."""
    numbers = [c for c in swept(runs) if c != "seed" and _is_number(runs[c])]
    return "theta" if "theta" in numbers else numbers[0] if len(numbers) == 1 else None


def _is_number(values: pd.Series) -> bool:
    """Whether a column holds only finite numbers."""
    plain = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return plain and bool(np.isfinite(values.astype(float)).all())


def draw(runs: pd.DataFrame, number: str, title: str, looks: Looks) -> Figure:
    """The figure of runs that are done, over the column `number`."""
    losses = loss_order(runs["loss"].unique())
    values = np.unique(runs[number].astype(float))
    figure = Figure((8.0, 3.8), dpi=160, layout="constrained")
    # Side by side, so that equal values do not hide each other; in inches.
    apart = min(1 / 24, 1.5 / (len(losses) * len(values)))
    for ax, metric in zip(figure.subplots(1, len(COMPARED)), COMPARED, strict=True):
        plain_axes(ax)
        ax.margins(x=0.1)
        for i, loss in enumerate(losses):
            cell = runs[runs["loss"] == loss].groupby(number)[metric]
            points = pd.DataFrame({x: t_test(v.dropna())[:3] for x, v in cell}).T
            points = points[np.isfinite(points[0])]
            aside = apart * (i - (len(losses) - 1) / 2)
            shift = ScaledTranslation(aside, 0, figure.dpi_scale_trans)
            _draw_line(ax, points, looks[loss], loss, ax.transData + shift)
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, 0), min(high, 1))  # a metric lies between 0 and 1
        _set_x(ax, values, is_share=number == "theta")
        ax.set_xlabel(printable(LABELS.get(number, number)), fontsize=10, parse_math=False)
        ax.set_ylabel(f"validation {LABELS[metric]}", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False,
        title="trained with; bars are 95 % intervals of the mean", title_fontsize=9,
    )  # fmt: skip
    show_literally(legend)
    # Matplotlib's own wrapping would parse dollar signs as a formula, whatever `parse_math` says.
    figure.suptitle(textwrap.fill(printable(title), width=90), fontsize=11, parse_math=False)
    return figure


def _draw_line(
    ax: Axes, points: pd.DataFrame, look: dict[str, Any], loss: str, transform: Any
) -> None:
    """Draw the rows (mean, low, high) of `points` over their index."""
    mean, low, high = points.to_numpy().T
    # A metric lies between 0 and 1, but the interval of a few seeds can exceed this.
    low, high = np.minimum(np.maximum(low, 0), mean), np.maximum(np.minimum(high, 1), mean)
    low, high = (np.where(np.isnan(end), mean, end) for end in (low, high))  # one seed: no bar
    ax.errorbar(
        points.index, mean, [mean - low, high - mean], **look, marker="o", markersize=4,
        linewidth=1.4, capsize=3, label=printable(loss), transform=transform, clip_on=False,
    )  # fmt: skip
    for end in (low, high):  # Matplotlib ignores transformed lines for limits
        ax.update_datalim(np.column_stack([points.index, end]))
    ax.autoscale_view()


def _set_x(ax: Axes, values: np.ndarray, is_share: bool) -> None:
    """Make the axis logarithmic for a number over a decade or more; put ticks at the values."""
    if not is_share and values[0] > 0 and values[-1] >= 10 * values[0]:
        ax.set_xscale("log")
    if len(values) <= 8:
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.xaxis.set_minor_locator(NullLocator())
