"""Steps counted by several processes, for one bar."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from losswatch.terminal import REDRAW_SECONDS, Steps


class Counted(Steps):
    """Steps of one of several processes: number `index` in a file that one of them collects."""

    def __init__(self, file: Path, index: int) -> None:
        self.counts, self.index = np.memmap(file, np.int64, "r+"), index

    def advance(self, count: int) -> None:
        self.counts[self.index] += count


@contextmanager
def collected(into: Steps, count: int) -> Iterator[Path]:
    """A file in which `count` processes count their steps (`Counted`); `into` shows the sum."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "steps")
        counts, ended = np.memmap(file, np.int64, "w+", shape=count), threading.Event()

        def collect() -> None:
            seen = 0
            while not ended.wait(REDRAW_SECONDS):
                total = int(counts.sum())
                into.advance(total - seen)
                seen = total

        thread = threading.Thread(target=collect, daemon=True)
        thread.start()
        try:
            yield file
        finally:
            ended.set()
            thread.join()
