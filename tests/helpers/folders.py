"""What `test_folders.py` tries: a row of its table, synthetic images, and how they are written.

A case is a function that fills a folder as a data set of that kind does. It returns the truth, of
an independent reader: {name: (image [channels, *space], label [*space])}. A name may begin with
its split, as in "val:01". A NaN in a true image stands for any value.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import tifffile
from PIL import Image

Truth = dict[str, tuple[np.ndarray, np.ndarray]]

SIZE, SMALL = (40, 48), (14, 16, 12)
NAMES = tuple(f"{i:02}" for i in range(1, 9))
JPEG = 6.0  # of 255: how far an image that JPEG has stored may be from the truth, in the mean


@dataclass(frozen=True)
class Row:
    """A folder, the options of the command line, and what must happen."""

    build: Callable[[Path], Truth | None]
    options: tuple[str, ...] = ()
    classes: Mapping[str, Any] = field(default_factory=dict)  # the true values of each class
    ignored: tuple[int, ...] = ()  # true values that count nowhere
    overlap: bool = False  # whether the target is multilabel
    refused: str | None = None  # what the line must match
    at: str = ""  # the file or folder that the line must name
    either: bool = False  # whether to read is right, too
    said: str | None = None  # what one note must match where the folder is read
    far: float = 0.0  # how far images may be from the truth, in the mean
    wrong: float = 0.0  # the share of pixels whose label may be wrong
    turned: bool = False  # any order and direction of axes is right that is one for all
    slow: bool = False


ROWS: dict[str, Row] = {}
FOUND = {"0": 0, "1": 1}
THREE = FOUND | {"2": 2}
REPLACE = "(?i:replace|set |fill|write|crop)"  # the way out where an image holds NaN


def case(*options: str, **more: Any) -> Callable[[Callable], Callable]:
    """Put a function into the table. Without `classes`, those of values 0 and 1 are expected."""

    def keep(build: Callable[[Path], Truth | None]) -> Callable:
        assert build.__name__ not in ROWS
        ROWS[build.__name__] = Row(build, options, **{"classes": FOUND} | more)
        return build

    return keep


def refused(pattern: str, *options: str, at: str = "", **more: Any) -> Callable:
    return case(*options, refused=pattern, at=at, **more)


# --- Content -------------------------------------------------------------------------------------


def scene(i: int, size: Sequence[int] = SIZE, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """An image uint8 [3, *size] and a label uint8 [*size] of 0, 1 (a box) and 2 (a ball).

    Nothing in it is symmetric.
    """
    rng = np.random.default_rng(1000 + i)
    label = np.zeros(size, np.uint8)
    corner = [int(rng.integers(1, max(2, n // 3))) for n in size]
    label[
        tuple(slice(a, a + max(2, n // 4 + i % 3)) for a, n in zip(corner, size, strict=True))
    ] = 1
    if classes > 2:
        far = sum((np.indices(size)[k] - 0.7 * n) ** 2 for k, n in enumerate(size))
        label[far < max(2.0, 0.14 * min(size)) ** 2] = 2
    image = rng.integers(0, 20, (3, *size))
    image[0] += 120 * (label == 1)
    image[1] += 150 * (label == 2)
    image[2] += np.linspace(0, 90, size[-1]).astype(np.int64)  # bright on the right
    return image.astype(np.uint8), label


def hwc(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(image, 0, -1))


def same(array: np.ndarray) -> np.ndarray:
    return array


def times(value: int) -> Callable[[np.ndarray], np.ndarray]:
    """A mask of 0 and value."""
    return lambda label: label * np.uint8(value)


def bordered(label: np.ndarray, value: int = 255) -> np.ndarray:
    """A border of another value between classes."""
    found = label.copy()
    found[:-1][np.diff(label.astype(int), axis=0) != 0] = value
    found[:, :-1][np.diff(label.astype(int), axis=1) != 0] = value
    return found


# --- Files ---------------------------------------------------------------------------------------

AFFINE = np.diag([1.0, 1.2, 2.5, 1.0])


def reversed_in(axis: int) -> np.ndarray:
    """From the voxels of an array of size SMALL to those of the same that is stored reversed."""
    change = np.eye(4)
    change[axis, axis], change[axis, 3] = -1, SMALL[axis] - 1
    return change


def put(path: Path, array: np.ndarray, **options: Any) -> None:
    """Write an array in its own order of axes, by the library of the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.lower()
    if suffix in (".tif", ".tiff"):
        colour = array.ndim == 3 and array.shape[-1] == 3
        options.pop("affine", None)  # a TIFF has none
        tifffile.imwrite(
            path, array, **{"photometric": "rgb" if colour else "minisblack"} | options
        )
    elif path.name.endswith((".nii", ".nii.gz")):
        nibabel.save(nibabel.Nifti1Image(array, options.get("affine", AFFINE)), path)
    elif suffix == ".npy":
        np.save(path, array)
    else:
        jpeg = {"quality": 95, "subsampling": 0} if suffix in (".jpg", ".jpeg") else {}
        gif = (
            {"optimize": False} if suffix == ".gif" else {}
        )  # greys stay the numbers that they are
        Image.fromarray(array).save(path, **jpeg | gif | options)


def junk(path: Path, content: bytes = b"junk") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def pairs(
    root: Path,
    image: str = "images/{}.png",
    mask: str = "masks/{}.png",
    names: Sequence[str] = NAMES,
    size: Sequence[int] = SIZE,
    classes: int = 2,
    look: Callable[[np.ndarray], np.ndarray] = hwc,
    draw: Callable[[np.ndarray], np.ndarray] = same,
    first: int = 0,
    key: str = "{}",
) -> Truth:
    """Write an image and a mask for each name.

    Args:
        image, mask: where, with {} for the name.
        look, draw: what is stored of an image [3, *size], and of a label.
        first: number of the first scene.
        key: of the truth.
    """
    truth = {}
    for i, name in enumerate(names, first):
        picture, label = scene(i, size, classes)
        put(root / image.format(name), look(picture))
        put(root / mask.format(name), draw(label))
        truth[key.format(name)] = picture, label
    return truth


def grey(truth: Truth) -> Truth:
    """The truth where the first channel alone was stored."""
    return {name: (image[:1], label) for name, (image, label) in truth.items()}


def volumes(
    root: Path,
    image: str = "images/{}.nii.gz",
    mask: str = "masks/{}.nii.gz",
    names: Sequence[str] = NAMES[:6],
    size: Sequence[int] = SMALL,
    **more: Any,
) -> Truth:
    """The same in three axes, of one channel and three classes."""
    look = more.pop("look", lambda picture: picture[0].astype(np.int16))
    return grey(pairs(root, image, mask, names, size, 3, look, **more))


def each(root: Path, pattern: str, change: Callable[[Path], Any]) -> None:
    """Change the files that are there."""
    for path in sorted(root.glob(pattern)):
        change(path)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
