"""What one run says of itself in `result.json` and `.hydra/`, checked before anything uses it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import yaml

from losswatch.files import read_file
from losswatch.text import parse_overrides, printable, reason

log = logging.getLogger(__name__)

METRICS = ["accuracy", "dice", "iou"]

# The types of a record's parts. Each part may be missing or null.
NUMBER = (int, float)
RECORD_TYPES: dict[str, tuple[type, ...]] = {
    "status": (str,),
    "error": (str,),
    "seconds": NUMBER,
    "overrides": (list,),
    "choices": (dict,),
    **{f"choices.{group}": (str,) for group in ("loss", "optimizer", "model")},
    "config": (dict,),
    "metrics": (dict,),
}
# Limits far above what a run writes: a hostile file could keep a reader busy for hours.
RECORD_DEPTH, RECORD_KEYS = 32, 1000
JSON_BYTES, YAML_BYTES = 2**20, 2**17  # YAML takes far longer to read


def read_record(run_dir: Path) -> dict[str, Any]:
    """A run's `result.json`, or what its configuration alone tells where there is none.

    A run without `result.json` is still running or was killed: its status is "unfinished". A run
    whose `result.json` is unreadable, or holds what no run writes, counts as unfinished, too, with
    a warning.
    """
    path = run_dir / "result.json"
    try:
        return _check(json.loads(read_file(path, JSON_BYTES)))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        log.warning("%s: unreadable, counted as unfinished (%s)", printable(path), reason(error))
    path = run_dir / ".hydra"
    try:
        return _check({
            "status": "unfinished",
            "overrides": _read_yaml(path / "overrides.yaml"),
            "choices": get(_read_yaml(path / "hydra.yaml"), "hydra.runtime.choices"),
            "config": _read_yaml(path / "config.yaml"),
        })  # fmt: skip
    except ValueError as error:
        log.warning("%s: unreadable, settings left out (%s)", printable(path), reason(error))
        return {"status": "unfinished"}


def _check(record: Any) -> dict[str, Any]:
    """The record, if a run could have written it.

    Raises:
        ValueError, OverflowError: no run writes this; the message says why.
    """
    if not isinstance(record, dict) or not record.get("status"):
        raise ValueError("not an object with a status")
    if _is_deeper(record, RECORD_DEPTH):
        raise ValueError(f"nested more than {RECORD_DEPTH} levels deep")
    parts = [(place, get(record, place), types) for place, types in RECORD_TYPES.items()]
    metrics = record.get("metrics")
    if isinstance(metrics, dict):
        parts += [(f"metrics.{name}", value, NUMBER) for name, value in metrics.items()]
        if len(metrics) > RECORD_KEYS:
            raise ValueError(f"more than {RECORD_KEYS} metrics")
    for place, value, types in parts:
        if value is not None and type(value) not in types:  # a bool does not pass as an int
            raise ValueError(f"{place} is of type {type(value).__name__}")
        if value is not None and types == NUMBER:
            float(value)  # raises OverflowError if an integer is too large
    overrides = record.get("overrides") or []
    if not all(isinstance(override, str) for override in overrides):
        raise ValueError("overrides are not all text")
    if len(parse_overrides(overrides)) > RECORD_KEYS:
        raise ValueError(f"more than {RECORD_KEYS} overrides")
    return record


def _is_deeper(tree: Any, levels: int) -> bool:
    below = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return levels == 0 or any(_is_deeper(part, levels - 1) for part in below)


class AliasFreeLoader(yaml.SafeLoader):
    """Refuses aliases: Hydra writes none, and a few nested ones can expand beyond the memory."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases are not read")
        return super().compose_node(parent, index)


def _read_yaml(path: Path) -> Any:
    """A YAML file's content; None if there is no file: the run was killed before it wrote it.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        return yaml.load(read_file(path, YAML_BYTES), AliasFreeLoader)
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
