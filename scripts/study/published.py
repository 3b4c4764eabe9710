"""Compares the published plots of the study, read by eye, with our runs."""

import pandas as pd

from common.intervals import mean_interval
from study.claims import NAMES
from study.measures import pick
from study.tables import foreground, on_off

# The trained loss's gradient norm over the last 1,000 steps, with Adam: lowest and highest of three
# runs, by batch norm, θ and loss.
PUBLISHED = {
    (False, 0.05): {"cce": (0.2, 0.35), "dice_fg": (0.0, 0.0), "dice": (0.6, 0.8)},
    (False, 0.5): {"cce": (0.25, 0.4), "dice_fg": (0.15, 0.25), "dice": (0.13, 0.15)},
    (False, 0.95): {"cce": (0.4, 0.55), "dice_fg": (2.2, 3.3), "dice": (1.2, 1.9)},
    (True, 0.05): {"cce": (0.4, 0.7), "dice_fg": (0.15, 0.2), "dice": (1.2, 1.5)},
    (True, 0.5): {"cce": (0.25, 0.3), "dice_fg": (0.13, 0.15), "dice": (0.15, 0.15)},
    (True, 0.95): {"cce": (0.4, 0.7), "dice_fg": (1.9, 3.0), "dice": (1.75, 2.2)},
}


def published_table(article: pd.DataFrame) -> pd.DataFrame:
    """A row for each published norm that our runs repeat, and whether both agree."""
    rows = []
    for (normed, theta), cells in PUBLISHED.items():
        for loss, (low, high) in cells.items():
            cell = pick(article, optimizer="adam", batch_norm=normed, theta=theta, loss=loss)
            if not len(cell):
                continue
            late = cell[f"late/{loss}"]
            # Numbers read by eye have an error of about a tenth.
            agree = late.between(0.9 * low - 0.05, 1.1 * high + 0.05).any()
            rows.append({
                "trained with": NAMES[loss],
                "foreground": foreground(theta),
                "BN": on_off(normed),
                "published, three runs": f"{low:g} to {high:g}",
                f"ours, {len(cell)} runs": f"{late.min():.2f} to {late.max():.2f}",
                "mean": mean_interval(late).text(2),
                "": "agree" if agree else "differ",
            })  # fmt: skip
    return pd.DataFrame(rows)
