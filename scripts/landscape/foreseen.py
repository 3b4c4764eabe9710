"""Is a collapse foreseen at step 0? The scores, and the rules by which they are judged.

Written down before the runs were looked at; only the gain was added when those of the plain network
without batch norm were known, and no others:

- A run has *collapsed* if it predicts one class at all pixels of its last validation.
- The cells (loss, θ) of the plain network without batch norm are split like a chessboard. The score
  with the largest area under the ROC curve on the first half is *the score*; of two that differ by
  less than 0.005 the one earlier in the table. The threshold is the one with the largest share of
  collapses found minus share of false alarms on that half.
- It is judged on the other half, with batch norm, on the U-Net, at other learning rates, with three
  classes and on the real images of the two demonstrations. It is *a law there* if the area is at
  least 0.95, and *fails* below 0.85.
- Intervals are for 95 %: 2,000 draws of whole cells with replacement, because seeds of a cell are
  alike. Calibration: a logistic curve is fitted on the first half; elsewhere its mean is compared
  with the share of runs that collapsed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata

from common.intervals import Interval
from losswatch.doctor.findings import COLLAPSE, COLLAPSE_WITH_NORM

DRAWS = 2000
TIE = 0.005
LAW, FAILS = 0.95, 0.85
DOCTOR = "pull / slope^0.25"  # the score of the doctor, which sees the logits and not the network

# log of each score, from the numbers of `first_step`.
SCORES: Mapping[str, Callable[[pd.DataFrame], pd.Series]] = {
    "pull": lambda f: np.log(f["pull"]),
    "pull / slope^0.25": lambda f: np.log(f["pull"]) + f["distance"] / 4,
    "pull x gain": lambda f: np.log(f["pull"] * f["gain"]),
    "pull x gain / slope^0.25": lambda f: np.log(f["pull"] * f["gain"]) + f["distance"] / 4,
    "response": lambda f: np.log(f["response"]),
    "response x distance": lambda f: np.log(f["response"]) + np.log(f["distance"]),
    "response / slope^0.25": lambda f: np.log(f["response"]) + f["distance"] / 4,
    "response / slope^0.5": lambda f: np.log(f["response"]) + f["distance"] / 2,
    "Adam's response": lambda f: np.log(f["adam"]),
    "Adam's response / slope^0.25": lambda f: np.log(f["adam"]) + f["distance"] / 4,
    "distance": lambda f: f["distance"],
}


def auc(score: np.ndarray, happened: np.ndarray) -> float:
    """The area under the ROC curve: P(score of a collapse > score of another run), ties half."""
    positive = int(happened.sum())
    negative = len(happened) - positive
    if not positive or not negative:
        return float("nan")
    ranks = rankdata(score)
    return float((ranks[happened].sum() - positive * (positive + 1) / 2) / (positive * negative))


def auc_interval(score: np.ndarray, happened: np.ndarray, cell: np.ndarray) -> Interval:
    """The area with its 95 % interval, by drawing whole cells with replacement."""
    rng = np.random.default_rng(0)
    places = [np.flatnonzero(cell == c) for c in np.unique(cell)]
    draws = []
    for _ in range(DRAWS):
        chosen = np.concatenate([places[i] for i in rng.integers(len(places), size=len(places))])
        draws.append(auc(score[chosen], happened[chosen]))
    known = np.array(draws)[~np.isnan(draws)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    return Interval(auc(score, happened), float(low), float(high))


def is_first_half(runs: pd.DataFrame) -> pd.Series:
    """Which runs are in the black fields of the chessboard of losses and θ."""
    field = sum(pd.factorize(runs[key], sort=True)[0] for key in ("loss", "theta"))
    return pd.Series(field % 2 == 0, runs.index)


def cells(runs: pd.DataFrame) -> np.ndarray:
    """The number of each run's cell: its name without the seed."""
    return pd.factorize(runs["run"].str.replace(r",?seed=\d+", "", regex=True))[0]


def choose(fit: pd.DataFrame) -> str:
    """The score for the first half, by the rule above."""
    areas = {
        name: auc(f(fit).to_numpy(), fit["collapsed"].to_numpy()) for name, f in SCORES.items()
    }
    best = max(areas.values())
    return next(name for name, area in areas.items() if area > best - TIE)


