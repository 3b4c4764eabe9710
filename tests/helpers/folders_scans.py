"""Folders of scans in images/ and masks/: NIfTI, MHA, NRRD and DICOM, and where they lie.

The truth of a mask is where it lies in the world.
"""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
from folders import (
    AFFINE,
    NAMES,
    SMALL,
    THREE,
    case,
    junk,
    put,
    refused,
    reversed_in,
    scene,
    volumes,
)

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


def with_scaling(array, slope, inter, affine=AFFINE):
    """Whole numbers in the file, and a factor in its header."""
    image = nibabel.Nifti1Image(array.astype(np.int16), affine)
    image.header.set_slope_inter(slope, inter)
    return image


@case(classes=THREE)
def nifti_scaled(root):
    """Factors in the headers; that of the masks gives 0.99999 for 1."""
    truth = {}
    for i, name in enumerate(NAMES[:6]):
        image, label = scene(i, SMALL, 3)
        for folder, file in (
            ("images", with_scaling(image[0], 0.5, -8)),
            ("masks", with_scaling(label * 3, 0.33333, 0)),
        ):
            (root / folder).mkdir(exist_ok=True)
            nibabel.save(file, root / folder / f"{name}.nii")
            raw = nibabel.load(root / folder / f"{name}.nii").dataobj.slope
            assert raw != 1, "the factor is lost"
        truth[name] = image[:1] * 0.5 - 8, label
    return truth


@case(classes=THREE)
def nifti_big_endian(root):
    return volumes(root, look=lambda image: image[0].astype(">i2"), draw=lambda x: x.astype(">u2"))


@case(classes=THREE)
def nifti_float_masks(root):
    """Whole numbers as float64; .nii beside .nii.gz; a fourth axis of one."""
    draw = lambda label: label.astype(np.float64)[..., None]  # noqa: E731
    return volumes(root, mask="masks/{}.nii", draw=draw)


# --- Where scans lie -----------------------------------------------------------------------------


def placed(root, image, mask, count=6):
    """NIfTI files; image and mask give the array that is stored, and its affine."""
    truth = {}
    for i, name in enumerate(NAMES[:count]):
        picture, label = scene(i, SMALL, 3)
        for folder, (array, affine) in (
            ("images", image(i, picture[0].astype(np.int16))),
            ("masks", mask(i, label)),
        ):
            put(root / folder / f"{name}.nii.gz", np.ascontiguousarray(array), affine=affine)
        truth[name] = picture[:1], label
    return truth


def plainly(i, array):
    return array, AFFINE


def mirrored(i, array, affine=AFFINE):
    """The same place, stored from the other end of two axes."""
    return array[::-1, :, ::-1], affine @ reversed_in(0) @ reversed_in(2)


@case(classes=THREE)
def scans_mask_mirrored(root):
    return placed(root, plainly, mirrored)


@case(classes=THREE)
def scans_one_mask_mirrored(root):
    return placed(root, plainly, lambda i, array: (mirrored if i == 3 else plainly)(i, array))


@case(classes=THREE)
def scans_mask_permuted(root):
    """Masks stored as [z, x, y]."""
    order = AFFINE[:, [2, 0, 1, 3]]
    return placed(root, plainly, lambda i, array: (array.transpose(2, 0, 1), order))


def oblique():
    """Turned by 20 degrees about x, and by 10 about z."""
    a, b = np.radians([20, 10])
    x = [[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]]
    z = [[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]]
    affine = np.eye(4)
    affine[:3, :3] = np.array(x) @ np.array(z) @ AFFINE[:3, :3]
    affine[:3, 3] = -40, 12, 7
    return affine


@case(classes=THREE)
def scans_oblique(root):
    return placed(root, lambda i, x: (x, oblique()), lambda i, x: mirrored(i, x, oblique()))


@case(classes=THREE)
def scans_two_orientations(root):
    """Two scans of six are stored from the other end, with their masks."""
    stored = lambda i, array: (mirrored if i in (1, 4) else plainly)(i, array)  # noqa: E731
    return placed(root, stored, stored)


