"""Folders of scans as nnU-Net, the Decathlon and challenges give them."""

from __future__ import annotations

import json

import nibabel
import numpy as np
from folders import (
    AFFINE,
    REPLACE,
    SIZE,
    SMALL,
    THREE,
    case,
    each,
    hwc,
    junk,
    put,
    refused,
    reversed_in,
    same,
    scene,
    volumes,
    write_json,
)

ORGANS = {"background": 0, "organ": 1, "tumour": 2}
CASES = tuple(f"case_{i:03}" for i in range(6))


def about(channels=1, labels=None, ending=".nii.gz", **more):
    """dataset.json of nnU-Net v2."""
    return {
        "channel_names": {str(c): ["CT", "T1", "T2", "FLAIR"][c] for c in range(channels)},
        "labels": labels or ORGANS, "numTraining": len(CASES), "file_ending": ending,
    } | more  # fmt: skip


def nnunet(
    root, content=None, channels=1, suffix="_{:04}", ending=".nii.gz", draw=same, size=SMALL,
    label_affine=AFFINE, dtype=np.int16, part="Tr", names=CASES,
):  # fmt: skip
    truth = {}
    for i, name in enumerate(names):
        image, label = scene(i, size, 3)
        used, stored = image[np.arange(channels) % 3].astype(dtype), draw(label)
        for c in range(channels):
            put(root / f"images{part}" / f"{name}{suffix.format(c)}{ending}", used[c])
        put(root / f"labels{part}" / f"{name}{ending}", stored, affine=label_affine)
        truth[name] = used, stored
    write_json(root / "dataset.json", content or about(channels))
    return truth


# --- nnU-Net and the Decathlon -------------------------------------------------------------------


@case(classes=ORGANS)
def nn_rgb_png(root):
    """Natural images: one file of three colours is three channels."""
    truth = {}
    for i, name in enumerate(CASES):
        truth[name] = image, label = scene(i, classes=3)
        put(root / "imagesTr" / f"{name}_0000.png", hwc(image))
        put(root / "labelsTr" / f"{name}.png", label)
    channels = {"0": "R", "1": "G", "2": "B"}
    write_json(root / "dataset.json", about(ending=".png") | {"channel_names": channels})
    return truth


@case(classes=ORGANS)
def nn_label_order(root):
    """The background is last in dataset.json."""
    return nnunet(root, about(labels={"organ": 1, "tumour": 2, "background": 0}))


def top_is_three(label):
    label = label.copy()
    label[:2] = 3
    return label


@case(classes=ORGANS, ignored=(3,))
def nn_ignore(root):
    """Two channels, an ignore label, and imagesTs without labels."""
    for c in range(2):
        put(root / "imagesTs" / f"test_0_{c:04}.nii.gz", scene(90, SMALL)[0][c].astype(np.int16))
    return nnunet(root, about(2, ORGANS | {"ignore": 3}), channels=2, draw=top_is_three)


def half_is_four(label):
    label = label.copy()
    label[(label == 2) & (np.indices(label.shape)[2] % 2 == 0)] = 4
    return label


BRATS = {"background": 0, "ncr": 1, "ed": 2, "et": 4}


@case(classes=BRATS)
def brats_0124(root):
    """The values of BraTS before 2023."""
    return nnunet(root, about(4, BRATS), channels=4, draw=half_is_four)


@case(classes=ORGANS)
def nn_float_noise(root):
    """Labels that were resampled: 0.99997."""
    draw = lambda x: np.where(x == 1, 0.99997, x).astype(np.float32)  # noqa: E731
    return {k: (x, y.round()) for k, (x, y) in nnunet(root, draw=draw).items()}


@refused(r"1\.37.*>", at="labelsTr/case_")
def nn_float_half(root):
    """Labels that were resampled, and are between two classes."""
    nnunet(root, draw=lambda x: np.where(x == 1, 1.37, x).astype(np.float32))


@refused("255", at="labelsTr/case_")
def nn_unexpected(root):
    """Masks of 0 and 255 where dataset.json says 0 and 1."""
    nnunet(root, about(labels={"background": 0, "organ": 1}),
           draw=lambda x: np.uint8(255) * (x == 1))  # fmt: skip


