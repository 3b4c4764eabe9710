"""Counts the steps of groups of runs, each in its own process, for one bar."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from losswatch.terminal import REDRAW_SECONDS, ProgressSink


class Counted(ProgressSink):
    """Counts the steps of one group of runs in row `index` of a file, which another process reads.

    A group that starts again, because its process was killed, counts from 0.
    """

    def __init__(self, file: Path, index: int) -> None:
        self.counts = np.memmap(file, np.int64, "r+").reshape(-1, 2)[index]  # done, skipped
        self.counts[:] = 0

    def advance(self, count: int) -> None:
        self.counts[0] += count

    def skip(self, count: int) -> None:
        self.counts[1] += count


@contextmanager
def collected(into: ProgressSink, count: int) -> Iterator[Path]:
    """A file in which `count` groups count their steps (`Counted`); `into` shows the sum."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "steps")
        counts, ended = np.memmap(file, np.int64, "w+", shape=(count, 2)), threading.Event()

        def collect() -> None:
            done = skipped = 0
            while True:
                is_last = ended.wait(REDRAW_SECONDS)
                now = counts.sum(axis=0).tolist()
                into.skip(now[1] - skipped)
                into.advance(now[0] - done)
                done, skipped = now
                if is_last:
                    return

        thread = threading.Thread(target=collect, daemon=True)
        thread.start()
        try:
            yield file
        finally:
            ended.set()
            thread.join()
