"""What all losses on a table of sums have in common, and the derivative of any loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from losswatch.compat import recorded, traced
from losswatch.losses.frozen import Frozen
from losswatch.losses.inputs import evaluate
from losswatch.losses.ranks import RankSums, over_ranks, world_size
from losswatch.losses.sum_table import table
from losswatch.losses.sums import Recipe

# Divisors are at least TINY, so that 0 / 0 is 0 with finite gradients, and not NaN.
TINY = 1e-20

# One number, or one for each class, or K of these for K losses.
Numbers = float | tuple[float, ...] | tuple[tuple[float, ...], ...]


class TableLoss(Frozen):
    """A loss that `from_sums` computes from sums over pixels. `recipe` names these sums.

    Losses that differ only in their `free` settings have one formula. Their `from_sums` reads these
    settings from the keys of the sums, from `numbers` and from `members`. So it can serve K losses
    at once (loss_groups.py): each sum is then [K, C] and the values are [K].
    """

    recipe: Recipe
    one_channel: ClassVar[str]  # the loss that a message recommends for logits with one channel
    lists: dict[str, tuple[float, ...]]  # the settings with a number for each class
    free: frozenset[str] = frozenset()
    numbers: tuple[Numbers, ...] = ()
    members: tuple[Any, ...] = ()  # the losses that this one stands for

    def from_sums(self, sums: RankSums) -> Tensor:
        """The value, a scalar."""
        raise NotImplementedError

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        def value(logits: Tensor, target: Tensor) -> Tensor:
            check_shapes([self], logits, target)
            sums = table(logits, target, self.recipe)
            if is_empty(logits):
                return 0 * logits.sum()
            [joint] = over_ranks([sums]) if self.recipe.over == "batch" else [sums]
            return self.from_sums(RankSums(sums, joint))

        return evaluate(value, logits, target, self.recipe.ignore_index)

    def check_channels(self, shape: tuple[int, ...]) -> None:
        """Check that logits of this shape [N, C, *space] have the channels that the loss needs.

        Raises:
            ValueError: the number of channels is not allowed.
        """
        for name, values in self.lists.items():
            if len(values) != shape[1]:
                raise ValueError(
                    f"{name} for {len(values)} classes, but logits {shape} have {shape[1]}"
                )
        if shape[1] == 1 and self.recipe.activation == "softmax":
            raise ValueError(
                f"logits: {shape} have one channel, whose softmax is 1 everywhere; the loss for it "
                f"is {self.one_channel}, with a target of that shape"
            )


def check_shapes(losses: Sequence[TableLoss], logits: Tensor, target: Tensor) -> None:
    """Check that logits and target have shapes and types that these losses can take.

    Raises:
        ValueError: a shape or a type is not allowed.
    """
    target_shape, shape = tuple(target.shape), tuple(logits.shape)
    if logits.ndim < 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits: {logits.dtype} {shape}, allowed is floating point [N, C, *space]"
        )
    for loss in losses:
        loss.check_channels(shape)
    if target.is_complex():
        raise ValueError(
            f"target: {target.dtype} {target_shape}, allowed are integers or real labels"
        )
    if target_shape == shape:
        for index in {loss.recipe.ignore_index for loss in losses} & {0, 1}:
            raise ValueError(
                f"target: among one-hot or soft labels ignore_index={index} cannot be told from a "
                "label; give class indices, or mark ignored pixels by another number"
            )
        if target.requires_grad:
            raise ValueError("target: it requires a gradient, which no loss here gives; detach it")
    elif target_shape != (shape[0], *shape[2:]) or shape[1] == 1:
        indices = "" if shape[1] == 1 else f"class indices {(shape[0], *shape[2:])} or "
        raise ValueError(f"target: shape {target_shape}, allowed are {indices}labels {shape}")
    elif target.is_floating_point():
        raise ValueError(f"target: {target.dtype} {target_shape}, class indices must be integers")


def gradient(
    function: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor]]:
    """The values that a function returns, and the derivatives of their sum by its inputs."""
    if traced(inputs[0]):

        def total(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            values = function(inputs)
            return values.sum(), values

        slopes, values = torch.func.grad(total, has_aux=True)(inputs)
        return values, slopes
    with torch.enable_grad():  # not torch.func, which refuses some autograd.Functions
        leaves = [x.detach().requires_grad_() for x in inputs]
        values = function(leaves)
        if not isinstance(values, Tensor) or not values.requires_grad:  # as after an argmax
            return values, [torch.zeros_like(leaf) for leaf in leaves]
        slopes = torch.autograd.grad(values.sum(), leaves, materialize_grads=True)
    return values.detach(), slopes


def value_and_slope(loss: nn.Module, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The value of any loss, and its derivative by the logits, of their shape."""
    value, [slope] = gradient(lambda inputs: loss(inputs[0], target), [logits])
    return value, slope


def is_empty(logits: Tensor) -> bool:
    """Whether there are no pixels, so that every loss is 0. False with several ranks."""
    return logits.numel() == 0 and world_size() == 1


# -- numbers for each class ------------------------------------------------------------------------


def merged(numbers: Sequence[Numbers]) -> Numbers:
    """One setting of K losses as one value.

    >>> merged([0.5, 0.5]), merged([0.5, 1.0])
    (0.5, ((0.5,), (1.0,)))
    """
    if len(set(numbers)) == 1:
        return numbers[0]
    return tuple(x if isinstance(x, tuple) else (x,) for x in numbers)  # type: ignore


def class_tensor(numbers: Numbers, like: Tensor) -> float | Tensor:
    """A setting as a number, or as a tensor with the type and device of `like`.

    The tensor is [C] for one loss, and [K, C] or [K, 1] for K losses. A compiler only sees [C].
    """
    if not isinstance(numbers, tuple):
        return numbers
    if recorded():
        return torch.stack([like.new_full((), number) for number in numbers])  # type: ignore
    return _on_device(numbers, like.dtype, like.device)


@cache  # a copy to a GPU at every call would make the host wait
def _on_device(numbers: Numbers, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # tensors of inference mode cannot be used for training
        return torch.tensor(numbers, dtype=dtype, device=device)
