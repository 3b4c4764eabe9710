"""What `test_odd.py` tries: one row of its table, the loops that train, and the true numbers."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from oracle import gradients
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn

from losswatch import LossSet, Observer

LOSSES = ["cce", "dice", "dice_fg", "dice_square", "dice_fg_square"]
EPS = 1e-7  # of these presets


class Odd(nn.Module):
    """A loss of somebody else, for any output and target."""

    def forward(self, output, target):
        return (output.square() * output.sigmoid()).mean()


@dataclass
class Row:
    """A training: a network, what it gets, how it is watched, and what is expected.

    Numbers are right unless `refused` or `nan` says otherwise.
    """

    net: Callable[[], nn.Module]
    losses: Any = field(default_factory=lambda: [*LOSSES, Odd()])
    options: dict = field(default_factory=dict)  # of the observer
    classes: int = 2
    size: tuple[int, ...] = (8, 8)
    batch: int = 2
    dtype: torch.dtype = torch.float64
    target: Callable[[Tensor], Any] = lambda index: index  # what the training has
    bad: Callable[[Tensor], Any] | None = None  # the same in the second step
    labels: Callable[[Tensor], Tensor] | None = None  # what it means; None: class indices
    ignored: Callable[[Tensor], Tensor] | None = None
    given: Callable[[nn.Module], Any] = lambda net: net  # to the observer
    trained: Callable[[nn.Module], Any] = lambda net: net.parameters()
    truth: dict[str, Callable] = field(default_factory=dict)  # of losses that are not called
    also: dict[str, Callable] = field(default_factory=dict)  # what is recorded further
    criterion: Callable[[], nn.Module] = Odd  # it trains
    shared: str | None = None  # the watched loss that trains, instead
    loop: Callable[[Run], None] | None = None  # None: plain PyTorch
    steps: int = 0  # 0: two, or three if the second target is bad
    refused: str | None = None  # the line at the first observation
    lines: tuple[str, ...] = ()  # all that is said
    nan: dict[int, tuple[str, ...]] = field(default_factory=dict)  # of a step
    shares: dict[int, float] = field(default_factory=dict)  # of a step's gradient, unless it is 1
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        self.steps = self.steps or (3 if self.bad else 2)

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Images and class indices of a step."""
        g = torch.Generator().manual_seed(step)
        images = torch.randn(self.batch, 1, *self.size, generator=g, dtype=torch.float64)
        index = torch.randint(0, self.classes, (self.batch, *self.size), generator=g)
        return images.to(self.dtype), index

    def target_of(self, step: int) -> Any:
        make = self.bad if self.bad and step == 1 else self.target
        return make(self.draw(step)[1])

    def names(self) -> list[str]:
        if isinstance(self.losses, LossSet):
            return list(self.losses.names)
        pairs = self.losses.items() if isinstance(self.losses, dict) else enumerate(self.losses)
        found: list[str] = []
        for key, loss in pairs:
            name = loss if isinstance(loss, str) else type(loss).__name__
            name = key if isinstance(key, str) else name
            number = sum(x.rstrip("_0123456789") == name for x in found)
            found.append(name if name not in found else f"{name}_{number + 1}")
        return found


class Run:
    """One training by a row, watched or not."""

    def __init__(self, row: Row, watched: bool) -> None:
        torch.manual_seed(0)
        self.row, self.watched = row, watched
        self.net = row.net()
        self.criterion = row.criterion()
        self.losses = copy.deepcopy(row.losses)
        if row.shared:
            self.criterion = self.losses[row.shared]
        self.snapshots: list[tuple] = []
        self.seen: list[tuple] = []  # names, values, norms, cosines
        self.states: list[Tensor] = []
        self.noted: list[Tensor] = []  # what the loop saw
        self.observer: Observer | None = None
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    def batch(self, step: int) -> tuple[Tensor, Any]:
        return self.row.draw(step)[0], self.row.target_of(step)

    def note(self, step: int, new: bool = True) -> None:
        """Before a forward pass; `new`: of another observation than the last one."""
        if self.snapshots and self.snapshots[-1][-1][2] == step:  # as in LBFGS
            return
        if new:
            self.snapshots.append([])
        state = copy.deepcopy(self.net.state_dict())
        self.snapshots[-1].append((state, torch.get_rng_state(), step))

    def make_observer(self) -> None:
        self.observer = Observer(self.losses, self.row.given(self.net), **self.row.options)

    def watch(self, output: Any, target: Any) -> None:
        if not self.watched:
            return
        if self.observer is None:
            self.make_observer()
        self.seen.append(tuple(self.observer(output, target)))

    def end(self, optimizer: torch.optim.Optimizer) -> None:
        moments = [
            torch.as_tensor(v).detach()
            for s in optimizer.state_dict()["state"].values()
            for v in s.values()
            if isinstance(v, Tensor | float | int)
        ]
        drawn = torch.tensor([random.random(), np.random.rand()]), torch.rand(2)
        weights = [v.detach() for v in self.net.state_dict().values()]
        self.states = [*weights, *moments, *drawn, *own_numbers(self.net), *self.noted]


