"""The gradients of many losses by a network's parameters, from few backward passes.

A loss sends its derivative by the logits back into the network. These derivatives lie in a small
space (`LossSet.rows`): for two classes, four rows span those of cross entropy and of any number of
Dice variants. One backward pass for each row gives a matrix J [M, P], and the gradient of loss k is
exactly `coefficients[k] @ J`. Neither J nor the gradients exist as a whole. The rows stay as
PyTorch returns them, and they are worked on block by block.

This needs a backward pass that is linear. A hook that clamps gradients makes it something else, so
the first observation tests it (`is_linear`). Where it is not, each loss gets its own pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 2**16  # columns of J in a block, which fits in the cache of a CPU

Row = Sequence[Tensor | None]  # a gradient by all parameters; None is 0


class Span(NamedTuple):
    """K losses of one batch or several, and what their gradients are made of."""

    values: Tensor  # [K]
    coefficients: Tensor  # [K, M]
    rows: list[Row]  # M


def joined(spans: Sequence[Span]) -> Span:
    """The losses of several spans as one."""
    if len(spans) == 1:
        return spans[0]
    return Span(
        torch.cat([found.values for found in spans]),
        torch.block_diag(*(found.coefficients for found in spans)),
        [row for found in spans for row in found.rows],
    )


def in_order(found: Span, names: Sequence[str], wanted: Sequence[str]) -> Span:
    """A span with its losses, of these names, in another order."""
    if list(names) == list(wanted):
        return found
    order = [names.index(name) for name in wanted]
    values, coefficients = (
        torch.stack([x[i] for i in order]) for x in (found.values, found.coefficients)
    )
    return Span(values, coefficients, found.rows)


def added(first: Span, second: Span) -> Span:
    """The sums of the losses of two batches.

    The rows of both stay apart, since their coefficients differ, until one row for each loss in
    float64 takes less memory.
    """
    coefficients = torch.cat([first.coefficients, second.coefficients], 1)
    found = Span(first.values + second.values, coefficients, [*first.rows, *second.rows])
    if len(found.rows) <= 2 * len(found.values):
        return found
    c = found.coefficients.to(wide_type(found.values))
    columns = [_combined(c, column) for column in zip(*found.rows, strict=True)]
    one = torch.eye(len(c), dtype=c.dtype, device=c.device)
    return Span(found.values, one, [list(row) for row in zip(*columns, strict=True)])


def _combined(c: Tensor, column: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """K gradients by one parameter, of those of M rows."""
    shape = next((g for g in column if g is not None), None)
    if shape is None:
        return [None] * len(c)
    wide = torch.promote_types(shape.dtype, c.dtype)  # complex numbers stay complex
    rows = torch.stack([_dense(g, shape).to(wide).flatten() for g in column])
    return contained(c, rows)[0].view(len(c), *shape.shape).unbind()


# -- backward passes ------------------------------------------------------------------------------


def send_back(
    logits: Tensor, parameters: Sequence[Tensor], rows: Iterable[Tensor], skipped: int | None = None
) -> list[Row]:
    """The gradients of rows through the network; the graph is kept.

    Args:
        logits: with the graph back to the parameters.
        rows: derivatives by the logits, of their shape.
        skipped: a row that is not sent back; see `with_trained`.

    Raises:
        ValueError: the output does not depend on any of the parameters.
    """
    gradients: list[Row] = []
    with without_autocast(logits.device):
        for i, row in enumerate(rows):
            if i == skipped:
                gradients.append([None] * len(parameters))
                continue
            row = row.to(logits.dtype)
            found = torch.autograd.grad(
                logits, parameters, row, retain_graph=True, allow_unused=True
            )
            if all(gradient is None for gradient in found):
                raise ValueError("none of the parameters has a part in the output")
            gradients.append(found)
    return gradients


def without_autocast(device: torch.device) -> AbstractContextManager:
    """For backward passes: their operations have the types of those of the forward pass."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def is_linear(
    logits: Tensor, parameters: Sequence[Tensor], rows: Tensor, found: Sequence[Row]
) -> bool | None:
    """Whether backward passes add up, tested by two more; this reads numbers.

    One pass has a large negative multiple of each row. It finds hooks that clamp, take absolute
    values or normalise. The other one has zeros and finds hooks that add something.

    Args:
        rows: [M, *logits.shape].
        found: their gradients.

    Returns:
        None where NaN or infinity leaves it open.
    """
    half = logits.dtype in (torch.float16, torch.bfloat16)
    tolerance = 1e-6 if logits.dtype == torch.float64 else 0.1 if half else 0.01
    largest = 4.0 if logits.dtype == torch.float16 else 1024.0
    weights = -largest / torch.arange(1, len(rows) + 1, device=rows.device, dtype=rows.dtype)
    weights = torch.where(rows.abs().flatten(1).sum(1).isfinite(), weights, 0)
    sums = contained(weights[None], rows.flatten(1))[0].view_as(rows[0])
    together, none = send_back(logits, parameters, [sums, torch.zeros_like(sums)])
    if any(gradient is not None and gradient.any() for gradient in none):
        return False
    difference = torch.cat([weights, weights.new_tensor([-1])])
    c = torch.stack([difference, torch.cat([weights, weights.new_zeros(1)])])
    norms, _ = norms_and_cosines(c, blocks([*found, together]))
    return bool(norms[0] <= tolerance * norms[1]) if norms.isfinite().all() else None


