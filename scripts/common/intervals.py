"""Means, ratios and shares of runs with their 95 % intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from losswatch.report.compare import t_test


class Interval(NamedTuple):
    """A mean, ratio or share with the ends of its 95 % interval, which are NaN if unknown.

    >>> Interval(0.5, 0.4, 0.62).text(2), Interval(0.5, float("nan"), float("nan")).text()
    ('0.50 (0.40 to 0.62)', '0.500')
    """

    value: float
    low: float
    high: float

    def text(self, digits: int = 3) -> str:
        if np.isnan(self.value):
            return "–"
        text = f"{self.value:.{digits}f}"
        if not np.isnan(self.low):
            text += f" ({self.low:.{digits}f} to {self.high:.{digits}f})"
        return text


def mean_interval(values: Sequence[float] | pd.Series) -> Interval:
    """The mean of independent values, NaN left out; Student's t.

    >>> mean_interval([1.0, 2.0, 3.0]).text(2)
    '2.00 (-0.48 to 4.48)'
    """
    return Interval(*t_test(pd.Series(values, dtype=float).dropna())[:3])


def ratio_interval(above: pd.Series, below: pd.Series) -> Interval:
    """The geometric mean of above / below over the seeds (the index) that both have."""
    logs = mean_interval(np.log(above / below))
    return Interval(*map(float, np.exp(logs)))


def share_interval(count: int, total: int) -> Interval:
    """A share of independent runs; Wilson's score interval.

    >>> share_interval(10, 10).text(2), share_interval(0, 10).text(2)
    ('1.00 (0.72 to 1.00)', '0.00 (0.00 to 0.28)')
    """
    interval = stats.binomtest(count, total).proportion_ci(method="wilson")
    return Interval(count / total, float(interval.low), float(interval.high))


def count_text(happened: pd.Series) -> str:
    """How often something happened in runs, and the share with its interval.

    >>> count_text(pd.Series([True, True, False]))
    '2 of 3 (67 %, 21 to 94 %)'
    """
    count, total = int(happened.sum()), len(happened)
    if not total:
        return "0 of 0"
    value, low, high = (f"{100 * part:.0f}" for part in share_interval(count, total))
    return f"{count} of {total} ({value} %, {low} to {high} %)"
