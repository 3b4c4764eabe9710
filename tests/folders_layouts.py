"""Folders of images laid out as public data sets, annotation programs and operating systems do."""

from __future__ import annotations

import unicodedata

import numpy as np
from folders import (
    FOUND,
    JPEG,
    NAMES,
    SIZE,
    THREE,
    bordered,
    case,
    each,
    junk,
    pairs,
    put,
    refused,
    scene,
    times,
    write_json,
)
from folders_formats import indexed
from PIL import Image

# --- Public data sets ----------------------------------------------------------------------------


@case("data.images=imgs", "data.mask_suffix=_mask", far=JPEG)
def carvana(root):
    """x.jpg and x_mask.gif."""
    return pairs(root, "imgs/{}.jpg", "masks/{}_mask.gif")


def voc_palette():
    colours = []
    for i in range(256):
        rgb, n = [0, 0, 0], i
        for bit in range(7, -1, -1):
            for k in range(3):
                rgb[k] |= ((n >> k) & 1) << bit
            n >>= 3
        colours += rgb
    return colours


@case(
    "data.images=JPEGImages", "data.masks=SegmentationClass", "data.ignore_index=255",
    classes=THREE, ignored=(255,), far=JPEG,
)  # fmt: skip
def voc(root):
    """As downloaded: more images than masks, the split in ImageSets/Segmentation."""
    truth, lists = {}, {"train": range(6), "val": range(6, 9)}
    for i in range(12):
        image, label = scene(i, SIZE, 3)
        name = f"2007_{i:06}"
        put(root / "JPEGImages" / f"{name}.jpg", image.transpose(1, 2, 0))
        if i < 9:
            indexed(root / "SegmentationClass" / f"{name}.png", bordered(label), voc_palette())
            truth[f"{'train' if i < 6 else 'val'}:{name}"] = image, bordered(label)
    for split, numbers in lists.items():
        lines = "".join(f"2007_{i:06}\n" for i in numbers)
        junk(root / "ImageSets" / "Segmentation" / f"{split}.txt", lines.encode())
    return truth


@case(
    "data.images=leftImg8bit", "data.masks=gtFine", "data.image_suffix=_leftImg8bit",
    "data.mask_suffix=_gtFine_labelIds", classes=THREE,
)  # fmt: skip
def cityscapes(root):
    """Split and city inside of the two folders, and masks of three kinds."""
    truth = {}
    for split, city, first in (("train", "aachen", 0), ("train", "ulm", 4), ("val", "bonn", 8)):
        names = [f"{city}_{i:06}_000019" for i in range(3)]
        image = f"leftImg8bit/{split}/{city}/{{}}_leftImg8bit.png"
        for kind in ("color", "instanceIds", "labelIds"):
            mask = f"gtFine/{split}/{city}/{{}}_gtFine_{kind}.png"
            found = pairs(
                root, image, mask, names, classes=3, first=first, key=f"{split}:{city}/{{}}",
                draw=times(1 + (kind == "color")),
            )  # fmt: skip
        truth |= found
    return truth


@case("data.images=img_dir", "data.masks=ann_dir", classes=THREE, far=JPEG)
def mmseg(root):
    """The split is inside of the two folders."""
    return inside(root, "img_dir/{}/", "ann_dir/{}/", ("train", "val"))


def inside(root, images, masks, splits, ending=".jpg", words=("train", "val", "test")):
    truth = {}
    for i, (split, word) in enumerate(zip(splits, words, strict=False)):
        truth |= pairs(
            root, f"{images.format(split)}{{}}{ending}", f"{masks.format(split)}{{}}.png",
            [f"{split}{k}" for k in range(4)], classes=3, first=10 * i, key=f"{word}:{{}}",
        )  # fmt: skip
    return truth


CAMVID = np.array([[128, 128, 128], [128, 0, 0], [64, 0, 128]], np.uint8)


@case(
    "data.masks=labels", "data.mask_suffix=_L",
    classes={"#808080": 0, "#800000": 1, "#400080": 2},
)  # fmt: skip
def camvid(root):
    """Colours for classes, x.png and x_L.png."""
    return pairs(root, mask="labels/{}_L.png", classes=3, draw=lambda label: CAMVID[label])


@case(
    "data.masks=labels", "data.mask_suffix=_L",
    "data.classes={sky:'#808080',building:'#800000',car:'#400080'}",
    classes={"sky": 0, "building": 1, "car": 2},
)  # fmt: skip
def camvid_named(root):
    return camvid(root)


PET = {"background": 2, "pet": 1, "border": 3}


@case(
    "data.masks=annotations/trimaps", "data.classes={background:2,pet:1,border:3}",
    classes=PET, far=JPEG,
)  # fmt: skip
def oxford_pet(root):
    """Values 1 pet, 2 background, 3 border; hidden files among the masks."""

    def trimap(label):
        found = np.where(label == 1, 1, 2).astype(np.uint8)
        found[bordered(label) == 255] = 3
        return found

    truth = pairs(root, "images/{}.jpg", "annotations/trimaps/{}.png", draw=trimap)
    each(root, "annotations/*/*.png", lambda path: junk(path.with_name(f"._{path.name}")))
    junk(root / "images" / "01.mat")
    return {name: (image, trimap(label)) for name, (image, label) in truth.items()}


