"""Losses, networks and optimisers of other people; a config names them as `foreign.MyDice`."""

import builtins
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from packaging.version import Version
from torch import nn

from losswatch.losses import CrossEntropy, Dice, OneHotTarget, Sum

# --- Losses --------------------------------------------------------------------------------------


class MyDice(Dice):
    def forward(self, logits, target):
        return 3 * super().forward(logits, target) + 1


class MyEntropy(CrossEntropy):
    def forward(self, logits, target):
        return super().forward(logits, target).square()


class MySum(Sum):
    def forward(self, logits, target):
        return 0.5 * super().forward(logits, target)


def hooked():
    loss = Dice()
    loss.register_forward_hook(lambda module, args, value: 2 * value)
    return loss


class _Old(torch.autograd.Function):
    """In the old style, which torch.func does not take, with numpy inside."""

    @staticmethod
    def forward(ctx, p, y):
        ctx.save_for_backward(p, y)
        return p.new_tensor(np.square(p.detach().numpy() - y.numpy()).mean())

    @staticmethod
    def backward(ctx, g):
        p, y = ctx.saved_tensors
        return g * 2 * (p - y) / p.numel(), None


class OldStyle(nn.Module):
    def forward(self, logits, target):
        p = logits.softmax(1)
        return _Old.apply(p, nn.functional.one_hot(target, p.shape[1]).movedim(-1, 1).to(p))


class Annealed(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, logits, target):
        self.calls += 1
        return nn.functional.cross_entropy(logits, target) / self.calls


class Learned(nn.Module):
    """Learns a temperature."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, logits, target):
        return nn.functional.cross_entropy(logits / self.temperature, target)


class Noisy(nn.Module):
    def forward(self, logits, target):
        noise = torch.rand(logits.shape, dtype=torch.float32) + float(np.random.rand())
        return nn.functional.cross_entropy(logits + noise.to(logits), target)


@functools.cache
def smp_losses():
    """smp's losses, imported without the rest of the package, which needs torchvision."""
    spec = importlib.util.find_spec("segmentation_models_pytorch")
    if spec is None:
        pytest.skip("segmentation_models_pytorch is not installed")
    package = types.ModuleType(spec.name)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[spec.name] = package
    return importlib.import_module(f"{spec.name}.losses")


def monai(name, **options):
    import monai.losses

    return OneHotTarget(getattr(monai.losses, name)(**options))


def old_kornia():
    """kornia 0.8, the newest for Python 3.10, looks at values in its focal loss."""
    return Version(importlib.metadata.version("kornia")) < Version("0.9")


def kornia(name, *args, **options):
    return getattr(pytest.importorskip("kornia.losses"), name)(*args, **options)


# The reason for losses that look at values, or make tensors whose shape depends on values.
MAPPED = "^torch.func cannot map them over runs: RuntimeError: vmap: "

# How a loss is made, and the reason if it needs the ordinary step.
LOSSES = {
    "subclass of Dice": (MyDice, None),
    "subclass of CrossEntropy": (MyEntropy, None),
    "subclass of Sum": (lambda: MySum([Dice(), CrossEntropy()]), None),
    "sum with a foreign part": (lambda: Sum([Dice(), nn.CrossEntropyLoss()], [1, 2]), None),
    "sum of a subclass": (lambda: Sum([MyDice(), CrossEntropy()]), None),
    "hooked": (hooked, None),
    "old-style Function, numpy": (OldStyle, MAPPED),
    "state": (Annealed, "loss it keeps a state of its own"),
    "parameters": (Learned, "loss it has parameters of its own to train"),
    "random": (Noisy, "loss it draws random numbers"),
    "torch": (lambda: nn.CrossEntropyLoss(torch.tensor([1.0, 3.0])), None),
    "monai Dice": (lambda: monai("DiceLoss", softmax=True), None),
    "monai DiceCE": (lambda: monai("DiceCELoss", softmax=True), None),
    "monai DiceFocal": (lambda: monai("DiceFocalLoss", softmax=True), None),
    "monai Tversky": (lambda: monai("TverskyLoss", softmax=True), None),
    "monai GeneralizedDice": (lambda: monai("GeneralizedDiceLoss", softmax=True), MAPPED),
    "monai HausdorffDT": (lambda: monai("HausdorffDTLoss", softmax=True), "torch.func cannot map"),
    "kornia Dice": (lambda: kornia("DiceLoss"), MAPPED),
    "kornia Focal": (
        lambda: kornia("FocalLoss", 0.5, reduction="mean"),
        MAPPED if old_kornia() else None,
    ),
    "kornia Tversky": (lambda: kornia("TverskyLoss", 0.3, 0.7), MAPPED),
    "kornia Lovasz": (lambda: kornia("LovaszSoftmaxLoss"), MAPPED),
    "smp Dice": (lambda: smp_losses().DiceLoss("multiclass"), MAPPED),
    "smp Jaccard": (lambda: smp_losses().JaccardLoss("multiclass"), MAPPED),
    "smp Focal": (lambda: smp_losses().FocalLoss("multiclass"), None),
}


