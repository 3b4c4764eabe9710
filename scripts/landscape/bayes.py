"""The best answers of the toy task whose labels the input does not fix, in closed form.

A pixel of value u, uniform on [0, 1), is foreground with the probability

    η(u) = sigmoid((u - θ) / τ).

*Cross entropy* (Lipton et al. 2014, arXiv 1402.1892). Each pixel's loss is smallest at p = η(u), so
that the predicted volume, the mean of p, is the true one: E[η].

*Dice over all pixels* (Bertels et al. 2021, arXiv 2211.04161; Nordström et al. 2023, arXiv
2304.04116). Let s(u) in [0, 1] be the answer and D = 2∫sη / (∫s + ∫η). Its derivative by s(u) has
the sign of η(u) - D/2. So the best s is 1 where η > D*/2 and 0 elsewhere, where D* is the largest D
of such answers, and the predicted volume is P(η > D*/2). η increases with u: the answer is u > a.

*Dice of images that have their own θ* (`data.theta_spread`). An image has n random pixels; the Y
pixels with u > θ are foreground. The input does not tell θ. So the network predicts the same share
v of each image: the P pixels with u > 1 - v. Both are the brightest pixels of the image, and their
overlap is min(P, Y). With smoothing ε, and sums over each image or over the images of a batch,

    D(v) = E[(2·Σ min(P, Y) + ε) / (Σ P + Σ Y + ε)]

For a given v the mean of D is linear in the answer with weights that increase with u, so no other
answer of the same volume is better. E is the mean over 51,200 simulated images. An empty image
(Y = 0) adds ε / (n·v + ε), with the slope -n·ε / (n·v + ε)² by v: no slope without smoothing, and
the steepest at n·v = ε.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.polynomial import Polynomial
from scipy.optimize import minimize_scalar
from scipy.special import expit

# Where the largest value of a function with several hills is looked for.
GRID = np.linspace(0, 1, 2001)
IMAGES = 51_200  # the number of images that `Spread` simulates


def softplus(x: np.ndarray | float) -> np.ndarray:
    return np.logaddexp(0, x)


@dataclass(frozen=True)
class Noise:
    """The task with label noise τ > 0."""

    theta: float
    tau: float

    def eta(self, u: np.ndarray | float) -> np.ndarray:
        """The probability of foreground at pixels of value u."""
        return expit((np.asarray(u) - self.theta) / self.tau)

    def foreground_above(self, a: np.ndarray | float) -> np.ndarray:
        """∫ η(u) du from a to 1: the foreground that the answer u > a finds."""
        top = softplus((1 - self.theta) / self.tau)
        return self.tau * (top - softplus((np.asarray(a) - self.theta) / self.tau))

    @property
    def volume(self) -> float:
        """E[η]: the share of foreground, and of the best p of cross entropy."""
        return float(self.foreground_above(0.0))

    def dice(self, a: np.ndarray | float) -> np.ndarray:
        """Dice of the foreground of the answer u > a, over all pixels."""
        return 2 * self.foreground_above(a) / (1 - np.asarray(a) + self.volume)

    def background_dice(self, a: np.ndarray | float) -> np.ndarray:
        """Dice of the background of the answer u > a, over all pixels."""
        a, background = np.asarray(a), 1 - self.volume
        found = a - (self.volume - self.foreground_above(a))
        return 2 * found / (a + background)

    def best(self, loss: str) -> float:
        """The a whose answer u > a is best for "dice_fg" or "dice" (the mean of both classes)."""
        if loss == "dice_fg":
            return largest(self.dice)
        return largest(lambda a: self.dice(a) + self.background_dice(a))

    def predicted_volume(self, loss: str) -> float:
        """The volume that a network predicts that has learned this loss."""
        return self.volume if loss == "cce" else 1 - self.best(loss)


def largest(f: Callable[[Any], np.ndarray]) -> float:
    """Where a function on [0, 1] is largest."""
    i = int(np.argmax(f(GRID)))
    near = GRID[max(0, i - 1)], GRID[min(len(GRID) - 1, i + 1)]
    found = minimize_scalar(lambda x: -float(f(x)), bounds=near, method="bounded",
                            options={"xatol": 1e-10})  # fmt: skip
    return float(found.x)


@dataclass(frozen=True)
class Spread:
    """The task in which each image has its own θ, uniform on θ ± spread.

    pixels: of an image. batch: the images in one sum; 1 for sums over the sample.
    """

    theta: float
    spread: float
    pixels: int
    batch: int = 1

    @cached_property
    def images(self) -> tuple[np.ndarray, np.ndarray]:
        """The pixels [IMAGES, pixels] of random images, and the foreground [IMAGES] of each."""
        rng = np.random.default_rng(0)
        even = (np.arange(IMAGES) + 0.5) / IMAGES  # each θ once, so that only the pixels are random
        theta = self.theta + self.spread * (2 * rng.permutation(even) - 1)
        u = rng.random((IMAGES, self.pixels), dtype=np.float32)
        return u, (u > theta[:, None]).sum(1)

    def dice(self, v: float, smooth: float) -> float:
        """D(v)."""
        u, foreground = self.images
        predicted = np.count_nonzero(u > 1 - v, axis=1)
        overlap, total = (
            counts.reshape(-1, self.batch).sum(1)
            for counts in (np.minimum(predicted, foreground), predicted + foreground)
        )
        return float(((2 * overlap + smooth) / (total + smooth)).mean())

    def best_volume(self, smooth: float) -> float:
        """The predicted share v of each image that has the largest D(v)."""
        shares = np.linspace(0, 1, 101)
        d = np.array([self.dice(v, smooth) for v in shares])
        i = int(np.argmax(d))
        if i == 0:
            return 0.0
        # D is flat around its largest value, and its mean over images has some noise. A polynomial
        # through the neighbours smooths it.
        near = slice(max(0, i - 5), i + 6)
        curve = Polynomial.fit(shares[near], d[near], 3)
        v, smooth_d = curve.linspace(1001)
        return float(v[np.argmax(smooth_d)])


def slope_on_empty(volume: float, smooth: float, pixels: int) -> float:
    """-dD/dv of an empty image of `pixels` at the predicted share `volume`."""
    return pixels * smooth / (pixels * volume + smooth) ** 2 if volume or smooth else 0.0
