"""One line about a YAML file that cannot be read: the file, the line in it, and the reason."""

from __future__ import annotations

import io
import traceback
from pathlib import Path

from yaml import MarkedYAMLError, YAMLError
from yaml.reader import Reader, ReaderError


def describe(error: YAMLError | UnicodeDecodeError) -> str:
    """The file, the line and the reason of an error that PyYAML raised."""
    if isinstance(error, MarkedYAMLError) and (mark := error.problem_mark):
        start = error.context_mark
        context = f" ({error.context}, line {start.line + 1})" if start else ""
        return f"{mark.name}, line {mark.line + 1}: {error.problem}{context}"
    if file := file_of(error):
        for number, line in enumerate(Path(file).read_bytes().split(b"\n"), start=1):
            try:
                Reader(line.decode())
            except UnicodeDecodeError as failure:
                return f"{file}, line {number}: byte {line[failure.start]:#04x} is not UTF-8"
            except ReaderError as failure:
                return f"{file}, line {number}: YAML has no character {failure.character:#04x}"
    return " ".join(str(error).split())


def file_of(error: Exception) -> str | None:
    """The file that was being read when the error was raised.

    Errors about encodings and interpolations do not name it. It is the innermost open file among
    the local variables of the functions in the traceback.
    """
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for value in frame.f_locals.values():
            if isinstance(value, io.TextIOWrapper) and Path(value.name).is_file():
                return str(value.name)
    return None
