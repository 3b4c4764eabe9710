"""Splits cases into training, validation and test: by folders, by lists or by shares."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from losswatch.data.cases import Case
from losswatch.data.formats import stem_of
from losswatch.data.tree import Key, normal
from losswatch.text import number_of

SPLITS = ("train", "val", "test")
Parts = dict[str, list[Case]]  # cases by split


class Layout(NamedTuple):
    """The images and masks of a folder.

    Attributes:
        cases: by split.
        classes: as in data.classes, if the layout names them.
        ignored: the value in a mask of pixels that do not count.
        kinds: the classes, if each has its own mask.
        overlap: whether classes may overlap.
        channels: those of an image, if the layout names them.
        notes: what the owner of the files should know.
    """

    cases: Parts
    classes: Mapping[str, Any] | None = None
    ignored: int | None = None
    kinds: tuple[str, ...] = ()
    overlap: bool = False
    channels: int | None = None
    notes: tuple[str, ...] = ()


def complete(parts: Parts, shares: Mapping[str, float]) -> tuple[Parts, list[str]]:
    """All splits of a folder that has "train" and perhaps others, and notes about them."""
    if "val" in parts:
        return parts, []
    rest = {"val": shares["val"], "test": 0.0 if "test" in parts else shares["test"]}
    note = "there is no validation: a share of the training images is taken"
    return parts | split_by_share(parts["train"], rest), [note]


def split_by_share(cases: Sequence[Case], shares: Mapping[str, float]) -> Parts:
    """Split cases by a hash of their names, the same way each time and on each machine."""
    mixed = sorted(cases, key=lambda c: hashlib.sha256(c.name.encode(errors="replace")).digest())
    counts = {
        split: max(1, round(share * len(cases))) if share else 0 for split, share in shares.items()
    }
    if sum(counts.values()) >= len(cases):
        asked = " and ".join(f"{count} for {split}" for split, count in counts.items() if count)
        is_some = len(cases) > 1 and counts["test"]
        way = "data.test_share=0 keeps some" if is_some else "cut it into several"
        raise ValueError(
            f"of {number_of(len(cases), 'image')} none is left to train with, after {asked}; add "
            f"images, or {way}"
        )
    found: Parts = {}
    for split, count in counts.items():
        found[split], mixed = mixed[:count], mixed[count:]
    parts = {"train": mixed} | found
    return {split: sorted(part) for split, part in parts.items() if part}


def add_case(cases: dict[Key, Case], key: Key, case: Case, called: str) -> None:
    """Add a case by its key.

    Args:
        called: its name in a message.

    Raises:
        ValueError: another case has this key.
    """
    if (other := cases.setdefault(key, case)) is not case:
        raise ValueError(
            f"{other.images[0]} and {case.images[0]} are both called {called}; rename one, or "
            "leave one folder out"
        )


def split_of(root: Path, cases: Mapping[Key, Case]) -> Parts | None:
    """The cases by split, if a part of each path names one; None if no path does.

    Raises:
        ValueError: only some cases are in a split, or there are no training cases.
    """
    parts: dict[str, dict[Key, Case]] = {}
    for key, case in cases.items():
        at = next((i for i, part in enumerate(key[:-1]) if part in SPLITS), None)
        split, rest = ("", key) if at is None else (key[at], (*key[:at], *key[at + 1 :]))
        add_case(parts.setdefault(split, {}), rest, case, f"{'/'.join(rest)} in {split}")
    if parts.keys() <= {""}:
        return None
    if "" in parts:
        case = next(iter(parts[""].values()))
        raise ValueError(
            f"{case.images[0]} is in none of the folders of a split, {', '.join(parts)}; move it"
        )
    if "train" not in parts:
        raise ValueError(f"data.root={root} has {' and '.join(parts)}/, but no train/")
    return {split: with_names(parts[split]) for split in SPLITS if split in parts}


def with_names(cases: Mapping[Key, Case]) -> list[Case]:
    """The cases with names: the last parts of their keys if these differ, else the whole keys."""
    last = {key[-1] for key in cases}
    short = len(last) == len(cases)
    return [case._replace(name=key[-1] if short else "/".join(key)) for key, case in cases.items()]


# --- Lists of names -------------------------------------------------------------------------------


def lists_of(root: Path) -> dict[str, Path]:
    """The text files that list each split: ImageSets/Segmentation/train.txt, or train.txt."""
    for folder in (root / "ImageSets" / "Segmentation", root / "ImageSets", root):
        found = {split: folder / f"{split}.txt" for split in SPLITS}
        if found["train"].is_file():
            return {split: path for split, path in found.items() if path.is_file()}
    return {}


def split_by_lists(
    lists: Mapping[str, Path], cases: Mapping[Key, Case], suffix: str
) -> tuple[Parts, list[str]]:
    """The cases by split according to lists, and notes about the split.

    Args:
        lists: see `lists_of`.
        suffix: the text after the name of an image in its file. The lists may have it, too.

    Raises:
        ValueError: a list cannot be read, or names an image that does not exist, that could be one
            of two, that has no mask, or that is in another list, too.
    """
    by_end: dict[Key, list[Key]] = {}  # keys by each of their ends
    for key in cases:
        for start in range(len(key)):
            by_end.setdefault(key[start:], []).append(key)
    names = {key: case.name for key, case in zip(cases, with_names(cases), strict=True)}
    parts: Parts = {}
    lost: list[str] = []
    seen: dict[Key, Path] = {}
    for split, file in lists.items():
        for line in _lines(file):
            found = next((keys for end in _ends(line, suffix) if (keys := by_end.get(end))), [])
            if len(found) > 1:
                both = " and ".join("/".join(key) for key in found[:2])
                raise ValueError(f"{file} names {line}, which could be {both}; write the folder")
            if not found and split == "test":  # often without masks
                lost.append(line)
                continue
            if not found:
                raise ValueError(f"{file} names {line}, of which there is no image with a mask")
            [key] = found
            if key in seen:
                where = "twice" if seen[key] == file else f"and so does {seen[key]}"
                raise ValueError(f"{file} names {line} {where}; remove one")
            seen[key] = file
            parts.setdefault(split, []).append(cases[key]._replace(name=names[key]))
    for split, file in lists.items():
        if split not in parts and split != "test":
            raise ValueError(f"{file} names no image; write a name on each line, or remove it")
    names_of = number_of(len(lost), "image")
    return parts, [f"test.txt names {names_of} without a mask, {lost[0]} first"] if lost else []


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8; save it as such") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _ends(line: str, suffix: str) -> list[Key]:
    """The keys that a line may mean: all parts of a path, then fewer. A mask may stand behind."""
    ends: list[Key] = []
    for text in (line, line.split()[0]):
        *folders, last = Path(normal(text).replace("\\", "/")).parts
        stem = stem_of(Path(last))
        parts = (*folders, stem.removesuffix(suffix) if suffix else stem)
        ends += [parts[start:] for start in range(len(parts))]
    return ends
