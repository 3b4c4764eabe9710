"""The published study's claims, measured in runs on disk and judged by stated rules.

    C1  With SGD no model converges.
    C2  With Adam and no batch norm every model converges, except DICEFG at 95 % foreground.
    C3  With Adam and batch norm every model converges, and accuracy improves.
    C4  Training with DICEFG at 50 % foreground (Adam, no batch norm), the CCE loss and its gradient
        norm shoot up at the beginning.
    C5  Gradient norms at 95 % foreground are smaller than at 5 % (Adam, no batch norm; DICE, CCE).

Intervals are 95 %: of a mean, Student's t over seeds; of a share, Wilson's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import numpy as np
import pandas as pd

from losswatch.report.report import loss_order, read_runs, read_scalars, show, t_quantile
from losswatch.report.study import LOSS_WINDOW, NORM_WINDOW, moving_mean

# A run has converged with a final validation accuracy of half of what a constant gets wrong at
# θ = 0.05 and 0.95.
CONVERGED = 0.975
EARLY = 1000  # steps; "the beginning"
SHOT_UP = 1.5  # times its first value


# --- Measures of one run -------------------------------------------------------------------------


def measure(run_dir: str | Path) -> dict[str, float]:
    """What the claims need of a run's scalars, under names with a slash; none where they lack it.

    late/<loss>   mean gradient norm over the last tenth of the steps observed
    final/dice_fg mean value of DICEFG over the same steps
    first/cce, peak/cce, peak_norm/cce, first_norm/cce
                  the CCE loss and its norm (moving means over 11) at the first step, and their
                  highest values in the first 1,000 steps
    quiet/norm, quiet/cce
                  lowest value of DICEFG's gradient norm (moving mean over 201), the CCE there
    climb/accuracy  what the validation accuracy gained over the last 1,000 steps
    """
    scalars = read_scalars(run_dir)
    found: dict[str, float] = {}
    norms = scalars.filter(regex="^grad_norm/").dropna(how="all")
    for tag, value in norms.tail(max(1, len(norms) // 10)).mean().items():
        found[str(tag).replace("grad_norm/", "late/")] = value
    if "loss/dice_fg" in scalars:
        values = scalars["loss/dice_fg"].dropna()
        found["final/dice_fg"] = values.tail(max(1, len(values) // 10)).mean()
    if {"loss/cce", "grad_norm/cce"} <= set(scalars):
        early = scalars.loc[: EARLY - 1, ["loss/cce", "grad_norm/cce"]].dropna()
        smooth = moving_mean(early, LOSS_WINDOW)
        found["first/cce"], found["first_norm/cce"] = smooth.iloc[0]
        found["peak/cce"], found["peak_norm/cce"] = smooth.max()
    if {"loss/cce", "grad_norm/dice_fg"} <= set(scalars):
        smooth = moving_mean(scalars[["grad_norm/dice_fg", "loss/cce"]].dropna(), NORM_WINDOW)
        quietest = smooth.loc[smooth["grad_norm/dice_fg"].idxmin()]
        found["quiet/norm"], found["quiet/cce"] = quietest
    if "val/accuracy" in scalars:
        accuracy = scalars["val/accuracy"].dropna()
        before = accuracy.loc[: accuracy.index[-1] - EARLY + 1]
        found["climb/accuracy"] = accuracy.iloc[-1] - before.iloc[-1] if len(before) else np.nan
    return found


def measured_runs(sweep_dir: str | Path) -> pd.DataFrame:
    """`read_runs` of the runs that are done, with the columns of `measure`."""
    runs = read_runs(sweep_dir)
    runs = runs[runs["status"] == "done"].reset_index(drop=True)
    folders = [Path(sweep_dir, run) for run in runs["run"]]
    found = joblib.Parallel(n_jobs=-1)(joblib.delayed(measure)(f) for f in folders)
    return pd.concat([runs, pd.DataFrame(found)], axis=1)


# --- Intervals -----------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A mean or share and its 95 % interval (NaN from a single value).

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
    """Mean of independent values, Student's t.

    >>> mean_interval([1.0, 2.0, 3.0]).text(2)
    '2.00 (-0.48 to 4.48)'
    """
    known = pd.Series(values, dtype=float).dropna()
    margin = t_quantile(len(known) - 1) * known.sem() if len(known) > 1 else np.nan
    return Interval(known.mean(), known.mean() - margin, known.mean() + margin)


def ratio_interval(above: pd.Series, below: pd.Series) -> Interval:
    """Geometric mean of above / below over the seeds (the index) that both have."""
    logs = mean_interval(np.log(above / below).dropna())
    return Interval(*map(float, np.exp(logs)))


def share_interval(count: int, total: int) -> Interval:
    """A share of independent runs, Wilson's score interval.

    >>> share_interval(10, 10).text(2), share_interval(0, 10).text(2)
    ('1.00 (0.72 to 1.00)', '0.00 (0.00 to 0.28)')
    """
    z = 1.959964
    share = count / total
    centre = (share + z**2 / 2 / total) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * np.sqrt(share * (1 - share) / total + (z / 2 / total) ** 2)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def count_text(happened: pd.Series) -> str:
    """
    >>> count_text(pd.Series([True, True, False]))
    '2 of 3 (67 %, 21 to 94 %)'
    """
    share = share_interval(int(happened.sum()), len(happened))
    value, low, high = (f"{100 * part:.0f}" for part in share)
    return f"{happened.sum()} of {len(happened)} ({value} %, {low} to {high} %)"


# --- Claims --------------------------------------------------------------------------------------


class Claim(NamedTuple):
    name: str
    claim: str
    measure: str
    numbers: str
    verdict: str  # "holds", "holds partly", "does not hold"; of C5 also "undecided"


def verdict(whole: bool, part: bool) -> str:
    return "holds" if whole else "holds partly" if part else "does not hold"


def pick(runs: pd.DataFrame, **settings: Any) -> pd.DataFrame:
    """The runs with these settings."""
    for name, value in settings.items():
        runs = runs[runs[name] == value]
    return runs


def converged(runs: pd.DataFrame) -> pd.Series:
    return runs["accuracy"] >= CONVERGED


def by_seed(runs: pd.DataFrame, column: str, **settings: Any) -> pd.Series:
    return pick(runs, **settings).set_index("seed")[column]


def judge(runs: pd.DataFrame) -> list[Claim]:
    """The claims that these runs, of `measured_runs`, can tell about, by the rules beside them."""
    claims = []
    runs = runs[runs["loss"].isin(["cce", "dice_fg", "dice"])]
    plain = pick(runs, optimizer="adam", batch_norm=False)
    normed = pick(runs, optimizer="adam", batch_norm=True)
    said = f"converged: final validation accuracy of at least {CONVERGED}"

    if len(sgd := pick(runs, optimizer="sgd")):
        n, good = len(sgd), converged(sgd)
        claims.append(Claim(
            "C1", "With SGD no model converges, with or without batch norm.",
            f"{said}. Holds: none; partly: at most 5 %",
            f"{count_text(good)} converged; the best reaches {sgd['accuracy'].max():.4f}",
            verdict(not good.any(), good.sum() <= 0.05 * n),
        ))  # fmt: skip

    hard = pick(plain, loss="dice_fg", theta=0.05)
    if len(hard):
        easy = plain.drop(hard.index)
        claims.append(Claim(
            "C2",
            "With Adam and no batch norm every model converges, except DICEFG at 95 % foreground.",
            f"{said}. Holds: all and none; partly: 90 % of the others, less than half of DICEFG's",
            f"{count_text(converged(easy))} of the others, {count_text(converged(hard))} of "
            f"DICEFG at 95 %",
            verdict(
                bool(converged(easy).all() and not converged(hard).any()),
                bool(converged(easy).mean() >= 0.9 and converged(hard).mean() < 0.5),
            ),
        ))  # fmt: skip

    if len(normed):
        gains = [gain for *_, gain in gains_by_cell(runs)]
        better = sum(gain.low > 0 for gain in gains)
        worse = sum(gain.high < 0 for gain in gains)
        rescued = pick(normed, loss="dice_fg", theta=0.05)
        learns = converged(normed).mean() >= 0.95 and converged(rescued).mean() > 0.5
        claims.append(Claim(
            "C3",
            "With Adam and batch norm every model converges, DICEFG at 95 % foreground included, "
            "and accuracy improves.",
            f"{said}; accuracy with less without batch norm, paired by seed, whether its interval "
            "lies above or below 0. Holds: all converge, and better in every cell; partly: 95 % "
            "converge and most of DICEFG at 95 %, or more cells better than not and none worse",
            f"{count_text(converged(normed))} converged, {count_text(converged(rescued))} of "
            f"DICEFG at 95 %; better in {better} of {len(gains)} cells, worse in {worse}, "
            f"undecided in {len(gains) - better - worse}",
            verdict(
                bool(converged(normed).all()) and better == len(gains),
                bool(learns) or (2 * better > len(gains) and not worse),
            ),
        ))  # fmt: skip

    half = pick(plain, theta=0.5)
    if len(pick(half, loss="dice_fg")):
        shot, rose = (rises(half, times) for times in (SHOT_UP, 1.1))
        told = half["loss"] == "dice_fg"
        claims.append(Claim(
            "C4",
            "Training with DICEFG at 50 % foreground (Adam, no batch norm), the CCE loss and its "
            "gradient norm shoot up at the beginning.",
            f"both reach {SHOT_UP} times their first value within {EARLY:,} steps (moving mean "
            f"over {LOSS_WINDOW}). Holds: every run of DICEFG, none of CCE and DICE; partly: most "
            "of DICEFG's, and a larger share than of the others",
            f"{count_text(shot[told])} of DICEFG, {count_text(shot[~told])} of CCE and DICE; a "
            f"rise by a tenth: {rose[told].sum()} of {told.sum()} and {rose[~told].sum()} of "
            f"{(~told).sum()}",
            verdict(
                bool(shot[told].all() and not shot[~told].any()),
                bool(shot[told].mean() > max(0.5, shot[~told].mean())),
            ),
        ))  # fmt: skip

    ratios = {loss: norm_ratio(plain, loss) for loss in ("cce", "dice")}
    if not any(np.isnan(ratio.high) for ratio in ratios.values()):
        below = [ratio.high < 1 for ratio in ratios.values()]
        claims.append(Claim(
            "C5",
            "Gradient norms at 95 % foreground are smaller than at 5 % (Adam, no batch norm; DICE "
            "and CCE), though both losses treat the classes alike.",
            "the trained loss's gradient norm over the last tenth of the steps, at 95 % over at "
            "5 % foreground, where both converged: geometric mean over seeds. Holds: both "
            "intervals below 1; partly: one; undecided: both means are, neither interval",
            ", ".join(f"{NAMES[loss]} {ratio.text(2)}" for loss, ratio in ratios.items()),
            "undecided"
            if not any(below) and all(ratio.value < 1 for ratio in ratios.values())
            else verdict(all(below), any(below)),
        ))  # fmt: skip
    return claims


NAMES = {
    "cce": "CCE",
    "dice_fg": "DICEFG",
    "dice": "DICE",
    "dice_fg_square": "DICEFG_SQUARE",
    "dice_square": "DICE_SQUARE",
}


def rises(runs: pd.DataFrame, times: float) -> pd.Series:
    """Whether the CCE loss and its norm both reach so many times their first value, in each run."""
    return (runs["peak/cce"] >= times * runs["first/cce"]) & (
        runs["peak_norm/cce"] >= times * runs["first_norm/cce"]
    )


def norm_ratio(runs: pd.DataFrame, loss: str) -> Interval:
    """The late gradient norm of the trained loss at 95 % foreground over that at 5 %.

    Of runs that converged: one that stands still has a norm that tells of something else.
    """
    runs = runs[converged(runs)]
    norms = (by_seed(runs, f"late/{loss}", loss=loss, theta=theta) for theta in (0.05, 0.95))
    return ratio_interval(*norms)


def gains_by_cell(runs: pd.DataFrame) -> list[tuple[str, float, Interval]]:
    """Loss, θ, and accuracy with batch norm less that without, paired by seed (Adam)."""
    adam = pick(runs, optimizer="adam")
    cells = []
    for loss in loss_order(adam["loss"].unique()):
        for theta in sorted(adam["theta"].unique()):
            off, on = (
                by_seed(adam, "accuracy", loss=loss, theta=theta, batch_norm=normed)
                for normed in (False, True)
            )
            cells.append((loss, theta, mean_interval((on - off).dropna())))
    return cells


# --- DICEFG where every pixel gets the same p ----------------------------------------------------
# Its gradient by the difference of the logits, N pixels in all, a share 1 - θ of them foreground:
# p(1-p)/N · [2p(1-θ)/(1-θ+p)² - 2y/(1-θ+p)].


def pull_alike(theta: float, p: float) -> float:
    """How strongly it moves all pixels up: the gradient's sum, sign changed."""
    share = 1 - theta
    return 2 * p * (1 - p) * share**2 / (share + p) ** 2


