"""Reads a file of an image or a mask with the library for its format.

MONAI's readers are not used for PNG and TIFF: they swap the axes, read the index of a palette as a
brightness, and cannot read a TIFF of 16-bit colours.
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
    """Read a file, or a folder that is a series of DICOM files.

    Args:
        is_mask: whether indices of a palette stay indices; in an image they become colours.
        is_volume: whether an image of SimpleITK with one slice keeps its three axes.

    Raises:
        ValueError: the file is damaged or cannot be used. One line names the file and the reason.
    """
    suffix = suffix_of(path)
    try:
        if suffix in TIFF:
            file = read_tiff(path, is_mask)
        elif suffix in NIFTI:
            file = read_nifti(path)
        elif suffix in ARRAYS:
            try:
                file = _read_array(path, is_mask)
            except SystemError:  # Python 3.11, if another thread parses a header at that moment
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
    array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray):
        names = MASKS if is_mask else IMAGES
        wanted = [name for name in names if name in array.files]
        if not wanted and len(array.files) > 1:
            raise Unusable(
                f"it holds {', '.join(array.files)}; its {'mask' if is_mask else 'image'} must be "
                f"called {', '.join(names)}"
            )
        with array as archive:
            array = archive[(wanted or archive.files)[0]]
    if array.ndim < 2:
        raise Unusable(f"an image needs 2 or 3 axes, its array has {array.ndim}")
    return File(array[None], loose=array.ndim > 2)
