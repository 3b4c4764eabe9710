"""The gradients of many losses by a network's parameters, from few backward passes.

A loss sends its derivative by the logits back into the network. These derivatives lie in a small
space (`LossSet.rows`): for two classes, four rows span those of cross entropy and of any number of
Dice variants. One backward pass for each row gives a matrix J [M, P], and the gradient of loss k is
exactly `coefficients[k] @ J`. Neither J nor the gradients exist as a whole. The rows stay as
PyTorch returns them, and the code here reads them block by block.

This needs a linear backward pass. A hook that clamps gradients makes it not linear, so the first
observation tests it (`is_linear`). If the backward pass is not linear, each loss gets its own pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 2**16  # columns of J in a block, which fits in the cache of a CPU

Row = Sequence[Tensor | None]  # a gradient by all parameters; None means 0


class GradientSpan(NamedTuple):
    """K losses of one or several batches: values, and gradients `coefficients @ rows`."""

    values: Tensor  # [K]
    coefficients: Tensor  # [K, M]
    rows: list[Row]  # M


def concat_spans(spans: Sequence[GradientSpan]) -> GradientSpan:
    """The losses of several spans as one."""
    if len(spans) == 1:
        return spans[0]
    return GradientSpan(
        torch.cat([span.values for span in spans]),
        torch.block_diag(*(span.coefficients for span in spans)),
        [row for span in spans for row in span.rows],
    )


def reorder(span: GradientSpan, names: Sequence[str], order: Sequence[str]) -> GradientSpan:
    """A span with its losses, called `names`, in another order of the names."""
    if list(names) == list(order):
        return span
    places = [names.index(name) for name in order]
    values, coefficients = (
        torch.stack([x[i] for i in places]) for x in (span.values, span.coefficients)
    )
    return GradientSpan(values, coefficients, span.rows)


def add_spans(first: GradientSpan, second: GradientSpan) -> GradientSpan:
    """The sums of the losses of two batches.

    The rows of both batches stay separate, because their coefficients differ. When one row for each
    loss in float64 takes less memory, these replace them.
    """
    coefficients = torch.cat([first.coefficients, second.coefficients], 1)
    span = GradientSpan(first.values + second.values, coefficients, [*first.rows, *second.rows])
    if len(span.rows) <= 2 * len(span.values):
        return span
    c = span.coefficients.to(wide_type(span.values))
    columns = [_combine_column(c, column) for column in zip(*span.rows, strict=True)]
    one = torch.eye(len(c), dtype=c.dtype, device=c.device)
    return GradientSpan(span.values, one, [list(row) for row in zip(*columns, strict=True)])


def _combine_column(c: Tensor, column: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients of K losses by one parameter, from those of M rows."""
    shape = next((g for g in column if g is not None), None)
    if shape is None:
        return [None] * len(c)
    wide = torch.promote_types(shape.dtype, c.dtype)  # complex numbers stay complex
    rows = torch.stack([_dense(g, shape).to(wide).flatten() for g in column])
    return combine(c, rows)[0].view(len(c), *shape.shape).unbind()


# -- backward passes ------------------------------------------------------------------------------


def send_back(
    logits: Tensor,
    parameters: Sequence[Tensor],
    rows: Iterable[Tensor],
    skip_row: int | None = None,
) -> list[Row]:
    """The gradients of rows through the network; the graph is kept.

    Args:
        logits: with the graph back to the parameters.
        rows: derivatives by the logits, with their shape.
        skip_row: the index of a row that is not sent back; see `with_trained`.

    Raises:
        ValueError: the output does not depend on any of the parameters.
    """
    gradients: list[Row] = []
    with without_autocast(logits.device):
        for i, row in enumerate(rows):
            if i == skip_row:
                gradients.append([None] * len(parameters))
                continue
            row = row.to(logits.dtype)
            own = torch.autograd.grad(logits, parameters, row, retain_graph=True, allow_unused=True)
            if all(gradient is None for gradient in own):
                raise ValueError("none of the parameters has a part in the output")
            gradients.append(own)
    return gradients


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Switch autocast off: a backward pass has the types of its forward pass already."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def is_linear(
    logits: Tensor, parameters: Sequence[Tensor], rows: Tensor, gradients: Sequence[Row]
) -> bool | None:
    """Whether the backward pass is linear, tested by two more passes. Reads numbers.

    One pass gets a large negative multiple of each row. It finds hooks that clamp, take absolute
    values or normalise. The other pass gets zeros. It finds hooks that add something.

    Args:
        rows: [M, *logits.shape].
        gradients: those of the rows.

    Returns:
        None if NaN or infinity prevents an answer.
    """
    half = logits.dtype in (torch.float16, torch.bfloat16)
    tolerance = 1e-6 if logits.dtype == torch.float64 else 0.1 if half else 0.01
    largest = 4.0 if logits.dtype == torch.float16 else 1024.0
    weights = -largest / torch.arange(1, len(rows) + 1, device=rows.device, dtype=rows.dtype)
    weights = torch.where(rows.abs().flatten(1).sum(1).isfinite(), weights, 0)
    sums = combine(weights[None], rows.flatten(1))[0].view_as(rows[0])
    together, none = send_back(logits, parameters, [sums, torch.zeros_like(sums)])
    if any(gradient is not None and gradient.any() for gradient in none):
        return False
    difference = torch.cat([weights, weights.new_tensor([-1])])
    c = torch.stack([difference, torch.cat([weights, weights.new_zeros(1)])])
    norms, _ = norms_and_cosines(c, blocks([*gradients, together]))
    return bool(norms[0] <= tolerance * norms[1]) if norms.isfinite().all() else None


