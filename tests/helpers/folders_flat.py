"""Folders of flat images in files of volumes: one slice, or two axes, and their directions."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
from folders import NAMES, case, hwc, put, refused, scene

SQUARE, OBLONG = (40, 40), (40, 48)


def flat_itk(array, slices=1, like=None):
    """An image of SimpleITK from an array [y, x]; `slices` 0: of two axes."""
    sitk = pytest.importorskip("SimpleITK")
    found = sitk.GetImageFromArray(array[None] if slices else array)
    if like is not None:
        found.CopyInformation(like)
        return found
    found.SetSpacing((0.5, 0.5, 3.0) if slices else (0.5, 0.5))
    found.SetOrigin((3.0, 4.0, 5.0) if slices else (3.0, 4.0))
    return found


def flat_scans(root, image, mask, slices=1, size=SQUARE):
    """Images and masks of one pixel grid, in two formats, as SimpleITK writes them."""
    sitk = pytest.importorskip("SimpleITK")
    truth = {}
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    for i, name in enumerate(NAMES):
        picture, label = scene(i, size)
        scan = flat_itk(picture[0].astype(np.int16), slices)
        sitk.WriteImage(scan, root / "images" / f"{name}{image}")
        scan = sitk.ReadImage(root / "images" / f"{name}{image}")  # DICOM keeps no origin here
        stored = flat_itk(label, slices, scan)
        sitk.WriteImage(stored, root / "masks" / f"{name}{mask}")
        truth[name] = picture[:1], label
    return truth


def flat_of(image, mask, slices, size=SQUARE, slow=False):
    def build(root):
        return flat_scans(root, image, mask, slices, size)

    sides = "square" if size == SQUARE else "oblong"
    build.__name__ = f"flat{image}{mask}_{slices}_{sides}".replace(".", "_")
    case(turned=True, slow=slow)(build)


# Each pair of formats, with one slice and without an axis of slices.
for slices in (0, 1):
    flat_of(".mha", ".nii.gz", slices, slow=True)
    flat_of(".nii.gz", ".mha", slices, slow=slices == 1)
    flat_of(".nrrd", ".nii.gz", slices, slow=slices == 0)
    flat_of(".mha", ".nii.gz", slices, OBLONG)
    flat_of(".mha", ".mha", slices, slow=slices == 1)
flat_of(".dcm", ".nii.gz", 1)
flat_of(".dcm", ".mha", 1)


def directed(root, reversed_in_x):
    """2-D .mha whose mask is stored from the other end of a row, as its direction says."""
    sitk = pytest.importorskip("SimpleITK")
    truth = flat_scans(root, ".mha", ".mha", 0, OBLONG)
    for name, (_, label) in truth.items():
        stored = flat_itk(np.ascontiguousarray(label[:, ::-1]) if reversed_in_x else label, 0)
        if reversed_in_x:
            stored.SetDirection((-1, 0, 0, 1))
            stored.SetOrigin((3.0 + 0.5 * 47, 4.0))
        sitk.WriteImage(stored, root / "masks" / f"{name}.mha")
    return truth


@refused("(?i)direction|beside|place", at="masks/", either=True, turned=True)
def flat_mask_mirrored(root):
    return directed(root, True)


@case(turned=True)
def flat_mask_directed(root):
    return directed(root, False)


# --- Pictures beside NIfTI -----------------------------------------------------------------------


def picture_and_nifti(root, ending, size, swapped):
    """Pictures of rows and columns; NIfTI of x and y, or of rows and columns as in the picture."""
    truth = {}
    for i, name in enumerate(NAMES):
        image, label = scene(i, size)
        array = image[0] if ending == ".npy" else hwc(image)
        put(root / "images" / f"{name}{ending}", array)
        put(root / "masks" / f"{name}.nii.gz", np.ascontiguousarray(label.T) if swapped else label)
        truth[name] = image[:1] if ending == ".npy" else image, label
    return truth


def square_picture(ending, swapped, slow=False):
    def build(root):
        picture_and_nifti(root, ending, SQUARE, swapped)

    build.__name__ = f"square_{ending[1:]}_nifti{'_swapped' * swapped}"
    refused("(?i)square|rows|columns|axes", at="masks/", slow=slow)(build)


for ending in (".png", ".tif", ".npy"):
    square_picture(ending, True, slow=ending == ".tif")
    square_picture(ending, False, slow=ending != ".tif")


@refused("(?i)square|rows|columns|axes", at="masks/")
def square_nifti_png(root):
    """The other way round."""
    for i, name in enumerate(NAMES):
        image, label = scene(i, SQUARE)
        put(root / "images" / f"{name}.nii.gz", image[0])
        put(root / "masks" / f"{name}.png", label)


@case()
def oblong_png_nifti(root):
    """Where the sides differ, they tell rows from columns."""
    return picture_and_nifti(root, ".png", OBLONG, False)


@refused("48 x 40.*40 x 48", at="masks/")
def oblong_png_nifti_swapped(root):
    picture_and_nifti(root, ".png", OBLONG, True)


# --- Directions of flat NIfTI --------------------------------------------------------------------

CORONAL = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])


@case()
def nifti_2d_coronal(root):
    """Some slices are coronal by their affine: all of them stay flat, as they are stored."""
    truth = {}
    for i, name in enumerate(NAMES):
        image, label = scene(i, OBLONG)
        affine = np.eye(4) if i % 3 else CORONAL
        put(root / "images" / f"{name}.nii.gz", image[0][..., None], affine=affine)
        put(root / "masks" / f"{name}.nii.gz", label[..., None], affine=affine)
        truth[name] = image[:1], label
    assert nibabel.aff2axcodes(CORONAL) == ("R", "S", "A")
    return truth
