"""The metrics of a validation, and checks of the callbacks that use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from losswatch.config.errors import ConfigError
from losswatch.disk.checkpoint_files import step_in_name
from losswatch.events.tags import PREDICTED
from losswatch.text import one_line

_SCORES = ("dice", "iou")  # of each class


@dataclass(frozen=True)
class Metrics:
    """What each validation computes.

    Attributes:
        names: of the metrics.
        missing: the classes of which no validation image has a pixel. A validation computes their
            scores only if the network predicts them, so they are not in `names`.
    """

    names: tuple[str, ...]
    missing: tuple[str, ...] = ()

    @classmethod
    def of(cls, classes: Sequence[str], losses: Sequence[str], missing: Sequence[str]) -> Metrics:
        """The metrics of a validation with these classes and losses."""
        present = [label for label in classes if label not in missing]
        scores = [f"{score}/{label}" for score in _SCORES for label in present]
        shares = (f"{PREDICTED}/{label}" for label in classes)
        names = (*_SCORES, "accuracy", *scores, *shares, *(f"loss/{name}" for name in losses))
        return cls(tuple(f"val/{name}" for name in names), tuple(missing))

    def check(self, what: str, name: str) -> None:
        """Check that each validation computes a metric.

        Args:
            what: the subject of a message's sentence.
            name: of the metric.

        Raises:
            ConfigError: no validation computes the metric, or not each one does.
        """
        if name in self.names:
            return
        for label in self.missing:
            if name in [f"val/{score}/{label}" for score in _SCORES]:
                raise ConfigError(
                    f"{what} needs class {label}, of which no image of val has a pixel; give val "
                    "an image with it, or take a metric of all classes, such as val/dice"
                )
        raise ConfigError(
            f"{what} is not a metric of the validation, which has {', '.join(self.names)}"
        )


def check_callbacks(
    callbacks: Sequence[object], metrics: Metrics, folder: Path, multirun: bool
) -> None:
    """Check that each callback monitors a known metric, and that no checkpoint replaces another.

    Args:
        callbacks: the user's.
        metrics: of each validation.
        folder: stands in for the folder of the run.
        multirun: whether the run is one of a sweep.

    Raises:
        ConfigError: a callback monitors an unknown metric, or two checkpoints share a name.
    """
    _check_monitors(callbacks, metrics)
    _check_checkpoints(callbacks, metrics, folder, multirun)


def _check_monitors(callbacks: Sequence[object], metrics: Metrics) -> None:
    """Check that each callback monitors a known metric.

    Raises:
        ConfigError: a callback monitors an unknown metric.
    """
    # The user's own callback may log a metric of its own.
    are_lightnings = all("lightning" in type(c).__module__.split(".")[0] for c in callbacks)
    for callback in callbacks:
        monitor, kind = getattr(callback, "monitor", None), type(callback).__name__
        must_be_known = are_lightnings or str(monitor).startswith("val/")
        if monitor is not None and must_be_known:
            metrics.check(f"callbacks: the {kind} monitors {monitor}, which", monitor)


def _check_checkpoints(
    callbacks: Sequence[object], metrics: Metrics, folder: Path, multirun: bool
) -> None:
    """Check that no checkpoint of a callback replaces another one.

    For the arguments see `check_callbacks`.

    Raises:
        ConfigError: a checkpoint would replace another one.
    """
    taken: set[Path] = set()
    for callback in callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        values = {name: torch.tensor(0.5) for name in metrics.names} | {"epoch": torch.tensor(0)}
        try:
            path, later = (
                folder / "checkpoints" / callback.format_checkpoint_name(
                    values | {"step": torch.tensor(step)}
                )
                for step in (1, 2)
            )  # fmt: skip
        except Exception as error:
            raise ConfigError(
                f"callbacks: filename={callback.filename} makes no name: {one_line(error)}"
            ) from error
        if path == later and callback.save_top_k not in (0, 1):
            raise ConfigError(
                f"callbacks: with save_top_k={callback.save_top_k} each checkpoint needs a "
                f"name of its own, such as \"callbacks.best.filename='best-{{step}}'\""
            )
        if path.parent == folder / "checkpoints" and step_in_name(path) >= 0:
            raise ConfigError(
                f"callbacks: filename={callback.filename} gives checkpoints the names of the run's "
                f"own, {path.name}; give another one, such as "
                f"\"callbacks.best.filename='best-{{step}}'\""
            )
        if path in taken:
            raise ConfigError(
                f"callbacks: two of them write {path.name} to one folder; give one of them another "
                "filename"
            )
        taken.add(path)
        if multirun and not path.is_relative_to(folder):
            raise ConfigError(
                f"callbacks: all runs of a sweep would write to {path.parent}; give a relative "
                "dirpath, which lies in the folder of each run"
            )
