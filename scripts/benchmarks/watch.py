"""The time that watching adds to the training of a network of another library."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import Precision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.loop import watched_step
from benchmarks.measured_losses import article
from benchmarks.timing import Job, interleaved, peak_memory
from losswatch import Observer

PLAIN = "plain PyTorch, one loss"
EVERY, NOT_OBSERVED = "Watch, every step", "Watch, a step that is not observed"


def unet(encoder: str) -> nn.Module:
    smp: Any = importlib.import_module("segmentation_models_pytorch")
    return smp.Unet(encoder, encoder_weights=None, in_channels=3, classes=2)


class Training(pl.LightningModule):
    """A step of a network of segmentation_models_pytorch, trained with losswatch's Dice."""

    def __init__(
        self, encoder: str, batch: int, size: int, device: str = "cpu",
        precision: Precision | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        torch.manual_seed(0)
        self.net = unet(encoder).to(device)
        self.losses = article()
        self.loss_fn = self.losses["dice"]
        self.images = torch.randn(batch, 3, size, size, device=device)
        self.masks = torch.randint(0, 2, (batch, size, size), device=device)
        self.adam = torch.optim.Adam(self.net.parameters())
        self.precision = precision or Precision()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, masks = batch
        return self.loss_fn(self.net(images), masks)

    def step(self, before: Callable[[Tensor, Tensor], object] = lambda logits, value: None) -> None:
        """One step of plain PyTorch, with a call of `before` before the backward pass."""
        self.adam.zero_grad()
        with self.precision.forward_context():
            logits = self.net(self.images)
            value = self.loss_fn(logits, self.masks)
        before(logits, value)
        value.backward()
        self.adam.step()


def one_by_one(module: Training, logits: Tensor, value: Tensor) -> None:
    parameters = list(module.net.parameters())
    for loss in module.losses.values():
        gradients = torch.autograd.grad(loss(logits, module.masks), parameters, retain_graph=True)
        torch.cat([g.flatten() for g in gradients]).norm()


def torchjd(module: Training, logits: Tensor, value: Tensor) -> None:
    autojac: Any = importlib.import_module("torchjd.autojac")
    values = [loss(logits, module.masks) for loss in module.losses.values()]
    rows = autojac.jac(values, list(module.net.parameters()), retain_graph=True)
    torch.cat([row.flatten(1) for row in rows], 1).norm(dim=1)


def observed(module: Training) -> Job:
    observer = Observer(module.losses, module.net)
    return lambda: module.step(lambda logits, value: observer(logits, module.masks))


def watched(module: Training, every: int) -> Job:
    batch = module.images, module.masks
    return watched_step(
        module, module.losses, "loss_fn", module.adam, lambda: batch, every,
        precision=module.precision,
    )  # fmt: skip


def steps(make: Callable[[], Training]) -> dict[str, Job]:
    """Steps of plain PyTorch, and with `Watch`, by name."""
    rare = watched(make(), 10**9)
    rare()  # observes its first step, and no other
    return {PLAIN: make().step, EVERY: watched(make(), 1), NOT_OBSERVED: rare}


def add_mean(times: dict[str, float]) -> None:
    """Add the time of a step if every 50th is observed."""
    times["Watch, every 50 steps (mean)"] = (times[EVERY] + 49 * times[NOT_OBSERVED]) / 50


@contextmanager
def wandb(net: nn.Module) -> Iterator[None]:
    """Make wandb.watch log histograms of the trained loss's gradient, until the exit."""
    package: Any = importlib.import_module("wandb")
    package.init(mode="offline")
    package.watch(net, log="gradients", log_freq=1)
    yield
    package.unwatch(net)
    package.finish()


def has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def measure(rounds: int) -> None:
    """Print the times of a step, and the memory of a step of a larger network."""
    torch.set_num_threads(1)
    make = partial(Training, "resnet18", 4, 256)
    jobs = steps(make) | {"Observer, every step": observed(make())}
    module = make()
    jobs["one autograd.grad per loss"] = partial(module.step, partial(one_by_one, module))
    if has("torchjd"):
        other = make()
        jobs["TorchJD: jac of the five losses"] = partial(other.step, partial(torchjd, other))
    times = interleaved(jobs, rounds)
    if has("wandb"):
        last = make()
        with wandb(last.net):
            alone = interleaved({PLAIN: jobs[PLAIN], "wandb.watch": last.step}, rounds)
        times["wandb.watch: histograms of one gradient"] = (
            alone["wandb.watch"] * times[PLAIN] / alone[PLAIN]
        )
    add_mean(times)
    table = Table("a step", title="smp Unet(resnet18), 4×3×256×256, five losses, one thread")
    table.add_column("ms", justify="right")
    table.add_column("× plain", justify="right")
    for name, ms in times.items():
        table.add_row(name, f"{ms:.0f}", f"{ms / times[PLAIN]:.2f}")
    Console(width=100).print(table)

    big = Training("resnet50", 4, 64)
    size = sum(p.numel() for p in big.net.parameters()) * 4 / 2**20
    title = f"smp Unet(resnet50), {size / 4 * 2**20 / 1e6:.0f} million parameters = {size:.0f} MiB"
    table = Table("peak memory of a step", title=title)
    table.add_column("MiB", justify="right")
    table.add_column("above plain, × parameters", justify="right")
    jobs = {
        PLAIN: big.step,
        "Observer, four rows": observed(big),
        "Watch, four rows": watched(big, 1),
    }
    peaks = {name: peak_memory(job) for name, job in jobs.items()}
    for name, peak in peaks.items():
        table.add_row(name, f"{peak:.0f}", f"{(peak - peaks[PLAIN]) / size:.2f}")
    Console(width=100).print(table)
