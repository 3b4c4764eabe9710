"""Tables of runs: as CSV, on a terminal (rich), and in Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from losswatch.files import replace_file
from losswatch.report.compare import COMPARED, conditions
from losswatch.report.records import METRICS, read_record
from losswatch.report.runs import (
    LABELS,
    by_condition,
    done,
    is_repeated,
    read_runs,
    swept,
    with_short_checkpoints,
)
from losswatch.text import csv_escape, format_value, markdown_escape, printable

STATUS_STYLES = {
    "done": "green",
    "failed": "bold red",
    "unfinished": "yellow",
}


# --- Cells of text -------------------------------------------------------------------------------


def run_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row of text for each run: its swept settings, and its results."""
    columns = ["loss", "theta", "optimizer", "batch_norm"]
    columns = [c for c in columns if c == "loss" or runs[c].notna().any()]
    columns += [c for c in swept(runs) if c not in columns]
    columns += [*METRICS, "seconds", "status"]
    columns += [c for c in ("verdict", "error") if runs[c].notna().any()]
    digits = {**dict.fromkeys(METRICS, 4), "seconds": 1}
    return pd.DataFrame(
        {LABELS.get(c, c): [format_value(v, digits.get(c)) for v in runs[c]] for c in columns}
    )


def cell_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row of text for each setting: its runs, and the mean and range of each metric.

    Runs that differ only in the seed have one setting. Only runs that are done count for metrics,
    and for the verdict: the one of most runs, with their number if not all have it.
    """
    columns = ["loss", *(c for c in swept(runs) if c != "seed")]
    rows = []
    for cell in by_condition(runs, "loss"):
        row = {LABELS.get(c, c): format_value(cell[c].iloc[0]) for c in columns}
        counted = done(cell)
        of_all = "" if len(counted) == len(cell) else f" of {len(cell)}"
        row["runs"] = f"{len(counted)}{of_all}"
        for metric in METRICS:
            known = counted[metric].dropna()
            text = f"{known.mean():.4f}" if len(known) else "–"
            text += f" ({known.min():.4f} to {known.max():.4f})" if len(known) > 1 else ""
            row[LABELS[metric]] = text
        if runs["verdict"].notna().any():
            row["verdict"] = "–"
            for verdict, count in counted["verdict"].value_counts().head(1).items():
                few = "" if count == len(counted) else f"{count} of {len(counted)} "
                row["verdict"] = f"{few}{verdict}"
        rows.append(row)
    return pd.DataFrame(rows)


def stopped_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row of text for each run that is not done: its folder, its status and its error."""
    stopped = runs.loc[runs["status"] != "done", ["run", "status", "error"]]
    return stopped.apply(lambda column: column.map(format_value))


def finding_table(sweep_dir: str | Path, runs: pd.DataFrame) -> pd.DataFrame:
    """A row of text for each finding of the runs: what is wrong, since when, and what to do."""
    found = runs.loc[runs["findings"].notna(), "run"]
    rows = [
        {"run": run} | {key: format_value(value) for key, value in finding.items()}
        for run in found
        for finding in read_record(Path(sweep_dir) / run).findings
    ]
    return pd.DataFrame(rows, columns=["run", "name", "step", "text", "remedy"])


def comparison_table(comparison: pd.DataFrame) -> pd.DataFrame:
    """The frame of `compare_losses` as text: difference ± half of its interval (p-value)."""
    rows = []
    for pair in comparison.to_dict("records"):
        row = {LABELS.get(c, c): format_value(pair[c]) for c in conditions(comparison)}
        row["losses"] = f"{format_value(pair['loss'])} − {format_value(pair['other'])}"
        row["n"] = str(pair["pairs"])
        for metric in COMPARED:
            mean, _, high, p = (pair[metric + end] for end in ("", "_low", "_high", "_p"))
            text = "–"
            if not np.isnan(mean):
                margin = "–" if np.isnan(high) else f"{high - mean:.4f}"
                chance = "–" if np.isnan(p) else "<0.001" if p < 0.001 else f"{p:.4f}"
                text = f"{mean:+.4f} ± {margin} ({chance})"
            row[f"{LABELS[metric]} ± 95 % (p)"] = text
        rows.append(row)
    return pd.DataFrame(rows)


# --- Tables ---------------------------------------------------------------------------------------


def write_summary(sweep_dir: str | Path) -> pd.DataFrame:
    """Write `summary.csv` into a sweep's folder. Returns its rows, `read_runs` with details."""
    runs = read_runs(sweep_dir, details=True)
    replace_file(Path(sweep_dir) / "summary.csv", csv_text(runs))
    return runs


