"""What a run shows: the progress bar, images, and TensorBoard's charts and table of runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Checkpoint, TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.utils.tensorboard.summary import custom_scalars, hparams

from losswatch.events.encode import put_last
from losswatch.events.layout import SUFFIX
from losswatch.train import randomness, resume
from losswatch.watch.probe import Probe


class EventLog(TensorBoardLogger):
    """Lightning's TensorBoard logger with one event file a run: fit and test share it."""

    def __init__(self, folder: str) -> None:
        super().__init__(
            folder, name=None, version="", default_hp_metric=False, filename_suffix=SUFFIX
        )

    def save(self) -> None:
        """No hparams.yaml: the config stands in .hydra/ and result.json."""

    def finalize(self, status: str) -> None:
        self.experiment.flush()

    def close(self) -> None:
        self.experiment.close()

    def record(self, config: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint keeps of the run besides the training's state."""
        self.experiment.flush()
        return {"config": config, "events": resume.event_sizes(Path(self.log_dir))}


class Progress(TQDMProgressBar):
    """Lightning's progress bar with the watched losses and the last validation's accuracy.

    It asks the probe when it redraws itself, so it costs nothing in between. Off a terminal, and
    for the short validations, it is silent.
    """

    def __init__(self, probe: Probe | None) -> None:
        super().__init__(refresh_rate=20, leave=False)
        self.probe = probe
        if not sys.stderr.isatty():
            self.disable()

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)

    def init_test_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        shown = self.probe.latest() if self.probe else {}
        shown = {name.removeprefix("loss/"): value for name, value in shown.items()}
        if "val/accuracy" in trainer.callback_metrics:
            shown["accuracy"] = float(trainer.callback_metrics["val/accuracy"])
        return {name: f"{value:.3f}" for name, value in shown.items()}


class Checkpoints(Checkpoint):
    """Writes a checkpoint at each validation, with what `losswatch.train.resume` needs.

    Lightning calls it after all other callbacks.

    Args:
        folder, config: the run's.
        random: `randomness.get_state` in the checkpoint that the run goes on from.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], random: dict[str, Any] | None = None
    ) -> None:
        self.folder, self.config, self.random = folder, config, random
        self.saved = 0  # the step of the last one

    def on_train_batch_start(self, *_: Any) -> None:
        # Not earlier: to begin with, each of Lightning's loaders draws a number of its own.
        if self.random is not None:
            randomness.set_state(self.random)
            self.random = None

    def save(self, trainer: pl.Trainer) -> None:
        """Write a checkpoint of this step, unless there is one."""
        if self.saved != trainer.global_step:
            self.saved = trainer.global_step
            path = resume.checkpoint_path(self.folder, trainer.global_step)
            trainer.save_checkpoint(path, weights_only=False)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Where the time is up, save before Lightning validates out of turn.

        So a run that goes on from there has the curves of one that was never stopped.
        """
        if not trainer.should_stop:
            return
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            trainer.should_stop = False  # not in the middle of a step
        elif (batch_idx + 1) % int(trainer.val_check_batch or 1):
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # In the middle of a step there are gradients that a checkpoint does not hold.
        if (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.save(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Lightning's timer is all that has a state; an attempt that goes on has all of its time.
        checkpoint["callbacks"] = {}
        if isinstance(trainer.logger, EventLog) and trainer.is_global_zero:
            random = {"random": randomness.get_state()}
            checkpoint["losswatch"] = trainer.logger.record(self.config) | random


class Images(pl.Callback):
    """At each validation the first images: input, label and prediction side by side."""

    COUNT = 4

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx or not isinstance(trainer.logger, TensorBoardLogger):
            return
        images, label = batch[0][: self.COUNT], batch[1][: self.COUNT]
        log_images(trainer.logger, images, label, module(images), trainer.global_step)


def log_images(
    logger: TensorBoardLogger, image: Tensor, label: Tensor, logits: Tensor, step: int
) -> None:
    """Input [N, 1, *space], label [N, *space] and prediction side by side, a row an image."""
    prediction, brightest = logits.argmax(dim=1), logits.shape[1] - 1
    image = image[:, 0].float()
    low, high = image.amin(), image.amax()
    columns = [(image - low) / (high - low).clamp_min(1e-6), label / brightest]
    grid = torch.stack([*columns, prediction / brightest], dim=1)
    if grid.ndim == 5:  # of a volume, the middle slice
        grid = grid[:, :, grid.shape[2] // 2]
    zoom = -(-96 // grid.shape[-1])  # TensorBoard shows a pixel as a pixel
    grid = grid.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    grid = F.pad(grid, (4, 4, 4, 4), value=0.5)
    rows, columns_, height, width = grid.shape
    picture = grid.transpose(1, 2).reshape(1, rows * height, columns_ * width)
    logger.experiment.add_image("images/input_label_prediction", picture, step)


@rank_zero_only  # the others have no file to write to
def add_charts(logger: EventLog, cosines: bool) -> None:
    """The custom-scalars layout: all losses in one chart, all gradient norms in another."""
    charts = {
        "values of all losses": ["Multiline", ["^loss/"]],
        "gradient norms of all losses": ["Multiline", ["^grad_norm/"]],
        "validation": ["Multiline", ["^val/(accuracy|dice|iou)$"]],
    }
    if cosines:
        charts["cosines of the losses' gradients"] = ["Multiline", ["^grad_cosine/"]]
    logger.experiment.file_writer.add_summary(custom_scalars({"losswatch": charts}))


@rank_zero_only
def add_hparams(logger: EventLog, cfg: DictConfig, loss: str) -> None:
    """The HParams tab's row: what people sweep, beside the last value of each metric's curve."""
    model = cfg.model._target_.split(".")[-1]
    params = {
        "loss": loss,
        "theta": float(cfg.theta) if isinstance(cfg.theta, float) else str(cfg.theta),
        "model": f"{model} BN" if cfg.model.get("batch_norm") else model,
        "optimizer": cfg.optimizer._target_.split(".")[-1],
        "lr": float(cfg.optimizer.lr),
    }  # five, which is what the tab shows without a click; the rest is in result.json
    names = [f"{stage}/{name}" for stage in ("val", "test") for name in ("accuracy", "dice", "iou")]
    for summary in hparams(params, dict.fromkeys(names, 0.0)):
        logger.experiment.file_writer.add_summary(summary)


def open_log(cfg: DictConfig, loss: str, folder: Path, events: Mapping[str, int]) -> EventLog:
    """The run's event file, with its charts and its row of the HParams tab.

    Of an earlier attempt's files only the `events` of a checkpoint are kept.
    """
    logger = EventLog(str(folder))
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        resume.rewind(folder, events)
        put_last(logger.experiment)
    add_charts(logger, cosines=cfg.probe.cosines)
    add_hparams(logger, cfg, loss)
    return logger
