"""The losses that a config may name, the files of conf/loss and of one's own, and their configs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, read_write
from yaml import YAMLError

from losswatch.compat import config_loader
from losswatch.config import yaml_errors
from losswatch.config.schema import ConfigError


def loss_names() -> list[str]:
    """The losses of conf/loss and of each folder that was added to Hydra's search path."""
    return _list_losses(*_search_path())


def _search_path() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Where Hydra searches: the overrides that add to its search path, and the folders in it."""
    given = HydraConfig.get().overrides.hydra if HydraConfig.initialized() else []
    added = tuple(override for override in given if "hydra.searchpath" in override)
    return added, tuple(source.path for source in config_loader().get_sources())


@functools.cache  # listing takes 4 ms, composing 70 ms
def _list_losses(added: tuple[str, ...], folders: tuple[str, ...]) -> list[str]:
    loader = config_loader()
    return loader.get_group_options("loss", config_name="config", overrides=list(added))


@functools.cache
def _compose_loss(name: str, added: tuple[str, ...], folders: tuple[str, ...]) -> DictConfig:
    return hydra.compose("config", [f"loss={name}", *added]).loss


def read_losses(names: Sequence[str], cfg: DictConfig) -> dict[str, DictConfig]:
    """The configs of losses as their files describe them, composed by Hydra and resolved in `cfg`.

    So a file may have a `defaults` list, and may refer to other keys, as in `${seed}`.

    Raises:
        ConfigError: a file is no YAML; with its line.
    """
    search = _search_path()
    config = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    nodes = {}
    with read_write(config):
        for name in names:
            try:
                config.loss = _compose_loss(name, *search)
            except (YAMLError, UnicodeDecodeError) as error:
                raise ConfigError(yaml_errors.describe(error)) from error
            nodes[name] = _resolved(config.loss)
    return nodes


def _resolved(node: DictConfig) -> DictConfig:
    values: Any = OmegaConf.to_container(node, resolve=True)
    return OmegaConf.create(values)


def loss_nodes(cfg: DictConfig, trained: str) -> dict[str, DictConfig]:
    """The configs of the losses watched, in the order of `watch`; the trained one is among them.

    The trained loss is `cfg.loss`, where the command line may have changed it.

    Raises:
        ConfigError: there is no such loss.
    """
    known = loss_names()
    if trained not in known:  # after loss=[dice,cce] or ~loss
        raise ConfigError(f"loss must be one of {', '.join(known)}")
    if not OmegaConf.is_dict(cfg.loss):
        raise ConfigError(f"the file of loss {trained} must hold keys and values, got {cfg.loss}")
    for name in cfg.watch:
        if not isinstance(name, str) or name not in known:
            raise ConfigError(f"watch: there is no loss {name!r}; known are {', '.join(known)}")
    nodes = read_losses([name for name in cfg.watch if name != trained], cfg)
    nodes[trained] = _resolved(cfg.loss)
    return {name: nodes[name] for name in (*cfg.watch, trained)}