def write_comparison(sweep_dir: str | Path, comparison: pd.DataFrame, pooled: pd.DataFrame) -> None:
    """Write all rows of both frames of `compare_losses` to `comparison.csv` of a sweep's folder."""
    both = pd.concat([comparison.assign(pooled=False), pooled.assign(pooled=True)])
    replace_file(Path(sweep_dir) / "comparison.csv", csv_text(both))


def csv_text(cells: pd.DataFrame, **options: Any) -> str:
    """A frame as CSV, with options of `pandas.DataFrame.to_csv`. No text acts as a formula."""
    cells = cells.copy()
    for name in cells.select_dtypes(exclude=["number", "bool"]):
        values = [csv_escape(v) if isinstance(v, str) else v for v in cells[name]]
        cells[name] = pd.Series(values, cells.index, dtype=object)
    header = [csv_escape(str(name)) for name in cells]
    return cells.to_csv(index=False, header=header, **options)


def print_summary(console: Console, runs: pd.DataFrame) -> None:
    """Print `summary_table`, and the runs that are not done if it has no row for each run."""
    console.print(summary_table(with_short_checkpoints(runs), console.width))
    stopped = stopped_table(runs)
    if is_repeated(runs) and len(stopped):
        table = rich_table(stopped[:STOPPED])
        if len(stopped) > STOPPED:
            table.caption = f"and {len(stopped) - STOPPED} more: summary.csv"
            table.caption_justify = "left"
        console.print("\nNot done, so in no mean:")
        console.print(table)


def summary_table(runs: pd.DataFrame, width: int | None = None) -> Table:
    """The table that is printed at the end of a sweep.

    It has a row for each run, or for each setting if some runs differ only in the seed.

    Args:
        width: characters of a line. If the columns need more, settings that all runs share are left
            out, then ranges, and then the last metrics, but never Dice. If the table is too wide
            even with broken words, the last swept settings are left out, too. The caption names
            these columns; `summary.csv` has them all.
    """
    differ, left_out = swept(runs), []
    if is_repeated(runs):
        cells = cell_table(runs[runs["loss"].notna()])
        for name in ("accuracy", "IoU"):
            if width and _width(cells, np.inf) > width:
                cells[name] = cells[name].str.partition(" (")[0]
    else:
        cells = run_table(runs)
    shared = [c for c in ("optimizer", "batch_norm") if c not in differ]
    droppable = [(c, np.inf) for c in [*shared, "seconds", "accuracy", "iou", "error"]]
    droppable += [(c, UNBROKEN) for c in reversed(differ)]
    for column, longest in droppable:
        name = LABELS.get(column, column)
        if name in cells and width and _width(cells, longest) > width:
            cells = cells.drop(columns=name)
            left_out.append(name)
    table = rich_table(cells)
    if left_out:
        table.caption = f"Left out (too wide): {', '.join(left_out)}"
        table.caption_justify = "left"
    return table


STOPPED = 30  # runs that are not done, at most, below a table of settings
UNBROKEN = 14  # words with at most so many characters are not broken


def _width(cells: pd.DataFrame, longest: float) -> float:
    """The width of a row of `rich_table` if texts longer than `longest`, and errors, are broken."""
    limits = {name: UNBROKEN if name == "error" else longest for name in cells}
    widths = [min(limits[name], max(map(cell_len, [name, *cells[name]]))) for name in cells]
    return sum(widths) + 2 * (len(widths) - 1)


def rich_table(cells: pd.DataFrame) -> Table:
    """Cells of text as a table for a terminal. Columns of numbers are aligned to the right."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for name in cells:
        numbers = cells[name].str.fullmatch(r"[-–+.\d]+( ± [–.\d]+)?( \(.*\))?").all()
        table.add_column(
            Text(printable(name)),
            justify="right" if numbers else "left",
            overflow="fold",
            min_width=min(UNBROKEN, max(map(cell_len, [printable(name), *cells[name]]))),
        )
    for row in cells.itertuples(index=False):
        # Text, because rich reads markup in a str.
        table.add_row(*(Text(c, STATUS_STYLES.get(c, "")) for c in row))
    return table


def markdown_table(cells: pd.DataFrame) -> str:
    """Cells of text as a table in Markdown."""
    lines = [list(cells), ["---"] * len(cells.columns), *cells.itertuples(index=False)]
    return "\n".join("| " + " | ".join(map(markdown_escape, line)) + " |" for line in lines)


def markdown_image(title: str, path: Path, folder: Path) -> str:
    """The image at `path` with its title, in Markdown, for a document in `folder`.

    A PDF becomes a link, because a page does not show it.
    """
    link = quote(path.relative_to(folder).as_posix(), safe="/=,")
    mark = "" if path.suffix == ".pdf" else "!"
    return f"### {markdown_escape(title)}\n\n{mark}[{markdown_escape(title)}]({link})"
