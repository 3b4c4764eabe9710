"""A run's event file: its logger, TensorBoard's charts and table of runs, and the images shown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

from losswatch.compat import process_rank
from losswatch.events.charts import add_charts
from losswatch.events.encode import put_last
from losswatch.events.layout import SUFFIX
from losswatch.train.curves import event_sizes, rewind


class EventLog(TensorBoardLogger):
    """Lightning's TensorBoard logger with one event file for a run: fit and test share it."""

    has_charts = True  # `open_log` writes their layout, for runs that are not watched too

    def __init__(self, folder: str) -> None:
        super().__init__(
            folder, name=None, version="", default_hp_metric=False, filename_suffix=SUFFIX
        )

    def save(self) -> None:
        """Write no hparams.yaml: the config stands in .hydra/ and result.json."""

    def finalize(self, status: str) -> None:
        self.experiment.flush()

    def close(self) -> None:
        self.experiment.close()

    def sizes(self) -> dict[str, int]:
        """Bytes of each of the run's event files by name, with all that was logged on the disk."""
        self.experiment.flush()
        return event_sizes(Path(self.log_dir))


def open_log(cfg: DictConfig, loss: str, folder: Path, events: Mapping[str, int]) -> EventLog:
    """The run's event file, with its charts and its row of the HParams tab.

    Args:
        cfg, loss, folder: of the run; `loss` is the name of the trained loss.
        events: the event files and sizes that a checkpoint knows; what an earlier attempt wrote
            beyond them is removed.
    """
    logger = EventLog(str(folder))
    if process_rank() == 0:
        rewind(folder, events)
        put_last(logger.experiment)
        add_charts(logger.experiment, cosines=cfg.probe.cosines, validation=True)
    add_hparams(logger, cfg, loss)
    return logger


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
    }  # five, as many as the tab shows without a click; the rest is in result.json
    names = [f"{stage}/{name}" for stage in ("val", "test") for name in ("accuracy", "dice", "iou")]
    for summary in hparams(params, dict.fromkeys(names, 0.0)):
        logger.experiment.file_writer.add_summary(summary)


def log_images(
    logger: TensorBoardLogger, image: Tensor, label: Tensor, logits: Tensor, step: int
) -> None:
    """Log input, label and prediction side by side, a row for each image.

    Args:
        logger, step: where and when.
        image: [N, 1, *space].
        label: [N, *space].
        logits: [N, C, *space].
    """
    prediction, brightest = logits.argmax(dim=1), logits.shape[1] - 1
    image = image[:, 0].float()
    low, high = image.amin(), image.amax()
    tiles = [(image - low) / (high - low).clamp_min(1e-6), label / brightest]
    grid = torch.stack([*tiles, prediction / brightest], dim=1)
    if grid.ndim == 5:  # of a volume, the middle slice
        grid = grid[:, :, grid.shape[2] // 2]
    zoom = -(-96 // grid.shape[-1])  # TensorBoard shows a pixel as a pixel
    grid = grid.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    grid = F.pad(grid, (4, 4, 4, 4), value=0.5)
    rows, columns, height, width = grid.shape
    picture = grid.transpose(1, 2).reshape(1, rows * height, columns * width)
    logger.experiment.add_image("images/input_label_prediction", picture, step)
