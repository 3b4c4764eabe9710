"""Figures in the form of the published study: gradient norms above, losses and accuracy below.

Matplotlib's objects are used without pyplot: nothing global, no window, no figure kept alive, so it
is safe in a training process.
"""

import io
import logging
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from losswatch.report.report import (
    KNOWN_LOSSES,
    LABELS,
    loss_order,
    printable,
    read_scalars,
    replace_file,
    show,
    swept,
)

log = logging.getLogger(__name__)

# The study's smoothing, in observed steps of its 10,001, and its axes.
NORM_WINDOW, LOSS_WINDOW = 201, 11
NORM_LIMITS, LOSS_LIMITS, ACCURACY_LIMITS = (0, 4), (0, 1), (0.9, 1.012)

# Eight hues that stay apart under the common colour blindnesses (Okabe and Ito's, but yellow and
# black: one is faint as a line, the other is the accuracy), each in three dashes: 24 looks.
HUES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#5D3A9B", "#8A8A8A")
DASHES = ("solid", (0, (4, 1.3)), (0, (1.2, 1.2)))
LOOKS = [{"color": hue, "linestyle": dash} for dash in DASHES for hue in HUES]

PER_ROW = 3  # columns, as in the study; more would not be readable in a page's width


def plot_curves(
    scalars: pd.DataFrame, path: str | Path, *, title: str = "", trained: str | None = None
) -> None:
    """Draw one run, `scalars` as `read_scalars` gives them, with axes fitted to it."""
    save(draw({trained or "": [scalars]}, title=title, free=True), path)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure at once; a link in its place is replaced, not followed."""
    image = io.BytesIO()
    figure.savefig(image, format=Path(path).suffix[1:] or None)
    replace_file(Path(path), image.getvalue())


def plot_sweep(
    sweep_dir: str | Path,
    runs: pd.DataFrame,
    *,
    seeds: bool = False,
    free: bool = False,
    into: str | Path | None = None,
) -> dict[str, Path]:
    """Draw runs of a sweep, rows of `read_runs`, into its `figures/` or the folder `into`.

    Returns the files by title.

    A column per training loss, a figure per combination of everything else that was swept: the
    mean over seeds with their range shaded, or a figure per seed with `seeds`. Axes are the
    study's, so that figures compare, or fitted with `free`.
    """
    sweep = Path(sweep_dir)
    apart = [c for c in swept(runs) if c != "seed" or seeds]
    titled = list(dict.fromkeys(["theta", "optimizer", "batch_norm", *apart]))
    folder = Path(into or sweep / "figures")
    if not into and folder.is_symlink():
        raise OSError(f"{folder} is a link; figures are not written through it")
    folder.mkdir(parents=True, exist_ok=True)

    jobs = []
    names = [",".join(f"{c}={show(run[c])}" for c in apart) for run in runs.to_dict("records")]
    for name, group in runs.groupby(pd.Series(names, index=runs.index), sort=False):
        folders = {
            loss: [str(sweep / run) for run in group["run"][group["loss"] == loss]]
            for loss in loss_order(group["loss"].dropna().unique())
        }
        title = "   ".join(_describe(c, group[c].iloc[0]) for c in titled)
        path = folder / f"{file_name(str(name) or 'losses')}.png"
        jobs.append(Job(folders, title, path, free))

    # A process takes about two seconds to start, as long as reading and drawing some 15 long runs.
    events = (f for run in runs["run"] for f in (sweep / run).glob("events.out.tfevents.*"))
    size = sum(f.stat().st_size for f in events if os.path.isfile(f))
    workers = min(len(jobs), os.cpu_count() or 1, 1 + size // 2**26)
    if workers == 1:
        drawn = list(map(_run_job, jobs))
    else:  # spawned: a fork of a process with threads, such as a training one, may hang
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            drawn = list(pool.map(_run_job, jobs))
    return {job.title: job.path for job, done in zip(jobs, drawn, strict=True) if done}


class Job(NamedTuple):
    """A figure to draw: the run folders of each training loss, and where it goes."""

    folders: dict[str, list[str]]
    title: str
    path: Path
    free: bool


def _run_job(job: Job) -> bool:
    """Read a figure's runs and draw it; False where they hold no scalars yet, or absurd ones."""
    runs = {loss: [read_scalars(f) for f in folders] for loss, folders in job.folders.items()}
    runs = {loss: [f for f in frames if len(f)] for loss, frames in runs.items()}
    runs = {loss: frames for loss, frames in runs.items() if frames}
    if not runs:
        return False
    try:
        save(draw(runs, title=job.title, free=job.free), job.path)
    except OSError:  # nothing can be written there, the other figures neither
        raise
    except Exception as error:  # Matplotlib's, of steps or values beyond what an axis can show
        why = printable(f"{type(error).__name__}: {error}")
        log.warning("%s: not drawn (%s)", printable(job.path), why)
        return False
    return True


