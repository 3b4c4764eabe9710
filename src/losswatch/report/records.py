"""What one run says of itself, in `result.json` or in `.hydra/`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import yaml

from losswatch.disk.curves import last_watched
from losswatch.disk.result import Result
from losswatch.files import read_file
from losswatch.text import printable, reason

log = logging.getLogger(__name__)

METRICS = ["dice", "iou", "accuracy"]


def read_record(run_dir: Path) -> Result:
    """A run's `result.json`, and what its configuration tells where that says nothing.

    A run without `result.json` is still running or was killed: its status is "unfinished". A run
    whose `result.json` is damaged counts as unfinished, too, with a warning.
    """
    result = None
    try:
        result = Result.read(run_dir)
    except ValueError as error:
        log.warning("%s; counted as unfinished", error)
    if result and result.config:
        return result
    path = run_dir / ".hydra"
    try:
        if result:  # of a run whose settings were refused
            return Result.of(vars(result) | {"config": _read_yaml(path / "config.yaml")})
        return Result.of({
            "status": "unfinished",
            "overrides": _read_yaml(path / "overrides.yaml"),
            "choices": get(_read_yaml(path / "hydra.yaml"), "hydra.runtime.choices"),
            "config": _read_yaml(path / "config.yaml"),
            "watched": last_watched(run_dir),
        })  # fmt: skip
    except ValueError as error:
        log.warning("%s: unreadable, settings left out (%s)", printable(path), reason(error))
        return result or Result()


def _read_yaml(path: Path) -> Any:
    """A YAML file's content; None if there is no file: the run was killed before it wrote it.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        return yaml.safe_load(read_file(path))
    except FileNotFoundError:
        return None
    except Exception as error:  # PyYAML passes on the errors of its conversions, of any type
        raise ValueError(f"{path.name}: {reason(error)}") from error


def get(tree: Any, place: str) -> Any:
    """The value at a dotted place in nested dicts, None where there is none.

    >>> get({"model": {"batch_norm": True}}, "model.batch_norm"), get({"model": 3}, "model.lr")
    (True, None)
    """
    for key in place.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
