"""Folders laid out as public data sets are when they are downloaded and unpacked."""

from __future__ import annotations

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
    hwc,
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
        put(root / "JPEGImages" / f"{name}.jpg", hwc(image))
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


# --- More of them --------------------------------------------------------------------------------


@case("data.masks=annotations", classes=THREE, far=JPEG)
def ade20k(root):
    """images/training, images/validation and the same in annotations."""
    return inside(root, "images/{}/", "annotations/{}/", ("training", "validation"))


@case("data.masks=labels", classes=THREE)
def yolo(root):
    """images/train, val, test and the same in labels."""
    return inside(root, "images/{}/", "labels/{}/", ("train", "val", "test"), ".png")


@refused(
    "(?i)no folder|no images|area|urban", "data.images=images_png", "data.masks=masks_png",
    at="rain", either=True, classes=THREE,
)  # fmt: skip
def loveda(root):
    """Train/Urban/images_png: a folder of the place is between the split and the images."""
    truth = {}
    for k, (split, area) in enumerate((("Train", "Urban"), ("Train", "Rural"), ("Val", "Urban"))):
        here = f"{split}/{area}/"
        truth |= pairs(
            root, here + "images_png/{}.png", here + "masks_png/{}.png", NAMES[:4], classes=3,
            first=10 * k, key=f"{split.lower()}:{area}/{{}}",
        )  # fmt: skip
    return truth


@case(
    "data.images=Training_Input", "data.masks=Training_GroundTruth",
    "data.mask_suffix=_segmentation", "data.classes={background:0,lesion:255}",
    classes={"background": 0, "lesion": 1}, far=JPEG,
)  # fmt: skip
def isic(root):
    """x.jpg and x_segmentation.png, with texts beside them."""
    junk(root / "Training_Input" / "LICENSE.txt")
    junk(root / "Training_Input" / "ATTRIBUTION.txt")
    return pairs(
        root, "Training_Input/{}.jpg", "Training_GroundTruth/{}_segmentation.png",
        [f"ISIC_{name}" for name in NAMES], draw=times(255),
    )  # fmt: skip


@refused("mask_suffix", at="masks", either=True, far=JPEG)
def isic_no_suffix(root):
    """The same in images/ and masks/, and nobody gave the suffix."""
    return pairs(root, "images/{}.jpg", "masks/{}_segmentation.png")


@case(
    "data.masks=1st_manual", "data.image_suffix=_training", "data.mask_suffix=_manual1",
    "data.classes={background:0,vessel:255}", classes={"background": 0, "vessel": 1},
)  # fmt: skip
def drive(root):
    """21_training.tif, 21_manual1.gif, and the field of view in mask/."""
    names = [str(i) for i in range(21, 29)]
    for name in names:
        put(root / "mask" / f"{name}_training_mask.gif", np.full(SIZE, 255, np.uint8))
    return pairs(
        root, "images/{}_training.tif", "1st_manual/{}_manual1.gif", names, draw=times(255)
    )


@case(
    "data.images=.", "data.masks=.", "data.mask_suffix=_1stHO", "data.skip_unpaired=true",
    "data.classes={background:0,vessel:255}", classes={"background": 0, "vessel": 1}, far=JPEG,
)  # fmt: skip
def chase(root):
    """Image_01L.jpg, and two masks of two people beside it; one is used."""
    names = [f"Image_{i:02}{side}" for i in range(4) for side in "LR"]
    for name in names:
        put(root / f"{name}_2ndHO.png", np.zeros(SIZE, np.uint8))
    return pairs(root, "{}.jpg", "{}_1stHO.png", names, draw=times(255))


@refused("ppm", "data.mask_suffix=.ah", at="ppm", either=True)
def stare(root):
    """im0001.ppm and im0001.ah.ppm."""
    return pairs(root, "images/{}.ppm", "masks/{}.ah.ppm", [f"im{i:04}" for i in range(6)])


LAND = np.array([[0, 0, 0], [0, 255, 255], [255, 255, 0]], np.uint8)
LANDS = {"#000000": 0, "#00ffff": 1, "#ffff00": 2}
TOGETHER = ("data.images=.", "data.masks=.")


@case(
    *TOGETHER, "data.image_suffix=_sat", "data.mask_suffix=_mask", classes=LANDS, far=JPEG
)  # fmt: skip
def deepglobe(root):
    """119_sat.jpg and 119_mask.png, in colours; a table of classes beside them."""
    junk(root / "class_dict.csv", b"name,r,g,b\nurban_land,0,255,255\n")
    draw = lambda label: LAND[label]  # noqa: E731
    return pairs(root, "{}_sat.jpg", "{}_mask.png", [*map(str, range(1, 12))], classes=3, draw=draw)


@case(
    "data.images=2_Ortho_RGB", "data.masks=5_Labels", "data.image_suffix=_RGB",
    "data.mask_suffix=_label",
    "data.classes={road:'#ffffff',building:'#0000FF',other:['#ff0000','#00ff00']}",
    classes={"road": 0, "building": 1, "other": (2, 3)},
)  # fmt: skip
def potsdam(root):
    """TIFF in colours, two of which are one class; .tfw beside them."""
    colours = np.array([[255, 255, 255], [0, 0, 255], [255, 0, 0], [0, 255, 0]], np.uint8)

    def four(label):
        return np.where((label == 2) & (np.indices(label.shape)[0] % 2 == 1), 3, label)

    names = [f"top_potsdam_2_{i}" for i in range(9, 15)]
    truth = pairs(root, "2_Ortho_RGB/{}_RGB.tif", "5_Labels/{}_label.tif", names, classes=3,
                  draw=lambda label: colours[four(label)])  # fmt: skip
    each(root, "2_Ortho_RGB/*.tif", lambda path: junk(path.with_suffix(".tfw")))
    return {name: (image, four(label)) for name, (image, label) in truth.items()}