@refused(f"(?=.*{SMALL[1] * SMALL[2]})(?=.*NaN).*{REPLACE}", at="case_004_0000.nii.gz")
def nn_nan(root):
    """NaN outside of the field of view of one scan."""
    nnunet(root, dtype=np.float32)
    path = root / "imagesTr" / "case_004_0000.nii.gz"
    scan = nibabel.load(path).get_fdata(dtype=np.float32)
    scan[0] = np.nan
    put(path, scan)


@case(classes=ORGANS)
def nn_affine_flip(root):
    """In the world, the label belongs to the voxels [::-1] of its image."""
    flip = reversed_in(0) @ AFFINE
    return {k: (x, y[::-1]) for k, (x, y) in nnunet(root, label_affine=flip).items()}


@case(classes=ORGANS)
def nn_macos(root):
    """The Decathlon's tar holds ._ files beside the volumes."""
    truth = nnunet(root)
    each(root, "*Tr/*.gz", lambda path: junk(path.with_name(f"._{path.name}")))
    return truth


@case(classes={"background": 0, "edema": 1, "tumor": 2})
def msd(root):
    """The Decathlon as downloaded: 4-D volumes, no _0000, modality, labels by number."""
    return decathlon(root, "BRATS_{:03}", 4)


def decathlon(root, name, channels, named=slice(None)):
    """`named`: which of six cases the list names; the truth is of these."""
    truth, listed = {}, []
    for i in range(6):
        image, label = scene(i, SMALL, 3)
        used, file = image[np.arange(channels) % 3].astype(np.int16), f"{name.format(i)}.nii.gz"
        put(root / "imagesTr" / file, np.moveaxis(used, 0, -1) if channels > 1 else used[0])
        put(root / "labelsTr" / file, label)
        listed.append({"image": f"./imagesTr/{file}", "label": f"./labelsTr/{file}"})
        truth[name.format(i)] = used, label
    write_json(root / "dataset.json", {
        "name": "X", "tensorImageSize": "4D", "training": listed[named], "test": [],
        "modality": {str(c): ["FLAIR", "T1w", "t1gd", "T2w"][c] for c in range(channels)},
        "labels": {"0": "background", "1": "edema", "2": "tumor"}, "numTraining": 6, "numTest": 0,
    })  # fmt: skip
    return {key: truth[key] for key in list(truth)[named]}


@refused("(?i)end.*_0000", at="case_")
def nn_no_channel(root):
    """Images without _0000."""
    nnunet(root, suffix="")


# --- Splits, regions, files that are missing -----------------------------------------------------


@case(classes=ORGANS)
def nn_splits_final(root):
    """The first fold of splits_final.json is the split."""
    folds = [{"train": CASES[:4], "val": CASES[4:]}, {"train": CASES[2:], "val": CASES[:2]}]
    truth = nnunet(root)
    write_json(root / "splits_final.json", folds)
    return {f"{'train' if i < 4 else 'val'}:{key}": truth[key] for i, key in enumerate(CASES)}


@refused("case_999", at="splits_final.json")
def nn_splits_unknown(root):
    """A fold names a case that is not there."""
    nnunet(root)
    write_json(root / "splits_final.json", [{"train": CASES[:4], "val": ["case_999"]}])


@case(classes=ORGANS)
def nn_test_labels(root):
    """imagesTs and labelsTs are the test."""
    tested = nnunet(root, part="Ts", names=("late_000", "late_001"))
    return nnunet(root) | {f"test:{key}": pair for key, pair in tested.items()}


@case(classes={"whole": (1, 2), "core": 2}, overlap=True)
def nn_regions_png(root):
    """Regions that overlap, two grey channels, PNG."""
    regions = {"background": 0, "whole": [1, 2], "core": [2]}
    content = about(2, regions, ".png", regions_class_order=[1, 2])
    return nnunet(root, content, 2, ending=".png", size=SIZE, dtype=np.uint8)


