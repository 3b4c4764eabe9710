"""result.json: what became of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from losswatch.report import replace_file


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """JSON has no NaN or infinity; they are written as null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(plain(dict(result)), indent=2, ensure_ascii=False, allow_nan=False)
    replace_file(folder / "result.json", text + "\n")
