"""The state of the random generators of a process: seeded for a run, and kept in its checkpoints.

Code that must not change the state uses pytorch_lightning.utilities.seed.isolate_rng.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities.seed import isolate_rng


def seed_everything(seed: int) -> None:
    """Seed PyTorch's, numpy's and Python's generators with a number from 0 to 2^63 - 1."""
    torch.manual_seed(seed)
    _seed_others(seed)


def _seed_others(seed: int) -> None:
    np.random.seed(seed % 2**32)  # numpy refuses larger numbers
    random.seed(seed)


def get_state(cuda: bool = True) -> dict[str, Any]:
    """The state of all generators as tensors and plain data, which a checkpoint can hold."""
    numpy: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = numpy
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if cuda and torch.cuda.is_initialized() else [],
        "numpy": [kind, torch.from_numpy(keys), position, has_gauss, gauss],
        "python": list(random.getstate()),
    }


def set_state(state: dict[str, Any]) -> None:
    """Restore a state that `get_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


class Stream:
    """CPU generators for one part of the program alone.

    Args:
        seed: see `seed_everything`.
    """

    def __init__(self, seed: int) -> None:
        with isolate_rng(include_cuda=False):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds GPUs, too
            _seed_others(seed)
            self.state = get_state(cuda=False)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Gives the global generators the state of the stream; restores their own on exit."""
        with isolate_rng(include_cuda=False):
            set_state(self.state)
            yield
            self.state = get_state(cuda=False)


def draws(function: Callable[..., Any], *args: Any) -> bool:
    """Whether a call draws numbers from any of the generators.

    >>> draws(torch.nn.Dropout(0.5), torch.ones(3)), draws(torch.nn.ReLU(), torch.ones(3))
    (True, False)
    """
    before = _comparable(get_state())
    function(*args)
    return _comparable(get_state()) != before


def _comparable(state: Any) -> Any:
    """The same state as nested lists; tensors cannot be compared by ==."""
    if isinstance(state, torch.Tensor):
        return state.tolist()
    if isinstance(state, dict):
        return [_comparable(value) for value in state.values()]
    return [_comparable(value) for value in state] if isinstance(state, list) else state
