"""How the command ends: one line about an error, the table of a sweep, the exit status.

The exit status is 0 if all runs are done; 1 if a run is not, or if a file or the table cannot be
written; 2 for bad input; 130 after Ctrl-C; 143 after SIGTERM.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
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
from losswatch.config.errors import ConfigError
from losswatch.config.quoting import as_one_text
from losswatch.config.settings import LATER
from losswatch.sweep.switches import command_switches, ended_by_sigterm
from losswatch.sweep.table import show_table
from losswatch.terminal import flush, say
from losswatch.text import one_line

if TYPE_CHECKING:
    from losswatch.command import Command

EXTRAS = ("joblib", "submitit", "ray", "optuna")  # of pyproject.toml


@contextmanager
def clear_errors(command: Command, given: Mapping[str, str]) -> Iterator[None]:
    """Ends a command: an error becomes one line and an exit status; a sweep prints its table.

    If HYDRA_FULL_ERROR is set, errors keep their traceback.

    Args:
        given: the arguments of the command as typed, by the form in which Hydra got them.

    Raises:
        SystemExit: with the exit status, if that is not 0.
    """
    with command_switches() as is_verbose, ended_by_sigterm(command):
        try:
            yield
            line, status = command.line, command.status
        except BaseException as error:
            known = verdict(error, command, given)
            if known is None or (is_verbose and isinstance(error, Exception)):
                raise
            line, status = known
        _end(command, line, status, is_verbose)


def _end(command: Command, line: str, status: int, is_verbose: bool) -> None:
    """Print the table of a command's sweep, and the line about an error.

    Args:
        line, status: see `verdict`; "" and 0 if all went well.
        is_verbose: whether an error keeps its traceback.

    Raises:
        SystemExit: with the exit status, if that is not 0.
    """
    if folder := _sweep_folder(command):
        all_done = False
        try:
            all_done = show_table(folder)
        except KeyboardInterrupt as error:
            line, status = verdict(error, command, {}) or (line, status)
        except Exception as error:
            if is_verbose:
                raise
            # The error that ended the sweep is shown first: it is often the cause of this one.
            line = line or f"the sweep's summary cannot be written: {one_line(error)}"
        status = status or int(command.lacks_runs or not all_done)
    if failure := flush(sys.stdout):
        line, status = line or f"the output cannot be written: {failure}", status or 1
    if line:
        say(f"losswatch: {line}")
    flush(sys.stderr)
    if status:
        raise SystemExit(status)


def _sweep_folder(command: Command) -> Path | None:
    """The folder of the command's sweep, if its runs may have started.

    A sweeper that searches does not tell the command its folder. Hydra's record of the config,
    which `SweepCallback` sets, names the folder.
    """
    if command.folder is None and HydraConfig.initialized():
        hydra = HydraConfig.get()
        if hydra.mode == RunMode.MULTIRUN and not hydra.sweeper._target_.endswith("CheckedSweeper"):
            return Path(hydra.sweep.dir)
    return command.folder


def verdict(
    error: BaseException, command: Command, given: Mapping[str, str]
) -> tuple[str, int] | None:
    """The line about an error, and the exit status; None if the error is a bug of losswatch.

    Args:
        given: see `clear_errors`.
    """
    if command.is_terminated:  # the signal often causes another error
        return "terminated", 128 + signal.SIGTERM
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, SystemExit):
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning exits after Ctrl-C
            return "interrupted", 130
        # Hydra raises it after it has printed a line; other code may call `sys.exit("a line")`.
        code = error.code
        return ("", code or 0) if isinstance(code, int | None) else (str(code), 1)
    cause: BaseException | None = error
    while isinstance(cause, InterpolationResolutionError):  # in the name of a folder
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ConfigError):
        return str(cause), 2
    # A full disk, or a folder without permission. MissingConfigException is an OSError, too.
    if isinstance(cause, OSError) and not isinstance(cause, HydraException):
        return f"a file cannot be read or written: {cause}", 1
    if isinstance(error, HydraException | OmegaConfBaseException | YAMLError | UnicodeDecodeError):
        return explain(error, given), 2
    if isinstance(error, ValueError) and str(error).startswith(compat.NOT_A_CHOICE):
        return "a group, such as loss or model, takes the name of one of its files, as text", 2
    if _sweep_folder(command) is not None and isinstance(error, Exception):
        # This is an error of a launcher or a sweeper: those of the runs are in their results. It is
        # cut, because an error of submitit holds the whole log of a job.
        return f"the sweep ended early: {one_line(error)[:300]}", 1
    return None


def explain(error: Exception, given: Mapping[str, str]) -> str:
    """One line about an error of Hydra or OmegaConf: the override or the file, and what is allowed.

    Args:
        given: see `clear_errors`.
    """
    if isinstance(error, YAMLError | UnicodeDecodeError):
        return yaml_errors.describe(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        # If the choice is one of a list, Hydra does not name the choices.
        known = ", ".join(error.options or [])
        allowed = f"{group} is one of {known}" if known else f"--help lists those of {group}"
        extra = choice.partition("_")[0]  # submitit_slurm comes with submitit
        hint = f'; pip install -e ".[{extra}]" adds {choice}' if extra in EXTRAS else ""
        return f"there is no {group}={choice}; {allowed}{hint}"
    if isinstance(error, OverrideParseException):
        typed = given.get(error.override, error.override)
        if text := as_one_text(typed):
            why = "the value cannot be read; if it is text, quote the value for Hydra"
            return f"{typed}: {why}: {text}"
    if several := compat.several_values(error):
        typed = given.get(several, several)
        key, _, value = typed.partition("=")
        return (
            f"{typed}: to train with each of these values add -m; for a list give "
            f"{key}=[{value}]; for text quote the value for Hydra: {as_one_text(typed)}"
        )
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        parent, _, _ = cause.full_key.rpartition(".")
        keys = cause.parent_node.keys() if OmegaConf.is_dict(cause.parent_node) else []
        known = ", ".join(str(key) for key in keys if key != "hydra" and str(key)[0] != "_")
        return f"there is no {cause.full_key}; {parent or 'the config'} has {known or 'no keys'}"
    override = str(error).removeprefix("Error merging override ")
    if override.startswith("+") and "Interpolation key" in str(cause):
        return f"{override}: the setting is there already; leave out the +"
    missing = re.match(r"Interpolation key '(\w+)\.(\w+)' not found", str(cause))
    if missing and missing[2] in LATER.get(missing[1], {}):
        what = f"${{{missing[1]}.{missing[2]}}} is known only once a run has started"
        if override.startswith("~"):
            return f"{override}: {what}; give another value instead of removing it"
        return f"{what}; --resolve and settings of hydra cannot use it"
    texts = [str(error)] if cause is error else [str(error), str(cause).split("\n")[0]]
    noise = ("https://", "full_key:", "object_type=", "reference_type=")
    lines = [str(yaml_errors.file_of(cause) or "")]
    for line in "\n".join(texts).splitlines():
        if not any(word in line for word in noise):
            lines.append(line)
    return ": ".join(line.strip().rstrip(".:") for line in lines if line.strip())
