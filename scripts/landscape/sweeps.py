"""The sweeps of the atlas, as overrides of train.py.

All of them train without observation: the atlas asks how a training ends. `--quick` trains the same
sweeps with fewer losses, θ, seeds and steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

# The losses that people use: the study's five, MONAI's, nnU-Net's, Tversky's, focal Tversky's, and
# two sums with cross entropy.
LOSSES = (
    "cce", "dice", "dice_fg", "dice_square", "dice_fg_square", "dice_monai", "dice_nnunet",
    "dice_tversky", "dice_focal_tversky", "dice_cce", "dice_ce_nnunet",
)  # fmt: skip
FEW = ("cce", "dice", "dice_fg", "dice_square", "dice_fg_square", "dice_ce_nnunet")
THETAS = (0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99)

PLAIN: dict[str, Any] = {
    "model": "convnet", "compile": True, "data.batch_size": 2, "probe.every_n_steps": 0,
    "data.val_size": 50, "data.test_size": 50, "trainer.enable_progress_bar": False,
}  # fmt: skip
UNET = PLAIN | {"model": "unet", "compile": False, "data.image_size": 16}

# Each remedy against a collapse, for a foreground-only Dice.
REMEDIES: Mapping[str, dict[str, Any]] = {
    "none": {},
    "batch norm": {"model.batch_norm": True},
    "sums over the sample": {"loss.over": "sample"},
    "no smoothing": {"loss.smooth_nr": 0, "loss.smooth_dr": 0},
    "smoothing 1e-5": {"loss.smooth_nr": 1e-5, "loss.smooth_dr": 1e-5},
    "smoothing 1": {"loss.smooth_nr": 1, "loss.smooth_dr": 1},
    "learning rate x 0.1": {"optimizer.lr": 1e-4},
    "learning rate x 10": {"optimizer.lr": 1e-2},
    "warm-up with cross entropy": {
        "model._target_": "landscape.starts.warmed_up",
        "+model.runs": "{runs}/warm-up",
        "+model.theta": "${{theta}}",
    },
    "bias at the class share": {
        "model._target_": "landscape.starts.at_class_share",
        "+model.theta": "${{theta}}",
    },
    "squared denominator": {"loss": "dice_fg_square"},
    "both classes": {"loss": "dice"},
    "sum with cross entropy": {"loss": "dice_ce_nnunet"},
}
WARM_UP = 200  # steps
# The smoothing of a foreground-only Dice where images are often empty.
SMOOTHINGS = (1e-7, 1e-5, 1.0, 10.0, 100.0)
# Volumes are measured to 0.01. So there is no batch norm: its running statistics follow the weights
# late, and moved all volumes by 0.01 to 0.02 in a first try. And the learning rate falls to 0: with
# a constant one the volume at the last step differed by 0.04 from seed to seed in a second try.
# Empty images need many images in a batch, but not many pixels.
UNSURE = PLAIN | {
    "compile": False, "data.test_size": 1, "optimizer.lr": 3e-3, "scheduler": "cosine"
}  # fmt: skip
NOISE: dict[str, Any] = {"data.theta_spread": 0.0, "data.image_size": 32, "data.batch_size": 4}
EMPTY: dict[str, Any] = {
    "theta": 0.9,
    "data.theta_spread": 0.2,
    "data.image_size": 16,
    "data.batch_size": 32,
}


@dataclass(frozen=True)
class Sweep:
    """A sweep into the folder `name`: what is the same in its runs, and what it sweeps."""

    name: str
    fixed: Mapping[str, Any]
    swept: Mapping[str, Sequence[Any]]
    steps: int

    def overrides(self, runs: str) -> list[str]:
        """The overrides of train.py; `runs` is the folder of all sweeps."""
        length = {"trainer.max_steps": self.steps, "trainer.val_check_interval": self.steps}
        fixed = {**self.fixed, **length}
        lists = {key: ",".join(map(str, values)) for key, values in self.swept.items()}
        given = {**fixed, **lists}
        return [f"{key}={_text(value, runs)}" for key, value in given.items()]

    @property
    def count(self) -> int:
        """The number of runs."""
        return prod(map(len, self.swept.values()))

    def quick(self) -> Sweep:
        """The same with fewer runs and steps, which compiling would not make faster."""
        kept = {"loss": 4, "theta": 3, "seed": 2, "data.noise": 2}
        swept = {k: _some(v, kept.get(k, len(v))) for k, v in self.swept.items()}
        fixed = {**self.fixed, "compile": False}
        return replace(self, fixed=fixed, swept=swept, steps=max(WARM_UP, self.steps // 5))


def _text(value: Any, runs: str) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text.format(runs=runs) if "{" in text else text


def _some(values: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the values, the first, the last and some between."""
    if len(values) <= count:
        return list(values)
    places = [round(i * (len(values) - 1) / max(1, count - 1)) for i in range(count)]
    return [values[i] for i in places]


def _watched(losses: Sequence[str]) -> dict[str, str]:
    """Watching what is trained puts all runs into one stack."""
    return {"watch": f"[{','.join(losses)}]"}


def all_sweeps() -> list[Sweep]:
    """The sweeps, in the order in which they are trained."""
    ten, five = tuple(range(10)), tuple(range(5))
    norm = {"model.batch_norm": (False, True)}
    sweeps = [
        Sweep("map", PLAIN | _watched(LOSSES),
              norm | {"loss": LOSSES, "theta": THETAS, "seed": ten}, 2000),
        Sweep("rates", PLAIN | _watched(LOSSES),
              {"optimizer.lr": (1e-4, 1e-2), "loss": FEW, "theta": THETAS[1:-1], "seed": five},
              2000),
        Sweep("unet", UNET | _watched(FEW),
              norm | {"loss": FEW, "theta": THETAS[1:-1], "seed": ten}, 500),
        Sweep("three", PLAIN | _watched(FEW),
              {"loss": FEW, "theta": ("[0.05,0.1]", "[0.05,0.95]", "[0.3,0.6]", "[0.9,0.95]"),
               "seed": five}, 2000),
        Sweep("warm-up", PLAIN | {"loss": "cce", "watch": "[cce]"},
              {"theta": (0.01, 0.05, 0.2), "seed": ten}, WARM_UP),
    ]  # fmt: skip
    sweeps += [
        Sweep(f"remedies/{name.replace(' ', '-')}",
              PLAIN | {"loss": "dice_fg", "watch": "[cce]", "compile": False} | own,
              {"theta": (0.01, 0.05, 0.2), "seed": ten}, 2000)
        for name, own in REMEDIES.items()
    ]  # fmt: skip
    sweeps += [
        Sweep("noise", UNSURE | NOISE | _watched(("cce", "dice", "dice_fg")),
              {"loss": ("cce", "dice_fg", "dice"), "theta": (0.5, 0.8, 0.95),
               "data.noise": (0.02, 0.05, 0.1, 0.2), "seed": five}, 2000),
        Sweep("empty", UNSURE | EMPTY | {"loss": "dice_fg", "watch": "[cce]",
                                         "loss.smooth_dr": "${{loss.smooth_nr}}"},
              {"loss.over": ("batch", "sample"), "loss.smooth_nr": SMOOTHINGS, "seed": five}, 2000),
    ]  # fmt: skip
    return sweeps
