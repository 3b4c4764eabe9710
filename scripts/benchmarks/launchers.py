"""Whole sweeps by each launcher, from the command to the table."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import ROOT
from benchmarks.folder import draw

LAUNCHERS = ("basic", "joblib", "fused", "auto")
GRIDS = {
    "README's six runs": ["loss=dice,cce", "theta=0.05,0.5,0.95"],
    "six runs on a folder": [
        "data=folder", "data.root=images", "loss=dice,cce", "seed=0,1,2", "trainer.max_steps=100",
    ],
    "the study's grid, one seed, 100 steps": [
        "experiment=article", "seed=0", "trainer.max_steps=100",
    ],
}  # fmt: skip


def measure(rounds: int, grids: list[str]) -> None:
    """Print the seconds of each launcher; the launchers take turns."""
    table = Table("grid", title=f"seconds of a whole command, median of {rounds}; x basic")
    for name in LAUNCHERS:
        table.add_column(name, justify="right")
    for title in grids or GRIDS:
        times: dict[str, list[float]] = {name: [] for name in LAUNCHERS}
        with tempfile.TemporaryDirectory() as place:
            draw(Path(place, "images"), 40, 128)
            for _ in range(rounds):
                for name in LAUNCHERS:
                    times[name].append(_seconds(name, GRIDS[title], Path(place)))
                    print(f"{title}, {name}: {times[name][-1]:.1f} s", file=sys.stderr)
        medians = {name: statistics.median(found) for name, found in times.items()}
        ratios = [f"{s:.0f} s, x{s / medians['basic']:.2f}" for s in medians.values()]
        table.add_row(title, *ratios)
    Console(width=100).print(table)


def _seconds(launcher: str, grid: list[str], cwd: Path) -> float:
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-m", *grid, f"hydra/launcher={launcher}"],
        cwd=cwd, check=True, capture_output=True, env=os.environ | {"XDG_CACHE_HOME": str(cwd)},
    )  # fmt: skip
    return time.perf_counter() - begin
