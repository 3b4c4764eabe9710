"""The figures of the atlas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from landscape.bayes import Noise
from landscape.foreseen import SCORES
from losswatch.report.style import HUES, loss_looks, plain_axes

# From never to always, readable without colour: each cell also has its number.
SHADES = "YlOrRd"


def draw_map(tables: Mapping[str, pd.DataFrame], seeds: Mapping[str, int]) -> Figure:
    """The share of runs that end constant: a panel for each network, loss by share of foreground.

    Args:
        tables: by title, from `outcomes.share_table`.
        seeds: runs in a cell, by title.
    """
    rows = max(len(table) for table in tables.values())
    figure = Figure((2.9 * len(tables) + 1.6, 0.32 * rows + 1.7), dpi=160, layout="constrained")
    axes = figure.subplots(1, len(tables), squeeze=False, width_ratios=[
        len(table.columns) for table in tables.values()
    ])[0]  # fmt: skip
    for i, (ax, (title, table)) in enumerate(zip(axes, tables.items(), strict=True)):
        values = table.to_numpy()
        image = ax.imshow(values, cmap=SHADES, vmin=0, vmax=1, aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            if value > 0:
                text = f"{value * seeds[title]:.0f}"
                ax.text(x, y, text, ha="center", va="center", fontsize=7.5,
                        color="white" if value > 0.6 else "black")  # fmt: skip
        ax.set_xticks(range(len(table.columns)), [f"{100 * (1 - t):.0f}" for t in table.columns])
        show = i == 0 or list(table.index) != list(list(tables.values())[i - 1].index)
        ax.set_yticks(range(len(table)), table.index if show else [""] * len(table))
        ax.tick_params(labelsize=8, length=0)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("foreground, %", fontsize=9)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.01)
    bar.set_label("runs that end at a constant answer", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.ax.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    return figure


def draw_rescues(shares: pd.DataFrame, seeds: int) -> Figure:
    """The share of runs that each remedy keeps from ending constant, with its interval.

    Args:
        shares: Intervals, from `outcomes.rescue_shares`.
    """
    thetas = list(shares.columns)
    figure = Figure((2.5 * len(thetas) + 1.8, 0.28 * len(shares) + 1.1), dpi=160,
                    layout="constrained")  # fmt: skip
    axes = figure.subplots(1, len(thetas), sharey=True, squeeze=False)[0]
    for ax, theta in zip(axes, thetas, strict=True):
        value, low, high = np.array([tuple(cell) for cell in shares[theta]], float).T
        places = np.arange(len(shares))[::-1]
        ax.barh(places, value, color=HUES[2], height=0.6)
        ax.errorbar(value, places, xerr=[value - low, high - value], fmt="none", ecolor="0.25",
                    elinewidth=0.9, capsize=2)  # fmt: skip
        ax.set_yticks(places, shares.index)
        ax.set_xlim(0, 1)
        ax.xaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
        ax.set_title(f"{1 - theta:.0%} foreground".replace("%", " %"), fontsize=9)
        plain_axes(ax)
        ax.grid(axis="y", visible=False)
        ax.tick_params(labelsize=8)
    figure.supxlabel(f"runs that do not end constant, of {seeds} seeds", fontsize=9)
    return figure


def draw_scores(groups: Mapping[str, pd.DataFrame], name: str, threshold: float) -> Figure:
    """Each run's score, for runs that collapse and runs that do not, in each group."""
    figure = Figure((7.5, 0.55 * len(groups) + 1.2), dpi=160, layout="constrained")
    ax = figure.subplots()
    rng = np.random.default_rng(0)
    for i, runs in enumerate(groups.values()):
        score = np.exp(SCORES[name](runs)).to_numpy()
        happened = runs["collapsed"].to_numpy()
        for is_so, colour, shift in ((False, HUES[0], 0.17), (True, HUES[4], -0.17)):
            x = score[happened == is_so]
            y = len(groups) - 1 - i + shift + rng.uniform(-0.12, 0.12, len(x))
            label = ("collapsed" if is_so else "did not") if i == 0 else None
            ax.plot(x, y, ".", color=colour, markersize=3, alpha=0.6, label=label)
    ax.axvline(threshold, color="0.2", linewidth=1, linestyle="--")
    ax.set_xscale("log")
    ax.set_yticks(range(len(groups))[::-1], list(groups))
    ax.set_xlabel(f"{name} at the first batch (dashed: the threshold of the first row)", fontsize=9)
    plain_axes(ax)
    ax.tick_params(labelsize=8)
    figure.legend(loc="outside upper right", ncols=2, fontsize=8, frameon=False, markerscale=3)
    return figure


