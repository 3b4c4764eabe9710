"""Reads PNG, JPEG, GIF, WebP and BMP by Pillow, and TIFF by tifffile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from losswatch.data.formats import File, Unusable

ORIENTATION = 0x0112  # the tag of EXIF and of TIFF
# By the value of that tag: turns an array [..., rows, columns] upright (EXIF 2.32, 4.6.4 A).
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda x: x[..., ::-1],
    3: lambda x: x[..., ::-1, ::-1],
    4: lambda x: x[..., ::-1, :],
    5: lambda x: x.swapaxes(-1, -2),
    6: lambda x: x.swapaxes(-1, -2)[..., ::-1],
    7: lambda x: x.swapaxes(-1, -2)[..., ::-1, ::-1],
    8: lambda x: x.swapaxes(-1, -2)[..., ::-1, :],
}
# Photometric interpretations of TIFF 6.0 whose numbers are not intensities of light.
WHITE_IS_ZERO, PALETTE, INKS, YCBCR = 0, 3, 5, 6
JPEGS = (6, 7, 34892)  # compressions of TIFF
# The tags of a GeoTIFF with its place on the map (GeoTIFF 1.1, section 7).
SCALE, TIEPOINT, TRANSFORMATION = 33550, 33922, 34264
GEO = (SCALE, TIEPOINT, TRANSFORMATION, 34735, 34736, 34737)
NODATA = 42113  # of GDAL


def read_picture(path: Path, is_mask: bool) -> File:
    """Read a picture. A mask with a palette keeps its indices, an image is turned by its EXIF."""
    from PIL import Image

    notes = []
    try:
        opened = Image.open(path)
    except Image.DecompressionBombError:
        raise Unusable(
            f"it has more pixels than the {2 * Image.MAX_IMAGE_PIXELS:,} that Pillow reads; cut it "  # type: ignore
            "into tiles, or save it as TIFF"
        ) from None
    with opened as file, path.open("rb") as stream:
        header = stream.read(4096)
        said = 1 if is_mask else file.getexif().get(ORIENTATION, 1)
        if file.format in ("GIF", "WEBP", "PNG") and getattr(file, "is_animated", False):
            file.seek(0)
            notes.append("of several frames the first one is read")
        if is_mask and file.mode == "P":
            palette = _colours(np.array(file.getpalette("RGB"), int).reshape(-1, 3))
            return File(np.asarray(file)[None], palette=palette, notes=tuple(notes))
        depth = _depth(header)
        if depth == 16 and file.mode in ("RGB", "RGBA"):  # Pillow reads only 8 bits of them
            import imagecodecs

            array = imagecodecs.png_decode(path.read_bytes())
        else:
            array = np.asarray(_plain(file, notes))
        # Pillow turns a TIFF when it reads the numbers, and removes the tag.
        turn = 1 if file.format == "TIFF" else said
    if depth in (2, 4) and array.ndim == 2:  # Pillow scales them to 0 to 255
        array = array // (255 // (2**depth - 1))
    if array.ndim == 3 and array.shape[2] in (2, 4):
        array = _without_alpha(array, is_mask, notes)
    array = array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0)
    if turn in TURNS:
        array = TURNS[turn](array)
    if said in TURNS:
        notes.append("turned as its EXIF orientation says")
    is_lossy_webp = b"WEBPVP8" in header and b"VP8L" not in header
    lossy = file.format in ("JPEG", "MPO") or is_lossy_webp
    return File(array, lossy=lossy, notes=tuple(notes))


def _plain(file: Any, notes: list[str]) -> Any:
    """An image of Pillow, changed to intensities of grey or of red, green and blue."""
    if file.mode == "P" and file.format == "GIF":  # a GIF of greys has a palette, too
        colours = np.array(file.getpalette("RGB")).reshape(-1, 3)[np.unique(np.asarray(file))]
        if (colours == colours[:, :1]).all():
            return file.convert("L")
    if file.mode in ("P", "PA"):
        return file.convert("RGBA" if "transparency" in file.info else "RGB")
    if file.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        if file.mode == "CMYK":
            notes.append("changed from CMYK to RGB")
        return file.convert("RGB")
    return file


def _depth(header: bytes) -> int:
    """The bits of each number in a PNG of greys or colours; 0 for other files."""
    is_png = header.startswith(b"\x89PNG") and len(header) > 25
    return header[24] if is_png and header[25] != 3 else 0


def _colours(colours: np.ndarray) -> dict[int, int]:
    """A palette of colours [n, 3] by index, each as 0xRRGGBB."""
    return dict(enumerate((colours @ [65536, 256, 1]).tolist()))


def _without_alpha(array: np.ndarray, is_mask: bool, notes: list[str]) -> np.ndarray:
    """A picture [rows, columns, 1 or 3]; pixels of a mask that are mostly transparent become 0."""
    alpha, rest = array[..., -1:], array[..., :-1]
    if not is_mask:
        notes.append("read without its alpha channel")
        return rest
    is_clear = alpha <= np.iinfo(array.dtype).max // 2
    if is_clear.any():
        notes.append("transparent pixels are read as 0")
    return np.where(is_clear, 0, rest)


def read_tiff(path: Path, is_mask: bool) -> File:
    """Read a TIFF. Several pages are a volume, unless the mask shows that they are channels."""
    import tifffile

    notes = []
    with tifffile.TiffFile(path) as file:
        series, page = file.series[0], file.series[0].keyframe
        is_flat = len(series.pages) == 1 and page.dtype == np.uint8
        if not is_mask and is_flat and page.photometric in (PALETTE, INKS, YCBCR):
            return read_picture(path, is_mask)  # Pillow converts the colours
        array, axes = series.asarray(), series.axes
        tags = {code: page.tags[code].value for code in (*GEO, NODATA) if code in page.tags}
        palette = None
        if is_mask and page.colormap is not None:
            palette = _colours((page.colormap.astype(int) >> 8).T)  # from 16 bits each
        turn = page.tags[ORIENTATION].value if ORIENTATION in page.tags else 1
        lossy, bits = page.compression in JPEGS, page.bitspersample
        is_inverse = page.photometric == WHITE_IS_ZERO and array.dtype.kind in "bu"
        has_alpha = not is_mask and any(int(kind) in (1, 2) for kind in page.extrasamples)
        if len(file.series) > 1:
            notes.append("of several series the first one is read")
    if is_inverse:
        array = ~array if array.dtype == bool else (2**bits - 1 - array).astype(array.dtype)
    kept = [i for i, n in enumerate(array.shape) if n > 1 or axes[i] in "YX"]
    array, axes = array.reshape([array.shape[i] for i in kept]), "".join(axes[i] for i in kept)
    channels = [i for i, axis in enumerate(axes) if axis in "SC"]
    if len(channels) > 1 or len(axes) - len(channels) not in (2, 3):
        raise Unusable(
            f"its axes {axes} are not those of an image or a volume; save it as one of these"
        )
    if "T" in axes:
        notes.append("its axis of time is read as one of space, or of channels for a flat mask")
    if has_alpha:
        notes.append("its last channel, which is marked as alpha, is read as an intensity")
    if not is_mask:
        notes += _no_data(array, tags.get(NODATA))
    array = np.moveaxis(array, channels[0], 0) if channels else array[None]
    if is_mask and len(array) == 4 and array.dtype == np.uint8:
        array = np.moveaxis(_without_alpha(np.moveaxis(array, 0, -1), is_mask, notes), -1, 0)
    is_loose = not channels and len(axes) == 3 and axes[0] in "QIT"  # pages, or a film
    place = _place(tags) if array.ndim == 3 else None
    if turn in TURNS:
        array, place = TURNS[turn](array), None
        notes.append("turned as its tag of orientation says")
    return File(array, place, is_loose, palette, lossy, tuple(notes))


def _no_data(array: np.ndarray, value: str | None) -> list[str]:
    """A note if pixels have the value that means no data."""
    try:
        has_some = value is not None and (array == float(value.strip("\0 "))).any()
    except ValueError:
        return []
    return [f"its value for no data, {value}, is read as an intensity"] if has_some else []


def _place(tags: dict[int, Any]) -> np.ndarray | None:
    """The matrix from (row, column, 1) to coordinates of the map; None if a TIFF has no place."""
    if TRANSFORMATION in tags:
        matrix = np.reshape(tags[TRANSFORMATION], (4, 4))[[0, 1, 3]][:, [1, 0, 3]]
    elif SCALE in tags and TIEPOINT in tags:
        (dx, dy, *_), (i, j, _, x, y, *_) = tags[SCALE], tags[TIEPOINT]
        matrix = np.array([[0, dx, x - i * dx], [-dy, 0, y + j * dy], [0, 0, 1.0]])
    else:
        return None
    return matrix if np.linalg.det(matrix) else None
