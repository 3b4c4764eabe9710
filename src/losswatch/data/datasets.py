"""Reads data sets with a dataset.json: those of nnU-Net and of the Decathlon."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from losswatch.data.cases import Case
from losswatch.data.formats import SUFFIXES, stem_of, suffix_of
from losswatch.data.splits import Layout, Parts, split_by_share
from losswatch.data.tree import files_below, normal
from losswatch.text import number_of

NEEDS = (
    "nnU-Net v2 needs channel_names, labels and file_ending, the Decathlon modality, labels and "
    "training"
)


def describes(about: Any) -> bool:
    """Whether the content of a dataset.json is that of nnU-Net or the Decathlon."""
    return isinstance(about, dict) and "labels" in about


def read_dataset(root: Path, about: Any, shares: Mapping[str, float]) -> Layout:
    """The layout of a folder with dataset.json, whose content is `about`.

    Class 0 is the label 0. The first fold of splits_final.json, if there is one, is the split.

    Raises:
        ValueError: the file lacks an entry, or names files that do not exist.
    """
    file = root / "dataset.json"
    try:
        channels = about["channel_names" if "channel_names" in about else "modality"]
        values, count = _values(about["labels"]), len(channels)
        ignored = values.pop("ignore", None)
        cases, test = _cases(root, about, count)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} cannot be used ({type(error).__name__}: {error}); {NEEDS}"
        ) from error
    overlap = any(isinstance(value, list) for value in values.values())
    if overlap:  # regions; the background is all that is in no region
        values.pop("background", None)
    if overlap and len(values) == 1:
        [(name, value)] = values.items()
        values, overlap = {"background": 0, name: value}, False
    if overlap and ignored is not None:
        raise ValueError(
            f"{file} has regions and a label to ignore; only one of them is supported, so name the "
            "classes instead of regions"
        )
    if not overlap and (value := _twice(map(str, values.values()))):
        both = " and ".join(name for name, v in values.items() if str(v) == value)
        raise ValueError(f"{file}: the label {value} is of {both}; number them apart")
    if not cases:
        raise ValueError(f"{file} names no case to train with")
    parts, notes = _split(root, cases, test, shares)
    return Layout(parts, values, ignored, (), overlap, count, tuple(notes))


def read_json(file: Path) -> Any:
    """The content of a file.

    Raises:
        ValueError: the file is not JSON. Names the file.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}; mend or remove it") from error


