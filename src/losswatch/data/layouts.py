"""Where images and masks are in a folder, and which of them train, validate and test."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from losswatch.data.cases import Case
from losswatch.data.datasets import read_dataset
from losswatch.data.files import Key, files_below, is_hidden
from losswatch.data.labels import REST
from losswatch.data.matching import Names
from losswatch.data.pairs import find_pairs
from losswatch.data.reading import SUFFIXES, stem_of, suffix_of
from losswatch.data.splits import Layout, complete, listed, named, split_of
from losswatch.text import number_of


def read_layout(root: Path, names: Names, shares: Mapping[str, float]) -> Layout:
    """Find the cases of a folder.

    Args:
        shares: of "val" and "test", where the folder is not split.

    Raises:
        ValueError: the folder holds no images, or an image and a mask do not pair.
    """
    if not root.is_dir():
        raise ValueError(f"data.root={root}: there is no such folder")
    if (root / "dataset.json").is_file():
        return read_dataset(root, shares)
    found = find_pairs(root, names)
    if not found.cases:
        raise ValueError(f"{root} holds no image with a mask")
    cases, kinds = found.cases, found.kinds
    notes = [*found.notes, *_unused(root, found.unused, cases.values())]
    classes: dict[str, Any] | None = dict.fromkeys(kinds, REST) or None
    if len(kinds) == 1:
        classes = {"background": 0, kinds[0]: REST}
    for i, kind in enumerate(kinds):
        if empty := [case.images[0] for case in cases.values() if not case.masks[i]]:
            have = f"{empty[0]} and {len(empty) - 1} more have" if empty[1:] else f"{empty[0]} has"
            notes.append(f"{have} no mask of class {kind}, which is taken for an empty one")
    if split := split_of(cases):
        parts = split
    elif lists := listed(root, cases, names.image_suffix):
        parts, left = lists
        notes.append(f"the split is that of the lists {left}")
    else:
        parts = {"": named(cases)}
    parts, more = complete(root, parts, shares)
    return Layout(parts, classes, None, len(kinds) > 1, None, (*notes, *more))


def _unused(root: Path, paths: Sequence[Path], cases: Iterable[Case]) -> list[str]:
    """One line about the files that are not used, and one about the folders."""
    seen = [path for case in cases for part in (case.images, *case.masks) for path in part]
    heads = {path.relative_to(root).parts[0] for path in (*seen, *paths)} | {"ImageSets"}
    folders = [p.name for p in sorted(root.iterdir()) if p.is_dir() and not is_hidden(p.name)]
    left = [f"{name}/" for name in folders if name not in heads]
    notes = [f"not used: {', '.join(left)}"] if left else []
    if not paths:
        return notes
    kinds: dict[str, int] = {}
    for path in paths:
        kind = suffix_of(path) or path.suffix or "without suffix"
        kinds[kind] = kinds.get(kind, 0) + 1
    counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    first = paths[0].relative_to(root)
    return [*notes, f"not used: {number_of(len(paths), 'file')} ({counted}), {first} is the first"]


def unlabelled(root: Path, channels: int) -> list[Case]:
    """The images of a folder, or of its folder images/, for prediction.

    Args:
        channels: of an image as the network has them.

    Raises:
        ValueError: there are none.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; it is to hold images")
    inner = (root / name for name in ("images", "imagesTs"))
    folder = next((path for path in inner if path.is_dir()), root)
    files = files_below(folder).images
    if not files:
        raise ValueError(f"{folder} holds no images; known are {', '.join(SUFFIXES)}")
    groups: dict[Key, list[Path]] = {}
    for key, path in files.items():
        if re.search(r"_\d{4}$", key[-1]):
            groups.setdefault((*key[:-1], key[-1][:-5]), []).append(path)
    # Frames of a video have such names, too. A case of nnU-Net has each number from 0 on.
    wanted = [f"_{i:04}" for i in range(channels)]
    is_nnunet = sum(map(len, groups.values())) == len(files) and all(
        [stem_of(path)[-5:] for path in paths] == wanted for paths in groups.values()
    )
    if is_nnunet and (channels > 1 or folder.name == "imagesTs"):
        return named({key: Case("", tuple(paths)) for key, paths in groups.items()})
    return named({key: Case("", (path,)) for key, path in files.items()})
