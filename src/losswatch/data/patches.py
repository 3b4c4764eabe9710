"""From cases to batches: reads and normalises images, cuts and augments patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from joblib import cpu_count
from torch import Tensor
from torch.utils.data import Dataset

from losswatch.data.cases import Case, load
from losswatch.data.form import Form
from losswatch.data.labels import Coding, to_label

CENTRES = 2**16  # at most so many pixels of a class in an image can be centres of patches

Item = dict[str, Any]  # "image": float32 [channels, *space], "label": int16 [1 or K, *space]


class Items(Dataset):
    """The images and labels of cases.

    Args:
        cases: of a split.
        load: reads a case, within `plain_tensors`.
        count: how many cases `fill` keeps in memory.
    """

    def __init__(self, cases: Sequence[Case], load: Callable[[Case], Item], count: int) -> None:
        self.cases, self.load, self.count = cases, load, count
        self.kept: list[Item] = []

    def fill(self) -> None:
        """Read the images that stay in memory."""
        if not self.kept:
            with plain_tensors(), ThreadPoolExecutor(cpu_count()) as pool:
                self.kept = list(pool.map(self.load, self.cases[: self.count]))

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, i: int) -> Item:
        if i < len(self.kept):
            return self.kept[i]
        with plain_tensors():
            return self.load(self.cases[i])


def load_item(case: Case, normalize: str, coding: Coding, axes: str) -> Item:
    """A normalised image and its label (see `labels.to_label`), turned to an orientation."""
    content = load(case, axes)
    label = torch.from_numpy(to_label(content.masks, coding))
    return {"image": _normalised(content.image, normalize), "label": label}


def _normalised(image: np.ndarray, normalize: str) -> Tensor:
    """An image as float32 [channels, *space]."""
    from monai.transforms import NormalizeIntensity, ScaleIntensity

    tensor = torch.from_numpy(np.ascontiguousarray(image, np.float32))
    if normalize == "none":
        return tensor
    change: Callable[..., Any] = NormalizeIntensity if normalize == "zscore" else ScaleIntensity
    return change(channel_wise=True)(tensor)


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Make MONAI's transforms return tensors without metadata, until the exit.

    This is a switch of the whole process, so threads must start and end within it.
    """
    from monai.data.meta_obj import get_track_meta, set_track_meta

    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)


def make_crops(
    form: Form,
    patch: tuple[int, ...] | None,
    sampling: str,
    flip: bool,
    intensity: float,
) -> list[Any]:
    """MONAI's transforms from an item to a training patch.

    One transform, or one for each class, which centres the patch on a pixel of the class.
    """
    from monai.transforms import (
        Compose,
        RandCropByLabelClassesd,
        RandFlipd,
        RandScaleIntensityd,
        RandShiftIntensityd,
        RandSpatialCropd,
    )

    keys = ("image", "label")
    count = len(form.classes)
    cuts: list[Any]
    if patch is None:
        cuts = [None]
    elif sampling == "random":
        cuts = [RandSpatialCropd(keys, patch, random_size=False)]
    else:
        cuts = [
            RandCropByLabelClassesd(
                keys, "label", patch, num_classes=count, num_samples=1, warn=False,
                ratios=[float(i == c) for i in range(count)], max_samples_per_class=CENTRES,
            )
            for c in range(count)
        ]  # fmt: skip
    changes: list[Any] = []
    if flip:
        changes += [RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(form.dims)]
    if intensity:
        changes.append(RandScaleIntensityd("image", factors=intensity, prob=0.5))
        changes.append(RandShiftIntensityd("image", offsets=intensity, prob=0.5))
    return [Compose([*([cut] if cut else []), *changes]) for cut in cuts]


def patch_sides(size: int | Sequence[int] | None, dims: int) -> tuple[int, ...] | None:
    """The sides of a patch, from data.patch_size; None for whole images.

    Raises:
        ValueError: `size` is not a whole number of at least 1, or one of these for each axis.
    """
    if size is None:
        return None
    sides = tuple(size) if isinstance(size, Sequence) else (size,) * dims
    if len(sides) != dims or any(type(n) is not int or n < 1 for n in sides):
        raise ValueError(f"data.patch_size must be a whole number or {dims} of them, got {size}")
    return sides


def infer(
    net: Callable[[Tensor], Tensor], images: Tensor, patch: tuple[int, ...] | None, count: int
) -> Tensor:
    """The output of a network for whole images, by a sliding window with the size of a patch.

    Args:
        images: [N, channels, *space].
        patch: None sends whole images through the network.
        count: the number of windows in one call of the network.
    """
    if patch is None:
        return net(images)
    from monai.inferers import sliding_window_inference

    output = sliding_window_inference(images, patch, count, net, overlap=0.25, mode="gaussian")
    assert isinstance(output, Tensor)
    return output


class Patches(Dataset):
    """Item `step` is the training batch of a step, or this rank's part of it.

    A batch has images float32 [N, channels, *space], and labels int64 [N, *space], or float32
    [N, K, *space] if classes overlap. It is a function of the seed, the step and the numbers of the
    patches. The data set can be pickled, for worker processes that are not forked.

    Args:
        items: the images.
        crops: from an item to a patch, see `make_crops`.
        holders: for each crop, the numbers of the images that it can be applied to.
        seed: of the run.
        numbers: those of this rank's patches in the batch.
        form: of the data.
    """

    def __init__(
        self,
        items: Items,
        crops: Sequence[Any],
        holders: Sequence[Sequence[int]],
        seed: int,
        numbers: Sequence[int],
        form: Form,
    ) -> None:
        self.items, self.crops, self.holders = items, crops, holders
        self.seed, self.numbers, self.form = seed, numbers, form

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        return collate([self._draw(step, number) for number in self.numbers], self.form)

    def _draw(self, step: int, number: int) -> Item:
        generator = np.random.default_rng([self.seed, step, number])
        kind = int(generator.integers(len(self.crops)))
        holders = self.holders[kind]
        item = self.items[holders[int(generator.integers(len(holders)))]]
        crop = self.crops[kind].set_random_state(seed=int(generator.integers(2**32)))
        with plain_tensors():
            patch = crop(dict(item))
        return patch[0] if isinstance(patch, list) else patch


class Whole(Dataset):
    """Item `i` is image number i with its label, as a batch of one."""

    def __init__(self, items: Items, form: Form) -> None:
        self.items, self.form = items, form

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return collate([self.items[i]], self.form)


class Unlabelled(Dataset):
    """Item `i` is image number i without a label, float32 [1, channels, *space]."""

    def __init__(self, cases: Sequence[Case], normalize: str, form: Form) -> None:
        self.cases, self.normalize, self.form = cases, normalize, form

    def __getitem__(self, i: int) -> Tensor:
        form = self.form
        image = load(self.cases[i], form.axes, form.in_channels, form.dims).image
        with plain_tensors():
            return _normalised(image, self.normalize)[None]


def collate(items: Sequence[Item], form: Form) -> tuple[Tensor, Tensor]:
    """Items as a batch, see `Patches`."""
    images, labels = (torch.stack([item[key] for item in items]) for key in ("image", "label"))
    return images, labels.float() if form.target == "multilabel" else labels[:, 0].long()
