"""Losses made of losses: weighted sums, and sets that are evaluated together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from losswatch.compat import has_hooks, recorded, traced
from losswatch.losses.cross_entropy import CrossEntropy
from losswatch.losses.dice import Dice
from losswatch.losses.frozen import Frozen, is_number
from losswatch.losses.inputs import evaluate
from losswatch.losses.loss_groups import (
    Group,
    copies,
    group_key,
    make_group,
    values,
    values_and_jacobian,
)
from losswatch.losses.pixels import is_hard, one_hot, wide
from losswatch.losses.ranks import RankSums
from losswatch.losses.rows import by_spanning_sums, make_rows, spanning_sums
from losswatch.losses.sum_table import as_sums, by_logits, pixels_and_sums, table, with_labels
from losswatch.losses.sums import Recipe
from losswatch.losses.table_loss import TableLoss, check_shapes, is_empty, value_and_slope


class Sum(Frozen):
    """Weighted sum of losses, such as Dice + cross entropy.

    Args:
        losses: modules (logits, target) -> scalar, at least one.
        weights: a finite number for each loss; None: 1 for each loss.

    Raises:
        ValueError: there is no loss, or the weights are not one finite number for each loss.

    >>> logits, target = torch.zeros(1, 2, 3), torch.tensor([[0, 1, 1]])
    >>> f"{Sum([Dice(), CrossEntropy()], weights=[1, 0.5])(logits, target):.4f}"
    '0.8609'
    """

    def __init__(self, losses: Sequence[nn.Module], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.losses = tuple(losses)
        self.weights = tuple([1.0] * len(losses) if weights is None else weights)
        if len(self.weights) != len(losses) or not losses:
            raise ValueError(
                f"weights={weights!r}: one per loss is needed, and there are {len(losses)} losses"
            )
        for weight in self.weights:
            if not is_number(weight) or not math.isfinite(weight):
                raise ValueError(f"weights={weights!r}: allowed are finite numbers")
        self.together = LossSet({str(i): loss for i, loss in enumerate(losses)})
        ours = [loss for loss in losses if isinstance(loss, Dice | CrossEntropy | Sum)]
        indices = [loss.ignore_index for loss in ours]
        self.ignore_index: int | None = next((i for i in indices if i is not None), None)
        self.freeze(Sum.__init__)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        def value(logits: Tensor, target: Tensor) -> Tensor:
            return self._add(self.together(logits, target).unbind())

        return evaluate(value, logits, target, self.ignore_index)

    def from_sums(self, sums: RankSums) -> Tensor:
        """The value, a scalar; all parts must be functions of one table."""
        return self._add([part.from_sums(sums) for part in self.losses])  # type: ignore[operator]

    def _add(self, values: Sequence[Tensor]) -> Tensor:
        return sum(w * v for w, v in zip(self.weights, values, strict=True))  # type: ignore


class OneHotTarget(nn.Module):
    """Gives one-hot targets [N, C, *space] to a loss of another library that needs them.

    >>> from monai.losses import DiceLoss
    >>> logits, target = torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.int64)
    >>> f"{OneHotTarget(DiceLoss(softmax=True))(logits, target):.4f}"
    '0.6667'
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.loss(logits, one_hot(target.unsqueeze(1), wide(logits)).to(logits.dtype))


