"""What a command shows on the terminal: its lines, and a bar of the steps done.

The terminal belongs to the process, so what is shown on it at the moment is state of this module.
"""

from __future__ import annotations

import io
import logging
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import NamedTuple, TextIO, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")

REDRAW_SECONDS = 0.2
ESTIMATE_SECONDS = 2.0  # between the first steps and the estimate of the whole time

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
    """Print a line to the user. An error in printing is ignored: it is no reason to end a run."""
    # A line of `say_for_now`, or a bar of another process, may stand on the terminal's last line.
    # This line takes its place, and the bar is drawn anew below.
    clear = "\r\x1b[K" if _redraws() else ""
    with _current.hidden() if _current else nullcontext():
        with suppress(OSError):
            print(f"{clear}{message}", file=sys.stderr)
        flush(sys.stderr)


def say_for_now(message: str) -> None:
    """Show a line that the next one replaces, on a terminal only."""
    if _redraws():
        with suppress(OSError):
            print(message, end="", file=sys.stderr, flush=True)


def _redraws() -> bool:
    """Whether standard error is a terminal on which lines can be drawn anew."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def flush(stream: TextIO) -> OSError | None:
    """Flush a stream; return the error if that fails, and send the stream to the null device.

    Otherwise the buffered text would fail again at each later flush: when joblib starts a process,
    and at the end of this one, which would then exit with status 120.
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
        except Exception:  # a message that does not fit its arguments
            self.handleError(record)


def followed(results: Iterator[T], total: int, what: str) -> Iterator[T]:
    """The results of slow work as they come, with a bar of how many there are.

    It appears after half a second, on a terminal of this process, while no other bar is shown.
    """
    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    columns = TextColumn("{task.completed:,.0f} of {task.total:,.0f}  {task.description}")
    is_shown = _redraws() and multiprocessing.parent_process() is None and _current is None
    begin = drawn = time.monotonic()
    with Progress(
        columns, BarColumn(bar_width=16), TimeRemainingColumn(compact=True),
        console=console, transient=True, auto_refresh=False, disable=not is_shown,
    ) as progress:  # fmt: skip
        task = progress.add_task(what, total=total, visible=False)
        for result in results:
            yield result
            now = time.monotonic()
            progress.update(task, advance=1, visible=now - begin > 0.5)
            if now - drawn > REDRAW_SECONDS:
                progress.refresh()
                drawn = now


# --- Steps ---------------------------------------------------------------------------------------


class Steps:
    """Where the steps of a training are shown. This one shows nothing."""

    @property
    def is_due(self) -> bool:
        """Whether the bar is redrawn at the next advance, so that text for it is worth making."""
        return False

    def advance(self, count: int) -> None:
        """So many more steps are done."""

    def skip(self, count: int) -> None:
        """So many steps of the total were done before."""

    def show(self, beside: str, below: str = "") -> None:
        """Text beside the bar and below it, from its next redrawing on."""

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """While this is open, a line can be printed."""
        yield


