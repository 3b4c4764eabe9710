"""The callbacks of an ordinary run: progress bar, checkpoints, images, predicted masks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint, EarlyStopping, ProgressBar
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

from losswatch import compat
from losswatch.data.cases import Case
from losswatch.data.form import Form
from losswatch.data.modules import as_pair
from losswatch.data.writing import write_mask
from losswatch.disk.checkpoint import add_record, metrics_of, random_of, step_of
from losswatch.disk.checkpoint_files import checkpoint_path
from losswatch.disk.event_log import EventLog, side_by_side
from losswatch.events.tags import LOSS, PICTURES
from losswatch.run import randomness
from losswatch.terminal import ProgressSink, progress_bar
from losswatch.watch.lightning import Watch


class Progress(ProgressBar):
    """Shows the steps, the last validation's Dice and the values of the watched losses.

    The values are read only when the bar is redrawn, so the other steps cost nothing.
    """

    def __init__(self, watch: Watch | None) -> None:
        super().__init__()
        self.watch = watch
        self.shown = ExitStack()
        self.steps = ProgressSink()

    def disable(self) -> None:
        """Do nothing. Lightning calls this in all processes but the first; only that has a bar."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.done = trainer.global_step
        if trainer.is_global_zero:
            self.steps = self.shown.enter_context(progress_bar(trainer.max_steps, self.done))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.steps.is_due:
            dice = trainer.callback_metrics.get("val/dice")
            losses = self.watch.latest() if self.watch else {}
            self.steps.set_text(
                "" if dice is None else f"Dice {float(dice):.3f}",
                "  ".join(f"{name.removeprefix(LOSS)} {v:.3f}" for name, v in losses.items()),
            )
        self.steps.advance(trainer.global_step - self.done)
        self.done = trainer.global_step

    def on_train_end(self, *_: Any) -> None:
        self.shown.close()

    def on_exception(self, *_: Any) -> None:
        self.shown.close()


class Checkpoints(Checkpoint):
    """Writes a checkpoint at each validation, with what resuming needs (`disk.checkpoint`).

    Lightning calls this callback after all others.

    Args:
        folder: of the run.
        run, data: see `checkpoint.add_record`.
    """

    def __init__(
        self, folder: Path, run: dict[str, Any], data: dict[str, Any] | None = None
    ) -> None:
        self.folder, self.run, self.data = folder, run, data
        self.random: dict[str, Any] | None = None  # of the checkpoint from which the run goes on
        self.saved = 0  # the step of the last checkpoint
        self.validated = 0  # the step of the last validation
        self.metrics: dict[str, float] = {}  # of that validation

    def on_load_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.random, self.metrics = random_of(checkpoint), metrics_of(checkpoint)
        self.saved = step_of(checkpoint)
        self.validated = self.saved if self.metrics else 0

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if why_ended_early(trainer):  # early stopping ended the training before this attempt
            trainer.should_stop = True

    def on_train_batch_start(self, *_: Any) -> None:
        # Not earlier, because each of Lightning's loaders draws a random number when it starts.
        self._restore_random()

    def on_fit_end(self, *_: Any) -> None:
        self._restore_random()  # if no step was left, no batch has started

    def _restore_random(self) -> None:
        if self.random is not None:
            randomness.set_state(self.random)
            self.random = None

    def save(self, trainer: pl.Trainer) -> None:
        """Write a checkpoint of this step, unless there is one."""
        if self.saved != trainer.global_step:
            self.saved = trainer.global_step
            path = checkpoint_path(self.folder, trainer.global_step)
            trainer.save_checkpoint(path, weights_only=False)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """When the time is up, save before Lightning runs an extra validation.

        So a resumed run has the same curves as an uninterrupted one.
        """
        if not trainer.should_stop:
            return
        if compat.is_accumulating(trainer):
            trainer.should_stop = False  # do not stop in the middle of a step
        elif (batch_idx + 1) % compat.batches_between_validations(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.validated = trainer.global_step
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        # A checkpoint does not hold the gradients that exist in the middle of a step.
        if not compat.is_accumulating(trainer):
            self.save(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.is_global_zero and isinstance(trainer.logger, EventLog):
            for logger in trainer.loggers:
                logger.save()  # otherwise a kill would lose what another logger has not written
            sizes, random = trainer.logger.sizes(), randomness.get_state()
            metrics = self.metrics if self.validated == trainer.global_step else None
            add_record(checkpoint, self.run, sizes, self.data, random, metrics)


def why_ended_early(trainer: pl.Trainer) -> str | None:
    """Why early stopping has ended the training, which then counts as done; None if it has not."""
    stoppers = [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore
    reasons = [stopper.stopping_reason_message for stopper in stoppers]
    return next((" ".join(reason.split()) for reason in reasons if reason is not None), None)


class Images(pl.Callback):
    """Logs the first images of each validation: input, label and prediction side by side.

    Args:
        together: whether all go into one picture, which needs images of one size. If not, there is
            one picture for each batch.
    """

    COUNT = 4

    def __init__(self, together: bool = True) -> None:
        self.together = together

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Lightning's arguments; the outputs are the logits."""
        images, labels = as_pair(batch)
        shown = self.COUNT - batch_idx * len(images)
        if shown <= 0 or (batch_idx and self.together):
            return
        if not trainer.is_global_zero:
            return
        picture = side_by_side(images[:shown], labels[:shown], outputs[:shown])
        tag = PICTURES + ("" if self.together else f"/{batch_idx}")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(tag, picture, trainer.global_step)
            elif isinstance(logger, WandbLogger):
                logger.log_image(tag, [picture], step=trainer.global_step)


class Predictions(pl.Callback):
    """Writes the predicted mask of each image to predictions/ in the run's folder.

    Args:
        folder: of the run.
        form: of the data.
        values: the value of each class in a mask; see `coding.values_of`.
        cases: the images, in the order of the batches; each batch is one image.
    """

    def __init__(
        self, folder: Path, form: Form, values: Sequence[int | str], cases: Sequence[Case]
    ) -> None:
        self.folder, self.form, self.cases = folder / "predictions", form, cases
        self.colours = any(isinstance(value, str) for value in values)
        self.values = np.array(
            [int(str(v).lstrip("#"), 16 if self.colours else 10) for v in values]
        )

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Lightning's arguments; the outputs are the logits of one image."""
        case = self.cases[batch_idx * trainer.world_size + trainer.global_rank]
        [logits] = outputs.cpu()
        if self.form.target != "multilabel":
            masks = {"": self.values[logits.argmax(0).numpy()]}
        else:
            masks = {name: np.where(logits[i] > 0, self.values[i], 0)
                     for i, name in enumerate(self.form.classes)}  # fmt: skip
        for name, mask in masks.items():
            write_mask(
                mask, self.folder / name / case.name, case.images[0],
                values=self.values, colours=self.colours, axes=self.form.axes,
            )  # fmt: skip

    on_predict_batch_end = on_test_batch_end

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for all ranks: the first one says that the run is done, and ends the command."""
        trainer.strategy.barrier()
