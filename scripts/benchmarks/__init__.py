"""The sections of `python scripts/benchmark.py`, one module each, and what they share."""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # the repository
