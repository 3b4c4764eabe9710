"""Watches the training of an engine of MONAI or Ignite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from losswatch import compat
from losswatch.events.charts import add_charts
from losswatch.watch.observer import Observer, Seen
from losswatch.watch.outputs import Losses, unused_name
from losswatch.watch.record import Record
from losswatch.watch.span import concat_spans

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from losswatch.doctor.findings import Finding


class WatchHandler:
    """A handler that observes losses in the training of an engine, and changes nothing.

    It acts between the loss and its backward pass, at the event LOSS_COMPLETED of MONAI's
    `SupervisedTrainer`, and reads `engine.network` and "pred" and "label" of `engine.state.output`.
    Another engine of Ignite can be watched, too, if it registers the event "loss_completed", and
    before each backward pass sets that output and fires the event. The gradients are those of a
    batch on one rank.

    Args:
        losses, activation, ignore_index, heads: see `Observer`.
        every_n_steps, cosines, strict, diagnose: see `Watch`.
        writer: gets the numbers, as loss/<name>, grad_norm/<name> and grad_cosine/<a>~<b>.
        network: the network, if the engine has no attribute `network`.

    Attributes:
        seen: the newest observation.

    Raises:
        ValueError, TypeError: an argument is not allowed.
    """

    def __init__(
        self,
        losses: Losses,
        *,
        every_n_steps: int = 50,
        cosines: bool = False,
        activation: str = "softmax",
        ignore_index: int | None = None,
        heads: str = "first",
        strict: bool = False,
        diagnose: bool = False,
        writer: SummaryWriter | None = None,
        network: nn.Module | None = None,
    ) -> None:
        self.observer = Observer(
            losses, [torch.empty(0)], activation=activation, ignore_index=ignore_index, heads=heads
        )  # `attach` gives it the network of the engine
        self.observer.doctor.is_on = diagnose
        self.record, self.strict = Record(every_n_steps, cosines), strict
        self.writer, self.network = writer, network
        self.kept: compat.KeptBuffers | None = None
        self.seen: Seen | None = None
        if writer is not None:
            add_charts(writer, cosines=cosines)

    def attach(self, engine: Any) -> None:
        """Make the engine call this handler.

        Raises:
            ValueError: the engine has no network, or no event for a computed loss.
        """
        from ignite.engine import Events  # imported late, because it may not be installed

        network = self.network or getattr(engine, "network", None)
        if not isinstance(network, nn.Module):
            raise ValueError("the engine has no attribute network: give WatchHandler(network=...)")
        self.observer.network, self.observer.strict = network, self.strict
        try:
            engine.add_event_handler(_loss_completed(engine), self)
        except ValueError:
            raise ValueError(
                "the engine has no event for a computed loss: call "
                "engine.register_events('loss_completed'), and before each backward() set "
                "engine.state.output = {'pred': ..., 'label': ...} and call "
                "engine.fire_event('loss_completed')"
            ) from None
        engine.add_event_handler(Events.STARTED, self._start, network)
        engine.add_event_handler(Events.COMPLETED, self._end)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def _start(self, engine: Any, network: nn.Module) -> None:
        """Called at the start of each `run` of the engine."""
        self.record.begin(engine.state.iteration)
        self.observer.begin()
        if compat.is_compiled(network):
            self.kept = compat.KeptBuffers()

    def __call__(self, engine: Any) -> None:
        """Observe the batch of this iteration."""
        self.record.move_to(engine.state.iteration - 1)
        if not self.record.is_due:
            return
        try:
            self._observe(engine)
        except Exception as error:
            pair = engine.state.output if isinstance(engine.state.output, dict) else {}
            names = self.observer.names(1)
            self.observer.doctor.give_up(error, pair.get("pred"), pair.get("label"), names)
            self._speak()
            self.record.give_up(error, self.strict)

    def _observe(self, engine: Any) -> None:
        output, observer = engine.state.output, self.observer
        observer.doctor.step = self.record.step
        observer.forget()
        self._see_trained(engine, output.get("loss"))
        span = observer.observe(output["pred"], output["label"])
        names = observer.names(len(span.values) // len(observer.watched.names))
        loss, criterion = output.get("loss"), getattr(engine, "loss_function", None)
        # Record the trained loss, too, unless it is one of the watched losses.
        if isinstance(loss, Tensor) and not observer.watched.name_of(criterion):
            name = "trained" if criterion is None else type(criterion).__name__
            scaler = getattr(engine, "scaler", None)
            scale = None if scaler is None else scaler.scale(loss.new_ones(()))
            span = concat_spans([span, observer.backward_values([loss], scale)])
            names = *names, unused_name(name, names)
        self.seen = Seen(names, *observer.values_norms_cosines(span))
        observer.diagnose(self.record.step, names, self.seen[1:])
        if not self.record.tags:
            trained = observer.doctor.trained
            self.record.open(names, span.values.device, observer.explain, trained)
        if self.record.add(*self.seen[1:], fault=observer.fault, failed=observer.failed):
            self.flush()
        if observer.doctor.count == 1:  # what the first batch shows already
            self._speak()

    def _see_trained(self, engine: Any, loss: Any) -> None:
        """Tell the doctor which loss trains."""
        criterion, watched = getattr(engine, "loss_function", None), self.observer.watched
        module = criterion if isinstance(criterion, nn.Module) else None
        name = watched.name_of(module)
        if name is None and isinstance(loss, Tensor):
            other = "trained" if criterion is None else type(criterion).__name__
            self.observer.doctor.see_trained(unused_name(other, watched.names), module, loss)
        else:
            self.observer.doctor.see_trained(name, module)

    def findings(self) -> list[Finding]:
        """What is wrong with the training, see `Observer.findings`. Needs `diagnose=True`."""
        return self.observer.findings()

    def _speak(self) -> None:
        self.observer.doctor.say([] if self.writer is None else [self.writer])

    def flush(self) -> None:
        """Write the observations since the last flush."""
        try:
            steps, values = self.record.drain()
            if len(steps) and self.writer is not None:
                self.record.write(self.writer, steps, values)
            self._speak()
        except Exception as error:
            self.record.give_up(error, self.strict)

    def _end(self, engine: Any) -> None:
        try:
            self.flush()
        finally:
            if self.kept:
                self.kept.remove()
            self.kept = None

    def _fail(self, engine: Any, error: BaseException) -> None:
        """Called after an error of the training.

        Ignite raises an error only if this event has no handler. So this handler raises the error,
        unless another handler exists, which then decides.
        """
        strict, self.strict = self.strict, False  # a new error would replace the first one
        self._end(engine)
        self.strict = strict
        from ignite.engine import Events

        if not compat.is_handled_by_others(engine, Events.EXCEPTION_RAISED, WatchHandler):
            raise error


def _loss_completed(engine: Any) -> Any:
    """The event between the loss and its backward pass."""
    try:
        from monai.engines.trainer import Trainer
        from monai.engines.utils import IterationEvents
    except ImportError:
        return "loss_completed"
    return IterationEvents.LOSS_COMPLETED if isinstance(engine, Trainer) else "loss_completed"
