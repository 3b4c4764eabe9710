"""Finds the parameters by which an observer takes gradients."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def network_or_parameters(source: Any) -> tuple[nn.Module | None, list[Tensor]]:
    """The network, if `source` is one or is its `parameters()`; otherwise the tensors of `source`.

    Raises:
        TypeError: `source` holds something that is not a tensor.
        ValueError: there are no parameters.
    """
    if inspect.isgenerator(source) and source.gi_code is nn.Module.parameters.__code__:
        source = inspect.getgeneratorlocals(source).get("self", source)  # none if it is finished
    network = source if isinstance(source, nn.Module) else None
    parameters: list[Tensor] = list(source if network is None else network.parameters())
    for p in parameters:
        if not isinstance(p, Tensor):
            raise TypeError(f"parameters: tensors are needed, got a {type(p).__name__}")
    if not parameters:
        raise ValueError("parameters: there are none; net.parameters() can be read only once")
    return network, [] if network else parameters


def check_whole(parameters: Sequence[Tensor], network: nn.Module | None) -> None:
    """Check that this rank has whole parameters.

    Raises:
        ValueError: the parameters are spread over ranks.
    """
    from torch.distributed.fsdp import FlatParameter, FSDPModule
    from torch.distributed.tensor import DTensor

    # Between the forward and the backward pass the parameters of `fully_shard` are whole.
    modules = [] if network is None else network.modules()
    if any(isinstance(module, FSDPModule) for module in modules) or any(
        isinstance(p, FlatParameter | DTensor) or not p.numel() for p in parameters
    ):
        raise ValueError("the parameters are spread over ranks (FSDP); DDP can be watched")
