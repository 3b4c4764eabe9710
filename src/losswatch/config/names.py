"""The names of run folders and sweep folders. Hydra resolves them before the first run."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from losswatch.config.errors import ConfigError

# Bytes of a run's name. Most file systems allow 255 bytes for a name.
_LONGEST = 150
# An override that is used unchanged in a folder's name. A comma may stand inside brackets only, so
# that a name has one reading only.
_PLAIN = re.compile(r"(?:[\w.=+~@-]|\[[\w.,=+~@-]*\])+")

# A character that no folder's name has.
_UNSAFE = re.compile(r"[^\w.,=+~@\[\]-]")

# What runs mostly differ in. Names begin with it, because lists show the first characters only.
_FIRST = ("loss", "theta", "model", "optimizer", "seed")


def _order(override: str) -> tuple[int, str]:
    group = re.split("[.=@]", override, maxsplit=1)[0]
    return _FIRST.index(group) if group in _FIRST else len(_FIRST), override


def run_name(overrides: Any, constants: Collection[str] = (), sweep: str | None = None) -> str:
    """The name of a run's folder: its overrides, in the order of `_FIRST`, then of the alphabet.

    Different sets of overrides get different names. If a name is long, or has characters that
    `_PLAIN` does not allow, it is shortened and ends with a hash of the overrides. A test or a
    prediction begins with its mode and the name of the run whose network it takes.

    Args:
        overrides: of the run.
        constants: the keys that the name leaves out (`constant_keys`).
        sweep: the folder of the run's sweep. If it holds the run under its name with constants,
            that name is kept: losswatch 0.1 gave it, or a sweep of one combination.

    >>> run_name(["loss=dice", "theta=0.05"])
    'loss=dice,theta=0.05'
    >>> run_name(["experiment=smoke", "seed=1", "optimizer.lr=0.1", "loss=dice"])
    'loss=dice,optimizer.lr=0.1,seed=1,experiment=smoke'
    >>> run_name(["model=convnet", "seed=1", "loss=dice"], constants=["model"])
    'loss=dice,seed=1'
    >>> run_name(["++loss.alpha=0.3"]), run_name([])
    ('loss.alpha=0.3', 'default')
    >>> run_name(["note=a b"])
    'note=a_b-c692bc42'
    >>> run_name(["mode=test", "checkpoint='outputs/a/loss=dice,seed=1'", "theta=0.3"])
    'test_loss=dice,seed=1,theta=0.3'
    """
    if OmegaConf.is_config(overrides):  # whose items would be resolved: one may be `${run.folder}`
        overrides = OmegaConf.to_container(overrides, resolve=False)
    ordered = sorted((override.removeprefix("++") for override in overrides), key=_order)
    if constants and sweep and Path(sweep, whole := _joined(ordered)).is_dir():
        return whole
    return _joined(ordered, constants)


def _joined(overrides: Sequence[str], constants: Collection[str] = ()) -> str:
    """The name that ordered overrides make; see `run_name`."""
    parts = [override for override in overrides if key_of(override) not in constants]
    is_readable, name = all(map(_PLAIN.fullmatch, parts)), ",".join(parts) or "default"
    given = {key_of(override): override for override in overrides}
    if "checkpoint" in given and "mode" in given:
        mode, place = (_value(given[key]) for key in ("mode", "checkpoint"))
        others = [part for part in parts if key_of(part) not in ("mode", "checkpoint")]
        name = ",".join([f"{mode}_{_run_of(place)}", *others])
        is_readable = _UNSAFE.search(name) is None and (not constants or "checkpoint" in constants)
        parts = [place, *parts]
    if is_readable and len(name.encode()) <= _LONGEST:
        return name
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:8]
    safe = _UNSAFE.sub("_", name)
    return safe.encode()[: _LONGEST - 9].decode(errors="ignore") + "-" + digest


def key_of(override: str) -> str:
    """The key of an override.

    >>> key_of("++loss.alpha=0.3")
    'loss.alpha'
    """
    return override.lstrip("+~").partition("=")[0]


def _value(override: str) -> str:
    """The value of an override, without its quotes."""
    return str(OverridesParser.create().parse_override(override).value())


def _run_of(place: str) -> str:
    """The name of the run that `checkpoint` names, and of the file if it names a file.

    >>> _run_of("outputs/a/loss=dice"), _run_of("outputs/a/loss=dice/checkpoints/step=100.ckpt")
    ('loss=dice', 'loss=dice,step=100')
    """
    path = Path(os.path.abspath(place))
    if path.suffix != ".ckpt":
        return path.name
    run = path.parents[1].name if path.parent.name == "checkpoints" else ""
    return ",".join(filter(None, [run, path.stem]))


def constant_keys(hydra: DictConfig) -> list[str]:
    """The keys that the names of a sweep's runs leave out, since they do not tell runs apart.

    These are the keys that the command, or its search, gives one value. If no key has several
    values, there are none: the only run is named as a single run is. `checkpoint` is one of them
    if the runs that it names have different names, with which the names of tests begin.

    Args:
        hydra: the section `hydra` of the sweep's config.

    Raises:
        HydraException: the parameters of a search cannot be read.
    """
    params = [f"{key}={value}" for key, value in (hydra.sweeper.get("params") or {}).items()]
    command: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    parsed = OverridesParser.create().parse_overrides([*params, *command])
    last = {key_of(override.get_key_element()): override for override in parsed}
    swept = {key for key, override in last.items() if override.is_sweep_override()}
    if not swept:
        return []
    if "checkpoint" in swept and _tells_apart(last["checkpoint"]):
        swept.remove("checkpoint")
    return [key for key in last if key not in swept]


def _tells_apart(checkpoint: Override) -> bool:
    """Whether all checkpoints of a sweep are of runs with different names."""
    if not checkpoint.is_discrete_sweep():
        return False
    places = [_run_of(_value(f"_={text}")) for text in checkpoint.sweep_string_iterator()]
    return len(set(places)) == len(places)


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
