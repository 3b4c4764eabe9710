"""Measure losswatch, one section per subcommand.

    python scripts/benchmark.py losses    losses and their gradient against other libraries'
    python scripts/benchmark.py probe     what watching costs, against plain training
    python scripts/benchmark.py run       steps a second of a whole run
    python scripts/benchmark.py sweep     runs x steps a second of each launcher
    python scripts/benchmark.py scaling   time and memory of a stack by its number of runs

Peers are measured where they are installed:
pip install monai kornia segmentation-models-pytorch nnunetv2
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from losswatch.data.random import TRAIN, image_and_label, uniform
from losswatch.losses import Dice, LossSet
from losswatch.nets import ConvNet, UNet
from losswatch.nets.cpu import fast_on_cpu
from losswatch.stack.compile import compiled
from losswatch.stack.fit import fit
from losswatch.stack.member import make_member
from losswatch.stack.optimizers import optimizer_rule
from losswatch.stack.step import make_gradient
from losswatch.train import build
from losswatch.train import config as schema
from losswatch.train.module import SegmentationModule
from losswatch.train.presets import loss_nodes
from losswatch.watch.probe import Probe

ROOT = Path(__file__).parent.parent
matplotlib.use("agg")
SIZES = ((2, 2, 256, 256), (2, 4, 512, 512))
Job = Callable[[], object]


def interleaved(jobs: Mapping[str, Job], rounds: int) -> dict[str, float]:
    """Median CPU milliseconds of each job.

    They take turns, so a busy moment hits all alike, in an order of its own each time: what one
    leaves in the caches is not always the same one's burden.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    order, shuffled = list(jobs.items()), random.Random(0)
    for i in range(rounds + 2):
        shuffled.shuffle(order)
        for name, job in order:
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
    def load(name: str) -> torch.nn.Module:
        return instantiate(OmegaConf.load(ROOT / f"conf/loss/{name}.yaml"))

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


ARTICLE = ("cce", "dice", "dice_fg", "dice_square", "dice_fg_square")


def watched(count: int) -> LossSet:
    """The article's five losses and, up to `count`, more Dice variants."""
    folder = ROOT / "conf/loss"
    found = {name: instantiate(OmegaConf.load(folder / f"{name}.yaml")) for name in ARTICLE}
    for i in range(count - len(found)):
        found[f"tversky{i}"] = Dice(exponent=1 + i % 2, alpha=0.1 + 0.05 * i)
    return LossSet(found)


def saturate(net: nn.Module) -> nn.Module:
    """The state late in training: most pixels' softmax is 0 or 1 to float32."""
    with torch.no_grad():
        *_, head = (m for m in net.modules() if isinstance(m, nn.Conv2d))
        head.weight *= 50
    return net


