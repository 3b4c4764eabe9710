"""The parameters by which gradients are taken."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def network_or_parameters(given: Any) -> tuple[nn.Module | None, list[Tensor]]:
    """A network, also where only its `parameters()` are given; or some parameters.

    Raises:
        TypeError: something else is given.
        ValueError: there are no parameters.
    """
    if inspect.isgenerator(given) and given.gi_code is nn.Module.parameters.__code__:
        given = inspect.getgeneratorlocals(given).get("self", given)  # finished ones have none
    network = given if isinstance(given, nn.Module) else None
    parameters: list[Tensor] = list(given if network is None else network.parameters())
    for p in parameters:
        if not isinstance(p, Tensor):
            raise TypeError(f"parameters: tensors are needed, got a {type(p).__name__}")
    if not parameters:
        raise ValueError("parameters: there are none; net.parameters() can be read only once")
    return network, [] if network else parameters


def check_whole(parameters: Sequence[Tensor], network: nn.Module | None) -> None:
    """Check that this rank has whole parameters.

    Raises:
        ValueError: they are spread over ranks.
    """
    from torch.distributed.fsdp import FlatParameter, FSDPModule
    from torch.distributed.tensor import DTensor

    # Between the forward and the backward pass the parameters of `fully_shard` are whole.
    modules = [] if network is None else network.modules()
    if any(isinstance(module, FSDPModule) for module in modules) or any(
        isinstance(p, FlatParameter | DTensor) or not p.numel() for p in parameters
    ):
        raise ValueError("the parameters are spread over ranks (FSDP); DDP can be watched")
