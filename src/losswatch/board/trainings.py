"""Which runs make a column of the figure, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from losswatch.board.figure import DICE, Curves, Training
from losswatch.events.tags import WATCHED
from losswatch.report.figures import describe
from losswatch.report.runs import by_condition, loss_order, natural, swept

COLUMNS = 6  # of a figure, at most; more are not readable


def grouped(runs: pd.DataFrame) -> list[pd.DataFrame]:
    """The runs of each column: those that differ only in the seed; rows of `report.runs.as_frame`.

    By what was swept, then by the trained loss. A run whose loss is not known has a column of its
    own, because nobody can tell what it repeats.
    """
    known, others = runs[runs["loss"].notna()], runs[runs["loss"].isna()]
    columns = []
    for condition in by_condition(known) if len(known) else ():
        ordered = loss_order(condition["loss"].unique())
        columns += [condition[condition["loss"] == loss] for loss in ordered]
    names = sorted(others["run"], key=natural)
    return columns + [others[others["run"] == name] for name in names]


def training_of(
    column: pd.DataFrame,
    runs: pd.DataFrame,
    curves: Callable[[str], Curves],
    findings: Callable[[str], Sequence[Mapping[str, Any]]],
    told: Callable[[str], str | None] = lambda run: None,
) -> Training:
    """A column of `grouped(runs)` as the figure takes it.

    Args:
        curves: the curves of a run, by name.
        findings: those of a run, by name.
        told: the trained loss of a run that was not made by train.py, by name; None: unknown.
    """
    names, trained = list(column["run"]), column["loss"].iloc[0]
    settings = list(dict.fromkeys(["theta", *(c for c in swept(runs) if c != "seed")]))
    is_known = isinstance(trained, str)
    return Training(
        title=describe(column, settings) if is_known else names[0],
        trained=trained if is_known else told(names[0]),
        runs=[curves(name) for name in names],
        findings=[finding for name in names for finding in findings(name)],
    )


def curves_of(frame: pd.DataFrame) -> dict[str, pd.Series]:
    """The curves in a frame of `disk.curves.read_curves`, by tag."""
    watched = frame[[tag for tag in frame if tag.startswith(WATCHED)]].dropna(how="all")
    curves = {tag: watched[tag] for tag in watched}
    if DICE in frame:
        curves[DICE] = frame[DICE].dropna()
    return curves


def in_parts(columns: Sequence[pd.DataFrame]) -> Iterator[Sequence[pd.DataFrame]]:
    """At most COLUMNS columns at a time."""
    for start in range(0, len(columns), COLUMNS):
        yield columns[start : start + COLUMNS]
