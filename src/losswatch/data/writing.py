"""Predicted masks as files."""

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
    """Write a mask: in the format of a volume, a TIFF or an array if its image is one, else as PNG.

    Args:
        labels: whole numbers [*space].
        path: of the file, without its suffix. The folders on the way are made.
        like: the image. The place in the world of a volume or a GeoTIFF is kept.
        values: what masks of this data set may hold besides `labels`: all of them get one type.
        colours: whether the numbers are colours, 0xRRGGBB.
        axes: the orientation of the labels, as of `volumes.axes_of`; "" is the image's.

    Returns:
        the path with its suffix.
    """
    known = np.concatenate([np.ravel(labels), np.asarray(values, np.int64)])
    low, high = known.min(initial=0), known.max(initial=0)
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
    elif suffix in TIFF or kind not in (np.uint8, np.uint16):  # a PNG has no other numbers
        return _write_tiff(array, _with(path, ".tif"), like)
    from PIL import Image

    path = _with(path, ".png")
    Image.fromarray(array).save(path)
    return path


def _with(path: Path, suffix: str) -> Path:
    """Not `with_suffix`, which would take the end of a name with a dot for a suffix."""
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
