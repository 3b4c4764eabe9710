"""Where images and masks are in a folder: images/ and masks/, or the layout of nnU-Net v2."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from losswatch.data.reading import SUFFIXES, stem_of, suffix_of

SPLITS = ("train", "val", "test")
REST = "rest"  # stands for all values of a mask that no other class has

# The values in a mask of each class: a number, several, or REST.
Classes = Mapping[str, Any]


class Case(NamedTuple):
    """An image and what is known of it."""

    name: str
    images: tuple[Path, ...]  # one file, or one for each channel
    masks: tuple[Path, ...] = ()  # one file, or one for each class; none if it has no label


class Layout(NamedTuple):
    """What a folder holds."""

    cases: dict[str, list[Case]]  # by split
    classes: Classes | None  # as far as the layout names them
    ignored: int | None  # the value in a mask of pixels that count nowhere
    overlap: bool  # whether classes may overlap


def read_layout(
    root: Path,
    images: str,
    masks: str,
    image_suffix: str,
    mask_suffix: str,
    shares: Mapping[str, float],
) -> Layout:
    """Find the cases of a folder.

    Args:
        images, masks: names of the folders of images and masks.
        image_suffix, mask_suffix: what follows the common name of a pair, as in 01_mask.png.
        shares: of "val" and "test", where the folder is not split.

    Raises:
        ValueError: the folder holds no images, or an image and a mask do not pair.
    """
    if not root.is_dir():
        raise ValueError(f"data.root={root}: there is no such folder")
    if (root / "dataset.json").is_file():
        return _read_nnunet(root, shares)
    folders = [split for split in SPLITS if (root / split).is_dir()]
    if not folders:
        cases, overlap, names = _pairs(root, images, masks, image_suffix, mask_suffix)
        return Layout(split_by_share(cases, shares), names, None, overlap)
    missing = [split for split in ("train", "val") if split not in folders]
    if missing:
        raise ValueError(f"data.root={root} has {' and '.join(folders)}/, but no {missing[0]}/")
    found = {split: _pairs(root / split, images, masks, image_suffix, mask_suffix)
             for split in folders}  # fmt: skip
    if len({(overlap, str(names)) for _, overlap, names in found.values()}) > 1:
        raise ValueError(f"data.root={root}: {masks}/ of the splits hold different classes")
    _, overlap, names = found["train"]
    return Layout({split: cases for split, (cases, *_) in found.items()}, names, None, overlap)


def _pairs(
    root: Path, images: str, masks: str, image_suffix: str, mask_suffix: str
) -> tuple[list[Case], bool, Classes | None]:
    """The cases of images/ and masks/, whether classes overlap, and their names if so."""
    pictures = _files(root / images, image_suffix)
    if not (root / masks).is_dir():
        raise ValueError(f"{root / masks} is no folder; it is to hold the masks")
    kinds = sorted(path for path in (root / masks).iterdir() if path.is_dir())
    found = [_files(folder, mask_suffix) for folder in kinds or [root / masks]]
    for labels in found:
        for name, path in labels.items():
            if name not in pictures:
                raise ValueError(f"{path} is a mask without an image in {root / images}")
        for name, path in pictures.items():
            if name not in labels:
                where = next(iter(labels.values())).parent
                raise ValueError(f"{path} is an image without a mask in {where}")
    cases = [
        Case(name, (path,), tuple(labels[name] for labels in found))
        for name, path in pictures.items()
    ]
    # In a folder for each class all values but 0 are the class.
    names = {folder.name: REST for folder in kinds} or None
    return cases, bool(kinds), names


def _files(folder: Path, suffix: str) -> dict[str, Path]:
    """The image files of a folder by the name that a pair has in common, sorted."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; it is to hold images")
    files = [path for path in sorted(folder.iterdir()) if suffix_of(path)]
    files = [path for path in files if stem_of(path).endswith(suffix) and path.name[0] != "."]
    if not files:
        what = f" whose names end in {suffix!r}" if suffix else ""
        raise ValueError(f"{folder} holds no images{what}; known are {', '.join(SUFFIXES)}")
    found: dict[str, Path] = {}
    for path in files:
        name = stem_of(path)[: len(stem_of(path)) - len(suffix)]
        if name in found:
            raise ValueError(f"{found[name]} and {path} have the same name")
        found[name] = path
    return found


