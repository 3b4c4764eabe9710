"""What a file of an image or a mask holds. Each format is read by the library that knows it.

MONAI's readers are not used for PNG and TIFF: they swap the axes, take the index of a palette for a
brightness, and know no TIFF of 16-bit colours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
TIFF, NIFTI, ARRAYS = (".tif", ".tiff"), (".nii", ".nii.gz"), (".npy", ".npz")
ITK = (".seg.nrrd", ".nrrd", ".nhdr", ".mha", ".mhd", ".dcm")
SUFFIXES = (*PICTURES, *TIFF, *NIFTI, *ITK, *ARRAYS)

# The names of arrays in a .npz file.
IMAGES = ("image", "images", "img", "x", "data")
MASKS = ("label", "labels", "mask", "masks", "seg", "y", "target", "gt")


def suffix_of(path: Path) -> str:
    """The suffix of an image file in small letters, `.nii.gz` as a whole; "" for another file.

    >>> suffix_of(Path("a.b.nii.gz")), suffix_of(Path("a.PNG")), suffix_of(Path("a.txt"))
    ('.nii.gz', '.png', '')
    """
    name = path.name.lower()
    return max((s for s in SUFFIXES if name.endswith(s)), key=len, default="")


def stem_of(path: Path) -> str:
    """The name of an image file without its suffix."""
    return path.name[: len(path.name) - len(suffix_of(path))]


class Unusable(ValueError):
    """A file that is whole holds what cannot be an image; the message says what to do."""


class File(NamedTuple):
    """What a file holds.

    Attributes:
        array: [channels, *space], in the type of the file.
        place: the affine matrix [dims + 1, dims + 1] from an index in space to a point of the
            world; None where the file has none.
        loose: whether the file leaves open which of the axes is that of channels; there is one
            channel then.
        palette: of a mask whose values are indices of colours: the colours, as 0xRRGGBB.
        lossy: whether its compression changes values.
        notes: what was done with it that its owner should know.
    """

    array: np.ndarray
    place: np.ndarray | None = None
    loose: bool = False
    palette: Mapping[int, int] | None = None
    lossy: bool = False
    notes: tuple[str, ...] = ()


def read(path: Path, is_mask: bool) -> File:
    """Read a file; a folder is a series of DICOM files.

    Args:
        is_mask: the numbers of a palette are values of a mask, and colours of an image.

    Raises:
        ValueError: the file is damaged; in one line that names it.
    """
    from losswatch.data.pictures import read_picture, read_tiff
    from losswatch.data.volumes import read_itk, read_nifti

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
            file = read_itk(path)
    except Unusable as error:
        raise ValueError(f"{path} cannot be used: {error}") from None
    except Exception as error:
        why = " ".join(str(error).replace(str(path), "it").split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read: {why}; replace or remove it") from error
    if not file.array.size:
        raise ValueError(f"{path} holds no pixel; replace or remove it")
    if file.array.dtype.kind not in "biuf":
        raise ValueError(f"{path} holds {file.array.dtype}, no numbers; save it as numbers")
    return file


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