def best_threshold(score: np.ndarray, happened: np.ndarray) -> float:
    """Where the share of collapses found minus the share of false alarms is largest.

    Between two scores it is the middle.
    """
    levels = np.unique(score)
    middles = (levels[1:] + levels[:-1]) / 2
    gains = [(score[happened] > m).mean() - (score[~happened] > m).mean() for m in middles]
    return float(middles[int(np.argmax(gains))])


def logistic(score: np.ndarray, happened: np.ndarray) -> tuple[float, float]:
    """Offset and slope of the probability expit(offset + slope·score), by maximum likelihood.

    A weak normal prior on the standardised slope (deviation 10) keeps it finite where a threshold
    separates all runs.
    """
    mean, spread = score.mean(), score.std() or 1.0
    x = (score - mean) / spread

    def cost(w: np.ndarray) -> float:
        z = w[0] + w[1] * x
        return float(np.logaddexp(0, np.where(happened, -z, z)).sum() + w[1] ** 2 / 200)

    offset, slope = minimize(cost, np.zeros(2)).x / np.array([1.0, spread])
    return float(offset - slope * mean), float(slope)


def judge(groups: Mapping[str, pd.DataFrame], name: str) -> pd.DataFrame:
    """How a score does in each group of runs; the first one is the half that it was fixed on.

    Columns: runs, collapsed, area (an Interval), found and false alarms at the threshold, expected
    (the mean probability of the logistic curve), observed (the share), verdict.
    """
    fit = next(iter(groups.values()))
    score = SCORES[name]
    threshold = best_threshold(score(fit).to_numpy(), fit["collapsed"].to_numpy())
    offset, slope = logistic(score(fit).to_numpy(), fit["collapsed"].to_numpy())
    rows = []
    for title, runs in groups.items():
        x, happened = score(runs).to_numpy(), runs["collapsed"].to_numpy()
        area = auc_interval(x, happened, cells(runs))
        rows.append({
            "group": title, "runs": len(runs), "collapsed": int(happened.sum()), "area": area,
            "found": int((x[happened] > threshold).sum()),
            "false alarms": int((x[~happened] > threshold).sum()),
            "expected": float(expit(offset + slope * x).mean()), "observed": float(happened.mean()),
            "verdict": verdict(area.value),
        })  # fmt: skip
    return pd.DataFrame(rows).assign(threshold=float(np.exp(threshold)))


def judge_doctor(groups: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """What the doctor's finding `collapse-ahead` would say of each group of runs.

    Its thresholds are the lowest multiples of 100 that at most 2 % of the map's runs exceed that do
    not collapse, without batch norm and with it.
    """
    rows = []
    for title, runs in groups.items():
        score = np.exp(SCORES[DOCTOR](runs))
        said = score > np.where(runs["batch_norm"], COLLAPSE_WITH_NORM, COLLAPSE)
        happened = runs["collapsed"]
        rows.append({
            "group": title, "runs": len(runs), "collapsed": int(happened.sum()),
            "found": int((said & happened).sum()), "false alarms": int((said & ~happened).sum()),
        })  # fmt: skip
    return pd.DataFrame(rows)


def quiet_threshold(runs: pd.DataFrame, most: float = 0.02) -> int:
    """The lowest multiple of 100 that at most this share of the runs exceeds that do not collapse.

    The score is the doctor's.
    """
    score = np.exp(SCORES[DOCTOR](runs[~runs["collapsed"]]))
    return next(level for level in range(0, 10**8, 100) if (score > level).mean() <= most)


def verdict(area: float) -> str:
    if np.isnan(area):
        return "no collapse"
    return "a law" if area >= LAW else "fails" if area < FAILS else "a tendency"


def compare_scores(groups: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The area of each score in each group: a row for each score."""
    rows = []
    for name, score in SCORES.items():
        areas = {
            title: auc(score(runs).to_numpy(), runs["collapsed"].to_numpy())
            for title, runs in groups.items()
        }
        rows.append({"score": name, **areas})
    return pd.DataFrame(rows)