def training_steps(make_net: Callable[[], nn.Module], shape: tuple[int, ...]) -> dict[str, Job]:
    """One training step in each way, trained with Dice and Adam on fresh images."""

    def parts(count: int = 5) -> tuple[SegmentationModule, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = SegmentationModule(make_net(), watched(count), "dice", torch.optim.Adam)
        return module, torch.optim.Adam(module.net.parameters())

    thresholds, seed = torch.tensor([0.5]), torch.tensor(0)
    counter = itertools.count()

    def batch() -> tuple[Tensor, Tensor]:
        u = uniform(seed, TRAIN, torch.tensor(next(counter)), shape)
        return image_and_label(u, thresholds, 0.0, 1.0)

    def plain(sequential: bool, module: SegmentationModule, adam: torch.optim.Optimizer) -> None:
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

    def probed(every: int, count: int) -> Job:
        module, adam = parts(count)
        probe = Probe(every_n_steps=every)
        strategy = SimpleNamespace(reduce=lambda x, reduce_op: x)
        trainer: Any = SimpleNamespace(
            global_step=0, accumulate_grad_batches=1, world_size=1, precision="32-true",
            fit_loop=SimpleNamespace(_should_accumulate=lambda: False), strategy=strategy,
            logger=None, is_global_zero=True,
        )  # fmt: skip
        probe.on_fit_start(trainer, module)

        def step() -> None:
            loss = module.training_step(batch(), 0)
            adam.zero_grad()
            probe.on_before_backward(trainer, module, loss)
            loss.backward()
            probe.on_after_backward(trainer, module)
            adam.step()
            trainer.global_step += 1

        return lambda: fast_on_cpu(module.net)(step)()  # as train.py does for a whole run

    def fused(count: int) -> Job:
        module, adam = parts(count)
        rule, numbers, names = optimizer_rule(adam)
        flat = torch.cat([p.detach().flatten() for p in module.net.parameters()])[None]
        buffers = {n: b.clone()[None] for n, b in module.net.named_buffers()}
        rates = {n: torch.tensor([v]) for n, v in numbers.items()}
        given = {
            "seed": seed[None], "thresholds": thresholds[None],
            "low": torch.zeros(1), "high": torch.ones(1),
            "trained": torch.tensor([[float(n == "dice") for n in module.losses.names]]),
        }  # fmt: skip
        moments = tuple(torch.zeros_like(flat) for _ in names)
        gradient = make_gradient(module.net, module.losses, shape, observed=True)
        gradient = compiled(torch.vmap(gradient, in_dims=(0, 0, 0, None)))
        update = compiled(torch.vmap(rule, in_dims=(0, 0, 0, None, 0)))
        state = [flat, buffers, moments]

        def one() -> None:
            p, buffers, moments = state
            step = torch.tensor(next(counter))
            g, buffers, _ = gradient(p, buffers, given, step)
            p, moments = update(p, g, moments, step, rates)
            state[:] = p, buffers, moments

        return one

    default, layout = parts(), torch.contiguous_format
    default[0].net.to(memory_format=layout)  # type: ignore[call-overload]
    sequential = parts()
    sequential[0].net.to(memory_format=layout)  # type: ignore[call-overload]
    jobs: dict[str, Job] = {
        "plain PyTorch, one loss": partial(plain, False, *default),
        "one autograd.grad per loss": partial(plain, True, *sequential),
        "probe, 5 losses": probed(1, 5),
        "probe, 16 losses": probed(1, 16),
        "probe every 10 steps": probed(10, 5),
    }
    if sum(p.numel() for p in make_net().parameters()) < 1000:
        jobs |= {"compiled, 5 losses": fused(5), "compiled, 16 losses": fused(16)}
    return jobs


def probe(rounds: int) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    cases: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "article's net, 2×32×32": (lambda: ConvNet(1, 2), (2, 1, 32, 32)),
        "U-Net (8, 16, 32), 8×64×64": (lambda: UNet(1, 2, batch_norm=False), (8, 1, 64, 64)),
    }
    for title, (make, shape) in cases.items():
        for stage, net in (("early", make), ("late", lambda make=make: saturate(make()))):
            jobs = training_steps(net, shape)
            # Ten steps a turn, so that every tenth is observed once a turn.
            turns = {name: partial(repeat, job, 10) for name, job in jobs.items()}
            times = interleaved(turns, rounds)
            base = times["plain PyTorch, one loss"]
            table = Table("a step", title=f"{title}, {stage}, one thread")
            table.add_column("ms", justify="right")
            table.add_column("× plain", justify="right")
            for name, ms in times.items():
                table.add_row(name, f"{ms / 10:.2f}", f"{ms / base:.2f}")
            Console(width=100).print(table)


def repeat(job: Job, times: int) -> None:
    for _ in range(times):
        job()


COMMON = ("model=convnet", "data.batch_size=2", "optimizer.lr=1e-3",
          "trainer.val_check_interval=250", "trainer.enable_progress_bar=false")  # fmt: skip


def train(*overrides: str) -> None:
    """train.py in a process of its own; each process on one thread."""
    subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *COMMON, *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )


UNET = ["model=unet", "data.batch_size=8", "data.val_size=8", "data.test_size=8"]
# Net and images of a whole run, and the share of the steps that shows its pace.
RUNS: dict[str, tuple[list[str], int]] = {
    "article's net, 2×32×32": ([], 1),
    "U-Net (8, 16, 32), 8×64×64": ([*UNET, "data.image_size=64"], 10),
    "U-Net (8, 16, 32), 8×256×256": ([*UNET, "data.image_size=256"], 100),
    "U-Net (8, 16, 32), 8×512×512": ([*UNET, "data.image_size=512"], 300),
}


