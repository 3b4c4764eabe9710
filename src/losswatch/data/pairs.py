"""Finds the folders of images and of masks, by common names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from losswatch.data.cases import Case
from losswatch.data.matching import Names, NoMasks, Pairs, beside, match
from losswatch.data.splits import add_case
from losswatch.data.tree import WORDS, Key, files_below, is_hidden, key_part

# Common names of the folders images/ and masks/.
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "img_dir", "jpegimages", "leftimg8bit")
MASK_FOLDERS = (
    "masks", "mask", "labels", "label", "annotations", "annotation", "annot", "ann_dir", "gt",
    "gtfine", "groundtruth", "ground_truth", "segmentations", "segmentation", "segmentationclass",
)  # fmt: skip


def find_pairs(root: Path, names: Names) -> Pairs:
    """The images of a folder and their masks.

    Tries these layouts in this order: a folder of images and one of masks; train/ beside
    train_masks/; a folder for each split; a folder for each image; masks beside their images.

    Raises:
        ValueError: there are no images or no masks, or an image or a mask has no partner.
    """
    images, masks = _folder(root, names.images), _folder(root, names.masks)
    if images and masks:
        found = match(images, masks, names)
        given = (root / names.images, root / names.masks)
        other = [path.name for path in (images, masks) if path not in given]
        return found._replace(notes=(*found.notes, *(f"{name}/ is read" for name in other)))
    children = sorted(p for p in root.iterdir() if p.is_dir() and not is_hidden(p.name))
    if siblings := _siblings(children):
        return _merge_pairs((split, match(*folders, names)) for split, folders in siblings.items())
    splits = [path for path in children if path.name.lower() in WORDS]
    if any(WORDS[path.name.lower()] == "train" for path in splits):
        return _of_splits(splits, names)
    if each := [p for p in children if _folder(p, names.images) and _folder(p, names.masks)]:
        return _merge_pairs((p.name, _of_one(p, names)) for p in each)
    if images or (root / names.masks).is_dir() or names.images != IMAGE_FOLDERS[0]:
        _refuse(root, names, images)
    return beside(root, names)


def _folder(root: Path, name: str) -> Path | None:
    """The folder with this name. For a default name, also the only folder with a common name."""
    if (root / name).is_dir():
        return root / name
    common = next((n for n in (IMAGE_FOLDERS, MASK_FOLDERS) if n[0] == name), ())
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and p.name.lower() in common]
    return folders[0] if len(folders) == 1 else None


def _of_one(folder: Path, names: Names) -> Pairs:
    images, masks = _folder(folder, names.images), _folder(folder, names.masks)
    assert images and masks
    return match(images, masks, names, is_one=True)


def _refuse(root: Path, names: Names, images: Path | None) -> None:
    if not images:
        raise ValueError(
            f"{root / names.images} is not a folder; it must hold images: name another one by "
            "data.images=..."
        )
    hint = ""
    if any(path.suffix == ".json" for path in files_below(images).others):
        hint = "; the files .json beside the images are not read: draw their polygons into masks"
    raise NoMasks(
        f"{root / names.masks} is not a folder; it must hold masks: name another one by "
        f"data.masks=...{hint}"
    )


def _of_splits(folders: Sequence[Path], names: Names) -> Pairs:
    found, notes = [], []
    for folder in folders:
        try:
            found.append((folder.name, find_pairs(folder, names)))
        except NoMasks:
            if WORDS[folder.name.lower()] != "test":
                raise
            notes.append(f"{folder.name}/ has no masks, and is left out")
    pairs = _merge_pairs(found)
    return pairs._replace(notes=(*pairs.notes, *notes))


def _siblings(folders: Sequence[Path]) -> dict[str, tuple[Path, Path]]:
    """Folders of images and of masks by split: train/ and train_masks/, or images_train/ ..."""
    found: dict[tuple[str, bool], Path] = {}
    for path in folders:
        words = [w for w in re.split(r"[-_ ]|(?<=n|l|d|t)(?=annot)", path.name.lower()) if w]
        split = next((word for word in words if word in WORDS), None)
        rest = [word for word in words if word != split]
        is_mask = any(word in MASK_FOLDERS for word in rest)
        if split and (is_mask or all(word in IMAGE_FOLDERS for word in rest)):
            found.setdefault((split, is_mask), path)
    both = {split: (found[split, False], found[split, True])
            for split, is_mask in found if is_mask and (split, False) in found}  # fmt: skip
    return both if any(WORDS[split] == "train" for split in both) else {}


def _merge_pairs(parts: Iterable[tuple[str, Pairs]]) -> Pairs:
    """The pairs of several folders. If one folder lacks a class, its masks are empty there."""
    by_folder = dict(parts)
    kinds = tuple(sorted({kind for pairs in by_folder.values() for kind in pairs.kinds}))
    cases: dict[Key, Case] = {}
    notes: dict[str, None] = {}
    for name, pairs in by_folder.items():
        if pairs.cases and bool(pairs.kinds) != bool(kinds):
            case = next(iter(pairs.cases.values()))
            raise ValueError(f"{case.images[0]} has one mask, others have a folder for each class")
        place = key_part(name)
        for key, case in pairs.cases.items():
            masks = dict(zip(pairs.kinds, case.masks, strict=False))
            padded = tuple(masks.get(kind, ()) for kind in kinds) if kinds else case.masks
            called = f"{'/'.join(key)} in {place}"
            add_case(cases, (place, *key), Case("", case.images, padded), called)
        notes |= dict.fromkeys(pairs.notes)
    return Pairs(cases, kinds, tuple(notes))
