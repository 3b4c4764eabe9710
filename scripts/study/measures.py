"""The measures that the claims need: of one run, and of several runs."""

from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd

from common.intervals import Interval, mean_interval, ratio_interval
from losswatch.disk.curves import read_curves
from losswatch.events.tags import GRAD_NORM
from losswatch.report.figures import LOSS_WINDOW, NORM_WINDOW, moving_mean
from losswatch.report.runs import done, loss_order

# A run has converged if its final validation accuracy is at least this. Its error is then at most
# half of that of a constant prediction at θ = 0.05 and 0.95.
CONVERGED = 0.975
EARLY = 1000  # steps that count as "the beginning"
SHOT_UP = 1.5  # a number "shoots up" if it reaches this multiple of its first value


# --- One run -------------------------------------------------------------------------------------


def measure(run_dir: str | Path) -> dict[str, float]:
    """The measures of a run, from its scalars. A measure is missing if its scalars are missing.

    late/<loss>     mean gradient norm over the last tenth of the observed steps
    final/dice_fg   mean value of DICEFG over the last tenth of its steps
    first/cce, first_norm/cce
                    the CCE loss and its norm (moving means over 11) at the first step
    peak/cce, peak_norm/cce
                    their highest values in the first 1,000 steps
    quiet/norm, quiet/cce
                    the lowest gradient norm of DICEFG (moving mean over 201), and CCE at that step
    climb/accuracy  gain of the validation accuracy over the last 1,000 steps; NaN in a shorter run
    """
    scalars = read_curves(run_dir)
    measures: dict[str, float] = {}
    norms = scalars.filter(regex=f"^{GRAD_NORM}").dropna(how="all")
    for tag, value in norms.tail(max(1, len(norms) // 10)).mean().items():
        measures[str(tag).replace(GRAD_NORM, "late/")] = value
    if "loss/dice_fg" in scalars:
        values = scalars["loss/dice_fg"].dropna()
        measures["final/dice_fg"] = values.tail(max(1, len(values) // 10)).mean()
    if {"loss/cce", "grad_norm/cce"} <= set(scalars):
        early = scalars.loc[: EARLY - 1, ["loss/cce", "grad_norm/cce"]].dropna()
        smooth = moving_mean(early, LOSS_WINDOW)
        measures["first/cce"], measures["first_norm/cce"] = smooth.iloc[0]
        measures["peak/cce"], measures["peak_norm/cce"] = smooth.max()
    if {"loss/cce", "grad_norm/dice_fg"} <= set(scalars):
        smooth = moving_mean(scalars[["grad_norm/dice_fg", "loss/cce"]].dropna(), NORM_WINDOW)
        quietest = smooth.loc[smooth["grad_norm/dice_fg"].idxmin()]
        measures["quiet/norm"], measures["quiet/cce"] = quietest
    if "val/accuracy" in scalars:
        accuracy = scalars["val/accuracy"].dropna()
        before = accuracy.loc[: accuracy.index[-1] - EARLY + 1]
        measures["climb/accuracy"] = accuracy.iloc[-1] - before.iloc[-1] if len(before) else np.nan
    return measures


def measured_runs(sweep_dir: str | Path, runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of `read_runs(sweep_dir)` for runs that are done, with the columns of `measure`."""
    runs = done(runs).reset_index(drop=True)
    folders = [Path(sweep_dir, run) for run in runs["run"]]
    measures = joblib.Parallel(n_jobs=-1)(joblib.delayed(measure)(f) for f in folders)
    return pd.concat([runs, pd.DataFrame(measures)], axis=1)


# --- Several runs, rows of `measured_runs` -------------------------------------------------------


def pick(runs: pd.DataFrame, **settings: Any) -> pd.DataFrame:
    """The runs with these settings."""
    for name, value in settings.items():
        runs = runs[runs[name] == value]
    return runs


def converged(runs: pd.DataFrame) -> pd.Series:
    """Whether each run has converged."""
    return runs["accuracy"] >= CONVERGED


def rises(runs: pd.DataFrame, times: float) -> pd.Series:
    """Whether the CCE loss and its norm both reach `times` their first value, in each run."""
    return (runs["peak/cce"] >= times * runs["first/cce"]) & (
        runs["peak_norm/cce"] >= times * runs["first_norm/cce"]
    )


def norm_ratio(runs: pd.DataFrame, loss: str) -> Interval:
    """The late gradient norm of the trained loss at 95 % foreground divided by that at 5 %.

    Only runs that converged count, because the norm of a stuck run has another cause.
    """
    runs = pick(runs[converged(runs)], loss=loss)
    norms = (pick(runs, theta=theta).set_index("seed")[f"late/{loss}"] for theta in (0.05, 0.95))
    return ratio_interval(*norms)


def gains_by_cell(runs: pd.DataFrame) -> list[tuple[str, float, Interval]]:
    """Loss, θ, and the accuracy with batch norm minus that without, paired by seed (Adam)."""
    adam = pick(runs, optimizer="adam")
    cells = []
    for loss in loss_order(adam["loss"].unique()):
        for theta in sorted(adam["theta"].unique()):
            cell = pick(adam, loss=loss, theta=theta)
            off, on = (
                pick(cell, batch_norm=normed).set_index("seed")["accuracy"]
                for normed in (False, True)
            )
            cells.append((loss, theta, mean_interval(on - off)))
    return cells
