"""Images and masks that belong together, found by the names of files and folders."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from losswatch.data.cases import Case
from losswatch.data.files import WORDS, Files, Key, files_below, is_hidden, normal
from losswatch.data.labels import REST, Classes
from losswatch.data.reading import SUFFIXES, stem_of, suffix_of
from losswatch.data.splits import lists_of
from losswatch.text import number_of

# What images/ and masks/ are called elsewhere.
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "img_dir", "jpegimages", "leftimg8bit")
MASK_FOLDERS = (
    "masks", "mask", "labels", "label", "annotations", "annotation", "ann_dir", "gt", "gtfine",
    "groundtruth", "ground_truth", "segmentations", "segmentation", "segmentationclass",
)  # fmt: skip
# How the name of a mask ends that lies beside its image.
ENDINGS = re.compile(r"(?:^|[-_. ])(masks?|labels?|seg|segmentation|gt)$", re.IGNORECASE)


class Names(NamedTuple):
    """How a data set calls its parts: settings of `FolderImages`."""

    images: str = "images"
    masks: str = "masks"
    image_suffix: str = ""
    mask_suffix: str = ""
    skip_unpaired: bool = False


class Pairs(NamedTuple):
    """Images and masks that belong together, by their key, which may begin with a split."""

    cases: dict[Key, Case]
    classes: Classes | None = None
    overlap: bool = False
    unused: Sequence[Path] = ()
    notes: tuple[str, ...] = ()


def find_pairs(root: Path, names: Names) -> Pairs:
    images, masks = (
        _folder(root, names.images, IMAGE_FOLDERS),
        _folder(root, names.masks, MASK_FOLDERS),
    )
    if images and masks:
        found = _pairs(images, masks, names)
        other = [
            f for f, name in ((images, names.images), (masks, names.masks)) if f != root / name
        ]
        notes = tuple(f"{folder.name}/ is read" for folder in other)
        return found._replace(notes=(*found.notes, *notes))
    children = sorted(p for p in root.iterdir() if p.is_dir() and not is_hidden(p.name))
    splits = [p for p in children if p.name.lower() in WORDS]
    given = [p for p in splits or children if _folder(p, names.images, IMAGE_FOLDERS)]
    if given:
        return _joined(root, given, names)
    if images or names.images != "images":
        missing = root / (names.masks if images else names.images)
        _refuse_missing(missing, "masks" if images else "images", images)
    if (root / names.masks).is_dir():
        _refuse_missing(root / names.images, "images", None)
    return _beside(
        root, Names(".", ".", names.image_suffix, names.mask_suffix, names.skip_unpaired)
    )


def _folder(root: Path, name: str, known: Sequence[str]) -> Path | None:
    """The folder of this name; for a name that is a default, one of the names that others use."""
    if (root / name).is_dir():
        return root / name
    found = [p for p in sorted(root.iterdir()) if p.is_dir() and p.name.lower() in known]
    return found[0] if name == known[0] and len(found) == 1 else None


def _refuse_missing(folder: Path, what: str, images: Path | None) -> None:
    hint = ""
    if images and any(path.suffix == ".json" for path in files_below(images).others):
        hint = "; the files .json beside the images are not read: draw their polygons into masks"
    raise ValueError(
        f"{folder} is no folder; it is to hold {what}: name another one by data.{what}=...{hint}"
    )


def _joined(root: Path, folders: Sequence[Path], names: Names) -> Pairs:
    """The pairs of several folders, each with images/ and masks/: splits, or one for an image."""
    cases: dict[Key, Case] = {}
    unused: list[Path] = []
    notes: dict[str, None] = {}
    kinds = {}
    for folder in folders:
        word = WORDS.get(folder.name.lower())
        images, masks = (
            _folder(folder, names.images, IMAGE_FOLDERS),
            _folder(folder, names.masks, MASK_FOLDERS),
        )
        assert images
        if masks is None:
            if word != "test":
                _refuse_missing(folder / names.masks, "masks", images)
            notes[f"{folder.name}/ has no masks, and is left out"] = None
            continue
        found = _pairs(images, masks, names, is_one=word is None)
        kinds[str((found.overlap, found.classes and [*found.classes]))] = folder
        cases |= {(normal(folder.name), *key): case for key, case in found.cases.items()}
        unused += found.unused
        notes |= dict.fromkeys(found.notes)
    if len(kinds) > 1:
        first, second, *_ = kinds.values()
        raise ValueError(f"{names.masks}/ of {first} and of {second} hold different classes")
    return Pairs(cases, found.classes, found.overlap, unused, tuple(notes))


def _pairs(images: Path, masks: Path, names: Names, is_one: bool = False) -> Pairs:
    """The pairs of two folders.

    Args:
        is_one: whether the folders are of one image.
    """
    if images.resolve() == masks.resolve():
        return _beside(images, names)
    all_images, all_masks = files_below(images), files_below(masks)
    pictures, others = _ending(all_images.images, names.image_suffix)
    labels, rest = _ending(all_masks.images, names.mask_suffix)
    for found, folder, suffix, known in (
        (pictures, images, names.image_suffix, all_images),
        (labels, masks, names.mask_suffix, all_masks),
    ):
        if not found:
            what = f" whose names end in {suffix!r}" if suffix and known.images else ""
            endings = sorted({path.suffix for path in known.others})
            have = f"; it holds {', '.join(endings)}" if endings and not known.images else ""
            raise ValueError(
                f"{folder} holds no images{what}; known are {', '.join(SUFFIXES)}{have}"
            )
    unused = [*others, *rest, *all_images.others, *all_masks.others]
    if not labels.keys() & pictures.keys():
        if is_one and len(pictures) == 1:
            [(key, path)] = pictures.items()
            return Pairs({key: Case("", (path,), (tuple(labels.values()),))}, unused=unused)
        if found := _by_class(pictures, labels):
            return found._replace(unused=unused)
        pictures, labels, name = _by_common_parts(pictures, labels)
        notes = (name,) if name else ()
    else:
        notes = ()
        deeper = [key for key in labels if key not in pictures and len(key) > 1]
        if all(key in labels for key in pictures):  # folders beside the masks
            unused += [labels.pop(key) for key in deeper]
    lone_images = [path for key, path in pictures.items() if key not in labels]
    lone_masks = [path for key, path in labels.items() if key not in pictures]
    if lone := [*lone_masks, *lone_images]:
        if not names.skip_unpaired and not lists_of(images.parent):
            is_mask = bool(lone_masks)
            other = images if is_mask else masks
            what = "a mask without an image" if is_mask else "an image without a mask"
            hint = _unreadable(stem_of(lone[0]), all_images if is_mask else all_masks)
            raise ValueError(
                f"{lone[0]} is {what} in {other}{hint}; data.skip_unpaired=true leaves "
                "such files out"
            )
        unused += lone
    cases = {
        key: Case("", (path,), ((labels[key],),)) for key, path in pictures.items() if key in labels
    }
    return Pairs(cases, unused=unused, notes=notes)


def _unreadable(stem: str, files: Files) -> str:
    """A hint where the file that is missing is there, but of a kind that is not read."""
    for path in files.others:
        if normal(path.name).startswith(normal(stem) + "."):
            return f", where {path.name} is, which cannot be read"
    return ""


def _ending(files: Mapping[Key, Path], suffix: str) -> tuple[dict[Key, Path], list[Path]]:
    """The files whose stems end like this, by their key without it; and the others."""
    found = {key: path for key, path in files.items() if key[-1].endswith(normal(suffix))}
    rest = [path for key, path in files.items() if key not in found]
    count = len(normal(suffix))
    return {(*key[:-1], key[-1][: len(key[-1]) - count]): path for key, path in found.items()}, rest


def _by_class(pictures: Mapping[Key, Path], labels: Mapping[Key, Path]) -> Pairs | None:
    """The pairs where masks lie in a folder for each class, at the same depth in all paths."""
    for depth in range(max(len(key) for key in labels) - 1):
        parted: dict[Key, dict[str, Path]] = {}
        for key, path in labels.items():
            if len(key) > depth + 1:
                parted.setdefault((*key[:depth], *key[depth + 1 :]), {})[key[depth]] = path
        if not parted or not all(key in pictures for key in parted):
            continue
        names = sorted({name for found in parted.values() for name in found})
        cases = {
            key: Case("", (path,), tuple(
                ((parted[key][name],) if name in parted.get(key, {}) else ()) for name in names
            ))
            for key, path in pictures.items()
        }  # fmt: skip
        empty = [key for key, case in cases.items() if () in case.masks]
        notes = (
            f"{number_of(len(empty), 'image')} have no file of a class, whose mask is then empty; "
            f"{cases[empty[0]].images[0].name} is the first",
        ) if empty else ()  # fmt: skip
        if len(names) > 1:
            return Pairs(cases, dict.fromkeys(names, REST), True, notes=notes)
        return Pairs(cases, {"background": 0, names[0]: REST}, False, notes=notes)
    return None


def _by_common_parts(
    pictures: dict[Key, Path], labels: dict[Key, Path]
) -> tuple[dict[Key, Path], dict[Key, Path], str]:
    """Images and masks whose names are equal but for what all images, or all masks, share.

    Such as 21_training and 21_manual1. What is shared ends at a separator. Without such a pairing
    the files are given back as they came.
    """

    def trimmed(keys: Sequence[Key]) -> dict[Key, Key]:
        stems = [key[-1] for key in keys]
        front = re.sub(r"[^-_. ]*$", "", os.path.commonprefix(stems))
        back = re.sub(r"^[^-_. ]*", "", os.path.commonprefix([s[::-1] for s in stems])[::-1])
        return {(*k[:-1], k[-1][len(front) : len(k[-1]) - len(back)]): k for k in keys}

    for images in (dict(zip(pictures, pictures, strict=True)), trimmed([*pictures])):
        masks = trimmed([*labels])
        plain = {(*k[:-1], _without_ending(k[-1])): k for k in labels}
        for found in (plain, masks):
            if (
                images.keys() == found.keys()
                and len(found) == len(labels)
                and len(images) == len(pictures)
            ):
                first = next(iter(images))
                names = labels[found[first]].name, pictures[images[first]].name
                note = f"{names[0]} is taken for the mask of {names[1]}, and so on"
                return (
                    {images[k]: pictures[images[k]] for k in images},
                    {images[k]: labels[found[k]] for k in images},
                    note,
                )
    return pictures, labels, ""


def _without_ending(stem: str) -> str:
    return ENDINGS.sub("", stem)


def _beside(folder: Path, names: Names) -> Pairs:
    """The pairs of one folder, where an image and its masks lie beside each other.

    A mask is called like its image, with an ending. What else is called so is a channel. A .npz
    holds both.
    """
    files = files_below(folder)
    if files.images and all(suffix_of(path) == ".npz" for path in files.images.values()):
        cases = {key: Case("", (path,), ((path,),)) for key, path in files.images.items()}
        return Pairs(cases, unused=files.others)
    suffix = names.mask_suffix
    masks = {
        key: key[-1][: -len(suffix)] if suffix else _without_ending(key[-1])
        for key in files.images
        if (key[-1].endswith(suffix) if suffix else ENDINGS.search(key[-1]))
    }
    if not masks:
        what = f"that end in {suffix}" if suffix else "in masks/, or that end in _mask"
        raise ValueError(
            f"{folder} holds no masks {what}; data.images, data.masks and data.mask_suffix say "
            "where they are"
        )
    rest = {key: path for key, path in files.images.items() if key not in masks}
    cases, used, kinds = {}, set(), {}
    for key, stem in masks.items():
        where = key[:-1]
        if (*where, stem + names.image_suffix) in rest:
            found = {"": (*where, stem + names.image_suffix)}
        else:  # channels, or an image of another name that is alone with its mask
            found = {
                k[-1][len(stem) :]: k for k in rest if k[:-1] == where and k[-1].startswith(stem)
            }
        if not found:
            raise ValueError(f"{files.images[key]} is a mask without an image beside it")
        kinds.setdefault(tuple(sorted(found)) if len(found) > 1 else 1, files.images[key])
        paths = tuple(rest[found[end]] for end in sorted(found))
        used |= {*found.values()}
        name = (*where, stem) if stem else where
        cases[name] = Case("", paths, ((files.images[key],),))
    if len(kinds) > 1:
        first, second, *_ = kinds.values()
        raise ValueError(f"beside {first} and {second} lie different channels of an image")
    unused = [path for key, path in rest.items() if key not in used] + files.others
    lone = [path for path in unused if suffix_of(path)]
    if lone and not names.skip_unpaired and not lists_of(folder):
        raise ValueError(
            f"{lone[0]} has no mask beside it; data.skip_unpaired=true leaves such images out"
        )
    [kind, *_] = kinds
    ends = [end.strip("-_. ") for end in kind] if isinstance(kind, tuple) else []
    notes = (f"the channels of an image are {', '.join(ends)}",) if ends else ()
    return Pairs(cases, unused=unused, notes=notes)
