"""The figures of the report."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from losswatch.report.figures import plot_sweep
from losswatch.report.style import HUES, plain_axes, save, show_literally
from losswatch.text import printable
from study.measures import pick

# The sweeps whose curves are drawn, and the settings of the runs to draw.
DRAWN = {"article": {}, "squared": {"batch_norm": False}, "unet": {"batch_norm": False}}


def plot_sweeps(runs: Mapping[str, pd.DataFrame], runs_dir: Path, out: Path) -> dict[str, Path]:
    """Draw the curves of each sweep below `runs_dir` into `out`. Returns the files by title."""
    figures = {}
    for sweep, settings in DRAWN.items():
        if sweep not in runs:
            continue
        into = out if sweep == "article" else out / sweep
        drawn = pick(runs[sweep], **settings)
        drawn = drawn[[c for c in drawn if "/" not in c]]  # without measures
        for title, path in plot_sweep(runs_dir / sweep, drawn, into=into, study=True).items():
            figures[title if sweep == "article" else f"{sweep}: {title}"] = path
    return figures


def plot_ranges(panels: Mapping[str, pd.DataFrame], path: str | Path) -> None:
    """Draw points with error bars, on axes that begin at 0.

    Args:
        panels: by title, a frame of intervals (value, low, high). A row is a place on the x axis, a
            column a colour.
    """
    figure = Figure((3.0 * len(panels), 3.2), dpi=160, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, table) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(table):
            value, low, high = np.array([tuple(cell) for cell in table[name]], float).T
            where = np.arange(len(table)) + 0.24 * (i - (len(table.columns) - 1) / 2)
            bars = np.nan_to_num([value - low, high - value])
            label = printable(name)
            ax.errorbar(where, value, bars, fmt="o", color=HUES[i], capsize=3, label=label)
        ticks = [printable(row) for row in table.index]
        ax.set_xticks(range(len(table)), ticks, fontsize=9, parse_math=False)
        ax.set_xlim(-0.6, len(table) - 0.4)
        ax.set_ylim(bottom=0)
        ax.set_title(printable(title), fontsize=10, parse_math=False)
        plain_axes(ax)
    axes[0].set_ylabel("gradient norm, last tenth of steps", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False
    )
    show_literally(legend)
    save(figure, path)
