"""The training batches of a data module of the user's, as one long epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any

import numpy as np
import pytorch_lightning as pl

from losswatch.data.loaders import RemainingBatches, Resumable
from losswatch.run.randomness import Stream

_END = object()


class Passes(Resumable):
    """One pass over the images after the other.

    Batches are numbered through the whole training, and a resumed run begins with the next. What
    the loader draws in this process, such as the order, is a function of the seed and the pass, if
    the loader takes it from the global generators.

    Args:
        load: makes the loader.
        trainer: knows the length of the training, and what is done.
        seed: of the run.
    """

    def __init__(self, load: Callable[[], Iterable], trainer: pl.Trainer, seed: int) -> None:
        self.load, self.steps, self.seed = load, RemainingBatches(trainer), seed
        self.loader = load()

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Any]:
        done = self.steps.done
        try:
            first, skipped = divmod(done, len(self.loader))  # type: ignore[arg-type]
        except (TypeError, ZeroDivisionError):  # no length: all passes are gone through again
            first, skipped = 0, done
        return islice(self._from(first), skipped, skipped + len(self) - done)

    def _from(self, first: int) -> Iterator[Any]:
        """The batches of a pass and of all that follow."""
        for number in count(first):
            is_empty = True
            for batch in self._one(number):
                is_empty = False
                yield batch
            if is_empty:
                raise ValueError(f"data: pass {number + 1} over the training images has no batch")

    def _one(self, number: int) -> Iterator[Any]:
        """The batches of a pass."""
        if number and isinstance(self.loader, Iterator):  # which gives its batches once
            self.loader = self.load()
        for holder in (self.loader, getattr(self.loader, "batch_sampler", None)):
            sampler: Any = getattr(holder, "sampler", None)
            if hasattr(sampler, "set_epoch"):  # as of DistributedSampler
                sampler.set_epoch(number)
        mixed = np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint64)
        stream, batches = Stream(int(mixed[0])), None
        while True:
            with stream.drawing():
                batches = iter(self.loader) if batches is None else batches
                batch = next(batches, _END)
            if batch is _END:
                return
            yield batch


def repeat(data: pl.LightningDataModule, seed: int) -> None:
    """Let a data module train by `Passes` over its images."""
    load = data.train_dataloader
    data.train_dataloader = lambda: Passes(load, data.trainer, seed)  # type: ignore
