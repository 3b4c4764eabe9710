"""Odd loops, as `test_odd.py` tries them: plain PyTorch, Lightning, MONAI and Ignite."""

from __future__ import annotations

from functools import partial

import odd_networks as nets
import torch
from odd import LOSSES, Odd, Row, plain
from odd_networks import NETWORKS
from odd_trainers import (
    Anyhow,
    Changed,
    Manual,
    Penalty,
    Replaced,
    hook_on_loss,
    ignite,
    lightning,
    module,
    monai,
    seen,
    twice,
)
from torch import nn

from losswatch import load_loss

ADAM, SGD = torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)


# --- Plain PyTorch -------------------------------------------------------------------------------


def accumulated(run):
    optimizer = ADAM(run.net.parameters(), lr=0.01)
    for step in range(4):
        run.note(step)
        output = run.net(run.batch(step)[0])
        run.watch(output, run.batch(step)[1])
        (run.criterion(output, None) / 2).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    run.end(optimizer)


def lbfgs(run):
    optimizer = torch.optim.LBFGS(run.net.parameters(), max_iter=3)
    for step in range(3):
        calls = []

        def closure(step=step, calls=calls):
            images, target = run.batch(step)
            optimizer.zero_grad()
            run.note(step)
            output = run.net(images)
            if not calls:
                run.watch(output, target)
            calls.append(1)
            value = run.criterion(output, target)
            value.backward()
            return value

        optimizer.step(closure)
    run.end(optimizer)


