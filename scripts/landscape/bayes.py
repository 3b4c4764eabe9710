"""The best answers of the toy task whose labels the input does not fix, in closed form.

A pixel of value u, uniform on [0, 1), is foreground with the probability

    η(u) = sigmoid((u - θ) / τ).

*Cross entropy* (Lipton et al. 2014, arXiv 1402.1892). Each pixel's loss is smallest at p = η(u), so
that the predicted volume, the mean of p, is the true one: E[η].

*Dice over all pixels* (Bertels et al. 2021, arXiv 2211.04161; Nordström et al. 2023, arXiv
2304.04116). Let s(u) in [0, 1] be the answer and D = 2∫sη / (∫s + ∫η). Its derivative by s(u) has
the sign of η(u) - D/2. So the best s is 1 where η > D*/2 and 0 elsewhere, where D* is the largest D
of such answers, and the predicted volume is P(η > D*/2). η increases with u: the answer is u > a.

*Dice of each image, where each image has its own θ* (`data.theta_spread`). Let v be the predicted
share of an image, s its true share, n its pixels and ε the smoothing. The input does not tell s.
The labels of an image are u > 1 - s, so that the answer u > 1 - v has the overlap min(v, s), and

    D(v) = E[(2·n·min(v, s) + ε) / (n·(v + s) + ε)]

over images, or, for sums over a batch, over batches with the means of min(v, s) and of s. For a
given v the mean of D is linear in the answer with weights that increase with u, so no other answer
of the same volume is better. An empty image (s = 0) adds ε / (n·v + ε), with the slope
-n·ε / (n·v + ε)² by v: no slope without smoothing, and the steepest at n·v = ε.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit

GRID = np.linspace(
    0, 1, 2001
)  # where the largest value of a function with several hills is looked for


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

    def shares(self, count: int = 20_000) -> np.ndarray:
        """Shares of foreground [count, batch] of random images."""
        rng = np.random.default_rng(0)
        theta = rng.uniform(self.theta - self.spread, self.theta + self.spread, (count, self.batch))
        return np.clip(1 - theta, 0, 1)

    def best_volume(self, smooth: float) -> float:
        """The predicted share v of each image that has the largest D(v)."""
        s = self.shares()

        def dice(v: np.ndarray) -> np.ndarray:
            v = np.atleast_1d(v)
            overlap = np.array([np.minimum(x, s).mean(1) for x in v])  # [V, count]
            n = self.pixels * self.batch
            d = (2 * n * overlap + smooth) / (n * (v[:, None] + s.mean(1)) + smooth)
            return d.mean(1)

        grid = np.linspace(0, 1, 401)
        i = int(np.argmax(dice(grid)))
        near = grid[max(0, i - 1)], grid[min(len(grid) - 1, i + 1)]
        found = minimize_scalar(lambda v: -float(dice(v)[0]), bounds=near, method="bounded")
        # The largest D may lie at the end: at v = 0 an empty image is perfect.
        return 0.0 if i == 0 and dice(np.zeros(1))[0] >= -found.fun else float(found.x)


def slope_on_empty(volume: float, smooth: float, pixels: int) -> float:
    """-dD/dv of an empty image of `pixels` at the predicted share `volume`."""
    return pixels * smooth / (pixels * volume + smooth) ** 2 if volume or smooth else 0.0
