"""What the runs of a sweep show, in sentences: which are constant, which losses differ in Dice."""

from __future__ import annotations

import math
from itertools import count, islice

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import nct, t

from losswatch.disk.result import CONSTANT
from losswatch.report.compare import compare_losses, conditions
from losswatch.report.runs import by_condition, done, loss_order, swept, with_short_checkpoints
from losswatch.text import format_value, number_of, printable

ALPHA = 0.05  # the chance of one false alarm among all comparisons, at most
POWER = 0.8  # the chance with which a difference would be shown
RELEVANT = 0.01  # the difference in Dice that seeds are counted for
MOST_SEEDS = 10  # that are suggested; if they do not show RELEVANT, what they show is said
LINES = 2  # for each kind of sentence


def in_words(runs: pd.DataFrame) -> list[str]:
    """At most six sentences on the runs that are done; rows of `read_runs`."""
    runs = with_short_checkpoints(done(runs[runs["loss"].notna()]))
    return constant_runs(runs) + differences(runs) if len(runs) else []


# --- Constant runs --------------------------------------------------------------------------------


def constant_runs(runs: pd.DataFrame) -> list[str]:
    """Which losses predict one class everywhere, in which conditions and how many of the seeds."""
    by_place: dict[tuple[str, str, str], list[str]] = {}
    for cell in by_condition(runs):
        for loss in loss_order(cell["loss"].unique()):
            verdicts = cell.loc[cell["loss"] == loss, "verdict"]
            for verdict, number in verdicts.value_counts().items():
                if str(verdict).startswith(CONSTANT):
                    of_all = f"{number} of {number_of(len(verdicts), 'seed')}"
                    place = _condition(cell.iloc[0], swept(runs))
                    share = of_all if len(verdicts) > 1 else ""
                    by_place.setdefault((str(verdict), share, place), []).append(printable(loss))
    by_losses: dict[tuple[str, str, str], list[str]] = {}
    for (verdict, share, place), losses in by_place.items():
        by_losses.setdefault((",".join(losses), verdict, share), []).append(place)
    sentences = []
    for (names, verdict, share), places in by_losses.items():
        more = f" and {len(places) - 3} more settings" if len(places) > 3 else ""
        at = f" at {', '.join(places[:3])}{more}" if any(places) else ""
        predict = "predict" if "," in names else "predicts"
        what = verdict.removeprefix(CONSTANT)
        seeds = f", in {share}" if share else ""
        sentences.append(f"loss={names} {predict} {what} everywhere{at}{seeds}.")
    if len(sentences) > LINES:
        sentences[LINES - 1 :] = ["The table names more runs that predict one class everywhere."]
    return sentences


def _condition(run: pd.Series, columns: list[str]) -> str:
    """The swept settings of a run except the seed, such as "theta=0.05,lr=0.1"."""
    return ",".join(f"{printable(c)}={format_value(run[c])}" for c in columns if c != "seed")


# --- Differences ----------------------------------------------------------------------------------


def differences(runs: pd.DataFrame) -> list[str]:
    """Which losses differ in Dice, by how much and how certainly; which seeds would show more.

    The differences, their 95 % intervals and their p-values are those of `compare_losses`: paired
    by seed, in each condition, p corrected by Holm for all comparisons.
    """
    table = compare_losses(runs)
    table = table[table["dice"].notna()] if len(table) else table
    if not len(table):
        return []
    numbers = pd.to_numeric(runs["seed"], errors="coerce")
    seeds = sorted({int(seed) for seed in numbers if float(seed).is_integer()})
    if table["dice_p"].isna().all():
        hint = f"One seed shows no certainty; {_seeds(seeds, 3)} would."
        return [*_largest(table, runs, 1), hint]
    shown = table[table["dice_p"] < ALPHA]
    total = number_of(len(table), "comparison")
    sentences = []
    if len(shown) > 1:
        sentences.append(
            f"{len(shown)} of {total} show a difference in Dice (p < {ALPHA} by Holm). The largest:"
        )
    sentences += _largest(shown, runs, LINES)
    undecided = table[~(table["dice_p"] < ALPHA)]
    if not len(shown):
        sentences += _largest(table[table["dice"].abs() >= RELEVANT], runs, 1)
    if len(undecided):
        where = f"in the other {len(undecided)} of {total}" if len(shown) else f"in {total}"
        outlook = _outlook(undecided, len(table), seeds)
        sentences.append(f"No certain difference in Dice {where}: {outlook}.")
    return sentences


