"""Writes predicted masks as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from losswatch.data.formats import ARRAYS, ITK, NIFTI, TIFF, suffix_of
from losswatch.data.pictures import GEO
from losswatch.data.volumes import write_volume


def write_mask(
    labels: np.ndarray,
    path: Path,
    like: Path,
    values: Sequence[int] | np.ndarray = (),
    colours: bool = False,
    axes: str = "",
) -> Path:
    """Write a mask in the format of its image (volume, TIFF or array), or else as PNG.

    Args:
        labels: whole numbers [*space].
        path: of the file, without its suffix. Missing folders are created.
        like: the image. The mask keeps the place in the world of a volume or a GeoTIFF.
        values: other values that masks of this data set may hold; all masks get one type.
        colours: whether the numbers are colours, 0xRRGGBB.
        axes: the orientation of the labels (see `volumes.axes_of`); "" is that of the image.

    Returns:
        the path with its suffix.
    """
    every = np.concatenate([np.ravel(labels), np.asarray(values, np.int64)])
    low, high = every.min(initial=0), every.max(initial=0)
    kinds = (np.uint8, np.uint16, np.int16, np.int32, np.int64)
    kind = next(k for k in kinds if np.iinfo(k).min <= low and high <= np.iinfo(k).max)
    suffix, array = suffix_of(like), labels.astype(kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    if colours:
        array = np.stack([labels >> 16, labels >> 8 & 255, labels & 255], -1).astype(np.uint8)
        if labels.ndim == 3:  # pages of a TIFF
            return _write_tiff(array, _with(path, ".tif"), like)
    elif suffix in NIFTI or suffix in ITK or like.is_dir():
        return write_volume(array, path, like, axes)
    elif suffix in ARRAYS:
        path = _with(path, ".npy")
        np.save(path, array)
        return path
    elif suffix in TIFF or kind not in (np.uint8, np.uint16):  # a PNG holds only these types
        return _write_tiff(array, _with(path, ".tif"), like)
    from PIL import Image

    path = _with(path, ".png")
    Image.fromarray(array).save(path)
    return path


def _with(path: Path, suffix: str) -> Path:
    """A path with a suffix. `with_suffix` would replace the end of a name with a dot."""
    return path.with_name(path.name + suffix)


def _write_tiff(array: np.ndarray, path: Path, like: Path) -> Path:
    import tifffile

    tags = []
    if suffix_of(like) in TIFF:
        with tifffile.TiffFile(like) as file:
            kept = file.series[0].keyframe.tags
            tags = [(t.code, t.dtype, t.count, t.value, True) for t in kept if t.code in GEO]
    kind = "rgb" if array.ndim == 4 else "minisblack"
    tifffile.imwrite(path, array, photometric=kind, extratags=tags)
    return path
