"""The runs of a sweep as a frame: a row for each run, with its settings and how it went."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from losswatch.disk.result import Result
from losswatch.events.layout import PREFIX
from losswatch.events.tags import LOSS
from losswatch.report.records import METRICS, get, read_record
from losswatch.text import parse_overrides, printable, reason

log = logging.getLogger(__name__)

# The columns of settings that each sweep has, and where a run's record holds them.
SETTINGS = {
    "loss": "choices.loss",
    "theta": "config.theta",
    "optimizer": "choices.optimizer",
    "lr": "config.optimizer.lr",
    "model": "choices.model",
    "batch_norm": "config.model.batch_norm",
    "seed": "config.seed",
}
OUTCOMES = [*METRICS, "seconds", "status", "verdict", "findings", "error"]

# How columns are called where people read them.
LABELS = {
    "theta": "θ",
    "optimizer": "optimiser",
    "batch_norm": "BN",
    "dice": "Dice",
    "iou": "IoU",
    "accuracy": "accuracy",
}
# Losses in the order, and so the colours, in which tables and figures show them: the study's first.
KNOWN_LOSSES = ["cce", "dice_fg", "dice", "dice_fg_square", "dice_square"]


def read_runs(sweep_dir: str | Path, *, details: bool = False) -> pd.DataFrame:
    """A row for each run of a sweep: its settings, then its validation metrics and how it went.

    Runs may lie deeper, so that a folder of sweeps is read as one sweep. Settings are run (the
    run's folder within `sweep_dir`), loss, theta, optimizer, lr, model, batch_norm, seed and each
    other key whose override differs between the runs. A list of thetas is given as text. Control
    characters in text are replaced.

    With `details` more columns follow, by tag: every other metric of `result.json` (those of the
    test, of single classes and the losses' means), and the value and the gradient norm of each
    watched loss at the last step observed.

    A run's status is what it wrote itself, or "unfinished" (see `read_record`). Left out with a
    warning are folders that cannot be listed, names that are not UTF-8, and links to folders: they
    would count runs twice or lead in circles.

    Raises:
        FileNotFoundError: the folder does not exist or holds no runs.
    """
    sweep = Path(sweep_dir)
    if not sweep.is_dir():
        raise FileNotFoundError(f"no such folder: {sweep}")
    folders = list(_find_runs(sweep))
    if not folders:
        raise FileNotFoundError(f"holds no runs: {sweep}")
    records = [read_record(folder) for folder in folders]
    runs = as_frame([folder.relative_to(sweep).as_posix() for folder in folders], records)
    if details:
        further = [
            pd.DataFrame([_other_metrics(record) for record in records]),
            pd.DataFrame([_watched(record) for record in records]),
        ]
        further = [frame[[c for c in frame if c not in runs]] for frame in further]
        return pd.concat([runs, *further], axis=1)
    return runs


def as_frame(names: Sequence[str], records: Sequence[Result]) -> pd.DataFrame:
    """The frame of `read_runs` for runs of these names and records."""
    overrides = [parse_overrides(record.overrides or []) for record in records]
    # A run that was killed before it wrote its config says nothing of what was swept.
    known = [record.overrides is not None for record in records]
    others = _other_settings(list(compress(overrides, known)))
    return pd.DataFrame([
        {"run": name} | _row(record, others, values)
        for name, record, values in zip(names, records, overrides, strict=True)
    ])  # fmt: skip


def _other_settings(overrides: list[dict[str, str]]) -> list[str]:
    """The overridden keys, beside SETTINGS, that differ between runs."""
    known = {*SETTINGS, "optimizer.lr", "model.batch_norm", "run", *OUTCOMES}
    return [
        key
        for key in dict.fromkeys(key for values in overrides for key in values)
        if key not in known and len({values.get(key) for values in overrides}) > 1
    ]


def _row(record: Result, others: list[str], overrides: dict[str, str]) -> dict[str, Any]:
    """The cells of a run's row, from its record; `others` are further settings."""
    parts = vars(record)
    row: dict[str, Any] = {name: _plain(get(parts, place)) for name, place in SETTINGS.items()}
    for key in others:  # the resolved value, if there is one, says more than the override's text
        value = get(record.config, key)
        if value is None or isinstance(value, dict):
            value = get(record.choices, key) or overrides.get(key)
        row[key] = _plain(value)
    row |= {name: record.metrics.get(f"{record.stage}/{name}", np.nan) for name in METRICS}
    row["seconds"] = np.nan if record.seconds is None else record.seconds
    found = [finding["name"] for finding in record.findings]
    row |= {"status": _plain(record.status), "verdict": _plain(record.verdict)}
    return row | {"findings": _plain(" ".join(found) or None), "error": _plain(record.error)}


def _other_metrics(record: Result) -> dict[str, float]:
    """The metrics of a run's record, except those that `_row` shows, by printable tag."""
    shown = {f"val/{name}" for name in METRICS}
    return {
        printable(tag): value
        for tag, value in record.metrics.items()
        if tag.startswith(("val/", "test/")) and tag not in shown
    }


def _watched(record: Result) -> dict[str, float]:
    """Value and gradient norm of each loss at the last step observed, by printable tag."""
    return {printable(tag): value for tag, value in record.watched.items()}


def _plain(value: Any) -> bool | int | float | str | None:
    if isinstance(value, int) and abs(value) >= 2**63:  # pandas 2 holds no such integer
        return printable(value)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return printable(", ".join(value))
    return value if isinstance(value, bool | int | float | None) else printable(value)


def _find_runs(sweep: Path) -> Iterator[Path]:
    """The folders of runs below `sweep`, in natural order; a run's own folders are not searched."""
    waiting = [sweep]  # not recursive: folders may be nested deeper than Python recurses
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: natural(entry.name))
            is_run = folder != sweep and _holds_run(entry.name for entry in entries)
            below = [] if is_run else [Path(entry) for entry in entries if _is_folder(entry)]
        except OSError as error:
            log.warning("%s: left out, cannot be listed (%s)", printable(folder), reason(error))
            continue
        waiting += reversed(below)
        if is_run:
            yield folder


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder to be read; warns of links to folders and of names not UTF-8."""
    if entry.is_symlink():
        if os.path.isdir(entry):
            log.warning("%s: left out, a link", printable(entry.path))
        return False
    if not entry.is_dir():
        return False
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        log.warning("%s: left out, its name is not UTF-8", printable(entry.path))
        return False
    return True


def _holds_run(names: Iterable[str]) -> bool:
    """Whether a folder with files of these names is a run's."""
    return any(name in ("result.json", ".hydra") or name.startswith(PREFIX) for name in names)


def natural(name: str) -> list[tuple[float, str]]:
    """A sort key that puts 2 before 10.

    >>> sorted(["seed=10", "seed=2", "a"], key=natural)
    ['a', 'seed=2', 'seed=10']
    """
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [(float(p), "") if i % 2 else (-1.0, p) for i, p in enumerate(parts)]


def done(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that are done: means, comparisons and figures are of these alone."""
    return runs[runs["status"] == "done"]


def left_out(runs: pd.DataFrame) -> str:
    """The other runs, each with its status, as text; empty if all are done."""
    others = runs.loc[runs["status"] != "done", ["run", "status"]]
    return ", ".join(f"{printable(run)} ({printable(status)})" for run, status in others.values)


def with_short_checkpoints(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with checkpoints (of mode=test) named without the folders that all of them share."""
    if "checkpoint" not in runs:
        return runs
    paths = runs["checkpoint"].dropna().map(str)
    try:
        shared = os.path.commonpath(list(paths))
    except ValueError:  # relative and absolute ones
        return runs
    short = paths.map(lambda path: os.path.relpath(path, shared) if path != shared else path)
    return runs.assign(checkpoint=short)


def is_repeated(runs: pd.DataFrame) -> bool:
    """Whether runs differ only in the seed."""
    return "seed" in swept(runs) and any(len(group) > 1 for group in by_condition(runs, "loss"))


def by_condition(runs: pd.DataFrame, *names: str) -> list[pd.DataFrame]:
    """The runs apart, by these columns and by everything that was swept except loss and seed."""
    columns = [*names, *(c for c in swept(runs) if c != "seed")]
    if not columns:
        return [runs]
    return [g for _, g in runs.groupby([runs[c].map(repr) for c in columns], sort=False)]


def settings(runs: pd.DataFrame) -> list[str]:
    """The columns of settings, except the loss: those before the first metric."""
    before = list(runs.loc[:, : METRICS[0]])[:-1]
    return [c for c in before if c not in ("run", "loss")]


def swept(runs: pd.DataFrame) -> list[str]:
    """The settings, except the loss, that differ between runs whose config is known."""
    known = runs[settings(runs)].dropna(how="all")
    return [c for c in known if known[c].nunique(dropna=False) > 1]


def all_losses(runs: pd.DataFrame) -> list[str]:
    """The losses that were trained, and those watched if `runs` has details, in their order."""
    watched = [c.removeprefix(LOSS) for c in runs.loc[:, OUTCOMES[-1] :] if c.startswith(LOSS)]
    return loss_order({*runs["loss"].dropna(), *watched})


def loss_order(names: Iterable[str]) -> list[str]:
    """The losses in the order in which they are shown: known ones first, others by name.

    >>> loss_order(["tversky", "dice", "boundary", "cce"])
    ['cce', 'dice', 'boundary', 'tversky']
    """
    unknown = len(KNOWN_LOSSES)
    rank = {name: i for i, name in enumerate(KNOWN_LOSSES)}
    return sorted(names, key=lambda name: (rank.get(name, unknown), name))