def _twice(names: Iterable[str]) -> str | None:
    """A name that occurs more than once, or None."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _values(labels: Mapping[str, Any]) -> dict[str, Any]:
    """From the names of classes to their values, the background first.

    Raises:
        TypeError: a value is not a whole number.
    """
    is_by_number = all(str(number).isdigit() for number in labels)  # as in the Decathlon
    if is_by_number and all(isinstance(name, str) for name in labels.values()):
        labels = {str(name): int(number) for number, name in labels.items()}
    values = {str(name): value for name, value in labels.items()}
    for name, value in values.items():
        if not all(type(v) is int for v in (value if isinstance(value, list) else [value])):
            raise TypeError(f"label {name} is {value!r}, not a whole number")
    if any(isinstance(value, list) for value in values.values()):
        return values
    return dict(sorted(values.items(), key=lambda item: int(item[1])))


def _cases(root: Path, about: Mapping[str, Any], channels: int) -> tuple[list[Case], list[Case]]:
    """The cases to train and validate with, and those of the test."""
    if "dataset" in about:
        entries = about["dataset"].items()
        return [_case(root, name, one["images"], one["label"]) for name, one in entries], []
    if "training" in about and "file_ending" not in about:
        cases = [_decathlon_case(root, entry, channels) for entry in about["training"]]
        if name := _twice(case.name for case in cases):
            raise ValueError(f"{root / 'dataset.json'} names {name} twice; remove one")
        return cases, []
    ending = "." + about["file_ending"].lstrip(".")
    if ending.lower() not in SUFFIXES:
        raise ValueError(
            f"{root / 'dataset.json'}: files {ending} cannot be read; known are "
            f"{', '.join(SUFFIXES)}"
        )
    has_test = (root / "labelsTs").is_dir()
    test = _nnunet_cases(root, "Ts", ending, channels) if has_test else []
    return _nnunet_cases(root, "Tr", ending, channels), test


def _split(
    root: Path, cases: Sequence[Case], test: list[Case], shares: Mapping[str, float]
) -> tuple[Parts, list[str]]:
    """The cases by split, and notes about the split."""
    file, more = root / "splits_final.json", {"test": test} if test else {}
    if not file.is_file():
        rest = {"val": shares["val"] or 0.2, "test": 0.0} if test else shares
        return split_by_share(cases, rest) | more, []
    by_name = {case.name: case for case in cases}
    try:
        first = read_json(file)[0]
        fold = {split: [str(name) for name in first[split]] for split in ("train", "val")}
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{file} must be a list of folds with train and val, as nnU-Net writes it"
        ) from error
    names = [*fold["train"], *fold["val"]]
    for name in names:
        if name not in by_name:
            raise ValueError(f"{file} names {name}, of which there is no image with a label")
    if double := _twice(names):
        raise ValueError(f"{file} names {double} twice in its first fold; remove one")
    if empty := [split for split, part in fold.items() if not part]:
        raise ValueError(f"{file} has no case of {empty[0]} in its first fold; add one")
    parts = {split: [by_name[name] for name in part] for split, part in fold.items()}
    return parts | more, [f"the split is the first fold of {file.name}"]


def _nnunet_cases(root: Path, part: str, ending: str, channels: int) -> list[Case]:
    """The cases of imagesTr/<case>_0000.png and labelsTr/<case>.png."""
    images, labels = root / f"images{part}", root / f"labels{part}"
    for folder in (images, labels):
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; nnU-Net has images and labels there")
    found, known = _of_ending(labels, ending), _of_ending(images, ending)
    if not found:
        raise ValueError(f"{labels} holds no files {ending}, which is the file_ending")
    is_one = all(name.endswith("_0000") for name in known)  # one file with all channels
    count, cases = 1 if is_one else channels, []
    for name, label in found.items():
        files = [known.get(f"{name}_{i:04}") for i in range(count)]
        if lacking := [i for i, file in enumerate(files) if file is None]:
            missing = images / f"{name}_{lacking[0]:04}{ending}"
            hint = f"; the name of {known[name]} must end in _0000" if name in known else ""
            count_of = number_of(channels, "channel")
            raise ValueError(
                f"{label} is a mask without an image {missing}, and dataset.json names {count_of}"
                f"{hint}"
            )
        cases.append(Case(name, tuple(file for file in files if file), ((label,),)))
    used = {file for case in cases for file in case.images}
    for file in known.values():
        if file not in used:
            raise ValueError(
                f"{file} is an image without a mask in {labels}, or a channel that dataset.json "
                "does not name; name the channel, or move the image to imagesTs/"
            )
    return cases


def _of_ending(folder: Path, ending: str) -> dict[str, Path]:
    """The files of a folder with this ending, by the rest of their names."""
    found = {}
    for path in files_below(folder).images.values():
        if path.parent == folder and path.name.lower().endswith(ending.lower()):
            found[normal(path.name[: -len(ending)])] = path
    return found


def _decathlon_case(root: Path, entry: Mapping[str, str], channels: int) -> Case:
    """A case in the list `training`. In nnU-Net v1 an image has one file for each channel."""
    image = entry["image"]
    suffix = suffix_of(Path(image))
    parts = [f"{image[: len(image) - len(suffix)]}_{i:04}{suffix}" for i in range(channels)]
    is_one = (root / image).is_file() or not (root / parts[0]).is_file()
    return _case(root, stem_of(Path(image)), [image] if is_one else parts, entry["label"])


def _case(root: Path, name: str, images: Sequence[str], label: str) -> Case:
    for file in (*images, label):
        if not (root / file).is_file():
            raise ValueError(f"{root / 'dataset.json'} names {file}, which is not there")
    return Case(name, tuple(root / file for file in images), ((root / label,),))
