"""The observer: the value and the gradient of each loss, for any network in any training loop.

Needs nothing but PyTorch. lightning.py and engine.py call it in the loops of other libraries.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from losswatch import compat
from losswatch.losses.inputs import first_fault
from losswatch.losses.pixels import is_hard, wide
from losswatch.losses.ranks import highest, world_size
from losswatch.text import reason
from losswatch.watch.outputs import Losses, Part, Views, check_outputs, tensors
from losswatch.watch.parameters import check_whole, network_or_parameters
from losswatch.watch.record import Record
from losswatch.watch.span import (
    Row,
    Span,
    blocks,
    by_loss,
    in_order,
    is_linear,
    joined,
    norms_and_cosines,
    send_back,
    without_autocast,
)
from losswatch.watch.unchanged import functions_in, unchanged

log = logging.getLogger(__name__)


class Seen(NamedTuple):
    """What an `Observer` sees in one batch: tensors of K losses, on the device of the output."""

    names: tuple[str, ...]
    values: Tensor  # [K]
    norms: Tensor  # [K], of the gradients by all parameters together
    cosines: Tensor  # [K, K], of the angles between the gradients; NaN where one vanishes


class Head(NamedTuple):
    """One output of a network, ready to be observed."""

    output: Tensor
    parts: list[Part]
    fault: Tensor  # [3], see `losses.inputs`


class Observer:
    """Observes losses of a network's output before the backward pass, and changes nothing.

    The first observation raises errors. Later ones never do, because they would end a training:
    what cannot be observed is NaN then, and a warning says why, once.

    Args:
        losses: names of presets (`list_losses`) and modules (logits, target) -> scalar, or a
            mapping from names to modules.
        parameters: the network, or some of its parameters, such as `net.decoder.parameters()`. A
            network is asked for its parameters at each observation. Those that require no gradient
            then do not count in it.
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
    >>> observer = Observer(["cce", "dice"], net)
    >>> seen = observer(net(torch.rand(1, 1, 4, 4)), torch.ones(1, 4, 4, dtype=torch.int64))
    >>> seen.names, len(seen.values), len(seen.norms), tuple(seen.cosines.shape)
    (('cce', 'dice'), 2, 2, (2, 2))
    """

    def __init__(
        self,
        losses: Losses,
        parameters: nn.Module | Iterable[Tensor],
        *,
        activation: str = "softmax",
        ignore_index: int | None = None,
        heads: str = "first",
    ) -> None:
        if heads not in ("first", "all"):
            raise ValueError(f"heads={heads!r}: allowed are first, all")
        self.heads = heads
        self.views = Views(losses, activation, ignore_index)
        self.network, self.given = network_or_parameters(parameters)
        self.apart: nn.Module | None = None  # its parameters are not the network's
        self.strict = False  # whether later observations raise errors, too
        self.warned: set[str] = set()
        self.begin()
        compat.watch_kept_gradients()

    def begin(self) -> None:
        """Begin a training: the next observation is the first one."""
        self.is_new = True
        self.is_linear: bool | None = None  # None: not known
        self.ours: dict[tuple[int, int, torch.device], Tensor] = {}
        self.count = 1  # of heads, at the newest observation
        self.functions: set[type] = set()
        self.modules: list[nn.Module] = []
        self.trained: list[Tensor] = []  # parameters, at the newest observation
        self.forget()

    def forget(self) -> None:
        """Begin an observation."""
        self.fault: Tensor | None = None  # of output and target so far
        self.failed: dict[str, str] = {}  # why losses failed so far, by name

    def __call__(self, output: Any, target: Any) -> Seen:
        """Observe one batch. Call it before `backward()`, which frees the graph.

        Args:
            output: of the network, logits [N, C, *space], or a list of them.
            target: class indices [N, *space] or [N, 1, *space], or one-hot or soft labels of the
                shape of the output; or a list with one of these for each output.

        Raises:
            ValueError: at the first observation, if output, target and losses do not fit, or the
                graph cannot be used.
        """
        is_new, names = self.is_new, self.names(1)
        self.forget()
        try:
            outputs = tensors("output", output)
            names = self.names(1 if self.heads == "first" else len(outputs))
            seen = Seen(names, *self.measure(self.observe(output, target)))
        except Exception as error:
            if is_new or self.strict:
                raise
            self._warn(f"nothing could be observed, so all is NaN: {reason(error)}")
            one = torch.full((len(names),), torch.nan)
            return Seen(names, one, one, one.outer(one))
        for name, why in self.failed.items():
            self._warn(f"loss {name} failed, so it is NaN: {why}")
        if self.fault is not None and self.fault.is_cpu and self.fault[0]:  # a GPU would wait
            self._warn(f"{self.explain(self.fault.tolist())}; {Record.SPOILT}")
        return seen

    def observe(self, output: Any, target: Any) -> Span:
        """The gradients of all losses by output and target of one batch; arguments of `__call__`.

        Raises:
            ValueError: see `__call__`.
        """
        heads, error = None, None
        try:
            heads = self.prepare(self.pairs(output, target))
        except Exception as raised:
            error = raised
        self.agree(heads, error)
        assert heads is not None
        return joined([self.span(head) for head in heads])

    def _warn(self, text: str) -> None:
        if text not in self.warned:
            self.warned.add(text)
            log.warning("losswatch: %s", text)

    def explain(self, fault: Sequence[float]) -> str:
        """The line about a fault, its three numbers read."""
        return self.views.explain(fault, self.channels)

    # -- before the first number -------------------------------------------------------------------

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

    def look_up(self) -> None:
        """Ask the network for its modules, and for the parameters that require a gradient now."""
        self.modules = [] if self.network is None else list(self.network.modules())
        inside = [p for module in self.modules for p in module._parameters.values()]
        given = self.given if self.network is None else inside
        given = [p for p in given if p is not None and p.requires_grad]
        own = {id(p) for p in self.apart.parameters()} if self.apart else set()
        self.trained = list({id(p): p for p in given if id(p) not in own}.values())  # each once

    def prepare(
        self, pairs: Sequence[tuple[Tensor, Tensor]], skipped: str | None = None
    ) -> list[Head]:
        """Check outputs and targets, as far as this rank can without the others.

        Args:
            skipped: a loss that is not observed.

        Raises:
            ValueError: they do not fit, or the graph cannot be used.
        """
        self.look_up()
        self.count, heads = len(pairs), list[Head]()
        for output, target in pairs:
            if not output.requires_grad or not self.trained:
                swapped = "; the target carries one: give the output first"
                raise ValueError(
                    "the output carries no gradient: the network ran under torch.no_grad(), or all "
                    f"of its parameters are frozen{swapped if target.requires_grad else ''}"
                )
            if self.is_new:
                check_outputs(output, self.views.activation)
            heads.append(Head(output, *self.views.parts(output, target, skipped)))
            self.channels = output.shape[1]
            self._add_fault(heads[-1].fault)
            if self.is_new and not output.is_meta and heads[-1].fault[0]:
                raise ValueError(self.explain(heads[-1].fault.tolist()))
            for part in heads[-1].parts if world_size() > 1 else ():
                part.losses.check(part.logits, part.target)
        if self.is_new and torch.distributed.is_available() and torch.distributed.is_initialized():
            check_whole(self.trained, self.network)
        return heads

    def _add_fault(self, fault: Tensor) -> None:
        if fault.is_cpu and not fault[0]:  # a look at a GPU's number would wait
            return
        self.fault = fault if self.fault is None else first_fault([self.fault, fault])

    def agree(self, heads: Sequence[Head] | None, error: Exception | None) -> bool:
        """Whether there is something to observe: on all ranks, or on none of them.

        A rank that stopped here alone would let the others wait for its sums for ever.

        Raises:
            Exception: `error`.
            RuntimeError: of several ranks, one could not observe its batch or has nothing to
                observe.
        """
        if world_size() > 1:
            if heads is None:  # `prepare` has not done it, or has failed
                self.look_up()
            device = next(iter(self.trained), torch.empty(0)).device
            number, low, high = [0.0] * 3 if self.fault is None else self.fault.tolist()
            state = [error is not None, heads is None, heads is not None, number, -low, high]
            failing, idle, ready, number, low, high = highest(state, device)
            if error is None and failing:
                raise RuntimeError("another rank could not observe its batch")
            if error is None and idle and ready:
                raise RuntimeError("some ranks have something to observe in this step, others not")
            if number:  # losses are functions of sums over all ranks
                self.fault = torch.tensor([number, -low, high], device=device)
        if error is not None:
            raise error
        return heads is not None

    # -- gradients ---------------------------------------------------------------------------------

    def span(self, head: Head, trained: str | None = None, comes: bool = False) -> Span:
        """The gradients of all losses by one output.

        Args:
            trained: a loss whose gradient may come later (`span.with_trained`). Afterwards `spare`
                is the row that it can replace, or None.
            comes: whether it does, so that this row is left out.

        Raises:
            ValueError: the graph cannot be used, or a loss fails at the first observation.
        """
        output, parts, fault = head
        self.spare: int | None = None
        if not parts:  # what trains is the only watched loss
            return Span(fault[:0], fault.new_zeros(0, 0), [])
        if self.is_new:
            self.functions = functions_in(output)
        failed: dict[str, Exception] = {}
        with unchanged(output.device, self.modules, self.views.foreign, self.functions):
            try:
                tables = [part.rows(failed) for part in parts]
                found = self._passes(parts, tables, trained, comes)
                if self.is_linear is None:
                    self._test_linearity(parts, tables, found)
                if self.is_linear is False and not self.is_by_loss:
                    found = self._passes(parts, tables, trained, comes)
            except RuntimeError as error:
                if why := compat.why_not_differentiated(error):
                    raise ValueError(why) from error
                raise
        for name, failure in failed.items():
            if self.is_new or self.strict:
                raise failure
            if self.fault is None or self.views.losses[name] in self.views.foreign:
                self.failed[name] = reason(failure)  # the fault explains the other ones
        there = [name for part in parts for name in part.losses.names]
        return in_order(joined(found), there, [name for name in self.views.names if name in there])

    def span_of(self, values: Sequence[Tensor], scale: Tensor | None, comes: bool = False) -> Span:
        """The gradients of losses that have been called, each by a pass of its own.

        Args:
            values: scalars with their graph.
            scale: of the loss in float16, which its backward pass needs.
            comes: whether the gradient comes later (`span.with_trained`).
        """
        device = values[0].device
        rows: list[Row] = [[None] * len(self.trained) for _ in values]
        if not comes:
            with unchanged(device, self.modules, [], self.functions), without_autocast(device):
                for i, value in enumerate(values):
                    if value.requires_grad:
                        seed = torch.ones_like(value) if scale is None else scale.to(value.dtype)
                        with compat.without_hooks(value):  # they are no part of the loss
                            rows[i] = torch.autograd.grad(
                                value, self.trained, seed.view_as(value),
                                retain_graph=True, allow_unused=True,
                            )  # fmt: skip
        found = torch.stack([wide(value.detach()).reshape(()) for value in values])
        one = torch.eye(len(values), dtype=found.dtype, device=device)
        return Span(found, one if scale is None else one / scale, rows)

    def _passes(
        self,
        parts: Sequence[Part],
        tables: Sequence[Table],
        trained: str | None,
        comes: bool,
    ) -> list[Span]:
        """The backward passes of all rows."""
        found: list[Span] = []
        self.is_by_loss = self.is_linear is False
        for part, (values, rows, coefficients) in zip(parts, tables, strict=True):
            spare = None
            if self.is_by_loss and part.logits.dtype == torch.float16:
                raise ValueError(
                    "a hook or an autograd.Function of the network makes its backward pass one "
                    "that is not linear; in float16 its gradients cannot be watched"
                )
            if self.is_by_loss:
                rows, coefficients = by_loss(rows, coefficients)
            elif trained in part.losses.names and is_hard(part.logits, part.target):
                spare = part.losses.pivot(trained, part.logits.shape[1])
            if spare is not None:
                self.spare = sum(len(span.rows) for span in found) + spare
            gradients = send_back(part.logits, self.trained, rows, spare if comes else None)
            found.append(Span(values, coefficients, gradients))
        return found

    def _test_linearity(
        self,
        parts: Sequence[Part],
        tables: Sequence[Table],
        found: Sequence[Span],
    ) -> None:
        """Set `is_linear`, by the first set of losses that share rows; this reads numbers."""
        shared = [
            (part.logits, self.trained, rows, span.rows)
            for part, (_, rows, _), span in zip(parts, tables, found, strict=True)
            if len(rows) > 1 and not part.logits.is_meta
        ]
        self.is_linear = is_linear(*shared[0]) if shared else True
        if world_size() > 1:
            [fails] = highest([self.is_linear is False], self.trained[0].device)
            self.is_linear = False if fails else self.is_linear
        if self.is_linear is False:
            self._warn(
                "a hook or an autograd.Function of the network makes its backward pass one that is "
                "not linear, so each loss gets a pass of its own"
            )

    def measure(self, found: Span, parts: Iterable[Tensor] | None = None) -> Measured:
        """Values [K], norms [K] and cosines [K, K] of the losses of a span; ends an observation.

        Args:
            parts: its J in blocks; that of its rows unless given.
        """
        self.is_new = False
        parts = blocks(found.rows) if parts is None else parts
        norms, cosines = norms_and_cosines(found.coefficients, parts)
        values = found.values
        if self.fault is not None and len(self.views.foreign) < len(self.views.names):
            bad = self._are_ours(len(values), values.device) & (self.fault[0] > 0)
            values, norms = (torch.where(bad, torch.nan, x) for x in (values, norms))
            cosines = torch.where(bad | bad[:, None], torch.nan, cosines)
        return values, norms.to(values.dtype), cosines.to(values.dtype)

    def _are_ours(self, count: int, device: torch.device) -> Tensor:
        """Which of K observed losses are watched ones of this package, [K]."""
        key = count, self.count, device
        if key not in self.ours:
            foreign = {id(loss) for loss in self.views.foreign}
            ours = [id(loss) not in foreign for loss in self.views.losses.values()] * self.count
            ours += [False] * (count - len(ours))  # what trains
            self.ours[key] = torch.tensor(ours, device=device)  # once: a copy to a GPU would wait
        return self.ours[key]


Measured = tuple[Tensor, Tensor, Tensor]
Table = tuple[Tensor, Tensor, Tensor]  # of `LossSet.rows`
