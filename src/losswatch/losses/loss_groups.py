"""Losses of one table evaluated together: their values, and their derivatives by the sums.

Dice losses often differ only in a few numbers, such as the exponent or the smoothing. One call of
their formula then serves K of them, on tensors [K, C] instead of [C]. An operation on such a small
tensor costs the same few microseconds on a CPU, so K losses cost little more than one.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from losswatch.losses.ranks import RankSums, over_ranks
from losswatch.losses.sums import Key, Sums
from losswatch.losses.table_loss import TableLoss, gradient, merged


class Group(NamedTuple):
    """K losses that differ only in numbers. A loss that is like no other is a group of its own."""

    formula: Any  # a module whose `from_sums` maps sums [K, C] to the values [K]
    keys: tuple[tuple[Key, ...], ...]  # the `Sums.logit_sums` that each of the K losses reads

    def copies(self, sums: Sums) -> list[Tensor]:
        """Copies of the `Sums.logit_sums` that the losses read, [K, C] each."""
        columns = zip(*self.keys, strict=True)
        return [torch.stack([sums.logit_sums[key] for key in column]) for column in columns]

    def table(self, copies: Iterator[Tensor], sums: Sums) -> Sums:
        """The table that `formula` reads: the sums of all losses under the keys of the first."""
        columns, labels = list(zip(*self.keys, strict=True)), dict(sums.labels)
        for (kind, exponent), *others in columns:
            exponents = [exponent, *(e for _, e in others)]
            if kind == "p" and len(set(exponents)) > 1:
                labels[exponent] = torch.stack([sums.y(e) for e in exponents])
        return Sums({column[0]: next(copies) for column in columns}, labels, sums.pixels)


def group_key(loss: nn.Module) -> Hashable:
    """Losses with equal keys can be one group."""
    if not isinstance(loss, TableLoss):
        return loss
    fixed = {name: value for name, value in loss.settings.items() if name not in loss.free}
    return type(loss), tuple(sorted((fixed | loss.lists).items()))


def make_group(losses: Sequence[nn.Module], keys: Mapping[nn.Module, tuple[Key, ...]]) -> Group:
    """The group of losses with one `group_key`; `keys` are the `Sums.logit_sums` they read."""
    formula: Any = losses[0]
    if len(losses) > 1:
        columns = zip(*(loss.numbers for loss in losses), strict=True)
        formula = copy.copy(formula)
        formula.numbers = tuple(merged(column) for column in columns)
        formula.members = tuple(losses)
    return Group(formula, tuple(keys[loss] for loss in losses))


def copies(groups: Sequence[Group], sums: Sums) -> list[Tensor]:
    """The copies of the sums for all groups, one after another."""
    return [x for group in groups for x in group.copies(sums)]


def values(groups: Sequence[Group], own: Sequence[Tensor], sums: Sums) -> Tensor:
    """The values [K] of the losses of all groups; `own` are their `copies` of the sums."""
    remaining = iter(own)
    tables = [group.table(remaining, sums) for group in groups]
    pairs = map(RankSums, tables, over_ranks(tables))
    return torch.cat([g.formula.from_sums(s) for g, s in zip(groups, pairs, strict=True)])


def values_and_jacobian(groups: Sequence[Group], sums: Sums) -> tuple[Tensor, Tensor]:
    """The values [K] of losses, and their derivatives [K, S, C] by the S `Sums.logit_sums`.

    Each loss has its own copies of the sums. So one backward pass gives all derivatives.
    """
    inputs = copies(groups, sums)
    losses, slopes = gradient(lambda leaves: values(groups, leaves, sums), inputs)
    remaining, none = iter(slopes), torch.zeros_like(inputs[0][0])
    rows = []
    for group in groups:
        columns = [next(remaining).unbind() for _ in group.keys[0]]
        for keys, *own in zip(group.keys, *columns, strict=True):
            slope = dict(zip(keys, own, strict=True))
            rows += [slope.get(key, none) for key in sums.logit_sums]
    return losses, torch.stack(rows).view(len(losses), -1, *none.shape)