def pull_apart(theta: float, p: float) -> float:
    """How strongly it moves foreground up against background: its product with y less its mean."""
    share = 1 - theta
    return 2 * p * (1 - p) * theta * share / (share + p)


# --- Tables --------------------------------------------------------------------------------------


def foreground(theta: float) -> str:
    """
    >>> foreground(0.05)
    '95 %'
    """
    return f"{show(round(100 * (1 - theta), 6))} %"


def claim_table(claims: Sequence[Claim]) -> pd.DataFrame:
    rows = [c._asdict() for c in claims]
    return pd.DataFrame(rows).rename(columns={"name": "", "numbers": "measured"})


def outcome_table(runs: pd.DataFrame, columns: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """A row per loss and θ; for each set of settings how many converged, and the accuracy."""
    rows = []
    for loss in loss_order(runs["loss"].unique()):
        for theta in sorted(runs["theta"].unique()):
            row = {"trained with": NAMES[loss], "foreground": foreground(theta)}
            for title, settings in columns.items():
                cell = pick(runs, loss=loss, theta=theta, **settings)
                accuracy = mean_interval(cell["accuracy"]).text(4)
                row[title] = f"{converged(cell).sum()}/{len(cell)}: {accuracy}"
            rows.append(row)
    return pd.DataFrame(rows)
