"""What was swept, read from the files that Hydra writes when a run starts."""

from __future__ import annotations

import functools
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from losswatch.text import parse_overrides


def swept(folder: Path) -> dict[str, str]:
    """The overrides of a run that are not those of all runs of its sweep; of a single run, all.

    They are read from the files that Hydra has written when the run starts.
    """
    try:
        own = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
    except OSError:  # `hydra.output_subdir=null`
        return {}
    files = (parent / "multirun.yaml" for parent in folder.absolute().parents)
    sweep = next(filter(Path.exists, files), None)
    common = _overrides_of_all(sweep, sweep.stat().st_mtime) if sweep else frozenset()
    changed = parse_overrides(override for override in own if override not in common)
    return {key: value for key, value in changed.items() if key != "resume"}


@functools.lru_cache(maxsize=1)  # reading it takes longer than all else that is done for a row
def _overrides_of_all(sweep: Path, changed: float) -> frozenset[str]:
    """The command's overrides, from a sweep's `multirun.yaml` as of the time of its last change."""
    return frozenset(OmegaConf.select(OmegaConf.load(sweep), "hydra.overrides.task") or ())
