"""One command: the sweep that it runs, and the switches that it sets in its process.

Hydra constructs callbacks and launchers from the config. It passes them no object of ours, and
gives none of them back. So `clear_errors` (around the command), `SweepCallback` and the fused
launcher can share a `Sweep` only through this module.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig

from losswatch import compat


@dataclass
class Sweep:
    """The sweep of the command under way, as far as it is known."""

    folder: Path | None = None  # set when the runs may start; the table of it ends the command
    is_checked: bool = False  # whether each run has been composed and checked
    is_terminated: bool = False  # whether SIGTERM ended it
    lacks_runs: bool = False  # whether the table will lack a run, of which no file can be written
    given: dict[str, str] = field(default_factory=dict)  # the arguments of the command, as typed
    # The composed config of each run, by its overrides, until the fused launcher takes it: to
    # compose one takes 70 ms. Other launchers compose their own, some of them elsewhere.
    configs: dict[tuple[str, ...], DictConfig] = field(default_factory=dict)


_current = Sweep()  # empty outside of a command, so also in a process that a launcher starts


def current_sweep() -> Sweep:
    return _current


def again(key: str, folder: str) -> str:
    """This command as text for a shell, with `key`, which resumes or continues, set to a folder."""
    program, *arguments = sys.argv
    start = ["python", program] if program.endswith(".py") else [Path(program).name]
    given = [a for a in arguments if a.partition("=")[0] not in (key, "hydra.run.dir")]
    return shlex.join([*start, *given, f"{key}={folder}"])


@contextmanager
def command() -> Iterator[Sweep]:
    """Around one command: a new `Sweep`, and the switches of this process, put back at the end."""
    global _current
    earlier = _current
    with ExitStack() as switches:
        # Hydra raises errors to us, instead of printing them and exiting.
        switches.enter_context(_environment("HYDRA_FULL_ERROR", "1"))
        # joblib's processes leave semaphores behind when they are killed. Python's resource
        # tracker, a process of its own, removes them; its warning would follow the table.
        filters = [os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning"]
        switches.enter_context(_environment("PYTHONWARNINGS", ",".join(filter(None, filters))))
        switches.enter_context(quiet_logging())
        switches.enter_context(compat.skip_validation(lambda: current_sweep().is_checked))
        _current = Sweep()
        switches.enter_context(_ended_by_sigterm(_current))
        try:
            yield _current
        finally:
            _current = earlier


@contextmanager
def _ended_by_sigterm(sweep: Sweep) -> Iterator[None]:
    """While this is open, SIGTERM ends the command as Ctrl-C does.

    `timeout`, schedulers and containers send it, some of them to all processes of the command and
    more than once. A handler that is there already stays.
    """
    process, earlier = os.getpid(), {}

    def end(number: int, _: object) -> None:
        if os.getpid() != process:  # a fork inherits the handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not sweep.is_terminated:
            sweep.is_terminated = True
            # PyTorch would raise an error for each worker of a loader that the signal ended, too.
            if hasattr(signal, "SIGCHLD"):
                earlier[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
            raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        earlier[signal.SIGTERM] = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextmanager
def quiet_logging() -> Iterator[None]:
    """While this is open, a log that cannot be written prints no traceback (`silence_logging`)."""
    earlier = logging.raiseExceptions, sys.unraisablehook
    silence_logging()
    try:
        yield
    finally:
        logging.raiseExceptions, sys.unraisablehook = earlier


def silence_logging() -> None:
    """From now on a log that cannot be written prints no traceback.

    On a full disk a run fails and its error is shown. Python would print 40 lines more for each
    line of the log, and since version 3.13 some for each log file that it closes.
    """
    logging.raiseExceptions = False
    show = sys.unraisablehook

    def hook(error: sys.UnraisableHookArgs) -> None:
        if not isinstance(error.exc_value, OSError):
            show(error)

    sys.unraisablehook = hook


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """While this is open, an environment variable has this value; child processes inherit it."""
    earlier = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if earlier is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = earlier