def _describe(setting: str, value: Any) -> str:
    text = f"{LABELS.get(setting, setting)} = {show(value)}"
    if setting == "theta" and isinstance(value, float):
        text += f" ({100 * (1 - value):.3g} % foreground)"
    return text


def file_name(text: str) -> str:
    """A file name like `text`; where that loses something, a checksum keeps names apart.

    >>> file_name("theta=[0.3, 0.6],batch_norm=on"), file_name("note=../x")
    ('theta=0.3,0.6,batch_norm=on', 'note=.._x~5c3098ed')
    """
    text = re.sub(r"[\[\] ]", "", text)
    safe = re.sub(r"[^\w.,=+-]", "_", text, flags=re.ASCII)[:120]
    return safe if safe == text else f"{safe}~{crc32(text.encode()):08x}"


def draw(
    runs: Mapping[str, Sequence[pd.DataFrame]], *, title: str = "", free: bool = False
) -> Figure:
    """The study's figure: a column per training loss, for which `runs` holds its runs' scalars.

    Above, the gradient norms (moving mean over 201 observed steps); below, the losses (over 11)
    and, in black on the right-hand axis, the validation accuracy. Several runs of a loss are shown
    as their mean, with the range from lowest to highest shaded.
    """
    tags = {tag: None for frames in runs.values() for frame in frames for tag in frame}
    looks = loss_looks(
        t.removeprefix("loss/").removeprefix("grad_norm/")
        for t in tags
        if t.startswith(("loss/", "grad_norm/"))
    )
    bands = -(-len(runs) // PER_ROW)
    across = -(-len(runs) // bands)
    width = max(3.3 * across, 7.0)
    figure = Figure((width, 0.7 + 5.0 * bands), dpi=160, layout="constrained")
    grid = figure.subplots(2 * bands, across, squeeze=False, sharex=True, sharey="row")
    twins: list[Axes] = []

    for ax in grid.flat:
        ax.grid(axis="y", color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
        ax.margins(x=0.02)
    for i, (trained, frames) in enumerate(runs.items()):
        band, column = divmod(i, across)
        above, below = grid[2 * band : 2 * band + 2, column]
        last = column == across - 1 or i == len(runs) - 1
        _draw_losses(above, frames, "grad_norm/", NORM_WINDOW, looks, trained)
        _draw_losses(below, frames, "loss/", LOSS_WINDOW, looks, trained)
        if trained:
            color = looks.get(trained, {}).get("color", "black")
            above.set_title(f"trained with {_label(trained)}", fontsize=11, color=color)
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
        _draw_accuracy(twin, frames)
        if last:
            twin.set_ylabel("validation accuracy", fontsize=10)
    for ax in grid[-2:, len(runs) - across * (bands - 1) :].flat:  # the last row's empty places
        ax.set_visible(False)

    if free:
        for row in grid:
            if min(ax.dataLim.y0 for ax in row) >= 0:
                row[0].set_ylim(bottom=0)
        lowest = min(min(twin.dataLim.y0 for twin in twins), 0.99)
        twins[0].set_ylim(lowest - 0.05 * (1 - lowest), ACCURACY_LIMITS[1])
    else:
        for above, below in zip(grid[::2, 0], grid[1::2, 0], strict=True):
            above.set_ylim(NORM_LIMITS)
            below.set_ylim(LOSS_LIMITS)
        twins[0].set_ylim(ACCURACY_LIMITS)

    handles: list[Line2D | Patch] = [
        Line2D([], [], label=_label(name), linewidth=2, **look) for name, look in looks.items()
    ]
    handles.append(Line2D([], [], label="accuracy", color="black"))
    repeats = max(map(len, runs.values()))
    if repeats > 1:
        handles.append(Patch(color="0.8", label=f"range of {repeats} runs"))
    rows = -(-len(handles) // int(width // 1.4))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=-(-len(handles) // rows),
        fontsize=9,
        frameon=False,
        handlelength=2.2,
        columnspacing=1.4,
    )
    # A run's name can be longer than its figure is wide, and has no blanks to break at.
    broken = textwrap.wrap(title.replace(",", ", "), width=60 if len(runs) == 1 else 120)
    figure.suptitle("\n".join(map(_label, broken)), fontsize=12)
    return figure


def _draw_losses(
    ax: Axes,
    frames: Sequence[pd.DataFrame],
    prefix: str,
    window: int,
    looks: Mapping[str, dict[str, Any]],
    trained: str,
) -> None:
    smooth = [moving_mean(f[[t for t in f if t.startswith(prefix)]], window) for f in frames]
    mean, low, high = _over_runs(smooth)
    for tag in mean:
        name = tag.removeprefix(prefix)
        # The trained loss is the thicker line, on top of the others.
        width, order = (2.0, 3.0) if name == trained else (1.2, 2.0)
        ax.plot(mean.index, mean[tag], linewidth=width, zorder=order, **looks[name])
        if len(frames) > 1:
            shade = {"color": looks[name]["color"], "alpha": 0.2, "linewidth": 0}
            ax.fill_between(mean.index, low[tag], high[tag], **shade)


def _draw_accuracy(ax: Axes, frames: Sequence[pd.DataFrame]) -> None:
    """The accuracy over steps, its last value in words: it may lie outside the study's axis."""
    curves = [f["val/accuracy"].dropna() for f in frames if "val/accuracy" in f]
    curves = [curve for curve in curves if len(curve)]
    if not curves:
        return
    mean, low, high = _over_runs(curves)
    marker = "." if len(mean) == 1 else ""
    ax.plot(mean.index, mean, color="black", linewidth=1.2, marker=marker)
    final = pd.Series([curve.iloc[-1] for curve in curves])
    text = f"final accuracy {final.mean():.4f}"
    if len(curves) > 1:
        ax.fill_between(mean.index, low, high, color="black", alpha=0.15, linewidth=0)
        text += f" ({final.min():.4f} to {final.max():.4f})"
    ax.set_title(text, fontsize=8.5, color="0.3")


def plot_ranges(panels: Mapping[str, pd.DataFrame], path: str | Path) -> None:
    """Points with error bars, a panel each: an x per row of its table, a colour per column.

    Cells are (value, low, high); the y axes begin at 0.
    """
    figure = Figure((3.0 * len(panels), 3.2), dpi=160, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, table) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(table):
            value, low, high = np.array([tuple(cell) for cell in table[name]], float).T
            where = np.arange(len(table)) + 0.24 * (i - (len(table.columns) - 1) / 2)
            bars = np.nan_to_num([value - low, high - value])
            ax.errorbar(where, value, bars, fmt="o", color=HUES[i], capsize=3, label=_label(name))
        ax.set_xticks(range(len(table)), [_label(str(row)) for row in table.index], fontsize=9)
        ax.set_xlim(-0.6, len(table) - 0.4)
        ax.set_ylim(bottom=0)
        ax.set_title(_label(title), fontsize=10)
        ax.tick_params(labelsize=9)
        ax.grid(axis="y", color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("gradient norm, last tenth of steps", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    save(figure, path)


def _over_runs(curves: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Mean, lowest and highest at each step of frames or series that may differ in length."""
    steps = pd.concat(curves).groupby(level=0)
    return steps.mean(), steps.min(), steps.max()


def moving_mean(curves: pd.DataFrame, window: int) -> pd.DataFrame:
    """The centred moving mean over `window` observed steps, shorter at the ends.

    The window covers at most 2 % of the steps observed, the study's 201 of 10,001, so that a short
    run keeps its shape.

    >>> moving_mean(pd.DataFrame({"loss": [0.0, 4.0, 2.0]}), 201)["loss"].tolist()
    [0.0, 4.0, 2.0]
    """
    observed = curves.dropna(how="all")
    window = min(window, len(observed) // 100 * 2 + 1)
    return observed.rolling(window, center=True, min_periods=1).mean()


def loss_looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A look per loss, the same in every figure: the project's by rank, any other's by its name.

    Where two other losses of one figure would look alike, the later takes the next free look.

    >>> loss_looks(["dice", "cce"])["cce"]
    {'color': '#0072B2', 'linestyle': 'solid'}
    """
    known, others = LOOKS[: len(KNOWN_LOSSES)], LOOKS[len(KNOWN_LOSSES) :]
    looks = dict(zip(KNOWN_LOSSES, known, strict=True))
    ordered = loss_order(set(names))
    for name in ordered:
        if name not in looks:
            place = crc32(name.encode(errors="replace"))
            turns = (others[(place + i) % len(others)] for i in range(len(others)))
            looks[name] = next((look for look in turns if look not in looks.values()), others[0])
    return {name: looks[name] for name in ordered}


def _label(text: str) -> str:
    """Text that matplotlib shows as it stands, dollar signs included."""
    return printable(text).replace("$", r"\$")
