"""Odd networks and losses, as `test_odd.py` tries them. Each network is made anew, from a seed."""

from __future__ import annotations

import copy
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


def chain(*layers, last=4, channels=2, first=None):
    """A small network with layers of another kind inside."""
    first = first or nn.Conv2d(1, 4, 3, padding=1)
    return nn.Sequential(first, *layers, nn.Conv2d(last, channels, 1)).double()


def of(forward, channels=2, state=lambda net: None):
    """A network (first, last) with a forward pass of its own; `forward(net, x)`."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, channels, 1)
            state(self)

        def forward(self, x):
            return forward(self, x)

    return lambda: Net().double()


def changed(change, *layers, **options):
    """A network that was changed after it was made."""

    def make():
        net = chain(*(copy.deepcopy(layers) or (nn.ReLU(),)), **options)
        change(net)
        return net

    return make


class Statistics:
    """A forward pass that counts, checkpointed or not."""

    @staticmethod
    def prepare(net):
        net.register_buffer("mean", torch.zeros(()))
        net.total, net.log = 0.0, []

    @staticmethod
    def update(net, h):
        with torch.no_grad():
            net.mean.mul_(0.9).add_(0.1 * h.mean())
        net.total += float(h.detach().sum())
        net.log.append(h.shape)
        return h.relu()


def checkpointed_method(net, x):
    h = net.first(x)
    return net.last(checkpoint(lambda h: Statistics.update(net, h), h, use_reentrant=False))


def function(name, backward, forward=lambda x: x.clone()):
    """An autograd.Function; `backward(g)`."""
    body = {
        "forward": staticmethod(lambda ctx, x: forward(x)),
        "backward": staticmethod(lambda ctx, g: backward(g)),
        "count": 0, "norms": torch.zeros(1), "__module__": __name__,
    }  # fmt: skip
    return type(name, (torch.autograd.Function,), body)


def counting(keep):
    """A network with a Function whose backward pass keeps something."""

    def make():
        def backward(g):
            keep(net, kind, g)
            return g * 0.5

        kind = function("Counting", backward)
        net = of(lambda net, x: net.last(kind.apply(net.first(x))), state=Statistics.prepare)()
        net.kind = kind
        return net

    return make


def keep_buffer(net, kind, g):
    net.mean += g.norm()


def keep_attribute(net, kind, g):
    net.total += float(g.norm())
    net.log.append(1)


def keep_class_attribute(net, kind, g):
    kind.count += 1
    kind.norms += g.norm().float()


def with_function(backward):
    kind = function("Changing", backward)
    return of(lambda net, x: net.last(kind.apply(net.first(x)).relu()))


def normalised(g):
    return g / g.norm().clamp_min(1e-12)


def activation_hook(hook):
    def forward(net, x):
        h = net.first(x)
        h.register_hook(hook)
        return net.last(h.relu())

    return of(forward)


def parameter_hook(hook):
    return changed(lambda net: [p.register_hook(hook) for p in net.parameters()])


def noisy(net, x):
    """Draws from each of the generators that a training has."""
    noise = random.random() + float(np.random.rand()) + net.own.random()
    shift = torch.rand((), generator=net.generator).to(x)
    return net.last(F.dropout(net.first(x), 0.3, net.training) + 0 * (noise + shift))


def own_generators(net):
    net.generator, net.own = torch.Generator().manual_seed(3), random.Random(3)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.last = kind(1, 4, batch_first=True, bidirectional=True), nn.Linear(8, 2)

    def forward(self, x):  # [N, 1, L] -> [N, 2, L]
        return self.last(self.cell(x.movedim(1, -1))[0]).movedim(-1, 1)


class Embedded(nn.Module):
    """Looks values of its images up in a table."""

    def __init__(self, sparse):
        super().__init__()
        self.table, self.last = nn.Embedding(10, 4, sparse=sparse), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        index = (x[:, 0] * 2 + 5).long().clamp(0, 9)
        return self.last(self.table(index).movedim(-1, 1))


class Waves(nn.Module):
    def __init__(self):
        super().__init__()
        self.phase = nn.Parameter(torch.tensor([0.5 + 0.2j, -0.3 + 1j], dtype=torch.complex128))
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x):
        waves = self.phase.view(1, 2, 1, 1) * x.to(self.phase.dtype)
        return self.scale * waves.abs() + waves.real


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(1, 4), nn.Linear(4, 2)
        self.middle = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        tokens = self.first(x.flatten(2).transpose(1, 2))
        tokens = self.middle(tokens, tokens, tokens, need_weights=False)[0]
        return self.last(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class Skipping(nn.Module):
    """Skips a block in every other call, or uses another head."""

    def __init__(self, heads=False):
        super().__init__()
        self.first, self.block = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.last, self.other = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 3, padding=1)
        self.heads = heads
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        odd = bool(self.calls % 2)
        self.calls += 1
        h = self.first(x).relu()
        h = h if odd else self.block(h)
        return self.other(h) if odd and self.heads else self.last(h)


class Heads(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.a, self.b, self.form = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1), form

    def forward(self, x):
        h = self.first(x).relu()
        a, b = self.a(h), self.b(h)
        if self.form == "half":
            return [a, F.avg_pool2d(b, 2)]
        return {"list": [a, b], "tuple": (a, b), "dict": {"out": a, "aux": b}}[self.form]


NETWORKS = {
    "plain": lambda: chain(nn.ReLU()),
    "linear": lambda: chain(),
    "one layer": lambda: nn.Sequential(nn.Conv2d(1, 2, 1)).double(),
    "batch norm": lambda: chain(nn.BatchNorm2d(4), nn.ReLU()),
    "batch norm without a memory": lambda: chain(nn.BatchNorm2d(4, track_running_stats=False)),
    "batch norm in eval": changed(lambda net: net[1].eval(), nn.BatchNorm2d(4), nn.ReLU()),
    "cumulative batch norm": lambda: chain(nn.BatchNorm2d(4, momentum=None), nn.ReLU()),
    "group norm": lambda: chain(nn.GroupNorm(2, 4), nn.ReLU()),
    "instance norm": lambda: chain(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
    "dropout": lambda: chain(nn.Dropout(0.3), nn.ReLU()),
    "dropout of channels": lambda: chain(nn.Dropout2d(0.3), nn.ReLU()),
    "alpha dropout": lambda: chain(nn.SELU(), nn.AlphaDropout(0.3)),
    "random slopes": lambda: chain(nn.RReLU()),
    "in-place ReLU": lambda: chain(nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
    "PReLU": lambda: chain(nn.PReLU()),
    "strided and transposed": lambda: chain(
        nn.Conv2d(4, 4, 2, 2), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, 2)
    ),
    "pooled and upsampled": lambda: chain(nn.MaxPool2d(2), nn.Upsample(scale_factor=2.0)),
    "bilinear": lambda: chain(nn.AvgPool2d(2), nn.UpsamplingBilinear2d(scale_factor=2)),
    "pixel shuffle": lambda: chain(nn.Conv2d(4, 16, 2, 2), nn.PixelShuffle(2)),
    "dilated groups": lambda: chain(nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2)),
    "a layer used twice": of(lambda net, x: net.last(net.first(net.first(x).mean(1, True)).relu())),
    "tied weights": of(
        lambda net, x: net.last(F.conv_transpose2d(net.last(net.first(x)), net.last.weight))
    ),
    "unused layers": of(
        lambda net, x: net.last(net.first(x)),
        state=lambda net: setattr(net, "other", nn.Linear(3, 3)),
    ),
    "a frozen layer": changed(lambda net: net[0].requires_grad_(False)),
    "a frozen last layer": changed(lambda net: net[-1].requires_grad_(False)),
    "only a bias trained": changed(
        lambda net: [p.requires_grad_(False) for p in list(net.parameters())[:-1]]
    ),
    "an empty parameter": of(
        lambda net, x: net.last(net.first(x)) + net.none.sum(),
        state=lambda net: setattr(net, "none", nn.Parameter(torch.zeros(0))),
    ),
    "complex weights": Waves,
    "embedding": lambda: Embedded(False).double(),
    "attention": lambda: Attention().double(),
    "weight norm": lambda: chain(parametrizations.weight_norm(nn.Conv2d(4, 4, 1))),
    "spectral norm": lambda: chain(parametrizations.spectral_norm(nn.Conv2d(4, 4, 1))),
    "lazy": lambda: materialised(chain(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d())),
    "traced": lambda: torch.jit.trace(chain(nn.ReLU()), torch.zeros(2, 1, 8, 8).double()),
    "data parallel": lambda: nn.DataParallel(chain(nn.ReLU())),
    "stop of the gradient": of(lambda net, x: net.last(net.first(x) + net.first(x).detach())),
    "zero weights": changed(lambda net: nn.init.zeros_(net[-1].weight)),
    "a scalar parameter": of(
        lambda net, x: net.scale * net.last(net.first(x)),
        state=lambda net: setattr(net, "scale", nn.Parameter(torch.tensor(2.0))),
    ),
    "double inside float": of(
        lambda net, x: net.last(net.cast(x.float()).double()),
        state=lambda net: setattr(net, "cast", Cast()),
    ),
    "draws from five generators": of(noisy, state=own_generators),
    "statistics in forward": of(
        lambda net, x: net.last(Statistics.update(net, net.first(x))), state=Statistics.prepare
    ),
    "checkpointed layers": of(
        lambda net, x: net.last(checkpoint(net.middle, net.first(x), use_reentrant=False)),
        state=lambda net: setattr(
            net, "middle", nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Conv2d(4, 4, 1))
        ),
    ),
    "checkpointed whole": of(
        lambda net, x: checkpoint(lambda x: net.last(net.first(x)), x, use_reentrant=False)
    ),
    "checkpointed sequence": of(
        lambda net, x: net.last(checkpoint_sequential(net.m, 2, net.first(x), use_reentrant=False)),
        state=lambda net: setattr(net, "m", nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.3))),
    ),
    "checkpointed method": of(checkpointed_method, state=Statistics.prepare),
    "Function that halves": with_function(lambda g: 0.5 * g),
    "Function that reverses": with_function(lambda g: -g),
    "Function that rounds": of(
        lambda net, x: net.last(
            function("Round", lambda g: g, lambda x: (8 * x).round() / 8).apply(net.first(x))
        )
    ),
    "Function with a buffer": counting(keep_buffer),
    "Function with an attribute": counting(keep_attribute),
    "Function with a class attribute": counting(keep_class_attribute),
    "parameter hooks that look": parameter_hook(lambda g: None),
    "parameter hooks that double": parameter_hook(lambda g: 2 * g),
    "activation hook that looks": activation_hook(lambda g: None),
    "activation hook that doubles": activation_hook(lambda g: 2 * g),
    "backward hook that looks": changed(
        lambda net: net[1].register_full_backward_hook(lambda m, i, o: None)
    ),
    "backward hook that halves": changed(
        lambda net: net[1].register_full_backward_hook(lambda m, i, o: (0.5 * i[0],))
    ),
    "backward pre-hook that halves": changed(
        lambda net: net[1].register_full_backward_pre_hook(lambda m, o: (0.5 * o[0],))
    ),
    "forward hook": changed(
        lambda net: net[1].register_forward_hook(lambda m, args, out: out * 1.5)
    ),
    "forward pre-hook": changed(
        lambda net: net[0].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    ),
    "output is a view": of(lambda net, x: torch.cat([net.last(net.first(x))] * 2, 1)[:, 1:3]),
    "output is not contiguous": of(
        lambda net, x: net.last(net.first(x)).transpose(2, 3).contiguous().transpose(2, 3)
    ),
    "output is expanded": of(
        lambda net, x: net.last(net.first(x)).mean((2, 3), True).expand(-1, -1, *x.shape[2:])
    ),
    "output is unbound": of(lambda net, x: torch.stack([net.last(net.first(x))] * 2).unbind()[1]),
    "output is normalised": of(lambda net, x: net.last(net.first(x)).log_softmax(1)),
    "output is changed in place": of(lambda net, x: net.last(net.first(x)).mul_(2).add_(1)),
    "channels last": lambda: chain(nn.ReLU()).to(memory_format=torch.channels_last),
}

# Their backward pass is not linear: each loss gets a pass of its own, and a line says so.
NOT_LINEAR = {
    "parameter hooks that clamp": parameter_hook(lambda g: g.clamp(-1e-3, 1e-3)),
    "parameter hooks that clamp what is large": parameter_hook(lambda g: g.clamp(-0.3, 0.3)),
    "parameter hooks that normalise": parameter_hook(normalised),
    "parameter hooks that take the sign": parameter_hook(torch.sign),
    "parameter hooks that add": parameter_hook(lambda g: g + 0.01),
    "activation hook that clamps": activation_hook(lambda g: g.clamp(-1e-4, 1e-4)),
    "activation hook that drops one sign": activation_hook(lambda g: g.clamp_min(0)),
    "backward hook that normalises": changed(
        lambda net: net[1].register_full_backward_hook(lambda m, i, o: (normalised(i[0]),))
    ),
    "backward pre-hook that clamps": changed(
        lambda net: net[1].register_full_backward_pre_hook(lambda m, o: (o[0].clamp(-1e-4, 1e-4),))
    ),
    "Function that normalises": with_function(normalised),
    "Function that clamps": with_function(lambda g: g.clamp(-1e-4, 1e-4)),
    "Function that squares": with_function(lambda g: g.square()),
}


class Cast(nn.Module):
    """Stays in float32 whatever the network becomes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 1)

    def _apply(self, fn, recurse=True):
        return self

    def forward(self, x):
        return self.conv(x)


def materialised(net):
    net(torch.zeros(2, 1, 8, 8, dtype=torch.float64))
    return net


# --- Losses of somebody else ---------------------------------------------------------------------


class Doing(nn.Module):
    """A loss that does something; `do(self, output, target)`, and from which call on."""

    def __init__(self, do, since=0):
        super().__init__()
        self.do, self.since, self.calls = do, since, 0

    def forward(self, output, target):
        self.calls += 1
        if self.calls > self.since:
            return self.do(self, output, target)
        return output.square().mean()


def inner(output):
    """A backward pass of its own."""
    leaf = output.detach().requires_grad_()
    leaf.square().sum().backward()
    return leaf.grad.sum()
