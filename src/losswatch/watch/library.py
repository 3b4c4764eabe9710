"""Finds Lightning under either of its names: pytorch_lightning or lightning.pytorch."""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any


def library() -> Any:
    """Lightning as the user has imported it: pytorch_lightning or lightning.pytorch."""
    other = "lightning.pytorch" in sys.modules and "pytorch_lightning" not in sys.modules
    return importlib.import_module("lightning.pytorch" if other else "pytorch_lightning")


@functools.cache
def as_callback(cls: type) -> type:
    """The class, also derived from Lightning's `Callback`."""
    package = library()
    if issubclass(cls, package.Callback):
        return cls
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls, package.Callback), body)


def have_hooks_around_backward(trainer: Any, ours: type) -> bool:
    """Whether the user's code may compute or change gradients around the backward pass.

    Args:
        ours: a class of callbacks that do not do this.
    """
    package = library()

    def overrides(x: Any, base: type, *names: str) -> bool:
        return any(getattr(type(x), name) is not getattr(base, name) for name in names)

    callbacks = [c for c in trainer.callbacks if not isinstance(c, ours)]
    return overrides(
        trainer.lightning_module, package.LightningModule, "on_before_backward", "backward"
    ) or any(
        overrides(c, package.Callback, "on_before_backward", "on_after_backward") for c in callbacks
    )
