"""Gives Lightning the batches of somebody else's data module as one long sequence.

Lightning sees the whole training as one epoch. Here an epoch is one pass over the images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any

import numpy as np
import pytorch_lightning as pl

from losswatch.data.loaders import RemainingBatches, Resumable
from losswatch.run.randomness import Stream

_END = object()


class EpochLoader(Resumable):
    """The batches of one epoch after the other.

    Batches are numbered through the whole training, and a resumed run begins with the next one.
    What the loader draws in this process, such as the order, depends on the seed and the number of
    the epoch alone, if the loader draws from the global generators.

    Args:
        load: makes the loader.
        trainer: knows the length of the training, and the number of steps done.
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
        except (TypeError, ZeroDivisionError):  # the loader has no length: begin at the first epoch
            first, skipped = 0, done
        return islice(self._epochs(first), skipped, skipped + len(self) - done)

    def _epochs(self, first: int) -> Iterator[Any]:
        """The batches of an epoch and of all that follow.

        Raises:
            ValueError: an epoch has no batch.
        """
        for number in count(first):
            is_empty = True
            for batch in self._epoch(number):
                is_empty = False
                yield batch
            if is_empty:
                raise ValueError(f"data: pass {number + 1} over the training images has no batch")

    def _epoch(self, number: int) -> Iterator[Any]:
        """The batches of an epoch."""
        if number and isinstance(self.loader, Iterator):  # an iterator gives its batches once
            self.loader = self.load()
        for holder in (self.loader, getattr(self.loader, "batch_sampler", None)):
            sampler: Any = getattr(holder, "sampler", None)
            if hasattr(sampler, "set_epoch"):  # such as DistributedSampler
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


def use_epoch_loader(data: pl.LightningDataModule, seed: int) -> None:
    """Make a data module give its training batches by an `EpochLoader`."""
    load = data.train_dataloader
    data.train_dataloader = lambda: EpochLoader(load, data.trainer, seed)  # type: ignore
