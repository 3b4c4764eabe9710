"""Networks of the study with other first weights: two remedies against a collapse."""

from __future__ import annotations

from typing import Any

import torch

from losswatch.disk.checkpoint import load_net
from losswatch.disk.checkpoint_files import find_checkpoint
from losswatch.nets import ConvNet


def at_class_share(theta: float, **settings: Any) -> ConvNet:
    """A network whose first answer is the share of each class: `theta` is the background's."""
    net = ConvNet(**settings)
    net[-1].load_state_dict({"bias": torch.tensor([theta, 1 - theta]).log()}, strict=False)
    return net


def warmed_up(run: str, **settings: Any) -> ConvNet:
    """A network with the weights of a run.

    Args:
        run: the run's folder without ",seed=…" at its end. The seed is the one that was set before
            networks draw their weights.
    """
    net = ConvNet(**settings)
    load_net(net, find_checkpoint(f"{run},seed={torch.initial_seed()}"))
    return net
