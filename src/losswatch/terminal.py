"""What a command shows on the terminal: its lines, and a bar of the steps done.

Lines and bar go through one console, which prints lines above the bar. A process has one terminal,
so the bar that is shown now is state of this module.
"""

from __future__ import annotations

import functools
import io
import logging
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment, Segments
from rich.text import Text

T = TypeVar("T")

REDRAW_SECONDS = 0.2


@functools.cache
def _console() -> Console:
    """The process's one console. rich looks at the terminal when a console is made."""
    # Without markup, because what others print while a bar is shown goes through it, too.
    return Console(stderr=True, markup=False, emoji=False, highlight=False)


# --- Lines ---------------------------------------------------------------------------------------


def open_streams() -> None:
    """Make the standard streams usable, however the command was started (`2>&-`, ASCII terminal).

    A stream that is closed is opened on the null device. Otherwise the next file opened would get
    its descriptor, and everything that libraries and child processes print would go to that file.
    Output replaces characters that the terminal cannot show.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(null, True)
            setattr(sys, name, open(null, "r" if name == "stdin" else "w"))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def say(message: str) -> None:
    """Print a line to the user. An error in printing is ignored, so that it does not end a run."""
    with suppress(OSError):
        if _redraws():
            # The last line of the terminal may hold a line of `say_for_now`, or the bar of another
            # process; this line replaces it. A Segment, because rich would break a long Text.
            _console().print(Segments([Segment(f"\r\x1b[K{message}\n")]), crop=False)
        else:
            print(message, file=sys.stderr)
    flush(_console().file)


def say_for_now(message: str) -> None:
    """Show a line that the next line replaces. This works on a terminal only."""
    if _redraws():
        with suppress(OSError):
            print(message, end="", file=sys.stderr, flush=True)


def _redraws() -> bool:
    """Whether standard error is a terminal on which a line can be drawn again."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def flush(stream: IO[str]) -> OSError | None:
    """Flush a stream. If that fails, send the stream to the null device, and return the error.

    Otherwise the buffered text would fail again at each later flush: when joblib starts a process,
    and at the end of this process, whose exit status would then be 120.
    """
    try:
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None


class Lines(logging.StreamHandler):
    """Shows the messages of a log by `say` (conf/config.yaml)."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            say(self.format(record))
        except Exception:  # the message does not fit its arguments
            self.handleError(record)


def followed(results: Iterator[T], total: int, what: str) -> Iterator[T]:
    """The results of slow work as they come, with a bar that counts them.

    The bar appears after half a second, if standard error is a terminal, this is the main process,
    and no other bar is shown.
    """
    columns = TextColumn("{task.completed:,.0f} of {task.total:,.0f}  {task.description}")
    is_shown = _redraws() and multiprocessing.parent_process() is None and _current is None
    begin = drawn = time.monotonic()
    with Progress(
        columns, BarColumn(bar_width=16), TimeRemainingColumn(compact=True),
        console=_console(), transient=True, auto_refresh=False, disable=not is_shown,
    ) as progress:  # fmt: skip
        task = progress.add_task(what, total=total, visible=False)
        for result in results:
            yield result
            now = time.monotonic()
            progress.update(task, advance=1, visible=now - begin > 0.5)
            if now - drawn > REDRAW_SECONDS:
                progress.refresh()
                drawn = now


# --- Progress ------------------------------------------------------------------------------------


class ProgressSink:
    """Receives the progress of a training. This base class shows nothing."""

    @property
    def is_due(self) -> bool:
        """Whether the next `advance` redraws the bar. Only then a new text is needed."""
        return False

    def advance(self, count: int) -> None:
        """Count this many more steps as done."""

    def skip(self, count: int) -> None:
        """Take steps that were done before out of the total."""

    def set_text(self, beside: str, below: str = "") -> None:
        """Set the text beside and below the bar; the next redrawing shows it."""


class Bar(ProgressSink):
    """A bar of steps with the time left and some text. It disappears when it is closed.

    It is drawn only if stderr is a terminal and this is the main process.

    Args:
        total: number of steps.
        done: number of these that were done before.
    """

    def __init__(self, total: int, done: int = 0) -> None:
        self.is_shown = _redraws() and multiprocessing.parent_process() is None
        self.progress = Progress(
            TextColumn("step {task.completed:,.0f} of {task.total:,.0f}"),
            *([BarColumn(bar_width=16)] if _console().width >= 60 else []),
            TimeRemainingColumn(compact=True),
            TextColumn("left  {task.description}", markup=False),
        )
        self.task = self.progress.add_task("", total=total, completed=done)
        self.live = Live(
            console=_console(), transient=True, auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),
        )  # fmt: skip
        self.below, self.waiting = "", 0
        self.drawn = -math.inf

    def __enter__(self) -> Bar:
        self._draw(self.live.start)
        self.advance(0)
        return self

    def __exit__(self, *error: object) -> None:
        self._draw(self.live.stop)

    def _draw(self, function: Callable[[], object]) -> None:
        """Call a function that draws. If the terminal was closed, the run goes on."""
        if self.is_shown:
            try:
                function()
            except OSError:
                self.is_shown = False
                with suppress(OSError):
                    self.live.stop()  # gives the standard streams back

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self.drawn > REDRAW_SECONDS

    def advance(self, count: int) -> None:
        self.waiting += count
        if not self.is_due:
            return
        self.drawn = time.monotonic()
        if self.waiting:
            self.progress.advance(self.task, self.waiting)
            self.waiting = 0
        lines = [self.progress, Text(self.below)] if self.below else [self.progress]
        self._draw(lambda: self.live.update(Group(*lines), refresh=True))

    def skip(self, count: int) -> None:
        self.progress.update(self.task, total=(self.progress.tasks[0].total or 0) - count)

    def set_text(self, beside: str, below: str = "") -> None:
        self.progress.update(self.task, description=beside)
        self.below = below


class PartOfBar(ProgressSink):
    """Some of the steps that another object shows."""

    def __init__(self, whole: ProgressSink, skipped: int) -> None:
        self.whole, self.done, self.skipped = whole, 0, skipped
        whole.skip(skipped)

    @property
    def is_due(self) -> bool:
        return self.whole.is_due

    def advance(self, count: int) -> None:
        self.done += count
        self.whole.advance(count)

    def set_text(self, beside: str, below: str = "") -> None:
        self.whole.set_text(beside, below)

    def undo(self) -> None:
        """Take back all steps: they failed, and will be done again or never."""
        self.whole.advance(-self.done)
        self.whole.skip(-self.skipped)


_current: ProgressSink | None = None  # shows all steps of this process


@contextmanager
def progress_bar(total: int, done: int = 0, is_shown: bool = True) -> Iterator[ProgressSink]:
    """A bar of steps, or a part of the bar that is shown already.

    Args:
        total, done: see `Bar`.
        is_shown: False shows nothing.
    """
    if not is_shown:
        yield ProgressSink()
    elif _current is None:
        bar = Bar(total, done)
        with bar, part_of(bar):
            yield bar
    else:
        part = PartOfBar(_current, done)
        try:
            yield part
        except BaseException:
            part.undo()
            raise


@contextmanager
def part_of(whole: ProgressSink) -> Iterator[None]:
    """Makes the bars of this process parts of `whole`, until exit."""
    global _current
    earlier, _current = _current, whole
    try:
        yield
    finally:
        _current = earlier
