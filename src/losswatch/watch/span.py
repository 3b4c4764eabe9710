"""The gradients of many losses by a network's parameters, from few backward passes.

A loss sends its derivative by the logits back into the network. These derivatives lie in a small
space (`LossSet.rows`): for two classes, four rows span those of cross entropy and of any number of
Dice variants. One backward pass for each row gives a matrix J [M, P], and the gradient of loss k is
exactly `coefficients[k] @ J`. Neither J nor the gradients exist as a whole. The rows stay as
PyTorch returns them, and they are worked on block by block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from losswatch.losses import LossSet

CHUNK = 2**16  # columns of J in a block, which fits in the cache of a CPU


class Span(NamedTuple):
    """K losses of one batch, and what their gradients are made of."""

    values: Tensor  # [K]
    coefficients: Tensor  # [K, M]
    rows: list[Sequence[Tensor | None]]  # M gradients, each by all parameters; None is 0


def joined(spans: Sequence[Span]) -> Span:
    """The losses of several spans as one."""
    if len(spans) == 1:
        return spans[0]
    return Span(
        torch.cat([found.values for found in spans]),
        torch.block_diag(*(found.coefficients for found in spans)),
        [row for found in spans for row in found.rows],
    )


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
        spare: a row that is not sent back; see `with_trained`.

    Raises:
        ValueError: the output does not depend on any of the parameters.
    """
    values, rows, coefficients = losses.rows(logits, target, known)
    if logits.dtype == torch.float16:
        rows, coefficients = _scaled(rows, coefficients)
    gradients: list[Sequence[Tensor | None]] = []
    with without_autocast(logits.device):
        for i, row in enumerate(rows):
            if i == spare:
                gradients.append([None] * len(parameters))
                continue
            row = row.to(logits.dtype)
            found = torch.autograd.grad(
                logits, parameters, row, retain_graph=True, allow_unused=True
            )
            if all(gradient is None for gradient in found):
                raise ValueError("none of the parameters has a part in the output")
            gradients.append(found)
    return Span(values, coefficients, gradients)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """For backward passes: their operations have the types of those of the forward pass."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def blocks(found: Span) -> Iterator[Tensor]:
    """J in blocks [M, B]; complex numbers count as two."""
    pending: list[tuple[Tensor, ...]] = []  # pieces of the M rows, side by side
    width = 0
    for column in zip(*found.rows, strict=True):
        shape = next((g for g in column if g is not None), None)
        if shape is None:
            continue
        filled = [torch.zeros_like(shape) if g is None else g for g in column]
        real = [torch.view_as_real(g) if g.is_complex() else g for g in filled]
        flat = tuple(g.reshape(-1) for g in real)
        large = len(flat[0]) > CHUNK
        for pieces in zip(*(g.split(CHUNK) for g in flat), strict=True) if large else [flat]:
            pending.append(pieces)
            width += len(pieces[0])
            if width >= CHUNK:
                yield _block(pending)
                pending, width = [], 0
    if pending:
        yield _block(pending)


def _block(pending: Sequence[tuple[Tensor, ...]]) -> Tensor:
    return torch.stack([torch.cat(pieces) for pieces in zip(*pending, strict=True)])


def with_trained(found: Span, gradient: Sequence[Tensor | None], loss: int, spare: int) -> Span:
    """The span with its spare row, since the training has computed the gradient of a loss anyway.

    Its gradient less the shares of the other rows is the spare row's. So the spare row becomes that
    gradient itself, and the coefficients change instead: with g = Σ_m a_m·J_m, a loss that holds
    c_s·J_s holds (c_s / a_s)·g and, of each other row, c_m - (c_s / a_s)·a_m.
    """
    c = found.coefficients.to(wide_type(found.values))
    ratio = c[:, spare] / c[loss, spare]
    changed = c - ratio[:, None] * c[loss]
    changed[:, spare] = ratio
    changed[loss] = 0  # the trained loss is the new row itself, without a rounding error
    changed[loss, spare] = 1
    rows = [gradient if i == spare else row for i, row in enumerate(found.rows)]
    return Span(found.values, changed, rows)


def norms_and_cosines(coefficients: Tensor, parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Norms [K] of the gradients `coefficients @ J`, and cosines [K, K] of their pairs.

    With G = J·Jᵀ both follow from c·G·cᵀ, so the K gradients never exist. In float64, where the
    small difference of two large rows keeps its digits. The cosine with a gradient that vanishes is
    NaN.

    Args:
        parts: J in blocks [M, B].
    """
    c = coefficients.to(wide_type(coefficients))
    products = c.new_zeros(c.shape[1], c.shape[1])
    for part in parts:
        part = part.to(c.dtype)
        products += part @ part.T
    inner = c @ products @ c.T
    norms = inner.diagonal().clamp_min(0).sqrt()
    return norms, inner / norms.outer(norms)


def wide_type(x: Tensor) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _scaled(rows: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a size that float16 holds, and the coefficients that make up for it.

    Sums over the pixels of a row would overflow there, or the row's numbers vanish. The factors are
    powers of two, which round nothing.
    """
    _, exponent = rows.abs().flatten(1).sum(1).frexp()
    scale = torch.exp2(10 - exponent)
    return rows * scale.view(-1, *[1] * (rows.ndim - 1)), coefficients / scale
