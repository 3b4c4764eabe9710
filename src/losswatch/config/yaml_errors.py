"""One line about a YAML file that cannot be read: the file, the line in it, and the reason."""

from __future__ import annotations

import argparse
from pathlib import Path

from omegaconf import OmegaConf
from yaml import MarkedYAMLError, YAMLError
from yaml.reader import ReaderError


def describe(error: YAMLError | UnicodeDecodeError) -> str:
    """The file, the line and the reason of an error that PyYAML raised."""
    if isinstance(error, MarkedYAMLError) and (mark := error.problem_mark):
        start = error.context_mark
        context = f" ({error.context}, line {start.line + 1})" if start else ""
        return f"{mark.name}, line {mark.line + 1}: {error.problem}{context}"
    if isinstance(error, ReaderError):
        before = Path(error.name).read_text("utf-8")[: error.position]
        number = before.count("\n") + 1
        return f"{error.name}, line {number}: YAML has no character {error.character:#04x}"
    if file := file_of(error):
        for number, line in enumerate(Path(file).read_bytes().split(b"\n"), start=1):
            try:
                line.decode()
            except UnicodeDecodeError as failure:
                return f"{file}, line {number}: byte {line[failure.start]:#04x} is not UTF-8"
    return " ".join(str(error).split())


def file_of(error: Exception) -> Path | None:
    """The file of `--config-dir` that raises this error when it is read again; None if none does.

    Errors about encodings and interpolations do not name the file themselves.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    folder = parser.parse_known_args()[0].config_dir
    for file in sorted(folder.resolve().rglob("*.yaml")) if folder else []:
        try:
            OmegaConf.load(file)
        except Exception as again:
            if str(again) == str(error):
                return file
    return None