def scaled(run):
    optimizer, scaler = ADAM(run.net.parameters()), torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(3):
        images, target = run.batch(step)
        run.note(step)
        output = run.net(images)
        run.watch(output, target)
        optimizer.zero_grad()
        scaler.scale(run.criterion(output, target)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(run.net.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    run.end(optimizer)


def two_optimizers(run):
    """Each trains a part, and the second one's loss needs another pass."""
    first_one, other = ADAM(run.net[0].parameters()), SGD(run.net[-1].parameters(), lr=0.1)
    for step in range(3):
        images, target = run.batch(step)
        for optimizer, new in ((first_one, True), (other, False)):
            optimizer.zero_grad()
            if new:
                run.note(step)
            output = run.net(images)
            if new:
                run.watch(output, target)
            run.criterion(output, target).backward()
            optimizer.step()
    run.end(first_one)


def sparing(run):
    """Watches one step of two."""
    optimizer = ADAM(run.net.parameters())
    for step in range(4):
        images, target = run.batch(step)
        optimizer.zero_grad()
        if step % 2 == 0:
            run.note(step)
        output = run.net(images)
        if step % 2 == 0:
            run.watch(output, target)
        run.criterion(output, target).backward()
        optimizer.step()
        with torch.no_grad():
            run.net.eval()
            run.net(images)
            run.net.train()
    run.end(optimizer)


def in_the_backward_pass(run):
    """An optimiser of each parameter, which steps as soon as its gradient is there."""
    optimizers = {p: SGD([p], lr=0.1) for p in run.net.parameters()}

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in run.net.parameters():
        p.register_post_accumulate_grad_hook(step)
    plain(run, optimizer=SGD)


def replaced(run):
    """The last layer is replaced after the observer was made."""
    if run.watched:
        run.make_observer()
    torch.manual_seed(5)
    run.net[-1] = nn.Conv2d(4, 2, 1).double()
    plain(run)


def frozen_later(run):
    def freeze(run, output):
        run.net[0].requires_grad_(len(run.snapshots) == 3)

    plain(run, after=freeze)


def late(run):
    """Observes after the backward pass."""
    plain(run, before=lambda run, output: output.sum().backward())


def retained(run, which):
    """An activation, or the output, keeps its gradient, which the loop reads."""

    def before(run, output):
        run.kept = output if which == "output" else run.net.kept
        run.kept.retain_grad()

    plain(run, before=before, after=lambda run, output: run.noted.append(run.kept.grad.clone()))


def keeping(net, x):
    object.__setattr__(net, "kept", net.first(x))
    return net.last(net.kept.relu())


def anomalies(run):
    with torch.autograd.detect_anomaly(check_nan=False):
        plain(run)


def differentiated_again(run):
    def penalty(run, value, output):
        [g] = torch.autograd.grad(value, output, create_graph=True)
        return value + g.square().sum()

    plain(run, change=penalty)


def kept_graph(run):
    def twice(run, value, output):
        value.backward(retain_graph=True)
        return value

    plain(run, change=twice)


def hooked(run):
    def hook(run, value, output):
        value.register_hook(lambda g: 3 * g)
        return value

    plain(run, change=hook)


def called(function):
    return partial(plain, change=function)


def penalised(run, value, output):
    return value + 0.1 * sum(p.square().sum() for p in run.net.parameters())


# --- Lightning -----------------------------------------------------------------------------------


def lit(loss=None, body=None, anyhow=None, net="batch norm", also=None, **options):
    """A row of Lightning."""
    names = ("losses", "shared", "lines", "options", "target", "criterion", "shares")
    row = {name: options.pop(name) for name in names if name in options}
    kind = options.pop("module", None) or (module(loss, **(body or {})))
    if anyhow:
        row["criterion"] = anyhow
    also = {"loss_fn": Odd()} if also is None else also
    net = NETWORKS[net] if isinstance(net, str) else net
    return Row(net, loop=partial(lightning, module=kind, **options), also=also, **row)


def total(change=lambda value: value):
    return {"trained": lambda z, y: change(Odd()(z, y))}


def optimised(optimizer):
    return {"configure_optimizers": lambda self: optimizer(self.parameters())}


OWN = dict(zip("abc", map(load_loss, LOSSES[:3]), strict=True))
OWN_TRUTH = {"a": load_loss("cce"), "b": load_loss("dice"), "c": load_loss("dice_fg")}

LOOPS = {
    "plain: SGD": Row(NETWORKS["batch norm"], loop=partial(plain, optimizer=SGD)),
    "plain: AdamW": Row(NETWORKS["dropout"], loop=partial(plain, optimizer=torch.optim.AdamW)),
    "plain: accumulation": Row(NETWORKS["batch norm"], loop=accumulated),
    "plain: accumulation, a skipped block": Row(
        lambda: nets.Skipping().double(), loop=accumulated
    ),
    "plain: accumulation, two heads": Row(lambda: nets.Skipping(True).double(), loop=accumulated),
    "plain: LBFGS": Row(NETWORKS["plain"], loop=lbfgs),
    "plain: a scaler and clipping": Row(NETWORKS["batch norm"], loop=scaled),
    "plain: two optimisers": Row(NETWORKS["dropout"], loop=two_optimizers),
    "plain: one step of two": Row(NETWORKS["batch norm"], loop=sparing),
    "plain: steps in the backward pass": Row(NETWORKS["plain"], loop=in_the_backward_pass),
    "plain: a layer replaced": Row(NETWORKS["batch norm"], loop=replaced),
    "plain: a layer frozen": Row(
        NETWORKS["batch norm"], loop=frozen_later, steps=1
    ),
    "plain: a regulariser": Row(NETWORKS["batch norm"], loop=called(penalised)),
    "plain: twice the loss": Row(NETWORKS["plain"], loop=called(lambda run, v, o: 2 * v)),
    "plain: a penalty of the gradient": Row(NETWORKS["plain"], loop=differentiated_again),
    "plain: two backward passes": Row(NETWORKS["plain"], loop=kept_graph),
    "plain: a hook on the loss": Row(NETWORKS["plain"], loop=hooked),
    "plain: a gradient of the output read": Row(
        NETWORKS["batch norm"], loop=partial(retained, which="output")
    ),
    "plain: a gradient of an activation read": Row(
        nets.of(keeping), loop=partial(retained, which="activation")
    ),
    "plain: after the backward pass": Row(
        NETWORKS["plain"], loop=late, refused=r"the graph is gone: observe before backward\(\)"
    ),
    "Lightning: automatic": lit(),
    "Lightning: manual": lit(module=Manual),
    "Lightning: SGD": lit(body=optimised(partial(SGD, lr=0.1))),
    "Lightning: dropout": lit(net="dropout"),
    "Lightning: checkpointed method": lit(net="checkpointed method"),
    "Lightning: Function with an attribute": lit(net="Function with an attribute"),
    "Lightning: accumulation": lit(accumulate_grad_batches=2, batches=4),
    "Lightning: accumulation, one batch left": lit(
        accumulate_grad_batches=2, batches=3, shares={1: 0.5}  # Lightning divides by 2 all the same
    ),
    "Lightning: accumulation, a skipped block": lit(
        net=lambda: nets.Skipping().double(), accumulate_grad_batches=2, batches=4
    ),
    "Lightning: accumulation, two heads": lit(
        net=lambda: nets.Skipping(True).double(), accumulate_grad_batches=2, batches=4
    ),
    "Lightning: clipped by norm": lit(gradient_clip_val=0.01),
    "Lightning: clipped by value": lit(
        gradient_clip_val=0.01, gradient_clip_algorithm="value"
    ),
    "Lightning: LBFGS": lit(net="plain", body=optimised(partial(torch.optim.LBFGS, max_iter=3))),
    "Lightning: keywords": lit(
        lambda self, z, y: self.loss_fn(target=y, input=z), anyhow=Anyhow
    ),
    "Lightning: target first": lit(lambda self, z, y: self.loss_fn(y, z), anyhow=Anyhow),
    "Lightning: a third argument": lit(
        lambda self, z, y: self.loss_fn(z, y, torch.ones(2)), anyhow=Anyhow
    ),
    "Lightning: a criterion returns a dict": lit(
        lambda self, z, y: self.loss_fn(z, y)["loss"],
        anyhow=lambda: Anyhow(lambda value: {"loss": value}), also=total(),
    ),
    "Lightning: a criterion returns a vector": lit(
        lambda self, z, y: self.loss_fn(z, y).mean(),
        anyhow=lambda: Anyhow(lambda value: torch.stack([value, 3 * value])),
        also=total(lambda value: 2 * value),
    ),
    "Lightning: a criterion called twice": lit(twice),
    "Lightning: a function": lit(seen, criterion_name=None, also=total()),
    "Lightning: twice the loss": lit(lambda self, z, y: 2 * self.loss_fn(z, y)),
    "Lightning: a regulariser": lit(
        lambda self, z, y: self.loss_fn(z, y) + sum(p.square().sum() for p in self.parameters())
    ),
    "Lightning: a hook on the loss": lit(hook_on_loss),
    "Lightning: two backward passes": lit(callbacks=lambda run: [Penalty()]),
    "Lightning: gradients changed": lit(callbacks=lambda run: [Changed()]),
    "Lightning: hooks on parameters": lit(net="parameter hooks that double"),
    "Lightning: post hooks on parameters": lit(
        net=nets.changed(lambda net: [p.register_post_accumulate_grad_hook(lambda p: None)
                                      for p in net.parameters()])
    ),
    "Lightning: a layer replaced before the fit": lit(
        callbacks=lambda run: [Replaced("on_fit_start")], net="plain"
    ),
    "Lightning: a layer replaced before the first batch": lit(
        callbacks=lambda run: [Replaced("on_train_start")], net="plain"
    ),
    "Lightning: a frozen layer": lit(net="a frozen layer"),
    "Lightning: a watched criterion": lit(losses=OWN, shared="b", also={}),
    "Lightning: a watched criterion, a regulariser": lit(
        lambda self, z, y: self.loss_fn(z, y) + sum(p.square().sum() for p in self.parameters()),
        losses=OWN, shared="b", also={},
    ),
    "Lightning: a watched criterion, halved": lit(
        lambda self, z, y: self.loss_fn(z, y) / 2, losses=OWN, shared="b", also={}
    ),
    "Lightning: a watched criterion, a hook": lit(hook_on_loss, losses=OWN, shared="b", also={}),
    "Lightning: a watched criterion, two backward passes": lit(
        callbacks=lambda run: [Penalty()], losses=OWN, shared="b", also={}
    ),
    "Lightning: a watched criterion, gradients changed": lit(
        callbacks=lambda run: [Changed()], losses=OWN, shared="b", also={}
    ),
    "Lightning: a watched criterion, accumulation": lit(
        accumulate_grad_batches=2, batches=4, losses=OWN, shared="b", also={}
    ),
    "Lightning: a watched criterion of somebody else": lit(
        losses={"mine": Odd(), **OWN}, shared="mine", also={}
    ),
    "Lightning: a watched criterion of somebody else, accumulation": lit(
        losses={"mine": Odd(), **OWN}, shared="mine", also={}, accumulate_grad_batches=2, batches=4
    ),
    "Lightning: a watched criterion of somebody else, a hook": lit(
        hook_on_loss, losses={"mine": Odd(), **OWN}, shared="mine", also={}
    ),
    "MONAI's trainer": Row(NETWORKS["batch norm"], loop=monai, also={"Odd_2": Odd()}),
    "MONAI's trainer, dropout": Row(NETWORKS["dropout"], loop=monai, also={"Odd_2": Odd()}),
    "MONAI's trainer, run twice": Row(
        NETWORKS["batch norm"], loop=partial(monai, runs=2), also={"Odd_2": Odd()}
    ),
    "Ignite": Row(NETWORKS["batch norm"], loop=ignite),
    "Ignite, run twice": Row(NETWORKS["dropout"], loop=partial(ignite, runs=2)),
}  # fmt: skip
for row in LOOPS.values():
    if row.losses is OWN or isinstance(row.losses, dict):
        row.truth |= OWN_TRUTH
