"""Whole runs in this process, and sweeps of train.py, each command in a new process.

The speed is computed from the time of a long training minus that of a short one, so that neither
the start nor compiling counts.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import ROOT
from benchmarks.plans import MakePlan, plans, seconds_of

COMMON = ("model=convnet", "data.batch_size=2", "optimizer.lr=1e-3",
          "trainer.val_check_interval=250", "trainer.enable_progress_bar=false")  # fmt: skip

UNET = ["model=unet", "data.batch_size=8", "data.val_size=8", "data.test_size=8"]
RUNS: dict[str, list[str]] = {  # network and images
    "article's net, 2×32×32": [],
    "U-Net (8, 16, 32), 8×64×64": [*UNET, "data.image_size=64"],
    "U-Net (8, 16, 32), 8×256×256": [*UNET, "data.image_size=256"],
    "U-Net (8, 16, 32), 8×512×512": [*UNET, "data.image_size=512"],
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


def measure_runs(seconds: float) -> None:
    """Print the steps a second of runs on the CPU, with one thread."""
    table = Table("run", title="Lightning, data, probe of five losses and events; one thread")
    for way in WAYS:
        table.add_column(f"{way}, steps/s", justify="right")
    for title, settings in RUNS.items():
        # Compiling only helps small networks.
        ways = {w: WAYS[w] for w in WAYS if w != "compile=true" or UNET[0] not in settings}
        row = []
        for way, pace, _ in speeds(settings, ways, "cpu", seconds):
            row.append(f"{pace:,.0f}" if pace >= 100 else f"{pace:.3g}")
            print(f"{title}, {way}: {row[-1]} steps/s", file=sys.stderr)
        table.add_row(title, *row)
    Console(width=100).print(table)


def speeds(
    settings: Sequence[str], ways: Mapping[str, Sequence[str]], device: str, seconds: float
) -> Iterator[tuple[str, float, int | None]]:
    """Steps a second of a run in each way, and the highest utilisation of the GPU in percent.

    Args:
        ways: overrides for each.
        device: a value of `trainer.accelerator`.
        seconds: that the long training takes more than the short one, at least.
    """
    steps = 4.0
    with plans() as plan:
        for way, extra in ways.items():
            common = [*COMMON, f"trainer.accelerator={device}", *settings, *extra]
            pace, load = _speed(plan, common, int(steps), device, seconds)
            yield way, pace, load
            steps = max(4, pace * seconds)  # a guess for the next way


def _speed(
    plan: MakePlan, overrides: Sequence[str], steps: int, device: str, seconds: float
) -> tuple[float, int | None]:
    """As `speeds`; `steps` is a guess of how many take that long."""
    seconds_of(plan, overrides, 4)  # fills the caches of cuDNN and of the compiler
    short = seconds_of(plan, overrides, 4)
    while True:
        with _utilisation(device) as seen:
            longer = seconds_of(plan, overrides, 4 + steps) - short
        if longer >= seconds:
            return steps / longer, max(seen, default=None)
        # A few steps may take less time than the start varies by, so what they say is limited.
        steps *= min(20, max(2, math.ceil(seconds / longer))) if longer > 0 else 4


@contextmanager
def _utilisation(device: str) -> Iterator[list[int]]:
    """A list that has the percentages which nvidia-smi reports of the GPU, once the block ends.

    It is empty on a CPU, and where there is no nvidia-smi or it does not know.
    """
    seen: list[int] = []
    process = None
    if device == "cuda":
        gpu = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
        query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        with suppress(FileNotFoundError):
            process = subprocess.Popen(
                ["nvidia-smi", gpu, *query, "--loop-ms=200"], stdout=subprocess.PIPE, text=True
            )
    try:
        yield seen
    finally:
        if process is not None:
            process.terminate()
            lines = process.communicate()[0].splitlines()
            seen += [int(line) for line in lines if line.strip().isdigit()]


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
