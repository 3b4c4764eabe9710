"""Folders of images of bright disks, with their masks, and a short run on one."""

import nibabel
import numpy as np
import tifffile
from PIL import Image

SHORT = [
    "data=folder", "data.patch_size=16", "trainer.max_steps=12", "trainer.val_check_interval=6",
    "trainer.accelerator=cpu",
]  # fmt: skip


def disks(count, size=(40, 48), channels=1, depth=8, seed=0):
    """Images of noise with a bright disk each, and the disks as masks of 0 and 1."""
    rng, top = np.random.default_rng(seed), 2**depth - 1
    pairs = []
    for _ in range(count):
        centre, radius = rng.uniform(10, np.array(size) - 10), rng.uniform(5, 9)
        y, x = np.indices(size)
        mask = np.hypot(y - centre[0], x - centre[1]) < radius
        image = 0.3 * rng.random((*size, channels)) + 0.6 * mask[..., None]
        pairs.append(((top * image).astype(f"uint{depth}").squeeze(), mask.astype(np.uint8)))
    return pairs


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, array)
    elif path.name.endswith((".nii", ".nii.gz")):
        nibabel.save(nibabel.Nifti1Image(array, np.diag([2.0, 1, 1, 1])), path)
    else:
        Image.fromarray(array).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def make_folder(root, count=10, image=".png", mask=".png", scale=255, **options):
    for i, (picture, label) in enumerate(disks(count, **options)):
        save(root / "images" / f"{i:02}{image}", picture)
        save(root / "masks" / f"{i:02}{mask}", label * np.uint8(scale))
    return root
