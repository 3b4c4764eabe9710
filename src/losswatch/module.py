"""One network trained with one loss: the LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassJaccardIndex,
)

from losswatch.losses import LossSet
from losswatch.networks import GEMM_CHANNELS


def segmentation_metrics(num_classes: int) -> MetricCollection:
    """Pixel accuracy, and Dice (F1 of the pixels) and IoU of each class.

    A class that neither label nor prediction holds is perfect: 1.
    """
    per_class = {"num_classes": num_classes, "average": "none", "validate_args": False}
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
            "dice": MulticlassF1Score(**per_class, zero_division=1.0),
            "iou": MulticlassJaccardIndex(**per_class, zero_division=1.0),
        }
    )


class SegmentationModule(pl.LightningModule):
    """Trains `net` with the loss called `trained`, evaluates all of `losses`.

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
        self.make_optimizer = optimizer
        self.metrics = nn.ModuleDict(
            {stage: segmentation_metrics(num_classes) for stage in ("val", "test")}
        )
        # Sums over pixels of each loss, and of the pixels, while a stage runs.
        self.loss_sums = torch.zeros(len(losses.names) + 1, dtype=torch.float64)
        self.logits = self.target = torch.empty(0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])

    def on_fit_start(self) -> None:
        widths = [m.in_channels for m in self.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
        # On a CPU, oneDNN's convolutions take 2.5 times as long as PyTorch's own on so narrow a
        # net. Backward looks the switch up again, so it holds for the whole run.
        torch.backends.mkldnn.enabled = max(widths, default=64) > GEMM_CHANNELS

    def on_fit_end(self) -> None:
        torch.backends.mkldnn.enabled = True

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, self.target = batch
        self.logits = self.net(images)
        return self.loss(self.logits, self.target)

    def on_train_batch_end(self, *_: object) -> None:
        self.logits = self.target = torch.empty(0)  # the graph is not kept

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        images, target = batch
        logits = self.net(images)
        self.metrics[stage].update(logits.argmax(dim=1), target)
        pixels = target.numel()
        values = torch.cat([self.losses(logits, target) * pixels, target.new_tensor([pixels])])
        self.loss_sums = self.loss_sums.to(values.device) + values

    def _report(self, stage: str) -> None:
        metrics = self.metrics[stage].compute()
        self.metrics[stage].reset()
        scalars = {f"{stage}/accuracy": metrics["accuracy"]}
        for name in ("dice", "iou"):
            scalars[f"{stage}/{name}"] = metrics[name].mean()
            for i, value in enumerate(metrics[name]):
                scalars[f"{stage}/{name}/class_{i}"] = value
        sums = self.trainer.strategy.reduce(self.loss_sums, reduce_op="sum")
        self.loss_sums = torch.zeros_like(self.loss_sums)
        for name, value in zip(self.losses.names, sums[:-1] / sums[-1], strict=True):
            scalars[f"{stage}/loss/{name}"] = value.float()
        self.log_dict(scalars)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def on_test_epoch_end(self) -> None:
        self._report("test")
