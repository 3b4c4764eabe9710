"""What a stack of runs gains on a CPU, by the size of the network's layers."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.plans import MakePlan, plans
from losswatch.run import train as run
from losswatch.run.build import make_losses
from losswatch.stack.fit import fit
from losswatch.stack.member import make_member

COMMON = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "data.val_size=2",
          "data.test_size=2", "trainer.val_check_interval=20"]  # fmt: skip
CASES = {
    "plain network, 2 x 16 x 16": ["model=convnet", "data.batch_size=2", "data.image_size=16"],
    "plain network, 2 x 32 x 32": ["model=convnet", "data.batch_size=2"],
    "plain network, 8 x 32 x 32": ["model=convnet"],
    "plain network, 8 x 64 x 64": ["model=convnet", "data.image_size=64"],
    "U-Net, 2 x 16 x 16": ["data.batch_size=2", "data.image_size=16"],
    "U-Net, 8 x 16 x 16": ["data.image_size=16"],
    "U-Net, 8 x 32 x 32": [],
    "U-Net, 8 x 64 x 64": ["data.image_size=64"],
}
MEMBERS = (3, 9)


def measure(steps: int) -> None:
    """Print the CPU time of a step of one run: by itself, and in stacks."""
    torch.set_num_threads(1)
    table = Table("network and batch", title="CPU ms for a step of one run; one thread")
    for title in ("MFLOP a layer", "by itself", *(f"in a stack of {n}" for n in MEMBERS), "gain"):
        table.add_column(title, justify="right")
    with plans() as plan:
        for name, overrides in CASES.items():
            flops = _layer_flops(plan, overrides)
            single = _pace(plan, overrides, 1, steps, is_stack=False)
            stacked = [_pace(plan, overrides, count, steps) for count in MEMBERS]
            cells = [f"{flops / 1e6:.2f}", f"{single:.1f}", *(f"{ms:.1f}" for ms in stacked)]
            table.add_row(name, *cells, f"{single / stacked[-1]:.2f}")
            print(name, *cells, file=sys.stderr)
    Console(width=100).print(table)


def _layer_flops(plan: MakePlan, overrides: list[str]) -> float:
    traits = plan([*COMMON, *overrides], Path()).traits
    assert traits is not None
    return traits.layer_flops


def _pace(
    plan: MakePlan, overrides: list[str], count: int, steps: int, is_stack: bool = True
) -> float:
    """CPU milliseconds for a step of one of `count` runs: a long training minus a short one."""

    def seconds(length: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            made = []
            for seed in range(count):
                (own := Path(folder, str(seed))).mkdir()
                settings = [f"seed={seed}", f"trainer.max_steps={length}"]
                made.append(plan([*COMMON, *overrides, *settings], own))
            members = [make_member(each) for each in made] if is_stack else []
            begin = time.process_time()
            if is_stack:
                fit(members, make_losses(made[0]), made[0])
            else:
                run.train(made[0])
            return time.process_time() - begin

    more = max(20, steps // count)
    short, long = (min(seconds(length) for _ in range(2)) for length in (20, 20 + more))
    return 1e3 * (long - short) / more / count
