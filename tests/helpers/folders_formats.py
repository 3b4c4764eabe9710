"""Folders whose files are of an odd format or size."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from folders import (
    FOUND,
    JPEG,
    NAMES,
    REPLACE,
    SIZE,
    SMALL,
    THREE,
    case,
    each,
    grey,
    hwc,
    junk,
    pairs,
    put,
    refused,
    same,
    scene,
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


def turned(orientation, size):
    def build(root):
        return exif(root, orientation, size)

    build.__name__ = f"exif_{orientation}"
    case(far=JPEG)(build)


for orientation in (2, 4):
    turned(orientation, SIZE)
for orientation in (5, 7, 8):
    turned(orientation, (48, 36))


@case(far=JPEG)
def exif_masks_too(root):
    """Masks carry the same tag, left over from their images, and are drawn upright."""
    return exif(root, 6, (48, 36), masks_too=True)


@case()
def exif_png(root):
    truth = pairs(root)
    tag = Image.Exif()
    tag[0x0112] = 3
    for name, (image, _) in truth.items():
        stored = np.ascontiguousarray(hwc(image)[::-1, ::-1])
        put(root / "images" / f"{name}.png", stored, exif=tag)
    return truth


@refused("(?i)orientation", at=".tif", either=True)
def exif_tiff(root):
    """TIFF has the tag, too: applied, or refused."""
    truth = pairs(root)
    for name, (image, _) in truth.items():
        (root / "images" / f"{name}.png").unlink()
        stored = np.ascontiguousarray(hwc(image)[::-1, ::-1])
        put(root / "images" / f"{name}.tif", stored, extratags=[(274, "H", 1, 3, True)])
    return truth


@case(far=JPEG)
def mpo(root):
    """Some phones put a second frame into a JPEG."""
    truth = pairs(root, "images/{}.jpg")
    for path in (root / "images").iterdir():
        first, second = Image.open(path), Image.new("RGB", SIZE[::-1])
        first.load()
        first.save(path, format="MPO", save_all=True, append_images=[second], quality=95,
                   subsampling=0)  # fmt: skip
    return truth


@refused("(?i)heic", at=".heic")
def heic(root):
    """Photos of an iPhone beside others: the line says to convert them."""
    pairs(root)
    for name in NAMES[:3]:
        (root / "images" / f"{name}.png").unlink()
        junk(root / "images" / f"{name}.heic", bytes(4) + b"ftypheic")


@refused("(?i)frames|pages|channel", at="03.gif", either=True)
def gif_of_frames(root):
    """One image is a film."""
    truth = pairs(root, "images/{}.png", look=lambda image: image[0])
    film = [Image.fromarray(scene(2)[0][0]), Image.fromarray(scene(9)[0][0])]
    film[0].save(root / "images" / "03.gif", save_all=True, append_images=film[1:])
    (root / "images" / "03.png").unlink()
    return {name: (image[:1], label) for name, (image, label) in truth.items()}


@case(said="(?i)alpha")
def png_64bit(root):
    """Three colours and an alpha, of 16 bits each."""
    truth = pairs(root)
    for name, (image, _) in truth.items():
        deep = np.dstack([hwc(image).astype(np.uint16) + 300, np.full(SIZE, 65535, np.uint16)])
        (root / "images" / f"{name}.png").write_bytes(png_of(deep, 16))
    return {name: (image.astype(np.uint16) + 300, label) for name, (image, label) in truth.items()}


@case()
def palette_images(root):
    """GIF and PNG images of a palette are colours."""
    truth = pairs(root, look=lambda image: hwc(image) // 64 * 64)
    for path in (root / "images").iterdir():
        Image.open(path).quantize(256, dither=Image.Dither.NONE).save(path)
        colours = np.asarray(Image.open(path).convert("RGB"))
        truth[path.stem] = np.moveaxis(colours, 2, 0), truth[path.stem][1]
    return truth


def png_of(array, bits):
    """The bytes of a PNG, [H, W], [H, W, 3] or [H, W, 4], of any depth that PNG knows."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    def line(row):
        if bits == 16:
            return row.astype(">u2").tobytes()
        every = np.unpackbits(row.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]
        return np.packbits(every.ravel()).tobytes()

    h, w = array.shape[:2]
    kind = {1: 0, 3: 2, 4: 6}[1 if array.ndim == 2 else array.shape[2]]
    head = struct.pack(">IIBBBBB", w, h, bits, kind, 0, 0, 0)
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


