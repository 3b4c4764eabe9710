"""Every loss in conf/loss: its formula, the knobs that it sets, its value on one example.

    python scripts/losses.py               a table in the terminal
    python scripts/losses.py --markdown    the same for the README

The example: two 4×4 images, 6 of 32 pixels foreground; the network is sure of 4 of them, less so of
2, and sees 2 where there are none.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor

CONFIGS = Path(__file__).parent.parent / "conf" / "loss"


def example() -> tuple[Tensor, Tensor]:
    """Logits [2, 2, 4, 4] and class indices [2, 4, 4]."""
    target = torch.zeros(2, 4, 4, dtype=torch.int64)
    target[0, 1:3, 1:3] = target[1, 0, :2] = 1
    foreground = 2.0 * target - 1.5  # the logits' difference: -1.5 background, 0.5 found foreground
    foreground[0, 1:3, 1:3] = 2
    foreground[1, 3, 2:] = 1
    return torch.stack([-foreground / 2, foreground / 2], 1), target


def knobs(config: DictConfig) -> str:
    """`name=value` of all but the target, nested losses in brackets."""
    parts = []
    for name, value in config.items():
        if name == "losses":
            inner = (f"{part._target_.split('.')[-1]}({knobs(part)})" for part in value)
            parts.append(" + ".join(inner))
        elif name != "_target_":
            parts.append(f"{name!s}={value}")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    markdown = parser.parse_args().markdown
    logits, target = example()
    rows = []
    for path in sorted(CONFIGS.glob("*.yaml")):
        config = OmegaConf.load(path)
        assert isinstance(config, DictConfig)
        formula = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        value = instantiate(config)(logits, target).item()
        rows.append((path.stem, formula, knobs(config), f"{value:.4f}"))
    head = ("loss", "formula and source", "knobs", "value")
    if markdown:
        for row in (head, ("---",) * 3 + ("---:",), *rows):
            cells = [cell.replace("|", "\\|") for cell in row]
            if row in rows:
                cells[0] = f"`{cells[0]}`"
                cells[2] = f"`{cells[2]}`" if cells[2] else ""
            print(f"| {' | '.join(cells)} |")
        return
    table = Table(*head[:3], title="loss=…", show_lines=False)
    table.add_column(head[3], justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
