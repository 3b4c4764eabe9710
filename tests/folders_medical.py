"""Folders of scans: nnU-Net, the Decathlon, NIfTI with its geometry, MHA, NRRD, DICOM."""

from __future__ import annotations

import nibabel
import numpy as np
from folders import (
    AFFINE,
    SMALL,
    THREE,
    case,
    each,
    hwc,
    junk,
    put,
    refused,
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


@refused(r"1\.37.*>", at="case_000.nii.gz")
def nn_float_half(root):
    """Labels that were resampled, and are between two classes."""
    nnunet(root, draw=lambda x: np.where(x == 1, 1.37, x).astype(np.float32))


@refused("255", at="case_000.nii.gz")
def nn_unexpected(root):
    """Masks of 0 and 255 where dataset.json says 0 and 1."""
    nnunet(root, about(labels={"background": 0, "organ": 1}),
           draw=lambda x: np.uint8(255) * (x == 1))  # fmt: skip


@refused(rf"{SMALL[1] * SMALL[2]}.*NaN|NaN.*{SMALL[1] * SMALL[2]}", at="case_004_0000.nii.gz")
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
    flip = AFFINE @ np.diag([-1, 1, 1, 1])
    flip[0, 3] = SMALL[0] - 1
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


def decathlon(root, name, channels):
    truth, listed = {}, []
    for i in range(6):
        image, label = scene(i, SMALL, 3)
        used, file = image[np.arange(channels) % 3].astype(np.int16), f"{name.format(i)}.nii.gz"
        put(root / "imagesTr" / file, np.moveaxis(used, 0, -1) if channels > 1 else used[0])
        put(root / "labelsTr" / file, label)
        listed.append({"image": f"./imagesTr/{file}", "label": f"./labelsTr/{file}"})
        truth[name.format(i)] = used, label
    write_json(root / "dataset.json", {
        "name": "X", "tensorImageSize": "4D", "training": listed, "test": [],
        "modality": {str(c): ["FLAIR", "T1w", "t1gd", "T2w"][c] for c in range(channels)},
        "labels": {"0": "background", "1": "edema", "2": "tumor"}, "numTraining": 6, "numTest": 0,
    })  # fmt: skip
    return truth


@refused("_0000", at="case_000")
def nn_no_channel(root):
    """Images without _0000."""
    nnunet(root, suffix="")


# --- NIfTI in images/ and masks/ -----------------------------------------------------------------


@case("data.patch_size=[8,8,4]", classes=THREE)
def anisotropic(root):
    """MRI of few thick slices, not everywhere of one number."""
    truth = {}
    for i in range(6):
        image, label = scene(i, (24, 26, 6 + i % 3), 3)
        affine = np.diag([0.6, 0.6, 6.0, 1.0])
        put(root / "images" / f"s{i}.nii.gz", image[0].astype(np.int16), affine=affine)
        put(root / "masks" / f"s{i}.nii.gz", label, affine=affine)
        truth[f"s{i}"] = image[:1], label
    return truth


@case(classes=THREE)
def nifti_2d(root):
    """Scans [H, W, 1] and masks [H, W]."""
    return volumes(root, size=(24, 26), look=lambda picture: picture[0][..., None].astype(np.int16))


@refused("DICOM|dcm", at="images")
def dicom(root):
    """A series of slices for each patient, all of them damaged."""
    for p in range(4):
        for folder in ("images", "masks"):
            for z in range(3):
                junk(root / folder / f"p{p}" / f"{z:04}.dcm", bytes(128) + b"DICM")