def own_numbers(net: nn.Module) -> list[Tensor]:
    """What modules, and classes of autograd.Function among their attributes, keep by themselves."""
    found = []
    for module in net.modules():
        if isinstance(kind := vars(module).get("kind"), type):
            found += [torch.tensor(kind.count), kind.norms]
        kept = [vars(module).get("total"), len(vars(module).get("log", []))]
        found += [torch.tensor(x) for x in kept if x is not None]
        if "generator" in vars(module):
            found += [module.generator.get_state(), torch.tensor(module.own.random())]
    return found


def modules(losses: Any) -> list[Any]:
    losses = losses.losses if isinstance(losses, LossSet) else losses
    return list(losses.values() if isinstance(losses, dict) else losses)


def state_of(losses: Any) -> list[str]:
    """What losses keep: their buffers and attributes, as text."""
    found = [x for x in modules(losses) if isinstance(x, nn.Module)]
    own = [{k: v for k, v in vars(x).items() if not k.startswith("_")} for x in found]
    return [*(repr(x.state_dict()) for x in found), *map(repr, own)]


def train(row: Row, watched: bool) -> Run:
    run = Run(row, watched)
    before = state_of(run.losses)
    (row.loop or plain)(run)
    assert len(run.snapshots) > 0 and run.states
    assert row.shared or before == state_of(run.losses)  # of losses that are only watched
    return run


# --- The true numbers ----------------------------------------------------------------------------


def first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def by_hand(row: Row, output: Tensor, index: Tensor) -> dict[str, Tensor]:
    """The presets of LOSSES, written out."""
    activation, several = row.options.get("activation", "softmax"), output.shape[1] > 1
    output = output if output.dtype == torch.float64 else output.float()
    p = {"softmax": lambda z: z.softmax(1), "sigmoid": torch.sigmoid, "none": lambda z: z}
    p = p[activation](output)
    p = p if several else torch.cat([1 - p, p], 1)
    y = one_hot(index, p.shape[1]).to(p) if row.labels is None else row.labels(index).to(p)
    overlap = several and activation == "sigmoid"
    keep = torch.ones_like(p if overlap else p[:, :1])
    if row.ignored is not None:
        keep = keep * (~row.ignored(index)).to(p)
    # Logarithms of the clipped probability, as `cce` has them; where nothing counts all is 0.
    log = p.clamp(1e-7, 1 - 1e-7).log()
    likelihood = y * log
    if overlap:
        likelihood = likelihood + (1 - y) * (1 - p).clamp(1e-7, 1 - 1e-7).log()
    found = {"cce": -(keep * likelihood).sum() / keep.sum().clamp_min(1e-20)}
    axes = [0, *range(2, p.ndim)]
    for suffix, power in (("", 1), ("_square", 2)):
        product = (keep * y * p).sum(axes)
        both = (keep * y**power).sum(axes) + (keep * p**power).sum(axes)
        dice = 1 - (2 * product + EPS) / (both + EPS)
        found |= {f"dice{suffix}": dice.mean(), f"dice_fg{suffix}": dice[1:].mean()}
    if not p.numel():
        found = {name: 0 * output.sum() for name in found}
    return found


