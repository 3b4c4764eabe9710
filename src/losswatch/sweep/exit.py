"""How the command ends: one line about an error, the table of a sweep, the exit status.

The exit status is 0 if all runs are done; 1 if a run is not, or if a file or the table cannot be
written; 2 for bad input; 130 after Ctrl-C; 143 after SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)
from yaml import YAMLError

from losswatch import compat
from losswatch.config import yaml_errors
from losswatch.config.names import as_one_text
from losswatch.sweep.command import Sweep, command, current_sweep
from losswatch.sweep.table import show_table
from losswatch.terminal import flush, say
from losswatch.text import one_line

EXTRAS = ("joblib", "submitit", "ray", "optuna")  # of pyproject.toml


def stop(message: str) -> NoReturn:
    """End the command for bad input, with one line and exit status 2.

    SystemExit, because Hydra prints a line of its own for an Exception.
    """
    say(f"losswatch: {message}")
    raise SystemExit(2)


# --- Around the command --------------------------------------------------------------------------


class Escaped(BaseException):
    """Carries an error of a callback past Hydra, which makes a warning of any Exception there."""


@contextmanager
def escaping() -> Iterator[None]:
    """Around a callback whose errors must end the command."""
    try:
        yield
    except Exception as error:
        raise Escaped(error) from error


@contextmanager
def clear_errors() -> Iterator[Sweep]:
    """Around Hydra's main: an error becomes one line and an exit status; a sweep gets its table.

    This cannot be done in a callback, because Hydra makes warnings of the errors of callbacks. If
    HYDRA_FULL_ERROR is set, errors keep their traceback.

    Raises:
        SystemExit: with the exit status, if that is not 0.
    """
    is_verbose = "HYDRA_FULL_ERROR" in os.environ
    line, status = "", 0
    with command() as sweep:
        try:
            yield sweep
        except BaseException as raised:
            error = raised.args[0] if isinstance(raised, Escaped) else raised
            known = verdict(error)
            if known is None or (is_verbose and isinstance(error, Exception)):
                raise
            line, status = known
        if sweep.folder is not None:
            all_done = False
            try:
                all_done = show_table(sweep.folder)
            except KeyboardInterrupt as error:
                line, status = verdict(error) or (line, status)
            except Exception as error:
                if is_verbose:
                    raise
                # What ended the sweep comes first: it is often the cause of this error, too.
                line = line or f"the sweep's summary cannot be written: {one_line(error)}"
            status = status or int(sweep.lacks_runs or not all_done)
        if failure := flush(sys.stdout):
            line, status = line or f"the output cannot be written: {failure}", status or 1
        if line:
            say(f"losswatch: {line}")
        flush(sys.stderr)
        if status:
            raise SystemExit(status)


def verdict(error: BaseException) -> tuple[str, int] | None:
    """The line about an error, and the exit status; None if the error is a bug of losswatch."""
    if current_sweep().is_terminated:  # the signal often is the cause of another error
        return "terminated", 128 + signal.SIGTERM
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, SystemExit):
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning exits after Ctrl-C
            return "interrupted", 130
        # Of `stop`, which has printed its line, or of somebody's `sys.exit("a line")`.
        code = error.code
        return ("", code or 0) if isinstance(code, int | None) else (str(code), 1)
    cause: BaseException | None = error
    while isinstance(cause, InterpolationResolutionError):  # of the name of a folder
        cause = cause.__cause__ or cause.__context__
    # A full disk, or a folder without permission. MissingConfigException is an OSError, too.
    if isinstance(cause, OSError) and not isinstance(cause, HydraException):
        return f"a file cannot be read or written: {cause}", 1
    if isinstance(error, HydraException | OmegaConfBaseException | YAMLError | UnicodeDecodeError):
        return explain(error), 2
    if isinstance(error, ValueError) and str(error).startswith(compat.NOT_A_CHOICE):
        return "a group, such as loss or model, takes the name of one of its files, as text", 2
    if current_sweep().folder is not None and isinstance(error, Exception):
        # An error of a launcher or a sweeper: those of the runs are in their results. Cut, because
        # submitit's error holds the whole log of a job.
        return f"the sweep ended early: {one_line(error)[:300]}", 1
    return None


def explain(error: Exception) -> str:
    """One line from Hydra's or OmegaConf's error about an override or a file: what is allowed."""
    if isinstance(error, YAMLError | UnicodeDecodeError):
        return yaml_errors.describe(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        # Hydra gives no names for a choice in a list.
        known = ", ".join(error.options or [])
        allowed = f"{group} is one of {known}" if known else f"--help lists those of {group}"
        extra = choice.partition("_")[0]  # submitit_slurm comes with submitit
        hint = f'; pip install -e ".[{extra}]" adds {choice}' if extra in EXTRAS else ""
        return f"there is no {group}={choice}; {allowed}{hint}"
    if isinstance(error, OverrideParseException):
        given = current_sweep().given.get(error.override, error.override)
        if text := as_one_text(given):
            why = "the value cannot be read; if it is text, quote the value for Hydra"
            return f"{given}: {why}: {text}"
    if several := compat.several_values(error):
        given = current_sweep().given.get(several, several)
        key, _, value = given.partition("=")
        return (
            f"{given}: to train with each of these values add -m; for a list give "
            f"{key}=[{value}]; for text quote the value for Hydra: {as_one_text(given)}"
        )
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        parent, _, _ = cause.full_key.rpartition(".")
        keys = cause.parent_node.keys() if OmegaConf.is_dict(cause.parent_node) else []
        known = ", ".join(str(key) for key in keys if key != "hydra" and str(key)[0] != "_")
        return f"there is no {cause.full_key}; {parent or 'the config'} has {known or 'no keys'}"
    texts = [str(error)] if cause is error else [str(error), str(cause).split("\n")[0]]
    noise = ("https://", "full_key:", "object_type=", "reference_type=")
    lines = [str(yaml_errors.file_of(cause) or "")]
    for line in "\n".join(texts).splitlines():
        if not any(word in line for word in noise):
            lines.append(line)
    return ": ".join(line.strip().rstrip(".:") for line in lines if line.strip())
