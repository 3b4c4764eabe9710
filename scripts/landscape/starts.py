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


def warmed_up(runs: str, theta: float, **settings: Any) -> ConvNet:
    """A network with the weights of the run of the same θ and seed in a folder of runs.

    The seed is the one that is set before a network draws its weights.
    """
    net = ConvNet(**settings)
    load_net(net, find_checkpoint(f"{runs}/theta={theta},seed={torch.initial_seed()}"))
    return net
