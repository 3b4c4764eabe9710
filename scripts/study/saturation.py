"""Why DICEFG fails at 95 % foreground: the net first predicts foreground everywhere and saturates.

Suppose that the net gives every pixel the same probability p of foreground. With N pixels, a share
1 − θ of them foreground (y = 1), the derivative of DICEFG by the difference of a pixel's logits is
p(1−p)/N · [2p(1−θ)/(1−θ+p)² − 2y/(1−θ+p)].
"""

import numpy as np
import pandas as pd

from study.measures import converged, pick
from study.tables import foreground, on_off


def pull_alike(theta: float, p: float) -> float:
    """How strongly a gradient step moves all pixels up: minus the sum of the derivatives."""
    share = 1 - theta
    return 2 * p * (1 - p) * share**2 / (share + p) ** 2


def pull_apart(theta: float, p: float) -> float:
    """How strongly a gradient step moves foreground up relative to background.

    This is minus the scalar product of the derivatives and y minus its mean.
    """
    share = 1 - theta
    return 2 * p * (1 - p) * theta * share / (share + p)


def pull_table() -> pd.DataFrame:
    """Both pulls at p = 1/2, and the best constant answers, for each θ."""
    rows = []
    for theta in (0.05, 0.5, 0.95):
        alike, apart = pull_alike(theta, 0.5), pull_apart(theta, 0.5)
        rows.append({
            "foreground": foreground(theta),
            "pull on all pixels alike": f"{alike:.4f}",
            "pull apart": f"{apart:.4f}",
            "ratio": f"{alike / apart:.2f}",
            "best constant p, DICEFG": "1",
            "best constant p, DICE and CCE": f"{1 - theta:g}",
            "DICEFG if all is foreground": f"{theta / (2 - theta):.4f}",
        })  # fmt: skip
    return pd.DataFrame(rows)


def failing_cell(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of DICEFG with Adam at 95 % foreground."""
    return pick(runs, optimizer="adam", loss="dice_fg", theta=0.05)


def quiet_table(cell: pd.DataFrame) -> pd.DataFrame:
    """A row for each run of the failing cell: the step where DICEFG's gradient norm is lowest."""
    rows = []
    for run, good in zip(cell.to_dict("records"), converged(cell), strict=True):
        # If everything is predicted as foreground, CCE is about θ times the logit of background.
        logit = run["quiet/cce"] / 0.05
        rows.append({
            "BN": on_off(run["batch_norm"]),
            "seed": str(run["seed"]),
            "lowest norm of DICEFG": f"{run['quiet/norm']:.1e}",
            "CCE there": f"{run['quiet/cce']:.3f}",
            "mean logit z": f"{logit:.1f}",
            "slope p(1−p)": f"{1 / (2 + 2 * np.cosh(logit)):.0e}",
            "final accuracy": f"{run['accuracy']:.4f}",
            "final DICEFG": f"{run['final/dice_fg']:.4f}",
            "converged": "yes" if good else "no",
        })  # fmt: skip
    return pd.DataFrame(rows)
