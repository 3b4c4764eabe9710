"""Reads an image and its masks from their files, and makes them fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from losswatch.data.formats import NIFTI, File, Unusable, suffix_of
from losswatch.data.reading import read
from losswatch.data.volumes import (
    axes_of,
    distance,
    place_like,
    turn_to,
    without_slice_axis,
)

NEAR_WHOLE = 1e-3  # resampling may change a whole number by so much
GREY = 32  # compression with loss may change the channels of a grey by so much


class Case(NamedTuple):
    """The files of an image and its masks.

    Attributes:
        name: of the image, unique in its split.
        images: the file of the image, or one file for each channel.
        masks: the files of each mask: one mask with all classes, or one mask for each class. The
            files of a mask are joined; a mask without a file is empty.
    """

    name: str
    images: tuple[Path, ...]
    masks: tuple[tuple[Path, ...], ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of images and masks."""
        return (*self.images, *(path for paths in self.masks for path in paths))


class Mask(NamedTuple):
    """The values of a mask.

    Attributes:
        values: [*space], as in the file. A colour is 0xRRGGBB.
        colours: whether the values are colours.
        palette: the colours, if the values are indices of colours.
        lossy: whether the compression of the file changes values.
        rounded: how many pixels were rounded, because they were within `NEAR_WHOLE` of a whole
            number.
    """

    values: np.ndarray
    colours: bool = False
    palette: dict[int, int] | None = None
    lossy: bool = False
    rounded: int = 0


class Content(NamedTuple):
    """The content of a case's files.

    Attributes:
        image: [channels, *space].
        masks: one for each mask of the case.
        axes: the orientation of a volume, see `volumes.axes_of`.
        notes: what the owner of a file should know, and the file.
    """

    image: np.ndarray
    masks: tuple[Mask, ...]
    axes: str
    notes: tuple[tuple[str, Path], ...]


def load(case: Case, axes: str = "", channels: int = 0, dims: int = 0) -> Content:
    """Read the files of a case.

    Args:
        axes: the orientation to which a volume is turned; "" is that of the image.
        channels, dims: those that the network reads, used if there is no mask to compare with.

    Raises:
        ValueError: a file is damaged, or the files do not fit. One line names the files.
    """
    is_volume = any(suffix_of(path) in NIFTI for path in case.files)
    path, *others = case.images
    stored = read(path, False, is_volume)
    axes = axes or axes_of(stored)
    first = turn_to(stored, axes)

    def fitting(other: Path, is_mask: bool) -> File:
        try:
            file = turn_to(place_like(read(other, is_mask, is_volume), stored), axes)
        except Unusable as error:
            raise ValueError(f"{other} and {path}: {error}") from None
        if (shift := distance(first, file)) > 0.5 + 1e-3:
            raise ValueError(
                f"{other} lies up to {shift:.4g} pixels beside its image {path}, by the affine "
                "matrix or tags of each; save it with those of its image, or resample it"
            )
        return file

    files = [first, *(fitting(other, is_mask=False) for other in others)]
    groups = [[fitting(other, is_mask=True) for other in paths] for paths in case.masks]
    masks = [[_as_mask(file, path, first) for file, path in zip(group, paths, strict=True)]
             for group, paths in zip(groups, case.masks, strict=True)]  # fmt: skip
    space = next((mask.values.shape for group in masks for mask in group), None)
    arrays = [_image_array(file, space, channels, dims) for file in files]
    for other, array in zip(case.images, arrays, strict=True):
        if array.shape[1:] != arrays[0].shape[1:]:
            raise ValueError(
                f"{other} is of {by(array.shape[1:])}, {path} of {by(arrays[0].shape[1:])}; the "
                "channels of an image need one size"
            )
    for group, paths in zip(masks, case.masks, strict=True):
        for mask, other in zip(group, paths, strict=True):
            _check_size(mask, other, arrays[0], path, first)
    image = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
    merged = tuple(_merge_masks(group, image.shape[1:]) for group in masks)
    every = zip(case.files, (*files, *sum(groups, [])), strict=True)
    notes = {note: other for other, file in every for note in file.notes}
    return Content(image, merged, axes, tuple(notes.items()))


def _check_size(mask: Mask, path: Path, image: np.ndarray, its: Path, file: File) -> None:
    if mask.values.shape == image.shape[1:]:
        return
    hint = ""
    if mask.values.shape == image.shape[:0:-1]:
        hint = "; the sides are swapped"
        if any("EXIF" in note for note in file.notes):
            hint += ", perhaps because the image was turned as its EXIF orientation says"
    elif image.ndim == 4 and mask.values.ndim == 2:
        hint = "; pages or slices are read as a volume"
    raise ValueError(
        f"{path} is of {by(mask.values.shape)}, its image {its} of {by(image.shape[1:])}{hint}; "
        "a mask needs the size of its image"
    )


