"""The published study's claims, judged by stated rules in the runs of `measured_runs`.

C1  With SGD no model converges.
C2  With Adam and no batch norm every model converges, except DICEFG at 95 % foreground.
C3  With Adam and batch norm every model converges, and accuracy improves.
C4  Training with DICEFG at 50 % foreground (Adam, no batch norm), the CCE loss and its gradient
    norm shoot up at the beginning.
C5  Gradient norms at 95 % foreground are smaller than at 5 % (Adam, no batch norm; DICE, CCE).
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from common.intervals import count_text
from losswatch.report.figures import LOSS_WINDOW
from study.measures import (
    CONVERGED,
    EARLY,
    SHOT_UP,
    converged,
    gains_by_cell,
    norm_ratio,
    pick,
    rises,
)

NAMES = {
    "cce": "CCE",
    "dice_fg": "DICEFG",
    "dice": "DICE",
    "dice_fg_square": "DICEFG_SQUARE",
    "dice_square": "DICE_SQUARE",
}
CONVERGE = f"runs that converge (final validation accuracy of at least {CONVERGED})"


class Claim(NamedTuple):
    """A claim with its measure and rule, the numbers measured, and the verdict."""

    name: str
    claim: str
    measure: str
    numbers: str
    verdict: str  # "holds", "holds partly", "does not hold"; for C5 also "undecided"


def judge(runs: pd.DataFrame) -> list[Claim]:
    """The claims that the runs can judge, with verdicts."""
    runs = runs[runs["loss"].isin(["cce", "dice_fg", "dice"])]
    judged = (_judge_sgd, _judge_adam, _judge_batch_norm, _judge_rise, _judge_norms)
    return [claim for function in judged if (claim := function(runs))]


def verdict(whole: bool, part: bool) -> str:
    return "holds" if whole else "holds partly" if part else "does not hold"


def _judge_sgd(runs: pd.DataFrame) -> Claim | None:
    sgd = pick(runs, optimizer="sgd")
    if not len(sgd):
        return None
    good = converged(sgd)
    return Claim(
        "C1",
        "With SGD no model converges, with or without batch norm.",
        f"{CONVERGE}. Holds if there are none, partly if they are at most 5 %",
        f"{count_text(good)} converged; the best reaches {sgd['accuracy'].max():.4f}",
        verdict(not good.any(), good.sum() <= 0.05 * len(good)),
    )


def _judge_adam(runs: pd.DataFrame) -> Claim | None:
    plain = pick(runs, optimizer="adam", batch_norm=False)
    hard = pick(plain, loss="dice_fg", theta=0.05)
    easy = plain.drop(hard.index)
    if not (len(hard) and len(easy)):
        return None
    return Claim(
        "C2",
        "With Adam and no batch norm every model converges, except DICEFG at 95 % foreground.",
        f"{CONVERGE}. Holds if none of DICEFG at 95 % and all of the others do; partly if less "
        "than half of DICEFG at 95 % and at least 90 % of the others do",
        f"{count_text(converged(easy))} of the others converged, {count_text(converged(hard))} of "
        "DICEFG at 95 %",
        verdict(
            bool(converged(easy).all() and not converged(hard).any()),
            bool(converged(easy).mean() >= 0.9 and converged(hard).mean() < 0.5),
        ),
    )


def _judge_batch_norm(runs: pd.DataFrame) -> Claim | None:
    normed = pick(runs, optimizer="adam", batch_norm=True)
    if not len(normed):
        return None
    gains = [gain for *_, gain in gains_by_cell(runs)]
    better = sum(gain.low > 0 for gain in gains)
    worse = sum(gain.high < 0 for gain in gains)
    rescued = pick(normed, loss="dice_fg", theta=0.05)
    learns = converged(normed).mean() >= 0.95 and converged(rescued).mean() > 0.5
    return Claim(
        "C3",
        "With Adam and batch norm every model converges, DICEFG at 95 % foreground included, and "
        "accuracy improves.",
        f"{CONVERGE}, and the accuracy with batch norm minus that without, paired by seed: a cell "
        "is better or worse if the difference's interval lies above or below 0. Holds if all "
        "converge and every cell is better; partly if 95 % converge and most of DICEFG at 95 %, or "
        "if most cells are better and none is worse",
        f"{count_text(converged(normed))} converged, {count_text(converged(rescued))} of "
        f"DICEFG at 95 %; better in {better} of {len(gains)} cells, worse in {worse}, "
        f"undecided in {len(gains) - better - worse}",
        verdict(
            bool(converged(normed).all()) and better == len(gains),
            bool(learns) or (2 * better > len(gains) and not worse),
        ),
    )


def _judge_rise(runs: pd.DataFrame) -> Claim | None:
    half = pick(runs, optimizer="adam", batch_norm=False, theta=0.5)
    fg = half["loss"] == "dice_fg"
    if not fg.any():
        return None
    shot, rose = (rises(half, times) for times in (SHOT_UP, 1.1))
    return Claim(
        "C4",
        "Training with DICEFG at 50 % foreground (Adam, no batch norm), the CCE loss and its "
        "gradient norm shoot up at the beginning.",
        f"runs in which both reach {SHOT_UP} times their first value within {EARLY:,} steps "
        f"(moving mean over {LOSS_WINDOW}). Holds if all of DICEFG do and none of CCE and DICE; "
        "partly if most of DICEFG do, and a larger share than of the others",
        f"{count_text(shot[fg])} of DICEFG, {count_text(shot[~fg])} of CCE and DICE; "
        f"both rise by a tenth in {rose[fg].sum()} of {fg.sum()} and {rose[~fg].sum()} of "
        f"{(~fg).sum()}",
        verdict(
            bool(shot[fg].all() and not shot[~fg].any()),
            bool(shot[fg].mean() > max(0.5, shot[~fg].mean())),
        ),
    )


def _judge_norms(runs: pd.DataFrame) -> Claim | None:
    plain = pick(runs, optimizer="adam", batch_norm=False)
    ratios = {loss: norm_ratio(plain, loss) for loss in ("cce", "dice")}
    if any(np.isnan(ratio.high) for ratio in ratios.values()):
        return None
    below = [ratio.high < 1 for ratio in ratios.values()]
    undecided = not any(below) and all(ratio.value < 1 for ratio in ratios.values())
    return Claim(
        "C5",
        "Gradient norms at 95 % foreground are smaller than at 5 % (Adam, no batch norm; DICE "
        "and CCE), though both losses treat the classes alike.",
        "the trained loss's gradient norm over the last tenth of the steps, at 95 % foreground "
        "divided by that at 5 %: geometric mean over seeds with which both runs converged. Holds "
        "if the intervals of both losses lie below 1, partly if one does; undecided if neither "
        "does, but both means do",
        ", ".join(f"{NAMES[loss]} {ratio.text(2)}" for loss, ratio in ratios.items()),
        "undecided" if undecided else verdict(all(below), any(below)),
    )
