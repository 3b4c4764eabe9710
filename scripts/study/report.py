"""Writes the report: fills the measures of the runs into the template report.md.j2."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from common.intervals import ratio_interval
from common.template import fill
from losswatch.files import replace_file
from losswatch.report.runs import left_out, read_runs
from losswatch.report.tables import csv_text, markdown_image
from losswatch.text import markdown_escape
from study import tables
from study.claims import judge
from study.figures import plot_ranges, plot_sweeps
from study.measures import CONVERGED, EARLY, converged, measured_runs, pick
from study.published import published_table
from study.saturation import failing_cell, pull_table, quiet_table
from study.symmetry import RangeCell, range_cells, range_panels, range_table

SWEEPS = ("article", "symmetry", "squared", "unet")
TEMPLATE = Path(__file__).with_name("report.md.j2")


def write_report(runs_dir: Path, out: Path) -> str:
    """Write report.md, summary.csv and figures/ into `out`, from the sweeps below `runs_dir`.

    Returns:
        The runs that are left out because they are not done, as text.

    Raises:
        FileNotFoundError: `runs_dir` holds no finished runs of the article's grid.
        OSError: nothing can be written into `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    read = {name: read_runs(runs_dir / name) for name in SWEEPS if (runs_dir / name).is_dir()}
    others = [left_out(runs.assign(run=f"{name}/" + runs["run"])) for name, runs in read.items()]
    left = ", ".join(filter(None, others))
    sweeps = {name: measured_runs(runs_dir / name, runs) for name, runs in read.items()}
    sweeps = {name: runs for name, runs in sweeps.items() if len(runs)}
    if "article" not in sweeps:
        raise FileNotFoundError(f"holds no finished runs: {runs_dir / 'article'}")
    figures = plot_sweeps(sweeps, runs_dir, out / "figures")
    images = [markdown_image(title, path, out) for title, path in figures.items()]
    cells = range_cells(sweeps)
    if cells:
        plot_ranges(range_panels(cells), out / "figures" / "symmetry.png")
    replace_file(out / "report.md", render(sweeps, cells, images, left))
    replace_file(out / "summary.csv", summary(sweeps))
    return left


def summary(sweeps: Mapping[str, pd.DataFrame]) -> str:
    """All runs and their measures, as CSV."""
    runs = pd.concat([runs.assign(sweep=name) for name, runs in sweeps.items()])
    columns = ["sweep", *(c for c in runs if c not in ("sweep", "run", "seconds", "error"))]
    return csv_text(runs[columns], float_format="%.5g")


def render(
    sweeps: Mapping[str, pd.DataFrame],
    cells: Sequence[RangeCell],
    images: Sequence[str],
    left: str = "",
) -> str:
    """The text of the report: the template with numbers and verdicts from the runs.

    Args:
        sweeps: the runs of each sweep, from `measured_runs`; at least those of the article.
        cells: C5's comparison of input ranges, if there are runs for it.
        images: the figures of curves, in Markdown.
        left: the runs that are left out.
    """
    article = sweeps["article"]
    return fill(
        TEMPLATE,
        CONVERGED=CONVERGED,
        EARLY=EARLY,
        images=images,
        left_out=markdown_escape(left),
        runs=len(article),
        seeds=article["seed"].nunique(),
        claims=tables.claim_table(judge(article)),
        outcomes=tables.outcome_table(article, tables.WAYS),
        slow=tables.slow_table(article),
        gains=tables.gain_table(article),
        early=tables.early_table(article),
        saturation=_saturation(article),
        norms=_norms(article),
        ranges=_ranges(cells),
        squared=_squared(sweeps),
        unet=_unet(sweeps),
        published=published_table(article),
        sgd=len(pick(article, optimizer="sgd")) > 0,
    )


# --- The values of the template's sections; None if the runs for a section are missing -----------


def _count(runs: pd.DataFrame) -> dict[str, Any]:
    return {"converged": converged(runs).sum(), "runs": len(runs)}


def _saturation(article: pd.DataFrame) -> dict[str, Any] | None:
    """Why DICEFG fails at 95 % foreground without batch norm."""
    cell = failing_cell(article).sort_values(["batch_norm", "seed"])
    if not len(cell):
        return None
    off, on = (pick(cell, batch_norm=normed) for normed in (False, True))
    return {
        "pulls": pull_table(),
        "quiet": quiet_table(cell),
        "off": {"norm": off["quiet/norm"].median(), **_count(off)},
        "on": {"norm": on["quiet/norm"].median(), **_count(on)},
    }


def _norms(article: pd.DataFrame) -> pd.DataFrame | None:
    """C5: gradient norms at each θ."""
    both = {0.05, 0.95} <= set(pick(article, optimizer="adam")["theta"])
    return tables.norm_table(article) if both else None


def _ranges(cells: Sequence[RangeCell]) -> dict[str, Any] | None:
    """C5: gradient norms by the range of the inputs."""
    if not cells:
        return None
    plain = [cell for cell in cells if not cell.batch_norm]
    normed = [cell for cell in cells if cell.batch_norm]
    return {
        "table": range_table(cells),
        "plain": len(plain),
        "as_expected": sum(cell.difference == cell.inputs.expected for cell in plain),
        "normed": len(normed),
        "alike": sum(cell.difference == "alike" for cell in normed),
    }


def _squared(sweeps: Mapping[str, pd.DataFrame]) -> dict[str, Any] | None:
    """The squared variants of Dice."""
    if "squared" not in sweeps:
        return None
    runs = sweeps["squared"]
    return {
        "seeds": runs["seed"].nunique(),
        "best": 0.95**0.5,  # the p of all pixels at which DICEFG_SQUARE is lowest, at θ = 0.05
        "outcomes": tables.outcome_table(runs, tables.ADAM_WAYS),
        "hard": _count(pick(runs, loss="dice_fg_square", theta=0.05, batch_norm=False)),
    }


def _unet(sweeps: Mapping[str, pd.DataFrame]) -> dict[str, Any] | None:
    """The same protocol on a U-Net."""
    if "unet" not in sweeps:
        return None
    runs = sweeps["unet"]
    half = pick(runs, loss="dice_fg", theta=0.5, batch_norm=False).set_index("seed")
    return {
        "seeds": runs["seed"].nunique(),
        "claims": tables.claim_table(judge(runs)),
        "outcomes": tables.outcome_table(runs, tables.ADAM_WAYS),
        "half": _count(half),
        "rise": ratio_interval(half["peak/cce"], half["first/cce"]).text(1),
        "normed": _count(pick(runs, loss="dice_fg", theta=0.05, batch_norm=True)),
    }
