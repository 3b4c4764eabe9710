"""Time and memory of one compiled stack by its number of runs, in this process."""

from __future__ import annotations

import functools
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from benchmarks import ROOT
from benchmarks.runs import COMMON
from losswatch.config import schema
from losswatch.config.settings import Job, Settings
from losswatch.config.sources import Sources
from losswatch.disk.checkpoint_files import settings_to_keep
from losswatch.run.build import make_losses
from losswatch.run.plan import Plan
from losswatch.run.planner import Planner
from losswatch.stack.fit import fit
from losswatch.stack.member import make_member

Row = tuple[int, float, float, float]  # runs, ms a step of all, run-steps a second, peak MiB


def measure(steps: int, counts: list[int], figure: Path) -> None:
    """Print the table, and draw it to `figure`."""
    torch.set_num_threads(1)
    schema.register()
    overrides = [*COMMON, "compile=true", "trainer.accelerator=cpu"]
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        planner = Planner(Sources())

        def plan(seed: int, length: int, folder: Path) -> Plan:
            own = [f"seed={seed}", f"trainer.max_steps={length}"]
            cfg = compose("config", [*overrides, *own], return_hydra_config=True)
            job = Job.read(cfg.hydra, folder)
            read = functools.partial(Settings.read, cfg, job, planner.sources, settings_to_keep)
            return planner.plan(read(), read)

        _measure(plan, steps, counts, figure)


def _measure(
    plan: Callable[[int, int, Path], Plan], steps: int, counts: list[int], figure: Path
) -> None:
    def seconds(count: int, length: int) -> float:
        """CPU seconds of `count` runs of `length` steps."""
        with tempfile.TemporaryDirectory() as folder:
            plans = []
            for seed in range(count):
                (run := Path(folder, str(seed))).mkdir()
                plans.append(plan(seed, length, run))
            members = [make_member(each) for each in plans]
            begin = time.process_time()
            fit(members, make_losses(plans[0]), plans[0])
            return time.process_time() - begin

    rows: list[Row] = []
    for count in counts:
        seconds(count, 250)  # fills the compiler's cache
        short = seconds(count, 250)
        longer = steps * max(1, 100 // count)  # so many that tracing the step does not matter
        pace = (seconds(count, 250 + longer) - short) / longer
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        rows.append((count, 1e3 * pace, count / pace, memory))
        print(f"{count} runs: {1e3 * pace:.2f} ms a step, {memory:.0f} MiB", file=sys.stderr)
    table = Table("runs", title="one compiled stack, one thread")
    for title in ("ms a step", "run-steps/s", "peak MiB"):
        table.add_column(title, justify="right")
    for count, ms, rate, memory in rows:
        table.add_row(str(count), f"{ms:.2f}", f"{rate:.0f}", f"{memory:.0f}")
    Console(width=100).print(table)
    draw(rows, figure)


def draw(rows: list[Row], figure: Path) -> None:
    matplotlib.use("agg")
    runs, ms, _, memories = zip(*rows, strict=True)
    axes = plt.figure(figsize=(8, 3), layout="constrained").subplots(1, 2)
    axes[0].loglog(runs, ms, "o-", base=2)
    axes[0].set(xlabel="runs in the stack", ylabel="CPU ms a step of all")
    axes[1].semilogx(runs, memories, "o-", base=2)
    axes[1].set(
        xlabel="runs in the stack", ylabel="peak memory of the process, MiB", ylim=(0, None)
    )
    figure.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(figure, dpi=120)