# --- Networks ------------------------------------------------------------------------------------


class Shared(nn.Module):
    """Uses one layer twice."""

    def __init__(self, *_, **__):
        super().__init__()
        self.first, self.twice = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        x = self.twice(self.first(x).relu()).relu()
        return self.head(self.twice(x).relu())


class Tied(Shared):
    """Has one parameter under two names."""

    def __init__(self, *_, **__):
        super().__init__()
        self.again = nn.Conv2d(3, 3, 3, padding=1)
        self.again.weight = self.twice.weight

    def forward(self, x):
        return self.head(self.again(self.twice(self.first(x).relu()).relu()))


class Frozen(Shared):
    def __init__(self, *_, **__):
        super().__init__()
        self.first.requires_grad_(False)


class Complex(nn.Module):
    def __init__(self, *_, **__):
        super().__init__()
        self.phase = nn.Parameter(torch.tensor([0.5 + 0.2j, -0.3 + 1j], dtype=torch.complex128))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        waves = self.phase.view(1, 2, 1, 1) * x.to(self.phase.dtype)
        return self.scale * waves.abs() + waves.real


class Dropped(Shared):
    def forward(self, x):
        x = nn.functional.dropout(self.first(x).relu(), 0.5, self.training)
        return self.head(self.twice(x))


# How a network is made, and the reason if it needs the ordinary step.
NETS = {
    "shared layer": (Shared, None),
    "tied weights": (Tied, "the network shares a parameter between layers"),
    "frozen": (Frozen, None),
    "complex": (Complex, "the network has complex parameters"),
    "dropout": (Dropped, "the network draws random numbers"),
}


# --- Losses, networks and an optimiser that are refused, and a loss that raises an error ---------


class Detached(nn.Module):
    def forward(self, logits, target):
        return nn.functional.cross_entropy(logits.detach(), target)


class Constant(nn.Module):
    def forward(self, logits, target):
        return torch.tensor(1.0)


class Whole(nn.Module):
    def forward(self, logits, target):
        return (logits.argmax(1) != target).sum()


class Vector(nn.Module):
    def forward(self, logits, target):
        return nn.functional.cross_entropy(logits, target, reduction="none")


class InPlace(nn.Module):
    def forward(self, logits, target):
        return nn.functional.cross_entropy(logits.mul_(2), target)


class InPlaceTarget(nn.Module):
    def forward(self, logits, target):
        return nn.functional.cross_entropy(logits, target.zero_())


class Forgetful(nn.Module):
    """Counts its calls in an attribute, which no checkpoint holds."""

    calls = 0

    def forward(self, logits, target):
        self.calls += 1
        return nn.functional.cross_entropy(logits, target) / self.calls


def half_loss(logits, target):
    return nn.functional.cross_entropy(logits, target) / 2


class AllFrozen(Shared):
    def __init__(self, *_, **__):
        super().__init__()
        self.requires_grad_(False)


class Lazy(nn.Sequential):
    def __init__(self, *_, **__):
        super().__init__(nn.LazyConv2d(2, 3, padding=1))


class NoGrad(Shared):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class Pair(Shared):
    def forward(self, x):
        return super().forward(x), x


class Named(Shared):
    def forward(self, x):
        return {"out": super().forward(x)}


def scheduled(parameters, lr, **_):
    """What `configure_optimizers` may return in Lightning: no optimiser here."""
    optimizer = torch.optim.SGD(parameters, lr=lr)
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Boom(nn.Module):
    """Raises an error late in training, at its 25th call in a process."""

    def __init__(self, error):
        super().__init__()
        self.error, self.calls = getattr(builtins, error), 0

    def forward(self, logits, target):
        self.calls += 1
        if self.calls >= 25:
            raise self.error("boom")
        return nn.functional.cross_entropy(logits, target)
