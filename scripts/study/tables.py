"""The tables of the report, as frames of text. A table without rows is left out of the report."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from common.intervals import mean_interval, ratio_interval
from losswatch.report.runs import loss_order
from losswatch.text import format_value
from study.claims import NAMES, Claim
from study.measures import EARLY, SHOT_UP, converged, gains_by_cell, pick, rises

# Columns of `outcome_table` and the settings of the runs in each: for the article, and for sweeps
# with only Adam.
WAYS = {
    "Adam": {"optimizer": "adam", "batch_norm": False},
    "Adam, BN": {"optimizer": "adam", "batch_norm": True},
    "SGD": {"optimizer": "sgd", "batch_norm": False},
    "SGD, BN": {"optimizer": "sgd", "batch_norm": True},
}
ADAM_WAYS = {"no BN": {"batch_norm": False}, "BN": {"batch_norm": True}}


def foreground(theta: float) -> str:
    """The share of foreground at a θ.

    >>> foreground(0.05)
    '95 %'
    """
    return f"{format_value(round(100 * (1 - theta), 6))} %"


def on_off(batch_norm: bool) -> str:
    return "on" if batch_norm else "off"


def claim_table(claims: Sequence[Claim]) -> pd.DataFrame:
    """A row for each claim."""
    rows = [claim._asdict() for claim in claims]
    return pd.DataFrame(rows).rename(columns={"name": "", "numbers": "measured"})


def outcome_table(runs: pd.DataFrame, ways: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """A row for each loss and θ: how many runs converged in each way, and their accuracy."""
    ways = {title: settings for title, settings in ways.items() if len(pick(runs, **settings))}
    rows = []
    for loss in loss_order(runs["loss"].unique()):
        for theta in sorted(runs["theta"].unique()):
            row = {"trained with": NAMES[loss], "foreground": foreground(theta)}
            for title, settings in ways.items():
                cell = pick(runs, loss=loss, theta=theta, **settings)
                accuracy = mean_interval(cell["accuracy"]).text(4)
                row[title] = f"{converged(cell).sum()}/{len(cell)}: {accuracy}"
            rows.append(row)
    return pd.DataFrame(rows)


def slow_table(article: pd.DataFrame) -> pd.DataFrame:
    """C1: the accuracy of SGD at 50 % foreground, and whether it still climbs."""
    runs = pick(article, optimizer="sgd", theta=0.5)
    rows = []
    for loss in loss_order(runs["loss"].unique()):
        for normed in (False, True):
            cell = pick(runs, loss=loss, batch_norm=normed)
            accuracy = cell["accuracy"]
            rows.append({
                "trained with": NAMES[loss],
                "BN": on_off(normed),
                "accuracy": mean_interval(accuracy).text(),
                "lowest to highest": f"{accuracy.min():.3f} to {accuracy.max():.3f}",
                f"gained in the last {EARLY:,} steps": mean_interval(cell["climb/accuracy"]).text(),
            })  # fmt: skip
    return pd.DataFrame(rows)


def gain_table(article: pd.DataFrame) -> pd.DataFrame:
    """C3: the change of the accuracy by batch norm."""
    if not len(pick(article, optimizer="adam", batch_norm=True)):
        return pd.DataFrame()
    return pd.DataFrame([
        {
            "trained with": NAMES[loss],
            "foreground": foreground(theta),
            "with BN minus without": gain.text(4),
            "": "better" if gain.low > 0 else "worse" if gain.high < 0 else "undecided",
        }
        for loss, theta, gain in gains_by_cell(article)
    ])  # fmt: skip


def early_table(article: pd.DataFrame) -> pd.DataFrame:
    """C4: the CCE loss and its norm at the beginning, with Adam at 50 % foreground."""
    half = pick(article, optimizer="adam", batch_norm=False, theta=0.5)
    if not len(pick(half, loss="dice_fg")):
        return pd.DataFrame()
    rows = []
    for loss in loss_order(half["loss"].unique()):
        cell = pick(half, loss=loss).set_index("seed")
        rows.append({
            "trained with": NAMES[loss],
            "CCE, first": mean_interval(cell["first/cce"]).text(2),
            "CCE, highest": mean_interval(cell["peak/cce"]).text(2),
            "ratio": ratio_interval(cell["peak/cce"], cell["first/cce"]).text(2),
            "norm of CCE, first": mean_interval(cell["first_norm/cce"]).text(2),
            "highest": mean_interval(cell["peak_norm/cce"]).text(2),
            f"both at least ×{SHOT_UP}": f"{rises(cell, SHOT_UP).sum()}/{len(cell)}",
            "both at least ×1.1": f"{rises(cell, 1.1).sum()}/{len(cell)}",
        })  # fmt: skip
    return pd.DataFrame(rows)


def norm_table(article: pd.DataFrame) -> pd.DataFrame:
    """C5: the trained loss's gradient norm at each θ, with Adam."""
    runs = pick(article, optimizer="adam")
    rows = []
    for normed in sorted(runs["batch_norm"].unique()):
        for loss in loss_order(runs["loss"].unique()):
            cell = pick(runs, loss=loss, batch_norm=normed)
            row = {"trained with": NAMES[loss], "BN": on_off(normed)}
            for theta in sorted(cell["theta"].unique()):
                late = pick(cell, theta=theta)[f"late/{loss}"]
                row[f"norm at {foreground(theta)}"] = mean_interval(late).text()
            rows.append(row)
    return pd.DataFrame(rows)
