"""Random images with thresholds: every batch is a pure function of seed, split and step.

The value of a pixel is a hash of a key and the position, not the next number of a generator. So
there is no state to save. Resuming, worker processes, ranks and stacked runs cannot change an
image, a GPU computes the same bits as a CPU, and a compiled step can draw its own batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from losswatch.data.form import Form
from losswatch.data.loaders import RemainingBatches, batch_loader

TRAIN, VAL, TEST = 0, 1, 2
# A split has three series of random numbers: its pixels; and, this much further on, the noise of
# its labels and the θ of its images.
NOISE, SPREAD = 3, 6

RESOLUTION = 2.0**-24  # pixels are multiples of it

# Constants of splitmix64 (Steele, Lea and Flood 2014), as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX2 = 0x94D049BB133111EB - 2**64


def _mix(x: Tensor) -> Tensor:
    """The last step of splitmix64. `>>` repeats the sign bit of int64; the masks remove it."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _MIX1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _MIX2
    return x ^ ((x >> 31) & (2**33 - 1))


def uniform(seed: Tensor, split: int, step: Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform numbers on [0, 1), multiples of 2^-24, as float32 of this shape.

    Args:
        seed, step: int64 scalars (0-dim) on the device where the numbers are computed.
        split: TRAIN, VAL or TEST.
        shape: of the result.

    >>> a = uniform(torch.tensor(0), TRAIN, torch.tensor(7), (2, 3))
    >>> torch.equal(a, uniform(torch.tensor(0), TRAIN, torch.tensor(7), (2, 3)))
    True
    """
    key = _mix(_mix(seed * _GOLDEN + split) + step * _GOLDEN)
    position = torch.arange(1, prod(shape) + 1, device=step.device)
    # This is key + position·GOLDEN. If it is written so, a C++ compiler sees that the product
    # overflows. Overflow is undefined in C++, so the compiler removes the code that follows, and a
    # compiled step crashes. With the key in the product, the compiler cannot see this.
    state = (position + key) * _GOLDEN + (key - key * _GOLDEN)
    bits = (_mix(state) >> 40) & (2**24 - 1)
    return bits.to(torch.float32).mul(RESOLUTION).view(*shape)


def image_and_label(
    u: Tensor,
    thresholds: Tensor,
    low: float | Tensor,
    high: float | Tensor,
    shift: float | Tensor = 0.0,
) -> tuple[Tensor, Tensor]:
    """Input `low + (high - low) * u` [N, 1, *space], and its label int64 [N, *space].

    The label is the number of thresholds (float32 [C - 1], sorted) that `u + shift` exceeds. The
    input range does not change it.

    >>> u = torch.tensor([0.2, 0.5, 0.9]).view(1, 1, 3)
    >>> image_and_label(u, torch.tensor([0.5]), 1.0, 0.0)
    (tensor([[[0.8000, 0.5000, 0.1000]]]), tensor([[0, 0, 1]]))
    """
    label = (u + shift > thresholds.view(-1, *[1] * (u.ndim - 2))).sum(dim=1)
    return low + (high - low) * u, label


def label_shift(
    noise: float | Tensor, noise_u: Tensor, spread: float | Tensor, spread_u: Tensor
) -> Tensor:
    """What is added to pixels before they are compared with θ: the two ways to make labels unsure.

    Logistic noise of scale τ makes a pixel of value u foreground with the probability
    η(u) = sigmoid((u - θ) / τ). And each image has its own θ, uniform on θ ± spread.

    Args:
        noise, spread: τ and the spread.
        noise_u, spread_u: uniform numbers [N, 1, *space] and [N, 1, 1, ...].
    """
    inside = noise_u * (1 - 2 * RESOLUTION) + RESOLUTION  # the logarithm of 0 is infinite
    return noise * (inside.log() - (-inside).log1p()) + spread * (1 - 2 * spread_u)


def draw(
    numbers: Mapping[str, Any],
    split: int,
    step: Tensor,
    shape: Sequence[int],
    share: slice | None = None,
) -> tuple[Tensor, Tensor]:
    """The images of a split and step [N, 1, *space], and their labels int64 [N, *space].

    This function draws all images, those of an ordinary run and those of a stack.

    Args:
        numbers: of the run: `seed` (int64 scalar), `thresholds` (float32 [C - 1]), `low`, `high`;
            and `noise` and `theta_spread`, which are left out where both are 0.
        split: TRAIN, VAL or TEST.
        step: int64 scalar: the step of the training, or the number of a batch in a fixed set.
        shape: [N, 1, *space].
        share: which of the N images to return; all of them are drawn.
    """

    def series(offset: int, shape: Sequence[int]) -> Tensor:
        u = uniform(numbers["seed"], split + offset, step, shape)
        return u if share is None else u[share]

    shift: float | Tensor = 0.0
    if "noise" in numbers:
        each = (shape[0], *[1] * (len(shape) - 1))  # one number for an image
        noise_u, spread_u = series(NOISE, shape), series(SPREAD, each)
        shift = label_shift(numbers["noise"], noise_u, numbers["theta_spread"], spread_u)
    u = series(0, shape)
    return image_and_label(u, numbers["thresholds"], numbers["low"], numbers["high"], shift)


class _Batches(Dataset):
    """Item `step` is the whole batch of a step, or this rank's part of it."""

    def __init__(self, data: ThresholdedImages, split: int, batch_size: int, size: int) -> None:
        self.data, self.split, self.batch_size, self.size = data, split, batch_size, size

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        count = min(self.batch_size, self.size - step * self.batch_size)
        return self.data.draw(self.split, step, count)


class ThresholdedImages(pl.LightningDataModule):
    """Images of independent uniform pixels; a pixel's class is the number of θ below its value.

    Args:
        thresholds: θ, or sorted values in (0, 1): C - 1 of them make C classes.
        seed: chooses the images, together with the split and the step.
        image_size, dims: an image has `dims` (2 or 3) sides of `image_size` pixels.
        low, high: the input range.
        noise: τ; a pixel of value u is foreground with the probability sigmoid((u - θ) / τ), and
            at 0 where u exceeds θ. Of several classes, each θ has the same noise.
        theta_spread: each image has its own θ, uniform on θ ± theta_spread. The input does not tell
            it. Where it is 1 or more, the image is empty.
        batch_size: images of a training step, over all devices together.
        batches: the training repeats the first `batches` batches; 0 repeats none.
        val_size, test_size, eval_batch_size: sizes of the fixed sets, and of their batches.
        num_workers: 0 draws on the training device; more draw on the CPU in the background.
    """

    def __init__(
        self,
        thresholds: float | Sequence[float],
        *,
        seed: int = 0,
        image_size: int = 32,
        dims: int = 2,
        low: float = 0.0,
        high: float = 1.0,
        noise: float = 0.0,
        theta_spread: float = 0.0,
        batch_size: int = 8,
        batches: int = 0,
        val_size: int = 100,
        test_size: int = 100,
        eval_batch_size: int = 25,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.thresholds = torch.tensor(thresholds, dtype=torch.float32).reshape(-1)
        self.seed, self.low, self.high = seed, low, high
        self.noise, self.theta_spread = noise, theta_spread
        self.space = (image_size,) * dims
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.batches = batches
        self.val_size, self.test_size = val_size, test_size
        self.num_workers = num_workers
        classes = tuple(f"class_{i}" for i in range(len(self.thresholds) + 1))
        self.form = Form(in_channels=1, classes=classes, dims=dims)
        self.device = torch.device("cpu")
        self.rank, self.world_size = 0, 1

    def setup(self, stage: str) -> None:
        if self.trainer is not None:
            self.rank, self.world_size = self.trainer.global_rank, self.trainer.world_size
            if self.num_workers == 0:
                self.device = self.trainer.strategy.root_device
        self.thresholds = self.thresholds.to(self.device)

    @property
    def is_unsure(self) -> bool:
        """Whether the input does not fix the labels."""
        return bool(self.noise or self.theta_spread)

    def draw(self, split: int, step: int, count: int) -> tuple[Tensor, Tensor]:
        """A batch of `count` images and their labels, or this rank's part of it."""
        # `full` writes the number on the device. A copy from the host would wait for all work of
        # a GPU.
        seed, number = (torch.full((), n, device=self.device) for n in (self.seed, step))
        numbers = {
            "seed": seed, "thresholds": self.thresholds, "low": self.low, "high": self.high
        }  # fmt: skip
        if self.is_unsure:
            numbers |= {"noise": self.noise, "theta_spread": self.theta_spread}
        # Each rank draws the whole batch and keeps its part. So the number of devices changes no
        # image.
        share = slice(self.rank, None, self.world_size)
        return draw(numbers, split, number, (count, 1, *self.space), share)

    def first_batch(self) -> tuple[Tensor, Tensor]:
        return self.draw(TRAIN, 0, self.batch_size)

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        steps = RemainingBatches(self.trainer, self.batches)
        batches = _Batches(self, TRAIN, self.batch_size, len(steps) * self.batch_size)
        return batch_loader(batches, steps, self.num_workers)

    def _fixed(self, split: int, size: int) -> DataLoader:
        batches = range(-(-size // self.eval_batch_size))
        fixed = _Batches(self, split, self.eval_batch_size, size)
        return batch_loader(fixed, batches, self.num_workers)

    def val_dataloader(self) -> DataLoader:
        return self._fixed(VAL, self.val_size)

    def test_dataloader(self) -> DataLoader:
        return self._fixed(TEST, self.test_size)
