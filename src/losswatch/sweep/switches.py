"""The switches of the process that one command sets, and puts back at its end."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from losswatch.command import Command


@contextmanager
def command_switches() -> Iterator[bool]:
    """Set the switches of one command; restore them on exit.

    Yields:
        whether the user asks for tracebacks, by HYDRA_FULL_ERROR.
    """
    is_verbose = "HYDRA_FULL_ERROR" in os.environ
    with ExitStack() as switches:
        # Hydra raises errors to us, instead of printing them and exiting.
        switches.enter_context(_environment("HYDRA_FULL_ERROR", "1"))
        # joblib's processes leave semaphores behind when they are killed. Python's resource
        # tracker, a process of its own, removes them; its warning would follow the table.
        filters = [os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning"]
        switches.enter_context(_environment("PYTHONWARNINGS", ",".join(filter(None, filters))))
        switches.enter_context(quiet_logging())
        yield is_verbose


@contextmanager
def ended_by_sigterm(command: Command) -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does; restore its handler on exit.

    `timeout`, schedulers and containers send it, some of them to all processes of the command and
    more than once. A handler that is there already stays.
    """
    process, earlier = os.getpid(), {}

    def end(number: int, _: object) -> None:
        if os.getpid() != process:  # a fork inherits the handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not command.is_terminated:
            command.is_terminated = True
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
    """Print no traceback for a log that cannot be written (`silence_logging`); restore on exit."""
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
    """Set an environment variable, which child processes inherit; restore it on exit."""
    earlier = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if earlier is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = earlier