@case(classes=THREE)
def scans_two_orders(root):
    """One scan has its axes in another order; its mask has not."""

    def other(i, array):
        return (array.transpose(1, 0, 2), AFFINE[:, [1, 0, 2, 3]]) if i == 2 else (array, AFFINE)

    return placed(root, other, plainly)


def moved(voxels, scale=1.0):
    """A mask that lies elsewhere, in voxels along y; scale is of its voxels."""
    affine = AFFINE.copy()
    affine[1, 3] = voxels * AFFINE[1, 1]
    affine[:3, :3] *= scale
    return lambda i, array: (array, affine if i == 2 else AFFINE)


@refused("(?i)affine|voxel|place", at="masks/03.nii.gz")
def scans_shifted(root):
    """A mask lies a voxel beside its image."""
    placed(root, plainly, moved(1))


@case(classes=THREE)
def scans_shifted_little(root):
    """A rounding error of a header."""
    return placed(root, plainly, moved(0.01, 1 + 1e-6))


@refused("(?i)affine|voxel|place|spacing", at="masks/03.nii.gz")
def scans_spacing(root):
    """A mask has voxels of twice the size."""
    placed(root, plainly, moved(0, 2))


@refused("(?i)affine|voxel|place", at="masks/03.nii.gz")
def scans_origin(root):
    """A mask lost its origin: a program wrote it without its image's header."""
    far = AFFINE.copy()
    far[:3, 3] = -120, 80, -60
    placed(root, lambda i, x: (x, far), lambda i, x: (x, AFFINE if i == 2 else far))


def codes(root, image, mask):
    """The codes (sform, qform) of the headers: which of the two affines is there."""
    truth = volumes(root)
    for folder, (s, q) in (("images", image), ("masks", mask)):
        for path in (root / folder).iterdir():
            file = nibabel.load(path)
            array, header = np.asarray(file.dataobj), file.header
            header.set_sform(oblique() if s else None, s)
            header.set_qform(oblique() if q else None, q)
            nibabel.save(nibabel.Nifti1Image(array, None, header), path)
    return truth


@case(classes=THREE)
def nifti_sform_qform(root):
    """Images have an sform alone, masks a qform alone; it is the same place."""
    return codes(root, (1, 0), (0, 1))


@case(classes=THREE)
def nifti_no_codes(root):
    """No header says where anything is."""
    return codes(root, (0, 0), (0, 0))


@refused("(?i)affine|place|code|header", at=".nii.gz", either=True, classes=THREE)
def nifti_mask_no_codes(root):
    """Masks do not say where they are: they lie on their images, or are refused."""
    return codes(root, (1, 1), (0, 0))


# --- MHA, NRRD and DICOM -------------------------------------------------------------------------


def itk(array, affine=None):
    """A scan [x, y, z] of SimpleITK; the affine is NIfTI's, whose x and y have the other sign."""
    sitk = pytest.importorskip("SimpleITK")
    affine = np.diag([-1, -1, 1, 1]) @ (oblique() if affine is None else affine)
    found, spacing = sitk.GetImageFromArray(array.T), np.linalg.norm(affine[:3, :3], axis=0)
    found.SetSpacing(spacing.tolist())
    found.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    found.SetOrigin(affine[:3, 3].tolist())
    return found


def write_itk(path, array, affine=None):
    sitk = pytest.importorskip("SimpleITK")
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(itk(array, affine), path)


def write_series(folder, array):
    """A DICOM file for each slice; the order of the names is not that of the slices."""
    sitk = pytest.importorskip("SimpleITK")
    folder.mkdir(parents=True)
    scan, depth = itk(array), array.shape[2]
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    x = np.reshape(scan.GetDirection(), (3, 3))
    for z in range(depth):
        page = scan[:, :, z]
        for tag, value in {
            "0008|0060": "CT", "0020|000e": f"1.2.826.0.1.{sum(folder.name.encode())}",
            "0020|0037": "\\".join(f"{v:.12f}" for v in (*x[:, 0], *x[:, 1])),
            "0020|0032": "\\".join(map(str, scan.TransformIndexToPhysicalPoint((0, 0, z)))),
            "0020|0013": str(z), "0018|0050": "2.5",
        }.items():  # fmt: skip
            page.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{(7 * z) % depth:04}.dcm"))
        writer.Execute(page)


