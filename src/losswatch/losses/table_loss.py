"""Losses that are functions of one table of sums: their values, and their derivatives by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from losswatch.compat import traced
from losswatch.losses.inputs import check_shapes, explained
from losswatch.losses.pixels import is_hard
from losswatch.losses.settings import Frozen
from losswatch.losses.sums import Recipe, Sums
from losswatch.losses.table import Table, table

# A divisor is at least TINY: 0 / 0 is 0 then, with finite gradients, and not NaN.
TINY = 1e-20


class RankSums(NamedTuple):
    """The sums over the batch of this rank, and over the batches of all ranks."""

    local: Sums
    joint: Sums


class TableLoss(Frozen):
    """A loss of sums over pixels. `recipe` says of which, `from_sums` how."""

    recipe: Recipe
    one_channel: ClassVar[str]  # the loss to take for logits of one channel, which softmax is not
    lists: dict[str, tuple[float, ...]]  # the settings with a number for each class

    def from_sums(self, sums: RankSums) -> Tensor:
        """The value, a scalar."""
        raise NotImplementedError

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        def value(logits: Tensor, target: Tensor) -> Tensor:
            check_shapes([self], logits, target)
            return evaluate([self], self.recipe, logits, target)[0]

        return explained(value, logits, target, self.recipe.ignore_index)

    def check_channels(self, shape: tuple[int, ...]) -> None:
        """See that logits of this shape [N, C, *space] have the channels that the loss needs.

        Raises:
            ValueError: they have not.
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


def evaluate(
    losses: Sequence[nn.Module], recipe: Recipe, logits: Tensor, target: Tensor
) -> list[Tensor]:
    """The values of losses on one table; `recipe` serves all of them."""
    sums = table(logits, target, recipe)
    if is_empty(logits):
        return [0 * sums.moving.sum()] * len(losses)
    both = named(sums, over_ranks(sums), recipe, is_hard(logits, target))
    return [loss.from_sums(both) for loss in losses]  # type: ignore[operator]


def values_and_jacobian(
    losses: Sequence[nn.Module], recipe: Recipe, sums: Table, hard: bool
) -> tuple[Tensor, Tensor]:
    """The values [K] of losses, and their derivatives [K, S, C] by the moving sums [S, C].

    Each loss gets a copy of the sums, so one backward pass gives all derivatives.
    """

    def total(copies: Tensor) -> tuple[Tensor, Tensor]:
        joint, values = over_ranks(sums._replace(moving=copies)), []
        for loss, *moving in zip(losses, copies.unbind(), joint.moving.unbind(), strict=True):
            tables = (t._replace(moving=m) for t, m in zip((sums, joint), moving, strict=True))
            values.append(loss.from_sums(named(*tables, recipe, hard)))  # type: ignore[operator]
        stacked = torch.stack(values)
        return stacked.sum(), stacked

    jacobian, values = gradient(total, sums.moving.expand(len(losses), *sums.moving.shape))
    return values.detach(), jacobian


def named(local: Table, joint: Table, recipe: Recipe, hard: bool) -> RankSums:
    """Tables as sums by name."""
    first = Sums(*local, recipe, hard)
    return RankSums(first, first if joint is local else Sums(*joint, recipe, hard))


def gradient(function: Callable[[Tensor], tuple[Tensor, Any]], x: Tensor) -> tuple[Tensor, Any]:
    """The gradient of a function by x, and what else it returns.

    Args:
        function: returns a scalar, and anything.
    """
    if traced(x):
        return torch.func.grad(function, has_aux=True)(x)
    with torch.enable_grad():  # torch.func would not take every autograd.Function
        leaf = x.detach().requires_grad_()
        value, rest = function(leaf)
        [slope] = torch.autograd.grad(value, leaf)
    return slope, rest


def value_and_slope(loss: nn.Module, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The value of any loss, and its derivative by the logits, of their shape."""

    def value(x: Tensor) -> tuple[Tensor, Tensor]:
        value = loss(x, target)
        return value, value.detach()

    slope, detached = gradient(value, logits)
    return detached, slope


# -- ranks -----------------------------------------------------------------------------------------


def world_size() -> int:
    """The number of ranks that train together; 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _OverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * dist.get_world_size()


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over all ranks.

    Its gradient is scaled by the number of ranks: `DistributedDataParallel` averages gradients over
    ranks, and so gets the gradient of the joined batch.
    """
    return _OverRanks.apply(x)


def over_ranks(sums: Table) -> Table:
    """The sums over the batches of all ranks, in one all-reduce."""
    if world_size() == 1:
        return sums
    parts = [sums.moving, sums.labels, sums.moving.new_full((1,), sums.pixels)]
    flat = sum_over_ranks(torch.cat([part.reshape(-1) for part in parts]))
    pieces = flat.split([part.numel() for part in parts])
    return Table(*(f.view(part.shape) for f, part in zip(pieces, parts, strict=True)))


def is_empty(logits: Tensor) -> bool:
    """Whether no rank has a pixel; then every loss is 0."""
    return logits.numel() == 0 and world_size() == 1


# -- numbers for each class ------------------------------------------------------------------------


def per_class(numbers: float | tuple[float, ...], like: Tensor) -> float | Tensor:
    """A setting as a number, or as a tensor [C] of the type and on the device of `like`."""
    if not isinstance(numbers, tuple):
        return numbers
    if traced(like):
        return torch.tensor(numbers, dtype=like.dtype, device=like.device)
    return _on_device(numbers, like.dtype, like.device)


@cache  # a copy to a GPU at every call would make the host wait
def _on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # tensors of inference mode cannot be used for training
        return torch.tensor(numbers, dtype=dtype, device=device)
