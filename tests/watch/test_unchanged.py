"""What an observation puts back, and backward passes that are not linear."""

import copy
import random
from collections import deque

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from fits import Plain, Wanted, fit, seen
from oracle import expected, gradients
from small import LOSSES, assert_seen, batch, small
from torch import nn
from torch.utils.checkpoint import checkpoint

from losswatch import Observer, load_loss

# --- State ---------------------------------------------------------------------------------------


class Kept(nn.Module):
    """Keeps the gradients of an activation and of the logits, and learns from them."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        self.hidden = self.first(x).tanh()
        self.hidden.retain_grad()
        self.logits = self.last(self.hidden)
        self.logits.retain_grad()
        return self.logits

    def state(self):
        return [self.hidden.grad, self.logits.grad]


class Method(nn.Module):
    """A checkpointed method updates a buffer, a number and a list in each backward pass."""

    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(3, 2, 1)
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.calls, self.means = 0, []

    def part(self, x):
        self.calls += 1
        self.mean.mul_(0.9).add_(x.detach().mean())
        self.means.append(float(self.mean))
        return self.net(x)

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=False)

    def state(self):
        return [self.mean, torch.tensor(self.calls), torch.tensor(self.means)]


class _Count(torch.autograd.Function):
    """Its backward keeps statistics in a buffer and in its class."""

    passes = 0
    sizes: dict = {}

    @staticmethod
    def forward(ctx, x, kept):
        ctx.kept = kept
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        _Count.passes += 1
        _Count.sizes[_Count.passes] = float(g.abs().sum())
        ctx.kept.mul_(0.5).add_(g.abs().sum())
        return g, None


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(3, 2, 1)
        self.register_buffer("kept", torch.zeros((), dtype=torch.float64))
        _Count.passes, _Count.sizes = 0, {}

    def forward(self, x):
        return _Count.apply(self.net(x), self.kept)

    def state(self):
        return [self.kept, torch.tensor(_Count.passes), torch.tensor([*_Count.sizes.values()])]


class Stateful(nn.Module):
    """A loss that keeps state of each kind, outside of buffers."""

    def __init__(self):
        super().__init__()
        self.calls, self.values, self.newest = 0, [], deque(maxlen=2)
        self.by_step, self.array = {"first": None}, np.zeros(2)
        self.tensor = torch.zeros(2)
        self.random, self.numpy = random.Random(0), np.random.default_rng(0)
        self.torch = torch.Generator().manual_seed(0)

    def forward(self, logits, target):
        self.calls += 1
        self.values.append(self.calls)
        self.newest.append(self.calls)
        self.by_step[self.calls] = self.by_step["first"] = 1
        self.array += 1
        self.tensor += 1
        noise = self.random.random() + self.numpy.random()
        noise += torch.rand((), generator=self.torch)
        return F.cross_entropy(logits, target) * (noise + 1 / self.calls)

    def state(self):
        numbers = [self.calls, *self.values, *self.newest, *self.by_step.values(), *self.array]
        drawn = [self.random.random(), self.numpy.random()]
        return [torch.tensor([*numbers, *drawn]), self.tensor, torch.rand(3, generator=self.torch)]


@pytest.mark.parametrize("given", [lambda net: net, lambda net: net.parameters()])
@pytest.mark.parametrize("make", [Kept, Method, Counting])
def test_a_network_keeps_its_state(make, given):
    states = []
    for watched in (False, True):
        torch.manual_seed(0)
        net = make().double()
        observer = Observer(LOSSES, given(net))
        adam = torch.optim.Adam(net.parameters(), lr=0.1)
        images, target = batch()
        for _ in range(3):
            output = net(images)
            if watched:
                observer(output, target)
            adam.zero_grad()
            F.cross_entropy(output, target).backward()
            if make is Kept:  # it learns from what it kept
                net.last.bias.grad += net.hidden.grad.sum() + net.logits.grad[:, 0].sum()
            adam.step()
        states.append([*net.state_dict().values(), *net.state()])
    assert len(states[0]) == len(states[1])
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b)


def test_a_loss_keeps_its_state():
    """Also where it trains, and is called by the observer once more at each step."""
    states = []
    for watched in (False, True):
        net, loss = small(), Stateful()
        observer = Observer({"mine": loss, "dice": "dice"}, net)
        images, target = batch()
        for _ in range(3):
            output = net(images)
            if watched:
                observer(output, target)
            loss(output, target).backward()
        states.append([*(p.grad for p in net.parameters()), *loss.state()])
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b)


def test_a_loss_that_writes_to_the_target():
    class Writes(nn.Module):
        def forward(self, logits, target):
            target[target > 0] = 0
            return F.cross_entropy(logits, target)

    net = small()
    images, target = batch()
    before = target.clone()
    with pytest.raises(ValueError, match="loss Writes changes the target in place"):
        Observer([Writes()], net)(net(images), target)
    assert torch.equal(target, before)


# --- Parameters ----------------------------------------------------------------------------------


def test_parameters_given_twice_count_once():
    net = small()
    images, target = batch()
    z = net(images)
    twice = Observer(LOSSES, [*net.parameters(), *net[0].parameters()])(z, target)
    assert_seen(twice, expected(map(load_loss, LOSSES), z, target, net.parameters()))


@pytest.mark.parametrize("given", [lambda net: net, lambda net: net.parameters()])
def test_a_layer_replaced_later_counts(given):
    net = small()
    images, target = batch()
    observer = Observer(LOSSES, given(net))
    observer(net(images), target)
    net[0] = nn.Conv2d(3, 4, 3, padding=1).double()
    z = net(images)
    assert_seen(observer(z, target), expected(map(load_loss, LOSSES), z, target, net.parameters()))


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
def test_a_layer_replaced_at_the_start_of_a_training_counts(hook):
    class Replacing(Plain):
        pass

    def replace(self):
        torch.manual_seed(5)
        self.net[0] = nn.Conv2d(3, 4, 3, padding=1).double()

    setattr(Replacing, hook, replace)
    wanted, watch = Wanted(), seen(cosines=True)
    fit(Replacing(small()), wanted, watch)
    np.testing.assert_allclose(watch.table(), wanted.frame(), rtol=1e-9, atol=1e-9)


def test_sparse_gradients():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.last = nn.Embedding(7, 3, sparse=True), nn.Conv2d(3, 2, 1)

        def forward(self, words):
            return self.last(self.words(words).movedim(-1, 1))

    torch.manual_seed(0)
    net, target = Words().double(), batch()[1]
    z = net(torch.randint(0, 7, (2, 8, 8)))
    found = Observer(LOSSES, net)(z, target)
    losses = [load_loss(name) for name in LOSSES]
    wanted = expected(losses, z, target, net.parameters())
    torch.testing.assert_close(found.norms, wanted.norms, rtol=1e-9, atol=1e-9)


class Skips(Plain):
    """Skips a layer in each second batch, so its parameters have no gradient there."""

    def loss(self, batch):
        images, target = batch
        x = self.net[0](images)
        if self.trainer.fit_loop.epoch_loop.batch_idx % 2:
            x = self.net[1](x).relu()
        return self.loss_fn(self.net[3](x), target)


def test_accumulated_batches_that_use_different_layers():
    """The norm is that of the mean gradient, from a copy of the module."""
    norms = []

    class Twice(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            net, (images, target) = copy.deepcopy(module.net), batch
            x = net[0](images)
            x = net[1](x).relu() if batch_idx % 2 else x
            value = load_loss("dice")(net[3](x), target)
            norms.append(gradients([value], net.parameters())[0])

    watch = seen(["cce", "dice", "dice_fg", "dice_square", "dice_monai"])
    fit(Skips(small()), Twice(), watch, accumulate_grad_batches=4, batches=8)
    means = torch.stack(norms).view(2, 4, -1).mean(1).norm(dim=1)
    np.testing.assert_allclose(watch.table(["dice"])[:, 1], means, rtol=1e-9)


# --- Backward passes that are not linear ---------------------------------------------------------


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g / g.norm()


class Normalising(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small()

    def forward(self, x):
        return _Unit.apply(self.net(x))


def clamped_parameters():
    net = small()
    for p in net.parameters():
        p.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    return net


def clamped_activation():
    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.first(x).tanh()
            x.register_hook(lambda g: g.clamp(min=0))
            return self.last(x)

    return Clamped().double()


def pre_hook():
    net = small()
    net[3].register_full_backward_pre_hook(lambda module, g: (g[0] + 0.01,))
    return net


NOT_LINEAR = {
    "parameters": clamped_parameters, "activation": clamped_activation, "pre-hook": pre_hook,
    "function": Normalising,
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_LINEAR)
def test_a_backward_pass_that_is_not_linear(kind, caplog):
    torch.manual_seed(0)
    net = NOT_LINEAR[kind]()
    images, target = batch()
    observer = Observer(LOSSES, net)
    losses = [load_loss(name) for name in LOSSES]
    for _ in range(2):
        z = net(images)
        assert_seen(observer(z, target), expected(losses, z, target, net.parameters()))
    [line] = caplog.messages
    assert "not linear, so each loss gets its own backward pass" in line


def linear_hooks():
    net = small()
    for p in net.parameters():
        p.register_hook(lambda g: 2 * g)
    return net


@pytest.mark.parametrize("make", [small, linear_hooks])
def test_a_linear_one_shares_its_passes(make, caplog, monkeypatch):
    net = make()
    images, target = batch()
    observer = Observer(LOSSES, net)
    observer(net(images), target)
    passes, grad = [], torch.autograd.grad
    monkeypatch.setattr(
        "losswatch.watch.span.torch.autograd.grad",
        lambda *a, **k: passes.append(a) or grad(*a, **k),
    )
    z = net(images)
    found = observer(z, target)
    # Four for all sums over the batch, and one for dice_monai, which sums over single images.
    assert sum(args[0].ndim == 4 for args in passes) == 5 and not caplog.messages
    monkeypatch.undo()
    losses = [load_loss(name) for name in LOSSES]
    assert_seen(found, expected(losses, z, target, net.parameters()))


# --- The training's own gradient -----------------------------------------------------------------


class Louder(Plain):
    """A hook on the loss scales the gradient, at the first step or from the second one on."""

    begin = 0

    def training_step(self, batch, batch_idx):
        value = super().training_step(batch, batch_idx)
        if self.global_step >= self.begin:
            value.register_hook(lambda g: 7 * g)
        return value


class Later(Louder):
    begin = 1


class Hidden(Plain):
    """The same, out of sight."""

    def training_step(self, batch, batch_idx):
        value = super().training_step(batch, batch_idx)
        value.grad_fn.register_prehook(lambda g: (7 * g[0],))
        return value


class Second(Plain):
    def on_before_backward(self, loss):
        sum(p.square().sum() for p in self.net.parameters()).backward()


class Noise(pl.Callback):
    """Changes the gradient before the watch sees it."""

    def on_after_backward(self, trainer, module):
        for p in module.parameters():
            p.grad += 1


@pytest.mark.parametrize("kind", [Plain, Louder, Later, Hidden, Second, "noise"])
@pytest.mark.parametrize("criterion", ["dice", "cross entropy"])
def test_the_trainings_gradient_is_taken_only_where_it_is_right(kind, criterion):
    """`dice` is watched, the cross entropy is not."""
    loss = load_loss("dice") if criterion == "dice" else nn.CrossEntropyLoss()
    module = (Plain if kind == "noise" else kind)(small(), loss)
    wanted, watch = Wanted(), seen(cosines=True)
    fit(module, wanted, *([Noise()] if kind == "noise" else []), watch)
    np.testing.assert_allclose(watch.table(), wanted.frame(), rtol=1e-9, atol=1e-9)
    if criterion != "dice":  # that of PyTorch is the preset cce_stable
        right = Wanted(["cce_stable"])
        module = (Plain if kind == "noise" else kind)(small(), nn.CrossEntropyLoss())
        watch = seen(["dice_fg"])
        fit(module, right, *([Noise()] if kind == "noise" else []), watch)
        table = right.frame()[:, :2]
        if kind is Hidden:  # no code sees this hook: it counts as a part of what trains
            table[:, 1] *= 7
        np.testing.assert_allclose(watch.table(["loss_fn"]), table, rtol=1e-9, atol=1e-9)
