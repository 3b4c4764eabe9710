"""Time and memory of losses and their gradients, also of those of other libraries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measured_losses import article, variants
from benchmarks.peers import peers
from benchmarks.timing import Job, interleaved, peak_memory
from losswatch.losses import LossSet
from losswatch.presets import load_loss

SIZES = ((2, 2, 256, 256), (2, 4, 512, 512))  # of the logits, [N, C, H, W]


def measure(rounds: int) -> None:
    """Print a table for each of `SIZES`, and one for the images of the article."""
    losses = article()
    watched = {
        "five": LossSet(losses),
        "16 Dice": LossSet({f"dice{i}": loss for i, loss in enumerate(variants(16))}),
    }
    console = Console(width=120)
    torch.set_num_threads(1)
    for shape in SIZES:
        torch.manual_seed(0)
        logits, target = torch.randn(shape), torch.randint(0, shape[1], (shape[0], *shape[2:]))
        ours: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "losswatch five losses + 1 gradient": lambda x, t: watched["five"](x, t)[1],
            "losswatch Dice": losses["dice"],
            "losswatch Dice per sample": load_loss("dice_monai"),
            "losswatch CE": losses["cce"],
            "losswatch CE stable": load_loss("cce_stable"),
            "losswatch Dice + CE": load_loss("dice_cce"),
        }
        jobs = {n: with_gradient(f, logits, target) for n, f in (ours | peers()).items()}
        for name, together in watched.items():
            jobs[f"losswatch rows of {name}"] = partial(together.rows, logits, target)
        title = f"forward + gradient, {'×'.join(map(str, shape))}, one thread"
        print_table(console, title, jobs, interleaved(jobs, rounds))
    small, label = torch.randn(2, 2, 32, 32), torch.randint(0, 2, (2, 32, 32))
    jobs = {
        f"rows of {name}": partial(together.rows, small, label)
        for name, together in watched.items()
    }
    print_table(console, "2×2×32×32, one thread", jobs, interleaved(jobs, 20 * rounds))


def with_gradient(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Job:
    """A job that computes the loss and its derivative by the logits."""
    x = logits.clone().requires_grad_()
    return lambda: torch.autograd.grad(loss(x, target), x)


def print_table(
    console: Console, title: str, jobs: Mapping[str, Job], times: Mapping[str, float]
) -> None:
    table = Table("loss", title=title)
    table.add_column("ms", justify="right")
    table.add_column("peak MiB", justify="right")
    for name in sorted(times, key=lambda n: times[n]):
        table.add_row(name, f"{times[name]:.3g}", f"{peak_memory(jobs[name]):.2f}")
    console.print(table)
