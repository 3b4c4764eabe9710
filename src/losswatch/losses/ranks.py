"""Sums over the batches of all ranks, where `torch.distributed` trains with several."""

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


_is_apart = False  # whether the losses of this rank are those of its own batch, see `apart`


@contextmanager
def apart() -> Iterator[None]:
    """While this is open, losses are those of this rank's batch, and wait for no other rank."""
    global _is_apart
    before, _is_apart = _is_apart, True
    try:
        yield
    finally:
        _is_apart = before


def world_size() -> int:
    """The ranks whose batches are summed; 1 without `torch.distributed`, and while `apart`."""
    is_one = _is_apart or not (dist.is_available() and dist.is_initialized())
    return 1 if is_one else dist.get_world_size()


def highest(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each number over all ranks; it waits for them."""
    found = torch.tensor(numbers, dtype=torch.float32, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


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


def over_ranks(tables: Sequence[Sums]) -> Sequence[Sums]:
    """The sums over the batches of all ranks, in one all-reduce."""
    if world_size() == 1:
        return tables
    parts = [x for sums in tables for x in (*sums.moving.values(), *sums.labels.values())]
    parts += [parts[0].new_full((), float(sums.pixels)) for sums in tables]
    flat = sum_over_ranks(torch.cat([part.reshape(-1) for part in parts]))
    pieces = flat.split([part.numel() for part in parts])
    joint = iter([f.view(part.shape) for f, part in zip(pieces, parts, strict=True)])
    named = [
        ({key: next(joint) for key in sums.moving}, {e: next(joint) for e in sums.labels})
        for sums in tables
    ]
    return [Sums(*names, next(joint)) for names in named]