class Bar(Steps):
    """Steps done, the time left and some text. It redraws its lines in place, and leaves none.

    Nothing is drawn where the output is no terminal, or is that of another process.

    Args:
        total: steps, `done` of them before.
        runs: how many runs there are; how long they take is said once, after the first steps.
        all_steps: how many steps are done one after the other in all these runs.
    """

    def __init__(self, total: int, done: int, runs: int, all_steps: int) -> None:
        # Without markup: what others print while the bar is shown goes through this console.
        console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        self.is_shown = _redraws() and multiprocessing.parent_process() is None
        self.progress = Progress(
            TextColumn("step {task.completed:,.0f} of {task.total:,.0f}"),
            *([BarColumn(bar_width=16)] if console.width >= 60 else []),
            TimeRemainingColumn(compact=True),
            TextColumn("left  {task.description}", markup=False),
        )
        self.task = self.progress.add_task("", total=total, completed=done)
        self.console = console
        self.live = self._live()
        self.runs, self.todo = runs, all_steps - done
        self.below, self.waiting = "", 0
        self.begin: tuple[float, float] | None = None  # the time, and the steps done until then
        self.drawn = -math.inf

    def _live(self) -> Live:
        return Live(
            console=self.console, transient=True, auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),
        )  # fmt: skip

    def __enter__(self) -> Bar:
        self._draw(self.live.start)
        self.advance(0)
        return self

    def __exit__(self, *error: object) -> None:
        self._draw(self.live.stop)

    def _draw(self, function: Callable[[], object]) -> None:
        """Call a function that draws. A terminal that was closed is no reason to end a run."""
        if self.is_shown:
            try:
                function()
            except OSError:
                self.is_shown = False

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
            self._estimate(self.progress.tasks[0].completed)
        lines = [self.progress, Text(self.below)] if self.below else [self.progress]
        self._draw(lambda: self.live.update(Group(*lines), refresh=True))

    def _estimate(self, done: float) -> None:
        """Say once how long all runs take."""
        if self.begin is None:  # from now on, since the first steps are slow
            self.begin = self.drawn, done
        seconds, steps = self.drawn - self.begin[0], done - self.begin[1]
        if self.runs > 1 and seconds > ESTIMATE_SECONDS and steps > 0:
            say(f"{self.runs} runs take about {duration(self.todo * seconds / steps)}")
            self.runs = 0

    def skip(self, count: int) -> None:
        self.progress.update(self.task, total=(self.progress.tasks[0].total or 0) - count)
        self.todo -= count

    def show(self, beside: str, below: str = "") -> None:
        self.progress.update(self.task, description=beside)
        self.below = below

    @contextmanager
    def hidden(self) -> Iterator[None]:
        self._draw(self.live.stop)
        try:
            yield
        finally:
            self.live = self._live()  # one that knows nothing of the lines that it drew before
            self._draw(self.live.start)


class Part(Steps):
    """Steps that are part of those that another object shows."""

    def __init__(self, whole: Steps, skipped: int) -> None:
        self.whole, self.done, self.skipped = whole, 0, skipped
        whole.skip(skipped)

    @property
    def is_due(self) -> bool:
        return self.whole.is_due

    def advance(self, count: int) -> None:
        self.done += count
        self.whole.advance(count)

    def show(self, beside: str, below: str = "") -> None:
        self.whole.show(beside, below)

    def undo(self) -> None:
        """These steps failed, so they will be done again or never."""
        self.whole.advance(-self.done)
        self.whole.skip(-self.skipped)


_current: Steps | None = None  # what the steps of this process are part of


class Runs(NamedTuple):
    """Runs of a sweep that are left."""

    runs: int
    steps: int  # that are done one after the other in these runs


# The runs whose time is not yet estimated.
expected = Runs(0, 0)


@contextmanager
def steps(total: int, done: int = 0, runs: int = 0, is_shown: bool = True) -> Iterator[Steps]:
    """A bar of steps; or part of the one under way.

    Args:
        total, done: as of `Bar`.
        runs: how many runs take these steps, if more than one does.
        is_shown: False shows nothing.
    """
    global expected
    if not is_shown:
        yield Steps()
        return
    if _current is not None:
        part = Part(_current, done)
        try:
            yield part
        except BaseException:
            part.undo()
            raise
        return
    bar = Bar(total, done, runs or expected.runs, total if runs else expected.steps)
    with bar, part_of(bar):
        yield bar
    if not bar.runs:
        expected = Runs(0, 0)


@contextmanager
def part_of(whole: Steps) -> Iterator[None]:
    """While this is open, steps of this process are part of these."""
    global _current
    earlier, _current = _current, whole
    try:
        yield
    finally:
        _current = earlier


def duration(seconds: float) -> str:
    """A rough time in words.

    >>> duration(42), duration(100), duration(7000), duration(1e5)
    ('40 seconds', '2 minutes', '2 hours', '28 hours')
    """
    if seconds < 90:
        return f"{max(round(seconds, -1), 10):.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.0f} hours"
