"""Files that grow while a run trains: the record (curves.py) and the event files.

A checkpoint holds their sizes. A resumed run cuts the files to these sizes, so that no step is in
them twice. The names of losswatch's event files end with `SUFFIX`. Event files of other
programs in the same folder are never cut or removed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from losswatch.disk.curves import METRICS_FILE, ROWS_FILE, SIGNS_FILE
from losswatch.events.layout import PREFIX, SUFFIX
from losswatch.files import sync
from losswatch.text import printable, shortened

log = logging.getLogger(__name__)

RECORD = ROWS_FILE, SIGNS_FILE, METRICS_FILE


def event_files(folder: Path) -> list[Path]:
    """The event files in a folder that losswatch wrote."""
    return list(folder.glob(f"{PREFIX}*{SUFFIX}"))


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each growing file by name. The record is first synchronised with the disk."""
    record = [path for name in RECORD if (path := folder / name).exists()]
    for path in record:
        sync(path)
    return {path.name: path.stat().st_size for path in [*record, *event_files(folder)]}


def what_is_lost(folder: Path, sizes: Mapping[str, int]) -> str | None:
    """What is missing of a record that had these sizes, in words; None if nothing is missing.

    Only TensorBoard reads the event files, so a run goes on even if these are damaged.
    """
    for name in RECORD:
        path, size = folder / name, sizes.get(name, 0)
        if not path.exists():
            if size:
                return f"{name} is gone"
        elif (left := path.stat().st_size) < size:
            return f"{name} was cut from {size} to {left} bytes"
    return None


def rewind(folder: Path, sizes: Mapping[str, int]) -> None:
    """Cut a run's growing files to earlier sizes, and remove event files that were begun later.

    Event files of other programs are left alone, with a warning.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in RECORD:
        path = folder / name
        path.touch()
        os.truncate(path, sizes.get(name, 0))
    ours = event_files(folder)
    for path in ours:
        if path.name in sizes:
            os.truncate(path, min(sizes[path.name], path.stat().st_size))
        else:
            path.unlink()
    foreign = [shortened(path.name) for path in {*folder.glob(f"{PREFIX}*")}.difference(ours)]
    if foreign:
        log.warning(
            "%s holds event files of another program (%s), left alone; TensorBoard shows their "
            "curves as this run's",
            printable(folder),
            ", ".join(foreign[:3]) + ", ..." * (len(foreign) > 3),
        )
