"""result.json: what became of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from losswatch.files import replace_file


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
