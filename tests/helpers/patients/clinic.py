"""What all patients share: images, a network, and a training that an `Observer` watches.

A patient is a small training with one mistake that people make, and its healthy twin is the same
training without it. Each is a class: `Base` with the mistake; `healthy=True` applies the remedy.

    python tests/helpers/patients/dice_of_logits.py    # prints the findings in both
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losswatch import Observer


def disks(count, seed, size=32, low=4.0, high=8.0, empty=0.0, noise=0.4, bright=1.0):
    """Images [n, 1, s, s] and labels [n, s, s] with one disk each; a share of them is empty."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    edge = int(high) + 1
    centre = torch.randint(edge, size - edge, (2, count, 1, 1), generator=g)
    radius = low + (high - low) * torch.rand(count, 1, 1, generator=g)
    there = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2
    labels = (there & (torch.rand(count, 1, 1, generator=g) >= empty)).long()
    images = noise * torch.randn(count, 1, size, size, generator=g)
    return images + bright * labels.unsqueeze(1), labels


def splits(**options):
    """Disks to train on, and others to predict."""
    return disks(64, 1, **options), disks(32, 2, **options)


class UNet(nn.Module):
    """Two levels. `head` follows the last convolution; a `deep` one has three outputs."""

    def __init__(self, out=2, norm=nn.BatchNorm2d, head=None, width=8, deep=False):
        super().__init__()

        def block(a, b):
            parts = []
            for i, o in ((a, b), (b, b)):
                parts += [nn.Conv2d(i, o, 3, padding=1)]
                parts += [norm(o) if norm else nn.Identity(), nn.ReLU()]
            return nn.Sequential(*parts)

        self.a, self.b = block(1, width), block(width, 2 * width)
        self.c = block(2 * width, 2 * width)
        self.d, self.e = block(4 * width, 2 * width), block(3 * width, width)
        self.last = nn.Conv2d(width, out, 1)
        self.side = nn.ModuleList([nn.Conv2d(2 * width, out, 1) for _ in range(2 * deep)])
        self.head = head or nn.Identity()

    def forward(self, x):
        def up(z):
            return F.interpolate(z, scale_factor=2)

        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        c = self.c(F.max_pool2d(b, 2))
        d = self.d(torch.cat([up(c), b], 1))
        z = self.head(self.last(self.e(torch.cat([up(d), a], 1))))
        if not self.side:
            return z
        return [z, *(side(t) for side, t in zip(self.side, (d, c), strict=True))]


class Fn(nn.Module):
    """A function (output, target) -> scalar as a module."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, output, target):
        return self.f(output, target)


def soft_dice(p, y, nr=1e-5, dr=1e-5, axes=None):
    """1 - (2 Σpy + nr) / (Σp + Σy + dr) with sums over `axes`, averaged over the others."""
    axes = tuple(range(p.ndim)) if axes is None else axes
    return (1 - (2 * (p * y).sum(axes) + nr) / (p.sum(axes) + y.sum(axes) + dr)).mean()


def onehot(label, classes=2):
    return F.one_hot(label, classes).movedim(-1, 1).float()


class Base:
    """A healthy training of a network with batch norm; a subclass says which loss trains."""

    steps, lr, batch, every = 120, 3e-3, 8, 12
    out, norm = 2, nn.BatchNorm2d
    activation, ignore_index, heads = "softmax", None, "first"  # what the observer is told
    presets = ("cce", "cce_stable", "dice", "dice_fg", "dice_monai")
    watch_trained = True

    def __init__(self, healthy: bool):
        self.healthy = healthy
        torch.manual_seed(0)
        self.train_set, self.test_set = self.data()
        self.criterion = self.make_loss()
        self.net = self.make_net()
        self.optimizer = self.make_optimizer()
        self.shuffle = torch.Generator().manual_seed(3)

    def data(self):
        return splits()

    def make_loss(self) -> nn.Module:
        raise NotImplementedError

    def make_net(self):
        return UNet(self.out, self.norm, self.make_head())

    def make_head(self):
        return None

    def make_optimizer(self):
        return torch.optim.Adam(self.net.parameters(), lr=self.lr)

    def take(self):
        index = torch.randperm(len(self.train_set[0]), generator=self.shuffle)[: self.batch]
        return self.train_set[0][index], self.target(self.train_set[1][index])

    def target(self, label):
        """What the loss gets of labels [n, s, s]."""
        return label.unsqueeze(1).float() if self.out == 1 else label

    def terms(self):
        """Parts of the loss that the observer watches, too."""
        return {}

    def update(self, loss, step):
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def predict(self, output):
        """Labels [n, s, s]."""
        z = output[0] if isinstance(output, list) else output
        return (z[:, 0].sigmoid() > 0.5).long() if z.shape[1] == 1 else z.argmax(1)

    def observer(self):
        watched = {name: name for name in self.presets} | self.terms()
        if self.watch_trained:
            watched["trained"] = self.criterion
        return Observer(
            watched, self.net, activation=self.activation, ignore_index=self.ignore_index,
            heads=self.heads, trained="trained" if self.watch_trained else None,
        )  # fmt: skip


def train(patient: Base) -> dict:
    """The findings at the end of a training, and the Dice of the foreground of other images."""
    observer = patient.observer()
    for step in range(patient.steps):
        images, target = patient.take()
        output = patient.net(images)
        if step % patient.every == 0 or step == patient.steps - 1:
            observer(output, target)
        patient.update(patient.criterion(output, target), step)
    return {
        "findings": [finding._asdict() for finding in observer.findings()],
        "dice_eval": dice_of(patient),
    }


@torch.no_grad()
def dice_of(patient: Base) -> float:
    patient.net.eval()
    images, label = patient.test_set
    hit: Tensor = patient.predict(patient.net(images))
    right = ((hit == label) & (label > 0)).sum()
    return float(2 * right / ((hit > 0).sum() + (label > 0).sum()).clamp_min(1))


def main(sick: Callable[[bool], Base], healthy: Callable[[bool], Base] | None = None) -> None:
    """Train a patient and its healthy twin, or two that are healthy; say what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, help="where the two records go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    both = [sick(healthy is not None), (healthy or sick)(True)]
    records = [train(patient) for patient in both]
    for patient, record in zip(both, records, strict=True):
        print(f"{'healthy' if patient.healthy else 'sick'}: Dice {record['dice_eval']:.3f}")
        for finding in record["findings"]:
            print("  {name} (step {step}): {text} {remedy}".format(**finding))
    if options.json:
        options.json.write_text(json.dumps(records))
