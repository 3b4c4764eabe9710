"""One network trained with one loss: the LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from losswatch.events.encode import write_scalars
from losswatch.losses import LossSet


def scores(confusion: Tensor) -> dict[str, Tensor]:
    """Pixel accuracy, and Dice and IoU of each class and on average, from confusion matrices.

    Args:
        confusion: [..., C, C], label by prediction. A class that neither holds counts as perfect.

    >>> scores(torch.tensor([[3, 1], [0, 4]]))["dice/class_1"]
    tensor(0.8889)
    """
    hits = confusion.diagonal(dim1=-2, dim2=-1).double()
    both = (confusion.sum(-1) + confusion.sum(-2)).double()
    per_class = {
        "dice": torch.where(both > 0, 2 * hits / both, 1.0),
        "iou": torch.where(both > 0, hits / (both - hits), 1.0),
    }
    out = {"accuracy": hits.sum(-1) / confusion.sum((-1, -2))}
    for name, values in per_class.items():
        out[name] = values.mean(-1)
        out |= {f"{name}/class_{i}": values[..., i] for i in range(values.shape[-1])}
    return {name: value.float() for name, value in out.items()}


class SegmentationModule(pl.LightningModule):
    """Trains `net` with the loss called `trained`, evaluates all of `losses`.

    Parameters that the trained loss has are trained with the network's.

    Args:
        net: maps images [N, 1, *space] to logits [N, C, *space].
        losses: the losses watched, the trained one among them.
        trained: its name.
        optimizer: makes an optimiser from the parameters.
        num_classes: C.

    After each training step `logits` and `target` hold its outputs, for callbacks.
    """

    def __init__(
        self,
        net: nn.Module,
        losses: LossSet,
        trained: str,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        num_classes: int,
    ) -> None:
        super().__init__()
        self.net, self.losses, self.trained = net, losses, trained
        self.loss = losses.losses[losses.names.index(trained)]
        for loss in losses.losses:  # what is only watched is not trained
            loss.requires_grad_(loss is self.loss)
        self.make_optimizer = optimizer
        self.confusion = MulticlassConfusionMatrix(num_classes, validate_args=False)
        # Sums over pixels of each loss, and of the pixels, while a stage runs.
        self.loss_sums = torch.zeros(len(losses.names) + 1, dtype=torch.float64)
        self.logits = self.target = self.value = torch.empty(0)
        # The first step whose loss or gradient is not finite; a tensor, so no GPU need wait.
        self.bad_step = torch.tensor(-1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, self.target = batch
        self.logits = self.net(images)
        if self.logits.is_cpu and not self.logits.isfinite().all():
            self._stop(self.trainer.global_step)
        self.value = self.loss(self.logits, self.target)
        return self.value

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.trainer.precision == "16-mixed":  # its scaler skips such steps
            return
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.parameters() if p.grad is not None]
        )
        bad = (norm + self.value.detach()).isfinite().logical_not()
        before = self.bad_step.to(norm.device)
        self.bad_step = torch.where(bad & (before < 0), self.trainer.global_step, before)
        if norm.is_cpu:
            self._look()

    def on_validation_start(self) -> None:
        self._look()

    def on_train_end(self) -> None:
        self._look()

    def _look(self) -> None:
        if (step := int(self.bad_step)) >= 0:
            self._stop(step)

    def _stop(self, step: int) -> None:
        """Name the first tensor that is not finite, in the order of the computation."""
        named = [*self.net.named_parameters(), *self.loss.named_parameters()]
        tensors = [
            *named,
            ("the logits", self.logits),
            (f"the loss {self.trained}", self.value),
            *((f"the gradient of {name}", p.grad) for name, p in reversed(named)),
        ]
        for name, tensor in tensors:
            if tensor is not None and not (finite := tensor.isfinite()).all():
                first = float(tensor.detach()[~finite][0])
                raise FloatingPointError(
                    f"trained with {self.trained}, step {step}: {name} is {first}"
                )
        raise FloatingPointError(f"trained with {self.trained}, step {step}: it was not finite")

    def on_train_batch_end(self, *_: object) -> None:
        self.logits = self.target = torch.empty(0)  # the graph is not kept

    def _evaluate(self, batch: tuple[Tensor, Tensor]) -> None:
        images, target = batch
        logits = self.net(images)
        # argmax is ten times as slow on a CPU unless the classes come last.
        self.confusion.update(logits.max(dim=1).indices, target)
        pixels = logits.new_full((1,), target.numel())
        with isolate_rng() if self.losses.foreign else nullcontext():  # of losses that draw
            values = torch.cat([self.losses(logits, target) * pixels, pixels])
        if target.numel():  # a last batch may leave nothing to some ranks, whose loss may be NaN
            self.loss_sums = self.loss_sums.to(values.device) + values

    def _report(self, stage: str) -> None:
        scalars = scores(self.confusion.compute())
        self.confusion.reset()
        sums = self.trainer.strategy.reduce(self.loss_sums, reduce_op="sum")
        self.loss_sums = torch.zeros_like(self.loss_sums)
        for name, value in zip(self.losses.names, sums[:-1] / sums[-1], strict=True):
            scalars[f"loss/{name}"] = value.float()
        scalars = {f"{stage}/{name}": value for name, value in scalars.items()}
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
