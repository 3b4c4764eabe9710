"""Makes plans of runs in this process, and trains them."""

from __future__ import annotations

import functools
import tempfile
import time
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
from losswatch.task import train

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


def seconds_of(plan: MakePlan, overrides: Sequence[str], steps: int) -> float:
    """Seconds of a training in this process, with a validation and the test at its end."""
    with tempfile.TemporaryDirectory() as folder:
        length = [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]
        made = plan([*overrides, *length], Path(folder))
        begin = time.perf_counter()
        train(made)
        return time.perf_counter() - begin
