"""Watches the training of any LightningModule, without changes to it."""

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
from losswatch.losses.ranks import max_over_ranks
from losswatch.watch.criterion import find_criterion, output_and_target
from losswatch.watch.library import as_callback, have_hooks_around_backward, library
from losswatch.watch.observer import Head, Observer
from losswatch.watch.outputs import Losses, unused_name
from losswatch.watch.record import Record
from losswatch.watch.span import (
    GradientSpan,
    add_spans,
    blocks,
    combine,
    concat_spans,
    is_gradient,
    reorder,
    with_trained,
)

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning import Callback

    from losswatch.doctor.findings import Finding
else:
    # `from losswatch import Watch` must not import Lightning; `Watch.__new__` adds this class.
    Callback = object

log = logging.getLogger(__name__)


class Call(NamedTuple):
    """One call of the criterion."""

    output: Any
    target: Any
    value: Tensor | None  # a scalar, or None if it is unknown


class Pending(NamedTuple):
    """An observation that needs the gradient which the training computes."""

    span: GradientSpan
    place: int  # the index of the trained loss
    own_row: int  # the row that the gradient can replace


class Watch(Callback):
    """A callback that observes losses in the training of a LightningModule, and changes nothing.

    At each `every_n_steps`-th step the callback records the value of every loss and the norm of its
    gradient: the gradient that the optimiser would get, before clipping, if that loss were the
    trained one. So the gradient is averaged over ranks and, in automatic optimisation, over
    accumulated batches. In manual optimisation only the first backward pass of a step counts. The
    numbers stay on the device and go to all loggers of the Trainer in blocks, as loss/<name>,
    grad_norm/<name> and grad_cosine/<a>~<b>.

    Args:
        losses: see `Observer`.
        criterion: name of the submodule that is called with (output, target), such as "loss_fn".
            Its last call before a backward pass is observed. If the loss is a function, call `see`
            in `training_step` instead.
        every_n_steps: at least 1.
        cosines: also record the cosine between the gradients of each pair of losses.
        activation, ignore_index, heads: see `Observer`. With heads="all" each call of the
            criterion before a backward pass counts as a head.
        strict: an error in watching ends the training. Otherwise one warning reports the error, and
            nothing is watched from then on.
        diagnose: say what is wrong with the training as it shows: in the log, and as the text
            "findings" in TensorBoard.

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
        diagnose: bool = False,
    ) -> None:
        self.observer = Observer(
            losses, [torch.empty(0)], activation=activation, ignore_index=ignore_index, heads=heads
        )  # `on_fit_start` gives it the network
        self.observer.doctor.is_on = diagnose
        self.criterion, self.strict = criterion, strict
        self.record = Record(every_n_steps, cosines)
        self.module: nn.Module | None = None  # the criterion
        self.order = ""  # tells which arguments are output and target, if the target is first
        self.calls: list[Call] = []
        self._forget()

    def _forget(self) -> None:
        """End an observation."""
        self.sums: GradientSpan | None = None  # over the batches of this step so far
        self.batches = 0  # the number of these batches
        self.pending: Pending | None = None  # waits for the backward pass
        self.error: Exception | None = None

    def __reduce__(self) -> Any:
        return _remake, (Watch, self.__dict__)

    # -- begin and end -----------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.hooks: list[Any] = []
        # Whether the gradient of the training can replace a row; None: not tested yet.
        self.reuses_gradient: bool | None = None
        self.first = math.inf  # the step at which training starts
        self.record.begin(trainer.global_step)
        try:
            if self.criterion is not None:
                self.module = find_criterion(module, self.criterion)
                hook = self.module.register_forward_hook(self._record_call, with_kwargs=True)
                self.hooks.append(hook)
            for logger in self._tensorboards(trainer):
                if not getattr(logger, "has_charts", False):  # the logger of train.py has them
                    add_charts(logger.experiment, cosines=self.record.cosines)
        except Exception as error:
            self.record.give_up(error, self.strict)
        self.observer.network, self.observer.criterion = module, self.module
        self.observer.strict = self.strict
        self.observer.begin()
        if compat.is_compiled(module):
            self.hooks.append(compat.KeptBuffers())

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Before this call, the step of a checkpoint is unknown.
        self.first = trainer.global_step
        self.record.step = trainer.global_step - 1

    def _tensorboards(self, trainer: pl.Trainer) -> list[Any]:
        """The loggers that write to TensorBoard; none on ranks that do not write."""
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
            strict, self.strict = self.strict, False  # a new error would replace the first one
            self._end(trainer)
            self.strict = strict

    # -- one step ----------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.record.move_to(trainer.global_step)
        self.calls = []

    def _record_call(self, module: nn.Module, args: Any, kwargs: Any, value: Any) -> None:
        """The hook of the criterion."""
        if not self.record.is_due or not torch.is_grad_enabled():
            return
        if (pair := output_and_target(args, kwargs)) is not None:
            output, target, self.order = pair
            is_scalar = isinstance(value, Tensor) and value.numel() == 1
            self.calls.append(Call(output, target, value if is_scalar else None))

    _record_call.only_observes = True  # type: ignore[attr-defined] # for `compat.has_hooks`

    def see(self, output: Any, target: Any, value: Tensor | None = None) -> None:
        """Observe a loss that is a function: call `watch.see(logits, target)` in `training_step`.

        Args:
            output, target: see `Observer`.
            value: the value of the trained loss, a scalar; by default, what `training_step`
                returns.
        """
        if self.record.is_due and torch.is_grad_enabled():
            self.calls.append(Call(output, target, value))

    def on_before_backward(
        self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor
    ) -> None:
        calls, self.calls = self.calls, []  # release the graphs of this step
        if not self.record.is_due or (trainer.world_size == 1 and (not calls or self.error)):
            return
        heads, error = None, self.error
        try:
            calls = calls[-1:] if self.observer.heads == "first" else calls
            if calls and error is None:
                heads = self._prepare(calls)
        except Exception as raised:
            error = raised
            call, names = calls[-1], self.observer.names(1)
            self.observer.doctor.give_up(raised, call.output, call.target, names)
            self._speak(trainer)
        try:
            if self.observer.agree(heads, error) and heads is not None:
                self._observe(trainer, calls, heads, loss)
        except Exception as raised:
            self._forget()
            self.error = raised

    def _prepare(self, calls: Sequence[Call]) -> list[Head]:
        """Check output and target, and find the watched loss that the criterion has computed.

        Its own call is used. So a criterion with random numbers or a state is not called again.
        """
        pairs = [pair for call in calls for pair in self.observer.pairs(call.output, call.target)]
        if self.sums is None:
            self.observer.doctor.step = self.record.step
            self.observer.forget()
        self.called = None
        if len(pairs) == 1 and calls[0].value is not None:
            self.called = self.observer.watched.name_of_called(self.module)
        return self.observer.prepare(pairs, self.called)

    def _trained(
        self, trainer: pl.Trainer, calls: Sequence[Call], loss: Tensor, scale: Tensor | None
    ) -> tuple[list[str], list[Tensor]]:
        """The names and values of the trained losses; no values if they share rows with others."""
        losses = self.observer.watched
        if watched := losses.name_of(self.module):
            name = self.observer.names(1)[losses.names.index(watched)]
            if self.called is None:
                return ([name] if len(calls) == 1 else []), []
            return [name], [calls[0].value]  # type: ignore[list-item]
        values = [call.value for call in calls if call.value is not None]
        if len(values) < len(calls):
            total = loss * trainer.accumulate_grad_batches
            total = total if scale is None else total / scale
            return [unused_name("trained", losses.names)], [total]
        name = unused_name(self.criterion or "trained", losses.names)
        return [name] if len(calls) == 1 else [f"{name}.{i}" for i in range(len(calls))], values

    def _observe(
        self, trainer: pl.Trainer, calls: Sequence[Call], heads: Sequence[Head], loss: Tensor
    ) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = None if scaler is None else scaler.scale(loss.new_ones(()))
        names, values = self._trained(trainer, calls, loss, scale)
        is_alone = len(heads) == len(names) == 1 and self._is_alone(trainer, calls[-1].value, loss)
        self.observer.doctor.see_trained(
            names[0] if len(names) == 1 else None,
            None if self.order else self.module,  # it is asked about known answers
            values[0] if len(names) == len(values) == 1 else None,
        )
        skip_own_row = bool(is_alone and self.reuses_gradient)  # the training computes it
        with trainer.precision_plugin.forward_context():  # autocast, as for the trained loss
            own = self.observer.watched.name_of(self.module) if is_alone and not values else None
            spans = [self.observer.backward_rows(head, own, skip_own_row) for head in heads]
            own_row = self.observer.own_row
            if values:
                own_row = sum(len(span.rows) for span in spans)
                spans.append(self.observer.backward_values(values, scale, skip_own_row))
        watched = self.observer.names(len(heads))
        there = [name for name in watched if not values or name not in names]
        every = [*watched, *(name for name in names if name not in watched)]
        span = reorder(concat_spans(spans), there + (names if values else []), every)
        self.names = every
        if not self.record.tags:
            trained = self.observer.doctor.trained
            self.record.open(every, span.values.device, self.observer.explain, trained)
            self._log_start(watched, span.values, names[-1] if values else None, calls[-1].value)
        if is_alone and own_row is not None and self.reuses_gradient is not False:
            self.pending = Pending(span, every.index(names[0]), own_row)
        elif trainer.accumulate_grad_batches == 1 and trainer.world_size == 1:
            self._keep(trainer, *self.observer.values_norms_cosines(span))
        else:
            # The gradients are summed over accumulated batches like the optimiser's. An epoch may
            # end before the number of batches by which Lightning divides: the value is then the
            # mean over the batches that there are.
            share = 1 / trainer.accumulate_grad_batches
            span = GradientSpan(span.values, share * span.coefficients, span.rows)
            self.batches += 1
            self.sums = span if self.sums is None else add_spans(self.sums, span)

    def _is_alone(self, trainer: pl.Trainer, value: Tensor | None, loss: Tensor) -> bool:
        """Whether the training's gradient can be exactly that of one loss of this batch.

        It can if no other term, batch, rank, scale or hook is visible. The first observation also
        compares the numbers.

        Args:
            value: of that loss; None for `loss` itself.
            loss: what Lightning sends back: a loss divided by the number of accumulated batches.
        """
        source = loss.grad_fn
        if value is not None:
            if source is not None and source.name() == "DivBackward0":
                source = source.next_functions[0][0]
            if source is not value.grad_fn or compat.has_gradient_hooks(value):
                return False
        parameters = self.observer.trainable
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
        """End an observation after the backward pass, or raise the error that stopped it."""
        parameters = self.observer.trainable
        if trainer.world_size > 1:
            [failing] = max_over_ranks([self.error is not None], trainer.strategy.root_device)
            if failing and self.error is None:
                raise RuntimeError("another rank could not observe its batch")
        if self.error is not None:
            raise self.error
        if self.pending is not None:
            span, place, own_row = self.pending
            gradient = [p.grad for p in parameters]
            if self.reuses_gradient is None:
                are_alone = not have_hooks_around_backward(trainer, ours=Watch)
                self.reuses_gradient = are_alone and is_gradient(gradient, span, place)
            # Also at the first observation, so that a resumed training has the same bits.
            if self.reuses_gradient:
                span = with_trained(span, gradient, place, own_row)
            self._keep(trainer, *self.observer.values_norms_cosines(span))
        elif self.sums is not None:
            values, c, rows = self.sums
            values = values / self.batches
            if trainer.world_size == 1:
                span = GradientSpan(values, c, rows)
                self._keep(trainer, *self.observer.values_norms_cosines(span))
                return
            # A loss of a rank's own batch has another value on each rank. The optimiser follows
            # the mean.
            mean = functools.partial(trainer.strategy.reduce, reduce_op="mean")
            parts = (mean(combine(c, part)[0]) for part in blocks(rows, parameters, c.dtype))
            span = GradientSpan(mean(values), torch.eye(len(c), dtype=c.dtype, device=c.device), [])
            self._keep(trainer, *self.observer.values_norms_cosines(span, parts))

    # -- what is written ---------------------------------------------------------------------------

    def _log_start(
        self, names: Sequence[str], values: Tensor, trained: str | None, value: Tensor | None
    ) -> None:
        """Log once what is watched, and which watched loss equals the criterion.

        Args:
            names, values: of the watched losses; further values may follow.
            trained: the name of the trained loss, if its own call is recorded.
            value: the value of the trained loss, if it is known.
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
        doctor = self.observer.doctor
        self.observer.diagnose(self.record.step, self.names, (values, norms, cosines))
        if self.record.add(
            values, norms, cosines, fault=self.observer.fault, failed=self.observer.failed
        ):
            self.flush(trainer)
        if doctor.count == 1:  # what the first batch shows already
            self._speak(trainer)

    def findings(self) -> list[Finding]:
        """What is wrong with the training, see `Observer.findings`. Needs `diagnose=True`."""
        return self.observer.findings()

    def _speak(self, trainer: pl.Trainer) -> None:
        if self.observer.doctor.is_on and trainer.is_global_zero:
            self.observer.doctor.say([x.experiment for x in self._tensorboards(trainer)])

    def latest(self) -> dict[str, float]:
        """The values of the last observation, for a progress bar."""
        return self.record.latest()

    def flush(self, trainer: pl.Trainer) -> None:
        """Write the observations since the last flush to all loggers."""
        try:
            self._write(trainer)
            self._speak(trainer)
        except Exception as error:
            self.record.give_up(error, self.strict)

    def _write(self, trainer: pl.Trainer) -> None:
        steps, values = self.record.drain()
        if not len(steps) or not trainer.is_global_zero:
            return
        tensorboards = self._tensorboards(trainer)
        for logger in trainer.loggers:
            if hasattr(logger, "write_curves"):  # that of train.py: to the run's record, too
                logger.write_curves(self.record.tags, steps, values)
                logger.write_signs(*self.observer.doctor.drain())  # type: ignore
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
    """Make a `Watch` for pickle, which cannot find the class that `as_callback` makes."""
    watch = Watch.__new__(cls)
    watch.__dict__.update(state)
    return watch
