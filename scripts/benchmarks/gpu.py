"""The parts of scripts/gpu.sh. Each prints rows of its Markdown table: part, what, result."""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from pytorch_lightning.plugins import MixedPrecision

from benchmarks import ROOT, watch
from benchmarks.runs import RUNS, WAYS, speeds
from benchmarks.timing import interleaved

Runs = list[dict[str, str]]  # rows of summary.csv


def measure(part: str) -> None:
    """Print the rows of a part.

    Raises:
        SystemExit: a run is not done.
    """
    PARTS[part]()


def row(*cells: object) -> None:
    print("|", " | ".join(str(cell).replace("|", "\\|") for cell in cells), "|", flush=True)


# --- Whole commands ------------------------------------------------------------------------------


def sweep(*overrides: str, show: Callable[[float, Runs], None]) -> None:
    """Train a sweep by train.py, and show its seconds and its summary.csv.

    Raises:
        SystemExit: a run is not done.
    """
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), "-m", *overrides, "hydra.sweep.dir=sweep"],
            cwd=folder, check=False, stdout=sys.stderr,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        summary = Path(folder, "sweep", "summary.csv")
        if summary.exists():
            with summary.open(encoding="utf-8", newline="") as file:
                show(seconds, list(csv.DictReader(file)))
    if done.returncode:
        raise SystemExit(f"train.py ended with exit status {done.returncode}")


def each_run(part: str, seconds: float, runs: Runs) -> None:
    row(part, "the whole command", f"{seconds:.0f} s")
    for run in runs:
        scores = ", ".join(f"{name} {run[name]:.6}" for name in ("dice", "accuracy"))
        row(part, run["run"], f"{run['status']}: {scores}, {run['seconds']:.5} s")


def all_runs(part: str, seconds: float, runs: Runs) -> None:
    done = [float(run["seconds"]) for run in runs if run["status"] == "done"]
    trained = f"{sum(done):.1f} s of training, {seconds:.0f} s for the whole command"
    row(part, f"{len(runs)} runs", f"{len(done)} done: {trained}")


# --- Steps ---------------------------------------------------------------------------------------


def speed(part: str, runs: Mapping[str, tuple[str, ...]], device: str, seconds: float) -> None:
    """Show the steps a second of `runs`, each with the ways in which to train it."""
    for title, ways in runs.items():
        options = {way: WAYS[way] for way in ways}
        for way, pace, load in speeds(RUNS[title], options, device, seconds):
            used = "unknown" if load is None else f"at most {load} %"
            row(part, f"{title}, {way}", f"{pace:,.1f} steps/s, utilisation {used}")


def watching(part: str, encoder: str, batch: int, size: int, device: str, rounds: int) -> None:
    """Show the time of a step of a network of another library, in bfloat16."""
    precision = MixedPrecision("bf16-mixed", device)
    what = f"smp Unet({encoder}), {batch}×3×{size}×{size}, bf16"
    make = partial(watch.Training, encoder, batch, size, device, precision)
    try:
        watch.unet(encoder)
    except (ImportError, RuntimeError) as error:  # a torchvision of another version raises this one
        row(part, what, f"skipped: {str(error).splitlines()[0]}")
        return
    times = interleaved(watch.steps(make), rounds, device)
    watch.add_mean(times)
    for name, ms in times.items():
        row(part, f"{what}: {name}", f"{ms:.1f} ms, × plain {ms / times[watch.PLAIN]:.2f}")


PARTS: dict[str, Callable[[], None]] = {
    "six": partial(
        sweep, "loss=dice,cce", "theta=0.05,0.5,0.95", show=partial(each_run, "six")
    ),
    "precision": partial(
        sweep, "model=unet,convnet", "trainer.precision=32-true,bf16-mixed,16-mixed",
        show=partial(each_run, "precision"),
    ),
    "speed": partial(
        speed, "speed", dict.fromkeys(RUNS, ("probe off", "probe on")), "cuda", 3
    ),
    "grid": partial(
        sweep, "experiment=article", "compile=true", show=partial(all_runs, "grid")
    ),
    "watch": partial(watching, "watch", "resnet50", 8, 512, "cuda", 10),
    "compiled": partial(
        speed, "compiled", dict.fromkeys(RUNS, ("compile=true",)), "cuda", 3
    ),
}  # fmt: skip