def draw_volumes(table: pd.DataFrame) -> Figure:
    """Predicted volume over noise for each loss: lines are the closed form, points the runs."""
    losses = list(dict.fromkeys(table["loss"]))
    looks = loss_looks(losses)
    tau = np.linspace(0.004, max(table["tau"]) * 1.05, 60)

    def draw(ax: Axes, theta: float, rows: pd.DataFrame) -> None:
        for loss in losses:
            line = [Noise(theta, t).predicted_volume(loss) for t in tau]
            ax.plot(tau, line, color=looks[loss]["color"], linewidth=1.3)
            cell = rows[rows["loss"] == loss]
            _points(ax, cell["tau"], cell["measured"], looks[loss]["color"], loss)

    return _over_noise(table, "predicted share of foreground", draw)


def draw_thresholds(table: pd.DataFrame) -> Figure:
    """Dice of soft Dice minus that of cross entropy, cut at 1/2 and at D*/2."""

    def draw(ax: Axes, theta: float, rows: pd.DataFrame) -> None:
        ax.axhline(0, color="0.4", linewidth=0.8)
        for column, hue, cut in (("soft - half", HUES[4], "1/2"), ("soft - best", HUES[0], "D*/2")):
            label = f"cross entropy cut at {cut}"
            _points(ax, rows["tau"], rows[column], hue, label, line=True)

    return _over_noise(table, "Dice of soft Dice minus …", draw)


def _over_noise(
    table: pd.DataFrame, label: str, draw: Callable[[Axes, float, pd.DataFrame], None]
) -> Figure:
    """A panel over the label noise τ for each θ of a table; `draw` gets its axes, θ and rows."""
    panels = table.groupby("theta")
    figure = Figure((2.7 * len(panels), 2.9), dpi=160, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (theta, rows) in zip(axes, panels, strict=True):
        draw(ax, theta, rows)
        ax.set_title(f"θ = {theta:g}", fontsize=9)
        ax.set_xlabel("label noise τ", fontsize=9)
        plain_axes(ax)
        ax.tick_params(labelsize=8)
    axes[0].set_ylabel(label, fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def draw_empty(table: pd.DataFrame) -> Figure:
    """False-positive volume on empty images over smoothing: lines the closed form."""
    figure = Figure((4.2, 2.9), dpi=160, layout="constrained")
    ax = figure.subplots()
    for i, (over, rows) in enumerate(table.groupby("over")):
        ax.plot(rows["smooth"], rows["wanted"], color=HUES[i], linewidth=1.3)
        _points(ax, rows["smooth"], rows["measured"], HUES[i], f"sums over the {over}")
    ax.set_xscale("log")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("smoothing", fontsize=9)
    ax.set_ylabel("foreground predicted\non empty images", fontsize=9)
    plain_axes(ax)
    ax.tick_params(labelsize=8)
    ax.legend(fontsize=8, frameon=False)
    return figure


def _points(
    ax: Axes, x: Sequence[float], intervals: Sequence, colour: str, label: str, line: bool = False
) -> None:
    """Points with error bars; an unknown interval has no bar."""
    value, low, high = np.array([tuple(cell) for cell in intervals], float).T
    bars = np.nan_to_num([value - low, high - value])
    ax.errorbar(x, value, bars, fmt="o-" if line else "o", color=colour, markersize=4, capsize=2.5,
                linewidth=1, label=label)  # fmt: skip
