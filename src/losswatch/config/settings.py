"""A run's settings as one typed object. What trains a run sees nothing of Hydra's config.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from losswatch.config import schema
from losswatch.config.errors import ConfigError
from losswatch.config.kept import Kept, Node
from losswatch.config.names import key_of
from losswatch.config.ranges import FOLDER, RANDOM, check_values
from losswatch.config.schema import Probe
from losswatch.config.sources import Sources
from losswatch.text import parse_overrides, shortened

# What files of conf/ can use of the data and the run, as in `${form.in_channels}`. The values are
# known after a look at the data (`run.plan`). Until then such a text is kept as it is.
_LATER_KEYS = {"form": ("in_channels", "channels", "dims"), "run": ("folder", "name")}
LATER = {
    group: {key: f"\\${{{group}.{key}}}" for key in keys} for group, keys in _LATER_KEYS.items()
}

# Settings that may differ when a run is resumed.
_FREE = (
    "resume", "mode", "checkpoint", "metric", "tags", "logger", "trainer.enable_progress_bar",
    "trainer.max_time",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What Hydra knows of a run.

    Attributes:
        folder: where the run writes; absolute.
        overrides: of the run, without those of Hydra's own settings.
        choices: the name of the chosen file of each group.
        is_sweep: whether the run is one of a sweep.
        number: that of the run in its sweep, from 0.
        base: the sweep's folder, or the working folder; lines show paths from here.
        log: the name of the log file in the folder.
        search_path: the command's overrides of Hydra's search path.
        swept: the value, as text, of each key in which the runs of the sweep differ. In a single
            run, or a sweep of one run, these are the keys that the command sets.
    """

    folder: Path
    overrides: tuple[str, ...]
    choices: Mapping[str, str | None]
    is_sweep: bool
    number: int
    base: Path
    log: str
    search_path: tuple[str, ...]
    swept: Mapping[str, str]

    @classmethod
    def read(cls, hydra: DictConfig, folder: Path | None = None) -> Job:
        """The job that the section `hydra` of a run's config describes.

        Args:
            folder: of the run, if Hydra has not started it and so its config names no folder.
        """
        is_sweep = hydra.mode == RunMode.MULTIRUN
        overrides = task_overrides(hydra)
        constants = {"resume", *hydra.job.config.override_dirname.exclude_keys}
        swept = parse_overrides(o for o in overrides if key_of(o) not in constants)
        sweep = hydra.sweep.dir if is_sweep else ""
        return cls(
            folder=folder or Path(hydra.runtime.output_dir),
            overrides=overrides,
            choices=OmegaConf.to_container(hydra.runtime.choices),  # type: ignore[arg-type]
            is_sweep=is_sweep,
            number=hydra.job.num if is_sweep and not OmegaConf.is_missing(hydra.job, "num") else 0,
            base=Path(hydra.runtime.cwd, sweep),
            log=f"{hydra.job.name}.log",
            search_path=tuple(o for o in hydra.overrides.hydra if "hydra.searchpath" in o),
            swept=swept,
        )