def _largest(table: pd.DataFrame, runs: pd.DataFrame, most: int) -> list[str]:
    """A sentence on each of the largest differences, first those between losses that learn."""
    stuck = {
        (cell["loss"].iloc[0], _condition(cell.iloc[0], swept(runs)))
        for cell in by_condition(runs, "loss")
        if cell["verdict"].str.startswith(CONSTANT, na=False).any()
    }
    ranked = []
    for pair in table.to_dict("records"):
        where = _condition(pd.Series(pair), conditions(table))
        is_stuck = any((pair[side], where) in stuck for side in ("loss", "other"))
        ranked.append((is_stuck, -abs(pair["dice"]), where, pair))
    sentences = []
    for _, _, where, pair in sorted(ranked, key=lambda r: r[:2])[:most]:
        above, below = pair["loss"], pair["other"]
        if pair["dice"] < 0:
            above, below = below, above
        margin, certainty = "", number_of(pair["pairs"], "seed")
        if not math.isnan(pair["dice_p"]):
            margin = f" ± {pair['dice_high'] - pair['dice']:.4f}"
            p = "< 0.001" if pair["dice_p"] < 0.001 else f"= {pair['dice_p']:.3f}"
            certainty += f", p {p}"
        sentences.append(
            f"{printable(above)} is above {printable(below)} by {abs(pair['dice']):.4f}{margin} "
            f"Dice{f' at {where}' if where else ''} ({certainty})."
        )
    return sentences


def _outlook(undecided: pd.DataFrame, tests: int, seeds: list[int]) -> str:
    """How small a difference the seeds of these comparisons show, or how many seeds show one."""
    spread, now = spread_of(undecided), int(undecided["pairs"].min())
    if not spread:
        return "all seeds end with equal Dice"
    alpha = ALPHA / tests
    if now >= 2:
        seen = detectable(now, spread, alpha)
        if seen <= RELEVANT or now >= MOST_SEEDS:
            return f"{now} seeds would have shown one of {_rounded_up(seen)}"
    more = range(max(now, 1) + 1, MOST_SEEDS + 1)
    enough = [n for n in more if power(n, RELEVANT / spread, alpha) >= POWER]
    size = RELEVANT if enough else detectable(MOST_SEEDS, spread, alpha)
    few = "1 seed is few" if now < 2 else f"{now} seeds are few"
    suggested = _seeds(seeds, enough[0] if enough else MOST_SEEDS)
    return f"{few}; {suggested} would show one of {_rounded_up(size)}"


def _seeds(given: list[int], number: int) -> str:
    """A setting of that many seeds that keeps those that are given.

    >>> _seeds([0, 1], 4), _seeds([7], 3)
    ('seed=0,1,2,3', 'seed=7,0,1')
    """
    further = islice((seed for seed in count() if seed not in given), number)
    return f"seed={','.join(map(str, [*given, *further][: max(number, len(given))]))}"


def _rounded_up(size: float) -> str:
    """A size with two digits that is not smaller.

    >>> _rounded_up(0.01), _rounded_up(0.01234), _rounded_up(0.2)
    ('0.01', '0.013', '0.2')
    """
    unit = 10.0 ** (math.floor(math.log10(size)) - 1)
    return f"{math.ceil(size / unit - 1e-9) * unit:.2g}"


# --- Power ----------------------------------------------------------------------------------------


def spread_of(comparison: pd.DataFrame) -> float:
    """The standard deviation of paired differences in Dice, pooled over rows of `compare_losses`.

    Rows without any spread do not count: two losses that end at the same constant say nothing of
    others. 0 if no row has a spread.
    """
    rows = comparison[comparison["pairs"] > 1]
    freedom = rows["pairs"].to_numpy(float) - 1
    half = (rows["dice_high"] - rows["dice"]).to_numpy(float)
    variance = (half / t.ppf(0.975, freedom)) ** 2 * (freedom + 1)
    counts = variance > 1e-24
    if not counts.any():
        return 0.0
    return float(np.sqrt(np.average(variance[counts], weights=freedom[counts])))


def power(pairs: int, effect: float, alpha: float) -> float:
    """The chance that the two-sided paired t test finds a difference, with its right sign.

    Args:
        pairs: their number, at least 2.
        effect: the mean difference divided by the standard deviation of the differences.
        alpha: the level of the test. For the smallest of m p-values Holm's is alpha / m.

    >>> round(power(10, 1.0, 0.05), 3)  # as G*Power, and R's power.t.test
    0.803
    """
    freedom = pairs - 1
    return float(nct.sf(t.ppf(1 - alpha / 2, freedom), freedom, effect * math.sqrt(pairs)))


def detectable(pairs: int, spread: float, alpha: float) -> float:
    """The difference that so many pairs show with a chance of POWER; see `power`."""
    highest = 1.0
    while power(pairs, highest, alpha) < POWER:
        highest *= 2
    return spread * float(brentq(lambda effect: power(pairs, effect, alpha) - POWER, 0, highest))
