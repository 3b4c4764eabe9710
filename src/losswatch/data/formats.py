"""The file formats of images and masks, and what a file holds."""

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
    """The suffix of an image file in small letters, also `.nii.gz`; "" for another file.

    >>> suffix_of(Path("a.b.nii.gz")), suffix_of(Path("a.PNG")), suffix_of(Path("a.txt"))
    ('.nii.gz', '.png', '')
    """
    name = path.name.lower()
    return max((s for s in SUFFIXES if name.endswith(s)), key=len, default="")


def stem_of(path: Path) -> str:
    """The name of an image file without its suffix."""
    return path.name[: len(path.name) - len(suffix_of(path))]


class Unusable(ValueError):
    """The file is not damaged, but its content cannot be used. The message says what to do."""


class File(NamedTuple):
    """What a file holds.

    Attributes:
        array: [channels, *space], with the type of the file.
        place: the affine matrix from an index in space (and 1) to a point of the world (and 1);
            None if the file has no such matrix.
        loose: whether the file does not tell which axis is that of the channels. The array then has
            one channel.
        palette: the colours, as 0xRRGGBB, if the values of a mask are indices of colours.
        lossy: whether the compression changes values.
        notes: what its owner should know about how the file was read.
    """

    array: np.ndarray
    place: np.ndarray | None = None
    loose: bool = False
    palette: Mapping[int, int] | None = None
    lossy: bool = False
    notes: tuple[str, ...] = ()
