"""Report on a sweep from its files: tables, figures, a comparison of the losses.

    python scripts/report.py outputs/<sweep>                     mean over seeds
    python scripts/report.py outputs/<sweep> --seeds             each seed's figures as well
    python scripts/report.py outputs/<sweep> --format pdf,svg    figures for a paper
    python scripts/report.py outputs/<sweep> --study             axes of the published study

Prints the table of runs, what they show in words, and the comparison of losses, in each condition
and pooled. Writes summary.csv, comparison.csv, report.md, report.html and figures/ into the sweep's
folder. report.html shows values where the mouse is, and needs no network.
Means, comparisons and figures use only runs that are done, and the other runs are named. A folder
of sweeps is read as one sweep.
"""

import argparse
import io
import logging
import sys
from pathlib import Path

import pandas as pd
from rich.console import Console

from losswatch.board.page import INSTALL, has_plotly, write_page
from losswatch.files import replace_file
from losswatch.report.compare import COMPARED, compare_losses, conditions
from losswatch.report.dependence import plot_dependence
from losswatch.report.figures import plot_sweep
from losswatch.report.runs import all_losses, left_out
from losswatch.report.style import FORMATS, loss_looks
from losswatch.report.tables import (
    cell_table,
    comparison_table,
    finding_table,
    markdown_image,
    markdown_table,
    print_summary,
    rich_table,
    write_comparison,
    write_summary,
)
from losswatch.report.words import in_words
from losswatch.text import markdown_escape, number_of, printable

ROWS = 30  # of a comparison that a table shows, at most
PICTURES = 6  # of runs in which something is wrong, at most


class Once(logging.Filter):
    """Passes each message once."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        is_new = text not in self.said
        self.said.add(text)
        return is_new


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path, help="a sweep's folder, outputs/<sweep>")
    parser.add_argument("--seeds", action="store_true", help="also a figure for each single seed")
    parser.add_argument(
        "--format", type=formats, default=["png"], metavar="png,pdf,svg", help="of the figures"
    )
    parser.add_argument("--study", action="store_true", help="give the axes the study's limits")
    args = parser.parse_args()
    # The figures and the page read the same files, and warn of the same damage.
    assert logging.lastResort is not None
    logging.lastResort.addFilter(Once())

    try:
        runs = write_summary(args.sweep)
        comparisons = compare(args.sweep, runs)
        style = {"looks": loss_looks(all_losses(runs)), "formats": args.format}
        figures = plot_dependence(args.sweep, runs, **style)
        figures |= plot_sweep(args.sweep, runs, study=args.study, **style)
        if args.seeds:
            figures |= plot_sweep(args.sweep, runs, study=args.study, seeds=True, **style)
        report = args.sweep / "report.md"
        replace_file(report, markdown(args.sweep, runs, comparisons, figures))
        sentences = in_words(runs)
        page = None
        if has_plotly():
            page = write_page(args.sweep, runs, sentences, comparisons, style["looks"])

        if isinstance(sys.stdout, io.TextIOWrapper):  # an output in ASCII cannot show θ
            sys.stdout.reconfigure(errors="replace")
        # The table need not fit into a width in a log or a pipe.
        terminal = sys.stdout is not None and sys.stdout.isatty()
        console = Console(width=None if terminal else 200)
        print_summary(console, runs)
        if sentences:
            print("\n" + "\n".join(sentences))
        for title, cells in comparisons.items():
            console.print(f"\n[bold]{title}[/]", highlight=False)
            console.print(rich_table(cells))
        if others := left_out(runs):
            print(f"\nNot done, so in no mean, comparison or figure: {others}")
        if comparisons:
            print(f"\n{printable(args.sweep / 'comparison.csv')} (all rows)")
        print(printable(page) if page else f"no report.html: Plotly is missing; {INSTALL}")
        print(f"{printable(report)} ({number_of(len(figures), 'figure')})")
    except OSError as error:  # the folder does not exist, holds no runs, or cannot be written to
        print(f"report.py: {printable(error)}", file=sys.stderr)
        return 2
    return 0


def formats(text: str) -> list[str]:
    """The formats in a list with commas.

    Raises:
        argparse.ArgumentTypeError: a format is unknown.
    """
    names = text.split(",")
    if not set(names) <= set(FORMATS):
        raise argparse.ArgumentTypeError(f"one or more of {','.join(FORMATS)}, not {text!r}")
    return list(dict.fromkeys(names))


def compare(sweep: Path, runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The comparisons of losses as text, by title. Writes their numbers to comparison.csv."""
    each, pooled = compare_losses(runs), compare_losses(runs, pooled=True)
    if not len(each):
        return {}
    several = len(conditions(each)) > 0
    write_comparison(sweep, each, pooled if several else pooled[:0])
    titles = {
        "Losses, pair by pair, in each condition" if several else "Losses, pair by pair": each
    }
    if several:
        titles["Pooled over all conditions: differences of opposite signs cancel"] = pooled
    tables = {}
    for title, comparison in titles.items():
        if len(comparison) > ROWS:
            title += f" ({ROWS} of {len(comparison)}: those with the smallest p)"
        tables[title] = comparison_table(most_certain(comparison))
    return tables


