"""PNG, JPEG, GIF, WebP and BMP by Pillow; TIFF by tifffile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from losswatch.data.reading import File, Unusable

ORIENTATION = 0x0112  # the tag of EXIF and of TIFF
# What makes an array [..., rows, columns] upright, by the value of that tag (EXIF 2.32, 4.6.4 A).
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda x: x[..., ::-1],
    3: lambda x: x[..., ::-1, ::-1],
    4: lambda x: x[..., ::-1, :],
    5: lambda x: x.swapaxes(-1, -2),
    6: lambda x: x.swapaxes(-1, -2)[..., ::-1],
    7: lambda x: x.swapaxes(-1, -2)[..., ::-1, ::-1],
    8: lambda x: x.swapaxes(-1, -2)[..., ::-1, :],
}
# The tags of a GeoTIFF that say where it lies (GeoTIFF 1.1, section 7).
SCALE, TIEPOINT, TRANSFORMATION = 33550, 33922, 34264
GEO = (SCALE, TIEPOINT, TRANSFORMATION, 34735, 34736, 34737)
NODATA = 42113  # of GDAL


def read_picture(path: Path, is_mask: bool) -> File:
    """A picture; a mask with a palette keeps its indices, an image is turned as EXIF says."""
    from PIL import Image

    notes: list[str] = []
    try:
        opened = Image.open(path)
    except Image.DecompressionBombError:
        raise Unusable(
            f"it has more pixels than the {2 * Image.MAX_IMAGE_PIXELS:,} that Pillow reads; cut it "  # type: ignore
            "into tiles, or save it as TIFF"
        ) from None
    with opened as file:
        lossy = file.format in ("JPEG", "MPO")
        turn = 1 if is_mask else file.getexif().get(ORIENTATION, 1)
        if file.format in ("GIF", "WEBP", "PNG") and getattr(file, "is_animated", False):
            file.seek(0)
            notes.append("of several frames the first one is read")
        if file.mode == "P" and (indexed := _indexed(file, is_mask)):
            return indexed._replace(notes=tuple(notes))
        depth = _depth(path)
        if depth == 16 and file.mode in ("RGB", "RGBA"):  # of which Pillow reads 8 bits
            import imagecodecs

            array = imagecodecs.png_decode(path.read_bytes())
        else:
            if file.mode in ("P", "PA"):
                file = file.convert("RGBA" if "transparency" in file.info else "RGB")  # type: ignore
            if file.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
                if file.mode == "CMYK":
                    notes.append("changed from CMYK to RGB")
                file = file.convert("RGB")  # type: ignore[assignment]
            array = np.asarray(file)
    if depth in (2, 4) and array.ndim == 2:  # Pillow spreads them over 0 to 255
        array = array // (255 // (2**depth - 1))
    if array.ndim == 3 and array.shape[2] in (2, 4):
        array, note = _without_alpha(array, is_mask)
        notes.append(note)
    array = array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0)
    if turn in TURNS:
        array = TURNS[turn](array)
        notes.append("turned as its EXIF orientation says")
    return File(array, lossy=lossy, notes=tuple(filter(None, notes)))


def _indexed(file: Any, is_mask: bool) -> File | None:
    """A mask with a palette; or a GIF of greys, which must have one. None: an image of colours."""
    array = np.asarray(file)
    colours = np.array(file.getpalette("RGB"), int).reshape(-1, 3)
    used = colours[np.unique(array)]
    if file.format == "GIF" and (used == used[:, :1]).all():
        return File(colours[array, 0].astype(np.uint8)[None])
    palette = dict(enumerate((colours @ [65536, 256, 1]).tolist()))
    return File(array[None], palette=palette) if is_mask else None


def _depth(path: Path) -> int:
    """The bits of a PNG's value in a channel of grey or colours; 0 for other files."""
    with path.open("rb") as stream:
        header = stream.read(26)
    is_png = header.startswith(b"\x89PNG") and len(header) == 26
    return header[24] if is_png and header[25] != 3 else 0


def _without_alpha(array: np.ndarray, is_mask: bool) -> tuple[np.ndarray, str]:
    alpha, rest = array[..., -1], array[..., :-1]
    if not is_mask:
        return rest, "read without its alpha channel"
    if alpha.all():
        return rest, ""
    return np.where(alpha[..., None] == 0, 0, rest), "transparent pixels are read as 0"


def read_tiff(path: Path, is_mask: bool) -> File:
    """A TIFF. A file of several pages is a volume, unless the mask shows that they are channels."""
    import tifffile

    notes = []
    with tifffile.TiffFile(path) as file:
        series, page = file.series[0], file.series[0].keyframe
        array, axes = series.asarray(), series.axes
        tags = {code: page.tags[code].value for code in (*GEO, NODATA) if code in page.tags}
        palette = _palette(page) if is_mask else None
        turn = page.tags[ORIENTATION].value if ORIENTATION in page.tags else 1
        if len(file.series) > 1:
            notes.append("of several series the first one is read")
    kept = [i for i, n in enumerate(array.shape) if n > 1 or axes[i] in "YX"]
    array, axes = array.reshape([array.shape[i] for i in kept]), "".join(axes[i] for i in kept)
    channels = [i for i, axis in enumerate(axes) if axis in "SC"]
    if len(channels) > 1 or len(axes) - len(channels) not in (2, 3):
        raise Unusable(f"its axes {axes} are none of an image or a volume; save it as one of these")
    if "T" in axes:
        notes.append("its axis of time is read as one of space, or of channels for a flat mask")
    if not is_mask:
        notes += _no_data(array, tags.get(NODATA))
    array = np.moveaxis(array, channels[0], 0) if channels else array[None]
    is_loose = not channels and len(axes) == 3 and axes[0] in "QIT"  # pages, or a film
    place = _place(tags) if array.ndim == 3 else None
    if not is_mask and turn in TURNS:
        array, place = TURNS[turn](array), None
        notes.append("turned as its tag of orientation says")
    return File(array, place, is_loose, palette, notes=tuple(notes))


def _palette(page: Any) -> dict[int, int] | None:
    if page.colormap is None:
        return None
    colours = (page.colormap.astype(int) >> 8).T  # 16 bits each
    return dict(enumerate((colours @ [65536, 256, 1]).tolist()))


def _no_data(array: np.ndarray, value: str | None) -> list[str]:
    """A line where pixels have the value that stands for no data."""
    try:
        found = value is not None and (array == float(value.strip("\0 "))).any()
    except ValueError:
        return []
    return [f"its value for no data, {value}, is read as an intensity"] if found else []


def _place(tags: dict[int, Any]) -> np.ndarray | None:
    """From (row, column, 1) to the coordinates of the map; None for a TIFF without a place."""
    if TRANSFORMATION in tags:
        matrix = np.reshape(tags[TRANSFORMATION], (4, 4))[[0, 1, 3]][:, [1, 0, 3]]
    elif SCALE in tags and TIEPOINT in tags:
        (dx, dy, *_), (i, j, _, x, y, *_) = tags[SCALE], tags[TIEPOINT]
        matrix = np.array([[0, dx, x - i * dx], [-dy, 0, y + j * dy], [0, 0, 1.0]])
    else:
        return None
    return matrix if np.linalg.det(matrix) else None
