"""Finds the images and masks of a folder, and which of them train, validate and test."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from losswatch.data.cases import Case
from losswatch.data.datasets import describes, read_dataset, read_json
from losswatch.data.formats import SUFFIXES, stem_of, suffix_of
from losswatch.data.labels import REST
from losswatch.data.matching import Names
from losswatch.data.pairs import MASK_FOLDERS, find_pairs
from losswatch.data.splits import (
    Layout,
    complete,
    lists_of,
    split_by_lists,
    split_by_share,
    split_of,
    with_names,
)
from losswatch.data.tree import Key, files_below, parts_of
from losswatch.text import nearby, number_of


def read_layout(
    root: Path, names: Names, shares: Mapping[str, float], files: Iterable[str]
) -> Layout:
    """Find the cases of a folder.

    Args:
        shares: of "val" and "test", for a folder that is not split.
        files: all files below the folder.

    Raises:
        ValueError: the folder holds no images, or an image and a mask do not form a pair.
    """
    if not root.is_dir():
        raise ValueError(f"data.root={root}: there is no such folder")
    file, notes = root / "dataset.json", []
    if file.is_file():
        about = read_json(file)
        if describes(about) or not (root / names.images).is_dir():
            layout = read_dataset(root, about, shares)
            used = [file, root / "splits_final.json"]
            return layout._replace(notes=(*layout.notes, *_unused(root, layout, files, used)))
        notes.append(f"{file.name} has no labels, and is not read")
    layout, used = _found(root, names, shares)
    used.append(file)
    notes += [*layout.notes, *_unused(root, layout, files, used)]
    return layout._replace(notes=tuple(notes))


def _found(root: Path, names: Names, shares: Mapping[str, float]) -> tuple[Layout, list[Path]]:
    """The layout of a folder without dataset.json, and the files that list its split."""
    pairs = find_pairs(root, names)
    cases, kinds = pairs.cases, pairs.kinds
    if not cases:
        raise ValueError(f"{root} holds no image with a mask")
    classes: dict[str, Any] | None = dict.fromkeys(kinds, REST) or None
    if len(kinds) == 1:
        classes = {"background": 0, kinds[0]: REST}
    notes = list(pairs.notes)
    for i, kind in enumerate(kinds):
        if empty := [case.images[0] for case in cases.values() if not case.masks[i]]:
            have = f"{empty[0]} and {len(empty) - 1} more have" if empty[1:] else f"{empty[0]} has"
            notes.append(f"{have} no mask of class {kind}, which is taken for an empty one")
    parts, lists = split_of(root, cases), {}
    if parts is None and (lists := lists_of(root)):
        parts, left = split_by_lists(lists, cases, names.image_suffix)
        notes.append(f"the split is that of {nearby(lists['train'], root)} and its neighbours")
        notes += left
    if parts is None:
        parts = split_by_share(with_names(cases), shares)
    else:
        parts, more = complete(parts, shares)
        notes += more
    layout = Layout(parts, classes, None, kinds, len(kinds) > 1, None, tuple(notes))
    return layout, [*lists.values()]


def _unused(root: Path, layout: Layout, files: Iterable[str], others: Iterable[Path]) -> list[str]:
    """One line about the files below a folder that are not read.

    Args:
        others: files that are read and are neither images nor masks.
    """
    cases = [case for part in layout.cases.values() for case in part]
    read = [part for case in cases for path in case.files for part in parts_of(path)]
    used = {os.path.abspath(path) for path in (*others, *read)}
    left = [Path(name) for name in files if os.path.abspath(name) not in used]
    if not left:
        return []
    kinds: dict[str, int] = {}
    for file in left:
        kind = suffix_of(file) or file.suffix or "without suffix"
        kinds[kind] = kinds.get(kind, 0) + 1
    counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    first = nearby(left[0], root)
    return [f"not used: {number_of(len(left), 'file')} ({counted}), {first} is the first"]


def unlabelled(root: Path, channels: int) -> list[Case]:
    """The images of a folder, or of its folder images/, for prediction.

    Args:
        channels: the number that the network reads.

    Raises:
        ValueError: there is no folder, or it holds no images.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; it must hold images")
    inner = (root / name for name in ("images", "imagesTs"))
    folder = next((path for path in inner if path.is_dir()), root)
    files = {key: path for key, path in files_below(folder).images.items()
             if not any(part.lower() in MASK_FOLDERS for part in key[:-1])}  # fmt: skip
    if not files:
        raise ValueError(f"{folder} holds no images; known are {', '.join(SUFFIXES)}")
    groups: dict[Key, list[Path]] = {}
    for key, path in files.items():
        if re.search(r"_\d{4}$", key[-1]):
            groups.setdefault((*key[:-1], key[-1][:-5]), []).append(path)
    # Frames of a video can have such names, too. A case of nnU-Net has all numbers from 0 on.
    wanted = [f"_{i:04}" for i in range(channels)]
    is_nnunet = sum(map(len, groups.values())) == len(files) and all(
        [stem_of(path)[-5:] for path in paths] == wanted for paths in groups.values()
    )
    if is_nnunet and (channels > 1 or folder.name == "imagesTs"):
        return with_names({key: Case("", tuple(paths)) for key, paths in groups.items()})
    return with_names({key: Case("", (path,)) for key, path in files.items()})
