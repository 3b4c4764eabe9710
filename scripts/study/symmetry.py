"""C5's open question: gradient norms at 95 and 5 % foreground, by the range of the inputs."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from common.intervals import Interval, mean_interval
from study.claims import NAMES
from study.measures import norm_ratio, pick
from study.tables import foreground, on_off


class InputRange(NamedTuple):
    """A range of the inputs, and the ratio of norms that the symmetry argument expects there."""

    name: str
    low: float
    high: float
    expected: str


RANGES = [
    InputRange("0 to 1", 0.0, 1.0, "smaller"),
    InputRange("−0.5 to 0.5", -0.5, 0.5, "alike"),
    InputRange("1 to 0", 1.0, 0.0, "larger"),
]


class RangeCell(NamedTuple):
    """The runs of one loss and network with inputs of one range."""

    loss: str
    batch_norm: bool
    inputs: InputRange
    seeds: int
    norms: dict[float, Interval]  # by θ, of the trained loss over the last tenth of the steps
    ratio: Interval  # of the norm at 95 % foreground to that at 5 %

    @property
    def difference(self) -> str:
        """The norm at 95 % foreground, compared with that at 5 %; unknown below two seeds."""
        if np.isnan(self.ratio.high):
            return "–"
        return "smaller" if self.ratio.high < 1 else "larger" if self.ratio.low > 1 else "alike"


def range_cells(sweeps: Mapping[str, pd.DataFrame]) -> list[RangeCell]:
    """The cells of DICE and CCE, with Adam; none if the sweeps lack the runs for them."""
    article = pick(sweeps["article"], optimizer="adam")
    if "symmetry" not in sweeps or not {0.05, 0.95} <= set(article["theta"]):
        return []
    article = article.assign(**{"data.low": 0.0, "data.high": 1.0})
    runs = pd.concat([article, sweeps["symmetry"]])
    cells = []
    for loss in ("dice", "cce"):
        for normed in (False, True):
            for inputs in RANGES:
                ends = {"data.low": inputs.low, "data.high": inputs.high}
                cell = pick(runs, loss=loss, batch_norm=normed, **ends)
                by_theta = {theta: pick(cell, theta=theta) for theta in (0.05, 0.95)}
                norms = {t: mean_interval(part[f"late/{loss}"]) for t, part in by_theta.items()}
                seeds = by_theta[0.05]["seed"].nunique()
                ratio = norm_ratio(cell, loss)
                cells.append(RangeCell(loss, normed, inputs, seeds, norms, ratio))
    return cells


def range_table(cells: Sequence[RangeCell]) -> pd.DataFrame:
    """A row for each cell."""
    return pd.DataFrame([
        {
            "trained with": NAMES[cell.loss],
            "BN": on_off(cell.batch_norm),
            "inputs": cell.inputs.name,
            "seeds": f"{cell.seeds}",
            **{f"norm at {foreground(t)}": norm.text() for t, norm in cell.norms.items()},
            "ratio": cell.ratio.text(2),
            "": cell.difference,
        }
        for cell in cells
    ])  # fmt: skip


def range_panels(cells: Sequence[RangeCell]) -> dict[str, pd.DataFrame]:
    """For each loss and network a frame of intervals: a row for each range, a column for each θ."""
    panels: dict[str, dict[str, dict[str, Interval]]] = {}
    for cell in cells:
        panel = panels.setdefault(f"{NAMES[cell.loss]}, BN {on_off(cell.batch_norm)}", {})
        panel[cell.inputs.name] = {
            f"{foreground(t)} foreground": norm for t, norm in cell.norms.items()
        }
    return {title: pd.DataFrame(panel).T for title, panel in panels.items()}
