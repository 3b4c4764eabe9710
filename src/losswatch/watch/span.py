"""The gradients of many losses by a network's parameters, from few backward passes.

A loss sends its derivative by the logits back into the network. These derivatives lie in a small
space (`LossSet.rows`): for two classes, four rows span those of cross entropy and of any number of
Dice variants. One backward pass for each row gives a matrix J [M, P], and the gradient of loss k is
exactly `coefficients[k] @ J`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from losswatch.losses import LossSet

CHUNK = 2**16  # parameters whose rows are worked on at once, in the cache of a CPU


class Span(NamedTuple):
    """K losses of one batch, and what their gradients by P parameters are made of."""

    values: Tensor  # [K]
    coefficients: Tensor  # [K, M]
    jacobian: Tensor  # [M, P]


def span(
    losses: LossSet,
    logits: Tensor,
    target: Tensor,
    parameters: Sequence[Tensor],
    known: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({}),
    spare: int | None = None,
) -> Span:
    """Send the rows of the losses back through the network.

    Args:
        logits: with the graph back to the parameters, which is kept.
        known: as of `LossSet.rows`.
        spare: a row that is not sent back; see `fill_spare`.

    Raises:
        ValueError: the output does not depend on any of the parameters.
    """
    values, rows, coefficients = losses.rows(logits, target, known)
    if logits.dtype == torch.float16:
        rows, coefficients = _scaled(rows, coefficients)
    size = sum(p.numel() * (2 if p.is_complex() else 1) for p in parameters)
    jacobian = coefficients.new_empty(len(rows), size)
    with without_autocast(logits.device):
        for i, row in enumerate(rows):
            if i != spare:
                gradients = torch.autograd.grad(
                    logits, parameters, row.to(logits.dtype), retain_graph=True, allow_unused=True
                )
                if all(gradient is None for gradient in gradients):
                    raise ValueError("none of the parameters has a part in the output")
                fill(jacobian[i], gradients, parameters)
    return Span(values, coefficients, jacobian)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """For backward passes: their operations have the types of those of the forward pass."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def fill(row: Tensor, gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> None:
    """Write the gradients into a row [P]; None is 0, and a complex number counts as its parts."""
    parts = [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)
    ]
    real = [torch.view_as_real(g) if g.is_complex() else g for g in parts]
    torch.cat([g.flatten() for g in real], out=row)


def fill_spare(found: Span, loss: int, spare: int, parameters: Sequence[Tensor]) -> None:
    """Write the row that the training has computed: its gradient less the share of other rows.

    Args:
        loss: the trained one, whose gradient by the parameters is in their `grad`.
    """
    _, coefficients, jacobian = found
    fill(jacobian[spare], [p.grad for p in parameters], parameters)
    shares = coefficients[loss].clone()
    shares[spare] = 0
    for part in jacobian.split(CHUNK, dim=1):
        part[spare] = (part[spare] - shares @ part) / coefficients[loss, spare]


def norms_and_cosines(coefficients: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor]:
    """Norms [K] of the gradients `coefficients @ jacobian`, and cosines [K, K] of their pairs.

    With G = J·Jᵀ both follow from c·G·cᵀ, so the K gradients never exist. In float64, where the
    small difference of two large rows keeps its digits. The cosine with a gradient that vanishes is
    NaN.
    """
    wide = torch.float32 if jacobian.device.type == "mps" else torch.float64
    products = jacobian.new_zeros(len(jacobian), len(jacobian), dtype=wide)
    for part in jacobian.split(CHUNK, dim=1):
        part = part.to(wide)
        products += part @ part.T
    c = coefficients.to(wide)
    inner = c @ products @ c.T
    norms = inner.diagonal().clamp_min(0).sqrt()
    return norms.to(jacobian.dtype), (inner / norms.outer(norms)).to(jacobian.dtype)


def _scaled(rows: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a size that float16 holds, and the coefficients that make up for it.

    Sums over the pixels of a row would overflow there, or the row's numbers vanish. The factors are
    powers of two, which round nothing.
    """
    _, exponent = rows.abs().flatten(1).sum(1).frexp()
    scale = torch.exp2(10 - exponent)
    return rows * scale.view(-1, *[1] * (rows.ndim - 1)), coefficients / scale
