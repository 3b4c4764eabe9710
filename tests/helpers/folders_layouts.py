"""Folders as people and programs leave them: classes, splits, names, stray files."""

from __future__ import annotations

import unicodedata

import numpy as np
from folders import (
    FOUND,
    NAMES,
    SIZE,
    THREE,
    case,
    hwc,
    junk,
    pairs,
    put,
    refused,
    scene,
    times,
    write_json,
)

# --- A folder for each class ---------------------------------------------------------------------

CELLS = {"border": 2, "nucleus": 1}


def of_class(value):
    return lambda label: np.uint8(255) * (label == value)


@case(classes=CELLS, overlap=True, said="class border")
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


@case(classes=CELLS, overlap=True)
def class_folders_split(root):
    """val/ has no folder of one class, and a file less of the other."""
    truth = {}
    for i, split in enumerate(("train", "val")):
        for value, name in ((1, "nucleus"), (2, "border")):
            found = pairs(root, f"{split}/images/{{}}.png", f"{split}/masks/{name}/{{}}.png",
                          NAMES[:4], classes=3, draw=of_class(value), first=10 * i,
                          key=f"{split}:{{}}")  # fmt: skip
        truth |= found
    for path in (root / "val" / "masks" / "border").iterdir():
        path.unlink()
    (root / "val" / "masks" / "border").rmdir()
    (root / "val" / "masks" / "nucleus" / "02.png").unlink()
    for key, (image, label) in truth.items():
        if key.startswith("val"):
            truth[key] = image, np.where((label == 2) | (key == "val:02"), 0, label)
    return truth


@case(classes={"cell": (1, 3), "nucleus": (2, 3)}, overlap=True)
def class_folders_overlap(root):
    """A nucleus lies in its cell: pixels of both have the true value 3."""
    truth = {}
    for i, name in enumerate(NAMES):
        image, cell = scene(i)
        nucleus = np.zeros_like(cell)
        nucleus[np.nonzero(cell)[0][0] + 2 :] = cell[np.nonzero(cell)[0][0] + 2 :]
        nucleus[0, 0] = 1
        put(root / "images" / f"{name}.png", hwc(image))
        put(root / "masks" / "cell" / f"{name}.png", cell)
        put(root / "masks" / "nucleus" / f"{name}.png", nucleus * np.uint8(255))
        truth[name] = image, cell + 2 * nucleus
    return truth


@refused("07", at="masks/border")
def class_file_without_image(root):
    pairs(root, mask="masks/nucleus/{}.png")
    pairs(root, mask="masks/border/{}.png")
    (root / "images" / "07.png").unlink()


# --- Splits and sub-folders ----------------------------------------------------------------------


@case(classes=FOUND)
def splits_upper_case(root):
    """Train/, Validation/ and Testing/."""
    truth = {}
    for i, (split, word) in enumerate(
        (("Train", "train"), ("Validation", "val"), ("Testing", "test"))
    ):
        truth |= pairs(root / split, names=NAMES[:3], first=10 * i, key=f"{word}:{{}}")
    return truth


@refused("val", at="", either=True)
def splits_no_val(root):
    """train/ and test/ alone: some of train/ validate, or a line says what to do."""
    truth = pairs(root / "test", names=("late1", "late2"), first=20, key="test:{}")
    return truth | pairs(root / "train")


@refused("(?i)both called 01 in val", at="valid")
def splits_val_twice(root):
    """val/ and valid/ are both there."""
    for split in ("train", "val", "valid"):
        pairs(root / split, names=NAMES[:3])


@case()
def splits_train_txt(root):
    """train.txt and val.txt beside images/ and masks/ name the images, with or without endings."""
    junk(root / "train.txt", "\n".join(NAMES[:5]).encode())
    junk(root / "val.txt", "\n".join(f"{name}.png" for name in NAMES[5:]).encode())
    truth = pairs(root)
    return {f"{'train' if i < 5 else 'val'}:{name}": truth[name] for i, name in enumerate(NAMES)}


@refused("99", at="val.txt")
def splits_train_txt_missing(root):
    pairs(root)
    junk(root / "train.txt", "\n".join(NAMES).encode())
    junk(root / "val.txt", b"99\n")


@case()
def sub_folders(root):
    """Folders of patients in both folders are no classes; their files have the same names."""
    truth = {}
    for k, patient in enumerate(("ann", "bob", "eve")):
        truth |= pairs(root, f"images/{patient}/{{}}.png", f"masks/{patient}/{{}}.png", NAMES[:3],
                       first=10 * k, key=f"{patient}/{{}}")  # fmt: skip
    return truth


@case()
def one_folder_too_deep(root):
    """The archive was unpacked into a folder of its own: root/dataset/images."""
    return pairs(root / "dataset")


@case(classes=THREE)
def beside(root):
    """x.png and x_mask.png in one folder, without an option; 1 begins the name of 10."""
    return pairs(root, "{}.png", "{}_mask.png", [*map(str, range(1, 12))], classes=3)


@case(classes=THREE)
def beside_gt(root):
    """x.tif and x.gt.png."""
    return pairs(root, "{}.tif", "{}.gt.png", classes=3)


