"""The files of losses: which losses there are, and what their files say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf, read_write
from yaml import YAMLError

from losswatch.compat import config_loader
from losswatch.config import yaml_errors
from losswatch.config.errors import ConfigError


class Sources:
    """The losses of conf/loss and of each folder that the user adds to Hydra's search path.

    The names are listed once, and each file is composed once.

    Args:
        added: the command's overrides of Hydra's search path.

    Raises:
        ConfigError: a file of the user has the name of a built-in file.
    """

    def __init__(self, added: Sequence[str] = ()) -> None:
        self.added = list(added)
        loader = config_loader()
        self.losses = loader.get_group_options("loss", config_name="config", overrides=self.added)
        self._composed: dict[str, DictConfig] = {}
        self._check_names()

    def _check_names(self) -> None:
        """Check that no file of the user has the name of a built-in file.

        Raises:
            ConfigError: Hydra would use the built-in file; the message names both.
        """
        folders = [
            Path(source.path).resolve()
            for source in config_loader().get_sources()
            if source.scheme() == "file"
        ]
        for built_in in sorted(folders[0].rglob("*.yaml")) if folders else []:
            for folder in dict.fromkeys(folders[1:]):
                file = folder / built_in.relative_to(folders[0])
                if file != built_in and file.exists():
                    raise ConfigError(
                        f"{file} would not be used, but {built_in}; give it another name"
                    )

    def read(self, names: Sequence[str], cfg: DictConfig) -> dict[str, dict[str, Any]]:
        """The nodes that the files of losses describe, as plain data, resolved in `cfg`.

        A file may have a `defaults` list, and may refer to other keys, as in `${seed}`.

        Raises:
            ConfigError: a file is not YAML, or holds no keys.
        """
        self._compose([name for name in names if name not in self._composed])
        config, nodes = OmegaConf.masked_copy(cfg, list(cfg)), {}
        with read_write(config):
            for name in names:
                config.loss = self._composed[name]
                nodes[name] = OmegaConf.to_container(config.loss, resolve=True)
        return nodes  # type: ignore[return-value]

    def _compose(self, names: Sequence[str]) -> None:
        """Compose the files of several losses, all in one config, since each config takes 70 ms.

        Raises:
            ConfigError: a file is not YAML, or holds no keys.
        """
        if not names:
            return
        files = [f"+loss@loss.at{i}={name}" for i, name in enumerate(names)]
        try:
            found = hydra.compose("config", [*files, *self.added]).loss
        except (YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(yaml_errors.describe(error)) from error
        for i, name in enumerate(names):
            self._composed[name] = _checked(name, found[f"at{i}"])

    def watched(
        self, cfg: DictConfig, trained: str, kept: Mapping[str, dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """The nodes of the losses watched, in the order of `watch`; the trained one is among them.

        The trained loss is `cfg.loss`, where the command line may have changed it.

        Args:
            kept: nodes that replace those of files.

        Raises:
            ConfigError: there is no such loss, or its file is wrong.
        """
        known = ", ".join(self.losses)
        if trained not in {*self.losses, *kept}:  # as after loss=[dice,cce] or ~loss
            raise ConfigError(f"loss must be one of {known}")
        _checked(trained, cfg.loss)
        for name in cfg.watch:
            if not isinstance(name, str) or name not in {*self.losses, *kept}:
                raise ConfigError(f"watch: there is no loss {name!r}; known are {known}")
        nodes = dict(kept)
        nodes |= self.read([n for n in cfg.watch if n not in {*kept, trained}], cfg)
        nodes[trained] = OmegaConf.to_container(cfg.loss, resolve=True)  # type: ignore[assignment]
        return {name: nodes[name] for name in (*cfg.watch, trained)}


def _checked(name: str, node: Any) -> DictConfig:
    """What a loss's file holds.

    Raises:
        ConfigError: it holds no keys.
    """
    if not OmegaConf.is_dict(node):
        raise ConfigError(f"the file of loss {name} must hold keys and values, got {node}")
    return node
