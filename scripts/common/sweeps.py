"""Trains the sweeps that a report is made from."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SCRIPTS = Path(__file__).parents[1]


def train_sweep(folder: Path, overrides: Sequence[str]) -> int:
    """Train a sweep into a folder by train.py, and return its exit status.

    Overrides may name classes and functions below scripts/.
    """
    where = f"hydra.sweep.dir={folder}"
    command = [sys.executable, str(SCRIPTS.parent / "train.py"), "-m", "hydra/launcher=fused"]
    paths = [str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([*command, *overrides, where], env=env, check=False).returncode
