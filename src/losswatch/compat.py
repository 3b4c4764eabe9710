"""Private names of other libraries that losswatch uses, each with what it is for."""

from __future__ import annotations

import torch
from torch import Tensor

# -- torch -----------------------------------------------------------------------------------------


def traced(x: Tensor) -> bool:
    """Whether a compiler, a tracer or a torch.func transform stands between us and the numbers."""
    if torch.compiler.is_compiling():
        return True
    modes = torch._C._len_torch_dispatch_stack()
    return modes > 0 or torch._C._functorch.is_functorch_wrapped_tensor(x)


def grad_levels(x: Tensor) -> int:
    """How many of the active torch.func transforms differentiate by x."""
    functorch, levels = torch._C._functorch, 0
    while functorch.is_functorch_wrapped_tensor(x):
        levels += functorch.is_gradtrackingtensor(x) and x.requires_grad
        x = functorch.get_unwrapped(x)
    return levels


def is_functorch_active() -> bool:
    """Whether a torch.func transform is active."""
    return torch._C._are_functorch_transforms_active()


def softmax_backward(gradient: Tensor, p: Tensor) -> Tensor:
    """p·(gradient - Σ_c p·gradient), the derivative through a softmax over axis 1, in one pass."""
    return torch._softmax_backward_data(gradient, p, 1, p.dtype)
