"""Watching the training of anyone's LightningModule, which stays as it is."""

from __future__ import annotations

import functools
import importlib
import logging
import math
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from losswatch import compat
from losswatch.events.charts import add_charts
from losswatch.watch.observer import Observer, measure
from losswatch.watch.outputs import Losses
from losswatch.watch.record import Record
from losswatch.watch.span import CHUNK, Span, blocks, joined, norms_and_cosines, with_trained

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
    value: Tensor | None  # None: not known


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
        return super().__new__(_as_callback(cls))  # type: ignore[arg-type]

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
        )  # the parameters come with the module, in `on_fit_start`
        self.criterion, self.strict = criterion, strict
        self.record = Record(every_n_steps, cosines)
        self.module: nn.Module | None = None  # the criterion
        self.calls: list[Call] = []
        self.sums: tuple[Tensor, Tensor] | None = None  # values and gradients of a step so far
        self.spare: tuple[str, int, Span] | None = None  # a row that the training computes
        self.error: Exception | None = None  # of this step

    def __reduce__(self) -> Any:
        return _remake, (Watch, self.__dict__)

    # -- begin and end -----------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.hooks: list[Any] = []
        self.begin = math.inf  # the step at which training begins
        self.record.begin(trainer.global_step)
        try:
            if self.criterion is not None:
                self.module = find_criterion(module, self.criterion)
                hook = self.module.register_forward_hook(self._hear, with_kwargs=True)
                self.hooks.append(hook)
        except ValueError as error:
            self.record.give_up(error, self.strict)
        own = set(self.module.parameters()) if self.module else set()
        self.observer.parameters = [p for p in module.parameters() if p not in own]
        self.observer.is_new = True
        if compat.is_compiled(module):
            self.hooks.append(compat.KeptBuffers())
        for logger in self._tensorboards(trainer):
            if not getattr(logger, "has_charts", False):  # that of train.py has them
                add_charts(logger.experiment, cosines=self.record.cosines)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Only now is the step of a checkpoint known.
        self.begin = trainer.global_step
        self.record.step = trainer.global_step - 1

    def _tensorboards(self, trainer: pl.Trainer) -> list[Any]:
        """The loggers that write to TensorBoard, on the rank that does."""
        kind = _library().loggers.TensorBoardLogger
        return [x for x in trainer.loggers if isinstance(x, kind) and trainer.is_global_zero]

    def _end(self, trainer: pl.Trainer) -> None:
        self.flush(trainer)
        if not self.record.tags and not self.record.is_off and trainer.global_step > self.begin:
            what = f"{self.criterion} was not called with (output, target)"
            what = "watch.see(logits, target) was not called" if self.module is None else what
            log.warning("losswatch: nothing was watched: %s before a backward pass", what)
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._end(trainer)

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        if hasattr(self, "hooks"):
            self._end(trainer)

    # -- one step ----------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.record.move_to(trainer.global_step)
        self.calls = []

    def _hear(self, module: nn.Module, args: Any, kwargs: Any, value: Any) -> None:
        """The hook of the criterion."""
        given = [*args, *kwargs.values()]
        if len(given) > 1:
            self.see(given[0], given[1], value if isinstance(value, Tensor) else None)

    _hear.only_looks = True  # type: ignore[attr-defined] # for `compat.has_hooks`

    def see(self, output: Any, target: Any, value: Tensor | None = None) -> None:
        """Take what a loss that is a function gets in `training_step`: `watch.see(logits, target)`.

        Args:
            output, target: as of `Observer`.
            value: of the loss that trains. It is compared with those of the watched losses once.
        """
        if self.record.is_due and torch.is_grad_enabled():
            self.calls.append(Call(output, target, value))

    def on_before_backward(
        self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor
    ) -> None:
        calls, self.calls = self.calls, []  # no graph outlives its step
        if not self.record.is_due or not calls or self.error:
            return
        try:
            self._observe(trainer, calls, loss)
        except Exception as error:
            self.error, self.sums = error, None

    def _observe(self, trainer: pl.Trainer, calls: list[Call], loss: Tensor) -> None:
        calls = calls[-1:] if self.observer.heads == "first" else calls
        pairs = [pair for call in calls for pair in self.observer.pairs(call.output, call.target)]
        [pair, *more], value = pairs, calls[-1].value
        known, spare = {}, None
        trained = None if more or value is None else self._trained()
        if trained and value is not None:
            if self.observer.views.is_foreign(trained, *pair) and pair[0].dtype != torch.float16:
                # A loss that draws random numbers or keeps state would differ in another call.
                slope = torch.autograd.grad(value, pair[0], retain_graph=True)[0]
                known[trained] = (value.detach(), slope)
            if self._is_alone(trainer, value, loss):
                spare = self.observer.views.pivot(trained, *pair)
        with trainer.precision_plugin.forward_context():  # as the trained loss is called
            found = joined([self.observer.span(*pair, known, spare) for pair in pairs])
        if not self.record.tags:
            names = self.observer.names(len(pairs))
            self.record.open(names, found.values.device)
            self._announce(dict(zip(names, found.values, strict=True)), value)
        if trained and spare is not None:
            self.spare = trained, spare, found
        elif trainer.accumulate_grad_batches == 1 and trainer.world_size == 1:
            self._keep(trainer, *measure(found))
        else:
            # Summed over accumulated batches, as the optimiser's gradient is.
            share = 1 / trainer.accumulate_grad_batches
            values = share * found.values
            shares = share * found.coefficients
            gradients = torch.cat([shares @ part.to(shares) for part in blocks(found)], 1)
            before = self.sums or (0, 0)
            self.sums = values + before[0], gradients + before[1]

    def _trained(self) -> str | None:
        """The name of the watched loss that is the criterion itself."""
        losses = self.observer.views.losses
        return next((name for name, loss in losses.items() if loss is self.module), None)

    def _is_alone(self, trainer: pl.Trainer, value: Tensor, loss: Tensor) -> bool:
        """Whether the gradient that the training computes is the criterion's of this batch alone.

        So no other term, batch, rank or scale is in it. Lightning divides the loss by the number of
        accumulated batches.
        """
        source = loss.grad_fn
        if source is not None and source.name() == "DivBackward0":
            source = source.next_functions[0][0]
        return (
            source is value.grad_fn
            and trainer.lightning_module.automatic_optimization
            and trainer.accumulate_grad_batches == 1
            and trainer.world_size == 1
            and trainer.precision != "16-mixed"
            and all(p.grad is None for p in self.observer.parameters)
            and not any(map(compat.has_gradient_hooks, self.observer.parameters))
        )

    def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if compat.is_accumulating(trainer) or not self.record.is_due:
            return
        try:
            self._finish(trainer)
        except Exception as error:
            self.record.give_up(error, self.strict)
        self.spare = self.sums = self.error = None

    def _finish(self, trainer: pl.Trainer) -> None:
        """End an observation that needed the backward pass, or raise the error that it met."""
        if trainer.world_size > 1:
            self._agree(trainer.strategy.reduce_boolean_decision)
        if self.error is not None:
            raise self.error
        if self.spare is not None:
            name, row, found = self.spare
            parameters = [p for p in self.observer.parameters if p.requires_grad]
            place = self.observer.views.names.index(name)
            found = with_trained(found, [p.grad for p in parameters], place, row)
            self._keep(trainer, *measure(found))
        elif self.sums is not None:
            # A loss of a rank's own batch has a value on each rank; the optimiser follows their
            # mean.
            values, gradients = (trainer.strategy.reduce(x, reduce_op="mean") for x in self.sums)
            one = torch.eye(len(values), dtype=values.dtype, device=values.device)
            self._keep(trainer, values, *norms_and_cosines(one, gradients.split(CHUNK, 1)))

    def _agree(self, reduce: Callable[..., bool]) -> None:
        """See that all ranks go on, or none: a rank would wait for the others for ever.

        Raises:
            RuntimeError: another rank has no observation to share.
        """
        if reduce(self.sums is not None, all=True):
            return
        idle = self.sums is None and self.error is None
        if not reduce(idle, all=True) and self.error is None:
            raise RuntimeError("another rank could not observe its batch")

    # -- what is written ---------------------------------------------------------------------------

    def _announce(self, values: Mapping[str, Tensor], value: Tensor | None) -> None:
        """Say once what is watched, and which watched loss the criterion is."""
        what = f"losswatch: watching {len(values)} losses"
        if self.module is not None:
            what += f" of what {self.criterion} ({type(self.module).__name__}) gets"
        if value is not None and value.numel() == 1 and not value.is_meta:
            near = 1e-4 if value.dtype in (torch.float32, torch.float64) else 1e-2
            number = float(value.detach())
            equal = [n for n, v in values.items() if abs(float(v) - number) <= near * abs(number)]
            what += f"; its value {number:.4g} equals that of {', '.join(equal) or 'none of them'}"
        _library().utilities.rank_zero_info(what)

    def _keep(self, trainer: pl.Trainer, *seen: Tensor) -> None:
        if self.record.add(*seen):
            self.flush(trainer)

    def latest(self) -> dict[str, float]:
        """The values of the last observation, for a progress bar."""
        return self.record.latest()

    def flush(self, trainer: pl.Trainer) -> None:
        """Write what was observed since the last time to all loggers."""
        steps, values = self.record.take()
        if not len(steps) or not trainer.is_global_zero:
            return
        tensorboards = self._tensorboards(trainer)
        for logger in trainer.loggers:
            if logger in tensorboards:
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


# -- Lightning under both of its names ------------------------------------------------------------


def _library() -> Any:
    """The package that the user's Trainer comes from: pytorch_lightning, or lightning.pytorch."""
    other = "lightning.pytorch" in sys.modules and "pytorch_lightning" not in sys.modules
    return importlib.import_module("lightning.pytorch" if other else "pytorch_lightning")


@functools.cache
def _as_callback(cls: type) -> type:
    """The class as one of Lightning's callbacks, too."""
    library = _library()
    if issubclass(cls, library.Callback):
        return cls
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls, library.Callback), body)


def _remake(cls: type, state: dict[str, Any]) -> Watch:
    """For pickle, which does not find the class that `_as_callback` makes."""
    watch = Watch.__new__(cls)
    watch.__dict__.update(state)
    return watch