def scanned(root, image, mask, count=6):
    """image and mask write a file or folder of a name; arrays are [x, y, z]."""
    truth = {}
    for i, name in enumerate(NAMES[:count]):
        picture, label = scene(i, SMALL, 3)
        image(root, name, picture[0].astype(np.int16))
        mask(root, name, label)
        truth[name] = picture[:1], label
    return truth


def to(pattern, write=write_itk):
    return lambda root, name, array: write(root / pattern.format(name), array)


@case(classes=THREE, turned=True)
def mha(root):
    return scanned(root, to("images/{}.mha"), to("masks/{}.mha"))


@case("data.images=.", "data.masks=.", "data.mask_suffix=_segmentation", classes=THREE, turned=True)
def promise12(root):
    """Case00.mhd and Case00.raw, and the same of the mask in one folder."""
    return scanned(root, to("{}.mhd"), to("{}_segmentation.mhd"))


@case(classes=THREE, turned=True)
def nrrd(root):
    return scanned(root, to("images/{}.nrrd"), to("masks/{}.nrrd"))


def write_mirrored(path, array):
    """NIfTI of a mask as dcm2niix stores it: rows from the other end."""
    put(path, np.ascontiguousarray(array[:, ::-1]), affine=oblique() @ reversed_in(1))


@case(classes=THREE, turned=True)
def nrrd_nifti(root):
    """Images NRRD, masks NIfTI."""
    return scanned(root, to("images/{}.nrrd"), to("masks/{}.nii.gz", write_mirrored))


@case(classes=THREE, turned=True)
def dicom_nifti(root):
    """A series of slices for each patient; masks as dcm2niix stores them."""
    return scanned(root, to("images/{}", write_series), to("masks/{}.nii.gz", write_mirrored), 4)


@case(classes=THREE, turned=True)
def dicom_nrrd(root):
    return scanned(root, to("images/{}", write_series), to("masks/{}.nrrd"), 4)


@case(classes=THREE, turned=True)
def dicom_dicom(root):
    """Masks are series, too."""
    masks = to("masks/{}", lambda path, label: write_series(path, label.astype(np.int16)))
    return scanned(root, to("images/{}", write_series), masks, 4)


@refused("(?i)dicom|series|without", at="02", either=True, classes=THREE, turned=True)
def dicom_two_series(root):
    """A localiser lies among one patient's slices: the series of the mask's size, or refused."""
    truth = dicom_nrrd(root)
    write_series(root / "localiser", scene(70, (9, 8, 3))[0][0].astype(np.int16))
    for path in (root / "localiser").iterdir():
        path.rename(root / "images" / "02" / f"l{path.name}")
    (root / "localiser").rmdir()
    return truth


@refused("(?i)slice|space|missing|even|size", at="02")
def dicom_slice_missing(root):
    """A slice of a series was lost."""
    dicom_nrrd(root)
    (root / "images" / "02" / "0003.dcm").unlink()


@case(classes={"0": 0, "1": 1})
def dicom_xray(root):
    """An X-ray is one file; its mask is PNG."""
    sitk = pytest.importorskip("SimpleITK")
    truth = {}
    for i, name in enumerate(NAMES):
        image, label = scene(i)
        (root / "images").mkdir(exist_ok=True)
        sitk.WriteImage(sitk.GetImageFromArray(image[0].astype(np.uint16) * 16),
                        root / "images" / f"{name}.dcm")  # fmt: skip
        put(root / "masks" / f"{name}.png", label)
        truth[name] = image[:1].astype(np.uint16) * np.uint16(16), label
    return truth
