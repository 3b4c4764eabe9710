"""Every loss in conf/loss: its formula, when to use it, its settings, its value on one example.

The first comment line of a file is the formula with its source, the other comment lines are the
advice.

The example has two 4×4 images with 6 foreground pixels of 32. The network is sure of 4 of these,
rates the other 2 as background, and rates 2 background pixels as foreground.
"""

from __future__ import annotations

import argparse
from itertools import takewhile
from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from losswatch.presets import CONF, load_loss


class Row(NamedTuple):
    name: str
    formula: str
    advice: str
    settings: str
    value: str


HEAD = Row("loss", "formula and source", "when to use it", "settings", "value")


def example() -> tuple[Tensor, Tensor]:
    """Logits [2, 2, 4, 4] and class indices [2, 4, 4]."""
    target = torch.zeros(2, 4, 4, dtype=torch.int64)
    target[0, 1:3, 1:3] = target[1, 0, :2] = 1
    # The logit of the foreground minus that of the background.
    difference = torch.where(target == 1, 0.5, -1.5)
    difference[0, 1:3, 1:3] = 2
    difference[1, 3, 2:] = 1
    return torch.stack([-difference / 2, difference / 2], 1), target


def settings_text(config: DictConfig) -> str:
    """`name=value` of all settings; the losses of a sum as `Class(...) + Class(...)`."""
    parts = []
    for name, value in config.items():
        if name == "losses":
            terms = (f"{part._target_.split('.')[-1]}({settings_text(part)})" for part in value)
            parts.append(" + ".join(terms))
        elif name != "_target_":
            parts.append(f"{name!s}={value}")
    return ", ".join(parts)


def loss_rows() -> list[Row]:
    """The losses of conf/loss by name."""
    logits, target = example()
    table = []
    for path in sorted((CONF / "loss").glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        formula, *advice = (line[2:] for line in takewhile(lambda line: line[:1] == "#", lines))
        config = OmegaConf.load(path)
        assert isinstance(config, DictConfig)
        value = load_loss(path.stem)(logits, target).item()
        table.append(
            Row(path.stem, formula, " ".join(advice), settings_text(config), f"{value:.4f}")
        )
    return table


def markdown(table: list[Row]) -> str:
    """The table of conf/loss/README.md."""
    cells: list[tuple[str, ...]] = [HEAD, ("---", "---", "---", "---", "---:")]
    for row in table:
        code = f"`{row.settings}`" if row.settings else ""
        cells.append(row._replace(name=f"`{row.name}`", settings=code))
    lines = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in cells)
    return "".join(f"| {line} |\n" for line in lines)


def print_losses(arguments: list[str]) -> None:
    """The command `losswatch losses`; with --markdown, prints the table of conf/loss/README.md."""
    parser = argparse.ArgumentParser("losswatch losses", description="all losses of conf/loss")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    if parser.parse_args(arguments).markdown:
        print(markdown(loss_rows()), end="")
        return
    table = Table(title="loss=…")
    for name in (HEAD.name, HEAD.formula, HEAD.settings):
        table.add_column(name, overflow="fold")
    table.add_column(HEAD.value, justify="right")
    for row in loss_rows():
        table.add_row(*map(escape, (row.name, row.formula, row.settings, row.value)))
    Console().print(table)
