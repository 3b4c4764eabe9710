"""Watching the training of anyone's LightningModule, which stays as it is."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from losswatch import compat
from losswatch.events.charts import add_charts
from losswatch.losses.ranks import highest
from losswatch.watch.criterion import find_criterion, roles
from losswatch.watch.library import as_callback, have_hooks_around_backward, library
from losswatch.watch.observer import Head, Observer
from losswatch.watch.outputs import Losses, unused
from losswatch.watch.record import Record
from losswatch.watch.span import (
    Span,
    added,
    blocks,
    contained,
    in_order,
    is_gradient,
    joined,
    with_trained,
)

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning import Callback
else:
    # `from losswatch import Watch` takes no Lightning along; `Watch.__new__` adds this class.
    Callback = object

log = logging.getLogger(__name__)


class Call(NamedTuple):
    """One call of the criterion."""

    output: Any
    target: Any
    value: Tensor | None  # a scalar; None: not known


class Pending(NamedTuple):
    """An observation that needs the gradient which the training computes."""

    found: Span
    place: int  # of the loss that trains
    spare: int  # the row that the gradient can replace


class Watch(Callback):
    """A callback that observes losses in the training of a LightningModule, and changes nothing.

    At each `every_n_steps`-th step it records the value of every loss and the norm of its gradient:
    the gradient that the optimiser would get, before clipping, if that loss were the trained one.
    So it is averaged over ranks and, in automatic optimisation, over accumulated batches. In manual
    optimisation it is that of the first backward pass of a step. The numbers stay on the device and
    go to all loggers of the Trainer in blocks, as loss/<name>, grad_norm/<name> and
    grad_cosine/<a>~<b>.

    Args:
        losses: as of `Observer`.
        criterion: name of the submodule that is called with (output, target), such as "loss_fn".
            What it is called with last before a backward pass is observed. For a loss that is a
            function, call `see` in `training_step` instead.
        every_n_steps: at least 1.
        cosines: also record the cosine between the gradients of each pair of losses.
        activation, ignore_index, heads: as of `Observer`. With heads="all" each call of the
            criterion before a backward pass counts as a head.
        strict: an error in watching ends the training. Otherwise it gives one warning, and nothing
            is watched from then on.

    Raises:
        ValueError, TypeError: an argument is not allowed.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Watch:
        return super().__new__(as_callback(cls))  # type: ignore[arg-type]

    def __init__(
        self,
        losses: Losses,
        criterion: str | None = None,
        *,
        every_n_steps: int = 50,
        cosines: bool = False,
        activation: str = "softmax",
        ignore_index: int | None = None,
        heads: str = "first",
        strict: bool = False,
    ) -> None:
        self.observer = Observer(
            losses, [torch.empty(0)], activation=activation, ignore_index=ignore_index, heads=heads
        )  # the network comes in `on_fit_start`
        self.criterion, self.strict = criterion, strict
        self.record = Record(every_n_steps, cosines)
        self.module: nn.Module | None = None  # the criterion
        self.order = ""  # which arguments of the criterion are output and target
        self.calls: list[Call] = []
        self._forget()

    def _forget(self) -> None:
        """End an observation."""
        self.sums: Span | None = None  # of a step so far
        self.batches = 0  # that it is made of
        self.pending: Pending | None = None  # what the backward pass completes
        self.error: Exception | None = None

    def __reduce__(self) -> Any:
        return _remake, (Watch, self.__dict__)

    # -- begin and end -----------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.hooks: list[Any] = []
        self.reuses: bool | None = None  # whether the training's own gradient is right for a row
        self.first = math.inf  # the step at which training begins
        self.record.begin(trainer.global_step)
        try:
            if self.criterion is not None:
                self.module = find_criterion(module, self.criterion)
                hook = self.module.register_forward_hook(self._hear, with_kwargs=True)
                self.hooks.append(hook)
            for logger in self._tensorboards(trainer):
                if not getattr(logger, "has_charts", False):  # that of train.py has them
                    add_charts(logger.experiment, cosines=self.record.cosines)
        except Exception as error:
            self.record.give_up(error, self.strict)
        self.observer.network, self.observer.apart = module, self.module
        self.observer.strict = self.strict
        self.observer.begin()
        if compat.is_compiled(module):
            self.hooks.append(compat.KeptBuffers())

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Only now is the step of a checkpoint known.
        self.first = trainer.global_step
        self.record.step = trainer.global_step - 1

    def _tensorboards(self, trainer: pl.Trainer) -> list[Any]:
        """The loggers that write to TensorBoard, on the rank that does."""
        kind = library().loggers.TensorBoardLogger
        return [x for x in trainer.loggers if isinstance(x, kind) and trainer.is_global_zero]

    def _end(self, trainer: pl.Trainer) -> None:
        try:
            self.flush(trainer)
        finally:
            for hook in self.hooks:
                hook.remove()
            self.hooks = []
        if not self.record.tags and not self.record.is_off and trainer.global_step > self.first:
            what = f"{self.criterion} was not called with (output, target)"
            what = "watch.see(logits, target) was not called" if self.module is None else what
            log.warning("losswatch: nothing was watched: %s before a backward pass", what)

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._end(trainer)

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        if hasattr(self, "hooks"):
            strict, self.strict = self.strict, False  # an error here would replace the first one
            self._end(trainer)
            self.strict = strict

    # -- one step ----------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.record.move_to(trainer.global_step)
        self.calls = []

    def _hear(self, module: nn.Module, args: Any, kwargs: Any, value: Any) -> None:
        """The hook of the criterion."""
        if self.record.is_due and torch.is_grad_enabled() and (found := roles(args, kwargs)):
            output, target, self.order = found
            is_scalar = isinstance(value, Tensor) and value.numel() == 1
            self.calls.append(Call(output, target, value if is_scalar else None))

    _hear.only_looks = True  # type: ignore[attr-defined] # for `compat.has_hooks`

    def see(self, output: Any, target: Any, value: Tensor | None = None) -> None:
        """Take what a loss that is a function gets in `training_step`: `watch.see(logits, target)`.

        Args:
            output, target: see `Observer`.
            value: of the loss that trains, a scalar. Unless it is given, that is what
                `training_step` returns.
        """
        if self.record.is_due and torch.is_grad_enabled():
            self.calls.append(Call(output, target, value))

    def on_before_backward(
        self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor
    ) -> None:
        calls, self.calls = self.calls, []  # no graph outlives its step
        if not self.record.is_due or (trainer.world_size == 1 and (not calls or self.error)):
            return
        heads, error = None, self.error
        try:
            calls = calls[-1:] if self.observer.heads == "first" else calls
            if calls and error is None:
                heads = self._prepare(calls)
        except Exception as raised:
            error = raised
        try:
            if self.observer.agree(heads, error) and heads is not None:
                self._observe(trainer, calls, heads, loss)
        except Exception as raised:
            self._forget()
            self.error = raised

    def _prepare(self, calls: Sequence[Call]) -> list[Head]:
        """Check what is observed, and decide which loss is apart: the criterion's own call is used.

        So a criterion that draws random numbers or keeps a state is not called again.
        """
        pairs = [pair for call in calls for pair in self.observer.pairs(call.output, call.target)]
        if self.sums is None:
            self.observer.forget()
        self.apart = None
        if len(pairs) == 1 and calls[0].value is not None:
            self.apart = self.observer.views.name_apart(self.module)
        return self.observer.prepare(pairs, self.apart)

    def _trained(
        self, trainer: pl.Trainer, calls: Sequence[Call], loss: Tensor, scale: Tensor | None
    ) -> tuple[list[str], list[Tensor]]:
        """The names and values of what trains; no values where it shares rows with other losses."""
        views = self.observer.views
        if watched := views.name_of(self.module):
            name = self.observer.names(1)[views.names.index(watched)]
            if self.apart is None:
                return ([name] if len(calls) == 1 else []), []
            return [name], [calls[0].value]  # type: ignore[list-item]
        values = [call.value for call in calls if call.value is not None]
        if len(values) < len(calls):
            total = loss * trainer.accumulate_grad_batches
            return [unused("trained", views.names)], [total if scale is None else total / scale]
        name = unused(self.criterion or "trained", views.names)
        return [name] if len(calls) == 1 else [f"{name}.{i}" for i in range(len(calls))], values

    def _observe(
        self, trainer: pl.Trainer, calls: Sequence[Call], heads: Sequence[Head], loss: Tensor
    ) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = None if scaler is None else scaler.scale(loss.new_ones(()))
        names, values = self._trained(trainer, calls, loss, scale)
        is_alone = len(heads) == len(names) == 1 and self._is_alone(trainer, calls[-1].value, loss)
        comes = bool(is_alone and self.reuses)  # with the training's own backward pass
        with trainer.precision_plugin.forward_context():  # as the trained loss is called
            shares = self.observer.views.name_of(self.module) if is_alone and not values else None
            spans = [self.observer.span(head, shares, comes) for head in heads]
            spare = self.observer.spare
            if values:
                spare = sum(len(span.rows) for span in spans)
                spans.append(self.observer.span_of(values, scale, comes))
        watched = self.observer.names(len(heads))
        there = [name for name in watched if not values or name not in names]
        known = [*watched, *(name for name in names if name not in watched)]
        found = in_order(joined(spans), there + (names if values else []), known)
        if not self.record.tags:
            self.record.open(known, found.values.device, self.observer.explain)
            self._announce(watched, found.values, names[-1] if values else None, calls[-1].value)
        if is_alone and spare is not None and self.reuses is not False:
            self.pending = Pending(found, known.index(names[0]), spare)
        elif trainer.accumulate_grad_batches == 1 and trainer.world_size == 1:
            self._keep(trainer, *self.observer.measure(found))
        else:
            # Summed over accumulated batches, as the optimiser's gradient is. An epoch may end
            # before there are as many as Lightning divides by: the value is the mean of those.
            share = 1 / trainer.accumulate_grad_batches
            found = Span(found.values, share * found.coefficients, found.rows)
            self.batches += 1
            self.sums = found if self.sums is None else added(self.sums, found)

    def _is_alone(self, trainer: pl.Trainer, value: Tensor | None, loss: Tensor) -> bool:
        """Whether the training's gradient can be that of a loss of this batch alone.

        So no other term, batch, rank, scale or hook is in it, as far as that can be seen. The first
        observation compares the numbers.

        Args:
            value: of the loss; None for `loss` itself.
            loss: what Lightning sends back, divided by the number of accumulated batches.
        """
        source = loss.grad_fn
        if value is not None:
            if source is not None and source.name() == "DivBackward0":
                source = source.next_functions[0][0]
            if source is not value.grad_fn or compat.has_gradient_hooks(value):
                return False
        parameters = self.observer.trained
        return (
            trainer.lightning_module.automatic_optimization
            and trainer.accumulate_grad_batches == 1
            and trainer.world_size == 1
            and trainer.precision != "16-mixed"
            and not compat.has_gradient_hooks(loss)
            and all(p.grad is None for p in parameters)
            and not any(map(compat.has_gradient_hooks, parameters))
        )

    def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if compat.is_accumulating(trainer) or not self.record.is_due:
            return
        try:
            self._finish(trainer)
        except Exception as error:
            self.record.give_up(error, self.strict)
        finally:
            self._forget()

    def _finish(self, trainer: pl.Trainer) -> None:
        """End an observation that needed the backward pass, or raise the error that it met."""
        parameters = self.observer.trained
        if trainer.world_size > 1:
            [failing] = highest([self.error is not None], trainer.strategy.root_device)
            if failing and self.error is None:
                raise RuntimeError("another rank could not observe its batch")
        if self.error is not None:
            raise self.error
        if self.pending is not None:
            found, place, spare = self.pending
            gradient = [p.grad for p in parameters]
            if self.reuses is None:
                are_alone = not have_hooks_around_backward(trainer, ours=Watch)
                self.reuses = are_alone and is_gradient(gradient, found, place)
            if self.reuses:  # at the first time, too: a resumed training repeats it to the bit
                found = with_trained(found, gradient, place, spare)
            self._keep(trainer, *self.observer.measure(found))
        elif self.sums is not None:
            values, c, rows = self.sums
            values = values / self.batches
            if trainer.world_size == 1:
                self._keep(trainer, *self.observer.measure(Span(values, c, rows)))
                return
            # A loss of a rank's own batch has a value on each rank; the optimiser follows their
            # mean.
            mean = functools.partial(trainer.strategy.reduce, reduce_op="mean")
            parts = (mean(contained(c, part)[0]) for part in blocks(rows, parameters, c.dtype))
            found = Span(mean(values), torch.eye(len(c), dtype=c.dtype, device=c.device), [])
            self._keep(trainer, *self.observer.measure(found, parts))

    # -- what is written ---------------------------------------------------------------------------

    def _announce(
        self, names: Sequence[str], values: Tensor, trained: str | None, value: Tensor | None
    ) -> None:
        """Say once what is watched, and which watched loss the criterion is.

        Args:
            names, values: of the watched losses; further values may follow.
            trained: the name of the loss that trains, if its own call is recorded.
            value: of the loss that trains, if it is known.
        """
        what = f"losswatch: watching {len(names)} losses"
        if self.module is not None:
            what += f" of what {self.criterion} ({type(self.module).__name__}) gets{self.order}"
        if value is not None and not value.is_meta:
            near = 1e-4 if value.dtype in (torch.float32, torch.float64) else 1e-2
            number = float(value.detach())
            pairs = zip(names, values.tolist(), strict=False)
            equal = [n for n, v in pairs if abs(v - number) <= near * abs(number)]
            what += f"; its value {number:.4g} equals that of {', '.join(equal) or 'none of them'}"
            if not equal:
                what += ", so it is another loss"
        if trained is not None and trained not in names:
            what += f"; the loss that trains is recorded as {trained}"
        library().utilities.rank_zero_info(what)

    def _keep(self, trainer: pl.Trainer, *seen: Tensor) -> None:
        values, norms, cosines = seen
        if self.record.add(
            values, norms, cosines, fault=self.observer.fault, failed=self.observer.failed
        ):
            self.flush(trainer)

    def latest(self) -> dict[str, float]:
        """The values of the last observation, for a progress bar."""
        return self.record.latest()

    def flush(self, trainer: pl.Trainer) -> None:
        """Write what was observed since the last time to all loggers."""
        try:
            self._write(trainer)
        except Exception as error:
            self.record.give_up(error, self.strict)

    def _write(self, trainer: pl.Trainer) -> None:
        steps, values = self.record.take()
        if not len(steps) or not trainer.is_global_zero:
            return
        tensorboards = self._tensorboards(trainer)
        for logger in trainer.loggers:
            if hasattr(logger, "write_curves"):  # that of train.py: to the run's record, too
                logger.write_curves(self.record.tags, steps, values)
            elif logger in tensorboards:
                self.record.write(logger.experiment, steps, values)  # type: ignore
            else:
                for step, row in zip(steps.tolist(), values.tolist(), strict=True):
                    logger.log_metrics(dict(zip(self.record.tags, row, strict=True)), step=step)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.flush(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.flush(trainer)


def _remake(cls: type, state: dict[str, Any]) -> Watch:
    """For pickle, which does not find the class that `as_callback` makes."""
    watch = Watch.__new__(cls)
    watch.__dict__.update(state)
    return watch
