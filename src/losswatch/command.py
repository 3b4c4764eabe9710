"""The command `losswatch`. It is `python train.py`, and works from any folder.

losswatch loss=cce theta=0.05       train; train.py lists more examples
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
from losswatch.config.names import sweep_name
from losswatch.config.quoting import quoted, with_data
from losswatch.config.settings import Job, Settings
from losswatch.config.sources import Sources
from losswatch.presets import CONF
from losswatch.sweep.exit import clear_errors
from losswatch.sweep.switches import silence_logging
from losswatch.terminal import open_streams

if TYPE_CHECKING:
    from losswatch.run.planner import Found, Planner
    from losswatch.sweep.jobs import Run

schema.register()


@dataclass(frozen=True)
class Facts:
    """What the processes of a sweep get to know of it.

    Attributes:
        total: number of runs; None if that is not known.
        found: what the first process has found out for all runs.
        names_starts: whether a line names each run when it starts. Launchers that train several at
            once have one bar instead, and a line when a run ends.
        key: different in each command.
    """

    total: int | None = None
    found: Found | None = None
    names_starts: bool = True
    key: str = field(default_factory=lambda: uuid.uuid4().hex)


class Command:
    """Hydra's task function, called for each run; it holds what the command knows of its runs.

    Hydra hands it to sweepers and launchers, and these hand it to their processes.

    Args:
        facts: of the sweep.

    Attributes:
        runs: the checked runs of the sweep that have not started, by their overrides.
        folder: of the sweep, once its runs may start. Then its table ends the command.
        lacks_runs: whether no file of a run could be written, so that the table lacks the run.
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

    def planner(self, job: Job) -> Planner:
        """The one planner of this process; `job` is that of any run of the command."""
        # Imported late: PyTorch takes seconds, and --help or a misspelt key needs none of it.
        from losswatch.run.planner import Planner

        if self._planner is None:
            self._planner = Planner(Sources(job.search_path), self.facts.found)
        return self._planner

    def read(self, cfg: DictConfig, job: Job, steps: int | None = None) -> Settings:
        """The settings of a composed config.

        Args:
            job: what Hydra knows of the run.
            steps: see `Settings.read`.

        Raises:
            ConfigError: a value is not allowed, or a loss or a checkpoint does not exist.
        """
        from losswatch.disk.checkpoint_files import settings_to_keep  # imported late, as above

        sources = self.planner(job).sources
        return Settings.read(cfg, job, sources, settings_to_keep, steps)

    def begin_sweep(self, folder: Path, runs: dict[tuple[str, ...], Run]) -> None:
        """Let the runs of a sweep start.

        Args:
            folder: of the sweep.
            runs: composed and checked, by their overrides.
        """
        self.folder = folder
        self.runs.update(runs)
        found = self._planner.found if self._planner else None
        self.facts = dataclasses.replace(self.facts, total=len(runs), found=found)

    def refuse(self, line: str) -> None:
        """End a single run for bad input, with one line."""
        self.line, self.status = line, 2

    def __call__(self, cfg: DictConfig) -> float | None:
        """Train or test one run; return its score, for sweepers."""
        from losswatch.task import run_task  # imported late, as above

        return run_task(self, cfg)

    def __reduce__(self) -> Any:
        """Another process gets its own command with the same facts."""
        return _in_other_process, (self.facts,)


def _in_other_process(facts: Facts) -> Command:
    command = _command(facts.key)
    command.facts = facts
    return command


@functools.lru_cache(maxsize=1)  # one in each process: its planner keeps what it has found out
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
    if sys.argv[1:2] == ["diagnose"]:
        from losswatch.report.diagnosis import print_findings

        print_findings(sys.argv[2:])
        return
    typed = sys.argv[1:]
    asked = [quoted(argument) for argument in typed]
    sys.argv[1:] = with_data(asked)
    schema.use_checked_sweeper()
    # What an earlier command in this process has left.
    HydraConfig.instance().cfg = None
    sweep_name.cache_clear()
    command = Command(Facts())
    with clear_errors(command, dict(zip(asked, typed, strict=True))):
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(command)()
