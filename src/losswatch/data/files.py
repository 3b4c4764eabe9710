"""The files of a folder, without those that are hidden or belong to an operating system."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import NamedTuple

from losswatch.data.reading import stem_of, suffix_of

SYSTEM = {"thumbs.db", "desktop.ini", "__macosx"}
SLICES = (".dcm", ".ima", "")  # suffixes of the files of a DICOM series

# The names of folders that hold a split.
WORDS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip

Key = tuple[str, ...]  # the parts of a path, the last one without suffix


class Files(NamedTuple):
    """The files below a folder."""

    folder: Path
    images: dict[Key, Path]  # files that can be read, and folders of a DICOM series
    others: list[Path]


def files_below(folder: Path) -> Files:
    """All files below a folder, sorted by their paths.

    Raises:
        ValueError: two images have the same name.
    """
    images: dict[Key, Path] = {}
    others = []
    seen: set[str] = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        place, real = Path(where), os.path.realpath(where)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        parts = tuple(map(normal, place.relative_to(folder).parts))
        paths = [Path(where, name) for name in sorted(names) if not is_hidden(name)]
        if parts and parts[-1].lower() not in WORDS and _is_series(paths):
            found = {parts: place}
        else:
            found = {(*parts, normal(stem_of(path))): path for path in paths if suffix_of(path)}
            others += [path for path in paths if not suffix_of(path) and not _is_part(path)]
            _check_names(paths)
        images |= found
    return Files(folder, images, others)


def _is_part(path: Path) -> bool:
    """Whether a file holds the numbers of another one, which is their header."""
    return path.suffix.lower() in (".raw", ".zraw") and any(
        path.with_suffix(suffix).is_file() for suffix in (".mhd", ".nhdr")
    )


def _check_names(paths: list[Path]) -> None:
    seen: dict[str, Path] = {}
    for path in filter(suffix_of, paths):
        other = seen.setdefault(normal(stem_of(path)), path)
        if other != path:
            raise ValueError(f"{other} and {path} have the same name; remove or rename one")


def _is_series(paths: list[Path]) -> bool:
    """Whether files are the slices of a volume, of which many have no suffix."""
    if not paths or any(path.suffix.lower() not in SLICES for path in paths):
        return False
    with paths[0].open("rb") as stream:
        return paths[0].suffix != "" or stream.read(132).endswith(b"DICM")


def is_hidden(name: str) -> bool:
    """Whether a file is hidden, or one that an operating system leaves behind."""
    return name.startswith(".") or name.lower() in SYSTEM


def normal(name: str) -> str:
    """One form of a name: macOS writes an umlaut as two characters, Windows as one."""
    return unicodedata.normalize("NFC", name)
