"""Makes text safe to show: on a terminal, in tables, in Markdown, in figures and as a file name.

Names and contents of a run's files come from the disk, so anyone may have written them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zlib import crc32


def printable(value: object) -> str:
    r"""The value as text, with a replacement character for each character that does not print.

    >>> printable("a\x1b[31m\nb")
    'a�[31m�b'
    """
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def reason(error: Exception) -> str:
    """The error's message as one line of at most 200 characters.

    An error of the operating system is given without its path: callers name the path.

    >>> reason(ValueError("two\\nlines")), reason(KeyError()), reason(FileNotFoundError(2, "gone"))
    ('two lines', 'KeyError', 'gone')
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable(" ".join((text or type(error).__name__).split())[:200])


def shortened(value: object) -> str:
    """The value as printable text of at most 80 characters.

    >>> shortened("a" * 100)[70:]
    'aaaaaaa...'
    """
    text = printable(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearby(path: Path, base: Path | None = None) -> str:
    """A path relative to `base`, by default the working directory, if the path lies in it.

    >>> nearby(Path("outputs/a")), nearby(Path.cwd() / "outputs/a"), nearby(Path("/a"))
    ('outputs/a', 'outputs/a', '/a')
    """
    base = base or Path.cwd()
    return str(path.relative_to(base) if path.is_relative_to(base) else path)


def number_of(number: int, noun: str) -> str:
    """A number and a noun, in the plural unless the number is 1.

    >>> number_of(1, "run"), number_of(2, "run")
    ('1 run', '2 runs')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def one_line(error: BaseException) -> str:
    r"""The type and the text of an error.

    >>> one_line(ValueError("too\nlong"))
    'ValueError: too long'
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def format_value(value: Any, digits: int | None = None) -> str:
    r"""A value as text for people, on one line and without control characters.

    Args:
        value: a number, a truth value, text, or None or NaN for a missing value.
        digits: decimals of a float; None: as many as the float needs, up to six digits.

    >>> [format_value(x) for x in (0.05, True, float("nan"), "a\x1b[31m\nb")]
    ['0.05', 'on', '–', 'a�[31m�b']
    >>> format_value(0.12345, 2)
    '0.12'
    """
    import numpy as np  # imported late: `losswatch` itself needs only PyTorch

    if value is None or value != value:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}" if digits is None else f"{value:.{digits}f}"
    return printable(value)


def parse_overrides(overrides: Iterable[str]) -> dict[str, str]:
    """The printable value of each key in overrides. A mapping gives one entry for each of its keys.

    >>> parse_overrides(["loss=dice", "+note=a=b", "data={low:1,high:0}"])
    {'loss': 'dice', 'note': 'a=b', 'data.low': '1', 'data.high': '0'}
    """
    values: dict[str, str] = {}
    for override in overrides:
        key, _, value = printable(override).lstrip("+~").partition("=")
        inner = re.findall(r"[{,]\s*([\w.]+)\s*:([^,{}]*)", value) if value[:1] == "{" else []
        values |= {f"{key}.{name}": text.strip() for name, text in inner} or {key: value}
    return values


def csv_escape(text: str) -> str:
    """Text that a spreadsheet shows unchanged, and does not compute as a formula.

    >>> [csv_escape(text) for text in ("dice", "-1e-3", "=1+1", " @SUM(A1)", "-x")]
    ['dice', '-1e-3', "'=1+1", "' @SUM(A1)", "'-x"]
    """
    text = printable(text)
    number = re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", text, re.IGNORECASE | re.ASCII)
    return f"'{text}" if re.match(r"\s*[=+@＝＋－＠-]", text) and not number else text


def markdown_escape(text: str) -> str:
    r"""Text that Markdown shows unchanged.

    >>> markdown_escape("a|b <img> `x` [95 %]")
    'a\\|b \\<img\\> \\`x\\` \\[95 %\\]'
    """
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", printable(text))


def file_name(text: str) -> str:
    """A file name like `text`. If characters are replaced, a checksum makes the name unique.

    >>> file_name("theta=[0.3, 0.6],batch_norm=on"), file_name("note=../x")
    ('theta=0.3,0.6,batch_norm=on', 'note=.._x~5c3098ed')
    """
    text = re.sub(r"[\[\] ]", "", text)
    safe = re.sub(r"[^\w.,=+-]", "_", text, flags=re.ASCII)[:120]
    return safe if safe == text else f"{safe}~{crc32(text.encode()):08x}"
