"""The criterion of a module: which submodule it is, and its output and target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from losswatch.watch.outputs import tensors


def find_criterion(module: nn.Module, name: str) -> nn.Module:
    """The submodule of that name.

    Raises:
        ValueError: no submodule has that name; the message lists modules that look like a loss.
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
            hint = f"modules that look like a loss are {', '.join(near[:10])}"
        else:
            hint = "no module looks like a loss: call watch.see(logits, target) in training_step"
        raise ValueError(f"criterion={name!r} is not a submodule; {hint}") from None


def output_and_target(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, Any, str] | None:
    """Output and target among the arguments of a criterion, and a text if the target comes first.

    The output is the first argument that carries a gradient. Returns None if fewer than two
    arguments hold tensors.
    """
    by_name = [*((f"argument {i}", x) for i, x in enumerate(args, 1)), *kwargs.items()]
    candidates = []
    for name, value in by_name:
        try:
            candidates.append((name, value, any(x.requires_grad for x in tensors(name, value))))
        except TypeError:  # a number, or a list of something else
            continue
    if len(candidates) < 2:
        return None
    output = next((x for x in candidates if x[2]), candidates[0])
    target = next(x for x in candidates if x is not output)
    order = "" if output is candidates[0] else f" (output: {output[0]}, target: {target[0]})"
    return output[1], target[1], order