def by_loss(rows: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """A row for each loss [K, *logits.shape], and coefficients [K, K] with 1 or NaN as diagonal."""
    sums, spoilt = combine(coefficients, rows.flatten(1))
    sums = torch.where(spoilt[:, None], 0, sums)
    one = torch.eye(len(sums), dtype=sums.dtype, device=sums.device)
    return sums.view(-1, *rows.shape[1:]), torch.where(spoilt & (one > 0), torch.nan, one)


def scale_rows(rows: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Rows scaled for float16, and coefficients divided by the scales.

    Without this, sums over the pixels of a row could overflow in float16, or its numbers vanish.
    The factors are powers of two, so nothing is rounded.
    """
    sums = rows.abs().flatten(1).sum(1)
    _, exponent = torch.where(sums.isfinite(), sums, 1).frexp()
    scale = torch.exp2(10 - exponent)
    return rows * scale.view(-1, *[1] * (rows.ndim - 1)), coefficients / scale


def with_trained(span: GradientSpan, gradient: Row, loss: int, own_row: int) -> GradientSpan:
    """The span with row `own_row` replaced by `gradient`, which the training has computed anyway.

    The gradient g = Σ_m a_m·J_m of the trained loss replaces J_s, the row `own_row`. So the
    coefficients change: instead of c_s·J_s, a loss contains (c_s / a_s)·g, and each of its other
    coefficients c_m becomes c_m - (c_s / a_s)·a_m.

    Args:
        loss: the index of the trained loss.
    """
    c = span.coefficients.to(wide_type(span.values))
    # A loss that does not contain the row stays unchanged, even if the trained one is not finite.
    ratio = torch.where(c[:, own_row] == 0, 0, c[:, own_row] / c[loss, own_row])
    changed = c - ratio[:, None] * c[loss].nan_to_num(0, 0, 0)
    changed[:, own_row] = ratio
    changed[loss] = 0  # the trained loss is the new row, without rounding errors
    changed[loss, own_row] = 1
    rows = [gradient if i == own_row else row for i, row in enumerate(span.rows)]
    return GradientSpan(span.values, changed, rows)


def is_gradient(gradient: Row, span: GradientSpan, loss: int) -> bool:
    """Whether a gradient equals that of loss number `loss` of a span. Reads numbers."""
    tolerance = 1e-6 if span.values.dtype == torch.float64 else 0.01
    c = span.coefficients[loss]
    pair = torch.stack([torch.cat([c, c.new_tensor([x])]) for x in (-1, 0)])
    norms, _ = norms_and_cosines(pair, blocks([*span.rows, gradient]))
    return bool(norms[0] <= tolerance * norms[1])


# -- norms and cosines ----------------------------------------------------------------------------


def blocks(
    rows: Sequence[Row],
    like: Sequence[Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Tensor]:
    """J in blocks [M, B]; complex numbers count as two.

    Args:
        like: the parameters, if the blocks need zeros for those without a gradient.
        dtype: of the blocks; by default, that of the gradients.
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
    """A gradient as a dense tensor; that of an embedding may be sparse, None is 0."""
    if g is None:
        return torch.zeros(shape.shape, dtype=shape.dtype, device=shape.device)
    return g.to_dense() if g.layout != torch.strided else g


def _block(pending: Sequence[tuple[Tensor, ...]]) -> Tensor:
    return torch.stack([torch.cat(pieces) for pieces in zip(*pending, strict=True)])


def norms_and_cosines(coefficients: Tensor, parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Norms [K] of the gradients `coefficients @ J`, and cosines [K, K] of their pairs.

    With G = J·Jᵀ both follow from c·G·cᵀ, so the K gradients never exist. The products are float64,
    so that the small difference of two large rows keeps its digits. The cosine with a gradient of 0
    is NaN. A row with NaN or infinity changes only the losses that contain it, although 0·NaN is
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
    if not inner.is_cpu or not inner.isfinite().all():  # reading the numbers of a GPU would wait
        inner = _inner_products(c, products)
    norms = inner.diagonal().clamp_min(0).sqrt()
    return norms, inner / norms.outer(norms)


def _inner_products(c: Tensor, products: Tensor) -> Tensor:
    """c·G·cᵀ, where a row that is not finite changes only the losses that contain it."""
    squares = products.diagonal()
    ill = ~squares.isfinite()
    finite = torch.where(c.isfinite(), c, 0)
    inner = finite @ torch.where(ill | ill[:, None], 0, products) @ finite.T
    # For each loss the part of its squared norm that is not finite (infinity or NaN), else 0.
    rest = torch.where((c != 0) & ill, squares, 0).sum(1) + torch.where(c.isfinite(), 0, c).sum(1)
    inner = torch.where((rest != 0) | (rest != 0)[:, None], torch.nan, inner)
    return torch.where(
        torch.eye(len(c), device=c.device, dtype=torch.bool) & (rest != 0), rest, inner
    )


def wide_type(x: Tensor) -> torch.dtype:
    """float64, or float32 on a device without it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def combine(coefficients: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """`coefficients @ rows`, where a row that is not finite changes only sums that contain it.

    Args:
        coefficients: [K, M].
        rows: [M, P].

    Returns:
        the sums [K, P], and which of them are spoilt [K]: a coefficient, or a row that the sum
        contains, is not finite. A spoilt sum is NaN everywhere.
    """
    ill = ~rows.abs().sum(1).isfinite()
    spoilt = ((coefficients != 0) & ill).any(1) | ~coefficients.isfinite().all(1)
    c = torch.where(coefficients.isfinite(), coefficients, 0).to(rows.dtype)
    sums = c @ torch.where(ill[:, None], 0, rows)
    return torch.where(spoilt[:, None], torch.nan, sums), spoilt