def split_by_share(cases: Sequence[Case], shares: Mapping[str, float]) -> dict[str, list[Case]]:
    """Split cases by a hash of their names, the same way each time and on each machine."""
    mixed = sorted(cases, key=lambda case: hashlib.sha256(case.name.encode()).digest())
    counts = {
        split: max(1, round(share * len(cases))) if share else 0 for split, share in shares.items()
    }
    if sum(counts.values()) >= len(cases):
        asked = " and ".join(f"{count} for {split}" for split, count in counts.items())
        raise ValueError(f"{len(cases)} images leave none to train with, after {asked}")
    found: dict[str, list[Case]] = {}
    for split, count in counts.items():
        found[split], mixed = mixed[:count], mixed[count:]
    parts = {"train": mixed} | found
    return {split: sorted(part) for split, part in parts.items() if part}


def _read_nnunet(root: Path, shares: Mapping[str, float]) -> Layout:
    """The cases of nnU-Net's layout: imagesTr/<case>_0000.png, labelsTr/<case>.png.

    imagesTs and labelsTs, where both are there, are the test.
    """
    about = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
    try:
        ending, channels, labels = about["file_ending"], about["channel_names"], about["labels"]
    except KeyError as error:
        raise ValueError(
            f"{root / 'dataset.json'} has no {error}, which nnU-Net v2 needs"
        ) from None
    if ending.lower() not in SUFFIXES:
        raise ValueError(f"{root}: files {ending} cannot be read; known are {', '.join(SUFFIXES)}")
    ignored = labels.get("ignore")
    classes = {name: value for name, value in labels.items() if name != "ignore"}
    overlap = any(isinstance(value, list) for value in classes.values())
    if overlap:  # regions; the background is where there is none
        classes.pop("background", None)
    found = _nnunet_cases(root, "Tr", ending, len(channels))
    if (root / "labelsTs").is_dir():
        rest = {"val": shares["val"] or 0.2, "test": 0.0}
        cases = split_by_share(found, rest) | {"test": _nnunet_cases(root, "Ts", ending,
                                                                     len(channels))}  # fmt: skip
    else:
        cases = split_by_share(found, shares)
    return Layout(cases, classes, ignored, overlap)


def _nnunet_cases(root: Path, part: str, ending: str, channels: int) -> list[Case]:
    labels = sorted((root / f"labels{part}").glob(f"*{ending}"))
    if not labels:
        raise ValueError(f"{root / f'labels{part}'} holds no files {ending}")
    cases = []
    for label in labels:
        name = label.name[: -len(ending)]
        files = [root / f"images{part}" / f"{name}_{i:04}{ending}" for i in range(channels)]
        for file in files:
            if not file.is_file():
                raise ValueError(f"{label} is a mask without an image {file}")
        cases.append(Case(name, tuple(files), (label,)))
    known = {file for case in cases for file in case.images}
    for file in sorted((root / f"images{part}").glob(f"*{ending}")):
        if file not in known:
            raise ValueError(f"{file} is an image without a mask in {root / f'labels{part}'}")
    return cases


def unlabelled(root: Path) -> list[Case]:
    """The images of a folder, or of its folder images/, for prediction.

    Channels of nnU-Net's layout (<case>_0000, <case>_0001) belong together.

    Raises:
        ValueError: there are none.
    """
    folder = next((root / name for name in ("images", "imagesTs") if (root / name).is_dir()), root)
    files = _files(folder, "")
    if not all(name[-5:-4] == "_" and name[-4:].isdigit() for name in files):
        return [Case(name, (path,)) for name, path in files.items()]
    groups: dict[str, list[Path]] = {}
    for name, path in files.items():
        groups.setdefault(name[:-5], []).append(path)
    return [Case(name, tuple(paths)) for name, paths in groups.items()]
