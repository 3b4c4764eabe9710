"""Processes that train the runs of a sweep side by side. Imports nothing slow."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

PATIENCE = 5  # seconds that a process has to end


class Workers:
    """A few processes that take one task after the other.

    On Linux they are forks of this process, which has imported PyTorch already, so they start at
    once. A fork cannot use a GPU or several threads if this process has used them. So where
    `forks` is False, and on other systems, each process starts anew and imports PyTorch itself.

    They ignore Ctrl-C: `stop` ends them. They also end when this process has ended.

    Args:
        count: of processes.
        cores: the CPU cores that each process may use.
        forks: whether the tasks use no GPU and one thread each.
    """

    def __init__(self, count: int, cores: int = 1, forks: bool = True) -> None:
        self.count = count
        method = "fork" if forks and sys.platform == "linux" else "spawn"
        self._make = functools.partial(
            ProcessPoolExecutor, count, multiprocessing.get_context(method), _begin, (cores,)
        )
        self._start()

    def _start(self) -> None:
        self._others = multiprocessing.active_children()
        self._pool = self._make()
        for _ in range(self.count):  # the first tasks start the processes
            self._pool.submit(int)

    def submit(self, task: Callable[[], Any]) -> Future:
        """Start a task in the next free process. The task and its result must be picklable.

        If a process was killed, all tasks at work get a `BrokenProcessPool`, and the next task
        starts new processes.
        """
        try:
            return self._pool.submit(task)
        except BrokenProcessPool:
            self._start()
            return self._pool.submit(task)

    def stop(self) -> None:
        """End all processes at once, whatever they do."""
        ours = [p for p in multiprocessing.active_children() if p not in self._others]
        for process in ours:
            process.terminate()
        for process in ours:
            process.join(PATIENCE)
            process.kill()  # native code may hold a signal back
        self._pool.shutdown(cancel_futures=True)


def _begin(cores: int) -> None:
    """Prepare a new process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_in_time()
    os.environ["LOKY_MAX_CPU_COUNT"] = str(cores)  # joblib.cpu_count() returns this many
    import losswatch.sweep.parts  # noqa: F401  the slow imports


@functools.cache  # starts one thread in each process
def end_in_time() -> None:
    """Let this process end at SIGTERM, or when its parent has ended, if another process started it.

    Otherwise, after a kill -9 of the parent, the process would go on training and keep its runs
    locked. The jobs of other launchers may outlive the command, or their launcher ends them.
    """
    if (parent := multiprocessing.parent_process()) is None:
        return
    # The process ends at once. Lightning's own handler would finish the batch first. Then a worker
    # of the loader, which the same signal has ended, would make the run a failed one.
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))

    def watch() -> None:
        while os.getppid() == parent.pid:
            time.sleep(0.3)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
