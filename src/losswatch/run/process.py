"""The switches of the process that a run needs. They are set here, and restored on exit."""

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

# The lowest level of messages that these libraries show.
_LEVELS = {
    "pytorch_lightning": logging.WARNING,
    "lightning_fabric": logging.WARNING,
    "hydra.utils": logging.CRITICAL,  # Hydra logs each error that it raises
    "torch.utils.cpp_extension": logging.ERROR,  # there is a CUDA toolkit (CUDA_HOME), but no GPU
}
# Expected warnings.
_IGNORED = (
    ".*recommended to use .*sync_dist=True.*",  # the metrics have been summed over ranks
    ".*does not have many workers.*",  # the images are computed, not loaded
    ".*smaller than the logging interval.*",  # the probe has its own interval
    ".*configure_optimizers.*returned `None`.*",  # the step of a stack holds the optimiser
    "The `srun` command is available.*",  # a sweep's jobs are sent by its launcher
    "Grad strides do not match bucket view strides.*",  # DDP with channels_last: PyTorch copies
    "Checkpoint directory .* exists and is not empty.*",  # the run is resumed
    ".*LeafSpec.*is deprecated.*",  # in Lightning's own code
)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what libraries report as expected, or what losswatch reports itself; until exit."""
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
    """Sets what a run or a stack needs of its process; restores it on exit.

    That is: quiet libraries, the number of CPU threads, the random generators, and the switches
    that make `net` fast on a CPU. Only the settings of the allocator stay (`nets.cpu.keep_memory`).

    Args:
        net: the network to be trained or tested.
        threads: number of CPU threads; None does not change it.
        seed: of the random generators; None does not change their state.
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
    """Logs nothing below the level of an error, if `enabled`. Restores logging on exit.

    If several processes train one run, only the first one reports how it went.
    """
    before = logging.root.manager.disable
    if enabled:
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
