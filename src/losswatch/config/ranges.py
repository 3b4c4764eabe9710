"""The values that the settings of a config may have, beyond their types. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from losswatch.config import schema
from losswatch.config.errors import ConfigError

# The _target_ of data=random and data=folder.
RANDOM, FOLDER = "losswatch.data.random.ThresholdedImages", "losswatch.data.folder.FolderImages"

LEVELS = 2**24  # values that a pixel of a random image can take, evenly spaced on [0, 1)
FLOAT32_MAX = (2 - 2**-23) * 2.0**127  # the largest float32

# The smallest value that a whole number may have.
_AT_LEAST = {
    "seed": 0,
    "threads": 1,
    "probe.every_n_steps": 0,
    "trainer.max_steps": 1,
    "trainer.max_epochs": 1,
    "trainer.val_check_interval": 1,
    "trainer.accumulate_grad_batches": 1,
}
_AT_LEAST_OF_RANDOM = {
    "data.image_size": 1,
    "data.batch_size": 1,
    "data.batches": 0,
    "data.val_size": 1,
    "data.test_size": 1,
    "data.eval_batch_size": 1,
    "data.num_workers": 0,
}
# Lightning's options that can end training before trainer.max_steps, each with the value that
# does not. Only max_steps may set the length: a run counts as done when that step is reached.
_FULL_LENGTH = {
    "fast_dev_run": (False, "experiment=one_step tries everything"),
    "limit_train_batches": (1.0, "set trainer.max_steps instead"),
    "overfit_batches": (0.0, "with data=random and data=folder, data.batches repeats batches"),
}
# Arguments of Lightning's Trainer that losswatch sets, and what the user can do instead.
_OWN = {
    "logger": "loggers are chosen by logger=[tensorboard,csv]",
    "callbacks": "callbacks are chosen by callbacks=[best,lr_monitor]",
    "plugins": "a run has its own plugins",
    "enable_checkpointing": "each validation writes a checkpoint",
    "use_distributed_sampler": "each device draws its own share of a batch",
    "num_sanity_val_steps": "the first step is tried before training",
    "enable_model_summary": "callbacks are chosen by callbacks=[...]",
    "barebones": "a run has loggers, checkpoints and a progress bar",
    "check_val_every_n_epoch": "trainer.val_check_interval counts steps",
    "min_epochs": "a training is one epoch; trainer.min_steps counts steps",
    "reload_dataloaders_every_n_epochs": "a training is one epoch",
}

Values = Mapping[str, Any]  # plain values; groups are mappings


def check_values(config: Values) -> None:
    """Check the values of a config whose types are right.

    Raises:
        ConfigError: a value is not allowed; the message names the key, what is allowed, and the
            value given.
    """
    _check_keys(config)
    target = config["data"].get("_target_")
    is_random = target == RANDOM
    if is_random:
        thresholds(config["theta"])
    elif config["theta"] is not None:
        raise ConfigError(f"theta={config['theta']} belongs to data=random alone; remove it")
    # `auto` is a word of this setting alone.
    numbers = {k: v for k, v in _AT_LEAST.items() if k != "threads" or config[k] != "auto"}
    for key, least in (numbers | (_AT_LEAST_OF_RANDOM if is_random else {})).items():
        value = _value(config, key)
        if key == "trainer.max_epochs" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            word = ", or auto" if key == "threads" else ""
            raise ConfigError(
                f"{key} must be a whole number of at least {least}{word}, got {value}"
            )
        power = 63 if key == "seed" else 31
        if value >= 2**power:
            raise ConfigError(f"{key} must be less than 2^{power}, got {value}")
    if not config["watch"]:
        raise ConfigError("watch must name at least one loss, got []")
    mode = config["mode"]
    if mode not in ("train", "test", "predict"):
        raise ConfigError(f"mode must be train, test or predict, got {mode}")
    if mode != "train" and config["resume"] is not None:
        raise ConfigError(
            f"resume={config['resume']} goes on with a training, not with mode={mode}"
        )
    if mode == "predict" and target != FOLDER:
        raise ConfigError("mode=predict needs data=folder and data.root=<folder of images>")
    if target == FOLDER and config["data"].get("root") == "???":
        raise ConfigError("data=folder needs data.root=<folder of images>")
    if (mode == "train") != (config["checkpoint"] is None):
        raise ConfigError(
            "mode=test and mode=predict need checkpoint=<file or run folder>, and checkpoint needs "
            "one of these modes"
        )
    if is_random:
        _check_random(config)
    if target in (RANDOM, FOLDER):
        # Tables and the names of folders show theta and seed for these two.
        for key, name in ("thresholds", "theta"), ("seed", "seed"):
            if key in config["data"] and config["data"][key] != config[name]:
                raise ConfigError(f"data.{key} follows {name}; set {name} instead")
    _check_training(config)


def _value(config: Values, key: str) -> Any:
    """The value at a dotted key; None if there is none."""
    for name in key.split("."):
        config = config.get(name)  # type: ignore[assignment]
        if config is None:
            break
    return config


def _check_keys(config: Values) -> None:
    """Check that losswatch reads each key. With `+` a user can add any key.

    Raises:
        ConfigError: a key is unknown, or losswatch sets it itself.
    """
    groups = ("", config, schema.Config), ("probe.", config["probe"], schema.Probe)
    for name, group, known in groups:
        keys = [field.name for field in dataclasses.fields(known)]
        for key in group:
            if key not in keys:
                raise ConfigError(
                    f"unknown setting {name}{key}; {name[:-1] or 'the config'} has "
                    f"{', '.join(keys)}"
                )
    if config["scheduler"] and "_target_" not in config["scheduler"]:
        raise ConfigError(
            f"unknown setting scheduler.{next(iter(config['scheduler']))}; choose a scheduler, "
            "such as scheduler=cosine"
        )
    for key, instead in _OWN.items():
        if key in config["trainer"]:
            raise ConfigError(f"trainer.{key} is set by losswatch; {instead}")


def _check_random(config: Values) -> None:
    data = config["data"]
    if data.get("dims") not in (2, 3):
        raise ConfigError(f"data.dims must be 2 or 3, got {data.get('dims')}")
    low, high = data.get("low"), data.get("high")
    for key, number in {"data.low": low, "data.high": high}.items():
        if not is_number(number):
            raise ConfigError(f"{key} must be a number, got {number}")
    for key, number in {"data.low": low, "data.high": high, "high - low": high - low}.items():
        if not abs(number) <= FLOAT32_MAX:  # written so that NaN is refused, too
            raise ConfigError(
                f"{key} must be a finite number, got {number} (the largest float32 is 3.4e38)"
            )
    for key in ("noise", "theta_spread"):
        number = data.get(key, 0)
        if not is_number(number) or not 0 <= number <= FLOAT32_MAX:
            raise ConfigError(f"data.{key} must be a number of at least 0, got {number}")


def _check_training(config: Values) -> None:
    lr = config["optimizer"].get("lr")
    if not is_number(lr) or not 0 < lr < math.inf:
        raise ConfigError(f"optimizer.lr must be a number greater than 0, got {lr}")
    trainer = config["trainer"]
    clip = trainer.get("gradient_clip_val")
    if clip is not None and not (is_number(clip) and 0 <= clip < math.inf):
        raise ConfigError(
            f"trainer.gradient_clip_val must be null or a number of at least 0, got {clip}"
        )
    batches = trainer.get("limit_val_batches")
    if is_number(batches) and batches == 0:
        raise ConfigError(
            f"trainer.limit_val_batches must be more than 0, got {batches}: each validation gives "
            "the metrics and a checkpoint; trainer.val_check_interval makes validations rare"
        )
    for option, (harmless, instead) in _FULL_LENGTH.items():
        value = trainer.get(option)
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
    numbers = [float(v) for v in values if is_number(v)]
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
    # Pixels and thresholds are compared as float32. A pixel has the level floor(u * 2^24). The
    # pixels above a threshold begin at the level after that of the threshold.
    layout = f"{len(numbers)}f"
    as_float32 = struct.unpack(layout, struct.pack(layout, *numbers))
    levels = [math.floor(v * LEVELS) for v in as_float32]
    if any(a >= b for a, b in zip(levels, [*levels[1:], LEVELS - 1], strict=True)):
        raise ConfigError(
            "theta must leave room for each class: pixels are multiples of 2^-24, so thresholds "
            f"must be at least 2^-23 (1.2e-7) apart and below 1 by as much, got {theta}"
        )
    return numbers


def is_number(value: Any) -> bool:
    """Whether a value is a whole number or a float; a truth value is not a number.

    >>> is_number(1), is_number(0.5), is_number(True), is_number("1")
    (True, True, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool)
