"""The switches of the process that one command sets, and restores on exit."""

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
    """Sets the switches of one command; restores them on exit.

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
    """Lets SIGTERM end the command as Ctrl-C does; restores the handler on exit.

    `timeout`, schedulers and containers send SIGTERM. Some send it to all processes of the command,
    and more than once. If there is another handler already, it stays.
    """
    process, earlier = os.getpid(), {}

    def end(number: int, _: object) -> None:
        if os.getpid() != process:  # a fork inherits the handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not command.is_terminated:
            command.is_terminated = True
            # PyTorch would raise an error for each worker of a loader that the signal has ended.
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
    """Prints no traceback if a log cannot be written (`silence_logging`); restores this on exit."""
    earlier = logging.raiseExceptions, sys.unraisablehook
    silence_logging()
    try:
        yield
    finally:
        logging.raiseExceptions, sys.unraisablehook = earlier


def silence_logging() -> None:
    """Print no traceback if a log cannot be written, from now on.

    On a full disk a run fails and shows its error. Python would print 40 lines more for each line
    of the log. Since version 3.13 it also prints some for each log file that it closes.
    """
    logging.raiseExceptions = False
    show = sys.unraisablehook

    def hook(error: sys.UnraisableHookArgs) -> None:
        if not isinstance(error.exc_value, OSError):
            show(error)

    sys.unraisablehook = hook


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Sets an environment variable, which child processes inherit; restores it on exit."""
    earlier = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if earlier is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = earlier
