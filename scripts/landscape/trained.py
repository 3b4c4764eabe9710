"""What trained networks answer on new images of the tasks whose labels the input does not fix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
import torch

from landscape.bayes import Noise
from losswatch.data.random import TEST, ThresholdedImages
from losswatch.disk.checkpoint import load_net
from losswatch.disk.checkpoint_files import find_checkpoint
from losswatch.nets import ConvNet

IMAGES, BATCHES = 50, 16


def answers(sweep: Path, runs: pd.DataFrame) -> pd.DataFrame:
    """The numbers of `answer` for each run of a sweep, beside its settings."""
    found = joblib.Parallel(n_jobs=-1)(
        joblib.delayed(answer)(sweep / run["run"], run) for run in runs.to_dict("records")
    )
    return pd.concat([runs.reset_index(drop=True), pd.DataFrame(found)], axis=1)


@torch.no_grad()
def answer(folder: Path, run: Mapping[Any, Any]) -> dict[str, float]:
    """What the network of a run answers on the test images of its seed.

    soft: the mean probability of foreground.
    volume: the share of pixels whose probability is above 1/2.
    volume_empty: the same on images without foreground; NaN if there are none.
    dice, dice_best: Dice of the foreground over all pixels, if pixels are foreground above
        probability 1/2, or above D*/2 (`bayes.Noise`), which is only known with noise.
    true: the share of foreground.
    """
    torch.set_num_threads(1)
    tau = run.get("data.noise", 0.0)
    net = ConvNet(1, 2).eval()
    load_net(net, find_checkpoint(str(folder)))
    data = ThresholdedImages(
        run["theta"], seed=run["seed"], image_size=run["data.image_size"], noise=tau,
        theta_spread=run["data.theta_spread"],
    )  # fmt: skip
    batches = [data.draw(TEST, i, IMAGES) for i in range(BATCHES)]
    p = torch.cat([net(image).softmax(1)[:, 1] for image, _ in batches]).double()
    y = torch.cat([label for _, label in batches]).double()

    def dice(level: float) -> float:
        hard = (p > level).double()
        return float(2 * (hard * y).sum() / (hard.sum() + y.sum()))

    hard, empty = (p > 0.5).double(), y.flatten(1).amax(1) == 0
    known = Noise(run["theta"], tau) if tau else None
    level = float(known.dice(known.best("dice_fg"))) / 2 if known else float("nan")
    return {
        "soft": float(p.mean()),
        "volume": float(hard.mean()),
        "volume_empty": float(hard[empty].mean()) if empty.any() else float("nan"),
        "dice_test": dice(0.5),
        "dice_best": dice(level) if known else float("nan"),
        "true": float(y.mean()),
    }