def kvasir_files(root):
    """Masks are JPEG, so 1 to 7 and 248 to 254 occur."""
    truth = pairs(root, "images/{}.jpg", "masks/{}.jpg", draw=times(255))
    for path in (root / "masks").iterdir():
        Image.open(path).convert("RGB").save(path, quality=60)
    return truth


@refused(">", "data.classes={background:0,polyp:rest}", at="masks")
def kvasir(root):
    kvasir_files(root)


@case(
    "data.classes={background:0,polyp:'>127'}", classes={"background": 0, "polyp": 1}, far=JPEG,
    said="nearest",
)  # fmt: skip
def kvasir_threshold(root):
    return kvasir_files(root)


@case("data.images=.", "data.masks=.", "data.mask_suffix=_mask", classes=THREE, far=JPEG)
def roboflow(root):
    """train/, valid/, test/; in each x.jpg and x_mask.png, and a list of classes."""
    for split in ("train", "valid", "test"):
        junk(root / split / "_classes.csv", b"Pixel Value, Class\n0, background\n1, a\n2, b\n")
    truth = {}
    for i, (split, word) in enumerate((("train", "train"), ("valid", "val"), ("test", "test"))):
        names = [f"{split}{k}_jpg.rf.0a1b{k}" for k in range(4)]
        truth |= pairs(root, f"{split}/{{}}.jpg", f"{split}/{{}}_mask.png", names, classes=3,
                       first=10 * i, key=f"{word}:{{}}")  # fmt: skip
    return truth


@refused("without", at="masks")
def label_studio(root):
    """No name in common: task-1-annotation-1-by-1-tag-Cell-0.png."""
    for i in range(8):
        image, label = scene(i)
        put(root / "images" / f"0a1b2c3d-cell_{i}.png", image.transpose(1, 2, 0))
        put(root / "masks" / f"task-{i}-annotation-{i}-by-1-tag-Cell-0.png", label)


@refused("mask", at="masks")
def labelme(root):
    """x.jpg beside polygons in x.json, and no masks."""
    for i in range(6):
        put(root / "images" / f"{i}.jpg", scene(i)[0].transpose(1, 2, 0))
        write_json(root / "images" / f"{i}.json", {"shapes": [], "imagePath": f"{i}.jpg"})


# --- A folder for each class ---------------------------------------------------------------------

CELLS = {"border": 2, "nucleus": 1}


def of_class(value):
    return lambda label: np.uint8(255) * (label == value)


@case(classes=CELLS, overlap=True, said="masks/border|border")
def class_file_missing(root):
    """No file where an image has none of the class."""
    truth = pairs(root, mask="masks/nucleus/{}.png", classes=3, draw=of_class(1))
    pairs(root, mask="masks/border/{}.png", classes=3, draw=of_class(2))
    for name in NAMES[::4]:
        (root / "masks" / "border" / f"{name}.png").unlink()
        truth[name] = truth[name][0], np.where(truth[name][1] == 2, 0, truth[name][1])
    return truth


@case("watch=[cce,dice]", classes={"background": 0, "nucleus": 1})
def one_class_folder(root):
    """masks/nucleus/ alone."""
    return pairs(root, mask="masks/nucleus/{}.png", draw=times(255))


# --- Names and files that do not count -----------------------------------------------------------


@case()
def ipynb_checkpoints(root):
    """Jupyter leaves a copy of one mask in masks/.ipynb_checkpoints/."""
    truth = pairs(root)
    put(root / "masks" / ".ipynb_checkpoints" / "01-checkpoint.png", truth["01"][1])
    return truth


@case()
def hidden_files(root):
    truth = pairs(root)
    for folder in ("images", "masks"):
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._01.png"):
            junk(root / folder / name)
    (root / "__MACOSX").mkdir()
    return truth


@case()
def nfd_nfc(root):
    """Umlauts of macOS in images/, of Windows in masks/."""
    truth = {}
    for i in range(8):
        truth[f"Köln{i}"] = image, label = scene(i)
        name = unicodedata.normalize("NFD", f"Köln{i}")
        put(root / "images" / f"{name}.png", image.transpose(1, 2, 0))
        put(root / "masks" / f"Köln{i}.png", label)
    return truth


@case()
def frames(root):
    return pairs(root, names=[f"frame_{i:04}" for i in range(8)])


@refused("01.jpg.*01.png|01.png.*01.jpg", at="01.jpg")
def same_name(root):
    """Two images of one name."""
    pairs(root)
    put(root / "images" / "01.jpg", np.zeros((*SIZE, 3), np.uint8))


@case(classes=FOUND)
def valid_folder(root):
    """Folders named train and valid."""
    return pairs(root / "train", key="train:{}") | pairs(
        root / "valid", names=NAMES[:3], key="val:{}", first=20
    )
