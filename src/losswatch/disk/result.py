"""result.json: how a run ended. Only this file reads or writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from losswatch.events.tags import PREDICTED
from losswatch.files import read_file, replace_file
from losswatch.text import printable, reason

# The types of a result's parts as a file holds them. Each part may be missing or null.
_NUMBER = (int, float)
_TYPES: dict[str, tuple[type, ...]] = {
    "run": (str,),
    "status": (str,),
    "error": (str,),
    "overrides": (list,),
    "choices": (dict,),
    "config": (dict,),
    "steps": (int,),
    "seconds": _NUMBER,
    "metrics": (dict,),
    "watched": (dict,),
    "findings": (list,),
}


CONSTANT = "constant: "  # begins the verdict on a run that predicts one class alone


@dataclass(frozen=True)
class Result:
    """How a run ended. A part that is not known is None or empty."""

    run: str | None = None  # the name of its folder
    status: str = "unfinished"  # or "done" or "failed"
    error: str | None = None
    overrides: list[str] | None = None  # of the command line
    choices: dict[str, Any] = field(default_factory=dict)  # the name chosen in each config group
    config: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None  # done in all attempts
    seconds: float | None = None  # of the last attempt
    metrics: dict[str, float] = field(default_factory=dict)  # of last validation and test, by tag
    # Values and gradient norms of the last observation, by tag.
    watched: dict[str, float] = field(default_factory=dict)
    # What is wrong with the training: name, step, text and remedy of each (doctor/README.md).
    findings: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return self.status == "done"

    @property
    def stage(self) -> str:
        """Whose metrics are the run's: "val", or "test" in mode=test, which validates nothing."""
        return "test" if self.config.get("mode") == "test" else "val"

    def score(self, metric: str) -> float:
        """The score for a search: a metric of the validation; in mode=test that of the test."""
        return self.metrics.get(metric.replace("val/", f"{self.stage}/", 1), math.nan)

    def headline(self) -> str:
        """The run's metrics as text. If it is constant, that replaces the accuracy, which hides it.

        >>> metrics = {"val/dice": 0.5, "val/iou": 0.4, "val/accuracy": 0.95}
        >>> Result(metrics=metrics).headline()
        'val Dice 0.5000, IoU 0.4000, accuracy 0.9500'
        >>> shares = {"val/predicted/class_0": 0.0, "val/predicted/class_1": 1.0}
        >>> Result(metrics=metrics | shares).headline()
        'val Dice 0.5000, IoU 0.4000, constant: foreground'
        """
        dice, iou, accuracy = (
            f"{self.metrics.get(f'{self.stage}/{name}', math.nan):.4f}"
            for name in ("dice", "iou", "accuracy")
        )
        last = self.verdict if self.constant else f"accuracy {accuracy}"
        return f"{self.stage} Dice {dice}, IoU {iou}, {last}"

    @property
    def verdict(self) -> str | None:
        """In a word or two what the run is; None if nothing is wrong that is known.

        "constant: <class>" if all pixels evaluated are predicted as one class, otherwise the name
        of the first finding.
        """
        name = self.constant
        found = [finding["name"] for finding in self.findings]
        return f"{CONSTANT}{name}" if name else found[0] if found else None

    @property
    def constant(self) -> str | None:
        """The class that all pixels evaluated are predicted as; None if there is no such class.

        If two classes have no names, they are "background" and "foreground". Classes that overlap
        are joined by "+"; "background" means that no pixel has any.
        """
        prefix = f"{self.stage}/{PREDICTED}/"
        shares = {tag.removeprefix(prefix): share for tag, share in self.metrics.items()
                  if tag.startswith(prefix)}  # fmt: skip
        if not shares or not {*shares.values()} <= {0.0, 1.0}:
            return None
        name = "+".join(name for name, share in shares.items() if share) or "background"
        has_names = {*shares} != {"class_0", "class_1"}
        return name if has_names else {"class_0": "background"}.get(name, "foreground")

    @classmethod
    def read(cls, folder: Path) -> Result | None:
        """The result of a run; None if the folder has no result.json.

        Raises:
            ValueError: the file is damaged. The message is one line.
        """
        path = folder / "result.json"
        try:
            return cls.of(json.loads(read_file(path)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{printable(path)} cannot be read ({reason(error)})") from error

    @classmethod
    def of(cls, parts: Any) -> Result:
        """The result with these parts, as JSON or YAML gives them; null among numbers is NaN.

        Raises:
            ValueError: the parts are not those of a run.
        """
        if not isinstance(parts, dict) or not parts.get("status"):
            raise ValueError("not an object with a status")
        known = {name: parts[name] for name in _TYPES if parts.get(name) is not None}
        for place, value, types in _typed(known):
            if type(value) not in types:  # a bool does not pass as an int
                raise ValueError(f"{place} is of type {type(value).__name__}")
        for name in ("metrics", "watched"):
            if name in known:
                known[name] = {tag: _as_float(value) for tag, value in known[name].items()}
        if "seconds" in known:
            known["seconds"] = _as_float(known["seconds"])
        result = cls(**known)
        for name in ("config", "metrics"):
            if result.is_done and name not in known:
                raise ValueError(f"done, but without {name}")
        return result

    def write(self, folder: Path) -> None:
        """Write result.json. JSON has no NaN or infinity; they are written as null."""
        text = json.dumps(as_json(asdict(self)), indent=2, ensure_ascii=False, allow_nan=False)
        # Bytes of a command line that are not UTF-8 are lone surrogates in Python, and escapes in
        # JSON.
        replace_file(folder / "result.json", (text + "\n").encode("utf-8", "backslashreplace"))


def finished(folder: Path) -> Result | None:
    """The result of a run that is done; None if the run is not, or the file is damaged."""
    try:
        result = Result.read(folder)
    except ValueError:  # `resume.find_start` names it
        return None
    return result if result and result.is_done else None


def as_json(value: Any) -> Any:
    """Plain data in which None replaces NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: as_json(below) for key, below in value.items()}
    if isinstance(value, list):
        return [as_json(below) for below in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _typed(parts: Mapping[str, Any]) -> Iterator[tuple[str, Any, tuple[type, ...]]]:
    """Each value whose type is known: its place, the value and the types it may have."""
    for name, part in parts.items():
        yield name, part, _TYPES[name]
    for name in ("loss", "model", "optimizer"):
        yield f"choices.{name}", parts.get("choices", {}).get(name), (str, type(None))
    for name in ("metrics", "watched"):
        for tag, value in parts.get(name, {}).items():
            yield f"{name}.{tag}", value, (*_NUMBER, type(None))
    for override in parts.get("overrides", []):
        yield "an override", override, (str,)
    for finding in parts.get("findings", []):
        yield "a finding", finding, (dict,)
        if isinstance(finding, dict):
            for key, kind in (("name", str), ("step", int), ("text", str), ("remedy", str)):
                yield f"a finding's {key}", finding.get(key), (kind,)


def _as_float(number: float | None) -> float:
    try:
        return math.nan if number is None else float(number)
    except OverflowError as error:  # an integer of hundreds of digits
        raise ValueError("a number is too large") from error
