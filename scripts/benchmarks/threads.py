"""What more CPU threads bring for a single run, by the size of the network's layers."""

from __future__ import annotations

import sys
from pathlib import Path

from joblib import cpu_count
from rich.console import Console
from rich.table import Table

from benchmarks.plans import plans, seconds_of

COMMON = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "data.val_size=1",
          "data.test_size=1"]  # fmt: skip
CASES = {
    "U-Net, 8 x 32 x 32": [],
    "U-Net, 8 x 64 x 64": ["data.image_size=64"],
    "U-Net, 8 x 128 x 128": ["data.image_size=128"],
    "U-Net, 4 x 256 x 256": ["data.image_size=256", "data.batch_size=4"],
    "U-Net, 8 x 256 x 256": ["data.image_size=256"],
    "MONAI's U-Net, 8 x 64 x 64": ["model=monai_unet", "data.image_size=64"],
    "MONAI's U-Net, 8 x 128 x 128": ["model=monai_unet", "data.image_size=128"],
    "U-Net, 8 x 16 x 16 x 16": ["data.dims=3", "data.image_size=16"],
    "U-Net, 2 x 32 x 32 x 32": ["data.dims=3", "data.batch_size=2"],
}


def measure(rounds: int) -> None:
    """Print the time of a step with one thread and with one for each core, on an idle machine."""
    cores = cpu_count()
    table = Table("network and batch", title="ms a step, the fastest of some rounds in turn")
    for title in ("MFLOP a layer", "1 thread", f"{cores} threads", "gain"):
        table.add_column(title, justify="right")
    with plans() as plan:
        for name, overrides in CASES.items():
            traits = plan([*COMMON, *overrides], Path()).traits
            assert traits is not None
            steps = min(150, max(6, int(1e9 / traits.layer_flops)))
            paces: dict[int, list[float]] = {1: [], cores: []}
            for _ in range(rounds):
                for threads, found in paces.items():
                    settings = [*COMMON, *overrides, f"threads={threads}"]
                    short, long = (seconds_of(plan, settings, n) for n in (4, 4 + steps))
                    found.append(1e3 * (long - short) / steps)
            one, all_cores = min(paces[1]), min(paces[cores])
            cells = [f"{traits.layer_flops / 1e6:.0f}", f"{one:.0f}", f"{all_cores:.0f}"]
            table.add_row(name, *cells, f"{one / all_cores:.2f}")
            print(name, *cells, file=sys.stderr)
    Console(width=100).print(table)
