"""Folders of palettes, of a file for each object, and of TIFF whose tags change what it shows."""

from __future__ import annotations

import struct

import numpy as np
import tifffile
from folders import NAMES, SIZE, case, hwc, pairs, put, refused, scene
from folders_formats import indexed
from folders_layouts import of_class
from folders_masks import BLUE_RED, COLOURS, RED_BLUE
from PIL import Image

WHITE_FIRST, BLACK_FIRST = [255] * 3 + [0] * 3, [0] * 3 + [255] * 3
WHITE = {"0": 0, "255": 1}
CELL = {"background": 0, "cell": 1}


def shown(path, mode=None):
    """What Pillow shows of an image, [channels, rows, columns]; in another mode."""
    with Image.open(path) as file:
        return np.moveaxis(np.atleast_3d(np.asarray(file.convert(mode) if mode else file)), 2, 0)


# --- Palettes ------------------------------------------------------------------------------------


def bmp_of(array, colours):
    """The bytes of a BMP of one bit, from the last row on, each of whole numbers of 32 bits."""
    height, width = array.shape
    rows = np.zeros((height, -(-width // 32) * 32), np.uint8)
    rows[:, :width] = array[::-1]
    data = np.packbits(rows, axis=1).tobytes()
    palette = b"".join(bytes([*colours[i : i + 3][::-1], 0]) for i in (0, 3))
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 1, 0, len(data), 0, 0, 2, 2)
    start = 14 + len(head) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + head + palette + data


def white_first(root, ending, every=1):
    """Masks in whose palette, or in every second one of them, 0 is white: viewers show the cell."""
    truth = pairs(root)
    for i, (name, (_, label)) in enumerate(truth.items()):
        (root / "masks" / f"{name}.png").unlink()
        path = root / "masks" / f"{name}{ending}"
        index, colours = (label, BLACK_FIRST) if i % every else (1 - label, WHITE_FIRST)
        if ending == ".bmp":
            path.write_bytes(bmp_of(index, colours))
        else:
            indexed(path, index, colours)
        assert (shown(path, "L") == 255 * label).all()
    return truth


for ending in (".bmp", ".png", ".gif"):
    for how, options, expected in (
        ("found", (), WHITE), ("rest", ("data.classes={background:0,cell:rest}",), CELL),
    ):  # fmt: skip

        def build(root, ending=ending):
            return white_first(root, ending)

        build.__name__ = f"white_first_{ending[1:]}_{how}"
        case(*options, classes=expected)(build)


@case("data.classes={background:0,cell:rest}", classes=CELL)
def white_first_in_half(root):
    """BMP of one bit of two programs."""
    return white_first(root, ".bmp", 2)


@case("data.classes={background:0,cell:rest}", classes=CELL)
def white_first_in_half_png(root):
    return white_first(root, ".png", 2)


def by_class(root, first, second):
    """A folder for each class; in half of the palettes the class is index 1, in half index 0."""
    truth = {}
    for value, name in ((1, "box"), (2, "ball")):
        truth = pairs(root, mask=f"masks/{name}/{{}}.png", classes=3)
        for i, key in enumerate(NAMES):
            inside = of_class(value)(truth[key][1]) // 255
            index, colours = (1 - inside, second) if i % 2 else (inside, first)
            indexed(root / "masks" / name / f"{key}.png", index, colours)
    return truth


@case(classes={"ball": 2, "box": 1}, overlap=True)
def class_folders_white_first(root):
    return by_class(root, BLACK_FIRST, WHITE_FIRST)


@case(classes={"ball": 2, "box": 1}, overlap=True)
def class_folders_palettes(root):
    """Red on black, whatever the order of the palette: black is the background."""
    return by_class(root, [0, 0, 0, 255, 0, 0], [255, 0, 0, 0, 0, 0])


@refused("(?i)palette|colour", at="masks", either=True, classes=COLOURS)
def objects_of_palettes(root):
    """Two objects of an image as two files; red and blue are index 1, each in its palette."""
    truth = {}
    for i, name in enumerate(NAMES):
        truth[name] = image, label = scene(i, classes=3)
        put(root / name / "images" / f"{name}.png", hwc(image))
        for value, colours in ((1, RED_BLUE), (2, BLUE_RED)):
            index = of_class(value)(label) // 255
            indexed(root / name / "masks" / f"{value}.png", index, colours)
    return truth


@refused("(?i)colour", at="masks", either=True,
         classes={"#000000": 0, "#ffffff": 1, "#ff0000": 2})  # fmt: skip
def objects_white_and_red(root):
    truth = {}
    for i, name in enumerate(NAMES):
        truth[name] = image, label = scene(i, classes=3)
        put(root / name / "images" / f"{name}.png", hwc(image))
        put(root / name / "masks" / "0.png", of_class(1)(label))
        red = of_class(2)(label)
        put(root / name / "masks" / "1.png", np.dstack([red, red * 0, red * 0]))
    return truth


@case()
def objects_by_image(root):
    """masks/<name of the image>/<n>.png: a file for each object, not a class."""
    truth = pairs(root)
    for i, (name, (_, label)) in enumerate(truth.items()):
        (root / "masks" / f"{name}.png").unlink()
        for part in range(2 + i % 3):  # not everywhere of one number
            stripes = np.arange(SIZE[1]) % (2 + i % 3) == part
            put(root / "masks" / name / f"{part}.png", label * stripes.astype(np.uint8))
    return truth


@case(classes=WHITE, said="masks.*transparent")
def alpha_is_soft(root):
    """White everywhere; what is transparent by half or more is the background."""
    rng = np.random.default_rng(0)

    def draw(label):
        alpha = np.where(label > 0, rng.integers(128, 256, SIZE), rng.integers(0, 128, SIZE))
        return np.dstack([np.full((*SIZE, 3), 255), alpha]).astype(np.uint8)

    return pairs(root, draw=draw)


# --- TIFF ----------------------------------------------------------------------------------------


def tiffs(root, write, mode=None):
    """Images that `write` has written; what Pillow shows of them is the truth."""
    truth = pairs(root)
    for name, (image, label) in truth.items():
        (root / "images" / f"{name}.png").unlink()
        path = root / "images" / f"{name}.tif"
        write(path, image)
        truth[name] = shown(path, mode), label
    return truth


@case()
def tiff_white_is_zero(root):
    """Scanners and fax machines: 0 is white."""
    write = lambda path, image: put(path, 255 - image[0], photometric="miniswhite")  # noqa: E731
    truth = tiffs(root, write)
    assert all((truth[name][0][0] == scene(i)[0][0]).all() for i, name in enumerate(NAMES))
    return truth


@case(classes=WHITE)
def tiff_masks_white_is_zero(root):
    truth = pairs(root, mask="masks/{}.tif")
    for name, (_, label) in truth.items():
        path = root / "masks" / f"{name}.tif"
        put(path, 255 - 255 * label, photometric="miniswhite")
        assert (shown(path) == 255 * label).all()
    return truth


@case()
def tiff_masks_one_bit_white_is_zero(root):
    truth = pairs(root, mask="masks/{}.tif")
    for name, (_, label) in truth.items():
        path = root / "masks" / f"{name}.tif"
        put(path, label == 0, photometric="miniswhite")
        assert (shown(path) == label).all()
    return truth


@case()
def tiff_palette_images(root):
    return tiffs(
        root, lambda path, image: Image.fromarray(hwc(image)).quantize(64).save(path), "RGB"
    )


@case(said="CMYK")
def tiff_cmyk(root):
    return tiffs(
        root, lambda path, image: Image.fromarray(hwc(image)).convert("CMYK").save(path), "RGB"
    )


@case(said="(?i)alpha|four")
def tiff_rgba(root):
    """The fourth channel may be infrared as well: it is kept, and this is said."""

    def write(path, image):
        opaque = np.full(SIZE, 255, np.uint8)
        Image.fromarray(np.dstack([hwc(image), opaque])).save(path)

    return tiffs(root, write)


def stored_turned(path, array):
    """The rows from below, with a tag that says so."""
    put(path, np.ascontiguousarray(array[::-1]), extratags=[(274, "H", 1, 4, True)])
    return path


@case(said="orientation")
def tiff_turned(root):
    """Images and masks carry the tag of orientation, and both are stored turned."""
    truth = pairs(root, "images/{}.tif", "masks/{}.tif")
    for name, (image, label) in truth.items():
        stored_turned(root / "images" / f"{name}.tif", hwc(image))
        path = stored_turned(root / "masks" / f"{name}.tif", label)
        assert (shown(path) == label).all()  # as viewers show it
        assert (tifffile.imread(path) == label[::-1]).all()
    return truth


@case()
def tiff_masks_turned(root):
    """Masks alone carry it; images are PNG."""
    truth = pairs(root, mask="masks/{}.tif")
    for name, (_, label) in truth.items():
        stored_turned(root / "masks" / f"{name}.tif", label)
    return truth


@case(said="masks.*series")
def tiff_mask_pyramid(root):
    """A mask and a small one of it in one file: the note names the mask."""
    truth = pairs(root, mask="masks/{}.tif")
    for name, (_, label) in truth.items():
        with tifffile.TiffWriter(root / "masks" / f"{name}.tif") as writer:
            writer.write(label)
            writer.write(label[::2, ::2])
    return truth


def compressed(root, ending, **options):
    """Masks of black and white, of a format that can change values."""
    truth = pairs(root)
    for name, (_, label) in truth.items():
        (root / "masks" / f"{name}.png").unlink()
        path = root / "masks" / f"{name}{ending}"
        Image.fromarray(label * np.uint8(255)).save(path, **options)
    return truth


BLACK_WHITE = "data.classes={background:'#000000',cell:'#ffffff'}"


@refused(">", "data.classes={background:0,cell:rest}", at=".tif")
def lossy_tiff_rest(root):
    compressed(root, ".tif", compression="jpeg", quality=75)


@case("data.classes={background:0,cell:255}", classes=CELL, wrong=0.02, said="nearest")
def lossy_tiff(root):
    return compressed(root, ".tif", compression="jpeg", quality=75)


@refused("(?i)>|colour", "data.classes={background:0,cell:rest}", at="masks")
def lossy_webp_rest(root):
    compressed(root, ".webp", quality=75)


@case(BLACK_WHITE, classes=CELL, wrong=0.02, said="nearest")
def lossy_webp(root):
    return compressed(root, ".webp", quality=75)


@case("data.classes={background:0,cell:rest}", classes=CELL)
def lossless_webp(root):
    return compressed(root, ".webp", lossless=True)


@case(far=1.0)
def tiff_jpeg_images(root):
    """Images may be compressed so."""
    return tiffs(root, lambda path, x: Image.fromarray(x[0]).save(path, compression="jpeg"))
