"""What Hydra calls around a sweep (conf/config.yaml)."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from losswatch import compat
from losswatch.config.names import constant_keys
from losswatch.config.schema import mode_of
from losswatch.sweep.workers import end_in_time
from losswatch.terminal import say
from losswatch.text import parse_overrides


class SweepCallback(Callback):
    """Prepares the processes of a sweep, and says where a search writes.

    A sweep over a grid is checked by its sweeper (src/hydra_plugins).
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Prepare a sweep; end the command if a search goes the wrong way.

        What all runs have in common is left out of their names. Hydra's own setting for this
        holds it, so that each launcher hands it to its processes with the config.

        Raises:
            SystemExit: the search cannot work. Hydra makes a warning of any other error here.
        """
        if not config.hydra.launcher._target_.endswith("BasicLauncher"):
            compat.initialize_workers(end_in_time)
        is_search = not config.hydra.sweeper._target_.endswith("CheckedSweeper")
        if is_search and (line := _wrong_direction(config)):
            say(f"losswatch: {line}")
            raise SystemExit(2)
        left_out = [*config.hydra.job.config.override_dirname.exclude_keys]
        with suppress(HydraException):  # the sweeper raises it again
            left_out += constant_keys(config.hydra)
        config.hydra.overrides.hydra.append(
            f"hydra.job.config.override_dirname.exclude_keys={left_out}"
        )
        # For ${hydra:...} in the names of folders. A copy, because `set_config` makes it read-only.
        HydraConfig.instance().set_config(copy.deepcopy(config))
        if is_search:
            say(f"a search; table and runs go to {config.hydra.sweep.dir}")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Drop the configs of a run, which take 0.2 MB.

        Launchers keep what jobs return until the sweep ends, and nobody reads these configs.
        """
        job_return.cfg = job_return.hydra_cfg = None


def _wrong_direction(config: DictConfig) -> str | None:
    """A line about a search, such as optuna's, whose direction is the wrong one for its metric."""
    metric = parse_overrides(config.hydra.overrides.task).get("metric", config.metric)
    wanted = {"max": "maximize", "min": "minimize"}[mode_of(metric)]
    found = config.hydra.sweeper.get("direction")
    found = getattr(found, "name", found)
    if found in ("maximize", "minimize") and found != wanted:
        return f"a search by metric={metric} needs hydra.sweeper.direction={wanted}, got {found}"
    return None
