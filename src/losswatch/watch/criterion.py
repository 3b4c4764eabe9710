"""The criterion of a module: which submodule it is, and what it is called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from losswatch.watch.outputs import tensors


def find_criterion(module: nn.Module, name: str) -> nn.Module:
    """The submodule of that name.

    Raises:
        ValueError: there is none; the message names those that could be meant.
    """
    try:
        return module.get_submodule(name)
    except AttributeError:
        words = ("loss", "criterion", "dice", "entropy")
        near = [
            f"{path} ({type(part).__name__})"
            for path, part in module.named_modules()
            if path and any(word in f"{path} {type(part).__name__}".lower() for word in words)
        ]
        if hasattr(module, name) and callable(getattr(module, name)):
            hint = "it is a function: call watch.see(logits, target) in training_step"
        elif near:
            hint = f"modules that could be meant are {', '.join(near[:10])}"
        else:
            hint = "no module looks like a loss: call watch.see(logits, target) in training_step"
        raise ValueError(f"criterion={name!r} is no submodule; {hint}") from None


def roles(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any, str] | None:
    """Output and target among the arguments of a criterion, and a text if the target comes first.

    The output is the first argument that carries a gradient. None: there are no two arguments with
    tensors.
    """
    named = [*((f"argument {i}", x) for i, x in enumerate(args, 1)), *kwargs.items()]
    found = []
    for name, value in named:
        try:
            found.append((name, value, any(x.requires_grad for x in tensors(name, value))))
        except TypeError:  # a number, or a list of something else
            continue
    if len(found) < 2:
        return None
    output = next((x for x in found if x[2]), found[0])
    target = next(x for x in found if x is not output)
    order = "" if output is found[0] else f" (output: {output[0]}, target: {target[0]})"
    return output[1], target[1], order
