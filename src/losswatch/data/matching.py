"""Which mask is that of which image, by the names of the files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from losswatch.data.cases import Case
from losswatch.data.files import WORDS, Files, Key, files_below, normal
from losswatch.data.reading import SUFFIXES, stem_of, suffix_of
from losswatch.data.splits import lists_of

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
        unused: files that are not read.
        notes: what was found.
    """

    cases: dict[Key, Case]
    kinds: tuple[str, ...] = ()
    unused: Sequence[Path] = ()
    notes: tuple[str, ...] = ()


class NoMasks(ValueError):
    """There are images, but no masks."""


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
    pictures, others = _ending(there, names.image_suffix)
    labels, rest = _ending(masks_there, names.mask_suffix)
    unused = [*others, *rest, *there.others, *masks_there.others]
    notes: tuple[str, ...] = ()
    if labels.keys() & pictures.keys():
        if all(key in labels for key in pictures):  # then folders beside the masks are not read
            unused += [path for key, path in labels.items() if key not in pictures and len(key) > 1]
            labels = {k: path for k, path in labels.items() if k in pictures or len(k) == 1}
    elif is_one and len(pictures) == 1:
        [(key, path)] = pictures.items()
        return Pairs({key: Case("", (path,), (tuple(labels.values()),))}, unused=unused)
    elif parted := _by_class(pictures, labels):
        return _of_classes(pictures, parted, names, images)._replace(unused=unused)
    elif paired := _by_common_parts(pictures, labels):
        labels = paired
        path, mask = next((pictures[key], mask) for key, mask in labels.items())
        notes = (f"{mask.name} is taken for the mask of {path.name}, and so on",)
    unused += _unpaired(pictures, labels, names, there, masks_there)
    both = [key for key in pictures if key in labels]
    cases = {key: Case("", (pictures[key],), ((labels[key],),)) for key in both}
    return Pairs(cases, unused=unused, notes=notes)


def _ending(files: Files, suffix: str) -> tuple[dict[Key, Path], list[Path]]:
    """The files whose stems end like this, by their key without it; and the others."""
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
    return found, [path for key, path in files.images.items() if not key[-1].endswith(end)]


def _unpaired(
    pictures: Mapping[Key, Path],
    labels: Mapping[Key, Path],
    names: Names,
    images: Files,
    masks: Files,
) -> list[Path]:
    """The files that have no counterpart, where they may be left out.

    Raises:
        ValueError: they may not.
    """
    lone_images = [path for key, path in pictures.items() if key not in labels]
    lone_masks = [path for key, path in labels.items() if key not in pictures]
    if names.skip_unpaired or lists_of(images.folder.parent):
        return lone_masks + lone_images
    ways = "data.skip_unpaired=true leaves such files out"
    if not labels.keys() & pictures.keys():
        ways += ", data.image_suffix and data.mask_suffix tell the names of a pair apart"
    for lone, what, other in (
        (lone_masks, "a mask without an image", images),
        (lone_images, "an image without a mask", masks),
    ):
        for path in lone:
            start = normal(stem_of(path)) + "."
            unread = [p.name for p in other.others if normal(p.name).startswith(start)]
            hint = f", where {unread[0]} is, which cannot be read" if unread else ""
            raise ValueError(f"{path} is {what} in {other.folder}{hint}; {ways}")
    return []


Parted = dict[Key, dict[str, Path]]  # masks by the key of their image and by class


def _by_class(pictures: Mapping[Key, Path], labels: Mapping[Key, Path]) -> Parted | None:
    """The masks where they lie in a folder for each class, at the same depth in all paths."""
    for depth in range(max(len(key) for key in labels) - 1):
        parted: Parted = {}
        for key, path in labels.items():
            if len(key) > depth + 1 and key[depth].lower() not in WORDS:
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


def beside(folder: Path, names: Names) -> Pairs:
    """The pairs of one folder, where an image and its mask lie beside each other.

    A mask is called like its image, with an ending. What else is called so is a channel. A .npz
    holds both.

    Raises:
        ValueError: there are no masks, or they have no image.
    """
    files = files_below(folder)
    if files.images and all(suffix_of(path) == ".npz" for path in files.images.values()):
        cases = {key: Case("", (path,), ((path,),)) for key, path in files.images.items()}
        return Pairs(cases, unused=files.others)
    suffix = names.mask_suffix
    masks = {
        key: key[-1].removesuffix(suffix) if suffix else ENDING.sub("", key[-1])
        for key in files.images
        if (key[-1].endswith(suffix) if suffix else ENDING.search(key[-1]))
    }
    rest = {key: path for key, path in files.images.items() if key not in masks}
    if not masks and not suffix:
        labels = {key: path for key, path in rest.items() if BEGINNING.search(key[-1])}
        pictures = {key: path for key, path in rest.items() if key not in labels}
        if labels and (paired := _by_common_parts(pictures, labels)):
            cases = {k: Case("", (pictures[k],), ((path,),)) for k, path in paired.items()}
            return Pairs(cases, unused=files.others)
    if not masks:
        what = f"that end in {suffix}" if suffix else "in masks/, or that end in _mask"
        inside = sorted(p.name for p in folder.iterdir() if p.is_dir())[:3]
        hint = f"; it holds {', '.join(inside)}" if inside else ""
        raise NoMasks(
            f"{folder} holds no masks {what}{hint}; data.images, data.masks and data.mask_suffix "
            "say where they are"
        )
    cases = {}
    channels: dict[tuple[str, ...], Path] = {}  # by what their names end in, and a mask of such
    for key, stem in masks.items():
        where, own = key[:-1], (*key[:-1], stem + names.image_suffix)
        found = [own] if own in rest else [
            k for k in rest if k[:-1] == where and k[-1].startswith(stem)]  # fmt: skip
        if not found and not names.skip_unpaired:
            raise ValueError(f"{files.images[key]} is a mask without an image beside it")
        ends = tuple(k[-1][len(stem) :].strip("-_. ") for k in found)
        channels.setdefault(ends if len(ends) > 1 else (), files.images[key])
        paths = tuple(rest[k] for k in found)
        if paths:
            cases[(*where, stem) if stem else where] = Case("", paths, ((files.images[key],),))
    if len(channels) > 1:
        first, second, *_ = channels.values()
        raise ValueError(f"beside {first} and {second} lie different channels of an image")
    used = {path for case in cases.values() for path in case.images}
    lone = [path for path in rest.values() if path not in used]
    if lone and not names.skip_unpaired and not lists_of(folder):
        raise ValueError(
            f"{lone[0]} has no mask beside it; data.skip_unpaired=true leaves such images out"
        )
    [ends] = channels
    notes = (f"the channels of an image are {', '.join(ends)}",) if ends else ()
    return Pairs(cases, unused=lone + files.others, notes=notes)
