"""Folders whose lists, names or splits are odd."""

from __future__ import annotations

import os

from folders import FOUND, NAMES, THREE, case, junk, pairs, refused, volumes

# --- Lists ---------------------------------------------------------------------------------------


def in_folders(root, names=NAMES[:4]):
    """images/a/01.png and images/b/01.png."""
    truth = {}
    for i, part in enumerate("ab"):
        truth |= pairs(root, f"images/{part}/{{}}.png", f"masks/{part}/{{}}.png", names,
                       first=10 * i, key=f"{part}/{{}}")  # fmt: skip
    return truth


def write_lists(root, encoding="utf-8", **lists):
    for name, lines in lists.items():
        (root / f"{name}.txt").write_text("".join(f"{x}\n" for x in lines), encoding=encoding)


LISTED = {"train": ("a/01", "a/02", "b/03", "b/04"), "val": ("b/01", "b/02"), "test": ("a/03",)}


def lists_of_folders(root, line):
    truth = in_folders(root)
    lists = {k: [line.format(name) for name in names] for k, names in LISTED.items()}
    write_lists(root, **lists)
    return {f"{k}:{name}": truth[name] for k, names in LISTED.items() for name in names}


@case(said="not used: 2 files")
def lists_folders(root):
    """A line names an image with its folder; others of the same name are not meant."""
    return lists_of_folders(root, "{}.png")


@case(said="not used: 2 files")
def lists_folders_no_ending(root):
    return lists_of_folders(root, "{}")


@case(said="not used: 2 files")
def lists_folders_whole(root):
    """From the folder of the data set on."""
    return lists_of_folders(root, "images/{}.png")


@refused("01", at="train.txt")
def lists_ambiguous(root):
    """The name could be that of two images."""
    in_folders(root)
    write_lists(root, train=["01"], val=["b/02"])


@refused("(?i)twice|two|again", at="train.txt")
def lists_twice(root):
    pairs(root)
    write_lists(root, train=["01", "02", "02"], val=["03"])


@refused("03", at="val.txt")
def lists_in_two(root):
    """An image trains and validates."""
    pairs(root)
    write_lists(root, train=["01", "02", "03"], val=["03", "04"])


@refused("04", at="test.txt")
def lists_in_val_and_test(root):
    pairs(root)
    write_lists(root, train=["01", "02"], val=["03", "04"], test=["04", "05"])


@refused("(?i)utf-?8|utf-?16|encod|text", at="train.txt")
def lists_utf_16(root):
    """Saved by a program of Windows."""
    pairs(root)
    write_lists(root, "utf-16", train=["01", "02"], val=["03"])


@refused("(?i)empty|no name|nothing|names no", at="train.txt")
def lists_empty_train(root):
    pairs(root)
    write_lists(root, train=[""], val=["03"])


@refused("(?i)empty|no name|nothing|names no", at="val.txt")
def lists_empty_val(root):
    pairs(root)
    write_lists(root, train=["01", "02"], val=[])


# --- Masks beside images -------------------------------------------------------------------------


@refused("(?i)without|no image", at="1_mask.png")
def beside_longer_name(root):
    """1.png is lost; 10.png is another image."""
    pairs(root, "{}.png", "{}_mask.png", ["1", "2", "3", "4", "5", "10"])
    (root / "1.png").unlink()
    (root / "10_mask.png").unlink()


@refused("(?i)without|no image", at="1_mask.png")
def beside_longer_name_has_mask(root):
    pairs(root, "{}.png", "{}_mask.png", ["1", "2", "3", "4", "5", "10"])
    (root / "1.png").unlink()


@refused(r"data\.mask_suffix", at="01_")
def beside_two_masks(root):
    """Two people drew, or a program proposed."""
    pairs(root, "{}.png", "{}_mask.png")
    pairs(root, "{}.png", "{}_seg.png", draw=lambda label: 1 - label)


@case("data.mask_suffix=_seg", "data.images=.", "data.masks=.", said="not used: 8 files")
def beside_two_masks_chosen(root):
    pairs(root, "{}.png", "{}_mask.png", draw=lambda label: 1 - label)
    return pairs(root, "{}.png", "{}_seg.png")


@case(classes=THREE)
def beside_common_ending(root):
    """case1_ct is not case10_ct."""
    names = [f"case{i}" for i in (1, 2, 3, 10, 11, 20)]
    return volumes(root, "{}_ct.nii.gz", "{}_seg.nii.gz", names)


@case(classes=THREE)
def beside_common_ending_folders(root):
    """The same in a folder for each patient."""
    names = [f"p/case{i}" for i in (1, 2, 10)] + [f"q/case{i}" for i in (3, 11, 20)]
    return volumes(root, "{}_ct.nii.gz", "{}_seg.nii.gz", names)


# --- Splits whose names differ -------------------------------------------------------------------


def of_parts(root, **parts):
    """A folder of images and one of masks for each split, whose names differ."""
    truth = {}
    for i, (split, (images, masks)) in enumerate(parts.items()):
        truth |= pairs(root, f"images/{images}/{{}}.png", f"masks/{masks}/{{}}.png",
                       NAMES[4 * i : 4 * i + 4], first=10 * i, key=f"{split}:{{}}")  # fmt: skip
    return truth


@case(classes=FOUND)
def split_words_case(root):
    """images/Train/ beside masks/train/."""
    return of_parts(root, train=("Train", "train"), val=("Val", "val"))


@case(classes=FOUND)
def split_words_synonyms(root):
    """images/valid/ beside masks/val/, images/training/ beside masks/train/."""
    return of_parts(root, train=("training", "train"), val=("valid", "val"))


# --- Names of files ------------------------------------------------------------------------------


@refused("(?i)link", at="latest", either=True)
def broken_link_no_ending(root):
    truth = pairs(root)
    (root / "images" / "sub").mkdir()
    (root / "images" / "sub" / "latest").symlink_to(root / "nowhere")
    return truth


@refused("(?i)name", at="images", either=True)
def name_latin_1(root):
    """From a disk of an old Windows: the name of a file is no UTF-8."""
    truth = pairs(root)
    name = os.fsdecode(b"\xe4")
    for part in ("images", "masks"):
        (root / part / "01.png").rename(root / part / f"{name}.png")
    truth[name] = truth.pop("01")
    return truth


@refused("patch_size", "data.patch_size=4.0")
def patch_of_a_fraction(root):
    pairs(root)


@case(said=r"dataset\.json")
def json_of_others(root):
    """A dataset.json of another program, without labels, beside images/ and masks/."""
    junk(root / "dataset.json", b'{"name": "my data", "images": []}')
    return pairs(root)


@case(said=r"dataset\.json")
def json_list_of_others(root):
    junk(root / "dataset.json", b"[1, 2]")
    return pairs(root)
