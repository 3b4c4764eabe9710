"""The trained parameters of a network as one vector, which can be stacked over runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

State = dict[str, Tensor]  # tensors by name


def trained_parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def flatten(tensors: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> Tensor:
    """The tensors with these names as one vector [P]."""
    return torch.cat([tensors[name].flatten() for name in names])


def splitter(net: nn.Module) -> Callable[[Tensor], State]:
    """A function that splits the vector [P] of `flatten` into the parameters of `net` by name."""
    shapes = {name: p.shape for name, p in trained_parameters(net).items()}
    sizes = [shape.numel() for shape in shapes.values()]

    def split(vector: Tensor) -> State:
        parts = zip(shapes.items(), vector.split(sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}

    return split