def by(shape: Sequence[int]) -> str:
    """A size as text: "3 x 4"."""
    return " x ".join(map(str, shape))


def _image_array(file: File, space: tuple[int, ...] | None, channels: int, dims: int) -> np.ndarray:
    """An image [channels, *space], also if its file does not tell the axis of the channels.

    Args:
        space: the shape of a mask, if there is one.
        channels, dims: see `load`.
    """
    array = without_slice_axis(file)
    if not file.loose or array.shape[1:] == space:
        return array
    for axis in (1, array.ndim - 1):
        moved = np.moveaxis(array[0], axis - 1, 0)
        if moved.shape[1:] == space or (moved.ndim - 1, len(moved)) == (dims, channels):
            return moved
    return array


def _as_mask(file: File, path: Path, image: File) -> Mask:
    """The mask in a file."""
    array = without_slice_axis(file)
    if array.dtype.kind == "f" and (bad := int((~np.isfinite(array)).sum())):
        raise ValueError(
            f"{path} is a mask with NaN or infinity in {bad} pixels; give them a value"
        )
    if file.loose:
        array = _channels_first(array, array.shape == image.array.shape)
    is_colour = len(array) == 3 and array.ndim == 3 and array.dtype == np.uint8
    if is_colour and file.lossy and np.ptp(array, axis=0).max() <= GREY:
        array = array[1:2]
    if not (array == array[:1]).all():  # not a grey saved as colours
        if is_colour:
            red, green, blue = array.astype(np.int32)
            return Mask(red << 16 | green << 8 | blue, colours=True, lossy=file.lossy)
        raise ValueError(
            f"{path} is a mask of {len(array)} channels; one is needed, whose values are the "
            "classes, or three of 8 bits, whose colours are"
        )
    values, rounded = array[0], 0
    if values.dtype == bool:
        values = values.astype(np.uint8)
    if values.dtype == np.uint64 and values.max() >= 2**63:
        raise ValueError(f"{path} is a mask with {values.max()}; values must be below 2^63")
    if values.dtype.kind == "f":
        whole = np.round(values)
        near = abs(values - whole) <= NEAR_WHOLE
        rounded = int((near & (values != whole)).sum())
        values = np.where(near, whole, values)
        if near.all() and abs(values).max() < 2.0**63:
            values = values.astype(np.int64)
    palette = dict(file.palette) if file.palette else None
    return Mask(values, palette=palette, lossy=file.lossy, rounded=rounded)


def _channels_first(array: np.ndarray, is_of_image: bool) -> np.ndarray:
    """A mask [channels, *space] from an array with an unknown axis of channels.

    Channels of 0 and 1, one for each class, become the number of the class.

    Args:
        array: [1, ...].
        is_of_image: whether the array has the shape of its image, so that it may be a volume.
    """
    axes = array.ndim - 1, 1
    for axis in axes:
        if array.shape[axis] == 1:
            return array.squeeze(axis)
        is_class = (array.sum(axis) == 1).all() and np.isin(array, (0, 1)).all()
        if is_class and (array.shape[axis] <= 4 or not is_of_image):
            return array.argmax(axis)
    for axis in axes:
        if array.ndim != 4 or array.shape[axis] != 3 or array.dtype != np.uint8:
            continue
        colours = np.moveaxis(array[0], axis - 1, 0)
        # Small numbers are labels of a volume with three slices, and pages of a TIFF are slices.
        is_volume = axis == 1 or colours.max() < 32 and not (colours == colours[:1]).all()
        if not (is_of_image and is_volume):
            return colours
    return array


def _merge_masks(group: Sequence[Mask], space: tuple[int, ...]) -> Mask:
    """The masks of one image as one mask: at each pixel the first value that is not 0."""
    if not group:
        return Mask(np.zeros(space, np.uint8))
    if len({(mask.colours, str(mask.palette)) for mask in group}) > 1:
        group = [_in_colour(mask) for mask in group]
    first, *others = group
    for other in others:
        values = np.where(first.values == 0, other.values, first.values)
        first = first._replace(values=values, rounded=first.rounded + other.rounded,
                               lossy=first.lossy or other.lossy)  # fmt: skip
    return first


def _in_colour(mask: Mask) -> Mask:
    """A mask of greys or of a palette, converted to colours."""
    if mask.colours:
        return mask
    values = mask.values.astype(np.int32) * 0x010101
    if mask.palette:
        table = np.array([mask.palette.get(i, 0) for i in range(int(mask.values.max()) + 1)])
        values = table[mask.values]
    return mask._replace(values=values, colours=True, palette=None)
