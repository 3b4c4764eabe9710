"""Draws curves like the study: gradient norms above, losses and accuracy below.

Matplotlib's objects are used without pyplot: there is no global state, no window, and no figure
stays in memory. So a training process can draw figures safely.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from joblib import cpu_count
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from losswatch.disk.curves import ROWS_FILE, read_curves
from losswatch.events.tags import GRAD_NORM, LOSS, watched_names
from losswatch.report.runs import LABELS, done, loss_order, swept
from losswatch.report.style import Looks, draw_files, loss_looks, plain_axes, save, show_literally
from losswatch.text import file_name, format_value, printable

# The study's smoothing, in observed steps of its 10,001, and its axes.
NORM_WINDOW, LOSS_WINDOW = 201, 11
NORM_LIMITS, LOSS_LIMITS, ACCURACY_LIMITS = (0, 4), (0, 1), (0.9, 1.012)

PER_ROW = 3  # columns, as in the study; more would not be readable on the width of a page


def plot_curves(
    scalars: pd.DataFrame,
    path: str | Path,
    *,
    title: str = "",
    trained: str | None = None,
    findings: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Draw one run into the file `path`, with axes that fit it.

    Args:
        scalars: those of the run, from `read_curves`.
        trained: the name of the trained loss.
        findings: of the run, each with a name and a step that is marked.
    """
    figure = draw({trained or "": [scalars]}, title=title)
    above = figure.axes[0]
    for i, finding in enumerate(findings):
        step, name = finding["step"], str(finding["name"])
        for ax in figure.axes[:2]:
            ax.axvline(step, color="0.35", linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        place = (step, 0.97 - 0.07 * i)
        above.annotate(
            f" {name}", place, xycoords=("data", "axes fraction"), fontsize=8, color="0.25",
            va="top", parse_math=False,
            ha="right" if step > 0.6 * max(scalars.index.max(), 1) else "left",
        )  # fmt: skip
    save(figure, path)


# --- The figures of a sweep ----------------------------------------------------------------------


class Job(NamedTuple):
    """A figure to draw."""

    folders: dict[str, list[str]]  # of the runs, by training loss
    title: str
    stem: Path  # the file without its format
    formats: Sequence[str]
    looks: Looks | None
    study: bool  # whether the axes have the limits of the study


def plot_sweep(
    sweep_dir: str | Path,
    runs: pd.DataFrame,
    *,
    seeds: bool = False,
    study: bool = False,
    looks: Looks | None = None,
    formats: Sequence[str] = ("png",),
    into: str | Path | None = None,
) -> dict[str, Path]:
    """Draw the runs of a sweep: a figure for each setting, with a column for each training loss.

    A setting has one value for each swept setting except the loss and the seed. A figure shows the
    mean over the seeds, with their range shaded.

    Args:
        runs: rows of `read_runs(sweep_dir)`; runs that are not done are left out.
        seeds: draw a figure for each seed instead.
        study: give the axes the study's limits, so that figures compare with the study's.
            Otherwise they fit the curves.
        looks: those of all losses, so that they are the same in each figure; see `loss_looks`.
        formats: of the files, each one of `FORMATS`.
        into: the folder for the figures, by default the sweep's `figures/`.

    Returns:
        A file of each figure by title, one that Markdown can show if there is one. Figures without
        scalars are left out.

    Raises:
        OSError: the folder cannot be written, or the sweep's `figures` is a link.
    """
    sweep, runs = Path(sweep_dir), done(runs)
    apart = [c for c in swept(runs) if c != "seed" or seeds]
    titled = list(dict.fromkeys(["theta", "optimizer", "batch_norm", *apart]))
    folder = figures_folder(sweep, into)
    jobs = []
    names = [
        ",".join(f"{c}={format_value(run[c])}" for c in apart) for run in runs.to_dict("records")
    ]
    for name, group in runs.groupby(pd.Series(names, index=runs.index), sort=False):
        folders = {
            loss: [str(sweep / run) for run in group["run"][group["loss"] == loss]]
            for loss in loss_order(group["loss"].dropna().unique())
        }
        title = describe(group, titled) or "losses"
        stem = folder / file_name(str(name) or "losses")
        jobs.append(Job(folders, title, stem, formats, looks, study))

    # A process takes about two seconds to start, as long as reading and drawing some 15 long runs.
    records = (sweep / run / ROWS_FILE for run in runs["run"])
    size = sum(file.stat().st_size for file in records if file.is_file())
    workers = min(len(jobs), cpu_count(), 1 + size // 2**24)
    if workers <= 1:
        drawn = list(map(_run_job, jobs))
    else:  # spawned, because a fork of a process with threads (it may train) can hang
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            drawn = list(pool.map(_run_job, jobs))
    return {job.title: path for job, path in zip(jobs, drawn, strict=True) if path}


def figures_folder(sweep: Path, into: str | Path | None) -> Path:
    """The folder for a sweep's figures. Creates it if it is missing.

    Raises:
        OSError: the folder cannot be created, or the sweep's `figures` is a link.
    """
    folder = Path(into or sweep / "figures")
    if not into and folder.is_symlink():
        raise OSError(f"{folder} is a link; figures are not written through it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def describe(runs: pd.DataFrame, settings: Sequence[str]) -> str:
    """The settings that these runs share, for a title; without those that they do not have."""
    parts = []
    for setting in settings:
        value = runs[setting].iloc[0]
        if value is None or value != value:  # images of one's own have no θ
            continue
        text = f"{LABELS.get(setting, setting)} = {format_value(value)}"
        if setting == "theta" and isinstance(value, float):
            text += f" ({100 * (1 - value):.3g} % foreground)"
        parts.append(text)
    return "   ".join(parts)


def _run_job(job: Job) -> Path | None:
    """Read the runs of a figure and draw it; None if there are no scalars, or drawing fails.

    Raises:
        OSError: the figure cannot be written.
    """
    runs = {loss: [read_curves(f) for f in folders] for loss, folders in job.folders.items()}
    runs = {loss: [f for f in frames if len(f)] for loss, frames in runs.items()}
    runs = {loss: frames for loss, frames in runs.items() if frames}
    if not runs:
        return None

    def figure() -> Figure:
        return draw(runs, title=job.title, study=job.study, looks=job.looks)

    return draw_files(figure, job.stem, job.formats)


# --- One figure ----------------------------------------------------------------------------------


def draw(
    runs: Mapping[str, Sequence[pd.DataFrame]],
    *,
    title: str = "",
    study: bool = False,
    looks: Looks | None = None,
) -> Figure:
    """A figure like those of the study, with a column for each training loss.

    Above are the gradient norms (moving mean over 201 observed steps). Below are the losses (over
    11) and, in black on the right-hand axis, Dice on the validation images: the study shows the
    accuracy, which is high for a constant answer, too. Several runs of a loss are shown as their
    mean, with the range from lowest to highest shaded. The curves end where the first of these runs
    ends, because the mean of the others would jump there.

    Args:
        runs: for each training loss, the scalars of its runs from `read_curves`.
        study: show the accuracy, and give the axes the study's limits. Otherwise the axes fit the
            curves. The accuracy is also shown where no Dice is recorded.
        looks: those of at least the losses in the figure, from `loss_looks`.
    """
    tags = {tag for frames in runs.values() for frame in frames for tag in frame}
    names = watched_names(tags)
    if looks is None or not names <= looks.keys():
        looks = loss_looks(names)
    looks = {name: look for name, look in looks.items() if name in names}
    bands = -(-len(runs) // PER_ROW)  # each band has two rows
    across = -(-len(runs) // bands)
    width = max(3.3 * across, 7.0)
    figure = Figure((width, 0.7 + 5.0 * bands), dpi=160, layout="constrained")
    grid = figure.subplots(2 * bands, across, squeeze=False, sharex=True, sharey="row")
    metric = "accuracy" if study or "val/dice" not in tags else "Dice"
    twins: list[Axes] = []  # the axes of the metric

    for ax in grid.flat:
        plain_axes(ax)
        ax.margins(x=0.02)
    for i, (trained, frames) in enumerate(runs.items()):
        band, column = divmod(i, across)
        above, below = grid[2 * band : 2 * band + 2, column]
        last = column == across - 1 or i == len(runs) - 1
        _draw_losses(above, frames, GRAD_NORM, NORM_WINDOW, looks, trained)
        _draw_losses(below, frames, LOSS, LOSS_WINDOW, looks, trained)
        if trained:
            color = looks.get(trained, {}).get("color", "black")
            text = f"trained with {printable(trained)}"
            above.set_title(text, fontsize=11, color=color, parse_math=False)
        below.set_xlabel("step", fontsize=10)
        below.tick_params(labelbottom=True)
        if column == 0:
            above.set_ylabel("global gradient norm", fontsize=10)
            below.set_ylabel("loss", fontsize=10)

        twin = below.twinx()
        twin.spines["top"].set_visible(False)
        twin.tick_params(labelsize=9, labelright=last)
        if twins:
            twin.sharey(twins[0])
        twins.append(twin)
        _draw_metric(twin, frames, metric)
        if last:
            twin.set_ylabel(f"validation {metric}", fontsize=10)
    for ax in grid[-2:, len(runs) - across * (bands - 1) :].flat:  # empty places of the last band
        ax.set_visible(False)

    _set_limits(grid, twins, study)
    _add_legend(figure, looks, metric, [len(frames) for frames in runs.values()])
    # The name of a run can be wider than its figure, and has no blanks at which a line can break.
    lines = textwrap.wrap(title.replace(",", ", "), width=60 if len(runs) == 1 else 120)
    figure.suptitle("\n".join(map(printable, lines)), fontsize=12, parse_math=False)
    return figure


def _draw_losses(
    ax: Axes,
    frames: Sequence[pd.DataFrame],
    prefix: str,
    window: int,
    looks: Mapping[str, dict[str, Any]],
    trained: str,
) -> None:
    """Draw all curves whose tags begin with `prefix`, as moving means over `window` steps."""
    smooth = [moving_mean(f[[t for t in f if t.startswith(prefix)]], window) for f in frames]
    mean, low, high = _over_runs(smooth)
    for tag in mean:
        name = tag.removeprefix(prefix)
        # The line of the trained loss is thicker, and above the other lines.
        width, order = (2.0, 3.0) if name == trained else (1.2, 2.0)
        ax.plot(mean.index, mean[tag], linewidth=width, zorder=order, **looks[name])
        if len(frames) > 1:
            shade = {"color": looks[name]["color"], "alpha": 0.2, "linewidth": 0}
            ax.fill_between(mean.index, low[tag], high[tag], **shade)


def _draw_metric(ax: Axes, frames: Sequence[pd.DataFrame], metric: str) -> None:
    """Draw a validation metric, and write its last value, which the study's axis may not show."""
    tag = f"val/{metric.lower()}"
    curves = [f[tag].dropna() for f in frames if tag in f]
    curves = [curve for curve in curves if len(curve)]
    if not curves:
        return
    mean, low, high = _over_runs(curves)
    marker = "." if len(mean) == 1 else ""
    ax.plot(mean.index, mean, color="black", linewidth=1.2, marker=marker)
    final = pd.Series([curve.iloc[-1] for curve in curves])
    text = f"final {metric} {final.mean():.4f}"
    if len(curves) > 1:
        ax.fill_between(mean.index, low, high, color="black", alpha=0.15, linewidth=0)
        text += f" ({final.min():.4f} to {final.max():.4f})"
    ax.set_title(text, fontsize=8.5, color="0.3")


def _over_runs(curves: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Mean, minimum and maximum of frames or series, at each step that all of them reach."""
    end = min((curve.index[-1] for curve in curves if len(curve)), default=0)
    steps = pd.concat([curve.loc[:end] for curve in curves]).groupby(level=0)
    return steps.mean(), steps.min(), steps.max()


def _set_limits(grid: np.ndarray, twins: Sequence[Axes], study: bool) -> None:
    """Set the limits of the y axes. The axes of a row share theirs, and all `twins` share one."""
    if study:
        for above, below in zip(grid[::2, 0], grid[1::2, 0], strict=True):
            above.set_ylim(NORM_LIMITS)
            below.set_ylim(LOSS_LIMITS)
        twins[0].set_ylim(ACCURACY_LIMITS)
    else:
        for row in grid:
            if min(ax.dataLim.y0 for ax in row) >= 0:
                row[0].set_ylim(bottom=0)
        lowest = min(min(twin.dataLim.y0 for twin in twins), 0.99)
        twins[0].set_ylim(lowest - 0.05 * (1 - lowest), 1)
        for line in (line for twin in twins for line in twin.get_lines()):
            line.set_clip_on(False)  # one along the axis' end would be half as wide


def _add_legend(
    figure: Figure, looks: Mapping[str, dict[str, Any]], metric: str, counts: Sequence[int]
) -> None:
    """Add a legend below the figure; `counts` are the numbers of runs in the columns."""
    handles: list[Line2D | Patch] = [
        Line2D([], [], label=printable(name), linewidth=2, **look) for name, look in looks.items()
    ]
    handles.append(Line2D([], [], label=f"validation {metric}", color="black"))
    if repeats := sorted({count for count in counts if count > 1}):
        few = f"{repeats[0]} to " if len(repeats) > 1 else ""
        handles.append(Patch(color="0.8", label=f"range of {few}{repeats[-1]} runs"))
    rows = -(-len(handles) // int(figure.get_figwidth() // 1.4))
    legend = figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=-(-len(handles) // rows),
        fontsize=9,
        frameon=False,
        handlelength=2.2,
        columnspacing=1.4,
    )
    show_literally(legend)


def moving_mean(curves: pd.DataFrame, window: int) -> pd.DataFrame:
    """The centred moving mean over `window` observed steps, shorter at the ends.

    The window covers at most 2 % of the observed steps, like 201 of the 10,001 steps of the study,
    so that a short run keeps its shape. Steps without any value do not count.

    >>> moving_mean(pd.DataFrame({"loss": [0.0, 4.0, 2.0]}), 201)["loss"].tolist()
    [0.0, 4.0, 2.0]
    """
    observed = curves.dropna(how="all")
    window = min(window, len(observed) // 100 * 2 + 1)
    return observed.rolling(window, center=True, min_periods=1).mean()
