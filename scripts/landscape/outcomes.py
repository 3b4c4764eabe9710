"""How trainings end: the map of collapse, what rescues a run, and which loss is best where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import chi2, rankdata

from common.intervals import count_text, share_interval
from losswatch.disk.result import CONSTANT
from losswatch.report.runs import done, read_runs

DIES = 0.5  # a loss dies in a cell where at least this share of its runs collapses


def read_sweep(folder: Path) -> pd.DataFrame:
    """The finished runs of a sweep, with `collapsed`.

    Raises:
        FileNotFoundError: there are no runs.
    """
    runs = done(read_runs(folder)).reset_index(drop=True)
    return runs.assign(collapsed=runs["verdict"].fillna("").str.startswith(CONSTANT))


def share_table(runs: pd.DataFrame, losses: Sequence[str]) -> pd.DataFrame:
    """The share of runs that collapsed: a row for each loss, a column for each θ."""
    table = runs.pivot_table("collapsed", "loss", "theta", "mean", observed=True)
    return table.reindex([loss for loss in losses if loss in table.index])


def dying(runs: pd.DataFrame) -> pd.DataFrame:
    """The cells in which at least half of the runs collapse: loss, share of foreground, count."""
    rows = []
    for (loss, normed), cells in runs.groupby(["loss", "batch_norm"], sort=False):
        found = [
            (theta, cell)
            for theta, cell in cells.groupby("theta")
            if cell["collapsed"].mean() >= DIES
        ]
        if found:
            where = ", ".join(
                f"{1 - theta:.0%} ({c['collapsed'].sum()}/{len(c)})" for theta, c in found
            )
            rows.append({"loss": loss, "batch norm": "on" if normed else "off",
                         "foreground (runs that collapsed)": where})  # fmt: skip
    return pd.DataFrame(rows)


def rescues(remedies: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """For each remedy the runs that end constant, and the Dice of the others, over θ.

    Args:
        remedies: the runs of each remedy by its name; the first has none.
    """
    rows = []
    for name, runs in remedies.items():
        row = {"remedy": name}
        for theta, cell in runs.groupby("theta"):
            good = cell.loc[~cell["collapsed"], "dice"]
            mean = f", Dice {good.mean():.3f}" if len(good) else ""
            row[f"{1 - theta:.0%} foreground"] = f"{count_text(~cell['collapsed'])}{mean}"
        rows.append(row)
    return pd.DataFrame(rows)


def rescue_shares(remedies: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The share of runs that do not collapse, as Intervals: a row for a remedy, a column for θ."""
    return pd.DataFrame({
        name: {
            theta: share_interval(int((~cell["collapsed"]).sum()), len(cell))
            for theta, cell in runs.groupby("theta")
        }
        for name, runs in remedies.items()
    }).T  # fmt: skip


# --- Ranking -------------------------------------------------------------------------------------


def kendall_w(values: np.ndarray) -> tuple[float, float]:
    """Kendall's coefficient of concordance of m judges over n items [m, n], and its p-value.

    W = 12·S / (m²(n³ - n) - m·T), where S is the sum of squared deviations of the items' rank sums,
    and T = Σ (t³ - t) over all ties. m(n - 1)W is compared with chi squared (Kendall and Babington
    Smith 1939).

    >>> kendall_w(np.array([[1.0, 2, 3], [1, 2, 3]]))[0]
    1.0
    """
    m, n = values.shape
    ranks = np.apply_along_axis(rankdata, 1, values)
    total = ranks.sum(0)
    ties = sum((c**3 - c).sum() for c in (np.unique(row, return_counts=True)[1] for row in ranks))
    s = ((total - total.mean()) ** 2).sum()
    w = 12 * s / (m**2 * (n**3 - n) - m * ties)
    return float(w), float(chi2.sf(m * (n - 1) * w, n - 1))


def ranking(runs: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, float]]:
    """Each loss's Dice over conditions (network, batch norm, θ), each the mean over seeds.

    Returns:
        a row for each loss, best mean rank first: mean rank, mean Dice, worst Dice and where, how
        often it is best; and Kendall's W of the conditions as judges, its p-value and the number of
        conditions.
    """
    keys = ["model", "batch_norm", "theta"]
    table = runs.pivot_table("dice", keys, "loss", "mean").dropna(axis=1)
    ranks = table.rank(axis=1, ascending=False)
    w, p = kendall_w(table.to_numpy())
    rows = []
    for loss in ranks.mean().sort_values().index:
        worst = table[loss].idxmin()
        rows.append({
            "loss": loss, "mean rank": f"{ranks[loss].mean():.1f}",
            "mean Dice": f"{table[loss].mean():.3f}", "worst Dice": f"{table[loss].min():.3f}",
            "where": where(worst), "best in": f"{int((ranks[loss] == 1).sum())} of {len(table)}",
        })  # fmt: skip
    return pd.DataFrame(rows), {"w": w, "p": p, "conditions": len(table)}


def where(condition: tuple[str, bool, float]) -> str:
    """A condition in words.

    >>> where(("convnet", False, 0.05))
    'convnet, no batch norm, 95 % foreground'
    """
    model, normed, theta = condition
    return f"{model}, {'' if normed else 'no '}batch norm, {100 * (1 - theta):.0f} % foreground"
