"""Reading a file of an image or a mask, by the library that knows its format.

MONAI's readers are not used for PNG and TIFF: they swap the axes, take the index of a palette for a
brightness, and know no TIFF of 16-bit colours.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from losswatch.data.formats import ARRAYS, NIFTI, PICTURES, TIFF, File, Unusable, suffix_of
from losswatch.data.pictures import read_picture, read_tiff
from losswatch.data.volumes import read_itk, read_nifti

# The names of arrays in a .npz file.
IMAGES = ("image", "images", "img", "x", "data")
MASKS = ("label", "labels", "mask", "masks", "seg", "y", "target", "gt")


def read(path: Path, is_mask: bool, is_volume: bool = False) -> File:
    """Read a file; a folder is a series of DICOM files.

    Args:
        is_mask: the numbers of a palette are values of a mask, and colours of an image.
        is_volume: whether an image of SimpleITK that has one slice keeps its three axes.

    Raises:
        ValueError: the file is damaged; in one line that names it.
    """
    suffix = suffix_of(path)
    try:
        if suffix in TIFF:
            file = read_tiff(path, is_mask)
        elif suffix in NIFTI:
            file = read_nifti(path)
        elif suffix in ARRAYS:
            file = _read_array(path, is_mask)
        elif suffix in PICTURES:
            file = read_picture(path, is_mask)
        else:
            file = read_itk(path, is_volume)
    except Unusable as error:
        raise ValueError(f"{path} cannot be used: {error}") from None
    except Exception as error:
        why = " ".join(str(error).replace(str(path), "it").split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read: {why}; replace or remove it") from error
    if not file.array.size:
        raise ValueError(f"{path} holds no pixel; replace or remove it")
    if file.array.dtype.kind not in "biuf":
        raise ValueError(f"{path} holds {file.array.dtype}, no numbers; save it as numbers")
    # Libraries compute with the byte order of the machine.
    return file._replace(array=file.array.astype(file.array.dtype.newbyteorder("="), copy=False))


def _read_array(path: Path, is_mask: bool) -> File:
    found = np.load(path, allow_pickle=False)
    if not isinstance(found, np.ndarray):
        names = MASKS if is_mask else IMAGES
        wanted = [name for name in names if name in found.files]
        if not wanted and len(found.files) > 1:
            raise Unusable(
                f"it holds {', '.join(found.files)}; its {'mask' if is_mask else 'image'} must be "
                f"called {', '.join(names)}"
            )
        with found:
            found = found[(wanted or found.files)[0]]
    if found.ndim < 2:
        raise Unusable(f"an image needs 2 or 3 axes, its array has {found.ndim}")
    return File(found[None], loose=found.ndim > 2)
