"""What the first batch of a run shows of a collapse, before any training.

A network that gives all pixels one answer has two ways to move. Its answer can change at all pixels
alike, towards the best constant answer of the loss. Or the classes can come apart. A loss collapses
if the first is done, and the softmax is flat there, before the second has begun.

Let g be the derivative of the loss by the logits z [N, C, *space].

*The pull.* Training moves z along -g, if each pixel could move by itself. Then

    alike = Σ_c |Σ_pixels g_c|,  apart = Σ_c Σ_pixels -g_c·(y_c - mean y_c),  pull = alike / apart.

*The gain* of the network. But pixels share the weights w, and for a direction v of the logits

    |Jᵀ·v|² / |v|²,  J = dz/dw,

tells how strongly the network answers to it. The gain is that of a move alike at all pixels over
that of the move apart, y - mean y. Batch norm makes it small.

*The response* takes both together. A step of gradient descent moves z by

    dz = -J·Jᵀ·g,

and the response is the same quotient of dz as the pull is of g. If the answer of all pixels moves
by D, the classes come apart by D / response. So for a flat softmax it alone should decide.

*The distance* of the best constant answer p is -log of the slope p(1 - p) there. It is large where
the softmax is flat. Where it is not, the pull on all pixels ends at p, and the other one goes on.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.func import functional_call

from losswatch.report.records import read_record
from losswatch.run.randomness import seed_everything

LEAST_SLOPE = 1e-7  # float32 knows no slopes of a softmax far below
STEP = 1e-7  # of a weight, for a derivative in float64
LARGEST = 1e6  # a quotient whose denominator is 0 or negative
LOGITS = (*np.arange(-16.0, -4.0, 2.0), *np.arange(-4.0, 4.5, 0.5), *np.arange(6.0, 18.0, 2.0))


def foresee(sweep: Path, runs: pd.DataFrame) -> pd.DataFrame:
    """The numbers of `first_step` for each run: a row each, with the index of `runs`.

    Args:
        sweep: the folder that the column `run` counts from.
    """
    found = joblib.Parallel(n_jobs=-1)(joblib.delayed(of_run)(sweep / run) for run in runs["run"])
    return pd.DataFrame(found, runs.index)


def of_run(folder: Path) -> dict[str, float]:
    """The numbers of `first_step` for the first weights and the first batch of a run."""
    torch.set_num_threads(1)
    config = read_record(folder).config
    data = instantiate(config["data"], _convert_="all")
    image, label = data.first_batch()
    form = {name: getattr(data.form, name) for name in ("in_channels", "channels", "dims")}
    model = OmegaConf.create({"form": form, "model": config["model"]}).model
    with isolate_rng():
        seed_everything(config["seed"])
        net = instantiate(model, _convert_="all")
    return first_step(net.double(), instantiate(config["loss"]), image.double(), label)


def first_step(net: nn.Module, loss: nn.Module, image: Tensor, label: Tensor) -> dict[str, float]:
    """pull, gain, response (of gradient descent), adam (its first step), distance; see above.

    Args:
        net: float64, in training mode.
        image: float64 [N, channels, *space].
        label: int64 [N, *space].
    """
    weights = {name: p.detach() for name, p in net.named_parameters()}

    def forward(weights: dict[str, Tensor]) -> Tensor:
        buffers = {name: b.clone() for name, b in net.named_buffers()}
        return functional_call(net, weights | buffers, (image,))

    def move(direction: dict[str, Tensor]) -> Tensor:
        """How the logits move if the weights do, to first order."""
        size = STEP / max(float(d.abs().max()) for d in direction.values())
        moved = {name: w + size * direction[name] for name, w in weights.items()}
        return (forward(moved) - logits.detach()) / size

    def strength(v: Tensor) -> float:
        """How strongly the network answers to a direction of the logits: |Jᵀ·v|² / |v|²."""
        pulled = torch.autograd.grad(logits, list(net.parameters()), v, retain_graph=True)
        return float(sum((d**2).sum() for d in pulled) / (v**2).sum())

    logits = forward(dict(net.named_parameters()))
    [g] = torch.autograd.grad(loss(logits, label), [logits], retain_graph=True)
    gradients = torch.autograd.grad(logits, list(net.parameters()), g, retain_graph=True)
    down = {name: -d for name, d in zip(weights, gradients, strict=True)}
    # The first step of Adam has the size of the learning rate in each weight.
    sign = {name: d.sign() for name, d in down.items()}
    y = nn.functional.one_hot(label, logits.shape[1]).movedim(-1, 1).double()
    pixels = [0, *range(2, g.ndim)]
    alike, apart = g.mean(pixels, keepdim=True).expand_as(g), y - y.mean(pixels, keepdim=True)
    return {
        "pull": _quotient(-g, y),
        "gain": strength(alike) / strength(apart),
        "response": _quotient(move(down), y),
        "adam": _quotient(move(sign), y),
        "distance": -float(np.log(max(slope_at_best_constant(loss, y, label), LEAST_SLOPE))),
    }


def _quotient(move: Tensor, y: Tensor) -> float:
    """How far a move of the logits [N, C, *space] is alike at all pixels, over how far apart."""
    pixels = [0, *range(2, move.ndim)]
    move = move - move.mean(1, keepdim=True)  # a softmax does not see the rest
    alike = move.sum(pixels).abs().sum()
    apart = (move * (y - y.mean(pixels, keepdim=True))).sum()
    share = float(alike / apart) / 2  # each class counts in both; of two classes each is the other
    return min(share, LARGEST) if apart > 0 else LARGEST


def slope_at_best_constant(loss: nn.Module, y: Tensor, label: Tensor) -> float:
    """Σ_c p_c(1 - p_c) / 2 at the constant answer p with the smallest loss; p(1 - p) of two."""
    best, slope = np.inf, np.nan
    with torch.no_grad():
        for row in constants(y.shape[1]):
            answer = row.view(1, -1, *[1] * (y.ndim - 2)).expand_as(y)
            value, p = float(loss(answer, label)), row.softmax(0)
            if value < best:
                best, slope = value, float((p * (1 - p)).sum() / 2)
    return slope


@lru_cache
def constants(classes: int) -> list[Tensor]:
    """Logits of constant answers, float64 [C]."""
    levels = LOGITS if classes == 2 else LOGITS[::2]  # 15 of 29
    return [torch.tensor([0.0, *row]).double() for row in product(levels, repeat=classes - 1)]
