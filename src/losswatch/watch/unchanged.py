"""Restores what an observation changes in a training.

An observation calls losses and sends gradients back through the network, once for each row. Both
run foreign code, which may draw random numbers, count its calls or update statistics. A network
with activation checkpointing also computes its layers again in each backward pass. So the state is
saved before an observation, and restored after it:

- random states of PyTorch, and those of Python and numpy if there are foreign losses;
- buffers and attributes of the network's modules, of modules that the observation calls, and of
  foreign losses, which do not belong to this package;
- attributes of the classes of `torch.autograd.Function` in the graph;
- gradients of activations that `retain_grad` keeps.

State in other places, such as a global variable or a file, is not restored.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from losswatch import compat

# Attributes of every module that hold no state of its forward pass.
_PARTS = vars(nn.Module()).keys() - {"_buffers", "training"}
# Larger values are not copied, because this costs too much: datasets, the outputs of an epoch.
MOST_ITEMS, MOST_NUMBERS = 1000, 2**20

_FIXED = {type(None), bool, int, float, str}

Restore = Callable[[], None]


@contextmanager
def unchanged(
    device: torch.device,
    modules: Iterable[nn.Module],
    losses: Iterable[nn.Module],
    functions: Iterable[type],
) -> Iterator[None]:
    """Restores the state that an observation changes, on exit.

    Args:
        device: of the output.
        modules: the known modules of the network.
        losses: the foreign losses.
        functions: the functions in the graph (`functions_in`).
    """
    notes = _Notes()
    for module in modules:
        notes.note(module)
    foreign = [module for loss in losses for module in loss.modules()]
    for module in foreign:
        notes.note(module)
    notes.restores += [_note_attributes(function) for function in functions]
    with ExitStack() as stack:
        devices = [device] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        if foreign:
            stack.callback(random.setstate, random.getstate())
            if (numpy := sys.modules.get("numpy")) is not None:
                stack.callback(numpy.random.set_state, numpy.random.get_state())
        stack.callback(compat.note_kept_gradients())
        stack.callback(notes.restore)
        hook = register_module_forward_pre_hook(lambda module, _: notes.note(module))
        stack.callback(hook.remove)
        yield


class _Notes:
    """The state of modules, each as of its first `note`."""

    def __init__(self) -> None:
        self.modules: set[nn.Module] = set()
        self.restores: list[Restore] = []

    def note(self, module: nn.Module) -> None:
        # Modules of these packages keep all of their state in buffers.
        only_buffers = type(module).__module__.startswith(("torch.", "losswatch.", "torchmetrics."))
        if module not in self.modules and (module._buffers or not only_buffers):
            self.modules.add(module)
            state = module._buffers if only_buffers else vars(module)
            self.restores.append(_note_dict(state, skip=_PARTS))

    def restore(self) -> None:
        for restore in self.restores:
            restore()


def functions_in(output: Tensor) -> set[type]:
    """The foreign classes of `torch.autograd.Function` in the graph of a tensor."""
    found: set[type] = set()
    seen, left = {output.grad_fn}, [output.grad_fn]
    while left:
        node = left.pop()
        if node is None:
            continue
        kind = getattr(type(node), "_forward_cls", None)
        if kind is not None and not kind.__module__.startswith(("torch.", "losswatch.")):
            found.add(kind)
        for further, _ in node.next_functions:
            if further not in seen:
                seen.add(further)
                left.append(further)
    return found


# -- one value ------------------------------------------------------------------------------------


def _note(value: Any) -> Restore | None:
    """A function that restores the content of a value; None if the content cannot change."""
    if type(value) in _FIXED:
        return None
    if isinstance(value, Tensor):
        is_state = not value.requires_grad and value.numel() <= MOST_NUMBERS
        return _note_tensor(value) if is_state else None
    if isinstance(value, dict | list | deque | set | tuple) and len(value) > MOST_ITEMS:
        return None
    if isinstance(value, dict):
        return _note_dict(value)
    if isinstance(value, list | deque):
        return _note_items(value, value.extend)
    if isinstance(value, set):
        return _note_items(value, value.update)
    if isinstance(value, tuple):
        return _together(map(_note, value))
    if isinstance(value, torch.Generator):
        return _note_call(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return _note_call(value.setstate, value.getstate())
    if (numpy := sys.modules.get("numpy")) is not None:
        if isinstance(value, numpy.ndarray) and value.size <= MOST_NUMBERS:
            return _note_call(value.__setitem__, ..., value.copy())
        if isinstance(value, numpy.random.Generator):
            return _note_call(setattr, value.bit_generator, "state", value.bit_generator.state)
        if isinstance(value, numpy.random.RandomState):
            return _note_call(value.set_state, value.get_state())
    return None


def _note_call(function: Callable[..., Any], *args: Any) -> Restore:
    return lambda: function(*args)


def _together(restores: Iterable[Restore | None]) -> Restore | None:
    some = [restore for restore in restores if restore is not None]

    def restore() -> None:
        for each in some:
            each()

    return restore if some else None


def _note_tensor(value: Tensor) -> Restore:
    content = value.clone()

    def restore() -> None:
        # By `data`, because the graph may hold the tensor. Its content is the right one then, but
        # autograd would only see that the tensor has been written.
        value.data.copy_(content)

    return restore


def _note_dict(value: dict[Any, Any], skip: Iterable[Any] = ()) -> Restore:
    before = {key: item for key, item in value.items() if key not in skip}
    inside = _together(map(_note, before.values()))

    def restore() -> None:
        for key in [key for key in value if key not in before and key not in skip]:
            del value[key]
        for key, item in before.items():
            if key not in value or value[key] is not item:
                value[key] = item
        if inside is not None:
            inside()

    return restore


def _note_items(value: Any, put: Callable[[list[Any]], None]) -> Restore:
    before = list(value)
    inside = _together(map(_note, before))

    def restore() -> None:
        if len(value) != len(before) or any(a is not b for a, b in zip(value, before, strict=True)):
            value.clear()
            put(before)
        if inside is not None:
            inside()

    return restore


def _note_attributes(kind: type) -> Restore:
    """A function that restores the attributes of a class that are not functions."""
    before = {
        name: item
        for name, item in vars(kind).items()
        if not name.startswith("__") and not callable(item) and not hasattr(item, "__get__")
    }
    inside = _together(map(_note, before.values()))

    def restore() -> None:
        for name, item in before.items():
            if vars(kind).get(name) is not item:
                setattr(kind, name, item)
        if inside is not None:
            inside()

    return restore
