"""Folders in which something lies that is not read: one line counts it."""

from __future__ import annotations

import numpy as np
from folders import FOUND, NAMES, SMALL, case, hwc, pairs, put, scene, write_json
from folders_lists import write_lists
from folders_nnunet import CASES, ORGANS, decathlon, nnunet
from folders_values import of_folders

DECATHLON = {"background": 0, "edema": 1, "tumor": 2}


@case(said="not used: 8 files")
def left_folder_of_split(root):
    """train/depth/ and val/depth/ lie beside the images."""
    truth = {}
    for i, split in enumerate(("train", "val")):
        truth |= pairs(root / split, names=NAMES[:4], first=10 * i, key=f"{split}:{{}}")
        for k, name in enumerate(NAMES[:4]):
            put(root / split / "depth" / f"{name}.png", scene(k)[0][0])
    return truth


@case(said="not used: 1 file ")
def left_in_root(root):
    put(root / "extra.png", hwc(scene(50)[0]))
    return pairs(root)


@case(said="not used: 3 files")
def left_in_folder(root):
    """A folder that is none of images or masks, and one in it."""
    put(root / "previews" / "01.png", hwc(scene(50)[0]))
    put(root / "previews" / "old" / "01.png", hwc(scene(51)[0]))
    (root / "LICENSE").write_text("free")
    return pairs(root)


@case(said="not used: 4 files")
def left_by_lists(root):
    """Two images, with their masks, that no list names."""
    truth = pairs(root)
    write_lists(root, train=NAMES[:4], val=NAMES[4:6])
    return {f"{'train' if name in NAMES[:4] else 'val'}:{name}": truth[name] for name in NAMES[:6]}


@case(classes={"nucleus": 1, "border": 2}, overlap=True, said="not used: 2 files")
def left_beside_class_folders(root):
    """A loose file beside the folders of the classes, and one in the root."""
    put(root / "overview.png", scene(0)[1])
    put(root / "masks" / "overview.png", scene(0)[1])
    return of_folders(root, "nucleus", "border")


@case(classes=ORGANS, said="not used: 4 files")
def left_by_splits_final(root):
    """Two cases are in no part of the first fold."""
    truth = nnunet(root)
    write_json(root / "splits_final.json", [{"train": CASES[:3], "val": CASES[3:4]}])
    return {f"{'train' if i < 3 else 'val'}:{key}": truth[key] for i, key in enumerate(CASES[:4])}


@case(classes=ORGANS, said="not used: 2 files")
def left_images_ts(root):
    """Cases to predict, of nnU-Net: two channels are two files."""
    truth = nnunet(root, channels=2)
    for c in range(2):
        put(root / "imagesTs" / f"test_0_{c:04}.nii.gz", scene(90, SMALL)[0][c].astype(np.int16))
    return truth


@case(classes=ORGANS, said="not used: 2 files")
def left_other_ending(root):
    """A case is .nii, the file_ending is .nii.gz."""
    image, label = scene(91, SMALL, 3)
    put(root / "imagesTr" / "case_900_0000.nii", image[0].astype(np.int16))
    put(root / "labelsTr" / "case_900.nii", label)
    return nnunet(root)


@case(classes=DECATHLON, said="not used: 4 files")
def left_by_decathlon(root):
    """The list `training` names four of six."""
    return decathlon(root, "spleen_{}", 1, slice(4))


@case(classes=DECATHLON, said="not used: 1 file ")
def left_decathlon_test(root):
    put(root / "imagesTs" / "spleen_90.nii.gz", scene(90, SMALL)[0][0].astype(np.int16))
    return decathlon(root, "spleen_{}", 1)


@case(classes=FOUND, said="not used: 5 files")
def left_of_all_kinds(root):
    """A line for all of them."""
    truth = pairs(root)
    (root / "images" / "notes.csv").write_text("a,b")
    (root / "masks" / "labels.xml").write_text("<a/>")
    (root / "README.md").write_text("cells")
    put(root / "depth" / "01.png", scene(50)[0][0])
    put(root / "overview.png", scene(50)[0][0])
    return truth
