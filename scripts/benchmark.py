"""Measure losswatch, one section per subcommand.

    python scripts/benchmark.py losses    losses and their gradient against other libraries'

Peers are measured where they are installed:
pip install monai kornia segmentation-models-pytorch nnunetv2
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

SIZES = ((2, 2, 256, 256), (2, 4, 512, 512))
Job = Callable[[], object]


def interleaved(jobs: dict[str, Job], rounds: int) -> dict[str, float]:
    """Median CPU milliseconds of each job; they take turns, so a busy moment hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for i in range(rounds + 2):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            if i >= 2:
                times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def peak_memory(job: Job) -> float:
    """MiB of CPU tensors alive at once during the job, over those before it."""
    job()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU], profile_memory=True) as profiler:
        job()
    alive = most = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most / 2**20


def with_gradient(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Job:
    x = logits.clone().requires_grad_()
    return lambda: torch.autograd.grad(loss(x, target), x)


def losses(rounds: int) -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from losswatch.losses import Dice, LossSet

    def load(name: str) -> torch.nn.Module:
        return instantiate(OmegaConf.load(Path(__file__).parent.parent / f"conf/loss/{name}.yaml"))

    article = {n: load(n) for n in ("cce", "dice", "dice_fg", "dice_square", "dice_fg_square")}
    many = {f"dice{i}": Dice(exponent=1 + i % 2, alpha=0.1 + 0.05 * i) for i in range(16)}
    five = LossSet(article)
    console = Console(width=120)
    torch.set_num_threads(1)
    for shape in SIZES:
        torch.manual_seed(0)
        logits, target = torch.randn(shape), torch.randint(0, shape[1], (shape[0], *shape[2:]))
        ours: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "losswatch five losses + 1 gradient": lambda x, t: five(x, t)[1],
            "losswatch Dice": article["dice"],
            "losswatch Dice per sample": load("dice_monai"),
            "losswatch CE": article["cce"],
            "losswatch CE stable": load("cce_stable"),
            "losswatch Dice + CE": load("dice_cce"),
        }
        jobs = {n: with_gradient(f, logits, target) for n, f in (ours | peers(shape[1])).items()}
        for name, watched in (("five", article), ("16 Dice", many)):
            jobs[f"losswatch rows of {name}"] = partial(LossSet(watched).rows, logits, target)
        times = interleaved(jobs, rounds)
        show(console, f"forward + gradient, {'×'.join(map(str, shape))}, one thread", jobs, times)
    small, label = torch.randn(2, 2, 32, 32), torch.randint(0, 2, (2, 32, 32))
    jobs = {
        f"rows of {name}": partial(LossSet(watched).rows, small, label)
        for name, watched in (("five", article), ("16 Dice", many))
    }
    show(console, "2×2×32×32, one thread", jobs, interleaved(jobs, 20 * rounds))


def show(console: Console, title: str, jobs: dict[str, Job], times: dict[str, float]) -> None:
    table = Table("loss", title=title)
    table.add_column("ms", justify="right")
    table.add_column("peak MiB", justify="right")
    for name in sorted(times, key=lambda n: times[n]):
        table.add_row(name, f"{times[name]:.3g}", f"{peak_memory(jobs[name]):.2f}")
    console.print(table)


def peers(classes: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Other libraries' losses of (logits, class indices)."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]]
    found = {"torch cross_entropy": torch.nn.CrossEntropyLoss()}
    try:
        from monai.losses import DiceCELoss, DiceLoss

        dice, both = (cls(softmax=True, to_onehot_y=True) for cls in (DiceLoss, DiceCELoss))
        found["MONAI Dice"] = lambda x, t: dice(x, t[:, None])
        found["MONAI DiceCE"] = lambda x, t: both(x, t[:, None])
    except ImportError:
        pass
    try:
        from kornia.losses import dice_loss

        found["kornia Dice"] = dice_loss
        found["kornia Dice macro"] = lambda x, t: dice_loss(x, t, average="macro")
    except ImportError:
        pass
    try:
        from segmentation_models_pytorch.losses import DiceLoss as SmpDice

        found["smp Dice"] = SmpDice("multiclass")
    except ImportError:
        pass
    try:
        from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss, SoftDiceLoss

        softmax = {"apply_nonlin": lambda x: x.softmax(1), "ddp": False, "batch_dice": True}
        found["nnU-Net SoftDice"] = SoftDiceLoss(**softmax)
        found["nnU-Net SoftDice memory-efficient"] = MemoryEfficientSoftDiceLoss(**softmax)
    except ImportError:
        pass
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sections = parser.add_subparsers(dest="section", required=True)
    section = sections.add_parser("losses", help="losses and gradients against other libraries'")
    section.add_argument("--rounds", type=int, default=25, help="interleaved rounds of the median")
    args = parser.parse_args()
    if args.section == "losses":
        losses(args.rounds)


if __name__ == "__main__":
    main()
