"""An image and its masks, read from their files and made to fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from losswatch.data.formats import NIFTI, File, Unusable, suffix_of
from losswatch.data.reading import read
from losswatch.data.volumes import axes_of, distance, flat, placed, turned

NEAR_WHOLE = 1e-3  # what resampling adds to a whole number
GREY = 32  # how far the channels of a grey that was compressed with loss may differ


class Case(NamedTuple):
    """An image and what is known of it.

    Attributes:
        name: of the image, in its split.
        images: its file, or one for each channel.
        masks: the files of each mask: one mask of all classes, or one for each class. A mask of
            several files is joined; one without a file is empty.
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
        palette: of values that are indices of colours: the colours.
        lossy: whether the file's compression changes values.
        rounded: how many pixels were within `NEAR_WHOLE` of a whole number, and got it.
    """

    values: np.ndarray
    colours: bool = False
    palette: dict[int, int] | None = None
    lossy: bool = False
    rounded: int = 0


class Content(NamedTuple):
    """What the files of a case hold.

    Attributes:
        image: [channels, *space].
        masks: as many as the case has.
        axes: the orientation of a volume, as of `volumes.axes_of`.
        notes: what the owner of a file should know, and the file.
    """

    image: np.ndarray
    masks: tuple[Mask, ...]
    axes: str
    notes: tuple[tuple[str, Path], ...]


def load(case: Case, axes: str = "", channels: int = 0, dims: int = 0) -> Content:
    """Read the files of a case.

    Args:
        axes: the orientation to which a volume is brought; "" is the image's own.
        channels, dims: of the image as the network has them, where there is no mask to tell.

    Raises:
        ValueError: a file is damaged, or the files do not fit; in one line that names them.
    """
    is_volume = any(suffix_of(path) in NIFTI for path in case.files)
    path, *others = case.images
    stored = read(path, False, is_volume)
    axes = axes or axes_of(stored)
    first = turned(stored, axes)

    def fitting(other: Path, is_mask: bool) -> File:
        try:
            file = turned(placed(read(other, is_mask, is_volume), stored), axes)
        except Unusable as error:
            raise ValueError(f"{other} and {path}: {error}") from None
        if (apart := distance(first, file)) > 0.5 + 1e-3:
            raise ValueError(
                f"{other} lies up to {apart:.4g} pixels beside its image {path}, by the affine "
                "matrix or tags of each; save it with those of its image, or resample it"
            )
        return file

    files = [first, *(fitting(other, is_mask=False) for other in others)]
    groups = [[fitting(other, is_mask=True) for other in paths] for paths in case.masks]
    masks = [[_as_mask(file, path, first) for file, path in zip(group, paths, strict=True)]
             for group, paths in zip(groups, case.masks, strict=True)]  # fmt: skip
    space = next((mask.values.shape for group in masks for mask in group), None)
    arrays = [_settled(file, space, channels, dims) for file in files]
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
    joined = tuple(_joined(group, image.shape[1:]) for group in masks)
    every = zip(case.files, (*files, *sum(groups, [])), strict=True)
    notes = {note: other for other, file in every for note in file.notes}
    return Content(image, joined, axes, tuple(notes.items()))


def _check_size(mask: Mask, path: Path, image: np.ndarray, its: Path, file: File) -> None:
    if mask.values.shape == image.shape[1:]:
        return
    hint = ""
    if mask.values.shape == image.shape[:0:-1]:
        hint = "; it is turned against it"
        if any("EXIF" in note for note in file.notes):
            hint += ", perhaps since the image was turned as its EXIF orientation says"
    elif image.ndim == 4 and mask.values.ndim == 2:
        hint = "; pages or slices are read as a volume"
    raise ValueError(
        f"{path} is of {by(mask.values.shape)}, its image {its} of {by(image.shape[1:])}{hint}; "
        "a mask needs the size of its image"
    )


def by(shape: Sequence[int]) -> str:
    """A size as text: "3 x 4"."""
    return " x ".join(map(str, shape))


def _settled(file: File, space: tuple[int, ...] | None, channels: int, dims: int) -> np.ndarray:
    """An image [channels, *space], where its file may leave open which axis is that of channels."""
    array = flat(file)
    if not file.loose or array.shape[1:] == space:
        return array
    for axis in (1, array.ndim - 1):
        moved = np.moveaxis(array[0], axis - 1, 0)
        if moved.shape[1:] == space or (moved.ndim - 1, len(moved)) == (dims, channels):
            return moved
    return array


def _as_mask(file: File, path: Path, image: File) -> Mask:
    """The values of a mask's file."""
    array = flat(file)
    if array.dtype.kind == "f" and (bad := int((~np.isfinite(array)).sum())):
        raise ValueError(
            f"{path} is a mask with NaN or infinity in {bad} pixels; give them a value"
        )
    if file.loose:
        array = _channels_first(array, array.shape == image.array.shape)
    is_colour = len(array) == 3 and array.ndim == 3 and array.dtype == np.uint8
    if is_colour and file.lossy and np.ptp(array, axis=0).max() <= GREY:
        array = array[1:2]
    if not (array == array[:1]).all():  # more than grey that was saved as colour
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
    """A mask [channels, *space] of an array that leaves open which axis is that of channels.

    Channels of 0 and 1, one for each class, become the number of the class.

    Args:
        array: [1, ...].
        is_of_image: whether it has the shape of its image, so that it may be a volume.
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
        # Small numbers are labels of a volume of three slices, and pages of a TIFF are slices.
        is_volume = axis == 1 or colours.max() < 32 and not (colours == colours[:1]).all()
        if not (is_of_image and is_volume):
            return colours
    return array


def _joined(group: Sequence[Mask], space: tuple[int, ...]) -> Mask:
    """The masks of one image as one; where two are not 0, the first."""
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
    """A mask of greys or of a palette as one of colours."""
    if mask.colours:
        return mask
    values = mask.values.astype(np.int32) * 0x010101
    if mask.palette:
        table = np.array([mask.palette.get(i, 0) for i in range(int(mask.values.max()) + 1)])
        values = table[mask.values]
    return mask._replace(values=values, colours=True, palette=None)
