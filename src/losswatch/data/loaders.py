"""Loaders whose batches are a function of the step, so that a resumed run continues correctly."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import TracebackType

import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset, Sampler


class RemainingBatches(Sampler[int]):
    """The numbers of the batches that a training still needs, also after it is resumed.

    Args:
        trainer: knows the length of the training, and how many steps are finished.
        batches: the training repeats the first `batches` batches; 0 repeats none.
    """

    def __init__(self, trainer: pl.Trainer, batches: int = 0) -> None:
        self.trainer, self.batches = trainer, batches

    def __len__(self) -> int:
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    @property
    def done(self) -> int:
        """How many batches the training has used."""
        return self.trainer.global_step * self.trainer.accumulate_grad_batches

    def __iter__(self) -> Iterator[int]:
        return (number % (self.batches or len(self)) for number in range(self.done, len(self)))


class Resumable:
    """Tells Lightning that a loader can be resumed. Its only state is the step of the trainer."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class _Loader(Resumable, DataLoader):
    pass


def _end_quietly(_: int) -> None:
    """Let a worker print no error if the training ends while it takes a batch.

    A thread of the worker hands over the batches, and loses its connection then. Errors of reading
    images do not come here: PyTorch raises them in the training.
    """
    show = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, (OSError, EOFError)):
            show(kind, error, trace)

    sys.excepthook = hook


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
        worker_init_fn=_end_quietly,
        # Forked processes share the images in memory. In a process of joblib, the default method
        # is neither fork nor spawn, and cannot start any process.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
    )
