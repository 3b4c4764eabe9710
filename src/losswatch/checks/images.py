"""Checks that a run can be trained, validated and tested with its data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl

from losswatch.config.errors import ConfigError
from losswatch.data.folder import FolderImages
from losswatch.data.modules import count_batches, has_test, is_ours, validation_batch
from losswatch.text import one_line


def check_images(data: pl.LightningDataModule, options: Mapping[str, Any], ranks: int) -> None:
    """Check the sizes of batches and splits.

    Args:
        data: the run's.
        options: of the Trainer.
        ranks: how many devices share the images.

    Raises:
        ConfigError: a batch or a split has fewer images than there are devices, a share of a split
            is less than a batch, or the user's module gives no batch to validate on.
    """
    for key in ("batch_size", "eval_batch_size"):
        if is_ours(data) and (images := getattr(data, key, ranks)) < ranks:
            raise ConfigError(
                f"data.{key} must be at least {ranks}, an image for each device, got {images}"
            )
    if isinstance(data, FolderImages):
        for split, cases in data.layout.cases.items():
            if len(cases) < ranks:
                raise ConfigError(
                    f"{split} has {len(cases)} images, fewer than the {ranks} devices"
                )
    if not is_ours(data):
        _check_module(data, ranks)
    for split in ("val", "test"):
        share = options.get(f"limit_{split}_batches")
        if isinstance(share, float) and 0 < share < 1:
            _check_share(data, split, share, ranks)


def _check_share(data: pl.LightningDataModule, split: str, share: float, ranks: int) -> None:
    """Check that a share of a split is at least one batch of each device.

    Raises:
        ConfigError: the share is less than one batch, or the batches cannot be counted.
    """
    if split == "test" and not has_test(data):
        return
    option = f"trainer.limit_{split}_batches"
    try:
        batches = count_batches(data, split)
    except Exception as error:
        raise ConfigError(
            f"{option}={share} needs batches that can be counted: {one_line(error)}"
        ) from error
    if isinstance(data, FolderImages):
        batches //= ranks  # of images
    if share * batches < 1:
        raise ConfigError(
            f"{option}={share} of {batches} is less than one batch; whole numbers count batches"
        )


def _check_module(data: pl.LightningDataModule, ranks: int) -> None:
    """Check that the user's data module can be trained with.

    Raises:
        ConfigError: the module gives no batch to validate on, or several devices are asked for.
    """
    try:
        validation_batch(data)
    except Exception as error:
        raise ConfigError(
            f"data: its val_dataloader gives no batch to validate on: {one_line(error)}"
        ) from error
    if ranks > 1:
        raise ConfigError(
            f"trainer.devices x trainer.num_nodes is {ranks}: a data module of yours is trained on "
            "one device; data=random and data=folder share their batches among devices, and "
            "losswatch.Watch works in a Trainer of yours"
        )
