"""A run's config as plain data: as it stands in checkpoints and in result.json, and what differs.

Imports nothing slow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from losswatch.config.schema import RANDOM
from losswatch.text import shortened

# What may differ when a run is resumed.
_FREE = (
    "resume", "mode", "checkpoint", "metric", "tags", "logger", "trainer.enable_progress_bar",
    "trainer.max_time",
)  # fmt: skip


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The config as dicts, lists and plain values, without Hydra's section."""
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    return OmegaConf.to_container(own, resolve=True)  # type: ignore[return-value]


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested config, each with its dotted key.

    >>> dict(flat({"seed": 0, "data": {"low": 0.0, "high": 1.0}}))
    {'seed': 0, 'data.low': 0.0, 'data.high': 1.0}
    """
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(earlier: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """What keeps a run from being resumed with this config: "<key> was <value>, now <value>".

    Args:
        earlier: the run's config as a file holds it, so anybody may have written it.
        config: of this command, as plain data.
    """
    old, new = dict(flat(earlier)), dict(flat(config))
    # Old runs have no data._target_: then there was only data=random.
    old = {"data._target_": RANDOM} | old
    return [
        f"{shortened(key)} was {shortened(old.get(key, 'not set'))}, now {new.get(key, 'not set')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not any(f"{key}.".startswith(f"{free}.") for free in _FREE)
    ]
