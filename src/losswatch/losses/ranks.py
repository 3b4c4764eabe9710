"""Sums over the batches of all ranks, if `torch.distributed` trains with several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from losswatch.losses.sums import Sums


class RankSums(NamedTuple):
    """The sums over the batch of this rank, and over the batches of all ranks."""

    local: Sums
    joint: Sums


_is_only_this_rank = False  # see `only_this_rank`


@contextmanager
def only_this_rank() -> Iterator[None]:
    """Make losses count this rank's batch only and wait for no other rank, until the exit."""
    global _is_only_this_rank
    before, _is_only_this_rank = _is_only_this_rank, True
    try:
        yield
    finally:
        _is_only_this_rank = before


def world_size() -> int:
    """The number of ranks whose batches are summed.

    1 without `torch.distributed`, and within `only_this_rank`.
    """
    is_one = _is_only_this_rank or not (dist.is_available() and dist.is_initialized())
    return 1 if is_one else dist.get_world_size()


def max_over_ranks(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each number over all ranks. Waits for all ranks."""
    highest = torch.tensor(numbers, dtype=torch.float32, device=device)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return highest.tolist()


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

    Its gradient is scaled by the number of ranks, because `DistributedDataParallel` averages
    gradients over ranks: the average is then the gradient of all batches together.
    """
    return _OverRanks.apply(x)


def over_ranks(tables: Sequence[Sums]) -> Sequence[Sums]:
    """The sums over the batches of all ranks, in one all-reduce."""
    if world_size() == 1:
        return tables
    parts = [x for sums in tables for x in (*sums.logit_sums.values(), *sums.labels.values())]
    parts += [parts[0].new_full((), float(sums.pixels)) for sums in tables]
    flat = sum_over_ranks(torch.cat([part.reshape(-1) for part in parts]))
    pieces = flat.split([part.numel() for part in parts])
    joint = iter([f.view(part.shape) for f, part in zip(pieces, parts, strict=True)])
    by_name = [
        ({key: next(joint) for key in sums.logit_sums}, {e: next(joint) for e in sums.labels})
        for sums in tables
    ]
    return [Sums(*names, next(joint)) for names in by_name]
