"""A folder of images and masks: patches to train with, whole images to validate and test."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch import Tensor
from torch.utils.data import DataLoader

from losswatch.data.form import NORMALISATIONS, TARGETS, Form
from losswatch.data.labels import (
    check_classes,
    classes_as_found,
    counts_of_classes,
    values_of,
)
from losswatch.data.layouts import SPLITS, Case, Classes, Layout, read_layout, unlabelled
from losswatch.data.patches import (
    Items,
    Patches,
    Whole,
    infer,
    load_image,
    load_item,
    make_crops,
    patch_sides,
)
from losswatch.data.steps import Steps, batch_loader
from losswatch.data.survey import Look, Survey, check_alike, look_at, survey

SAMPLINGS = ("random", "balanced")


class FolderImages(pl.LightningDataModule):
    """The images and masks of a folder.

    A training batch is a function of the seed and the step. A mask's values become classes 0, 1,
    ... in the order of `classes`.

    Args:
        root: the folder. It holds images/ and masks/, whole or each in train/, val/ and test/; or
            dataset.json, imagesTr/ and labelsTr/ (nnU-Net v2). Folders in masks/ are classes that
            overlap, each with a mask for every image.
        seed: chooses patches and augmentation.
        images, masks, image_suffix, mask_suffix, shares: as of `layouts.read_layout`; the shares
            are `val_share` and `test_share`.
        target: as of `Form`; null: "multilabel" where classes overlap, "softmax" otherwise.
        classes: the values in a mask of each class, see `labels.check_classes`; null: as found.
        ignore_index: the value in a mask of pixels that count nowhere.
        patch_size: sides of a patch in pixels, one number or one for each axis; null: whole images.
        sampling: patches at a "random" place of a random image, or "balanced": around a random
            pixel of a random class.
        flip: mirror each axis of a patch in half of the cases.
        intensity: scale by a factor from 1 - intensity to 1 + intensity, and shift by up to
            intensity; in half of the cases each.
        normalize: of each channel of an image: "zscore" (mean 0, deviation 1), "unit" (0 to 1),
            "none".
        batch_size: patches of a training step, over all devices together.
        batches: training repeats the first so many batches; 0 never repeats one.
        num_workers: processes that prepare batches in the background; null: one less than there are
            cores, at most four.
        cache_mb: MB of decoded images that are kept in memory; others are read at each use.

    Raises:
        ValueError: the folder or a setting cannot be used; in one line.
    """

    def __init__(
        self,
        root: str,
        *,
        seed: int = 0,
        images: str = "images",
        masks: str = "masks",
        image_suffix: str = "",
        mask_suffix: str = "",
        val_share: float = 0.2,
        test_share: float = 0.2,
        target: str | None = None,
        classes: Mapping[str, Any] | None = None,
        ignore_index: int | None = None,
        patch_size: int | Sequence[int] | None = 64,
        sampling: str = "random",
        flip: bool = True,
        intensity: float = 0.1,
        normalize: str = "zscore",
        batch_size: int = 8,
        batches: int = 0,
        num_workers: int | None = None,
        cache_mb: int = 1024,
    ) -> None:
        super().__init__()
        if lacking := [
            name for name in ("monai", "nibabel", "PIL", "tifffile") if not find_spec(name)
        ]:
            raise ValueError(f'{", ".join(lacking)} is missing: pip install "losswatch[images]"')
        for name, value, allowed in (
            ("target", target or "softmax", TARGETS),
            ("sampling", sampling, SAMPLINGS),
            ("normalize", normalize, NORMALISATIONS),
        ):
            if value not in allowed:
                raise ValueError(f"data.{name}={value}: allowed are {', '.join(allowed)}")
        for name, number, least in (
            ("batch_size", batch_size, 1), ("num_workers", num_workers or 0, 0),
            ("cache_mb", cache_mb, 0), ("intensity", intensity, 0), ("batches", batches, 0),
        ):  # fmt: skip
            if number < least:
                raise ValueError(f"data.{name} must be at least {least}, got {number}")
        shares = {"val": val_share, "test": test_share}
        if not (0 < val_share < 1 and 0 <= test_share < 1 and val_share + test_share < 1):
            raise ValueError(f"data.val_share and data.test_share must leave a rest, got {shares}")
        self.root, self.seed, self.batch_size = Path(root), seed, batch_size
        self.batches, self.normalize, self.cache_mb = batches, normalize, cache_mb
        self.num_workers = min(4, (os.cpu_count() or 1) - 1) if num_workers is None else num_workers
        self.layout, self.looks = _layout(
            self.root, images, masks, image_suffix, mask_suffix, val_share, test_share
        )
        every = [look for looks in self.looks.values() for look in looks]
        self.ignored = self.layout.ignored if ignore_index is None else ignore_index
        self.classes = self._classes(classes, every)
        self.survey: Survey = survey(self.layout, self.looks, self.classes, self.ignored)
        self.form = Form(
            in_channels=every[0].shape[0],
            classes=tuple(self.classes),
            dims=len(every[0].shape) - 1,
            target=target or ("multilabel" if self.layout.overlap else "softmax"),
            has_ignored=self.ignored is not None,
        )
        self._check_form()
        self.values = values_of(self.classes)
        self.patch = self._patch(patch_size)
        self.infer = functools.partial(infer, patch=self.patch, count=batch_size)
        self.crops = make_crops(self.form, self.patch, sampling, flip, intensity)
        self.rank, self.world_size = 0, 1

    def _classes(self, given: Any, looks: Sequence[Look]) -> Classes:
        if given is not None:
            return check_classes(given, self.layout.overlap)
        if self.layout.classes is not None:
            return check_classes(self.layout.classes, self.layout.overlap)
        values = {value for look in looks for counts in look.counts for value in counts}
        return classes_as_found(sorted(values - {self.ignored}))

    def _check_form(self) -> None:
        target, count = self.form.target, len(self.form.classes)
        if (target == "multilabel") != self.layout.overlap:
            have = "overlap" if self.layout.overlap else "do not overlap"
            raise ValueError(
                f"data.target={target}, but the classes of {self.root} {have}; multilabel is for a "
                "folder of masks for each class, or for the regions of nnU-Net"
            )
        if target == "multilabel" and self.form.has_ignored:
            raise ValueError("data.ignore_index is for classes that do not overlap")
        if target == "sigmoid" and count != 2 or count < 1 + (target == "softmax"):
            raise ValueError(f"data.target={target} needs two classes, data.classes has {count}")
        shares = self.survey.classes.query("split == 'train'")
        for name in shares[shares["share"] == 0]["class"]:
            raise ValueError(
                f"no training image has a pixel of class {name}; move one to the training images"
            )

    @property
    def missing(self) -> list[tuple[str, str]]:
        """The splits and classes of which the split has no pixel."""
        rows = self.survey.classes.query("share == 0")
        return list(zip(rows["split"], rows["class"], strict=True))

    def _patch(self, size: int | Sequence[int] | None) -> tuple[int, ...] | None:
        """The sides of a patch; None for whole images."""
        cases, looks = self.layout.cases["train"], self.looks["train"]
        sides = patch_sides(size, self.form.dims)
        if sides is None:
            for case, look in zip(cases, looks, strict=True):
                if look.shape != looks[0].shape:
                    raise ValueError(
                        f"data.patch_size=null needs images of one size, but {case.images[0]} and "
                        f"{cases[0].images[0]} differ"
                    )
            return None
        if len(sides) != self.form.dims or any(type(n) is not int or n < 1 for n in sides):
            raise ValueError(
                f"data.patch_size must be a whole number or {self.form.dims} of them, got {size}"
            )
        for case, look in zip(cases, looks, strict=True):
            if any(side > n for side, n in zip(sides, look.shape[1:], strict=True)):
                have = " x ".join(map(str, look.shape[1:]))
                raise ValueError(f"data.patch_size={size} is larger than {case.images[0]} ({have})")
        return sides

    # -- batches -----------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if self.trainer is not None:
            self.rank, self.world_size = self.trainer.global_rank, self.trainer.world_size

    def items(self, split: str) -> Items:
        """The images of a split, with their labels."""
        budget, kept = self.cache_mb * 2**20, 0
        for look in self.looks[split]:
            budget -= 4 * int(np.prod(look.shape)) + 2 * int(np.prod(look.shape[1:]))
            kept += budget >= 0
        settings = tuple(self.classes.items()), self.ignored, self.layout.overlap
        return _items(tuple(self.layout.cases[split]), self.normalize, settings, kept)

    @property
    def patches(self) -> Patches:
        """The training batches."""
        looks = self.looks["train"]
        holders = [list(range(len(looks)))]
        if len(self.crops) > 1:  # one for each class
            counts = [
                counts_of_classes(look.counts, self.classes, self.ignored, self.layout.overlap)
                for look in looks
            ]
            holders = [[i for i, n in enumerate(c) if n] for c in zip(*counts, strict=True)]
        numbers = range(self.rank, self.batch_size, self.world_size)
        return Patches(self.items("train"), self.crops, holders, self.seed, numbers, self.form)

    def first_batch(self) -> tuple[Tensor, Tensor]:
        """The first training batch, as of `Patches`."""
        return self.patches[0]

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        return batch_loader(self.patches, Steps(self.trainer, self.batches), self.num_workers)

    def _whole(self, split: str) -> DataLoader:
        mine = range(self.rank, len(self.layout.cases[split]), self.world_size)
        return batch_loader(Whole(self.items(split), self.form), mine, 0)

    def val_dataloader(self) -> DataLoader:
        return self._whole("val")

    def test_dataloader(self) -> DataLoader:
        return self._whole("test")


class UnlabelledImages(pl.LightningDataModule):
    """Images without masks, for prediction.

    Args:
        root: the folder of the images, or one that holds images/ or imagesTs/.
        form: of the data that the network was trained on.
        normalize, patch_size, count: as of `FolderImages`; windows in one call of the network.

    Raises:
        ValueError: there are no such images.
    """

    def __init__(
        self,
        root: str,
        form: Form,
        normalize: str,
        patch_size: int | Sequence[int] | None,
        count: int,
    ) -> None:
        super().__init__()
        self.cases, self.normalize = unlabelled(Path(root)), normalize
        looks = look_at(self.cases)
        check_alike(self.cases, looks)
        wanted = (form.in_channels, form.dims)
        if (looks[0].shape[0], len(looks[0].shape) - 1) != wanted:
            raise ValueError(
                f"{self.cases[0].images[0]} has {looks[0].describe()}; the network was trained on "
                f"{wanted[0]} and {wanted[1]}"
            )
        patch = patch_sides(patch_size, form.dims)
        self.infer = functools.partial(infer, patch=patch, count=count)

    def predict_dataloader(self) -> DataLoader:
        images = [load_image(case, self.normalize)[None] for case in self.cases]
        return batch_loader(images, range(len(images)), 0)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1)
def _layout(
    root: Path,
    images: str,
    masks: str,
    image_suffix: str,
    mask_suffix: str,
    val_share: float,
    test_share: float,
) -> tuple[Layout, dict[str, list[Look]]]:
    """The cases of a folder, and a look at each; kept for the next run of a sweep."""
    layout = read_layout(
        root, images, masks, image_suffix, mask_suffix, {"val": val_share, "test": test_share}
    )
    looks = {split: look_at(layout.cases[split]) for split in SPLITS if split in layout.cases}
    check_alike(
        [case for split in looks for case in layout.cases[split]],
        [look for part in looks.values() for look in part],
    )
    return layout, looks


@functools.lru_cache(maxsize=3)  # train, val and test; kept for the next run of a sweep
def _items(cases: tuple[Case, ...], normalize: str, settings: Any, kept: int) -> Items:
    load = functools.partial(load_item, normalize=normalize, settings=settings)
    return Items(cases, load, kept)
