"""A folder of images and masks: patches to train with, whole images to validate and test."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from joblib import cpu_count
from torch import Tensor
from torch.utils.data import DataLoader

from losswatch.data.cases import Case, Mask, by
from losswatch.data.coding import make_coding, values_of
from losswatch.data.form import NORMALISATIONS, TARGETS, Form
from losswatch.data.labels import Coding, count_classes
from losswatch.data.layouts import read_layout, unlabelled
from losswatch.data.loaders import RemainingBatches, batch_loader
from losswatch.data.matching import Names
from losswatch.data.patches import (
    Items,
    Patches,
    Unlabelled,
    Whole,
    infer,
    load_item,
    make_crops,
    patch_sides,
)
from losswatch.data.splits import SPLITS, Layout
from losswatch.data.survey import (
    FileStats,
    Survey,
    check_alike,
    most_common_axes,
    read_stats,
    shape_in,
    survey,
)
from losswatch.data.tree import state_of
from losswatch.data.volumes import is_orientation
from losswatch.text import number_of

SAMPLINGS = ("random", "balanced")


class FolderImages(pl.LightningDataModule):
    """The images and masks of a folder.

    A training batch is a function of the seed and the step. The values of masks become classes 0,
    1, ... in the order of `classes`.

    Args:
        root: the folder, with a layout of README.md; `~` is the user's home.
        seed: chooses patches and augmentation.
        images, masks, image_suffix, mask_suffix, skip_unpaired: see `matching.Names`.
        val_share, test_share: shares of the images, for a folder that is not split.
        target: see `Form`; null: "multilabel" if classes overlap, "softmax" otherwise.
        classes: the values of each class in a mask, see `coding.check_classes`; null: each value is
            a class.
        ignore_index: the value in a mask of pixels that do not count, or their colour.
        nearest: give values of no class to the class with the nearest value or colour.
        axes: the orientation to which volumes are turned, see `volumes.axes_of`; null: that of most
            volumes.
        patch_size: sides of a patch in pixels, one number or one for each axis; null: whole images.
        sampling: patches at a "random" place of a random image, or "balanced": around a random
            pixel of a random class.
        flip: mirror each axis of a patch with probability 1/2.
        intensity: scale by a factor from 1 - intensity to 1 + intensity, and shift by up to
            intensity; each with probability 1/2.
        normalize: how each channel of an image is normalised: "zscore" (mean 0, deviation 1),
            "unit" (0 to 1), "none".
        batch_size: patches of a training step, over all devices together.
        batches: the training repeats the first `batches` batches; 0 repeats none.
        num_workers: processes that prepare batches in the background; null: the number of cores
            minus 1, at most 4.
        cache_mb: MB of decoded images that are kept in memory; others are read at each use.

    Raises:
        ValueError: the folder or a setting cannot be used. One line says why.
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
        skip_unpaired: bool = False,
        val_share: float = 0.2,
        test_share: float = 0.2,
        target: str | None = None,
        classes: Any = None,  # `coding.check_classes` says more about a wrong one than its type
        ignore_index: int | str | None = None,
        nearest: bool = False,
        axes: str | None = None,
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
        _check_packages()
        _check_settings(
            {"target": target or "softmax", "sampling": sampling, "normalize": normalize},
            {"batch_size": batch_size, "num_workers": num_workers or 0, "cache_mb": cache_mb,
             "intensity": intensity, "batches": batches},
            {"val_share": val_share, "test_share": test_share},
            axes,
        )  # fmt: skip
        self.root, self.seed, self.batch_size = Path(root).expanduser(), seed, batch_size
        self.batches, self.normalize, self.cache_mb = batches, normalize, cache_mb
        self.num_workers = min(4, cpu_count() - 1) if num_workers is None else num_workers
        names = Names(images, masks, image_suffix, mask_suffix, skip_unpaired)
        state = tuple(state_of(self.root).items())
        self.layout, self.stats = _layout(self.root, names, val_share, test_share, state)
        self.state = hash(state)
        layout, every = self.layout, [stats for part in self.stats.values() for stats in part]
        ignored = layout.ignored if ignore_index is None else ignore_index
        self.coding = make_coding(
            self._masks(), classes, ignored, nearest, layout.classes, layout.kinds, layout.overlap
        )
        common = most_common_axes(every)
        axes = axes if axes and common else common
        self.survey: Survey = survey(layout, self.stats, self.coding, axes)
        self.shapes = {part: [shape_in(stats, axes) for stats in all_stats]
                       for part, all_stats in self.stats.items()}  # fmt: skip
        self.form = Form(
            in_channels=every[0].shape[0],
            classes=self.coding.names,
            dims=len(every[0].shape) - 1,
            target=target or ("multilabel" if layout.overlap else "softmax"),
            has_ignored=ignored is not None,
            axes=axes,
        )
        self._check_form()
        self.values = values_of(self.coding)
        self.patch = self._patch(patch_size)
        self.infer = functools.partial(infer, patch=self.patch, count=batch_size)
        self.crops = make_crops(self.form, self.patch, sampling, flip, intensity)
        self.rank, self.world_size = 0, 1

    def _masks(self) -> list[tuple[Path, Mask]]:
        """The masks that have files, each with the first of its files."""
        masks = []
        for split, all_stats in self.stats.items():
            for case, stats in zip(self.layout.cases[split], all_stats, strict=True):
                parts = zip(case.masks, stats.masks, strict=True)
                masks += [(paths[0], mask) for paths, mask in parts if paths]
        return masks

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
        """Pairs of a split and a class that has no pixel in it."""
        rows = self.survey.classes.query("share == 0")
        return list(zip(rows["split"], rows["class"], strict=True))

    def _patch(self, size: int | Sequence[int] | None) -> tuple[int, ...] | None:
        """The sides of a patch; None for whole images."""
        cases, shapes = self.layout.cases["train"], self.shapes["train"]
        sides = patch_sides(size, self.form.dims)
        if sides is None:
            for case, shape in zip(cases, shapes, strict=True):
                if shape != shapes[0]:
                    raise ValueError(
                        f"data.patch_size=null needs images of one size, but {case.images[0]} and "
                        f"{cases[0].images[0]} differ; give the sides of a patch"
                    )
            return None
        for case, shape in zip(cases, shapes, strict=True):
            if any(side > n for side, n in zip(sides, shape[1:], strict=True)):
                raise ValueError(
                    f"data.patch_size={size} is larger than {case.images[0]} ({by(shape[1:])}); "
                    "take a smaller one"
                )
        return sides

    # -- batches -----------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if self.trainer is not None:
            self.rank, self.world_size = self.trainer.global_rank, self.trainer.world_size

    def items(self, split: str) -> Items:
        """The images of a split, with their labels. Test images are not kept in memory."""
        planes = len(self.coding.classes) if self.layout.overlap else 1
        budget, kept = self.cache_mb * 2**20, dict.fromkeys(self.shapes, 0)
        for part in ("train", "val"):
            for shape in self.shapes[part]:
                budget -= 4 * math.prod(shape) + 2 * planes * math.prod(shape[1:])
                kept[part] += budget >= 0
        cases = tuple(self.layout.cases[split])
        settings = self.normalize, self.coding, self.form.axes
        return _items(cases, *settings, kept[split], self.state)

    @property
    def patches(self) -> Patches:
        """The training batches."""
        all_stats = self.stats["train"]
        holders = [list(range(len(all_stats)))]
        if len(self.crops) > 1:  # one for each class
            found = [count_classes(stats.masks, stats.counts, self.coding) for stats in all_stats]
            counts = [image.classes for image in found]
            holders = [[i for i, n in enumerate(c) if n] for c in zip(*counts, strict=True)]
        numbers = range(self.rank, self.batch_size, self.world_size)
        return Patches(self.items("train"), self.crops, holders, self.seed, numbers, self.form)

    def first_batch(self) -> tuple[Tensor, Tensor]:
        """The first training batch, see `Patches`. Keeps no image in memory."""
        return self.patches[0]

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        patches = self.patches
        patches.items.fill()  # before worker processes start, which share the images
        return batch_loader(patches, RemainingBatches(self.trainer, self.batches), self.num_workers)

    def _whole(self, split: str) -> DataLoader:
        mine = range(self.rank, len(self.layout.cases[split]), self.world_size)
        items = self.items(split)
        items.fill()
        return batch_loader(Whole(items, self.form), mine, 0)

    def val_dataloader(self) -> DataLoader:
        return self._whole("val")

    def test_dataloader(self) -> DataLoader:
        return self._whole("test")


