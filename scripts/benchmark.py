"""Measure losswatch, one section per subcommand.

    python scripts/benchmark.py losses    losses and their gradients, also of other libraries
    python scripts/benchmark.py probe     time that watching adds to a training step
    python scripts/benchmark.py watch     the same on a network of segmentation_models_pytorch
    python scripts/benchmark.py run       steps per second of a whole run
    python scripts/benchmark.py sweep     runs x steps per second of each launcher
    python scripts/benchmark.py launchers whole sweeps by each launcher
    python scripts/benchmark.py stack     what a stack of runs gains, by the size of layers
    python scripts/benchmark.py threads   what more CPU threads bring for a single run
    python scripts/benchmark.py scaling   time and memory of a stack by its number of runs
    python scripts/benchmark.py folder    reading a folder of images before training
    python scripts/benchmark.py gpu PART  a part of scripts/gpu.sh

`losses` and `watch` also measure other libraries that are installed:
pip install monai kornia segmentation-models-pytorch nnunetv2 torchjd wandb

Results and what they mean: scripts/README.md.
"""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path

import torch

from benchmarks import (
    ROOT,
    folder,
    gpu,
    launchers,
    losses,
    probe,
    runs,
    scaling,
    stack,
    threads,
    watch,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sections = parser.add_subparsers(dest="section", required=True)
    for name, text in (("losses", "losses and their gradients, also of other libraries"),
                       ("probe", "time that watching adds to a training step")):  # fmt: skip
        section = sections.add_parser(name, help=text)
        section.add_argument("--rounds", type=int, default=25, help="interleaved rounds")
    section = sections.add_parser("watch", help="the same on a network of another library")
    section.add_argument("--rounds", type=int, default=3, help="interleaved rounds of seconds")
    section = sections.add_parser("folder", help="reading a folder of images before training")
    section.add_argument("--rounds", type=int, default=3, help="interleaved rounds")
    section = sections.add_parser("run", help="steps per second of a whole run")
    section.add_argument("--seconds", type=float, default=10, help="of each training, at least")
    section = sections.add_parser("sweep", help="runs x steps per second of each launcher")
    section.add_argument(
        "--steps", type=int, default=1000, help="slower launchers make fewer steps"
    )
    section.add_argument("--runs", type=int, nargs="+", default=[9, 27, 54, 108])
    section = sections.add_parser("launchers", help="whole sweeps by each launcher")
    section.add_argument("--rounds", type=int, default=1, help="interleaved rounds of minutes")
    section.add_argument("--grids", nargs="+", default=[], choices=list(launchers.GRIDS))
    section = sections.add_parser("stack", help="what a stack gains, by the size of layers")
    section.add_argument("--steps", type=int, default=200, help="larger stacks make fewer steps")
    section = sections.add_parser("threads", help="what more CPU threads bring for a single run")
    section.add_argument("--rounds", type=int, default=2, help="interleaved rounds of seconds")
    section = sections.add_parser("scaling", help="time and memory of a stack by its runs")
    section.add_argument("--steps", type=int, default=500, help="smaller stacks make more steps")
    section.add_argument("--runs", type=int, nargs="+", default=[1, 4, 14, 56, 168, 504])
    section.add_argument("--figure", type=Path, default=ROOT / "outputs/article/scaling.png")
    section = sections.add_parser("gpu", help="a part of scripts/gpu.sh")
    section.add_argument("part", choices=list(gpu.PARTS))
    args = parser.parse_args()
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}")
    if args.section == "losses":
        losses.measure(args.rounds)
    elif args.section == "probe":
        probe.measure(args.rounds)
    elif args.section == "watch":
        watch.measure(args.rounds)
    elif args.section == "folder":
        folder.measure(args.rounds)
    elif args.section == "run":
        runs.measure_runs(args.seconds)
    elif args.section == "sweep":
        runs.measure_sweeps(args.steps, args.runs)
    elif args.section == "launchers":
        launchers.measure(args.rounds, args.grids)
    elif args.section == "stack":
        stack.measure(args.steps)
    elif args.section == "threads":
        threads.measure(args.rounds)
    elif args.section == "gpu":
        gpu.measure(args.part)
    else:
        scaling.measure(args.steps, args.runs, args.figure)


if __name__ == "__main__":
    main()
