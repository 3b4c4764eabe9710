"""Report on a sweep from what it left on disk: tables, figures, a comparison of the losses.

    python scripts/report.py outputs/<sweep>            mean over seeds
    python scripts/report.py outputs/<sweep> --seeds    each seed's figures as well
    python scripts/report.py outputs/<sweep> --free     axes fitted to the curves, not the study's

Prints the table of runs and the pairwise comparison of losses, and writes summary.csv, report.md
and figures/ into the sweep's folder. The report names runs that are not finished or that failed. A
folder of sweeps is read as one sweep.
"""

import argparse
import io
import sys
from pathlib import Path

import pandas as pd
from rich.console import Console

from losswatch.files import replace_file
from losswatch.report.compare import compare_losses
from losswatch.report.figures import plot_sweep
from losswatch.report.tables import (
    cell_table,
    comparison_table,
    markdown_image,
    markdown_table,
    rich_table,
    summary_table,
    write_summary,
)
from losswatch.text import markdown_escape, printable


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path, help="a sweep's folder, outputs/<sweep>")
    parser.add_argument("--seeds", action="store_true", help="also a figure for each single seed")
    parser.add_argument("--free", action="store_true", help="fit the axes to the curves")
    args = parser.parse_args()

    try:
        runs = write_summary(args.sweep)
        comparison = comparison_table(compare_losses(runs))
        figures = plot_sweep(args.sweep, runs, free=args.free)
        if args.seeds:
            figures |= plot_sweep(args.sweep, runs, seeds=True, free=args.free)
        report = args.sweep / "report.md"
        replace_file(report, markdown(args.sweep, runs, comparison, figures))

        if isinstance(sys.stdout, io.TextIOWrapper):  # an output in ASCII cannot show θ
            sys.stdout.reconfigure(errors="replace")
        # A log or a pipe has no width that the table must fit into.
        terminal = sys.stdout is not None and sys.stdout.isatty()
        console = Console(width=None if terminal else 200)
        console.print(summary_table(runs))
        if len(comparison):
            console.print(rich_table(comparison))
        print(f"{printable(report)} ({len(figures)} figures)")
    except OSError as error:  # the folder does not exist, holds no runs, or cannot be written to
        print(f"report.py: {printable(error)}", file=sys.stderr)
        return 2
    return 0


def markdown(
    sweep: Path, runs: pd.DataFrame, comparison: pd.DataFrame, figures: dict[str, Path]
) -> str:
    """The report: what was run, results by setting, losses pair by pair, figures."""
    counts = ", ".join(f"{n} {s}" for s, n in runs["status"].value_counts().items())
    parts = [
        f"# {markdown_escape(sweep.resolve().name)}",
        f"Runs: {markdown_escape(counts)}. Every run and its settings: [summary.csv](summary.csv).",
        "## Results",
        "Validation metrics at the end of training, as the mean (lowest to highest) over the runs "
        "of each row that are done.",
        markdown_table(cell_table(runs)),
    ]
    if len(comparison):
        parts += [
            "## Losses, pair by pair",
            "The mean difference over pairs of runs that share everything but the training loss, "
            "with its 95 % interval (paired t). Pairs of all settings are taken as one sample.",
            markdown_table(comparison),
        ]
    stopped = runs[runs["status"] != "done"]
    if len(stopped):
        parts += [
            "## Not finished",
            *(
                f"- {markdown_escape(run)}: {markdown_escape(status)}"
                + (f", {markdown_escape(error)}" if isinstance(error, str) else "")
                for run, status, error in stopped[["run", "status", "error"]].values
            ),
        ]
    if figures:
        parts += [
            "## Curves",
            "Each figure has a column per training loss. Above is the global gradient norm of each "
            "watched loss, a moving mean over 201 observed steps (2 % of them in shorter runs). "
            "Below are the losses, moving means over 11 steps, and the validation accuracy (black, "
            "right-hand axis). Lines are means over repeated runs, and shades are their ranges. "
            "The trained loss is the thicker line.",
        ]
    parts += [markdown_image(title, path, sweep) for title, path in figures.items()]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
