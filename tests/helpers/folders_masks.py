"""Folders whose masks hold colours, odd values or odd types."""

from __future__ import annotations

import numpy as np
from folders import (
    FOUND,
    JPEG,
    NAMES,
    SIZE,
    THREE,
    case,
    each,
    hwc,
    pairs,
    put,
    refused,
    scene,
    times,
)
from folders_datasets import CAMVID
from folders_formats import indexed, png_of
from PIL import Image

# --- Palettes and colours ------------------------------------------------------------------------


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


@case(classes=THREE)
def palette_transparent(root):
    """One index of the palette is transparent; palettes agree, so an index is a class."""
    truth = pairs(root, classes=3)
    for name, (_, label) in truth.items():
        indexed(root / "masks" / f"{name}.png", label, RED_BLUE, transparency=0)
    return truth


@case(
    "data.classes={background:'#000000',red:'#ff0000',blue:'#0000ff'}",
    classes={"background": 0, "red": 1, "blue": 2},
)  # fmt: skip
def palette_named(root):
    """Classes are given as colours; palettes of the files differ."""
    return palette_order(root)


@case(classes=THREE)
def palette_tiff(root):
    """TIFF masks of a palette, the same in all files."""
    colours = np.zeros((3, 256), np.uint16)
    colours[:, :3] = np.reshape(RED_BLUE, (3, 3)).T * 257
    truth = pairs(root, classes=3)
    for name, (_, label) in truth.items():
        (root / "masks" / f"{name}.png").unlink()
        put(root / "masks" / f"{name}.tif", label, photometric="palette", colormap=colours)
    return truth


@case(classes={"0": 0, "255": 1})
def palette_of_greys(root):
    """A palette in whose place 1 is white, beside plain masks of 0 and 255: a value is its grey."""
    truth = pairs(root, draw=times(255))
    for name in NAMES[::2]:
        indexed(root / "masks" / f"{name}.png", truth[name][1], [0, 0, 0, 255, 255, 255])
    return truth


PRIMARY = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)


@case(classes={"#ff0000": 0, "#00ff00": 1, "#0000ff": 2})
def colours_one_hot(root):
    """A channel for each class, as RGB."""
    return pairs(root, classes=3, draw=lambda label: PRIMARY[label])


@case(classes={"#000000": 0, "#ff0000": 1})
def colours_rgba(root):
    """Red on black, with an opaque alpha."""
    return pairs(
        root, draw=lambda x: np.dstack([x * 255, x * 0, x * 0, x * 0 + 255]).astype(np.uint8)
    )


@refused("#400080", "data.masks=labels", "data.classes={sky:'#808080',building:'#800000'}",
         at="labels/")  # fmt: skip
def colours_one_unnamed(root):
    pairs(root, mask="labels/{}.png", classes=3, draw=lambda label: CAMVID[label])


NAMED = "data.classes={sky:'#808080',building:'#800000',car:'#400080'}"
SKY = {"sky": 0, "building": 1, "car": 2}


def smooth(label):
    """Masks that were drawn with smooth edges, so other colours occur there."""
    found = CAMVID[label].astype(np.float64)
    edges = found.copy()
    edges[1:] = 0.7 * found[1:] + 0.3 * found[:-1]
    return edges.astype(np.uint8)


@refused("(?i)nearest", NAMED, at="masks/")
def colours_smooth(root):
    pairs(root, classes=3, draw=smooth)


@case(NAMED, "data.nearest=true", classes=SKY, said="nearest")
def colours_smooth_nearest(root):
    return pairs(root, classes=3, draw=smooth)


@case(NAMED, classes=SKY, far=JPEG, wrong=0.02, said="nearest")
def colours_jpeg(root):
    """Masks as JPEG: each pixel goes to the nearest colour."""
    return pairs(root, "images/{}.jpg", "masks/{}.jpg", classes=3, draw=lambda label: CAMVID[label])


@refused(r"data\.classes", at="masks")
def colours_jpeg_unnamed(root):
    """The same without names: thousands of colours."""
    pairs(root, "images/{}.jpg", "masks/{}.jpg", classes=3, draw=lambda label: CAMVID[label])


@case(classes={"0": 0, "255": 1}, said="transparent")
def alpha_is_the_mask(root):
    """White everywhere; what is transparent is the background."""
    return pairs(
        root, draw=lambda x: np.dstack([np.full((*SIZE, 3), 255), x * 255]).astype(np.uint8)
    )


@case()
def grey_alpha(root):
    """Grey images and masks, each with an opaque alpha."""
    opaque = lambda x: np.dstack([x, np.full(SIZE, 255, np.uint8)])  # noqa: E731
    truth = pairs(root, look=lambda image: opaque(image[0]), draw=opaque)
    return {name: (image[:1], label) for name, (image, label) in truth.items()}


# --- Values --------------------------------------------------------------------------------------


@case(classes={"-1": -1, "0": 0, "1": 1})
def negative(root):
    """Sen1Floods11: masks of -1 (no data), 0 and 1, left as found."""

    def shore(label):
        found = label.astype(np.int16)
        found[:, :16] = -1  # it is dark there
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


@case(
    "data.classes={low:'<1',middle:1,high:'>=2'}", classes={"low": 0, "middle": 1, "high": 2}
)  # fmt: skip
def thresholds(root):
    return pairs(root, classes=3)


