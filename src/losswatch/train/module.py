"""One network trained with one loss: the LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn

from losswatch.events.encode import write_scalars
from losswatch.losses import LossSet
from losswatch.train.evaluation import Tally, metrics, tally
from losswatch.train.finite import FiniteCheck


class SegmentationModule(pl.LightningModule):
    """Trains `net` with the loss called `trained`, evaluates all of `losses`.

    Parameters of the trained loss are trained together with the network's.

    Args:
        net: maps images [N, 1, *space] to logits [N, C, *space].
        losses: the losses watched, the trained one among them.
        trained: its name.
        optimizer: makes an optimiser from the parameters.
    """

    def __init__(
        self,
        net: nn.Module,
        losses: LossSet,
        trained: str,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    ) -> None:
        super().__init__()
        self.net, self.losses, self.trained = net, losses, trained
        self.loss = losses.losses[losses.names.index(trained)]
        for loss in losses.losses:  # a loss that is only watched is not trained
            loss.requires_grad_(loss is self.loss)
        self.make_optimizer = optimizer
        self.finite = FiniteCheck(trained)
        self.tally: Tally | None = None  # of the evaluation under way

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    # -- training ----------------------------------------------------------------------------------

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, target = batch
        logits = self.net(images)
        self.finite.check_logits(self, logits)
        value = self.loss(logits, target)
        self.finite.see(logits, value)
        return value

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.trainer.precision != "16-mixed":  # whose scaler skips steps that are not finite
            self.finite.check_step(self, self.parameters())

    def on_train_batch_end(self, *_: object) -> None:
        self.finite.forget()

    def on_validation_start(self) -> None:
        self.finite.look(self)

    def on_train_end(self) -> None:
        self.finite.look(self)

    # -- evaluation --------------------------------------------------------------------------------

    def _evaluate(self, batch: tuple[Tensor, Tensor]) -> None:
        images, target = batch
        found = tally(self.net(images), target, self.losses)
        self.tally = self.tally.plus(found) if self.tally else found

    def _report(self, stage: str) -> None:
        assert self.tally is not None
        total = Tally(*(self.trainer.strategy.reduce(t, reduce_op="sum") for t in self.tally))
        self.tally = None
        found = metrics(total, self.losses.names)
        scalars = {f"{stage}/{name}": value for name, value in found.items()}
        self.log_dict(scalars, logger=False)
        if isinstance(self.logger, TensorBoardLogger) and self.trainer.is_global_zero:
            values = torch.stack(list(scalars.values())).cpu().numpy()[None]
            step = np.array([self.trainer.global_step])
            write_scalars(self.logger.experiment, list(scalars), step, values)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        self._report("test")
