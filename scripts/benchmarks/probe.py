"""The time that the probe adds to a training step, and the time that compiling saves."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.loop import watched_step
from benchmarks.measured_losses import article, variants
from benchmarks.timing import Job, interleaved, repeat
from losswatch.data.random import TRAIN, image_and_label, uniform
from losswatch.losses import LossSet
from losswatch.nets import ConvNet, UNet
from losswatch.nets.cpu import fast_on_cpu
from losswatch.run.module import SegmentationModule
from losswatch.stack.compile import compiled
from losswatch.stack.optimizers import optimizer_rule
from losswatch.stack.step import make_gradient

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "article's net, 2×32×32": (lambda: ConvNet(1, 2), (2, 1, 32, 32)),
    "U-Net (8, 16, 32), 8×64×64": (lambda: UNet(1, 2, batch_norm=False), (8, 1, 64, 64)),
}
SMALL = 1000  # parameters of a network that is worth compiling


def measure(rounds: int) -> None:
    """Print two tables for each of `CASES`: with new weights, and with those of late training."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for title, (make, shape) in CASES.items():
        for stage, net in (("early", make), ("late", lambda make=make: saturate(make()))):
            jobs = training_steps(net, shape)
            # Ten steps a turn: "every 10 steps" observes one of them.
            turns = {name: partial(repeat, job, 10) for name, job in jobs.items()}
            times = interleaved(turns, rounds)
            base = times["plain PyTorch, one loss"]
            table = Table("a step", title=f"{title}, {stage}, one thread")
            table.add_column("ms", justify="right")
            table.add_column("× plain", justify="right")
            for name, ms in times.items():
                table.add_row(name, f"{ms / 10:.2f}", f"{ms / base:.2f}")
            Console(width=100).print(table)


def saturate(net: nn.Module) -> nn.Module:
    """Imitate late training: make the softmax of most pixels 0 or 1 in float32."""
    with torch.no_grad():
        *_, head = (m for m in net.modules() if isinstance(m, nn.Conv2d))
        head.weight *= 50
    return net


def watched(count: int) -> LossSet:
    """The five losses of the article and `count` - 5 further Dice losses."""
    losses = article()
    more = {f"tversky{i}": loss for i, loss in enumerate(variants(count - len(losses)))}
    return LossSet(losses | more)


def training_steps(make_net: Callable[[], nn.Module], shape: tuple[int, ...]) -> dict[str, Job]:
    """One training step in each way, with Dice and Adam on a new batch of `shape` [N, 1, H, W]."""
    thresholds, seed = torch.tensor([0.5]), torch.tensor(0)
    counter = itertools.count()

    def parts(count: int = 5) -> tuple[SegmentationModule, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = SegmentationModule(make_net(), watched(count), "dice", torch.optim.Adam)
        return module, torch.optim.Adam(module.net.parameters())

    def batch() -> tuple[Tensor, Tensor]:
        u = uniform(seed, TRAIN, torch.tensor(next(counter)), shape)
        return image_and_label(u, thresholds, 0.0, 1.0)

    def plain(sequential: bool) -> Job:
        """PyTorch without losswatch's choices for a CPU; `sequential`: one gradient per loss."""
        module, adam = parts()
        layout = torch.contiguous_format  # PyTorch's default
        module.net.to(memory_format=layout)  # type: ignore[call-overload]

        def step() -> None:
            image, label = batch()
            logits = module.net(image)
            adam.zero_grad()
            if sequential:
                for value in module.losses(logits, label):
                    parameters = list(module.net.parameters())
                    grads = torch.autograd.grad(value, parameters, retain_graph=True)
                    torch.cat([g.flatten() for g in grads]).norm()
            module.loss(logits, label).backward()
            adam.step()

        return step

    def probed(every: int, count: int, diagnose: bool = False) -> Job:
        """The ordinary step, watched."""
        module, adam = parts(count)
        step = watched_step(module, module.losses, "loss", adam, batch, every, diagnose)
        return lambda: fast_on_cpu(module.net)(step)()  # as train.py does for a whole run

    def compiled_step(count: int) -> Job:
        """The step of a compiled stack with one run."""
        module, adam = parts(count)
        rule, numbers, names = optimizer_rule(adam)
        flat = torch.cat([p.detach().flatten() for p in module.net.parameters()])[None]
        buffers = {n: b.clone()[None] for n, b in module.net.named_buffers()}
        rates = {n: torch.tensor([v]) for n, v in numbers.items()}
        inputs = {
            "seed": seed[None], "thresholds": thresholds[None],
            "low": torch.zeros(1), "high": torch.ones(1),
            "trained": torch.tensor([[float(n == "dice") for n in module.losses.names]]),
        }  # fmt: skip
        moments = tuple(torch.zeros_like(flat) for _ in names)
        gradient = make_gradient(module.net, module.losses, shape, observed=True)
        gradient = compiled(torch.vmap(gradient, in_dims=(0, 0, 0, None)))
        update = compiled(torch.vmap(rule, in_dims=(0, 0, 0, None, 0)))
        state = [flat, buffers, moments]

        def step() -> None:
            p, buffers, moments = state
            number = torch.tensor(next(counter))
            g, buffers, _ = gradient(p, buffers, inputs, number)
            p, moments = update(p, g, moments, number, rates)
            state[:] = p, buffers, moments

        return step

    jobs: dict[str, Job] = {
        "plain PyTorch, one loss": plain(sequential=False),
        "one autograd.grad per loss": plain(sequential=True),
        "probe, 5 losses": probed(1, 5),
        "probe, 16 losses": probed(1, 16),
        "probe every 10 steps": probed(10, 5),
        "probe and doctor, 5 losses": probed(1, 5, diagnose=True),
        "probe and doctor every 10 steps": probed(10, 5, diagnose=True),
    }
    if sum(p.numel() for p in make_net().parameters()) < SMALL:
        jobs |= {"compiled, 5 losses": compiled_step(5), "compiled, 16 losses": compiled_step(16)}
    return jobs
