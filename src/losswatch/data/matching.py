"""Which mask is that of which image, by the names of the files."""

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

# How the name of a mask ends, or begins, that lies beside its image.
ENDING = re.compile(r"(?:^|[-_. ])(masks?|labels?|seg|segmentation|gt)$", re.IGNORECASE)
BEGINNING = re.compile(r"^(masks?|labels?|seg|segmentation|gt)[-_. ]", re.IGNORECASE)


class Names(NamedTuple):
    """How a data set calls its parts: settings of `FolderImages`.

    Attributes:
        images, masks: the folders.
        image_suffix, mask_suffix: what follows the common name of a pair, as in 01_mask.png.
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
        cases: without a name, by their key, which may hold a split.
        kinds: the classes, where each has a mask of its own.
        notes: what was found.
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
        is_one: whether the folders are of one image, whose masks are joined.

    Raises:
        ValueError: an image and a mask do not pair.
    """
    if images.resolve() == masks.resolve():
        return beside(images, names)
    there, masks_there = files_below(images), files_below(masks)
    pictures, labels = _ending(there, names.image_suffix), _ending(masks_there, names.mask_suffix)
    notes: tuple[str, ...] = ()
    if labels.keys() & pictures.keys():
        if all(key in labels for key in pictures):  # then folders beside the masks are not read
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


def _ending(files: Files, suffix: str) -> dict[Key, Path]:
    """The files whose stems end like this, by their key without it."""
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
    """Checks that each image has a mask and each mask an image, where that is asked for.

    Raises:
        ValueError: one does not.
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
    """The pairs where each image has a folder of masks, which are joined."""
    masks: dict[Key, list[Path]] = {key: [] for key in pictures}
    for key, path in labels.items():
        masks[key[:-1]].append(path)
    cases = {key: Case("", (path,), (tuple(masks[key]),)) for key, path in pictures.items()}
    empty = [case.images[0] for case in cases.values() if not case.masks[0]]
    notes = [f"{path} has no mask, which is taken for an empty one" for path in empty]
    return Pairs(cases, notes=("the masks of each image are joined", *notes))


Parted = dict[Key, dict[str, Path]]  # masks by the key of their image and by class


def _by_class(pictures: Mapping[Key, Path], labels: Mapping[Key, Path]) -> Parted | None:
    """The masks where they lie in a folder for each class, at the same depth in all paths."""
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
    """Masks by the keys of their images, where the names of a pair are equal but for what all
    images have in common, and all masks, such as 21_training and 21_manual1.

    What is in common ends at a separator. None: there is no such pairing.
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
    """The pairs of one folder, where an image and its mask lie beside each other.

    A .npz holds both. A mask is called like its image, with an ending, or all masks begin alike.

    Raises:
        ValueError: there are no masks, or they have no image.
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
    return _called_alike(files, masks, names)


def _called_alike(files: Files, masks: Mapping[Key, str], names: Names) -> Pairs:
    """The pairs of an image and the mask that is called like it.

    What else is called so is a channel of the image.

    Args:
        masks: the keys of masks, and what their images are called.

    Raises:
        ValueError: an image and a mask do not pair.
    """
    rest = {key: path for key, path in files.images.items() if key not in masks}
    cases: dict[Key, Case] = {}
    channels: dict[tuple[str, ...], Path] = {}  # by what their names end in, and a mask of such
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
    # Where a suffix is given, masks of other names may be there, too.
    lone = [path for key, path in rest.items() if path not in used and not ENDING.search(key[-1])]
    if lone and not names.skip_unpaired and not lists_of(files.folder):
        raise ValueError(
            f"{lone[0]} has no mask beside it; data.skip_unpaired=true leaves such images out"
        )
    ends = next(iter(channels), ())
    return Pairs(cases, notes=(f"the channels of an image are {', '.join(ends)}",) if ends else ())


def _is_channel(key: Key, name: Key) -> bool:
    """Whether a file's name is that of an image, followed by a separator and its channel."""
    rest = key[-1].removeprefix(name[-1])
    is_longer = key[:-1] == name[:-1] and key[-1].startswith(name[-1])
    return is_longer and (not name[-1] or rest[:1] in ("-", "_", ".", " "))
