"""The findings of a run that stands on the disk, and the command that prints them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from losswatch.data.form import IGNORED
from losswatch.disk.curves import SIGNS_FILE, read_curves, read_signs, was_written_by_0_1
from losswatch.disk.result import Result
from losswatch.doctor.findings import Finding, diagnose
from losswatch.doctor.history import SIGN, History
from losswatch.events.tags import GRAD_NORM, LOSS
from losswatch.presets import CONF, list_losses
from losswatch.text import printable

FOUND = 3  # the exit status of `losswatch diagnose` if something was found


def findings_of(
    folder: Path, trained: str | None, *, is_over: bool = True, looks: int | None = None
) -> list[Finding]:
    """The findings from the record in a run's folder; none if it holds no signs.

    Args:
        trained: the name of the loss that trains.
        is_over: whether the training has ended. Before that, only what is certain is said.
        looks: only so many of the doctor's looks count.
    """
    signs, curves = read_signs(folder), read_curves(folder)
    if signs.empty:
        return []
    watched = [tag for tag in curves if tag.startswith((LOSS, GRAD_NORM))]
    table = signs.join(curves[watched])[:looks]
    names = [tag.removeprefix(LOSS) for tag in table if tag.startswith(LOSS)]
    presets = set(list_losses())
    nodes = {name: yaml.safe_load((CONF / "loss" / f"{name}.yaml").read_text()) for name in names
             if name in presets}  # fmt: skip
    heads = [tag for tag in signs if tag.startswith(f"{SIGN}out_min.")]
    classes = [tag for tag in signs if tag.startswith(f"{SIGN}soft/") and tag.endswith(".0")]
    history = History(
        steps=table.index.to_numpy(),
        numbers={tag: table[tag].to_numpy(np.float64) for tag in table},
        kinds={name: _kind_of(nodes[name]) if name in nodes else "own" for name in names},
        trained=trained,
        terms=_terms_of(nodes, trained),
        activation="sigmoid" if signs[f"{SIGN}multilabel.0"].max() == 1 else "softmax",
        ignore_index=IGNORED,
        heads=len(heads),
        classes=len(classes),
        is_over=is_over,
        counts_steps=True,
    )
    return diagnose(history)


def _kind_of(node: dict[str, Any]) -> str:
    """What `watch.doctor.kind_of` says of the loss of a preset's file."""
    if node["_target_"].endswith(".CrossEntropy"):
        return "ce"
    is_plain = node.get("exponent", 1) == 1 and node.get("link", "1-d") in ("1-d", "-d")
    if node["_target_"].endswith(".Dice") and is_plain:
        return "dice" if node.get("include_background", True) else "dice_fg"
    return "other"


def _terms_of(nodes: dict[str, dict[str, Any]], trained: str | None) -> tuple[str, ...]:
    """The watched presets that the trained one is a sum of."""
    parts = nodes.get(trained or "", {}).get("losses", [])
    return tuple(name for name, node in nodes.items() if node in parts)


def as_dicts(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings as result.json holds them."""
    return [finding._asdict() for finding in findings]


def print_findings(arguments: Sequence[str]) -> None:
    """`losswatch diagnose RUN ...`: print what is wrong with runs.

    Raises:
        SystemExit: with status 2 if a folder holds no run that can be read, else 3 if something
            was found.
    """
    if not arguments or any(a.startswith("-") for a in arguments):
        print("usage: losswatch diagnose outputs/<sweep>/<run> ...")
        raise SystemExit(0 if set(arguments) & {"-h", "--help"} else 2)
    status = 0
    for argument in arguments:
        folder = Path(argument)
        if (line := _why_not(folder)) is not None:
            print(f"{printable(folder)}: {line}", file=sys.stderr)
            status = 2
            continue
        result = Result.read(folder)
        found = findings_of(folder, result.choices.get("loss")) if result else []
        print(f"{printable(folder)}: {len(found) or 'nothing'} found")
        for finding in found:
            print(f"  {finding.name}, since step {finding.step}: {finding.text}")
            print(f"    {finding.remedy}")
        status = max(status, FOUND) if found and status != 2 else status
    if status:
        raise SystemExit(status)


def _why_not(folder: Path) -> str | None:
    """Why a folder cannot be diagnosed, or None."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        result = Result.read(folder)
    except ValueError as error:
        return str(error)
    if result is None or not result.config:
        return "holds no run of losswatch that has begun; give outputs/<sweep>/<run>"
    if was_written_by_0_1(folder) or not (folder / SIGNS_FILE).exists():
        return "holds no signs: the run was trained before 0.3, or with probe.every_n_steps=0"
    return None
