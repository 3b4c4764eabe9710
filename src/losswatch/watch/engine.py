"""Watching the training of an engine of MONAI or Ignite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from losswatch import compat
from losswatch.events.charts import add_charts
from losswatch.watch.observer import Observer, Seen
from losswatch.watch.outputs import Losses, unused
from losswatch.watch.record import Record
from losswatch.watch.span import joined

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class WatchHandler:
    """A handler that observes losses in the training of an engine, and changes nothing.

    It acts between the loss and its backward pass, at the event LOSS_COMPLETED of MONAI's
    `SupervisedTrainer`, and reads `engine.network` and "pred" and "label" of `engine.state.output`.
    Another engine of Ignite can do the same: it registers the event "loss_completed", and before
    each backward pass it sets that output and fires the event. The gradients are those of a batch,
    of one rank.

    Args:
        losses, activation, ignore_index, heads: as of `Observer`.
        every_n_steps, cosines, strict: as of `Watch`.
        writer: where the numbers go, as loss/<name>, grad_norm/<name> and grad_cosine/<a>~<b>.
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
        writer: SummaryWriter | None = None,
        network: nn.Module | None = None,
    ) -> None:
        self.observer = Observer(
            losses, [torch.empty(0)], activation=activation, ignore_index=ignore_index, heads=heads
        )  # the network comes with the engine, in `attach`
        self.record, self.strict = Record(every_n_steps, cosines), strict
        self.writer, self.network = writer, network
        self.kept: compat.KeptBuffers | None = None
        self.seen: Seen | None = None
        if writer is not None:
            add_charts(writer, cosines=cosines)

    def attach(self, engine: Any) -> None:
        """Let the engine call this handler.

        Raises:
            ValueError: the engine has no network, or does not say when the loss is computed.
        """
        from ignite.engine import Events  # imported late: only its users have it

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
        """At the beginning of each `run` of the engine."""
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
            self.record.give_up(error, self.strict)

    def _observe(self, engine: Any) -> None:
        output, observer = engine.state.output, self.observer
        observer.forget()
        found = observer.observe(output["pred"], output["label"])
        names = observer.names(len(found.values) // len(observer.views.names))
        loss, criterion = output.get("loss"), getattr(engine, "loss_function", None)
        # What trains is recorded, too, unless it is one of the watched losses.
        if isinstance(loss, Tensor) and not observer.views.name_of(criterion):
            name = "trained" if criterion is None else type(criterion).__name__
            scaler = getattr(engine, "scaler", None)
            scale = None if scaler is None else scaler.scale(loss.new_ones(()))
            found = joined([found, observer.span_of([loss], scale)])
            names = *names, unused(name, names)
        self.seen = Seen(names, *observer.measure(found))
        if not self.record.tags:
            self.record.open(names, found.values.device, observer.explain)
        if self.record.add(*self.seen[1:], fault=observer.fault, failed=observer.failed):
            self.flush()

    def flush(self) -> None:
        """Write what was observed since the last time."""
        try:
            steps, values = self.record.take()
            if len(steps) and self.writer is not None:
                self.record.write(self.writer, steps, values)
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
        """After an error of the training.

        Ignite raises an error only where nobody handles this event. So it is raised here, unless
        somebody else handles it and decides what becomes of it.
        """
        strict, self.strict = self.strict, False  # an error here would replace the first one
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