def by_loss(rows: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """A row for each loss [K, *logits.shape], and coefficients [K, K], which are 1 or NaN."""
    sums, spoilt = contained(coefficients, rows.flatten(1))
    sums = torch.where(spoilt[:, None], 0, sums)
    one = torch.eye(len(sums), dtype=sums.dtype, device=sums.device)
    return sums.view(-1, *rows.shape[1:]), torch.where(spoilt & (one > 0), torch.nan, one)


def scaled(rows: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a size that float16 holds, and the coefficients that make up for it.

    Sums over the pixels of a row would overflow there, or the row's numbers vanish. The factors are
    powers of two, which round nothing.
    """
    sums = rows.abs().flatten(1).sum(1)
    _, exponent = torch.where(sums.isfinite(), sums, 1).frexp()
    scale = torch.exp2(10 - exponent)
    return rows * scale.view(-1, *[1] * (rows.ndim - 1)), coefficients / scale


def with_trained(found: Span, gradient: Row, loss: int, spare: int) -> Span:
    """The span with its spare row, since the training has computed the gradient of a loss anyway.

    Its gradient less the shares of the other rows is the spare row's. So the spare row becomes that
    gradient itself, and the coefficients change instead: with g = Σ_m a_m·J_m, a loss that holds
    c_s·J_s holds (c_s / a_s)·g and, of each other row, c_m - (c_s / a_s)·a_m.
    """
    c = found.coefficients.to(wide_type(found.values))
    # A loss without the spare row stays as it is, even if the trained one is not finite.
    ratio = torch.where(c[:, spare] == 0, 0, c[:, spare] / c[loss, spare])
    changed = c - ratio[:, None] * c[loss].nan_to_num(0, 0, 0)
    changed[:, spare] = ratio
    changed[loss] = 0  # the trained loss is the new row itself, without a rounding error
    changed[loss, spare] = 1
    rows = [gradient if i == spare else row for i, row in enumerate(found.rows)]
    return Span(found.values, changed, rows)


def is_gradient(gradient: Row, found: Span, loss: int) -> bool:
    """Whether a gradient is that of a loss of a span; this reads numbers."""
    tolerance = 1e-6 if found.values.dtype == torch.float64 else 0.01
    c = found.coefficients[loss]
    pair = torch.stack([torch.cat([c, c.new_tensor([x])]) for x in (-1, 0)])
    norms, _ = norms_and_cosines(pair, blocks([*found.rows, gradient]))
    return bool(norms[0] <= tolerance * norms[1])


# -- norms and cosines ----------------------------------------------------------------------------


def blocks(
    rows: Sequence[Row],
    like: Sequence[Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Tensor]:
    """J in blocks [M, B]; complex numbers count as two.

    Args:
        like: the parameters, if those without a gradient are to be there, too, as zeros.
        dtype: of the blocks, if it is not that of the gradients.
    """
    pending: list[tuple[Tensor, ...]] = []  # pieces of the M rows, side by side
    width = 0
    for i, column in enumerate(zip(*rows, strict=True)):
        shape = next((g for g in column if g is not None), None if like is None else like[i])
        if shape is None:
            continue
        filled = [_dense(g, shape) for g in column]
        real = [torch.view_as_real(g) if g.is_complex() else g for g in filled]
        flat = tuple(g.reshape(-1).to(dtype or g.dtype) for g in real)
        large = len(flat[0]) > CHUNK
        for pieces in zip(*(g.split(CHUNK) for g in flat), strict=True) if large else [flat]:
            pending.append(pieces)
            width += len(pieces[0])
            if width >= CHUNK:
                yield _block(pending)
                pending, width = [], 0
    if pending:
        yield _block(pending)


def _dense(g: Tensor | None, shape: Tensor) -> Tensor:
    """A gradient with all of its numbers; of an embedding it may be sparse."""
    if g is None:
        return torch.zeros(shape.shape, dtype=shape.dtype, device=shape.device)
    return g.to_dense() if g.layout != torch.strided else g


def _block(pending: Sequence[tuple[Tensor, ...]]) -> Tensor:
    return torch.stack([torch.cat(pieces) for pieces in zip(*pending, strict=True)])


def norms_and_cosines(coefficients: Tensor, parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Norms [K] of the gradients `coefficients @ J`, and cosines [K, K] of their pairs.

    With G = J·Jᵀ both follow from c·G·cᵀ, so the K gradients never exist. In float64, where the
    small difference of two large rows keeps its digits. The cosine with a gradient that vanishes is
    NaN. A row with NaN or infinity reaches only the losses that hold it: 0·NaN would reach all.

    Args:
        parts: J in blocks [M, B].
    """
    c = coefficients.to(wide_type(coefficients))
    products = c.new_zeros(c.shape[1], c.shape[1])
    for part in parts:
        part = part.to(c.dtype)
        products += part @ part.T
    inner = c @ products @ c.T
    if not inner.is_cpu or not inner.isfinite().all():  # a look at a GPU's numbers would wait
        inner = _contained_inner(c, products)
    norms = inner.diagonal().clamp_min(0).sqrt()
    return norms, inner / norms.outer(norms)


def _contained_inner(c: Tensor, products: Tensor) -> Tensor:
    """c·G·cᵀ, where what is not finite reaches only the losses that hold it."""
    squares = products.diagonal()
    ill = ~squares.isfinite()
    finite = torch.where(c.isfinite(), c, 0)
    inner = finite @ torch.where(ill | ill[:, None], 0, products) @ finite.T
    # What is not finite in the square of a loss's norm, infinity or NaN; 0 elsewhere.
    rest = torch.where((c != 0) & ill, squares, 0).sum(1) + torch.where(c.isfinite(), 0, c).sum(1)
    inner = torch.where((rest != 0) | (rest != 0)[:, None], torch.nan, inner)
    return torch.where(
        torch.eye(len(c), device=c.device, dtype=torch.bool) & (rest != 0), rest, inner
    )


def wide_type(x: Tensor) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def contained(coefficients: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """`coefficients @ rows`, where a row that is not finite reaches only the sums that hold it.

    Args:
        coefficients: [K, M].
        rows: [M, P].

    Returns:
        sums [K, P], NaN throughout where a coefficient, or a row that counts, is not finite; and
        for which of them that is so, [K].
    """
    ill = ~rows.abs().sum(1).isfinite()
    spoilt = ((coefficients != 0) & ill).any(1) | ~coefficients.isfinite().all(1)
    c = torch.where(coefficients.isfinite(), coefficients, 0).to(rows.dtype)
    sums = c @ torch.where(ill[:, None], 0, rows)
    return torch.where(spoilt[:, None], torch.nan, sums), spoilt
