"""Puts the arguments of a command line into the form that Hydra reads as the user means them."""

from __future__ import annotations

import functools
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

PATHS = ("resume", "checkpoint", "hydra.run.dir", "hydra.sweep.dir")


def quoted(argument: str) -> str:
    """A command-line argument in the form that Hydra reads as the user means it.

    A value that Hydra cannot read is text and gets quotes. If there are several values, joined by
    commas, each such value gets them. The path of a folder gets quotes, too, since it may have
    commas; `checkpoint` may name several paths that exist. A setting of the loss gets `++`, since
    the file of the loss need not name it.

    >>> quoted("resume=outputs/a/loss=dice,theta=0.5"), quoted("theta=0.5")
    ("resume='outputs/a/loss=dice,theta=0.5'", 'theta=0.5')
    >>> quoted("hydra.run.dir=a=b"), quoted("loss.alpha=0.3")
    ("hydra.run.dir='a=b'", '++loss.alpha=0.3')
    >>> quoted("hydra.sweep.dir=a,b (1)")
    "hydra.sweep.dir='a,b (1)'"
    >>> quoted("data.root=~/Köln,cells"), quoted("data.root=2024_05")
    ("data.root='~/Köln',cells", "data.root='2024_05'")
    """
    key, is_override, value = argument.partition("=")
    if not is_override or key.startswith("-"):
        return argument
    if key.startswith("loss."):
        key = f"++{key}"
    argument = f"{key}={value}"
    if value[:1] in ("'", '"'):
        return argument
    if key in PATHS and value not in ("", "null"):
        paths = _existing(value) if key == "checkpoint" else None
        return f"{key}={','.join(map(_as_text, paths or [value]))}"
    # A list or a mapping with a mistake is not text.
    if value[:1] in ("[", "{") or _is_read(key, value):
        return argument
    text = ",".join(part if _is_read(key, part) else _as_text(part) for part in value.split(","))
    return f"{key}={text}" if _is_read(key, text) else argument


def with_data(arguments: Sequence[str]) -> list[str]:
    """The arguments, and `data=folder` if they ask for a prediction, which needs it.

    >>> with_data(["mode=predict", "data.root=new"])
    ['mode=predict', 'data.root=new', 'data=folder']
    """
    keys = {argument.partition("=")[0] for argument in arguments}
    is_needed = "mode=predict" in arguments and not keys & {"data", "experiment"}
    return [*arguments, "data=folder"] if is_needed else list(arguments)


def _existing(text: str) -> list[str] | None:
    """The existing paths that a text names, joined by commas; each may have commas itself.

    A path is as long as it can be, so a text that exists as a whole is one path. None if a part of
    the text does not exist.
    """
    parts = text.split(",")
    for end in range(len(parts), 0, -1):
        if os.path.exists(first := ",".join(parts[:end])):
            if end == len(parts):
                return [first]
            if rest := _existing(",".join(parts[end:])):
                return [first, *rest]
    return None


def as_one_text(argument: str) -> str | None:
    """A command-line argument with its value quoted as one text, in the form for a shell.

    None if the argument has no value, or if Hydra cannot read it in this form either.

    >>> print(as_one_text("data.root=cells, Köln"), as_one_text("note=$x"))
    "data.root='cells, Köln'" 'note='"'"'$x'"'"''
    """
    key, is_override, value = argument.partition("=")
    text = _as_text(value)
    if not is_override or not _is_read(key, text):
        return None
    argument = f"{key}={text}"
    # Inside double quotes a shell interprets these characters, but not a backslash before "'".
    return shlex.quote(argument) if re.search(r"""[$`"!]|\\(?!')""", argument) else f'"{argument}"'


def _as_text(value: str) -> str:
    return QuotedString(value, Quote.single).with_quotes()


def _is_read(key: str, value: str) -> bool:
    """Whether Hydra can read an override, and does not read the name of a folder as a number."""
    try:
        found = _parser().parse_override(f"{key}={value}").value()
    except HydraException:
        return False
    # Hydra reads 2024_05 as the number 202405.
    return not (key == "data.root" and isinstance(found, int | float) and str(found) != value)


@functools.cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def resume_command(key: str, folder: str) -> str:
    """This command as text for a shell, with `key` set to a folder that it resumes."""
    program, *arguments = sys.argv
    start = ["python", program] if program.endswith(".py") else [Path(program).name]
    given = [a for a in arguments if a.partition("=")[0] not in (key, "hydra.run.dir")]
    return shlex.join([*start, *given, f"{key}={folder}"])
