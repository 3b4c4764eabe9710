"""Which cases train, validate and test: by folders, by lists of names, or by a share of all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from losswatch.data.cases import Case
from losswatch.data.files import WORDS, Key, normal
from losswatch.data.reading import stem_of
from losswatch.text import number_of

SPLITS = ("train", "val", "test")


class Layout(NamedTuple):
    """What a folder holds."""

    cases: dict[str, list[Case]]  # by split
    classes: Mapping[str, Any] | None = None  # as in data.classes, where the layout names them
    ignored: int | None = None  # the value in a mask of pixels that count nowhere
    overlap: bool = False  # whether classes may overlap
    channels: int | None = None  # of an image, where the layout names them
    notes: tuple[str, ...] = ()  # what was found or left out


def complete(
    root: Path, parts: dict[str, list[Case]], shares: Mapping[str, float]
) -> tuple[dict[str, list[Case]], list[str]]:
    """All splits, where the folder has none or some; and what to say of it."""
    if "" in parts:
        return split_by_share(parts[""], shares), []
    if "train" not in parts:
        raise ValueError(f"data.root={root} has {' and '.join(parts)}/, but no train/")
    if "val" in parts:
        return parts, []
    rest = {"val": shares["val"], "test": 0.0 if "test" in parts else shares["test"]}
    return parts | split_by_share(parts["train"], rest), [
        "there is no validation: a share of the training images is taken"
    ]


def split_of(cases: Mapping[Key, Case]) -> dict[str, list[Case]] | None:
    """The cases by split, where a part of each path names one; None where none does."""
    parts: dict[str, dict[Key, Case]] = {}
    for key, case in cases.items():
        at = next((i for i, part in enumerate(key[:-1]) if part.lower() in WORDS), None)
        split = "" if at is None else WORDS[key[at].lower()]
        rest = key if at is None else (*key[:at], *key[at + 1 :])
        if (other := parts.setdefault(split, {}).setdefault(rest, case)) is not case:
            raise ValueError(
                f"{other.images[0]} and {case.images[0]} are both called {'/'.join(rest)} in "
                f"{split}; rename one, or leave one folder out"
            )
    if parts.keys() == {""}:
        return None
    if "" in parts:
        case = next(iter(parts[""].values()))
        raise ValueError(
            f"{case.images[0]} is in none of the folders of a split, {', '.join(parts)}; move it"
        )
    return {split: named(parts[split]) for split in SPLITS if split in parts}


def named(cases: Mapping[Key, Case]) -> list[Case]:
    """The cases with short names: the last part of the key where these differ, else all parts."""
    last = {key[-1] for key in cases}
    short = len(last) == len(cases)
    return [case._replace(name=key[-1] if short else "/".join(key)) for key, case in cases.items()]


def split_by_share(cases: Sequence[Case], shares: Mapping[str, float]) -> dict[str, list[Case]]:
    """Split cases by a hash of their names, the same way each time and on each machine."""
    mixed = sorted(cases, key=lambda case: hashlib.sha256(case.name.encode()).digest())
    counts = {
        split: max(1, round(share * len(cases))) if share else 0 for split, share in shares.items()
    }
    if sum(counts.values()) >= len(cases):
        asked = " and ".join(f"{count} for {split}" for split, count in counts.items() if count)
        way = (
            "data.test_share=0 keeps some"
            if len(cases) > 1 and counts["test"]
            else "cut it into several"
        )
        raise ValueError(
            f"{number_of(len(cases), 'image')} leave none to train with, after {asked}; add "
            f"images, or {way}"
        )
    found: dict[str, list[Case]] = {}
    for split, count in counts.items():
        found[split], mixed = mixed[:count], mixed[count:]
    parts = {"train": mixed} | found
    return {split: sorted(part) for split, part in parts.items() if part}


# --- Lists of names -------------------------------------------------------------------------------


def lists_of(root: Path) -> dict[str, Path]:
    """Text files of the names of each split: ImageSets/Segmentation/train.txt, or train.txt."""
    for folder in (root / "ImageSets" / "Segmentation", root / "ImageSets", root):
        found = {split: folder / f"{split}.txt" for split in ("train", "val", "test")}
        if found["train"].is_file():
            return {split: path for split, path in found.items() if path.is_file()}
    return {}


def listed(
    root: Path, cases: Mapping[Key, Case], suffix: str
) -> tuple[dict[str, list[Case]], str] | None:
    """The cases by split, where lists of names say it, and the folder of the lists.

    Args:
        suffix: what follows the name of an image in its file, and may do so in the lists.

    Raises:
        ValueError: a list names an image that is not there, or has no mask.
    """
    lists = lists_of(root)
    if not lists:
        return None
    known = {key[-1]: case._replace(name=key[-1]) for key, case in cases.items()}
    parts = {}
    for split, file in lists.items():
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
        found = []
        for line in filter(None, lines):
            names = [_stem(part, suffix) for part in (line, line.split()[0])]
            case = next((known[name] for name in names if name in known), None)
            if case is None:
                if split == "test":
                    continue  # often without masks
                raise ValueError(f"{file} names {line}, of which there is no image with a mask")
            found.append(case)
        if found:
            parts[split] = found
    return parts, str(next(iter(lists.values())).parent.relative_to(root))


def _stem(name: str, suffix: str) -> str:
    stem = stem_of(Path(normal(name)))
    return stem.removesuffix(suffix) if suffix else stem