@case(classes=ORGANS, ignored=(3,))
def nn_png_ignore(root):
    """PNG with an ignore label."""
    content = about(1, ORGANS | {"ignore": 3}, ".png")
    return nnunet(root, content, ending=".png", size=SIZE, dtype=np.uint8, draw=top_is_three)


@case(classes=ORGANS)
def nn_ending_upper(root):
    """file_ending has no small letters to match."""
    return nnunet(root, about(ending=".TIF"), ending=".TIF", size=SIZE, dtype=np.uint8)


@refused("case_003_0001", at="case_003")
def nn_channel_missing(root):
    """One case has one channel less than the others."""
    nnunet(root, channels=2)
    (root / "imagesTr" / "case_003_0001.nii.gz").unlink()


@refused("case_005", at="labelsTr")
def nn_label_missing(root):
    nnunet(root)
    (root / "labelsTr" / "case_005.nii.gz").unlink()


@refused("(?i)size|shape", at="case_002")
def nn_channels_differ(root):
    """The second channel of one case has another size."""
    nnunet(root, channels=2)
    put(root / "imagesTr" / "case_002_0001.nii.gz", np.zeros((14, 16, 10), np.int16))


@refused("(?i)json", at="dataset.json")
def nn_json_damaged(root):
    nnunet(root)
    (root / "dataset.json").write_text('{"channel_names": {"0": "CT"},')


@case(classes={"background": 0, "edema": 1, "tumor": 2})
def msd_single(root):
    """One channel in three axes; ._ files; imagesTs without labels."""
    truth = decathlon(root, "spleen_{}", 1)
    put(root / "imagesTs" / "spleen_90.nii.gz", scene(90, SMALL)[0][0].astype(np.int16))
    each(root, "*T?/*.gz", lambda path: junk(path.with_name(f"._{path.name}")))
    junk(root / "._dataset.json", b"\0\5\26\7")
    return truth


@refused("spleen_3", at="dataset.json")
def msd_listed_missing(root):
    """dataset.json lists a volume that is not there."""
    decathlon(root, "spleen_{}", 1)
    for part in ("imagesTr", "labelsTr"):
        (root / part / "spleen_3.nii.gz").unlink()


# --- Files of JSON that say nothing usable -------------------------------------------------------


def fold_of(name, content, pattern="(?i)fold|train|val|list"):
    """splits_final.json: text, or what is written as JSON."""

    def build(root):
        nnunet(root)
        file = root / "splits_final.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))

    build.__name__ = f"nn_splits_{name}"
    refused(pattern, at="splits_final.json")(build)


fold_of("no_fold", [])
fold_of("dict", {"train": ["case_000"], "val": ["case_001"]})
fold_of("no_json", "not json", "(?i)json")
fold_of("no_val", [{"train": CASES[:4], "val": []}])
fold_of("other_keys", [{"training": CASES[:4], "validation": CASES[4:]}])
fold_of("no_names", [{"train": 1, "val": 2}])
fold_of("twice", [{"train": [*CASES[:4], "case_003"], "val": CASES[4:]}], "case_003")
fold_of("in_two", [{"train": CASES[:4], "val": CASES[3:]}], "case_003")


def said_by_json(name, pattern, channels=1, **content):
    """dataset.json with other entries."""

    def build(root):
        nnunet(root, about(channels) | content, channels=channels)

    build.__name__ = f"nn_json_{name}"
    refused(pattern, at="dataset.json")(build)


said_by_json("ending_null", "file_ending", file_ending=None)
said_by_json("channels_number", "channel_names", 2, channel_names=2)
said_by_json(
    "no_label", "label", dataset={"case_000": {"images": ["imagesTr/case_000_0000.nii.gz"]}}
)
said_by_json("labels_list", "labels", labels=["background", "organ", "tumour"])
said_by_json("labels_null", "labels", labels=None)
said_by_json(
    "label_twice", "(?=.*organ)(?=.*tumour)", labels={"background": 0, "organ": 1, "tumour": 1}
)


