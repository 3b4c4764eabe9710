"""Whole runs and sweeps of train.py, each command in a new process.

The speed is computed from the time of a long command minus that of a short one, so that neither
the start nor compiling counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import ROOT

COMMON = ("model=convnet", "data.batch_size=2", "optimizer.lr=1e-3",
          "trainer.val_check_interval=250", "trainer.enable_progress_bar=false")  # fmt: skip

UNET = ["model=unet", "data.batch_size=8", "data.val_size=8", "data.test_size=8"]
# Network and images of a run; its steps are `--steps` divided by the number.
RUNS: dict[str, tuple[list[str], int]] = {
    "article's net, 2×32×32": ([], 1),
    "U-Net (8, 16, 32), 8×64×64": ([*UNET, "data.image_size=64"], 10),
    "U-Net (8, 16, 32), 8×256×256": ([*UNET, "data.image_size=256"], 100),
    "U-Net (8, 16, 32), 8×512×512": ([*UNET, "data.image_size=512"], 300),
}
WAYS = {
    "probe off": ["probe.every_n_steps=0"],
    "probe on": [],
    "compile=true": ["compile=true"],
}


def train(*overrides: str, flags: Sequence[str] = ()) -> None:
    """Run train.py. Each of its processes uses one thread."""
    subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *flags, *COMMON, *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )


def measure_runs(steps: int) -> None:
    """Print the steps per second of runs, from result.json of a long and a short run."""
    table = Table("run", title="Lightning, data, probe of five losses and events; one thread")
    for way in WAYS:
        table.add_column(f"{way}, steps/s", justify="right")
    for title, (settings, share) in RUNS.items():
        row = []
        for way, extra in WAYS.items():
            if way == "compile=true" and UNET[0] in settings:  # compiling only helps small networks
                continue
            short, seconds = 250 // share + 2, []
            # The first run fills the compiler's cache.
            for count in (short, short, short + steps // share):
                with tempfile.TemporaryDirectory() as folder:
                    place = [f"hydra.run.dir={folder}/run", f"trainer.val_check_interval={count}"]
                    train(*settings, *extra, *place, f"trainer.max_steps={count}")
                    result = Path(folder, "run/result.json").read_text("utf-8")
                    seconds.append(json.loads(result)["seconds"])
            pace = (steps // share) / (seconds[2] - seconds[1])
            row.append(f"{pace:,.0f}" if pace >= 100 else f"{pace:.3g}")
            print(f"{title}, {way}: {row[-1]} steps/s", file=sys.stderr)
        table.add_row(title, *row)
    Console(width=100).print(table)


def measure_sweeps(steps: int, counts: list[int]) -> None:
    """Print runs × steps per second of each launcher, from the time of a long and a short sweep."""
    # For each launcher: overrides, the additional steps of the long sweep, and how many sweeps fill
    # the compiler's cache first. Slower launchers need fewer steps.
    launchers: dict[str, tuple[list[str], int, int]] = {
        "basic": ([], steps // 4, 0),
        "joblib, all cores": (["hydra/launcher=joblib"], steps // 4, 0),
        "fused, eager": (["hydra/launcher=fused"], steps // 2, 0),
        "fused, compiled": (["hydra/launcher=fused", "compile=true"], 4 * steps, 1),
    }
    table = Table("launcher", title="runs × steps a second, article's net, five losses watched")
    for count in counts:
        table.add_column(f"{count} runs", justify="right")
    for name, (extra, longer, warm) in launchers.items():
        row = []
        for count in counts:
            seeds = ",".join(map(str, range(count // 9)))
            grid = ["loss=cce,dice,dice_fg", "theta=0.05,0.5,0.95", f"seed={seeds}"]
            seconds = []
            for length in [100] * (1 + warm) + [100 + longer]:
                with tempfile.TemporaryDirectory() as folder:
                    place = f"hydra.sweep.dir={folder}/sweep"
                    begin = time.perf_counter()
                    train(*grid, *extra, f"trainer.max_steps={length}", place, flags=["-m"])
                    seconds.append(time.perf_counter() - begin)
            row.append(f"{count * longer / (seconds[-1] - seconds[-2]):.0f}")
            print(f"{name}, {count} runs: {row[-1]} run-steps/s", file=sys.stderr)
        table.add_row(name, *row)
    Console(width=100).print(table)
