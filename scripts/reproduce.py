"""Reproduce the published study: train its sweeps and more, judge its claims, draw its figures.

    python scripts/reproduce.py                        everything: hours on two cores
    python scripts/reproduce.py --quick                claims C2 and C4 only: minutes
    python scripts/reproduce.py --no-train             only the report, from existing runs
    python scripts/reproduce.py --quick seed=0 trainer.max_steps=500      overrides for each sweep

Runs are written to outputs/reproduce (--runs). The report, its figures and summary.csv are written
to outputs/article, or with --quick to outputs/article_quick (--out). Runs that are done are
skipped, and those that were interrupted go on.
"""

import argparse
import sys
from pathlib import Path

from common.sweeps import train_sweep
from study.report import write_report

# Centred and flipped inputs. The article's runs have inputs from 0 to 1, and are not trained again.
MOVED = "data={low:-0.5,high:0.5},{low:1,high:0}"
# Folders below --runs, and the overrides of the sweep in each. Long sweeps are split.
SWEEPS = {
    "article/seeds-0-4": ["experiment=article", "seed=0,1,2,3,4", "compile=true"],
    "article/seeds-5-9": ["experiment=article", "seed=5,6,7,8,9", "compile=true"],
    "symmetry/seeds-0-4": ["experiment=symmetry", "seed=0,1,2,3,4", MOVED, "compile=true"],
    "unet/seeds-0-2": ["experiment=article_unet"],
    "squared/seeds-0-4": ["experiment=squared", "seed=0,1,2,3,4", "compile=true"],
}
QUICK = {"article/quick": ["experiment=article_quick", "compile=true"]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("outputs/reproduce"))
    parser.add_argument("--out", type=Path, help="the report's folder")
    parser.add_argument("--quick", action="store_true", help="experiment=article_quick only")
    parser.add_argument("--no-train", action="store_true", help="only report on existing runs")
    parser.add_argument("overrides", nargs="*", help="for every sweep, as for train.py")
    args = parser.parse_args()
    out = args.out or Path("outputs", "article_quick" if args.quick else "article")

    if not args.no_train:
        for name, overrides in (QUICK if args.quick else SWEEPS).items():
            if status := train_sweep(args.runs / name, [*overrides, *args.overrides]):
                return status
    try:
        others = write_report(args.runs, out)
    except OSError as error:  # there are no runs, or nothing can be written
        print(f"reproduce.py: {error}", file=sys.stderr)
        return 2
    if others:
        print(f"Left out, because they are not done: {others}")
    print(out / "report.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
