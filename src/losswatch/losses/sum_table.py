"""The table of sums as one differentiable function of the logits."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from losswatch.compat import grad_levels, is_functorch_active, traced
from losswatch.losses import fast
from losswatch.losses import pixels as plain
from losswatch.losses.pixels import Pixels, counted, counted_labels, is_hard, one_hot
from losswatch.losses.sums import Recipe, Sums

ONCE = "second derivatives: the gradient of a loss cannot be differentiated again"


def table(logits: Tensor, target: Tensor, recipe: Recipe) -> Sums:
    """The sums, differentiable once by the logits; float32, or float64 for float64 logits."""
    if not torch.compiler.is_compiling() and grad_levels(logits) > 1:
        raise NotImplementedError(ONCE)
    logit_sums, labels, *_ = _Table.apply(logits, target, recipe)
    return as_sums(logit_sums, labels, logits, target, recipe)


def as_sums(
    logit_sums: Tensor, labels: Tensor, logits: Tensor, target: Tensor, recipe: Recipe
) -> Sums:
    """The sums by the logits and those of the labels, each [*groups, S, C], by name."""
    exponents = recipe.label_exponents(is_hard(logits, target))
    return Sums(
        dict(zip(recipe.keys(), logit_sums.unbind(-2), strict=True)),
        dict(zip(exponents, labels.unbind(-2), strict=True)),
        logits.numel() / logits.shape[1],
    )


def pixels_and_sums(
    logits: Tensor, target: Tensor, recipe: Recipe
) -> tuple[Pixels, Tensor, Tensor]:
    """The pixels, the sums by the logits, and those of the labels, in the fastest form."""
    if fast.is_fast(logits, target, recipe):
        pixels = fast.read_pixels(logits, target, recipe)
        return pixels, *fast.sums_of(pixels, target, recipe)
    pixels = plain.read_pixels(logits, target, recipe)
    return pixels, *plain.sums_of(pixels, recipe, is_hard(logits, target))


def by_logits(slopes: Tensor, pixels: Pixels, target: Tensor, recipe: Recipe) -> Tensor:
    """The derivative by the logits, from those by the sums, in the fastest form."""
    if pixels.p_of_label is not None and not traced(slopes):  # torch.vmap may batch the slopes
        return fast.by_logits(slopes, pixels, target, recipe)
    return plain.by_logits(slopes, with_labels(pixels, target, recipe), recipe)


def with_labels(pixels: Pixels, target: Tensor, recipe: Recipe) -> Pixels:
    """The pixels with y, which the fast form leaves out for more than two classes."""
    if pixels.y.shape == pixels.p.shape:
        return pixels
    label, valid = counted(target, pixels.p, recipe)
    return pixels._replace(y=one_hot(label, pixels.p, valid))


class _Table(torch.autograd.Function):
    """See `table`. Returns also the tensors for its backward, because torch.func needs them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, target: Tensor, recipe: Recipe) -> tuple[Tensor, ...]:
        pixels, logit_sums, labels = pixels_and_sums(logits, target, recipe)
        p, none = pixels.p, pixels.p.new_empty(0)
        # An output must not be an input, and soft labels are one.
        y = pixels.y if is_hard(logits, target) else none
        return logit_sums, labels, p, y, none if pixels.p_of_label is None else pixels.p_of_label

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        logits, target, ctx.recipe = inputs
        _, labels, *kept = output
        ctx.dtype, ctx.shape, ctx.hard = logits.dtype, logits.shape, is_hard(logits, target)
        ctx.save_for_backward(target, *kept)
        ctx.mark_non_differentiable(labels, *kept)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, None, None]:
        if g is None:
            return None, None, None
        # In a backward pass gradients are enabled by create_graph=True, and by torch.func always.
        if torch.is_grad_enabled() and not is_functorch_active():
            raise NotImplementedError(ONCE)
        (target, p, y, p_of_label), recipe = ctx.saved_tensors, ctx.recipe
        if ctx.hard:
            valid = counted(target, p, recipe)[1]
        else:
            y, valid = counted_labels(target, p, recipe)
        pixels = Pixels(p, y, valid, p_of_label=p_of_label if p_of_label.numel() else None)
        with torch.no_grad():
            gradient = by_logits(g, pixels, target, recipe)
        return gradient.view(ctx.shape).to(ctx.dtype), None, None


# Without this, `apply` would compute the signature at every call.
_Table.forward.__signature__ = inspect.signature(_Table.forward)  # type: ignore[attr-defined]
