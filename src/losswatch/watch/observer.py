"""The observer: the value and the gradient of each loss, for any network in any training loop.

Needs nothing but PyTorch. lightning.py and engine.py call it in the loops of other libraries.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from losswatch.compat import why_not_differentiated
from losswatch.watch.outputs import Losses, Views, check_values, tensors
from losswatch.watch.span import Span, blocks, joined, norms_and_cosines, span


class Seen(NamedTuple):
    """What an `Observer` sees in one batch: tensors of K losses, on the device of the output."""

    names: tuple[str, ...]
    values: Tensor  # [K]
    norms: Tensor  # [K], of the gradients by all parameters together
    cosines: Tensor  # [K, K], of the angles between the gradients; NaN where one vanishes


class Observer:
    """Observes losses of a network's output before the backward pass, and changes nothing.

    Args:
        losses: names of presets (`list_losses`) and modules (logits, target) -> scalar, or a
            mapping from names to modules.
        parameters: those of the network, `net.parameters()`. Those that require no gradient at the
            time of an observation do not count in it.
        activation: what makes probabilities of the network's output: "softmax"; "sigmoid", of each
            channel by itself; "none" where the output holds probabilities already. Presets and
            losses of this package follow it. Other modules get output and target as they are.
        ignore_index: pixels of this label count nowhere in presets.
        heads: which tensors of a list of outputs (deep supervision) are observed: the "first", or
            "all" of them, each by itself; the names of the losses then end in the head's number.

    Raises:
        ValueError: there is no such preset, or an argument is not allowed.
        TypeError: a loss is neither a name nor a module, or `parameters` holds something else.

    >>> net = nn.Conv2d(1, 2, 1)
    >>> observer = Observer(["cce", "dice"], net.parameters())
    >>> seen = observer(net(torch.rand(1, 1, 4, 4)), torch.ones(1, 4, 4, dtype=torch.int64))
    >>> seen.names, len(seen.values), len(seen.norms), tuple(seen.cosines.shape)
    (('cce', 'dice'), 2, 2, (2, 2))
    """

    def __init__(
        self,
        losses: Losses,
        parameters: Iterable[Tensor],
        *,
        activation: str = "softmax",
        ignore_index: int | None = None,
        heads: str = "first",
    ) -> None:
        if heads not in ("first", "all"):
            raise ValueError(f"heads={heads!r}: allowed are first, all")
        self.heads = heads
        self.views = Views(losses, activation, ignore_index)
        self.parameters = list(parameters)
        for p in self.parameters:
            if not isinstance(p, Tensor):
                raise TypeError(f"parameters: tensors are needed, got a {type(p).__name__}")
        if not self.parameters:
            raise ValueError("parameters: there are none; net.parameters() can be read only once")
        self.is_new = True  # until the first observation

    def __call__(self, output: Any, target: Any) -> Seen:
        """Observe one batch. Call it before `backward()`, which frees the graph.

        Args:
            output: of the network, logits [N, C, *space], or a list of them.
            target: class indices [N, *space] or [N, 1, *space], or one-hot or soft labels of the
                shape of the output; or a list with one of these for each output.

        Raises:
            ValueError: output, target and losses do not fit, or the graph cannot be used.
        """
        pairs = self.pairs(output, target)
        names = self.names(len(pairs))
        spans = [self.span(*pair) for pair in pairs]
        return Seen(names, *measure(joined(spans)))

    def names(self, heads: int) -> tuple[str, ...]:
        """The names of what is observed for a number of observed heads."""
        if self.heads == "first":
            return self.views.names
        return tuple(f"{name}.{head}" for head in range(heads) for name in self.views.names)

    def pairs(self, output: Any, target: Any) -> list[tuple[Tensor, Tensor]]:
        """The outputs and their targets that are observed."""
        outputs, targets = tensors("output", output), tensors("target", target)
        if len(targets) == 1:
            targets = targets * len(outputs)
        if len(targets) != len(outputs):
            raise ValueError(f"target: {len(targets)} tensors for {len(outputs)} outputs")
        pairs = list(zip(outputs, targets, strict=True))
        return pairs[:1] if self.heads == "first" else pairs

    def span(
        self,
        output: Tensor,
        target: Tensor,
        known: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({}),
        spare: int | None = None,
    ) -> Span:
        """The gradients of all losses by one output; arguments as of `span.span`."""
        parameters = [p for p in self.parameters if p.requires_grad]
        if not output.requires_grad or not parameters:
            raise ValueError(
                "the output carries no gradient: the network ran under torch.no_grad(), or all of "
                "its parameters are frozen"
            )
        if self.is_new:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                _check_whole(parameters)
            check_values(output, target, self.views)
            self.is_new = False
        with _nothing_changed(output.device, self.views.are_foreign):
            try:
                parts = [
                    span(losses, *pair, parameters, known, spare)
                    for losses, pair in self.views.of(output, target)
                ]
            except RuntimeError as error:
                if reason := why_not_differentiated(error):
                    raise ValueError(reason) from error
                raise
        return self.views.in_order(parts)


def measure(found: Span) -> tuple[Tensor, Tensor, Tensor]:
    """Values [K], norms [K] and cosines [K, K] of the losses of a span."""
    norms, cosines = norms_and_cosines(found.coefficients, blocks(found))
    return found.values, norms.to(found.values.dtype), cosines.to(found.values.dtype)


def _check_whole(parameters: Sequence[Tensor]) -> None:
    """See that this rank has whole parameters.

    Raises:
        ValueError: they are spread over ranks.
    """
    from torch.distributed.fsdp import FlatParameter
    from torch.distributed.tensor import DTensor

    if any(isinstance(p, FlatParameter | DTensor) or not p.numel() for p in parameters):
        raise ValueError("the parameters are spread over ranks (FSDP); DDP can be watched")


@contextmanager
def _nothing_changed(device: torch.device, are_foreign: bool) -> Iterator[None]:
    """While this is open, random states and buffers of modules change in no lasting way.

    A foreign loss may draw random numbers or keep a state. And a network with activation
    checkpointing computes its layers again in each backward pass: its batch norms would count the
    batch once more each time.
    """
    kept: list[tuple[nn.Module, str, Tensor, Tensor]] = []
    known: set[nn.Module] = set()

    def keep(module: nn.Module, args: Any) -> None:
        if module not in known:
            known.add(module)
            for name, buffer in module.named_buffers(recurse=False):
                kept.append((module, name, buffer, buffer.clone()))

    with ExitStack() as stack:
        devices = [device] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        if are_foreign:
            stack.callback(random.setstate, random.getstate())
        if are_foreign and (numpy := sys.modules.get("numpy")) is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        stack.callback(register_module_forward_pre_hook(keep).remove)
        try:
            yield
        finally:
            for module, name, buffer, value in kept:
                if getattr(module, name) is not buffer:
                    setattr(module, name, buffer)
                # `data`, since the graph may hold the buffer: its value there is this one, but
                # autograd would only see that the buffer was written to.
                buffer.data.copy_(value)
