"""The arguments of a command line, in the form in which Hydra reads them as they are meant."""

from __future__ import annotations

import functools
import re
import shlex
import sys
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

PATHS = ("resume", "checkpoint", "hydra.run.dir", "hydra.sweep.dir")


def quoted(argument: str) -> str:
    """A command-line argument in the form that Hydra reads as it is meant.

    A value that Hydra cannot read is text and is quoted, of several values joined by commas each.
    So is the path of a folder, which may have commas. A setting of the loss may be one that its
    file does not name.

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
        return f"{key}={_as_text(value)}"
    # A list or a mapping with a mistake is no text.
    if value[:1] in ("[", "{") or _is_read(key, value):
        return argument
    text = ",".join(part if _is_read(key, part) else _as_text(part) for part in value.split(","))
    return f"{key}={text}" if _is_read(key, text) else argument


def as_one_text(argument: str) -> str | None:
    """A command-line argument with its value as text, in the form for a shell.

    None if it has no value, or if Hydra cannot read it even so.

    >>> print(as_one_text("data.root=cells, Köln"), as_one_text("note=$x"))
    "data.root='cells, Köln'" 'note='"'"'$x'"'"''
    """
    key, is_override, value = argument.partition("=")
    text = _as_text(value)
    if not is_override or not _is_read(key, text):
        return None
    argument = f"{key}={text}"
    # Between double quotes a shell reads these; a backslash before "'" stays as it is.
    return shlex.quote(argument) if re.search(r"""[$`"!]|\\(?!')""", argument) else f'"{argument}"'


def _as_text(value: str) -> str:
    return QuotedString(value, Quote.single).with_quotes()


def _is_read(key: str, value: str) -> bool:
    """Whether Hydra reads an override, and a folder's name as the name that it is."""
    try:
        found = _parser().parse_override(f"{key}={value}").value()
    except HydraException:
        return False
    # Hydra takes 2024_05 for the number 202405.
    return not (key == "data.root" and isinstance(found, int | float) and str(found) != value)


@functools.cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def resume_command(key: str, folder: str) -> str:
    """This command as text for a shell, with `key`, which resumes or continues, set to a folder."""
    program, *arguments = sys.argv
    start = ["python", program] if program.endswith(".py") else [Path(program).name]
    given = [a for a in arguments if a.partition("=")[0] not in (key, "hydra.run.dir")]
    return shlex.join([*start, *given, f"{key}={folder}"])
