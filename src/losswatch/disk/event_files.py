"""A run's event files while it trains: their sizes at a checkpoint, and the way back to these.

A resumed run cuts its files to the sizes that the checkpoint knows, so no stretch of the curves is
in them twice. The names of losswatch's files end with `SUFFIX`. Event files of other programs in
the same folder are never cut or removed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from losswatch.events.layout import PREFIX, SUFFIX
from losswatch.files import sync
from losswatch.text import printable, shortened

log = logging.getLogger(__name__)


def event_files(folder: Path) -> list[Path]:
    """The event files that runs of losswatch began in a folder."""
    return [file for file in folder.glob(f"{PREFIX}*") if file.name.endswith(SUFFIX)]


def event_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each of the run's event files by name, all of them on the disk."""
    files = event_files(folder)
    for file in files:
        sync(file)
    return {file.name: file.stat().st_size for file in files}


def lost_events(folder: Path, sizes: Mapping[str, int]) -> str | None:
    """What is missing of event files that had these sizes; None if nothing is."""
    left = {file.name: file.stat().st_size for file in folder.glob(f"{PREFIX}*")}
    for name, size in sizes.items():
        if name not in left:
            return f"the event file {printable(name)} is gone"
        if left[name] < size:
            return f"the event file {printable(name)} was cut from {size} to {left[name]} bytes"
    return None


def rewind(folder: Path, sizes: Mapping[str, int]) -> None:
    """Cut the run's event files to earlier sizes, and remove those that it began later.

    Event files of other programs are left alone, with a warning.
    """
    foreign = []
    for file in folder.glob(f"{PREFIX}*"):
        if file.name in sizes:
            os.truncate(file, sizes[file.name])
        elif file.name.endswith(SUFFIX):
            file.unlink()
        else:
            foreign.append(shortened(file.name))
    if foreign:
        log.warning(
            "%s holds event files of another program (%s), left alone; what reads the folder will "
            "take their curves for this run's",
            printable(folder),
            ", ".join(foreign[:3]) + ", ..." * (len(foreign) > 3),
        )