class UnlabelledImages(pl.LightningDataModule):
    """Images without masks, for prediction.

    Args:
        root: the folder of the images, or one that holds images/ or imagesTs/.
        form: that of the network's training data.
        normalize, patch_size: see `FolderImages`.
        count: the number of windows in one call of the network.

    Raises:
        ValueError: there are no images, or an image does not fit the network.
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
        self.cases = unlabelled(Path(root).expanduser(), form.in_channels)
        expected = (form.in_channels, form.dims)
        for case, stats in zip(self.cases, read_stats(self.cases, form), strict=True):
            if (stats.shape[0], len(stats.shape) - 1) != expected:
                way = "; channels are in one file, or in files that end in _0000, _0001, ..."
                raise ValueError(
                    f"{case.images[0]} has {stats.describe()}; the network was trained on "
                    f"{number_of(expected[0], 'channel')} and {expected[1]} dimensions"
                    f"{way if expected[0] > 1 else ''}"
                )
        self.images = Unlabelled(self.cases, normalize, form)
        patch = patch_sides(patch_size, form.dims)
        self.infer = functools.partial(infer, patch=patch, count=count)

    def predict_dataloader(self) -> DataLoader:
        return batch_loader(self.images, range(len(self.cases)), 0)


def _check_packages() -> None:
    """Check that the libraries that read images are installed.

    Raises:
        ValueError: a library is missing.
    """
    needed = ("monai", "nibabel", "PIL", "tifffile", "imagecodecs", "SimpleITK")
    if lacking := [name for name in needed if not find_spec(name)]:
        raise ValueError(f'{", ".join(lacking)} is missing: pip install "losswatch[images]"')


def _check_settings(
    words: Mapping[str, str], numbers: Mapping[str, float], shares: Mapping[str, float], axes: Any
) -> None:
    """Check settings of `FolderImages`.

    Raises:
        ValueError: a setting is not allowed.
    """
    allowed = {"target": TARGETS, "sampling": SAMPLINGS, "normalize": NORMALISATIONS}
    for name, word in words.items():
        if word not in allowed[name]:
            raise ValueError(f"data.{name}={word}: allowed are {', '.join(allowed[name])}")
    for name, number in numbers.items():
        least = 1 if name == "batch_size" else 0
        if number < least:
            raise ValueError(f"data.{name} must be at least {least}, got {number}")
    val, test = shares["val_share"], shares["test_share"]
    if not (0 < val < 1 and 0 <= test < 1 and val + test < 1):
        raise ValueError(
            f"data.val_share and data.test_share must leave a rest, got {dict(shares)}"
        )
    if axes is not None and not is_orientation(axes):
        raise ValueError(f"data.axes={axes} must be three letters such as RAS or LPS")


@functools.lru_cache(maxsize=1)
def _layout(
    root: Path, names: Names, val_share: float, test_share: float, state: tuple
) -> tuple[Layout, dict[str, list[FileStats]]]:
    """The cases of a folder and their stats by split; kept for the next run of a sweep.

    Args:
        state: the pairs of `state_of`.
    """
    files = [path for path, _ in state]
    layout = read_layout(root, names, {"val": val_share, "test": test_share}, files)
    cases = [case for split in SPLITS for case in layout.cases.get(split, ())]
    all_stats = read_stats(cases)
    check_alike(cases, all_stats, layout.channels)
    remaining = iter(all_stats)
    return layout, {split: [next(remaining) for _ in layout.cases[split]]
                    for split in SPLITS if split in layout.cases}  # fmt: skip


@functools.lru_cache(maxsize=3)  # train, val and test; kept for the next run of a sweep
def _items(
    cases: tuple[Case, ...], normalize: str, coding: Coding, axes: str, count: int, state: int
) -> Items:
    """The images of a split; `count` stay in memory. A new `state` of the folder makes new ones."""
    load = functools.partial(load_item, normalize=normalize, coding=coding, axes=axes)
    return Items(cases, load, count)
