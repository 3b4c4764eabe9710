"""The names of run folders and sweep folders. Hydra resolves them before the first run."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from losswatch.config.errors import ConfigError

# Bytes of a run's name. Most file systems allow 255 bytes for a name.
_LONGEST = 150
# An override that is used unchanged in a folder's name. A comma may stand inside brackets only, so
# that a name has one reading only.
_PLAIN = re.compile(r"(?:[\w.=+~@-]|\[[\w.,=+~@-]*\])+")

# What runs mostly differ in. Names begin with it, because lists show the first characters only.
_FIRST = ("loss", "theta", "model", "optimizer", "seed")


def _order(override: str) -> tuple[int, str]:
    group = re.split("[.=@]", override, maxsplit=1)[0]
    return _FIRST.index(group) if group in _FIRST else len(_FIRST), override


def run_name(overrides: Any) -> str:
    """The name of a run's folder: its overrides, in the order of `_FIRST`, then of the alphabet.

    Different sets of overrides get different names. If a name is long, or has characters that
    `_PLAIN` does not allow, it is shortened and ends with a hash of the overrides.

    >>> run_name(["loss=dice", "theta=0.05"])
    'loss=dice,theta=0.05'
    >>> run_name(["experiment=smoke", "seed=1", "optimizer.lr=0.1", "loss=dice"])
    'loss=dice,optimizer.lr=0.1,seed=1,experiment=smoke'
    >>> run_name(["++loss.alpha=0.3"]), run_name([])
    ('loss.alpha=0.3', 'default')
    >>> run_name(["note=a b"])
    'note=a_b-c692bc42'
    """
    if OmegaConf.is_config(overrides):  # whose items would be resolved: one may be `${run.folder}`
        overrides = OmegaConf.to_container(overrides, resolve=False)
    ordered = sorted((override.removeprefix("++") for override in overrides), key=_order)
    name = ",".join(ordered) or "default"
    if all(map(_PLAIN.fullmatch, ordered)) and len(name.encode()) <= _LONGEST:
        return name
    digest = hashlib.sha256(repr(ordered).encode()).hexdigest()[:8]
    safe = re.sub(r"[^\w.,=+~@\[\]-]", "_", name)
    return safe.encode()[: _LONGEST - 9].decode(errors="ignore") + "-" + digest


@functools.cache
def sweep_name() -> str:
    """The name of this command's folder in outputs/: the time, and a number if that is taken.

    This function creates the folder, so two commands that start in the same second get two
    folders. Cached: one command has one folder.

    Raises:
        OSError: the folder cannot be created.
    """
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    name, attempt = stamp, 1
    while True:
        try:
            Path("outputs", name).mkdir(parents=True)
            return name
        except FileExistsError:
            attempt += 1
            name = f"{stamp}-{attempt}"


def run_folder(resume: str | None, overrides: Sequence[str]) -> str:
    """The folder of a single run: the one that it resumes, or a new one.

    Raises:
        ConfigError: the folder to resume does not exist.
    """
    if resume is not None and not (resume and Path(resume).is_dir()):
        raise ConfigError(f"resume={resume}: there is no such run folder")
    return resume or str(Path("outputs", sweep_name(), run_name(overrides)))


def output_subdir(resume: str | None) -> str | None:
    """The folder, inside that of the run, in which Hydra writes the config; None if it is resumed.

    Hydra would write the config before losswatch has compared it with that of the resumed run.
    """
    return None if resume else ".hydra"
