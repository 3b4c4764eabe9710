"""The runs of a sweep over a grid, each of them checked before the first one starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from losswatch import compat
from losswatch.config.names import run_name
from losswatch.config.schema import ConfigError
from losswatch.terminal import say_for_now
from losswatch.text import number_of


def grid(config: DictConfig) -> list[list[str]]:
    """The overrides of each run of a multirun, in the order in which Hydra launches them."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    overrides = [f"{key}={value}" for key, value in params.items()]
    return compat.split_grid([*overrides, *config.hydra.overrides.task])


def check_grid(config: DictConfig, runs: Sequence[Sequence[str]]) -> list[DictConfig]:
    """The config of each run, composed and checked.

    Args:
        config: the multirun's.
        runs: the overrides of each run.

    Raises:
        ConfigError: a run cannot work, is given twice, or its folder holds another run or a run
            under way.
        HydraException, OmegaConfBaseException, YAMLError: a config cannot be composed.
    """
    names = [run_name(overrides) for overrides in runs]
    times = Counter(names)
    for overrides, name in zip(runs, names, strict=True):
        if times[name] > 1:
            raise ConfigError(
                f"the run {' '.join(overrides)} is asked for twice; nothing was started"
            )
    folder = Path(config.hydra.sweep.dir)
    configs = []
    say_for_now(f"checking {number_of(len(runs), 'run')}")
    for overrides, name in zip(runs, names, strict=True):
        run_config = compat.config_loader().load_sweep_config(config, list(overrides))
        try:
            _check_run(run_config, folder / name)
        except ConfigError as error:
            run = " ".join(overrides)
            raise ConfigError(f"{error} (in the run {run}; nothing was started)") from error
        configs.append(run_config)
    return configs


def _check_run(config: DictConfig, folder: Path) -> None:
    # Imported late: torch takes seconds, and train.py imports this file at its start.
    from losswatch.config.settings import plain
    from losswatch.disk.locks import hold
    from losswatch.disk.result import finished
    from losswatch.disk.resume import check_folder
    from losswatch.run.plan import check

    check(config, config.hydra.runtime.choices.get("loss"), multirun=True)
    check_folder(folder, plain(config))
    if folder.is_dir() and not finished(folder):
        hold(folder).close()
