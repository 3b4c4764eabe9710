"""The switches of the process that a run needs: set in this one place, and put back at its end."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from losswatch.nets.cpu import fast_on_cpu
from losswatch.run import randomness

# The least level of messages that is shown of these libraries.
_LEVELS = {
    "pytorch_lightning": logging.WARNING,
    "lightning_fabric": logging.WARNING,
    "hydra.utils": logging.CRITICAL,  # it logs each error that it raises
    "torch.utils.cpp_extension": logging.ERROR,  # a CUDA toolkit (CUDA_HOME) without a GPU
}
# Warnings about what is meant to be so.
_IGNORED = (
    ".*recommended to use .*sync_dist=True.*",  # metrics are summed over ranks before
    ".*does not have many workers.*",  # the images are computed, not loaded
    ".*smaller than the logging interval.*",  # the probe has an interval of its own
    ".*configure_optimizers.*returned `None`.*",  # the step of a stack holds the optimiser
    "The `srun` command is available.*",  # a sweep's jobs are sent by its launcher
    "Grad strides do not match bucket view strides.*",  # DDP with channels_last: PyTorch copies
    "Checkpoint directory .* exists and is not empty.*",  # of a run that is resumed
    ".*LeafSpec.*is deprecated.*",  # in Lightning's own code
)


@contextmanager
def quiet() -> Iterator[None]:
    """While this is open, libraries do not report what is meant to be so, or reported elsewhere."""
    loggers = {logging.getLogger(name): level for name, level in _LEVELS.items()}
    levels = {logger: logger.level for logger in loggers}
    hook = threading.excepthook
    with warnings.catch_warnings():
        for message in _IGNORED:
            warnings.filterwarnings("ignore", message)
        for logger, level in loggers.items():
            logger.setLevel(level)
        threading.excepthook = _report_but_files
        try:
            yield
        finally:
            threading.excepthook = hook
            for logger, level in levels.items():
                logger.setLevel(level)


def _report_but_files(failure: threading.ExceptHookArgs) -> None:
    """Report a thread's error, unless it is TensorBoard's on a full disk.

    The next call of TensorBoard raises the same error, in the run, which reports it.
    """
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


@contextmanager
def run_process(
    net: nn.Module, threads: int | None = None, seed: int | None = None
) -> Iterator[None]:
    """Set all that a run or a stack needs of its process; put back what was there before.

    That is: quiet libraries, the number of CPU threads, the random generators, and the switches
    that make `net` fast on a CPU. Only the allocator's settings stay (`nets.cpu.keep_memory`).

    Args:
        net: the network to be trained or tested.
        threads: CPU threads; None leaves their number as it is.
        seed: of the random generators; None leaves their state as it is.
    """
    state, count = randomness.get_state(), torch.get_num_threads()
    with quiet():
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            if seed is not None:
                randomness.seed_everything(seed)
            with fast_on_cpu(net):
                yield
        finally:
            randomness.set_state(state)
            torch.set_num_threads(count)


@contextmanager
def only_errors(enabled: bool) -> Iterator[None]:
    """While this is open, nothing below the level of an error is logged, if `enabled`.

    Of several processes that train one run, the first one reports how it went.
    """
    before = logging.root.manager.disable
    if enabled:
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