@refused("training", at="dataset.json")
def msd_strings(root):
    """The list holds names of files alone."""
    decathlon(root, "spleen_{}", 1)
    content = json.loads((root / "dataset.json").read_text())
    content["training"] = [entry["image"] for entry in content["training"]]
    write_json(root / "dataset.json", content)


@refused("spleen_3", at="dataset.json")
def msd_twice(root):
    """The list names a case twice."""
    decathlon(root, "spleen_{}", 1)
    content = json.loads((root / "dataset.json").read_text())
    content["training"].append(content["training"][3])
    write_json(root / "dataset.json", content)


@case(classes=ORGANS)
def nn_ending_no_dot(root):
    return nnunet(root, about(ending="png"), ending=".png", size=SIZE, dtype=np.uint8)


@refused("NaN", at="imagesTr/case_001_0001.nii.gz")
def nn_nan_second_channel(root):
    """The line names the file of the channel."""
    nnunet(root, channels=2, dtype=np.float32)
    path = root / "imagesTr" / "case_001_0001.nii.gz"
    scan = nibabel.load(path).get_fdata(dtype=np.float32)
    scan[0] = np.nan
    put(path, scan)


# --- A folder for each patient -------------------------------------------------------------------


@case(classes={"0": 0, "1": 1, "2": 2, "4": 4})
def brats_raw(root):
    """BraTS20_001/BraTS20_001_flair.nii.gz, ..., BraTS20_001_seg.nii.gz; channels by name."""
    truth = {}
    for i in range(6):
        image, label = scene(i, SMALL, 3)
        name, label = f"BraTS20_{i:03}", np.where(label == 2, 4, label).astype(np.uint8)
        label[0, 0, 0] = 2
        four = image[[0, 1, 2, 0]].astype(np.int16) + np.int16([[[[0]]], [[[0]]], [[[0]]], [[[9]]]])
        for kind, channel in zip(("flair", "t1", "t1ce", "t2"), four, strict=True):
            put(root / name / f"{name}_{kind}.nii.gz", channel)
        put(root / name / f"{name}_seg.nii.gz", label)
        truth[name] = four, label
    junk(root / "survival_info.csv")
    return truth


@case(classes=THREE)
def kits(root):
    """case_00000/imaging.nii.gz and segmentation.nii.gz."""
    names = [f"case_{i:05}" for i in range(6)]
    return volumes(root, "{}/imaging.nii.gz", "{}/segmentation.nii.gz", names)


@refused("(?i)volume|segmentation", at="", either=True, classes=THREE)
def lits(root):
    """volume-0.nii beside segmentation-0.nii: what is in common comes last."""
    names = [str(i) for i in range(6)]
    return volumes(root, "volume-{}.nii", "segmentation-{}.nii", names, key="volume-{}")


@case("data.skip_unpaired=true", classes=THREE)
def acdc(root):
    """patient001/patient001_frame01.nii.gz and ..._gt.nii.gz, two for each, and the whole film."""
    names = [f"patient{p:03}/patient{p:03}_frame{f:02}" for p in range(4) for f in (1, 12)]
    for p in range(4):
        junk(root / f"patient{p:03}" / "Info.cfg")
        film = np.stack([scene(50 + f, SMALL)[0][0] for f in range(3)], -1)
        put(root / f"patient{p:03}" / f"patient{p:03}_4d.nii.gz", film)
    return volumes(root, "{}.nii.gz", "{}_gt.nii.gz", names)


@case(classes=ORGANS, said="not used: 2 files")
def nn_dataset_key(root):
    """`dataset` names the files of each case, which may lie anywhere."""
    truth = nnunet(root, about())
    (root / "scans").mkdir()
    entries = {}
    for name in list(truth)[:-1]:
        (root / "imagesTr" / f"{name}_0000.nii.gz").rename(root / "scans" / f"{name}.nii.gz")
        label = f"labelsTr/{name}.nii.gz"
        entries[name] = {"images": [f"scans/{name}.nii.gz"], "label": label}
    write_json(root / "dataset.json", about() | {"dataset": entries})
    return {name: truth[name] for name in entries}
