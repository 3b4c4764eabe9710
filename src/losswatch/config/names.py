"""The names of run folders and sweep folders, and how to write such a name on a command line.

Imports nothing slow: Hydra resolves these names before the first run.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

# Bytes of a run's name. Most file systems allow 255 bytes for a name.
_LONGEST = 150
# An override that can stand in a folder's name as it is. Commas are allowed inside brackets only,
# so that overrides joined by commas can be read in one way only.
_PLAIN = re.compile(r"(?:[\w.=+~@-]|\[[\w.,=+~@-]*\])+")

# What runs mostly differ in. It begins their names, because lists show the first characters only.
_FIRST = ("loss", "theta", "model", "optimizer", "seed")


def _order(override: str) -> tuple[int, str]:
    group = re.split("[.=@]", override, maxsplit=1)[0]
    return _FIRST.index(group) if group in _FIRST else len(_FIRST), override


def run_name(overrides: Sequence[str]) -> str:
    """The name of a run's folder: its overrides, in the order of `_FIRST`, then of the alphabet.

    Different sets of overrides get different names. A name with other characters than those of
    `_PLAIN`, or a long one, is shortened and ends with a hash of the overrides.

    >>> run_name(["loss=dice", "theta=0.05"])
    'loss=dice,theta=0.05'
    >>> run_name(["experiment=smoke", "seed=1", "optimizer.lr=0.1", "loss=dice"])
    'loss=dice,optimizer.lr=0.1,seed=1,experiment=smoke'
    >>> run_name(["++loss.alpha=0.3"]), run_name([])
    ('loss.alpha=0.3', 'default')
    >>> run_name(["note=a b"])
    'note=a_b-c692bc42'
    """
    ordered = sorted((override.removeprefix("++") for override in overrides), key=_order)
    name = ",".join(ordered) or "default"
    if all(map(_PLAIN.fullmatch, ordered)) and len(name.encode()) <= _LONGEST:
        return name
    digest = hashlib.sha256(repr(ordered).encode()).hexdigest()[:8]
    safe = re.sub(r"[^\w.,=+~@\[\]-]", "_", name)
    return safe.encode()[: _LONGEST - 9].decode(errors="ignore") + "-" + digest


@functools.cache
def sweep_name() -> str:
    """The name of this command's folder in outputs/: the time, and a number if that is taken.

    This function creates the folder, so two commands that start in the same second get two
    folders. Cached: one command has one folder.

    Raises:
        OSError: the folder cannot be created.
    """
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    name, attempt = stamp, 1
    while True:
        try:
            Path("outputs", name).mkdir(parents=True)
            return name
        except FileExistsError:
            attempt += 1
            name = f"{stamp}-{attempt}"


def run_folder(resume: str | None, overrides: Sequence[str]) -> str:
    """The folder of a single run: the one that it resumes, or a new one."""
    return resume or str(Path("outputs", sweep_name(), run_name(overrides)))


# --- Arguments of a command line ------------------------------------------------------------------

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
