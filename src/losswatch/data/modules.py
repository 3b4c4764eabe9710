"""What losswatch needs to know about any data module, its own or the user's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import pytorch_lightning as pl
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor

from losswatch.data.folder import FolderImages
from losswatch.data.form import IGNORED, Form
from losswatch.data.random import ThresholdedImages

IMAGES = ("image", "images", "pixel_values", "img")
LABELS = ("label", "labels", "mask", "masks", "target")


def as_pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Images [N, channels, *space] and labels of a batch.

    Args:
        batch: (images, labels), or a mapping with a key of `IMAGES` and one of `LABELS`.

    Raises:
        ValueError: the batch is something else.
    """
    if isinstance(batch, Mapping):
        pair = [next((batch[k] for k in keys if k in batch), None) for keys in (IMAGES, LABELS)]
        what = f"keys {', '.join(map(str, batch))}"
    else:
        is_list = isinstance(batch, list | tuple) and len(batch) == 2
        pair, what = list(batch) if is_list else [None], f"a {type(batch).__name__}"
    match pair:
        case [Tensor() as images, Tensor() as labels]:
            return images, labels
    raise ValueError(
        f"data: a batch must be (images, labels), or a mapping with one of {', '.join(IMAGES)} and "
        f"one of {', '.join(LABELS)}, not {what}"
    )


def form_of(data: pl.LightningDataModule) -> Form:
    """The form of a module's data: its attribute `form`, or that of its training batches.

    Without the attribute every training batch is read once, and the largest label is the last
    class.

    Raises:
        ValueError: a network cannot be trained with these batches.
    """
    if isinstance(form := getattr(data, "form", None), Form):
        return form
    channels, dims, largest, has_ignored = 0, 0, 0, False
    for batch in _batches(data, "train"):
        images, labels = _as_trained(data, batch)
        channels, dims = images.shape[1], images.ndim - 2
        if labels.is_floating_point() or labels.ndim == images.ndim and labels.shape[1] > 1:
            raise ValueError(
                "data: labels must be class indices, [N, *space] of whole numbers; a module with "
                "other labels needs an attribute form, a losswatch.data.form.Form"
            )
        largest = max(largest, int(labels.max()))
        has_ignored |= bool((labels == IGNORED).any())
    if not dims:
        raise ValueError("data: the module has no training batch")
    classes = getattr(data, "class_names", None) or [f"class_{i}" for i in range(largest + 1)]
    return Form(channels, tuple(classes), dims, has_ignored=has_ignored)


def first_batch(data: pl.LightningDataModule, ranks: int) -> tuple[Tensor, Tensor]:
    """The part of the first training batch that the last of `ranks` devices gets."""
    if is_ours(data):
        images, labels = data.first_batch()
        share = len(images) // ranks
        return images[:share], labels[:share]
    return _as_trained(data, next(iter(_batches(data, "train"))))


def validation_batch(data: pl.LightningDataModule) -> tuple[Tensor, Tensor]:
    """The first validation batch that the user's own module gives."""
    return _as_trained(data, next(iter(_batches(data, "val"))))


def batches_per_epoch(data: pl.LightningDataModule) -> int | None:
    """The number of batches in one pass over the training images; None if it is unknown.

    The patches of a folder are random: one pass has as many patches as there are images.
    """
    if isinstance(data, ThresholdedImages):
        return data.batches or None
    if isinstance(data, FolderImages):
        return data.batches or math.ceil(len(data.layout.cases["train"]) / data.batch_size)
    try:
        return len(_batches(data, "train"))
    except (TypeError, NotImplementedError):  # an iterable data set
        return None


def count_batches(data: pl.LightningDataModule, split: str) -> int:
    """The number of batches of the validation ("val") or of the test.

    Raises:
        TypeError: the loader has no length.
    """
    return len(_batches(data, split))


def _batches(data: pl.LightningDataModule, split: str) -> Any:
    data.prepare_data()
    data.setup("test" if split == "test" else "fit")
    return getattr(data, f"{split}_dataloader")()


def _as_trained(data: pl.LightningDataModule, batch: Any) -> tuple[Tensor, Tensor]:
    """Images and labels on the CPU, after the hooks of the module have changed them."""
    return as_pair(data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0))


def is_ours(data: pl.LightningDataModule) -> TypeGuard[ThresholdedImages | FolderImages]:
    """Whether losswatch made the module: its batches are functions of seed and step."""
    return isinstance(data, ThresholdedImages | FolderImages)


def has_test(data: pl.LightningDataModule) -> bool:
    """Whether a module has test images."""
    if isinstance(data, FolderImages):
        return "test" in data.layout.cases
    return is_overridden("test_dataloader", data, pl.LightningDataModule)
