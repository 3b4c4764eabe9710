"""Makes plans of runs in this process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir

from benchmarks import ROOT
from losswatch.config import schema
from losswatch.config.settings import Job, Settings
from losswatch.config.sources import Sources
from losswatch.disk.checkpoint_files import settings_to_keep
from losswatch.run.plan import Plan
from losswatch.run.planner import Planner

MakePlan = Callable[[Sequence[str], Path], Plan]


@contextmanager
def plans() -> Iterator[MakePlan]:
    """A function that makes the plan of a run from its overrides and its folder."""
    schema.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        planner = Planner(Sources())

        def plan(overrides: Sequence[str], folder: Path) -> Plan:
            cfg = compose("config", list(overrides), return_hydra_config=True)
            job = Job.read(cfg.hydra, folder)
            read = functools.partial(Settings.read, cfg, job, planner.sources, settings_to_keep)
            return planner.plan(read(), read)

        yield plan
