"""How the training losses differ, pair by pair."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from losswatch.report.runs import OUTCOMES, loss_order

COMPARED = ["accuracy", "dice"]


def compare_losses(runs: pd.DataFrame) -> pd.DataFrame:
    """The mean difference between each two training losses, over pairs of runs that are done.

    The two runs of a pair share all settings but the loss. Pairs of several θ, networks or
    optimisers are taken as one sample: the interval then tells how far the sign holds over the
    sweep, not within one setting.

    Returns:
        A row for each two losses: `loss`, `other`, `pairs` (their number), and for accuracy and
        Dice the mean of loss − other with its 95 % interval (`_low`, `_high`; paired t, NaN below
        two pairs).
    """
    done = runs[runs["status"] == "done"]
    settings = [done[c].map(repr) for c in done if c not in ("run", "loss", *OUTCOMES)]
    cells = done.groupby([*settings, done["loss"]])[COMPARED].mean().unstack("loss")
    rows = []
    for loss, other in combinations(loss_order(done["loss"].dropna().unique()), 2):
        row: dict[str, Any] = {"loss": loss, "other": other}
        for metric in COMPARED:
            difference = (cells[metric][loss] - cells[metric][other]).dropna()
            row["pairs"] = len(difference)
            row[metric], row[f"{metric}_low"], row[f"{metric}_high"] = mean_interval(difference)
        rows.append(row)
    return pd.DataFrame(rows)


def mean_interval(sample: pd.Series) -> tuple[float, float, float]:
    """The mean of independent values and the ends of its 95 % interval, by Student's t.

    The ends are NaN below two values, and the mean is NaN without any. For differences of paired
    values this is the interval of the paired t test.

    >>> [round(x, 2) for x in mean_interval(pd.Series([1.0, 2.0, 3.0]))]
    [2.0, -0.48, 4.48]
    """
    n, mean = len(sample), float(sample.mean())
    margin = float(stats.t.ppf(0.975, n - 1) * sample.sem()) if n > 1 else np.nan
    return mean, mean - margin, mean + margin