@case(
    "data.images=sat", "data.masks=map", "data.classes={background:0,road:255}",
    classes={"background": 0, "road": 1},
)  # fmt: skip
def massachusetts(root):
    """x.tiff and x.tif, grey masks saved as colours, folders train, valid, test."""
    truth, names = {}, [f"1022{i}_15" for i in range(4)]
    for i, (split, word) in enumerate((("train", "train"), ("valid", "val"), ("test", "test"))):
        truth |= pairs(
            root / split, "sat/{}.tiff", "map/{}.tif", names, first=10 * i, key=f"{word}:{{}}",
            draw=lambda label: np.stack([label * np.uint8(255)] * 3, -1),
        )  # fmt: skip
    return truth


@refused("(?i)annot|no folder|images", at="train", either=True, classes=THREE)
def segnet(root):
    """train/ beside trainannot/, val/ beside valannot/."""
    truth = {}
    for i, split in enumerate(("train", "val", "test")):
        truth |= pairs(root, f"{split}/{{}}.png", f"{split}annot/{{}}.png", NAMES[:4], classes=3,
                       first=10 * i, key=f"{split}:{{}}")  # fmt: skip
    return truth


@case(classes={"0": 0, "255": 1}, said="(?i)alpha")
def dsb2018(root):
    """A folder for each image, with a mask for each nucleus; images have an alpha."""
    truth = {}
    for i in range(8):
        image, label = scene(i)
        name = f"{i}feae0a9bb19d5e"
        rgba = np.dstack([hwc(image), np.full(SIZE, 255, np.uint8)])
        put(root / name / "images" / f"{name}.png", rgba)
        for k, part in enumerate((np.s_[::2], np.s_[1::2])):
            nucleus = np.zeros(SIZE, np.uint8)
            nucleus[part] = 255 * label[part]
            put(root / name / "masks" / f"{k}c1d{i}.png", nucleus)
        truth[name] = image, label
    return truth


@case(classes={"0": 0, "255": 1})
def lgg(root):
    """TCGA_CS_0/TCGA_CS_0_1.tif and ..._1_mask.tif: several slices of each patient."""
    junk(root / "data.csv")
    names = [f"TCGA_CS_{p}/TCGA_CS_{p}_{i}" for p in range(3) for i in (1, 2, 10)]
    return pairs(root, "{}.tif", "{}_mask.tif", names, draw=times(255))


@case(
    "data.images=JPEGImages", "data.masks=SegmentationClass",
    classes={"#000000": 0, "#ff0000": 1, "#0000ff": 2}, far=JPEG,
)  # fmt: skip
def cvat(root):
    """Masks in colours, default.txt for a split, labelmap.txt, and masks of objects."""
    junk(root / "labelmap.txt", b"# label:color_rgb:parts:actions\ncell:255,0,0::\n")
    lines = "\n".join(NAMES).encode()
    junk(root / "ImageSets" / "Segmentation" / "default.txt", lines)
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)
    draw = lambda label: colours[label]  # noqa: E731
    pairs(root, "JPEGImages/{}.jpg", "SegmentationObject/{}.png", draw=times(37))
    return pairs(root, "JPEGImages/{}.jpg", "SegmentationClass/{}.png", classes=3, draw=draw)


@case(
    "data.images=img", "data.masks=masks_machine", "data.mask_suffix=.jpg",
    classes=THREE, far=JPEG,
)  # fmt: skip
def supervisely(root):
    """img/x.jpg and masks_machine/x.jpg.png, with ann/x.jpg.json."""
    write_json(root / "meta.json", {"classes": []})
    write_json(root / "ann" / "01.jpg.json", {})
    return pairs(root, "img/{}.jpg", "masks_machine/{}.jpg.png", classes=3)


@case(
    "data.images=JPEGImages", "data.masks=SegmentationClass", classes=FOUND, far=JPEG,
    said="(?i)not used|left out|unused",
)  # fmt: skip
def voc_with_test(root):
    """train.txt, val.txt and test.txt; trainval.txt is no split; lines have blanks at the end."""
    truth = {}
    for i, split in enumerate(("train", "val", "test")):
        names = [f"{split}_{k}" for k in range(3)]
        truth |= pairs(root, "JPEGImages/{}.jpg", "SegmentationClass/{}.png", names, first=10 * i,
                       key=f"{split}:{{}}")  # fmt: skip
        lines = "".join(f"{name} \r\n" for name in names)
        junk(root / "ImageSets" / "Segmentation" / f"{split}.txt", lines.encode())
    junk(root / "ImageSets" / "Segmentation" / "trainval.txt", b"train_0\nval_0\n")
    put(root / "JPEGImages" / "extra.jpg", hwc(scene(60)[0]))
    return truth


@refused("2007_000099", "data.images=JPEGImages", "data.masks=SegmentationClass", at="val.txt")
def voc_list_missing(root):
    """The list of validation names an image that is not there."""
    names = [f"2007_{i:06}" for i in range(6)]
    pairs(root, "JPEGImages/{}.jpg", "SegmentationClass/{}.png", names)
    for split, listed in (("train", names), ("val", ["2007_000099"])):
        lines = "\n".join(listed)
        junk(root / "ImageSets" / "Segmentation" / f"{split}.txt", lines.encode())
