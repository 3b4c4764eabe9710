"""One network trained with one loss: the LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from losswatch.data.form import IGNORED, Form
from losswatch.data.modules import as_pair
from losswatch.disk.event_log import EventLog
from losswatch.losses import LossSet
from losswatch.run.finite import FiniteCheck
from losswatch.run.scores import ImageScores, PixelScores
from losswatch.watch.outputs import as_softmax, as_target


class SegmentationModule(pl.LightningModule):
    """Trains `net` with the loss called `trained`, and evaluates all of `losses`.

    Parameters of the trained loss are trained together with the network's.

    Args:
        net: maps images [N, channels, *space] to logits [N, C, *space].
        losses: the losses watched, the trained one among them.
        trained: the name of the trained loss.
        optimizer: makes an optimiser from the parameters.
        form: describes the user's data; None for random images.
        infer: maps the network and images of any size to the output of the network.
        scheduler: makes Lightning's config of a scheduler from an optimiser.
    """

    def __init__(
        self,
        net: nn.Module,
        losses: LossSet,
        trained: str,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        form: Form | None = None,
        infer: Callable[[nn.Module, Tensor], Tensor] | None = None,
        scheduler: Callable[[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.net, self.losses, self.trained = net, losses, trained
        self.loss = losses.losses[losses.names.index(trained)]
        for loss in losses.losses:  # a loss that is only watched is not trained
            loss.requires_grad_(loss is self.loss)
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.finite = FiniteCheck(trained)
        self.target = form.target if form else "softmax"
        self.is_random = form is None
        # For `Watch`.
        self.ignore_index = IGNORED if form and form.has_ignored else None
        self.activation = "sigmoid" if self.target == "multilabel" else "softmax"
        self.infer = infer or (lambda net, images: net(images))
        self.scores = ImageScores(form, losses.names) if form else PixelScores(losses.names)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}

    def forward(self, images: Tensor) -> Tensor:
        """The logits for images of any size, as the losses read them."""
        return self._as_logits(self.infer(self.net, images))

    def _as_logits(self, output: Tensor) -> Tensor:
        # One channel of a sigmoid is a softmax of two classes. So losses, metrics and pictures need
        # no case for it.
        return as_softmax(output, self.target) if self.target == "sigmoid" else output

    def _as_target(self, target: Tensor, logits: Tensor) -> Tensor:
        return target if self.target == "multilabel" else as_target(target, logits)

    # -- training ----------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, target = as_pair(batch)
        logits = self._as_logits(self.net(images))
        self.finite.check_logits(self, logits)
        value = self.loss(logits, self._as_target(target, logits))
        self.finite.keep_outputs(logits, value)
        return value

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.trainer.precision != "16-mixed":  # its scaler skips steps that are not finite
            self.finite.check_step(self, self.parameters())

    def on_train_batch_end(self, *_: object) -> None:
        self.finite.drop_outputs()

    def on_validation_start(self) -> None:
        self.finite.raise_if_bad(self)

    def on_train_end(self) -> None:
        self.finite.raise_if_bad(self)

    # -- evaluation --------------------------------------------------------------------------------

    def _evaluate(self, batch: Any) -> Tensor:
        images, target = as_pair(batch)
        logits = self(images)
        self.scores.add(logits, self._as_target(target, logits), self.losses)
        return logits

    def _report(self, stage: str) -> dict[str, Tensor]:
        found = self.scores.compute_and_reset(self.trainer.strategy)
        scalars = {f"{stage}/{name}": value for name, value in found.items()}
        self.log_dict(scalars, logger=False)
        if not self.trainer.is_global_zero:
            return scalars
        values = torch.stack(list(scalars.values())).tolist()
        numbers, step = dict(zip(scalars, values, strict=True)), self.trainer.global_step
        for logger in self.trainer.loggers:
            if isinstance(logger, EventLog):
                logger.write_metrics(step, numbers)
            else:
                logger.log_metrics(numbers, step=step)
        return scalars

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        found = self._report("val")
        # The scheduler steps here, so that the checkpoint of this validation holds its new state.
        if self.trainer.state.fn is TrainerFn.FITTING:
            for config in self.trainer.lr_scheduler_configs:
                if isinstance(config.scheduler, ReduceLROnPlateau):
                    # Which classes the user's own data module lacks is known only now.
                    if (score := found.get(str(config.monitor))) is None:
                        raise ValueError(
                            f"metric={config.monitor}: no validation image has the class, so the "
                            "scheduler has nothing to go by; take a metric of all classes"
                        )
                    config.scheduler.step(score)

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def predict_step(self, images: Tensor, batch_idx: int) -> Tensor:
        return self(images)
