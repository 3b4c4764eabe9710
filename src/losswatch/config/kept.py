"""What a test or a prediction takes from the run whose network it uses. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from losswatch.config.errors import ConfigError
from losswatch.config.ranges import FOLDER, RANDOM

Node = dict[str, Any]  # plain values; with a `_target_` it describes an object
Choices = Mapping[str, str | None]


@dataclass(frozen=True)
class Kept:
    """The settings of a run, as its checkpoint holds them. What it does not hold is left out.

    Attributes:
        values: of `theta`, `seed` and `watch`.
        nodes: of `model` and `data`.
        losses: the node of each watched loss by name, the trained one among them.
        choices: the name of the chosen file of `loss` and `model`.
        numbers: of `model` and `data` by dotted key. Those of `data` hold for other images, too.
        words: text of `data` by dotted key that holds for other images of the same kind.
        refused: a line about each of `model`, `data` and `losses` that may not be used.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    nodes: Mapping[str, Node] = field(default_factory=dict)
    losses: Mapping[str, Node] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def apply(
        self, cfg: DictConfig, given: Mapping[str, str], choices: Choices
    ) -> tuple[Choices, Mapping[str, Node]]:
        """Put the run's settings into a composed config, except for what the command gives.

        Args:
            cfg: the config; changed.
            given: the command's overrides by key.
            choices: the name of the chosen file of each group.

        Returns:
            the choices that hold now, and the nodes of losses that replace those of files.

        Raises:
            ConfigError: a node that is needed may not be used.
        """
        with open_dict(cfg):
            for key in ("seed", "watch"):
                if key in self.values and key not in given:
                    cfg[key] = self.values[key]
            self._apply_data(cfg, given)
            choices = self._apply_model(cfg, given, choices)
            if not self.losses:
                return choices, {}
            keeps_watch = "watch" not in given
            trained = self.choices["loss"] if "loss" not in given else None
            if trained or keeps_watch:
                self._check("losses")
            if trained:
                cfg.loss = _merged(cfg.loss, self.losses[trained], given, "loss")
                choices = {**choices, "loss": trained}
        return choices, {n: node for n, node in self.losses.items() if keeps_watch or n == trained}

    def _apply_model(self, cfg: DictConfig, given: Mapping[str, str], choices: Choices) -> Choices:
        """Keep the run's network, if the command names none or the same one."""
        if "model" not in self.nodes:
            return choices
        name, node = self.choices.get("model"), self.nodes["model"]
        if "model" in given:
            is_same = _target(cfg.model) == node.get("_target_")
            if not is_same or name not in (None, choices.get("model")):
                return choices
            if "model" in self.refused:  # the file that the command names says who makes it
                _set_all(cfg, self.numbers, "model", given)
                return choices
        cfg.model = _merged(cfg.model, self._node("model"), given, "model")
        return {**choices, "model": name}

    def _apply_data(self, cfg: DictConfig, given: Mapping[str, str]) -> None:
        """Keep the run's images; or, where the command names others, what holds for these, too."""
        kind = self.nodes.get("data", {}).get("_target_")
        is_same = _target(cfg.data) == kind
        has_others = "data" in given or "data.root" in given
        if is_same and OmegaConf.is_missing(cfg.data, "root"):  # data=folder alone names no images
            has_others = False
        if kind is not None and not has_others and cfg.mode != "predict":
            cfg.data = _merged(cfg.data, self._node("data"), given, "data")
            if kind in (RANDOM, FOLDER):
                for key, follows in (("seed", "${seed}"), ("thresholds", "${theta}")):
                    if key in cfg.data and f"data.{key}" not in given:
                        cfg.data[key] = follows
        else:
            known = {**self.numbers, **self.words} if is_same else self.numbers
            _set_all(cfg, known, "data", given)
        if "theta" not in given:
            is_random = _target(cfg.data) == RANDOM
            cfg.theta = self.values.get("theta", cfg.theta) if is_random else None

    def _node(self, group: str) -> Node:
        self._check(group)
        return self.nodes[group]

    def _check(self, what: str) -> None:
        if what in self.refused:
            raise ConfigError(self.refused[what])


def _target(node: Any) -> Any:
    return node.get("_target_") if OmegaConf.is_dict(node) else None


def _set_all(
    cfg: DictConfig, known: Mapping[str, Any], group: str, given: Mapping[str, str]
) -> None:
    """Set keys of a group that are there, unless the command gives them or they follow others."""
    for key, value in known.items():
        parent, _, name = key.rpartition(".")
        if not key.startswith(f"{group}.") or any(f"{k}.".startswith(f"{key}.") for k in given):
            continue
        node = OmegaConf.select(cfg, parent)
        if isinstance(node, DictConfig) and name in node:
            if not OmegaConf.is_interpolation(node, name):
                OmegaConf.update(cfg, key, value, merge=False)


def _merged(own: Any, node: Node, given: Mapping[str, str], group: str) -> DictConfig:
    """The node of a run, with the keys that the command gives.

    A value of `own` that follows another setting, such as `${seed}`, still follows it.

    Args:
        own: the group's node in the config of this command.
        given: the command's overrides by key.
    """
    merged = OmegaConf.create(node)
    if not OmegaConf.is_dict(own):
        return merged
    if _target(own) == node.get("_target_"):
        plain: Any = OmegaConf.to_container(own, resolve=False)
        for key in own:
            if OmegaConf.is_interpolation(own, key):
                merged[key] = plain[key]
    for key in given:
        if key.startswith(f"{group}."):
            name = key.removeprefix(f"{group}.")
            OmegaConf.update(merged, name, OmegaConf.select(own, name), merge=False)
    return merged