@case(classes=THREE)
def beside_split(root):
    """x-seg.png beside x.png in train/ and val/."""
    truth = {}
    for i, split in enumerate(("train", "val")):
        truth |= pairs(root / split, "{}.png", "{}-seg.png", NAMES[:4], classes=3, first=10 * i,
                       key=f"{split}:{{}}")  # fmt: skip
    return truth


@refused("03", at="03.png")
def beside_mask_missing(root):
    pairs(root, "{}.png", "{}_mask.png")
    (root / "03_mask.png").unlink()


@case("data.skip_unpaired=true", said="not used: 2 files")
def skip_unpaired(root):
    """An image without a mask and a mask without an image are left out on demand."""
    truth = pairs(root)
    (root / "images" / "02.png").unlink()
    (root / "masks" / "05.png").unlink()
    return {name: pair for name, pair in truth.items() if name not in ("02", "05")}


@refused("(?i)skip_unpaired", at="05.png")
def unpaired(root):
    """The same without the option: the line names it."""
    pairs(root)
    (root / "masks" / "05.png").unlink()


@refused("images", at="images")
def masks_only(root):
    for name, (_, label) in zip(NAMES, map(scene, range(8)), strict=True):
        put(root / "masks" / f"{name}.png", label)


@refused(r"(?i)\b(1|one) image\b.*(cut|tiles|more|another)", at="")
def one_image(root):
    pairs(root, names=NAMES[:1])


@refused(r"(?i)\b(2|two) images.*(test_share=0|cut|tiles|more)", at="")
def two_images(root):
    pairs(root, names=NAMES[:2])


@case("data.test_share=0")
def two_images_no_test(root):
    return pairs(root, names=NAMES[:2])


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
        put(root / "images" / f"{name}.png", hwc(image))
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


@refused("without", at="masks")
def label_studio(root):
    """No name in common: task-1-annotation-1-by-1-tag-Cell-0.png."""
    for i in range(8):
        image, label = scene(i)
        put(root / "images" / f"0a1b2c3d-cell_{i}.png", hwc(image))
        put(root / "masks" / f"task-{i}-annotation-{i}-by-1-tag-Cell-0.png", label)


@refused("mask", at="masks")
def labelme(root):
    """x.jpg beside polygons in x.json, and no masks."""
    for i in range(6):
        put(root / "images" / f"{i}.jpg", hwc(scene(i)[0]))
        write_json(root / "images" / f"{i}.json", {"shapes": [], "imagePath": f"{i}.jpg"})


@case()
def endings_upper_case(root):
    """01.PNG and 01.TIF."""
    return pairs(root, "images/{}.PNG", "masks/{}.TIF")


@case()
def names_of_all_kinds(root):
    """Dots, blanks, brackets, an apostrophe; one name is the beginning of another."""
    names = ["a", "a.b", "a.b (1)", "it's 5%", "x[1]", "LIDC.1.3.6.1", "ä ö", "a#1"]
    return pairs(root, names=names)


@refused("(?i)without", at="1.png")
def leading_zeros(root):
    """1.png and 001.png may be one, but nobody can know."""
    pairs(root, names=[str(i) for i in range(1, 9)])
    for i in range(1, 9):
        (root / "masks" / f"{i}.png").rename(root / "masks" / f"{i:03}.png")


@refused("(?i)case|same name|without", at="01", either=True)
def names_differ_in_case(root):
    """IMG_01.png and img_01.png."""
    truth = pairs(root, mask="masks/img_{}.png", image="images/IMG_{}.png", key="IMG_{}")
    return truth


@case()
def empty_folder_inside(root):
    """A forgotten empty folder in images/ and in masks/: no class."""
    truth = pairs(root)
    (root / "images" / "old").mkdir()
    (root / "masks" / "old").mkdir()
    return truth


@refused("old", at="masks", either=True)
def backup_inside(root):
    """masks/old/ holds earlier versions of some masks: left alone, or refused; no class."""
    truth = pairs(root)
    for name in NAMES[:3]:
        put(root / "masks" / "old" / f"{name}.png", np.zeros(SIZE, np.uint8))
    return truth


@case(said="(?i)not used|left out|unused")
def other_files_inside(root):
    """Notes, tables and previews beside the images."""
    truth = pairs(root)
    for name in ("notes.txt", "Readme.md", "table.xlsx", "01.json"):
        junk(root / "images" / name)
        junk(root / name)
    put(root / "preview.png", np.zeros((9, 9), np.uint8))
    return truth


@case()
def hidden_everywhere(root):
    """__MACOSX in images/, a hidden folder in root, ._ files in a split."""
    truth = {}
    for i, split in enumerate(("train", "val")):
        truth |= pairs(root / split, names=NAMES[:3], first=10 * i, key=f"{split}:{{}}")
        for folder in ("images", "masks"):
            junk(root / split / folder / "._01.png")
            junk(root / split / folder / "__MACOSX" / "01.png")
            junk(root / split / folder / ".thumbnails" / "01.png")
    junk(root / ".git" / "config")
    return truth
