"""Finds the mask of each image, by the names of the files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from losswatch.data.cases import Case
from losswatch.data.formats import SUFFIXES, stem_of, suffix_of
from losswatch.data.splits import lists_of
from losswatch.data.tree import WORDS, Files, Key, files_below, normal

# How the name of a mask ends, or begins, if it lies beside its image.
ENDING = re.compile(r"(?:^|[-_. ])(masks?|labels?|seg|segmentation|gt)$", re.IGNORECASE)
BEGINNING = re.compile(r"^(masks?|labels?|seg|segmentation|gt)[-_. ]", re.IGNORECASE)


class Names(NamedTuple):
    """The names of folders and files in a data set: settings of `FolderImages`.

    Attributes:
        images, masks: the folders.
        image_suffix, mask_suffix: the text after the common name of a pair, as in 01_mask.png.
        skip_unpaired: whether images without a mask and masks without an image are left out.
    """

    images: str = "images"
    masks: str = "masks"
    image_suffix: str = ""
    mask_suffix: str = ""
    skip_unpaired: bool = False


class Pairs(NamedTuple):
    """Images and masks that belong together.

    Attributes:
        cases: cases without names, by their key, which may contain a split.
        kinds: the classes, if each has its own mask.
        notes: what the owner of the files should know.
    """

    cases: dict[Key, Case]
    kinds: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class NoMasks(ValueError):
    """There are images, but no masks."""


# --- In two folders -------------------------------------------------------------------------------


def match(images: Path, masks: Path, names: Names, is_one: bool = False) -> Pairs:
    """The pairs of a folder of images and a folder of masks.

    Args:
        is_one: whether the folders belong to one image, whose masks are joined.

    Raises:
        ValueError: an image or a mask has no partner.
    """
    if images.resolve() == masks.resolve():
        return beside(images, names)
    there, masks_there = files_below(images), files_below(masks)
    pictures = _with_ending(there, names.image_suffix)
    labels = _with_ending(masks_there, names.mask_suffix)
    notes: tuple[str, ...] = ()
    if labels.keys() & pictures.keys():
        if all(key in labels for key in pictures):  # do not read folders beside the masks
            labels = {k: path for k, path in labels.items() if k in pictures or len(k) == 1}
    elif is_one and len(pictures) == 1:
        [(key, path)] = pictures.items()
        return Pairs({key: Case("", (path,), (tuple(labels.values()),))})
    elif all(key[:-1] in pictures for key in labels):
        return _of_objects(pictures, labels)
    elif parted := _by_class(pictures, labels):
        return _of_classes(pictures, parted, names, images)
    elif paired := _by_common_parts(pictures, labels):
        labels = paired
        path, mask = next((pictures[key], mask) for key, mask in labels.items())
        notes = (f"{mask.name} is taken for the mask of {path.name}, and so on",)
    _check_pairs(pictures, labels, names, there, masks_there)
    both = [key for key in pictures if key in labels]
    cases = {key: Case("", (pictures[key],), ((labels[key],),)) for key in both}
    return Pairs(cases, notes=notes)


def _with_ending(files: Files, suffix: str) -> dict[Key, Path]:
    """The files whose stems have this ending, by their key without the ending."""
    end = normal(suffix)
    found = {(*key[:-1], key[-1].removesuffix(end)): path
             for key, path in files.images.items() if key[-1].endswith(end)}  # fmt: skip
    if not found:
        what = f" whose names end in {suffix!r}" if suffix and files.images else ""
        endings = sorted({path.suffix for path in files.others})
        have = f"; it holds {', '.join(endings)}" if endings and not files.images else ""
        raise ValueError(
            f"{files.folder} holds no images{what}; known are {', '.join(SUFFIXES)}{have}"
        )
    return found


def _check_pairs(
    pictures: Mapping[Key, Path],
    labels: Mapping[Key, Path],
    names: Names,
    images: Files,
    masks: Files,
) -> None:
    """Check that each image has a mask and each mask an image, if the settings demand it.

    Raises:
        ValueError: an image or a mask has no partner.
    """
    if names.skip_unpaired or lists_of(images.folder.parent):
        return
    ways = "data.skip_unpaired=true leaves such files out"
    if not labels.keys() & pictures.keys():
        ways += ", data.image_suffix and data.mask_suffix tell the names of a pair apart"
    for some, others, what, folder in (
        (labels, pictures, "a mask without an image", images),
        (pictures, labels, "an image without a mask", masks),
    ):
        for path in (path for key, path in some.items() if key not in others):
            start = normal(stem_of(path)) + "."
            unread = [p.name for p in folder.others if normal(p.name).startswith(start)]
            hint = f", where {unread[0]} is, which cannot be read" if unread else ""
            raise ValueError(f"{path} is {what} in {folder.folder}{hint}; {ways}")


def _of_objects(pictures: Mapping[Key, Path], labels: Mapping[Key, Path]) -> Pairs:
    """The pairs if each image has a folder of masks, which are joined."""
    masks: dict[Key, list[Path]] = {key: [] for key in pictures}
    for key, path in labels.items():
        masks[key[:-1]].append(path)
    cases = {key: Case("", (path,), (tuple(masks[key]),)) for key, path in pictures.items()}
    empty = [case.images[0] for case in cases.values() if not case.masks[0]]
    notes = [f"{path} has no mask, which is taken for an empty one" for path in empty]
    return Pairs(cases, notes=("the masks of each image are joined", *notes))


Parted = dict[Key, dict[str, Path]]  # masks by the key of their image and by class


def _by_class(pictures: Mapping[Key, Path], labels: Mapping[Key, Path]) -> Parted | None:
    """The masks if each class has a folder, at the same depth in all paths; otherwise None."""
    for depth in range(max(len(key) for key in labels) - 1):
        if all(key[depth] in WORDS for key in labels if len(key) > depth + 1):
            continue
        parted: Parted = {}
        for key, path in labels.items():
            if len(key) > depth + 1:
                parted.setdefault((*key[:depth], *key[depth + 1 :]), {})[key[depth]] = path
        if any(key in pictures for key in parted):
            return parted
    return None


def _of_classes(pictures: Mapping[Key, Path], parted: Parted, names: Names, images: Path) -> Pairs:
    lone = [path for key, masks in parted.items() if key not in pictures for path in masks.values()]
    if lone and not names.skip_unpaired:
        raise ValueError(
            f"{lone[0]} is a mask without an image in {images}; data.skip_unpaired=true leaves "
            "such files out"
        )
    kinds = tuple(sorted({name for masks in parted.values() for name in masks}))
    cases = {}
    for key, path in pictures.items():
        masks = parted.get(key, {})
        cases[key] = Case("", (path,), tuple((masks[n],) if n in masks else () for n in kinds))
    return Pairs(cases, kinds)


def _by_common_parts(
    pictures: Mapping[Key, Path], labels: Mapping[Key, Path]
) -> dict[Key, Path] | None:
    """Masks by the keys of their images, by the different parts of their names.

    The names of all images have a common part, and so have those of all masks: 21_training and
    21_manual1. The rest of both names must be equal. A common part ends at a separator. Returns
    None if the names form no pairs in this way.
    """

    def trimmed(keys: Sequence[Key]) -> dict[Key, Key]:
        stems = [key[-1] for key in keys]
        front = re.sub(r"[^-_. ]*$", "", os.path.commonprefix(stems))
        back = re.sub(r"^[^-_. ]*", "", os.path.commonprefix([s[::-1] for s in stems])[::-1])
        return {(*k[:-1], k[-1][len(front) : len(k[-1]) - len(back)]): k for k in keys}

    without_word = {(*k[:-1], ENDING.sub("", k[-1])): k for k in labels}
    for images in ({key: key for key in pictures}, trimmed([*pictures])):
        for masks in (without_word, trimmed([*labels])):
            is_whole = len(images) == len(pictures) and len(masks) == len(labels)
            if is_whole and images.keys() == masks.keys():
                return {images[key]: labels[masks[key]] for key in images}
    return None


# --- In one folder --------------------------------------------------------------------------------


def beside(folder: Path, names: Names) -> Pairs:
    """The pairs of one folder, in which an image and its mask lie side by side.

    A .npz holds both. A mask has the name of its image with an ending, or all masks begin alike.

    Raises:
        ValueError: there are no masks, or a mask has no image.
    """
    files = files_below(folder)
    if files.images and all(suffix_of(path) == ".npz" for path in files.images.values()):
        return Pairs({k: Case("", (path,), ((path,),)) for k, path in files.images.items()})
    suffix = names.mask_suffix
    masks = {
        key: key[-1].removesuffix(suffix) if suffix else ENDING.sub("", key[-1])
        for key in files.images
        if (key[-1].endswith(suffix) if suffix else ENDING.search(key[-1]))
    }
    if not masks and not suffix:
        labels = {key: path for key, path in files.images.items() if BEGINNING.search(key[-1])}
        pictures = {key: path for key, path in files.images.items() if key not in labels}
        if labels and (paired := _by_common_parts(pictures, labels)):
            return Pairs({k: Case("", (pictures[k],), ((path,),)) for k, path in paired.items()})
    if not masks:
        what = f"that end in {suffix}" if suffix else "in masks/, or that end in _mask"
        inside = sorted(p.name for p in folder.iterdir() if p.is_dir())[:3]
        hint = f"; it holds {', '.join(inside)}" if inside else ""
        raise NoMasks(
            f"{folder} holds no masks {what}{hint}; data.images, data.masks and data.mask_suffix "
            "say where they are"
        )
    return _with_equal_names(files, masks, names)


def _with_equal_names(files: Files, masks: Mapping[Key, str], names: Names) -> Pairs:
    """The pairs of an image and the mask with its name.

    Other files with that name are channels of the image.

    Args:
        masks: from the keys of masks to the names of their images.

    Raises:
        ValueError: an image or a mask has no partner, or images have different channels.
    """
    rest = {key: path for key, path in files.images.items() if key not in masks}
    cases: dict[Key, Case] = {}
    channels: dict[tuple[str, ...], Path] = {}  # by the endings of the names: a mask
    for key, stem in masks.items():
        mask, own = files.images[key], (*key[:-1], stem + names.image_suffix)
        found = [own] if own in rest else [k for k in rest if _is_channel(k, (*key[:-1], stem))]
        if not found and not names.skip_unpaired:
            raise ValueError(
                f"{mask} is a mask without an image beside it; data.skip_unpaired=true leaves such "
                "files out"
            )
        if not found:
            continue
        name = (*key[:-1], stem) if stem else key[:-1]
        if name in cases:
            raise ValueError(
                f"{cases[name].masks[0][0]} and {mask} are masks of one image; data.mask_suffix "
                "says which is read"
            )
        ends = tuple(k[-1][len(stem) :].strip("-_. ") for k in found)
        channels.setdefault(ends if len(ends) > 1 else (), mask)
        cases[name] = Case("", tuple(rest[k] for k in found), ((mask,),))
    if len(channels) > 1:
        first, second, *_ = channels.values()
        raise ValueError(
            f"beside {first} and {second} lie different channels of an image; each image needs the "
            "same"
        )
    used = {path for case in cases.values() for path in case.images}
    # With a suffix in the settings, there may also be masks with other names.
    lone = [path for key, path in rest.items() if path not in used and not ENDING.search(key[-1])]
    if lone and not names.skip_unpaired and not lists_of(files.folder):
        raise ValueError(
            f"{lone[0]} has no mask beside it; data.skip_unpaired=true leaves such images out"
        )
    ends = next(iter(channels), ())
    return Pairs(cases, notes=(f"the channels of an image are {', '.join(ends)}",) if ends else ())


def _is_channel(key: Key, name: Key) -> bool:
    """Whether the name of a file is that of an image, then a separator and a channel."""
    rest = key[-1].removeprefix(name[-1])
    is_longer = key[:-1] == name[:-1] and key[-1].startswith(name[-1])
    return is_longer and (not name[-1] or rest[:1] in ("-", "_", ".", " "))
