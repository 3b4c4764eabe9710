"""The formats of images and masks, and what a file holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
TIFF, NIFTI, ARRAYS = (".tif", ".tiff"), (".nii", ".nii.gz"), (".npy", ".npz")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd", ".dcm")
SUFFIXES = (*PICTURES, *TIFF, *NIFTI, *ITK, *ARRAYS)


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
        place: the affine matrix from an index in space (and 1) to a point of the world (and 1);
            None where the file has none.
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
