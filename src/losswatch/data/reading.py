"""Image files: PNG, JPEG and TIFF of 8 and 16 bits, grey and colour; NIfTI.

Each kind is read by the library of its format. MONAI's reader for PNG and TIFF is not used: it
swaps the axes, takes the index of a palette for a brightness, and knows no TIFF of 16-bit colours.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

TIFF, NIFTI = (".tif", ".tiff"), (".nii", ".nii.gz")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", *TIFF, *NIFTI)


def suffix_of(path: Path) -> str:
    """The suffix of an image file in small letters, `.nii.gz` as a whole; "" for another file.

    >>> suffix_of(Path("a.b.nii.gz")), suffix_of(Path("a.PNG")), suffix_of(Path("a.txt"))
    ('.nii.gz', '.png', '')
    """
    return max((s for s in SUFFIXES if path.name.lower().endswith(s)), key=len, default="")


def stem_of(path: Path) -> str:
    """The name of an image file without its suffix."""
    return path.name[: len(path.name) - len(suffix_of(path))]


def read(path: Path, is_mask: bool) -> np.ndarray:
    """An image as [channels, *space], or a mask as [*space], in the type of the file.

    Raises:
        ValueError: the file is damaged, or a mask has colours; in one line that names it.
    """
    try:
        array = _read(path, is_mask)
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read: {why}") from error
    if not array.size:
        raise ValueError(f"{path} holds no pixel")
    if not is_mask:
        return array
    if len(array) > 1:
        if not (array == array[:1]).all():
            raise ValueError(
                f"{path} is a mask of {len(array)} channels; one is needed, whose values are the "
                "classes"
            )
        array = array[:1]  # grey, saved as colour
    if not np.array_equal(array, array.astype(np.int64)):
        raise ValueError(f"{path} is a mask with values that are no whole numbers")
    return array[0]


def _read(path: Path, is_mask: bool) -> np.ndarray:
    """[channels, *space]."""
    suffix = suffix_of(path)
    if suffix in TIFF:
        return _read_tiff(path)
    if suffix in NIFTI:
        import nibabel

        volume = np.asarray(nibabel.load(path).dataobj)  # type: ignore[attr-defined]
        if volume.ndim == 4:
            return np.moveaxis(volume, 3, 0)  # channels
        return (volume[..., 0] if volume.ndim == 3 and volume.shape[2] == 1 else volume)[None]
    from PIL import Image

    with Image.open(path) as file:
        if file.mode == "P" and not is_mask:  # the numbers of a palette are no intensities
            return np.moveaxis(np.asarray(file.convert("RGB")), 2, 0)
        array = np.asarray(file)
    return array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0)


def _read_tiff(path: Path) -> np.ndarray:
    """[channels, *space]. A file of several pages is a volume."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        array, axes = series.asarray(), series.axes
    kept = [i for i, n in enumerate(array.shape) if n > 1 or axes[i] in "YX"]
    array, axes = array.reshape([array.shape[i] for i in kept]), "".join(axes[i] for i in kept)
    channels = [i for i, axis in enumerate(axes) if axis in "SC"]
    if len(channels) > 1 or len(axes) - len(channels) not in (2, 3):
        raise ValueError(f"its axes {axes} are none of an image or a volume")
    return np.moveaxis(array, channels[0], 0) if channels else array[None]


def write_mask(labels: np.ndarray, folder: Path, name: str, like: Path) -> Path:
    """Write a mask [*space] as PNG; as NIfTI or TIFF if the image is one.

    Args:
        labels: whole numbers, 0 to 65535.
        like: the image, whose position in space a NIfTI keeps.
    """
    array = labels.astype(np.uint8 if labels.max(initial=0) < 256 else np.uint16)
    suffix = suffix_of(like)
    if suffix in NIFTI:
        import nibabel

        source = nibabel.load(like)
        path = folder / f"{name}.nii.gz"
        shaped = array.reshape(source.shape[:3])  # type: ignore[attr-defined]
        nibabel.save(nibabel.Nifti1Image(shaped, source.affine), path)  # type: ignore[attr-defined]
    elif suffix in TIFF:
        import tifffile

        path = folder / f"{name}.tif"
        tifffile.imwrite(path, array)
    else:
        from PIL import Image

        path = folder / f"{name}.png"
        Image.fromarray(array).save(path)
    return path
