"""Compares the training losses, pair by pair: in each condition, and over all conditions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from losswatch.report.runs import by_condition, done, loss_order, settings, swept

COMPARED = ["dice", "accuracy"]


def compare_losses(runs: pd.DataFrame, *, pooled: bool = False) -> pd.DataFrame:
    """The mean difference between each two training losses, over pairs of runs that are done.

    The two runs of a pair share all settings except the loss. A condition has one value for each
    swept setting except the loss and the seed, so the pairs of a condition differ in their seed.

    Args:
        runs: rows of `read_runs`.
        pooled: treat the pairs of all conditions as one sample. The interval then shows whether the
            sign is the same over the sweep. Differences of opposite signs cancel.

    Returns:
        A row for each condition and each two losses that have pairs there: the condition's
        settings, `loss`, `other`, `pairs` (their number), and for Dice and accuracy the mean of
        loss − other, the ends of its 95 % interval (`_low`, `_high`) and the p-value of the paired
        t test (`_p`), corrected by Holm for all rows of the frame. Interval and p-value are NaN
        below two pairs.
    """
    runs = done(runs)
    apart = [] if pooled else [c for c in swept(runs) if c != "seed"]
    groups = [runs] if pooled else by_condition(runs)
    rows = [{c: g[c].iloc[0] for c in apart} | row for g in groups for row in _pairs(g)]
    comparison = pd.DataFrame(rows)
    for metric in COMPARED if rows else ():
        comparison[f"{metric}_p"] = holm(comparison[f"{metric}_p"])
    return comparison


def conditions(comparison: pd.DataFrame) -> list[str]:
    """The columns of a comparison with its conditions."""
    return list(comparison.loc[:, :"loss"])[:-1]


def _pairs(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """A row for each two losses that have pairs of runs; the p-values are not corrected."""
    shared = [runs[c].map(repr) for c in settings(runs)]
    cells = runs.groupby([*shared, runs["loss"]])[COMPARED].mean().unstack("loss")
    rows = []
    for loss, other in combinations(loss_order(runs["loss"].dropna().unique()), 2):
        row: dict[str, Any] = {"loss": loss, "other": other, "pairs": 0}
        for metric in COMPARED:
            difference = (cells[metric][loss] - cells[metric][other]).dropna()
            row["pairs"] = max(row["pairs"], len(difference))
            columns = (metric, f"{metric}_low", f"{metric}_high", f"{metric}_p")
            row |= zip(columns, t_test(difference), strict=True)
        if row["pairs"]:
            rows.append(row)
    return rows


def t_test(sample: pd.Series) -> tuple[float, float, float, float]:
    """Student's t test that the mean of independent values is 0.

    For differences of paired values this is the paired t test.

    Returns:
        The mean, NaN without values; the ends of its 95 % interval and the two-sided p-value, NaN
        below two values. The p-value is 1 if all values are 0, for which the test has no answer.

    >>> [round(x, 4) for x in t_test(pd.Series([1.0, 2.0, 3.0]))]
    [2.0, -0.4841, 4.4841, 0.0742]
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # equal values, or fewer than two
        result = stats.ttest_1samp(sample, 0)
        low, high = map(float, result.confidence_interval())
    is_zero = len(sample) > 1 and not sample.any()
    return float(sample.mean()), low, high, 1.0 if is_zero else float(result.pvalue)


def holm(p_values: Sequence[float] | pd.Series) -> np.ndarray:
    """The p-values corrected for their number by Holm's step-down method; NaN does not count.

    Holm (1979), A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6.

    >>> holm([0.01, 0.04, 0.03, 0.005]).round(3).tolist()
    [0.03, 0.06, 0.06, 0.02]
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p)  # NaN last
    still = np.count_nonzero(~np.isnan(p)) - np.arange(len(p))  # hypotheses that are left
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * still))
    return corrected
