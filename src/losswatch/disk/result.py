"""result.json: what became of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from losswatch.disk.checkpoint import is_plain
from losswatch.files import replace_file
from losswatch.text import printable, reason


class Reached(NamedTuple):
    """What training or testing has reached."""

    steps: int  # done in all
    metrics: dict[str, float]  # of the last validation and of the test
    is_done: bool = True  # False: to be resumed


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write result.json. JSON has no NaN or infinity; they are written as null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(plain(dict(result)), indent=2, ensure_ascii=False, allow_nan=False)
    # Bytes of a command line that are no UTF-8 are lone surrogates in Python, and escapes in JSON.
    replace_file(folder / "result.json", (text + "\n").encode("utf-8", "backslashreplace"))


def read_result(folder: Path) -> dict[str, Any] | None:
    """What result.json holds; None if there is none.

    Raises:
        ValueError: it is damaged; in one line.
    """
    path = folder / "result.json"
    if not path.exists():
        return None
    try:
        if not path.is_file():
            raise ValueError("it is not a regular file")
        result = json.loads(path.read_text(encoding="utf-8"))
        if not (
            isinstance(result, dict)
            and is_plain(result)
            and isinstance(result.get("config"), dict)
            and isinstance(result.get("status"), str)
        ):
            raise ValueError("it holds what no run writes")
        metrics = result.get("metrics", {} if result["status"] != "done" else None)
        if not isinstance(metrics, dict) or not all(
            value is None or isinstance(value, int | float) for value in metrics.values()
        ):
            raise ValueError("its metrics are missing or no numbers")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{printable(path)} cannot be read ({reason(error)})") from error
    return result


def finished(folder: Path) -> dict[str, Any] | None:
    """The result.json of a run that is done; None if the run is not, or the file is damaged."""
    try:
        result = read_result(folder)
    except ValueError:  # `folder.take_up` names it
        return None
    return result if result and result["status"] == "done" else None
