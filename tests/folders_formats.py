"""Folders whose files are of an odd format, or whose values are."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from folders import (
    JPEG,
    NAMES,
    SIZE,
    case,
    each,
    hwc,
    pairs,
    put,
    refused,
    same,
    scene,
    times,
)
from PIL import Image

# --- Photos --------------------------------------------------------------------------------------


def exif(root, orientation, size=SIZE, masks_too=False):
    """JPEG stored turned, with a tag that says so; the mask is drawn on what a viewer shows."""
    undo = {
        1: same, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1), 8: lambda x: np.rot90(x, -1),
    }[orientation]  # fmt: skip
    truth = pairs(root, "images/{}.png", size=size)
    tag = Image.Exif()
    tag[0x0112] = orientation
    for name, (image, label) in truth.items():
        (root / "images" / f"{name}.png").unlink()
        put(root / "images" / f"{name}.jpg", np.ascontiguousarray(undo(hwc(image))), exif=tag)
        if masks_too:
            put(root / "masks" / f"{name}.png", label, exif=tag)
    return truth


@case(far=JPEG)
def exif_180(root):
    """Held upside down: orientation 3."""
    return exif(root, 3)


@case(far=JPEG)
def exif_portrait(root):
    """Held upright: orientation 6."""
    return exif(root, 6, (48, 36))


@case(far=JPEG, said="CMYK")
def cmyk(root):
    """From print software."""
    truth = pairs(root, "images/{}.jpg")
    each(root, "images/*", lambda path: Image.open(path).convert("CMYK").save(path, quality=95))
    return truth


@case(said="(?i)alpha")
def rgba_images(root):
    """An alpha of 255 everywhere."""
    truth = pairs(root)
    each(root, "images/*", lambda path: Image.open(path).convert("RGBA").save(path))
    return truth


@case()
def webp_some(root):
    """Four images are WebP; all masks are PNG."""
    truth = pairs(root)
    for name in NAMES[:4]:
        path = root / "images" / f"{name}.png"
        Image.open(path).save(path.with_suffix(".webp"), lossless=True)
        path.unlink()
    return truth


def png_of(array, bits):
    """The bytes of a PNG, [H, W] or [H, W, 3], of any depth that PNG knows."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    def line(row):
        if bits == 16:
            return row.astype(">u2").tobytes()
        every = np.unpackbits(row.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]
        return np.packbits(every.ravel()).tobytes()

    h, w = array.shape[:2]
    head = struct.pack(">IIBBBBB", w, h, bits, 2 if array.ndim == 3 else 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + line(row) for row in array))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@case()
def png_48bit(root):
    """Three colours of 16 bits; all that there is to see is in the low byte."""
    truth = pairs(root)
    for name, (image, _) in truth.items():
        (root / "images" / f"{name}.png").write_bytes(png_of(hwc(image), 16))
    return truth


@case()
def png_1_16(root):
    """Masks of one bit; grey images of 16 bits."""
    truth = pairs(root, look=lambda image: image[0].astype(np.uint16) * 257)
    for name, (_, label) in truth.items():
        Image.fromarray(label.astype(bool)).save(root / "masks" / f"{name}.png", bits=1)
    return {name: (image[:1] * np.float64(257), label) for name, (image, label) in truth.items()}


# --- TIFF ----------------------------------------------------------------------------------------

GEO = [
    (33550, "d", 3, (10.0, 10.0, 0.0), True),
    (33922, "d", 6, (0, 0, 0, 5e5, 5e6, 0), True),
    (34735, "H", 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633), True),
]


@case()
def geotiff(root):
    """Sentinel-2: 12 bands of 16 bits, with a place on the earth."""
    truth = {}
    for i, name in enumerate(NAMES):
        image, label = scene(i)
        bands = np.stack([image[b % 3].astype(np.uint16) * (20 + b) for b in range(12)])
        put(root / "images" / f"{name}.tif", hwc(bands), extratags=GEO, planarconfig="contig")
        put(root / "masks" / f"{name}.tif", label, extratags=GEO)
        truth[name] = bands, label
    return truth


