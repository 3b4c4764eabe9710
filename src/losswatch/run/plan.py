"""A plan: all that is known of a run before its first step."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import OmegaConf

from losswatch.checks.first_step import Traits
from losswatch.config.settings import Settings
from losswatch.data.form import Form
from losswatch.disk.checkpoint import Checkpoint


@dataclass(frozen=True)
class Plan:
    """Everything known of a run before its first step.

    Attributes:
        settings: the run's; `trainer["max_steps"]` is the length of the training.
        form: of the data.
        options: of Lightning's Trainer.
        threads: of the CPU.
        traits: of network and losses, from trying the first step; None if the run is trained
            elsewhere.
        data: the images to train with, if this process has made them.
        checkpoint: the trained network, for mode=test and mode=predict.
    """

    settings: Settings
    form: Form
    options: dict[str, Any]
    threads: int = 1
    traits: Traits | None = None
    data: pl.LightningDataModule | None = field(default=None, compare=False)
    checkpoint: Checkpoint | None = field(default=None, compare=False)

    @property
    def folder(self) -> Path:
        """Where the run writes everything."""
        return self.settings.job.folder

    @property
    def steps(self) -> int:
        """The length of the training."""
        return self.options["max_steps"]

    def filled(self, node: Any, folder: Path | None = None) -> Any:
        """A node in which values of the data and the run replace `${form...}` and `${run...}`.

        Args:
            folder: stands in for the folder of the run.
        """
        folder = folder or self.folder
        form = {name: getattr(self.form, name) for name in ("in_channels", "channels", "dims")}
        run = {"folder": str(folder), "name": self.folder.name}
        whole = OmegaConf.create({"form": form, "run": run, "node": node})
        return OmegaConf.to_container(whole, resolve=True)["node"]  # type: ignore[index, call-overload]

    def __getstate__(self) -> dict[str, Any]:
        """All but the images: another process makes its own."""
        return self.__dict__ | {"data": None}
