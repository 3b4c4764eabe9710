"""Lists the files below a folder, without hidden files and those of an operating system."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from losswatch.data.formats import stem_of, suffix_of

SYSTEM = {"thumbs.db", "desktop.ini", "__macosx"}
SLICES = (".dcm", ".ima", "")  # suffixes of the files of a DICOM series
NUMBERS = (".raw", ".zraw", ".raw.gz", ".img", ".bin")  # suffixes of the numbers of a header
# The names of folders that hold a split, in small letters.
WORDS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip

Key = tuple[str, ...]  # the parts of a path, the last one without suffix; splits by one word


class Files(NamedTuple):
    """The files below a folder.

    Attributes:
        images: files that can be read, and folders of a DICOM series.
        others: all other files.
    """

    folder: Path
    images: dict[Key, Path]
    others: list[Path]


def files_below(folder: Path) -> Files:
    """All files below a folder, sorted by their paths.

    Raises:
        ValueError: two images have the same name.
    """
    found = Files(folder, {}, [])
    for where, names in _walk(folder):
        place = Path(where)
        parts = tuple(map(key_part, place.relative_to(folder).parts))
        paths = [Path(where, name) for name in names]
        if parts and parts[-1] not in WORDS and _is_series(paths):
            _add(found, parts, place)
            continue
        for path in paths:
            if suffix_of(path):
                _add(found, (*parts, normal(stem_of(path))), path)
            else:
                found.others.append(path)
    return found


def _add(files: Files, key: Key, path: Path) -> None:
    if (other := files.images.setdefault(key, path)) is not path:
        raise ValueError(f"{other} and {path} have the same name; remove or rename one")


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder and the names of its files, sorted.

    Links are followed, but not in a circle. Folders of runs and sweeps are left out.
    """
    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen or ".hydra" in folders or "multirun.yaml" in names:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield where, sorted(name for name in names if not is_hidden(name))


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """The size and the time of the last change of each file below a folder, by path."""
    found = {}
    for where, names in _walk(folder):
        for name in names:
            path = os.path.join(where, name)
            try:
                state = os.stat(path)
            except OSError:  # a broken link
                found[path] = (-1, -1)
            else:
                found[path] = (state.st_size, state.st_mtime_ns)
    return found


def key_part(name: str) -> str:
    """The name of a folder as a part of a key."""
    return WORDS.get(name.lower(), normal(name))


def _is_series(paths: list[Path]) -> bool:
    """Whether files are the slices of a DICOM volume. Such files often have no suffix."""
    if not paths or any(path.suffix.lower() not in SLICES for path in paths):
        return False
    if paths[0].suffix or not paths[0].is_file():
        return paths[0].suffix != ""
    with paths[0].open("rb") as stream:
        return stream.read(132).endswith(b"DICM")


def parts_of(path: Path) -> list[Path]:
    """The files of an image: all slices of a series, a header and the file with its numbers."""
    if path.is_dir():
        return sorted(path.iterdir())
    if suffix_of(path) not in (".mhd", ".nhdr"):
        return [path]
    return [path, *(p for suffix in NUMBERS if (p := path.with_suffix(suffix)).is_file())]


def is_hidden(name: str) -> bool:
    """Whether a file is hidden or belongs to an operating system."""
    return name.startswith(".") or name.lower() in SYSTEM


def normal(name: str) -> str:
    """A name in normal form: macOS writes an umlaut as two characters, Windows as one."""
    return unicodedata.normalize("NFC", name)