def most_certain(comparison: pd.DataFrame) -> pd.DataFrame:
    """At most `ROWS` rows, in their order: those with the smallest p-values.

    With one seed there are no p-values: then those with the largest differences.
    """
    p = comparison[[f"{metric}_p" for metric in COMPARED]].min(axis=1)
    size = comparison[COMPARED].abs().max(axis=1)
    ranked = pd.DataFrame({"p": p, "size": -size}).sort_values(["p", "size"])  # NaN last
    return comparison.loc[sorted(ranked.index[:ROWS])]


def markdown(
    sweep: Path,
    runs: pd.DataFrame,
    comparisons: dict[str, pd.DataFrame],
    figures: dict[str, Path],
) -> str:
    """The report in Markdown: runs, results by setting, losses pair by pair, figures."""
    counts = ", ".join(f"{n} {s}" for s, n in runs["status"].value_counts().items())
    parts = [
        f"# {markdown_escape(sweep.resolve().name)}",
        f"Runs: {markdown_escape(counts)}. Every run and its settings: [summary.csv](summary.csv).",
    ]
    if sentences := in_words(runs):
        parts += ["## In words", "\n".join(f"- {markdown_escape(s)}" for s in sentences)]
    parts += [
        "## Results",
        "Validation metrics at the end of training, as the mean (lowest to highest) over the runs "
        "of each row that are done.",
        markdown_table(cell_table(runs)),
    ]
    for i, (title, cells) in enumerate(comparisons.items()):
        parts.append(f"## {title}")
        if i == 0:
            parts.append(
                "The mean difference over pairs of runs that share everything but the training "
                "loss, ± half of its 95 % interval (paired t). In brackets is the p-value of the "
                "paired t test, corrected by Holm for all rows of the table; n is the number of "
                "pairs. A condition is one value of "
                "everything that was swept except the loss and the seed. One pair has no interval "
                "(–). All rows: [comparison.csv](comparison.csv)."
            )
        else:
            parts.append("The pairs of all conditions are taken as one sample.")
        parts.append(markdown_table(cells))
    findings = finding_table(sweep, runs)
    if len(findings):
        parts += [
            "## What is wrong",
            "Trainings in which losswatch found something. `curves.png` of a run marks the step. "
            "What the names mean: src/losswatch/doctor/README.md.",
            markdown_table(findings),
        ]
        pictures = [sweep / run / "curves.png" for run in findings["run"].unique()[:PICTURES]]
        parts += [markdown_image(p.parent.name, p, sweep) for p in pictures if p.exists()]
    stopped = runs[runs["status"] != "done"]
    if len(stopped):
        parts += [
            "## Not finished",
            "These runs are in no mean, comparison or figure.",
            *(
                f"- {markdown_escape(run)}: {markdown_escape(status)}"
                + (f", {markdown_escape(error)}" if isinstance(error, str) else "")
                for run, status, error in stopped[["run", "status", "error"]].values
            ),
        ]
    if figures:
        parts += [
            "## Figures",
            "Dice and accuracy over a setting: a point is the mean over the seeds, its bar the "
            "95 % interval of the mean.",
            "Curves: each figure has a column per training loss. Above is the global gradient norm "
            "of each watched loss, a moving mean over 201 observed steps (2 % of them in shorter "
            "runs). Below are the losses, moving means over 11 steps, and the validation accuracy "
            "(black, right-hand axis). Lines are means over repeated runs, and shades are their "
            "ranges, up to the step at which the first of these runs ends. The trained loss is the "
            "thicker line.",
        ]
    parts += [markdown_image(title, path, sweep) for title, path in figures.items()]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
