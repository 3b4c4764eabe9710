"""The command `losswatch`, which is `python train.py` from any folder.

losswatch loss=cce theta=0.05       train as train.py does, which lists more
losswatch losses                    print the table of losses
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from losswatch.config import schema
from losswatch.config.quoting import quoted
from losswatch.config.settings import Job, Settings
from losswatch.config.sources import Sources
from losswatch.presets import CONF
from losswatch.sweep.exit import clear_errors
from losswatch.sweep.switches import silence_logging
from losswatch.terminal import open_streams

if TYPE_CHECKING:
    from losswatch.run.plan import Found, Planner
    from losswatch.sweep.jobs import Run

schema.register()


@dataclass(frozen=True)
class Facts:
    """What the processes of a sweep are told of it.

    Attributes:
        overrides: of the whole command, in the form in which Hydra got them.
        total: how many runs there are; None where that is not known.
        found: what the first process has found out for runs that are alike.
        key: tells commands apart.
    """

    overrides: tuple[str, ...] = ()
    total: int | None = None
    found: Found | None = None
    key: str = field(default_factory=lambda: uuid.uuid4().hex)


class Command:
    """Hydra's task function, which is called for each run; and what the command knows of its runs.

    Hydra hands it to sweepers and launchers, and these to their processes.

    Args:
        facts: of the sweep.

    Attributes:
        runs: of the sweep, composed and checked, by their overrides; each until it starts.
        folder: of the sweep, from when its runs may start; the table of it ends the command.
        lacks_runs: whether the table will lack a run, of which no file can be written.
        is_terminated: whether SIGTERM ended the command.
        line, status: how a single run ended: a line about bad input, and the exit status.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.runs: dict[tuple[str, ...], Run] = {}
        self.folder: Path | None = None
        self.lacks_runs = self.is_terminated = False
        self.line, self.status = "", 0
        self._planner: Planner | None = None

    def planner(self, job: Job, is_here: bool = True) -> Planner:
        """The one planner of this process.

        Args:
            job: one of the command's.
            is_here: see `Planner`.
        """
        # Imported late: PyTorch takes seconds, and --help or a misspelt key needs none of it.
        from losswatch.run.plan import Planner

        if self._planner is None:
            self._planner = Planner(Sources(job.search_path), self.facts.found, is_here)
        return self._planner

    def read(
        self, cfg: DictConfig, job: Job, is_here: bool = True, steps: int | None = None
    ) -> Settings:
        """The settings of a composed config.

        Args:
            job: what Hydra knows of the run.
            is_here: see `Planner`.
            steps: see `Settings.read`.

        Raises:
            ConfigError: a value is not allowed, or a loss or a checkpoint does not exist.
        """
        from losswatch.disk.checkpoint_files import settings_to_keep  # imported late, as above

        sources = self.planner(job, is_here).sources
        return Settings.read(cfg, job, sources, settings_to_keep, steps)

    def begin_sweep(self, folder: Path, runs: dict[tuple[str, ...], Run]) -> None:
        """Let the runs of a sweep start, which are composed and checked."""
        self.folder = folder
        self.runs.update(runs)
        found = self._planner.found if self._planner else None
        self.facts = dataclasses.replace(self.facts, total=len(runs), found=found)

    def refuse(self, line: str) -> None:
        """End a single run for bad input, with one line."""
        self.line, self.status = line, 2

    def __call__(self, cfg: DictConfig) -> float | None:
        """Train or test one run; the score returned is for sweepers."""
        from losswatch.task import run_task  # imported late, as above

        return run_task(self, cfg)

    def __reduce__(self) -> Any:
        """Another process gets a command of its own, which knows the facts."""
        return _in_other_process, (self.facts,)


def _in_other_process(facts: Facts) -> Command:
    command = _command(facts.key)
    command.facts = facts
    return command


@functools.lru_cache(maxsize=1)  # one for each process: its planner keeps what it has found out
def _command(key: str) -> Command:
    silence_logging()
    return Command(Facts(key=key))


def main() -> None:
    """Do what the arguments of this process ask for.

    Raises:
        SystemExit: with the exit status, if that is not 0.
    """
    open_streams()
    if sys.argv[1:2] == ["losses"]:
        from losswatch.report.losses import print_losses

        print_losses(sys.argv[2:])
        return
    typed = sys.argv[1:]
    sys.argv[1:] = map(quoted, typed)
    schema.use_checked_sweeper()
    HydraConfig.instance().cfg = None  # of an earlier command in this process
    command = Command(Facts(tuple(sys.argv[1:])))
    with clear_errors(command, dict(zip(sys.argv[1:], typed, strict=True))):
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(command)()