@case(said="(?i)no data|nodata")
def geotiff_nodata(root):
    """Heights with -32768 where there is no data, as GDAL_NODATA says."""
    truth = {}
    for i, name in enumerate(NAMES):
        image, label = scene(i)
        heights, nodata = image[0].astype(np.int16), [(42113, "s", 0, "-32768", True)]
        heights[:8] = -32768
        put(root / "images" / f"{name}.tif", heights, extratags=nodata)
        put(root / "masks" / f"{name}.png", label)
        truth[name] = np.where(heights == -32768, np.nan, heights)[None], label
    return truth


@case()
def tiff_chw(root):
    """Five channels in front: pages for TIFF, but the mask is a single one."""
    five = lambda image: np.concatenate([image, image[:2]]).astype(np.uint16)  # noqa: E731
    truth = pairs(root, "images/{}.tif", look=five)
    return {name: (five(image), label) for name, (image, label) in truth.items()}


@case(classes={"-1": -1, "0": 0, "1": 1})
def negative(root):
    """Sen1Floods11: masks of -1 (no data), 0 and 1, left as found."""

    def shore(label):
        found = label.astype(np.int16)
        found[:5] = -1
        return found

    truth = pairs(root, "images/{}.tif", "masks/{}.tif", draw=shore)
    return {name: (image, shore(label)) for name, (image, label) in truth.items()}


def soft(label):
    found = label.astype(np.float32)
    found[1:] = 0.4 * found[1:] + 0.6 * found[:-1]
    return found


@refused(r"(?=.*0\.[46])(?=.*>)", at=".tif")
def soft_float(root):
    """Float masks from 0 to 1 with soft edges."""
    pairs(root, mask="masks/{}.tif", draw=soft)


@case("data.classes={background:'<=0.5',cell:'>0.5'}", classes={"background": 0, "cell": 1})
def soft_float_threshold(root):
    truth = pairs(root, mask="masks/{}.tif", draw=soft)
    return {name: (image, soft(label) > 0.5) for name, (image, label) in truth.items()}


# --- Masks ---------------------------------------------------------------------------------------


def indexed(path, index, colours, **options):
    """A mask of a palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(index, "P")
    image.putpalette(colours)
    image.save(path, **options)


RED_BLUE = [0, 0, 0, 255, 0, 0, 0, 0, 255]
BLUE_RED = [0, 0, 0, 0, 0, 255, 255, 0, 0]
COLOURS = {"#000000": 0, "#ff0000": 1, "#0000ff": 2}


@case(classes=COLOURS)
def palette_order(root):
    """Each program orders its palette as it likes: red is class 1, in half of the files index 2."""
    truth = pairs(root, classes=3)
    for i, (name, (_, label)) in enumerate(truth.items()):
        index = np.array([0, 2, 1], np.uint8)[label] if i % 2 else label
        indexed(root / "masks" / f"{name}.png", index, BLUE_RED if i % 2 else RED_BLUE)
    return truth


@case("data.classes={background:0,cell:255}", classes={"background": 0, "cell": 1})
def rgba_masks(root):
    """White and black, opaque."""
    truth = pairs(root, draw=times(255))
    each(root, "masks/*", lambda path: Image.open(path).convert("RGBA").save(path))
    return truth


@refused("two classes", at="masks")
def empty_masks(root):
    pairs(root, draw=times(0))


# --- Sizes ---------------------------------------------------------------------------------------


@refused("20 x 24.*40 x 48", at="01.png")
def mask_half(root):
    """Masks of half the size of their images."""
    pairs(root, draw=lambda label: label[::2, ::2])


@refused("patch_size", "data.patch_size=64", at="01.png", either=True)
def tiny(root):
    """Images smaller than the patch: padded, or refused."""
    return pairs(root)


@refused("tiles", at="0.png", slow=True)
def bomb(root):
    """More pixels than Pillow reads without a question."""
    for folder in ("images", "masks"):
        (root / folder).mkdir()
        for i in range(4):
            image = Image.new("L", (14000, 14000))
            image.paste(1, (100, 100, 4000, 9000))
            image.save(root / folder / f"{i}.png", compress_level=1)
