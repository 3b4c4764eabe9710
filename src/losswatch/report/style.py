"""The common style of all figures: colours of the losses, axes, and how a file is written."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend

from losswatch.files import replace_file
from losswatch.report.runs import KNOWN_LOSSES, loss_order
from losswatch.text import printable

log = logging.getLogger(__name__)

FORMATS = ("png", "pdf", "svg")

# Ten hues. People with common colour blindness can distinguish the first eight: those of Okabe and
# Ito, without yellow (too faint for a line) and black (the accuracy). After ten losses the hues
# repeat with dashes, up to 30 looks.
HUES = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00",
    "#56B4E9", "#5D3A9B", "#8A8A8A", "#7A5230", "#8CBF26",
)  # fmt: skip
DASHES = ("solid", (0, (4, 1.3)), (0, (1.2, 1.2)))
LOOKS = [{"color": hue, "linestyle": dash} for dash in DASHES for hue in HUES]

Looks = dict[str, dict[str, Any]]  # colour and dashes of each loss


def loss_looks(names: Iterable[str]) -> Looks:
    """Colour and dashes for each loss: ten losses have ten colours.

    The known losses have fixed looks. The look of another loss follows from its name, so that it is
    the same in most reports. If two losses would look alike, the later one gets the next free look.
    So all figures of a report need one call, with all of its losses.

    >>> loss_looks(["dice", "cce"])["cce"]
    {'color': '#0072B2', 'linestyle': 'solid'}
    """
    ordered = loss_order(set(names))
    known = dict(zip(KNOWN_LOSSES, LOOKS, strict=False))
    looks = {name: known[name] for name in ordered if name in known}
    fixed = len(KNOWN_LOSSES)
    solid, dashed = LOOKS[fixed : len(HUES)], LOOKS[len(HUES) :]
    for name in ordered:
        if name not in looks:
            place = crc32(name.encode(errors="replace"))
            # The hues of known losses come last, because in another report they mean those losses.
            turns = [*_rotated(solid, place), *LOOKS[:fixed], *_rotated(dashed, place)]
            looks[name] = next((look for look in turns if look not in looks.values()), turns[0])
    return {name: looks[name] for name in ordered}


def _rotated(looks: list[dict[str, Any]], place: int) -> list[dict[str, Any]]:
    """The looks, rotated to start at a place."""
    start = place % len(looks)
    return looks[start:] + looks[:start]


def plain_axes(ax: Axes) -> None:
    """Give axes the style of all figures: horizontal grid lines, no frame on top and right."""
    ax.grid(axis="y", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9)


def show_literally(legend: Legend) -> None:
    """Show the dollar signs of a legend's labels; Matplotlib would take them for formulas."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def draw_files(draw: Callable[[], Figure], stem: Path, formats: Sequence[str]) -> Path | None:
    """Draw a figure into `<stem>.<format>` for each of `formats`.

    Returns:
        A file that Markdown can show, if there is one; None, after a warning, if the figure cannot
        be drawn.

    Raises:
        OSError: a file cannot be written.
    """
    paths = [stem.with_name(f"{stem.name}.{name}") for name in formats]
    try:
        figure = draw()
        for path in paths:
            save(figure, path)
    except OSError:  # the other figures cannot be written, either
        raise
    except Exception as error:  # of Matplotlib: an axis cannot show the steps or values
        why = printable(f"{type(error).__name__}: {error}")
        log.warning("%s: not drawn (%s)", printable(paths[0]), why)
        return None
    return min(paths, key=lambda path: path.suffix == ".pdf")


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure completely or not at all. A link in its place is replaced, not followed."""
    image = io.BytesIO()
    figure.savefig(image, format=Path(path).suffix[1:] or None)
    replace_file(Path(path), image.getvalue())
