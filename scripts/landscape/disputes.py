"""Three disputes of the literature, each prediction beside its measurement.

Rules, written down before the runs were looked at:

- *Volume*: a prediction holds in a cell if the mean over seeds differs from it by at most 0.01 (one
  percent of all pixels). The volume of cross entropy is the mean p, that of Dice the share of
  pixels above 1/2.
- *Thresholds*: two ways differ in a cell if the 95 % interval of their paired difference in Dice
  (one pair a seed) leaves out 0. The size is said, too, because a small difference can be certain.
- *Empty images*: as for the volume, with the false-positive volume on empty images.

Added after a first look: of the volumes, runs that end at one class at all pixels are counted, and
left out of the mean. They have learnt no answer that theory could tell.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from common.intervals import Interval, mean_interval
from landscape.bayes import Noise, Spread, slope_on_empty
from landscape.sweeps import EMPTY

NEAR = 0.01
KEYS = ["theta", "data.noise"]


def volumes(runs: pd.DataFrame) -> pd.DataFrame:
    """Predicted volume beside the closed form, for each loss, θ and τ.

    Columns: loss, theta, tau, true (the share of foreground), wanted, runs, constant (the number of
    runs that end at one class), measured (an Interval over the others), holds.
    """
    rows = []
    for (loss, theta, tau), cell in runs.groupby(["loss", *KEYS], sort=False):
        wanted = Noise(theta, tau).predicted_volume(loss)
        rows.append({
            "loss": loss, "theta": theta, "tau": tau, "true": Noise(theta, tau).volume,
            **_beside(wanted, cell, "soft" if loss == "cce" else "volume"),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _beside(wanted: float, cell: pd.DataFrame, column: str) -> dict[str, Any]:
    """What theory wants beside what the runs of a cell measured, without those of one class."""
    is_constant = cell["volume"].isin([0.0, 1.0])
    measured = mean_interval(cell.loc[~is_constant, column])
    return {
        "wanted": wanted, "runs": len(cell), "constant": int(is_constant.sum()),
        "measured": measured, "holds": abs(measured.value - wanted) <= NEAR,
    }  # fmt: skip


def thresholds(runs: pd.DataFrame) -> pd.DataFrame:
    """Dice of three ways for each θ and τ, and their paired differences.

    The ways are cross entropy at 1/2, cross entropy at D*/2, and soft Dice at 1/2. D* is in
    the column `possible`.
    """
    rows = []
    for (theta, tau), cell in runs.groupby(KEYS, sort=True):
        cce, dice = (cell[cell["loss"] == loss].set_index("seed") for loss in ("cce", "dice_fg"))
        task = Noise(theta, tau)
        rows.append({
            "theta": theta, "tau": tau, "possible": float(task.dice(task.best("dice_fg"))),
            "half": mean_interval(cce["dice_test"]), "best": mean_interval(cce["dice_best"]),
            "soft": mean_interval(dice["dice_test"]),
            "soft - half": mean_interval(dice["dice_test"] - cce["dice_test"]),
            "soft - best": mean_interval(dice["dice_test"] - cce["dice_best"]),
        })  # fmt: skip
    return pd.DataFrame(rows)


def side(difference: Interval) -> int:
    """1 or -1 if an interval lies above or below 0, and 0 if it holds 0 or is unknown."""
    return int(difference.low > 0) - int(difference.high < 0)


def empty_images(runs: pd.DataFrame) -> pd.DataFrame:
    """False-positive volume on empty images, for sums over batch and sample, over smoothing.

    Columns: over, smooth, wanted, runs, constant (the number of runs that end at one class),
    measured (an Interval over the others), holds, slope (of 1 - D by the predicted share of an
    empty image, at the wanted volume, for sums over the sample).
    """
    pixels = EMPTY["data.image_size"] ** 2
    tasks = {
        over: Spread(EMPTY["theta"], EMPTY["data.theta_spread"], pixels, batch)
        for over, batch in {"batch": EMPTY["data.batch_size"], "sample": 1}.items()
    }
    rows = []
    for (over, smooth), cell in runs.groupby(["loss.over", "loss.smooth_nr"], sort=True):
        wanted = tasks[over].best_volume(smooth)
        slope = slope_on_empty(wanted, smooth, pixels) if over == "sample" else float("nan")
        rows.append({
            "over": over, "smooth": smooth, **_beside(wanted, cell, "volume_empty"), "slope": slope,
        })  # fmt: skip
    return pd.DataFrame(rows)