def whole_run(steps: int) -> None:
    """Steps a second of a run, from the seconds of a long one less those of a short one."""
    table = Table("run", title="Lightning, data, probe of five losses and events; one thread")
    ways = {
        "probe off": ["probe.every_n_steps=0"],
        "probe on": [],
        "compile=true": ["compile=true"],
    }
    for way in ways:
        table.add_column(f"{way}, steps/s", justify="right")
    for title, (own, share) in RUNS.items():
        row = []
        for way, extra in ways.items():
            if way == "compile=true" and UNET[0] in own:  # which is for small nets
                continue
            short, seconds = 250 // share + 2, []
            # The first fills the compile cache.
            for count in (short, short, short + steps // share):
                with tempfile.TemporaryDirectory() as folder:
                    place = [f"hydra.run.dir={folder}/run", f"trainer.val_check_interval={count}"]
                    train(*own, *extra, *place, f"trainer.max_steps={count}")
                    result = Path(folder, "run/result.json").read_text("utf-8")
                    seconds.append(json.loads(result)["seconds"])
            pace = (steps // share) / (seconds[2] - seconds[1])
            row.append(f"{pace:,.0f}" if pace >= 100 else f"{pace:.3g}")
            print(f"{title}, {way}: {row[-1]} steps/s", file=sys.stderr)
        table.add_row(title, *row)
    Console(width=100).print(table)


def sweep(steps: int, counts: list[int]) -> None:
    """Runs × steps a second, from the seconds of a long sweep less those of a short one."""
    # The slower, the fewer steps show its pace; what compiles, takes a first sweep for that.
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
                    train("-m", *grid, *extra, f"trainer.max_steps={length}", place)
                    seconds.append(time.perf_counter() - begin)
            row.append(f"{count * longer / (seconds[-1] - seconds[-2]):.0f}")
            print(f"{name}, {count} runs: {row[-1]} run-steps/s", file=sys.stderr)
        table.add_row(name, *row)
    Console(width=100).print(table)


def scaling(steps: int, counts: list[int], figure: Path) -> None:
    """Time and memory of one compiled stack, by the number of its runs; one process and thread."""
    torch.set_num_threads(1)
    schema.register()
    overrides = [*COMMON, "compile=true", "trainer.accelerator=cpu"]
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfgs = [compose("config", [*overrides, f"seed={i}"]) for i in range(max(counts))]
        nodes = loss_nodes(cfgs[0], "dice")

    def seconds(count: int, length: int) -> float:
        options = build.trainer_options(cfgs[0]) | {"max_steps": length}
        with tempfile.TemporaryDirectory() as folder:
            members = []
            for i, cfg in enumerate(cfgs[:count]):
                (run := Path(folder, str(i))).mkdir()
                members.append(make_member(cfg, "dice", run))
            begin = time.process_time()
            fit(members, build.make_losses(nodes), options, **cfgs[0].probe)
            return time.process_time() - begin

    rows = []
    for count in counts:
        seconds(count, 250)  # compiles
        short = seconds(count, 250)
        longer = steps * max(1, 100 // count)  # long beside what tracing the step takes
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
    runs, ms_, _, memories = zip(*rows, strict=True)
    axes = plt.figure(figsize=(8, 3), layout="constrained").subplots(1, 2)
    axes[0].loglog(runs, ms_, "o-", base=2)
    axes[0].set(xlabel="runs in the stack", ylabel="CPU ms a step of all")
    axes[1].semilogx(runs, memories, "o-", base=2)
    axes[1].set(
        xlabel="runs in the stack", ylabel="peak memory of the process, MiB", ylim=(0, None)
    )
    figure.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(figure, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sections = parser.add_subparsers(dest="section", required=True)
    for name, text in (("losses", "losses and gradients against other libraries'"),
                       ("probe", "what watching costs")):  # fmt: skip
        section = sections.add_parser(name, help=text)
        section.add_argument("--rounds", type=int, default=25, help="interleaved rounds")
    section = sections.add_parser("run", help="steps a second of a whole run")
    section.add_argument("--steps", type=int, default=3000)
    section = sections.add_parser("sweep", help="runs x steps a second of each launcher")
    section.add_argument("--steps", type=int, default=1000)
    section.add_argument("--runs", type=int, nargs="+", default=[9, 27, 54, 108])
    section = sections.add_parser("scaling", help="time and memory of a stack by its runs")
    section.add_argument("--steps", type=int, default=500)
    section.add_argument("--runs", type=int, nargs="+", default=[1, 4, 14, 56, 168, 504])
    section.add_argument("--figure", type=Path, default=ROOT / "outputs/article/scaling.png")
    args = parser.parse_args()
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}")
    if args.section == "losses":
        losses(args.rounds)
    elif args.section == "probe":
        probe(args.rounds)
    elif args.section == "run":
        whole_run(args.steps)
    elif args.section == "sweep":
        sweep(args.steps, args.runs)
    else:
        scaling(args.steps, args.runs, args.figure)


if __name__ == "__main__":
    main()
