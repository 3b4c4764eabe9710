"""Watching the training of an engine of MONAI or Ignite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from losswatch import compat
from losswatch.events.charts import add_charts
from losswatch.watch.observer import Observer, Seen
from losswatch.watch.outputs import Losses
from losswatch.watch.record import Record

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
        )  # the parameters come with the engine, in `attach`
        self.record, self.strict = Record(every_n_steps, cosines), strict
        self.writer, self.network = writer, network
        self.seen: Seen | None = None
        if writer is not None:
            add_charts(writer, cosines=cosines)

    def attach(self, engine: Any) -> None:
        """Let the engine call this handler.

        Raises:
            ValueError: the engine has no network, or does not say when the loss is computed.
        """
        from ignite.engine import Events  # imported late: only its users need to have it

        network = self.network or getattr(engine, "network", None)
        if not isinstance(network, nn.Module):
            raise ValueError("the engine has no attribute network: give WatchHandler(network=...)")
        self.observer.parameters = list(network.parameters())
        try:
            engine.add_event_handler(_loss_completed(engine), self)
        except ValueError:
            raise ValueError(
                "the engine has no event for a computed loss: call "
                "engine.register_events('loss_completed'), and before each backward() set "
                "engine.state.output = {'pred': ..., 'label': ...} and call "
                "engine.fire_event('loss_completed')"
            ) from None
        kept = compat.KeptBuffers() if compat.is_compiled(network) else None
        engine.add_event_handler(Events.COMPLETED, self._end, kept)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._raise, kept)

    def __call__(self, engine: Any) -> None:
        """Observe the batch of this iteration."""
        self.record.move_to(engine.state.iteration - 1)
        if not self.record.is_due:
            return
        try:
            output = engine.state.output
            self.seen = self.observer(output["pred"], output["label"])
            if not self.record.tags:
                self.record.open(self.seen.names, self.seen.values.device)
            if self.record.add(self.seen.values, self.seen.norms, self.seen.cosines):
                self.flush()
        except Exception as error:
            self.record.give_up(error, self.strict)

    def flush(self) -> None:
        """Write what was observed since the last time."""
        steps, values = self.record.take()
        if len(steps) and self.writer is not None:
            self.record.write(self.writer, steps, values)

    def _end(self, engine: Any, kept: compat.KeptBuffers | None) -> None:
        self.flush()
        if kept:
            kept.remove()

    def _raise(self, engine: Any, error: BaseException, kept: compat.KeptBuffers | None) -> None:
        self._end(engine, kept)
        raise error  # a handler of this event decides what becomes of the error


def _loss_completed(engine: Any) -> Any:
    """The event between the loss and its backward pass."""
    try:
        from monai.engines.trainer import Trainer
        from monai.engines.utils import IterationEvents
    except ImportError:
        return "loss_completed"
    return IterationEvents.LOSS_COMPLETED if isinstance(engine, Trainer) else "loss_completed"