class LossSet(nn.Module):
    """Many losses of the same logits, evaluated together.

    Losses that read one kind of table share it: Dice losses over the batch and cross entropies
    with one activation and one ignore_index, and sums of them. Only `Dice`, `CrossEntropy` and
    `Sum` themselves share a table: a subclass, a module with hooks and any other module (logits,
    target) -> scalar is foreign. A foreign loss is called as it is. So a set works under
    `torch.func` and `torch.compile` if its foreign losses do. `forward` does not check labels and
    logits: see `check_inputs`.

    Raises:
        ValueError: there are no losses.

    >>> losses = LossSet({"dice": Dice(), "cce": CrossEntropy()})
    >>> losses(torch.zeros(1, 2, 3), torch.tensor([[0, 1, 1]]))
    tensor([0.5143, 0.6931])
    """

    def __init__(self, losses: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not losses:
            raise ValueError("losses: at least one is needed")
        self.names = tuple(losses)
        self.losses = tuple(losses.values())  # a tuple, because `_plan` has used them
        for i, loss in enumerate(self.losses):
            self.add_module(str(i), loss)
        self._plan()

    def _plan(self) -> None:
        """Decide which losses share a table, and which are called as they are."""
        recipes = {loss: shared_recipe(loss) for loss in self.losses}
        families = Counter(recipe.family for recipe in recipes.values() if recipe)
        common = families.most_common(1)[0][0] if families else None
        shared = {loss: r for loss, r in recipes.items() if r and r.family == common}
        # From here on, losses that share come first, and losses of one group stand side by side.
        alike: dict[Hashable, list[nn.Module]] = {}
        for loss in shared:
            alike.setdefault(group_key(loss), []).append(loss)
        self.sharing = tuple(loss for losses in alike.values() for loss in losses)
        keys = {loss: recipe.keys() for loss, recipe in shared.items()}
        self.groups = [make_group(losses, keys) for losses in alike.values()]
        self.singles = [make_group([loss], keys) for loss in self.sharing]
        self.foreign = tuple(dict.fromkeys(loss for loss in self.losses if loss not in shared))
        self.parts = tuple(part for loss in self.sharing for part in table_parts(loss))
        used = list(shared.values()) or [Recipe()]
        self.recipe = used[0].union(used)
        ordered = (*self.sharing, *self.foreign)
        self.places = [ordered.index(loss) for loss in self.losses]
        self.is_ordered = self.places == list(range(len(ordered)))

    def _plan_around_hooks(self) -> None:
        """Plan again if a loss that shares has got a hook since the last plan."""
        if any(has_hooks(part) for loss in self.sharing for part in with_parts(loss)):
            self._plan()

    def is_foreign(self, name: str) -> bool:
        """Whether loss `name` shares no table: it is called as it is."""
        return any(self.losses[self.names.index(name)] is loss for loss in self.foreign)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Values [K], float32 (float64 for float64 logits), differentiable by the logits."""
        self._plan_around_hooks()
        found = []
        if self.sharing:
            check_shapes(self.parts, logits, target)
            sums = table(logits, target, self.recipe)
            groups = self._groups()
            value = values(groups, copies(groups, sums), sums)
            found.append(torch.zeros_like(value) * logits.sum() if is_empty(logits) else value)
        found += [wide(loss(logits, target)).view(1) for loss in self.foreign]
        return self._in_order(torch.cat(found))

    def check(self, logits: Tensor, target: Tensor) -> None:
        """Check that logits and target have shapes and types that the shared losses can take.

        Raises:
            ValueError: a shape or a type is not allowed.
        """
        check_shapes(self.parts, logits, target)

    @torch.no_grad()
    def rows(
        self,
        logits: Tensor,
        target: Tensor,
        failed: dict[str, Exception] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """values [K], rows [M, *logits.shape] and coefficients [K, M], with

            d values[k] / d logits = Σ_m coefficients[k, m] · rows[m]

        exactly, for all k. M is at most K and depends only on the settings and shapes. So one
        backward pass per row through a network gives the parameter gradients of all losses. With
        two classes, four rows serve cross entropy and any number of Dice losses with exponents 1
        and 2. The rows are a transposed view of one contiguous [N, M, C, *space] buffer.

        Args:
            failed: if given, collects the errors of foreign losses by name. The value and the
                coefficient of a loss that fails are NaN, and its row is 0.

        Raises:
            ValueError: the shared losses cannot take these shapes, or a foreign loss returns no
                scalar or changes its input.
            Exception: any error of a foreign loss, unless `failed` is given.
        """
        self._plan_around_hooks()
        logits = logits.detach()
        found, slopes, blocks = [], [], []
        if self.sharing:
            value, block, slope = self._shared_rows(logits, target)
            found, slopes, blocks = [value], [slope], [block]
        names = {id(loss): name for name, loss in zip(self.names, self.losses, strict=True)}
        for loss in self.foreign:
            try:
                value, row = _scalar_and_slope(loss, names[id(loss)], logits, target)
                slope = torch.ones_like(value)
            except Exception as error:
                if failed is None:
                    raise
                failed[names[id(loss)]] = error
                row = torch.zeros_like(logits)
                value = slope = wide(logits).new_full((1,), math.nan)
            found.append(value)
            slopes.append(slope.view(1, 1))
            blocks.append(wide(row).unsqueeze(1))
        value, block = torch.cat(found), torch.cat(blocks, 1).transpose(0, 1)
        slope = torch.block_diag(*slopes) if self.foreign else slopes[0]
        return self._in_order(value), block, self._in_order(slope)

    def _in_order(self, x: Tensor) -> Tensor:
        """Numbers of each loss, [K, ...], in the order of `names`."""
        if self.is_ordered:
            return x
        parts = x.unbind()  # an index would be a constant of a compiled graph
        return torch.stack([parts[place] for place in self.places])

    def _shared_rows(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values [K], rows [N, M, C, *space] and coefficients [K, M] of losses that share."""
        check_shapes(self.parts, logits, target)
        hard, recipe = is_hard(logits, target), self.recipe
        pixels, logit_sums, labels = pixels_and_sums(logits, target, recipe)
        sums = as_sums(logit_sums, labels, logits, target, recipe)
        value, jacobian = values_and_jacobian(self._groups(), sums)
        if hard and self._rows_are_sums(classes := logits.shape[1]):
            labelled = with_labels(pixels, target, recipe)
            block = make_rows(list(spanning_sums(recipe, classes)), labelled, recipe)
            slopes = by_spanning_sums(jacobian, recipe)
        else:
            block = torch.stack([by_logits(s, pixels, target, recipe) for s in jacobian], 1)
            slopes = torch.eye(len(value), dtype=value.dtype, device=value.device)
        if is_empty(logits):
            value, slopes = torch.zeros_like(value), torch.zeros_like(slopes)
        return value, block.view(*block.shape[:2], *logits.shape[1:]), slopes

    def _groups(self) -> list[Group]:
        """The groups to evaluate: those of single losses for a compiler, which fuses them."""
        return self.singles if recorded() else self.groups

    def _rows_are_sums(self, classes: int) -> bool:
        """Whether the rows are gradients of sums and not of losses, because sums are fewer."""
        plain = self.recipe.activation == "softmax" and self.recipe.intersection == "product"
        return plain and len(spanning_sums(self.recipe, classes)) <= len(self.sharing)

    def steady_row(self, name: str, num_classes: int) -> int | None:
        """Index of a row on which loss `name` always has a coefficient well away from 0.

        None if the data can make each of its coefficients vanish: an absent class counts as zero,
        a denominator is at its floor, the slope of a link is 0, or fn has no weight. The index
        holds for targets of class indices.
        """
        labels = list(spanning_sums(self.recipe, num_classes))
        place = self.places[self.names.index(name)]
        if not self._rows_are_sums(num_classes):
            return place
        if place >= len(self.sharing):
            return len(labels) + place - len(self.sharing)
        steady = []
        for weight, part in weighted_parts(self.sharing[place]):
            if weight and isinstance(part, CrossEntropy) and not self.recipe.by_class:
                steady.append(labels.index((("log", part.clip or 0.0), None)))
            elif weight and isinstance(part, Dice) and part.is_steady:
                steady.append(labels.index((("yp", 1.0), 1)))  # class 1 counts in every Dice
        return max(steady, default=None)  # prefers the row of a cross entropy


def _scalar_and_slope(
    loss: nn.Module, name: str, logits: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """The value [1] of a loss, and its derivative by the logits.

    Raises:
        ValueError: the loss returns no scalar, or changes its input.
    """
    inputs = {"logits": logits.clone(), "target": target.clone()}  # other losses read the originals
    versions = {key: None if traced(x) else x._version for key, x in inputs.items()}
    value, row = value_and_slope(loss, *inputs.values())
    for key, version in versions.items():
        if version is not None and inputs[key]._version != version:
            raise ValueError(f"loss {name} changes the {key} in place; let it work on a clone")
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"loss {name} must return a scalar tensor, it returns {what}")
    return wide(value).view(1), row


def weighted_parts(loss: nn.Module, weight: float = 1.0) -> list[tuple[float, nn.Module]]:
    """The losses that a loss is a sum of, with their weights."""
    if type(loss) is not Sum:
        return [(weight, loss)]
    pairs = zip(loss.weights, loss.losses, strict=True)
    return [part for w, inner in pairs for part in weighted_parts(inner, weight * w)]


def table_parts(loss: nn.Module) -> list[TableLoss]:
    """The losses on a table in a loss: the loss itself, or those that it sums."""
    return [part for _, part in weighted_parts(loss) if isinstance(part, TableLoss)]


def with_parts(loss: nn.Module) -> list[nn.Module]:
    """A loss and, if it is a sum, all losses in it."""
    inner = loss.losses if type(loss) is Sum else ()
    return [loss, *(module for part in inner for module in with_parts(part))]


def shared_recipe(loss: nn.Module) -> Recipe | None:
    """The recipe of a loss that may share a table with others; None for another loss.

    A subclass may compute anything, so only the classes themselves share.
    """
    if type(loss) not in (Dice, CrossEntropy, Sum) or has_hooks(loss):
        return None
    if isinstance(loss, TableLoss):
        return loss.recipe if loss.recipe.over == "batch" else None
    assert isinstance(loss, Sum)
    recipes = [recipe for part in loss.losses if (recipe := shared_recipe(part))]
    alike = len(recipes) == len(loss.losses) and len({r.family for r in recipes}) == 1
    return recipes[0].union(recipes) if alike else None