def one_hot(index: Tensor, classes: int) -> Tensor:
    return F.one_hot(index, classes).movedim(-1, 1)


def true_numbers(row: Row, snapshot: list, wanted: list) -> tuple[Tensor, Tensor]:
    """Values [K] and gradients [K, P], by a backward pass of a fresh network for each loss.

    Args:
        snapshot: of each batch the network's state, that of the random numbers, and its step.
        wanted: names of losses, each with the number of its head.
    """
    torch.manual_seed(0)
    net = row.net()
    losses = dict(zip(row.names(), modules(row.losses), strict=True))
    values = sums = 0
    for state, rng, step in snapshot:
        net.load_state_dict(state)
        images, index = row.draw(step)
        torch.set_rng_state(rng)
        outputs, target = net(images), row.target_of(step)
        trained = list({id(p): p for p in row.trained(net) if p.requires_grad}.values())
        presets: dict[int | None, dict[str, Tensor]] = {}
        found = []
        for name, head in wanted:
            output, label = first(outputs), target
            if head is not None:
                output = list(outputs.values() if isinstance(outputs, dict) else outputs)[head]
                label = target[head] if isinstance(target, list) else target
            if loss := (row.truth | row.also).get(name):
                value = loss(output, label)
            elif name in LOSSES:
                presets[head] = presets.get(head) or by_hand(row, output, index)
                value = presets[head][name]
            else:
                value = copy.deepcopy(losses[name])(output, copy.deepcopy(label))
            value = value.reshape(())
            found.append((value.detach().double(), gradients([value], trained)[0].double()))
        of_step = [torch.stack(x) / len(snapshot) for x in zip(*found, strict=True)]
        values, sums = values + of_step[0], sums + of_step[1]
    return values, sums


def assert_right(row: Row, run: Run) -> None:
    """All that was seen are the true numbers."""
    assert len(run.seen) == len(run.snapshots)
    for step, (seen, snapshot) in enumerate(zip(run.seen, run.snapshots, strict=True)):
        names = [(n, None) for n in row.names()]
        if row.options.get("heads") == "all":
            heads = len(seen[0]) // len(names)
            names = [(n, h) for h in range(heads) for n, _ in names]
        wanted = [n if h is None else f"{n}.{h}" for n, h in names]
        names += [(n, None) for n in row.also]
        wanted += row.also
        assert list(seen[0]) == wanted
        with isolate_rng():
            values, g = true_numbers(row, snapshot, names)
        ill = torch.tensor([n in row.nan.get(step, ()) for n, _ in names])
        values, g = torch.where(ill, torch.nan, values), row.shares.get(step, 1) * g
        norms = torch.where(ill, torch.nan, g.norm(dim=1))
        cosines = (g @ g.T) / norms.outer(norms)
        found = [x.double() for x in seen[1:]]
        close = {"rtol": row.tolerance, "atol": row.tolerance * 1e-3, "equal_nan": True}
        for what, a, b in zip(("values", "norms"), found, (values, norms), strict=False):
            torch.testing.assert_close(
                a, b, **close, msg=lambda m, w=f"{what} at {step}": f"{w}: {m}"
            )
        clear = (norms > 1e-9).logical_and(norms.isfinite())
        clear = clear.outer(clear)
        torch.testing.assert_close(
            found[2][clear], cosines[clear], rtol=row.tolerance, atol=row.tolerance,
            msg=lambda m, w=f"cosines at {step}": f"{w}: {m}",
        )  # fmt: skip


# --- The loop ---------------------------------------------------------------------------------


def plain(
    run: Run,
    optimizer=torch.optim.Adam,
    change=lambda run, value, output: value,
    before=lambda run, output: None,
    after=lambda run, output: None,
) -> None:
    """Plain PyTorch. Before the observation, between loss and backward pass, and after it."""
    optimizer = optimizer([p for p in run.net.parameters()], lr=0.01)
    for step in range(run.row.steps):
        images, target = run.batch(step)
        optimizer.zero_grad()
        run.note(step)
        output = run.net(images)
        before(run, output)
        run.watch(output, target)
        value = run.criterion(first(output), target)
        change(run, value, output).backward()
        after(run, output)
        optimizer.step()
    run.end(optimizer)