def task_overrides(hydra: DictConfig) -> tuple[str, ...]:
    """The overrides of a run, as they stand: their text may hold `${run.folder}`."""
    return tuple(OmegaConf.to_container(hydra.overrides.task, resolve=False))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Settings:
    """All settings of a run; conf/config.yaml says what each means.

    The first fields are named as the keys of the config. Nodes may hold the texts of `LATER`, which
    `run.plan.Plan.filled` replaces.

    Attributes:
        trained: the name of the trained loss.
        losses: the node of each watched loss by name, the trained one among them.
        job: what Hydra knows of the run.
        has_own_loss: whether, in a sweep, the trained loss differs from the file of its name.
    """

    theta: float | list[float] | None
    seed: int
    watch: list[str]
    metric: str
    tags: list[str]
    threads: int | str
    compile: bool
    mode: str
    resume: str | None
    checkpoint: str | None
    loss: Node
    model: Node
    optimizer: Node
    data: Node
    scheduler: Node
    logger: dict[str, Node | None]
    callbacks: dict[str, Node | None]
    probe: Probe
    trainer: dict[str, Any]

    trained: str
    losses: dict[str, Node]
    job: Job
    has_own_loss: bool = False

    @classmethod
    def read(
        cls,
        cfg: DictConfig,
        job: Job,
        sources: Sources,
        recall: Callable[[str], Kept],
        steps: int | None = None,
    ) -> Settings:
        """The settings of a composed config.

        Args:
            cfg: the config.
            job: of the run.
            sources: the files of losses.
            recall: gives for `checkpoint` the settings of the run that wrote it. They hold unless
                the command gives others (`disk.checkpoint_files.settings_to_keep`).
            steps: the length of the training in the place of the config's, also for settings that
                name it, such as those of a schedule.

        Raises:
            ConfigError: a value is not allowed, or a loss does not exist.
            OmegaConfBaseException: the config cannot be resolved.
        """
        cfg = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        for field in dataclasses.fields(schema.Config):
            if field.name not in cfg and field.name != "loss":  # `watched` lists the losses
                raise ConfigError(f"{field.name} was removed from the config, which needs it")
        with open_dict(cfg):
            for group, keys in LATER.items():
                if group in cfg:
                    raise ConfigError(
                        f"unknown setting {group}; losswatch sets the values of ${{{group}...}}"
                    )
                cfg[group] = keys
        if steps is not None:
            cfg.trainer.max_steps = steps
        kept: Mapping[str, Node] = {}
        if cfg.checkpoint is not None:
            given = parse_overrides(job.overrides)
            choices, kept = recall(cfg.checkpoint).apply(cfg, given, job.choices)
            job = dataclasses.replace(job, choices=choices)
        trained = job.choices.get("loss") or ""
        _check_groups(cfg)
        losses = sources.watched(cfg, trained, kept)
        can_be_stacked = job.is_sweep and cfg.checkpoint is None
        own = can_be_stacked and sources.read([trained], cfg)[trained] != losses[trained]
        config: Any = OmegaConf.to_container(cfg, resolve=True)
        for group in LATER:
            del config[group]
        check_values(config)
        config["probe"] = Probe(**config["probe"])
        return cls(**config, trained=trained, losses=losses, job=job, has_own_loss=own)

    def as_config(self) -> dict[str, Any]:
        """The config as plain data: for result.json, checkpoints and loggers."""
        config = dataclasses.asdict(self)
        for key in ("trained", "losses", "job", "has_own_loss"):
            del config[key]
        return config

    def as_record(self) -> dict[str, Any]:
        """What a checkpoint must tell of its run (`config.kept`), as plain data."""
        choices = {group: self.job.choices.get(group) for group in ("loss", "model")}
        return {"config": self.as_config(), "choices": choices, "losses": self.losses}

    def chosen(self, group: str) -> dict[str, Node]:
        """The chosen nodes of `logger` or `callbacks`, by name."""
        return {name: node for name, node in getattr(self, group).items() if node is not None}

    @property
    def is_random(self) -> bool:
        """Whether the images are the random ones of the toy task."""
        return self.data.get("_target_") == RANDOM

    @property
    def is_ours(self) -> bool:
        """Whether losswatch makes the images, and not the user's own data module."""
        return self.data.get("_target_") in (RANDOM, FOLDER)

    def step_key(self, channels: int) -> str:
        """A text that is equal for runs whose first step does the same.

        Args:
            channels: of the network's output. θ decides their number.
        """
        data = {k: v for k, v in self.data.items() if k not in ("seed", "thresholds")}
        own = {"theta": channels, "seed": 0, "data": data}
        whole = json.dumps([self.as_config() | own, self.trained, self.losses], default=str)
        return hashlib.sha256(whole.encode()).hexdigest()


def _check_groups(cfg: DictConfig) -> None:
    """Check that the groups hold keys and values, without the `_arguments_` of earlier versions.

    Raises:
        ConfigError: `data` holds something else, or a node has `_arguments_`.
    """
    if not OmegaConf.is_dict(cfg.data):
        raise ConfigError(f"data must hold keys and values, got {cfg.data}")
    nodes = {"model": cfg.model, "optimizer": cfg.optimizer, "data": cfg.data}
    for group in ("logger", "callbacks"):
        nodes |= {f"{group}.{name}": cfg[group][name] for name in cfg[group] or {}}
    for name, node in nodes.items():
        if OmegaConf.is_dict(node) and "_arguments_" in node:
            raise ConfigError(
                f"{name}: _arguments_ has no meaning any more; write what the constructor gets, "
                f"{_instead(node)}"
            )


def _instead(node: DictConfig) -> str:
    """What a file must say instead of its `_arguments_`."""
    values = {
        "in_channels": "${form.in_channels}", "num_classes": "${form.channels}",
        "dims": "${form.dims}", "run": "${run.name}", "checkpoints": "${run.folder}/checkpoints",
    }  # fmt: skip
    names = node["_arguments_"] or {}
    named = [f"{names.get(key, key)}: {value}" for key, value in values.items() if names.get(key)]
    return "such as " + ", ".join(named or ["in_channels: ${form.in_channels}"])


def flatten_keys(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested config, each with its dotted key.

    >>> dict(flatten_keys({"seed": 0, "data": {"low": 0.0, "high": 1.0}}))
    {'seed': 0, 'data.low': 0.0, 'data.high': 1.0}
    """
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from flatten_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(earlier: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """The differences that prevent a resume: "<key> was <value>, now <value>".

    Args:
        earlier: the run's config, as read from a file. Anybody may have written the file.
        config: that of this command (`Settings.as_config`).
    """
    old, new = dict(flatten_keys(earlier)), dict(flatten_keys(config))
    return [
        f"{shortened(key)} was {shortened(old.get(key, 'not set'))}, now {new.get(key, 'not set')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not any(f"{key}.".startswith(f"{free}.") for free in _FREE)
    ]
