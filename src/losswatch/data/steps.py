"""Loaders whose batches are a function of the step, so that a resumed run goes on with the next."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset, Sampler


class Steps(Sampler[int]):
    """The batches still to be trained with; a resumed run begins where it stopped.

    Args:
        trainer: knows the length of the training, and what is done.
        batches: the first so many batches are repeated; 0 never repeats one.
    """

    def __init__(self, trainer: pl.Trainer, batches: int = 0) -> None:
        self.trainer, self.batches = trainer, batches

    def __len__(self) -> int:
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    @property
    def done(self) -> int:
        """How many batches have been trained with."""
        return self.trainer.global_step * self.trainer.accumulate_grad_batches

    def __iter__(self) -> Iterator[int]:
        return (number % (self.batches or len(self)) for number in range(self.done, len(self)))


class Resumable:
    """Tells Lightning that a loader can be resumed; its whole state is the trainer's step."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class _Loader(Resumable, DataLoader):
    pass


def batch_loader(dataset: Dataset, numbers: Sampler[int] | range, num_workers: int) -> DataLoader:
    """A loader of a data set whose items are whole batches.

    Args:
        numbers: the items to load, in this order.
        num_workers: processes that load in the background; 0 loads when a batch is needed.
    """
    return _Loader(
        dataset,
        batch_size=None,  # a batch is one item
        sampler=numbers,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        # Forked processes share the images in memory. And the default of a process that joblib has
        # started, which is neither fork nor spawn, cannot start any.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
    )
