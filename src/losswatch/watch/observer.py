"""The observer: the value and the gradient of each loss, for any network in any training loop.

It needs only PyTorch. lightning.py and engine.py call it in the loops of other libraries.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from losswatch import compat
from losswatch.losses.inputs import first_fault
from losswatch.losses.pixels import is_hard, wide
from losswatch.losses.ranks import max_over_ranks, world_size
from losswatch.text import reason
from losswatch.watch.doctor import Doctor
from losswatch.watch.observed_parameters import check_whole, network_or_parameters
from losswatch.watch.outputs import Losses, Part, WatchedLosses, check_outputs, tensors
from losswatch.watch.record import Record
from losswatch.watch.span import (
    GradientSpan,
    Row,
    blocks,
    by_loss,
    combine,
    concat_spans,
    is_linear,
    norms_and_cosines,
    reorder,
    send_back,
    without_autocast,
)
from losswatch.watch.unchanged import functions_in, unchanged

if TYPE_CHECKING:
    from losswatch.doctor.findings import Finding

log = logging.getLogger(__name__)


class Seen(NamedTuple):
    """The observation of one batch: tensors for K losses, on the device of the output."""

    names: tuple[str, ...]
    values: Tensor  # [K]
    norms: Tensor  # [K], norms of the gradients by all parameters together
    cosines: Tensor  # [K, K], cosines between the gradients; NaN where a gradient is 0


class Head(NamedTuple):
    """One output of a network, ready to be observed."""

    output: Tensor
    target: Tensor
    parts: list[Part]
    fault: Tensor  # [3], see `losses.inputs`


class Observer:
    """Observes losses of a network's output before the backward pass, and changes nothing.

    The first observation raises errors. Later observations do not, because an error would end the
    training: numbers that cannot be observed are NaN, and one warning says why.

    Args:
        losses: names of presets (`list_losses`) and modules (logits, target) -> scalar, or a
            mapping from names to modules.
        parameters: the network, or some of its parameters, such as `net.decoder.parameters()`. A
            network is asked for its parameters at each observation. Only those that require a
            gradient at that time count.
        activation: turns the network's output into probabilities: "softmax"; "sigmoid", for each
            channel by itself; "none" if the output holds probabilities already. Presets and losses
            of this package follow it. Other modules get output and target unchanged.
        ignore_index: pixels with this label do not count in presets.
        heads: which tensors of a list of outputs (deep supervision) are observed: the "first", or
            "all" of them, each by itself; the names of the losses then end in the head's number.
        trained: the name of the watched loss that trains; None: unknown. `findings` says more
            where it is known.

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
        trained: str | None = None,
    ) -> None:
        if heads not in ("first", "all"):
            raise ValueError(f"heads={heads!r}: allowed are first, all")
        self.heads = heads
        self.watched = WatchedLosses(losses, activation, ignore_index)
        if trained is not None and trained not in self.watched.names:
            raise ValueError(
                f"trained={trained!r}: the watched losses are {', '.join(self.watched.names)}"
            )
        self.doctor = Doctor(self.watched, trained)
        self.network, self.parameters = network_or_parameters(parameters)
        self.criterion: nn.Module | None = None  # its parameters do not count as the network's
        self.strict = False  # whether later observations raise errors, too
        self.warned: set[str] = set()
        self.begin()
        compat.watch_kept_gradients()

    def begin(self) -> None:
        """Start a training: the next observation is the first one."""
        self.is_new = True
        self.is_linear: bool | None = None  # None: not tested yet
        self.ours: dict[tuple[int, int, torch.device], Tensor] = {}
        self.count = 1  # the number of heads at the newest observation
        self.functions: set[type] = set()
        self.modules: list[nn.Module] = []
        self.trainable: list[Tensor] = []  # the parameters at the newest observation
        self.doctor.begin()
        self.forget()

    def forget(self) -> None:
        """Start an observation: forget the faults and failures of the one before."""
        self.fault: Tensor | None = None  # of output and target, see `losses.inputs`
        self.failed: dict[str, str] = {}  # why losses failed, by name
        self.doctor.start()

    def __call__(self, output: Any, target: Any) -> Seen:
        """Observe one batch. Call it before `backward()`, which frees the graph.

        Args:
            output: of the network: logits [N, C, *space], or a list of them.
            target: class indices [N, *space] or [N, 1, *space], or one-hot or soft labels with the
                shape of the output; or a list with one of these for each output.

        Raises:
            ValueError: at the first observation, output, target and losses do not fit, or the graph
                cannot be used.
        """
        is_new, names, step = self.is_new, self.names(1), self.doctor.count
        self.forget()
        try:
            outputs = tensors("output", output)
            names = self.names(1 if self.heads == "first" else len(outputs))
            seen = Seen(names, *self.values_norms_cosines(self.observe(output, target)))
        except Exception as error:
            self.doctor.fail(step, error, output, target)
            self.diagnose(step, names, None)
            if is_new or self.strict:
                raise
            self._warn(f"nothing could be observed, so all is NaN: {reason(error)}")
            one = torch.full((len(names),), torch.nan)
            return Seen(names, one, one, one.outer(one))
        for name, why in self.failed.items():
            self._warn(f"loss {name} failed, so it is NaN: {why}")
        if (
            self.fault is not None and self.fault.is_cpu and self.fault[0]
        ):  # reading it would wait for a GPU
            self._warn(f"{self.explain(self.fault.tolist())}; {Record.SPOILT}")
        self.diagnose(step, names, seen[1:])
        return seen

    def findings(self) -> list[Finding]:
        """What is wrong with the training, from all that has been observed so far.

        The step of a finding is the number of observations before it. Reads numbers, so it waits
        for a GPU.

        Returns:
            at most three findings, the cause before its consequences; none if all is well.
        """
        return self.doctor.findings()

    def report(self, loss: Tensor) -> None:
        """Tell the value that really trains at the newest observation, a scalar."""
        self.doctor.report(loss)

    def diagnose(
        self, step: int, names: Sequence[str], seen: tuple[Tensor, Tensor, Tensor] | None
    ) -> None:
        """End an observation for the doctor; see `Doctor.keep`."""
        self.doctor.keep(step, names, seen, self.trainable, self.modules)

    def observe(self, output: Any, target: Any) -> GradientSpan:
        """The gradients of all losses for output and target of one batch.

        Args:
            output, target: see `__call__`.

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
        return concat_spans([self.backward_rows(head) for head in heads])

    def _warn(self, text: str) -> None:
        if text not in self.warned:
            self.warned.add(text)
            log.warning("losswatch: %s", text)

    def explain(self, fault: Sequence[float]) -> str:
        """The line about a fault, whose three numbers have been read from the device."""
        return self.watched.explain(fault, self.channels)

    # -- before the first number -------------------------------------------------------------------

    def names(self, heads: int) -> tuple[str, ...]:
        """The names of the observed losses, for this number of observed heads."""
        if self.heads == "first":
            return self.watched.names
        return tuple(f"{name}.{head}" for head in range(heads) for name in self.watched.names)

    def pairs(self, output: Any, target: Any) -> list[tuple[Tensor, Tensor]]:
        """The observed outputs, each with its target.

        Raises:
            TypeError: output or target is neither a tensor nor a list of tensors.
            ValueError: there are more targets than one, and not one for each output.
        """
        outputs, targets = tensors("output", output), tensors("target", target)
        if len(targets) == 1:
            targets = targets * len(outputs)
        if len(targets) != len(outputs):
            raise ValueError(f"target: {len(targets)} tensors for {len(outputs)} outputs")
        pairs = list(zip(outputs, targets, strict=True))
        return pairs[:1] if self.heads == "first" else pairs

    def find_parameters(self) -> None:
        """Find the modules of the network, and the parameters that require a gradient now."""
        self.modules = [] if self.network is None else list(self.network.modules())
        inside = [p for module in self.modules for p in module._parameters.values()]
        candidates = self.parameters if self.network is None else inside
        candidates = [p for p in candidates if p is not None and p.requires_grad]
        excluded = {id(p) for p in self.criterion.parameters()} if self.criterion else set()
        # By id, so that shared parameters count once.
        by_id = {id(p): p for p in candidates if id(p) not in excluded}
        self.trainable = list(by_id.values())

    def prepare(
        self, pairs: Sequence[tuple[Tensor, Tensor]], skip_loss: str | None = None
    ) -> list[Head]:
        """Check outputs and targets, without waiting for other ranks.

        Args:
            skip_loss: the name of a loss that is not observed here.

        Raises:
            ValueError: output, target and losses do not fit, or the graph cannot be used.
        """
        self.find_parameters()
        self.count, heads = len(pairs), list[Head]()
        for output, target in pairs:
            if not output.requires_grad or not self.trainable:
                swapped = "; the target carries one: give the output first"
                raise ValueError(
                    "the output carries no gradient: the network ran under torch.no_grad(), or all "
                    f"of its parameters are frozen{swapped if target.requires_grad else ''}"
                )
            if self.is_new:
                check_outputs(output, self.watched.activation)
            heads.append(Head(output, target, *self.watched.split(output, target, skip_loss)))
            self.channels = output.shape[1]
            self._add_fault(heads[-1].fault)
            if self.is_new and not output.is_meta and heads[-1].fault[0]:
                raise ValueError(self.explain(heads[-1].fault.tolist()))
            for part in heads[-1].parts if world_size() > 1 else ():
                part.losses.check(part.logits, part.target)
        if self.is_new and torch.distributed.is_available() and torch.distributed.is_initialized():
            check_whole(self.trainable, self.network)
        return heads

    def _add_fault(self, fault: Tensor) -> None:
        if fault.is_cpu and not fault[0]:  # reading the number of a GPU would wait
            return
        self.fault = fault if self.fault is None else first_fault([self.fault, fault])

    def agree(self, heads: Sequence[Head] | None, error: Exception | None) -> bool:
        """Whether there is something to observe. All ranks agree on the answer.

        If one rank stopped alone, the others would wait for its sums for ever.

        Raises:
            Exception: `error`.
            RuntimeError: another rank could not observe its batch, or only some ranks have
                something to observe.
        """
        if world_size() > 1:
            if heads is None:  # `prepare` was not called, or failed
                self.find_parameters()
            device = next(iter(self.trainable), torch.empty(0)).device
            number, low, high = [0.0] * 3 if self.fault is None else self.fault.tolist()
            state = [error is not None, heads is None, heads is not None, number, -low, high]
            failing, idle, ready, number, low, high = max_over_ranks(state, device)
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

    def backward_rows(
        self, head: Head, trained: str | None = None, skip_own_row: bool = False
    ) -> GradientSpan:
        """The gradients of all losses of one output.

        Args:
            trained: the name of a loss whose gradient the training may compute later
                (`span.with_trained`). Afterwards `own_row` is the row that this gradient can
                replace, or None.
            skip_own_row: leave that row out, because its gradient is computed later.

        Raises:
            ValueError: the graph cannot be used, or a loss fails at the first observation.
        """
        output, _, parts, fault = head
        self.own_row: int | None = None
        if not parts:  # the trained loss is the only watched one
            return GradientSpan(fault[:0], fault.new_zeros(0, 0), [])
        if self.is_new:
            self.functions = functions_in(output)
        failed: dict[str, Exception] = {}
        with unchanged(output.device, self.modules, self.watched.foreign, self.functions):
            try:
                tables = [part.rows(failed) for part in parts]
                if self.doctor.is_due:
                    slope = self._slope(parts, tables)
                    self.doctor.look(output, head.target, slope, is_first=self.is_new)
                spans = self._send_back(parts, tables, trained, skip_own_row)
                if self.is_linear is None:
                    self._test_linearity(parts, tables, spans)
                if self.is_linear is False and not self.is_by_loss:
                    spans = self._send_back(parts, tables, trained, skip_own_row)
            except RuntimeError as error:
                if why := compat.why_not_differentiated(error):
                    raise ValueError(why) from error
                raise
        for name, failure in failed.items():
            if self.is_new or self.strict:
                raise failure
            # A fault explains already why losses of this package fail.
            if self.fault is None or self.watched.losses[name] in self.watched.foreign:
                self.failed[name] = reason(failure)
        there = [name for part in parts for name in part.losses.names]
        wanted = [name for name in self.watched.names if name in there]
        return reorder(concat_spans(spans), there, wanted)

    def backward_values(
        self, values: Sequence[Tensor], scale: Tensor | None, skip_own_row: bool = False
    ) -> GradientSpan:
        """The gradients of losses that have been called, each by its own backward pass.

        Args:
            values: scalars with their graph.
            scale: the loss scale of float16, which the backward pass needs.
            skip_own_row: make no backward pass, because the gradient is computed later
                (`span.with_trained`).
        """
        device = values[0].device
        rows: list[Row] = [[None] * len(self.trainable) for _ in values]
        if not skip_own_row:
            with unchanged(device, self.modules, [], self.functions), without_autocast(device):
                for i, value in enumerate(values):
                    if value.requires_grad:
                        seed = torch.ones_like(value) if scale is None else scale.to(value.dtype)
                        with compat.without_hooks(value):  # hooks are not a part of the loss
                            rows[i] = torch.autograd.grad(
                                value, self.trainable, seed.view_as(value),
                                retain_graph=True, allow_unused=True,
                            )  # fmt: skip
        stacked = torch.stack([wide(value.detach()).reshape(()) for value in values])
        one = torch.eye(len(values), dtype=stacked.dtype, device=device)
        return GradientSpan(stacked, one if scale is None else one / scale, rows)

    def _slope(self, parts: Sequence[Part], tables: Sequence[Table]) -> Tensor | None:
        """The derivative of the trained loss by the output, or by the logits of two classes."""
        for part, (_, rows, coefficients) in zip(parts, tables, strict=True):
            if self.doctor.trained in part.losses.names:
                own = coefficients[part.losses.names.index(self.doctor.trained)]
                return combine(own[None], rows.flatten(1))[0].view_as(rows[0])
        return None

    def _send_back(
        self,
        parts: Sequence[Part],
        tables: Sequence[Table],
        trained: str | None,
        skip_own_row: bool,
    ) -> list[GradientSpan]:
        """The backward passes of all rows."""
        spans: list[GradientSpan] = []
        self.is_by_loss = self.is_linear is False
        for part, (values, rows, coefficients) in zip(parts, tables, strict=True):
            own_row = None
            if self.is_by_loss and part.logits.dtype == torch.float16:
                raise ValueError(
                    "a hook or an autograd.Function makes the backward pass of the network not "
                    "linear; in float16 its gradients cannot be watched"
                )
            if self.is_by_loss:
                rows, coefficients = by_loss(rows, coefficients)
            elif trained in part.losses.names and is_hard(part.logits, part.target):
                own_row = part.losses.steady_row(trained, part.logits.shape[1])
            if own_row is not None:
                self.own_row = sum(len(span.rows) for span in spans) + own_row
            skip_row = own_row if skip_own_row else None
            gradients = send_back(part.logits, self.trainable, rows, skip_row)
            spans.append(GradientSpan(values, coefficients, gradients))
        return spans

    def _test_linearity(
        self,
        parts: Sequence[Part],
        tables: Sequence[Table],
        spans: Sequence[GradientSpan],
    ) -> None:
        """Set `is_linear` by a test of the first set of losses that share rows. Reads numbers."""
        shared = [
            (part.logits, self.trainable, rows, span.rows)
            for part, (_, rows, _), span in zip(parts, tables, spans, strict=True)
            if len(rows) > 1 and not part.logits.is_meta
        ]
        self.is_linear = is_linear(*shared[0]) if shared else True
        if world_size() > 1:
            [fails] = max_over_ranks([self.is_linear is False], self.trainable[0].device)
            self.is_linear = False if fails else self.is_linear
        if self.is_linear is False:
            self._warn(
                "a hook or an autograd.Function makes the backward pass of the network not linear, "
                "so each loss gets its own backward pass"
            )

    def values_norms_cosines(
        self, span: GradientSpan, parts: Iterable[Tensor] | None = None
    ) -> Measured:
        """Values [K], norms [K] and cosines [K, K] of the losses of a span. Ends an observation.

        Args:
            parts: the matrix J of the span in blocks; by default, made from its rows.
        """
        self.is_new = False
        parts = blocks(span.rows) if parts is None else parts
        norms, cosines = norms_and_cosines(span.coefficients, parts)
        values = span.values
        if self.fault is not None and len(self.watched.foreign) < len(self.watched.names):
            bad = self._are_ours(len(values), values.device) & (self.fault[0] > 0)
            values, norms = (torch.where(bad, torch.nan, x) for x in (values, norms))
            cosines = torch.where(bad | bad[:, None], torch.nan, cosines)
        return values, norms.to(values.dtype), cosines.to(values.dtype)

    def _are_ours(self, count: int, device: torch.device) -> Tensor:
        """Which of K observed losses are watched losses of this package, [K]."""
        key = count, self.count, device
        if key not in self.ours:
            foreign = {id(loss) for loss in self.watched.foreign}
            ours = [id(loss) not in foreign for loss in self.watched.losses.values()] * self.count
            ours += [False] * (count - len(ours))  # the trained losses
            self.ours[key] = torch.tensor(ours, device=device)  # kept: a copy to a GPU waits
        return self.ours[key]


Measured = tuple[Tensor, Tensor, Tensor]
Table = tuple[Tensor, Tensor, Tensor]  # what `LossSet.rows` returns
