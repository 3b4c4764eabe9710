"""Folders with files that are damaged, empty, links or no images at all."""

from __future__ import annotations

import os

import numpy as np
import pytest
from folders import NAMES, SMALL, case, junk, pairs, put, refused, scene, volumes


@refused("(?i)empty|read|identify|pixel", at="images/03.png")
def empty_file(root):
    pairs(root)
    junk(root / "images" / "03.png", b"")


@refused("(?i)truncated|read", at="masks/04.png")
def cut_off_mask(root):
    pairs(root)
    path = root / "masks" / "04.png"
    path.write_bytes(path.read_bytes()[:70])


@refused("(?i)read|identify", at="images/02.png")
def html_for_image(root):
    """A download that got an error page."""
    pairs(root)
    junk(root / "images" / "02.png", b"<html>404</html>")


@refused("(?i)folder|directory", at="09.png", either=True)
def folder_like_file(root):
    """A folder is called like an image."""
    truth = pairs(root)
    (root / "images" / "09.png").mkdir()
    return truth


@refused("(?i)link|no such|exist", at="images/03.png")
def broken_link(root):
    pairs(root)
    (root / "images" / "03.png").unlink()
    (root / "images" / "03.png").symlink_to(root / "nowhere" / "03.png")


@case()
def linked(root):
    """images/ and single masks are links to another disk."""
    truth = pairs(root / "disk", "photos/{}.png", "drawn/{}.png")
    (root / "images").symlink_to(root / "disk" / "photos")
    (root / "masks").mkdir()
    for name in NAMES:
        (root / "masks" / f"{name}.png").symlink_to(root / "disk" / "drawn" / f"{name}.png")
    return truth


@refused("(?i)permission", at="images/03.png")
def unreadable(root):
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    pairs(root)
    (root / "images" / "03.png").chmod(0)


@refused("(?i)read", at="03.nii.gz")
def nifti_cut_off(root):
    """A download that ended early."""
    volumes(root)
    path = root / "images" / "03.nii.gz"
    path.write_bytes(path.read_bytes()[:900])


@refused("(?i)inf", at="02.nii.gz")
def nifti_infinite(root):
    volumes(root, look=lambda image: image[0].astype(np.float32))
    scan = scene(1, SMALL)[0][0].astype(np.float32)
    scan[3, 3, 3] = np.inf
    put(root / "images" / "02.nii.gz", scan)
