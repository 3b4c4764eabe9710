"""A run's log: its event file with TensorBoard's charts, and its own record (curves.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from losswatch.compat import process_rank
from losswatch.config.settings import Settings
from losswatch.data.survey import Survey
from losswatch.disk.curves import SIGN_COLUMNS_FILE, SIGNS_FILE, Curves
from losswatch.disk.growing_files import file_sizes, rewind
from losswatch.disk.hparams import add_hparams
from losswatch.events.charts import add_charts
from losswatch.events.encode import write_scalars
from losswatch.events.layout import SUFFIX


class EventLog(TensorBoardLogger):
    """Lightning's TensorBoard logger with one event file for a run: fit and test share it.

    Curves and metrics go to the run's own record, too.
    """

    has_charts = True  # `open_log` writes the layout of charts, also for runs that are not watched

    def __init__(self, folder: str) -> None:
        super().__init__(
            folder, name=None, version="", default_hp_metric=False, filename_suffix=SUFFIX
        )
        self.curves = Curves(Path(folder))
        self.signs = Curves(Path(folder), SIGNS_FILE, SIGN_COLUMNS_FILE)

    def write_curves(self, tags: Sequence[str], steps: np.ndarray, values: np.ndarray) -> None:
        """Write a block of observations; see `Curves.append`."""
        write_scalars(self.experiment, tags, steps, values)
        self.curves.append(tags, steps, values)

    def write_signs(self, tags: Sequence[str], steps: Sequence[int], values: Tensor | None) -> None:
        """Write what the doctor saw, into the run's record alone; see `Doctor.drain`."""
        if steps and values is not None:
            self.signs.append(tags, np.array(steps), values.cpu().numpy())

    def write_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a validation or a test, by tag."""
        values = np.array([list(metrics.values())])
        write_scalars(self.experiment, list(metrics), np.array([step]), values)
        self.curves.add_metrics(step, metrics)

    def save(self) -> None:
        """Write no hparams.yaml: .hydra/ and result.json hold the config."""

    def finalize(self, status: str) -> None:
        self.experiment.flush()

    def close(self) -> None:
        self.experiment.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close the log. If the run has failed, an error in closing (a full disk) is ignored."""
        with suppress(OSError) if error else nullcontext():
            self.close()

    def sizes(self) -> dict[str, int]:
        """Bytes of each growing file by name, after everything logged has been written."""
        self.experiment.flush()
        return file_sizes(Path(self.log_dir))


def open_log(settings: Settings, sizes: Mapping[str, int]) -> EventLog:
    """A run's log, with TensorBoard's charts and the run's row of the HParams tab.

    Args:
        settings: the run's.
        sizes: of the growing files, at the checkpoint. What an earlier attempt wrote after that is
            removed.
    """
    logger = EventLog(str(settings.job.folder))
    if process_rank() == 0:
        rewind(settings.job.folder, sizes)
        with ExitStack() as on_failure:
            on_failure.enter_context(logger)
            add_charts(logger.experiment, cosines=settings.probe.cosines, validation=True)
            add_hparams(logger.experiment, settings)
            on_failure.pop_all()  # the log stays open
    return logger


def log_survey(logger: TensorBoardLogger, found: Survey) -> None:
    """Log the share of each class in each split as a picture."""
    # Imported late: Matplotlib takes a second.
    from matplotlib.figure import Figure

    table = found.classes.pivot(index="class", columns="split", values="share")
    table = table.loc[found.classes["class"].unique(), found.splits.index]
    figure = Figure(figsize=(6, 1.5 + 0.35 * len(table)), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="share of pixels")
    table[::-1].plot.barh(ax=axes)
    axes.set_ylabel("")
    logger.experiment.add_figure("data/class_shares", figure)


def side_by_side(image: Tensor, label: Tensor, logits: Tensor) -> Tensor:
    """Input, label and prediction as one picture, a row for each image. Ignored pixels are red.

    Args:
        image: [N, channels, *space]. Three channels are shown as colours; otherwise the first
            channel is shown.
        label: [N, *space], or [N, C, *space] if classes overlap; then pixels of more classes are
            brighter.
        logits: [N, C, *space].

    Returns:
        [3, height, width], from 0 to 1.
    """
    if label.ndim == logits.ndim and label.shape[1] > 1:
        label, prediction, brightest = label.sum(1), (logits > 0).sum(1), logits.shape[1]
    else:
        label = label.reshape(len(label), *logits.shape[2:])
        prediction, brightest = logits.argmax(dim=1), max(1, logits.shape[1] - 1)
    image = image[:, :3] if image.shape[1] == 3 else image[:, :1].expand(-1, 3, *image.shape[2:])
    image = image.float()
    low, high = image.amin(), image.amax()
    red = torch.tensor([1.0, 0, 0], device=image.device).view(1, 3, *[1] * (image.ndim - 2))
    ignored = (label < 0).unsqueeze(1)
    tiles = [(image - low) / (high - low).clamp_min(1e-6)]
    for classes in (label, prediction):
        tiles.append(torch.where(ignored, red, (classes / brightest).unsqueeze(1).float()))
    grid = torch.stack(tiles, dim=1)  # [N, 3, 3, *space]
    if grid.ndim == 6:  # show the middle slice of a volume
        grid = grid[..., grid.shape[3] // 2, :, :]
    zoom = -(-96 // grid.shape[-1])  # TensorBoard does not enlarge pictures
    grid = grid.repeat_interleave(zoom, dim=3).repeat_interleave(zoom, dim=4)
    grid = F.pad(grid, (4, 4, 4, 4), value=0.5)
    rows, columns, colours, height, width = grid.shape
    return grid.permute(2, 0, 3, 1, 4).reshape(colours, rows * height, columns * width)
