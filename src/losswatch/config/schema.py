"""The schema of conf/config.yaml: the type of each key, and the values that it may take.

Imports nothing slow (no torch), so `train.py --help` and a misspelt key get their answer at once.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from losswatch.config import names


class ConfigError(ValueError):
    """A value of the config that cannot work; the message is one line for the user."""


# --- Types ---------------------------------------------------------------------------------------
# Defaults and what each key means are in conf/config.yaml, and only there.


@dataclass
class RandomConfig:
    _target_: str = MISSING
    image_size: int = MISSING
    dims: int = MISSING
    low: float = MISSING
    high: float = MISSING
    batch_size: int = MISSING
    batches: int = MISSING
    val_size: int = MISSING
    test_size: int = MISSING
    eval_batch_size: int = MISSING
    num_workers: int = MISSING


@dataclass
class FolderConfig:
    _target_: str = MISSING
    root: str = MISSING
    images: str = MISSING
    masks: str = MISSING
    image_suffix: str = MISSING
    mask_suffix: str = MISSING
    skip_unpaired: bool = MISSING
    val_share: float = MISSING
    test_share: float = MISSING
    target: str | None = MISSING
    classes: Any = MISSING
    ignore_index: Any = MISSING
    nearest: bool = MISSING
    axes: str | None = MISSING
    patch_size: Any = MISSING
    sampling: str = MISSING
    flip: bool = MISSING
    intensity: float = MISSING
    normalize: str = MISSING
    batch_size: int = MISSING
    batches: int = MISSING
    num_workers: int | None = MISSING
    cache_mb: int = MISSING


@dataclass
class ProbeConfig:
    every_n_steps: int = MISSING
    cosines: bool = MISSING


@dataclass
class Config:
    theta: Any = None  # of data=random
    seed: int = MISSING
    watch: list[Any] = MISSING
    metric: str = MISSING
    tags: list[str] = field(default_factory=list)
    threads: int = MISSING
    compile: bool = MISSING
    mode: str = MISSING
    resume: str | None = None
    checkpoint: str | None = None
    loss: dict[str, Any] = MISSING
    model: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    data: Any = MISSING
    scheduler: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    probe: ProbeConfig = MISSING
    trainer: dict[str, Any] = MISSING


def register() -> None:
    """Make the schema and the resolvers of conf/config.yaml known to Hydra."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    # In a group of Hydra's, which --help does not list as choices.
    store.store(group="hydra/schema", name="random", node={"data": RandomConfig})
    store.store(group="hydra/schema", name="folder", node={"data": FolderConfig})
    # `use_cache` keeps the names in the config, which Hydra sends to the processes of a launcher:
    # so all of them write to the folder of the one sweep.
    OmegaConf.register_new_resolver("sweep_name", names.sweep_name, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("mode_of", mode_of, replace=True)
    OmegaConf.register_new_resolver("run_name", names.run_name, replace=True)
    OmegaConf.register_new_resolver("run_folder", names.run_folder, use_cache=True, replace=True)


# --- Values --------------------------------------------------------------------------------------

# The _target_ of data=random and data=folder.
RANDOM, FOLDER = "losswatch.data.random.ThresholdedImages", "losswatch.data.folder.FolderImages"
_DATA: dict[Any, type] = {RANDOM: RandomConfig, FOLDER: FolderConfig}

LEVELS = 2**24  # values that a pixel of a random image can take, evenly spaced on [0, 1)
FLOAT32_MAX = (2 - 2**-23) * 2.0**127  # the largest float32

# The smallest value that a whole number may have.
_AT_LEAST = {
    "seed": 0,
    "threads": 1,
    "data.image_size": 1,
    "data.batch_size": 1,
    "data.batches": 0,
    "data.val_size": 1,
    "data.test_size": 1,
    "data.eval_batch_size": 1,
    "data.num_workers": 0,
    "probe.every_n_steps": 0,
    "trainer.max_steps": 1,
    "trainer.max_epochs": 1,
    "trainer.val_check_interval": 1,
    "trainer.accumulate_grad_batches": 1,
}
# Lightning's options that can end training before trainer.max_steps, each with its value that does
# not. max_steps alone must say how long training is: a run counts as done only when it is reached.
_FULL_LENGTH = {
    "fast_dev_run": (False, "experiment=one_step tries everything"),
    "limit_train_batches": (1.0, "set trainer.max_steps instead"),
    "overfit_batches": (0.0, "with data=random and data=folder, data.batches repeats batches"),
}


# Arguments of Lightning's Trainer that are not the user's, and what to take instead.
_OWN = {
    "logger": "loggers are chosen by logger=[tensorboard,csv]",
    "callbacks": "callbacks are chosen by callbacks=[best,lr_monitor]",
    "plugins": "it has plugins of its own",
    "enable_checkpointing": "each validation writes a checkpoint",
    "use_distributed_sampler": "each device draws its own share of a batch",
    "num_sanity_val_steps": "the first step is tried before training",
    "enable_model_summary": "callbacks are chosen by callbacks=[...]",
    "barebones": "a run has loggers, checkpoints and a progress bar",
    "check_val_every_n_epoch": "trainer.val_check_interval counts steps",
    "min_epochs": "a training is one epoch; trainer.min_steps counts steps",
    "reload_dataloaders_every_n_epochs": "a training is one epoch",
}


def check_values(cfg: DictConfig) -> None:
    """Check the values that types alone do not restrict enough.

    Raises:
        ConfigError: names the key, what is allowed and the value given.
    """
    _check_keys(cfg)
    is_random = OmegaConf.select(cfg, "data._target_") == RANDOM
    if is_random:
        thresholds(OmegaConf.to_object(cfg.theta) if OmegaConf.is_config(cfg.theta) else cfg.theta)
    for key, least in _AT_LEAST.items():
        value = OmegaConf.select(cfg, key)
        if key.startswith("data.") and not is_random:
            continue  # its class checks its settings
        if key == "trainer.max_epochs" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{key} must be a whole number of at least {least}, got {value}")
        power = 63 if key == "seed" else 31
        if value >= 2**power:
            raise ConfigError(f"{key} must be less than 2^{power}, got {value}")
    if not cfg.watch:
        raise ConfigError("watch must name at least one loss, got []")
    if cfg.mode not in ("train", "test", "predict"):
        raise ConfigError(f"mode must be train, test or predict, got {cfg.mode}")
    if cfg.mode == "predict" and cfg.data.get("_target_") != FOLDER:
        raise ConfigError("mode=predict needs data=folder and data.root=<folder of images>")
    if (cfg.mode == "train") != (cfg.checkpoint is None):
        raise ConfigError(
            "mode=test and mode=predict need checkpoint=<file or run folder>, and checkpoint needs "
            "one of these modes"
        )
    if is_random:
        _check_data(cfg.data)
    _check_training(cfg)


def mode_of(metric: str) -> str:
    """Whether a metric is better the larger or the smaller it is.

    >>> mode_of("val/dice"), mode_of("val/loss/cce")
    ('max', 'min')
    """
    return "min" if metric.startswith("val/loss/") else "max"


def _check_keys(cfg: DictConfig) -> None:
    """See that each key is one that something reads; `+` can add any."""
    schemas: list[tuple[str, type]] = [("", Config), ("probe", ProbeConfig)]
    if schema := _DATA.get(cfg.data.get("_target_")):
        schemas.append(("data", schema))
    for name, schema in schemas:
        known = [field.name for field in fields(schema)]
        for key in map(str, cfg[name] if name else cfg):
            if key not in known and key != "hydra":
                has = ", ".join(setting for setting in known if setting[0] != "_")
                full = f"{name}.{key}" if name else key
                raise ConfigError(f"{full} is read by nothing; {name or 'the config'} has {has}")
    if cfg.scheduler and "_target_" not in cfg.scheduler:
        raise ConfigError(
            f"scheduler.{next(iter(cfg.scheduler))} is read by nothing; choose a scheduler, such "
            "as scheduler=cosine"
        )
    for key in _OWN:
        if key in cfg.trainer:
            raise ConfigError(f"trainer.{key} is set by losswatch; {_OWN[key]}")


def _check_data(data: DictConfig) -> None:
    if data.dims not in (2, 3):
        raise ConfigError(f"data.dims must be 2 or 3, got {data.dims}")
    low, high = data.low, data.high
    for key, number in {"data.low": low, "data.high": high, "high - low": high - low}.items():
        if not abs(number) <= FLOAT32_MAX:  # written so that NaN is refused, too
            raise ConfigError(
                f"{key} must be a finite number, got {number} (the largest float32 is 3.4e38)"
            )


def _check_training(cfg: DictConfig) -> None:
    lr = cfg.optimizer.get("lr")
    if not _is_number(lr) or not 0 < lr < math.inf:
        raise ConfigError(f"optimizer.lr must be a number greater than 0, got {lr}")
    clip = cfg.trainer.get("gradient_clip_val")
    if clip is not None and not (_is_number(clip) and 0 <= clip < math.inf):
        raise ConfigError(
            f"trainer.gradient_clip_val must be null or a number of at least 0, got {clip}"
        )
    batches = cfg.trainer.get("limit_val_batches")
    if _is_number(batches) and batches == 0:
        raise ConfigError(
            f"trainer.limit_val_batches must be more than 0, got {batches}: each validation gives "
            "the metrics and a checkpoint; trainer.val_check_interval makes validations rare"
        )
    for option, (harmless, instead) in _FULL_LENGTH.items():
        value = cfg.trainer.get(option)
        # By repr: 1 is one batch and 1.0 is all batches.
        if value is not None and repr(value) != repr(harmless):
            raise ConfigError(
                f"trainer.{option}={value} would end training before trainer.max_steps; {instead}"
            )


def thresholds(theta: Any) -> list[float]:
    """θ as a list of numbers.

    Raises:
        ConfigError: θ is neither a number in (0, 1) nor a strictly increasing list of such numbers;
            or the numbers are so close to 1 or to each other that a class would have no pixel.

    >>> thresholds(0.5), thresholds([0.3, 0.6])
    ([0.5], [0.3, 0.6])
    """
    values = list(theta) if isinstance(theta, Sequence) and not isinstance(theta, str) else [theta]
    numbers = [float(v) for v in values if _is_number(v)]
    if (
        not numbers
        or len(numbers) < len(values)
        or not all(0 < v < 1 for v in numbers)
        or any(a >= b for a, b in zip(numbers, numbers[1:], strict=False))
    ):
        raise ConfigError(
            "theta must be a number strictly between 0 and 1, or a strictly increasing list of "
            f"such numbers (in quotes: 'theta=[0.3,0.6]'), got {theta}"
        )
    # Pixels and thresholds are compared as float32. A pixel has the level floor(u * 2^24); those
    # above a threshold begin at the level after the threshold's own.
    layout = f"{len(numbers)}f"
    as_float32 = struct.unpack(layout, struct.pack(layout, *numbers))
    levels = [math.floor(v * LEVELS) for v in as_float32]
    if any(a >= b for a, b in zip(levels, [*levels[1:], LEVELS - 1], strict=True)):
        raise ConfigError(
            "theta must leave room for each class: pixels are multiples of 2^-24, so thresholds "
            f"must be at least 2^-23 (1.2e-7) apart and below 1 by as much, got {theta}"
        )
    return numbers


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