def indexed(path, index, colours, **options):
    """A mask of a palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(index, "P")
    image.putpalette(colours)
    image.save(path, **options)


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


@case(classes=FOUND)
def tiff_time(root):
    """ImageJ: a film of three pictures [T, Y, X] and one mask for it."""
    truth = pairs(root)
    for name, (image, _) in truth.items():
        (root / "images" / f"{name}.png").unlink()
        put(root / "images" / f"{name}.tif", image, imagej=True, metadata={"axes": "TYX"})
    return truth


@case(classes=FOUND)
def tiff_imagej_channels(root):
    """ImageJ: two channels [C, Y, X]."""
    truth = pairs(root)
    for name, (image, _) in truth.items():
        (root / "images" / f"{name}.png").unlink()
        file = root / "images" / f"{name}.tif"
        put(file, image[:2], imagej=True, metadata={"axes": "CYX"})
    return {name: (image[:2], label) for name, (image, label) in truth.items()}


@case(classes=THREE)
def tiff_volume(root):
    """Pages of the image and of the mask: a volume."""
    truth = pairs(root, "images/{}.tif", "masks/{}.tif", size=SMALL, classes=3,
                  look=lambda image: image[0])  # fmt: skip
    return grey(truth)


@case()
def tiff_float(root):
    """Reflectance from 0 to 1, four bands in front, planar, compressed."""
    truth = {}
    for i, name in enumerate(NAMES):
        image, label = scene(i)
        bands = (np.concatenate([image, image[:1]]) / 255).astype(np.float32)
        put(root / "images" / f"{name}.tif", bands, planarconfig="separate",
            compression="zlib")  # fmt: skip
        put(root / "masks" / f"{name}.png", label)
        truth[name] = bands, label
    return truth


@refused(f"(?=.*{6 * SIZE[1]})(?=.*NaN).*{REPLACE}", at="04.tif")
def geotiff_nan(root):
    """NaN where there is no data."""
    pairs(root, "images/{}.tif", look=lambda image: image[0].astype(np.float32))
    heights = scene(3)[0][0].astype(np.float32)
    heights[:6] = np.nan
    put(root / "images" / "04.tif", heights, extratags=[(42113, "s", 0, "nan", True)])


@refused("(?i)jp2", at=".jp2", either=True)
def jpeg_2000(root):
    """Sentinel-2 as downloaded: read, or the line says to convert."""
    truth = pairs(root)
    Image.open(root / "images" / "01.png").save(root / "images" / "01.jp2", irreversible=False)
    (root / "images" / "01.png").unlink()
    return truth


# --- Sizes ---------------------------------------------------------------------------------------


@refused("20 x 24.*40 x 48", at=".png")
def mask_half(root):
    """Masks of half the size of their images."""
    pairs(root, draw=lambda label: label[::2, ::2])


@refused("patch_size", "data.patch_size=64", at="images/", either=True)
def tiny(root):
    """Images smaller than the patch: padded, or refused."""
    return pairs(root)


@refused("tiles", at=".png", slow=True)
def bomb(root):
    """More pixels than Pillow reads without a question."""
    for folder in ("images", "masks"):
        (root / folder).mkdir()
        for i in range(4):
            image = Image.new("L", (14000, 14000))
            image.paste(1, (100, 100, 4000, 9000))
            image.save(root / folder / f"{i}.png", compress_level=1)


@refused("(?i)channel.*(convert|save)", at=".png")
def channels_differ(root):
    """Grey and colour are mixed: the line says how to make them alike."""
    pairs(root)
    for i in (1, 4):
        put(root / "images" / f"{NAMES[i]}.png", scene(i)[0][0])


@case()
def sizes_differ(root):
    """Portrait and landscape."""
    return pairs(root, names=NAMES[:4]) | pairs(root, names=NAMES[4:], size=(48, 40), first=4)


@refused("48 x 40.*40 x 48", at="02.png")
def mask_turned(root):
    pairs(root)
    put(root / "masks" / "02.png", np.ascontiguousarray(scene(1)[1].T))


@case("data.normalize=zscore", far=1e-5)
def constant_channel(root):
    """One channel is the same everywhere: it has no deviation to divide by."""

    def flat(image):
        return np.stack([image[0], np.full_like(image[1], 9), image[2]])

    def scored(channel):
        return (channel - channel.mean()) / (channel.std() or 1)

    truth = pairs(root, look=lambda image: hwc(flat(image)))
    return {name: (np.stack([*map(scored, flat(image))]), y) for name, (image, y) in truth.items()}