def shaken(label):
    """0 and 255 that a program has resampled or compressed."""
    noise = np.random.default_rng(int(label.sum())).integers(0, 40, label.shape)
    return np.where(label > 0, 255 - noise, noise).astype(np.uint8)


@case("data.classes={background:0,cell:'>127'}", classes={"background": 0, "cell": 1},
      said="nearest")  # fmt: skip
def noise_threshold(root):
    return pairs(root, draw=shaken)


@case("data.classes={background:0,cell:255}", "data.nearest=true",
      classes={"background": 0, "cell": 1}, said="nearest")  # fmt: skip
def noise_nearest(root):
    return pairs(root, draw=shaken)


@refused(">", at="masks")
def noise_as_found(root):
    """Nobody named the classes: a threshold is the way out."""
    pairs(root, draw=shaken)


@refused("128.*nearest", "data.classes={background:0,cell:255}", at="masks/03.png")
def value_of_no_class(root):
    pairs(root, draw=times(255))
    put(root / "masks" / "03.png", scene(2)[1] * np.uint8(128))


@refused(">", "data.classes={background:0,polyp:rest}", at="masks")
def jpeg_called_png(root):
    """The masks were JPEG, and somebody renamed them."""
    pairs(root, mask="masks/{}.jpg", draw=times(255))
    each(root, "masks/*", lambda path: path.rename(path.with_suffix(".png")))


@case("data.classes={background:0,cell:rest}", classes={"background": 0, "cell": (1, 2)})
def objects_uint32(root):
    """A number for each object, some beyond 16 bits."""
    draw = lambda label: label.astype(np.uint32) * 65536  # noqa: E731
    return pairs(root, mask="masks/{}.tif", classes=3, draw=draw)


@case(classes={"0": 0, "1000": 1, "2000": 2})
def values_16_bit(root):
    return pairs(root, classes=3, draw=lambda label: label.astype(np.uint16) * 1000)


def of_bits(root, bits):
    """Grey masks of few bits: viewers show 85 for 1, but the file holds 1."""
    truth = pairs(root, classes=3)
    for name, (_, label) in truth.items():
        (root / "masks" / f"{name}.png").write_bytes(png_of(label, bits))
    return truth


@case(classes=THREE)
def png_2_bits(root):
    return of_bits(root, 2)


@case(classes=THREE)
def png_4_bits(root):
    return of_bits(root, 4)


@case(classes=THREE)
def bmp(root):
    return pairs(root, "images/{}.bmp", "masks/{}.bmp", classes=3)


@case(classes=FOUND)
def tiff_bool(root):
    """Masks of one bit, as skimage and QuPath write them."""
    return pairs(root, mask="masks/{}.tif", draw=lambda label: label.astype(bool))


@case(classes=THREE)
def values_float_whole(root):
    """Whole numbers as float32."""
    return pairs(root, mask="masks/{}.tif", classes=3, draw=lambda label: label.astype(np.float32))


@refused("(?i)nan", at="masks/02.tif")
def mask_nan(root):
    pairs(root, mask="masks/{}.tif", draw=lambda label: label.astype(np.float32))
    spoilt = scene(1)[1].astype(np.float32)
    spoilt[:4] = np.nan
    put(root / "masks" / "02.tif", spoilt)


# --- Arrays of numpy -----------------------------------------------------------------------------


@case()
def npy(root):
    """Images [H, W, 3], masks of True and False."""
    return pairs(root, "images/{}.npy", "masks/{}.npy", draw=lambda label: label > 0)


@case(classes=THREE)
def npy_channels_first(root):
    return pairs(root, "images/{}.npy", "masks/{}.npy", look=lambda x: x, classes=3)


@case(classes=THREE)
def npy_one_channel(root):
    """Images [H, W, 1] and masks [H, W, 1] of float32."""
    last = lambda x: x[..., None].astype(np.float32)  # noqa: E731
    truth = pairs(root, "images/{}.npy", "masks/{}.npy", look=lambda x: last(x[0]), classes=3,
                  draw=last)  # fmt: skip
    return {name: (image[:1], label) for name, (image, label) in truth.items()}


@refused("(?i)one.?hot|channels|axes", at="masks/", either=True, classes=THREE)
def npy_one_hot(root):
    """Masks [H, W, 3], a plane for each class."""
    draw = lambda label: np.eye(3, dtype=np.uint8)[label]  # noqa: E731
    return pairs(root, "images/{}.npy", "masks/{}.npy", classes=3, draw=draw)


@refused("(?i)pickle|object", at="images/01.npy")
def npy_pickled(root):
    """Reading it could run anything."""
    pairs(root, "images/{}.npy", "masks/{}.npy")
    np.save(root / "images" / "01.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)


def npz_files(root, image="image", label="label"):
    truth = {}
    for i, name in enumerate(NAMES):
        truth[name] = picture, mask = scene(i, SIZE, 3)
        np.savez_compressed(root / f"{name}.npz", **{image: hwc(picture), label: mask})
    return truth


@case("data.images=.", "data.masks=.", classes=THREE)
def npz(root):
    """Image and label in one file."""
    return npz_files(root)


@refused("arr_0", "data.images=.", "data.masks=.", at=".npz")
def npz_other_names(root):
    npz_files(root, "arr_0", "arr_1")
