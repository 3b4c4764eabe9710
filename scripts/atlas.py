"""The atlas: which loss works when, from many short trainings of the toy task.

    python scripts/atlas.py                        everything: one to three hours on two cores
    python scripts/atlas.py --quick                the same with fewer runs and steps
    python scripts/atlas.py --no-train             only the report, from existing runs

Runs are written to outputs/atlas_runs (--runs). The report, its figures and summary.csv are
written to outputs/atlas (--out). With --quick the folders end in _quick. Runs that are done are
skipped, and those that were interrupted go on. If scripts/demo.py was run before, its trainings on
real images are judged, too.
"""

import argparse
import sys
from pathlib import Path

from common.sweeps import train_sweep
from landscape.report import write_report
from landscape.sweeps import all_sweeps

# The sweeps of scripts/demo.py. They are judged, too, if they are there.
REAL = {
    "nuclei, U-Net": Path("outputs/demo-nuclei"),
    "brain, 3-D U-Net": Path("outputs/demo-brain"),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, help="the folder of the sweeps")
    parser.add_argument("--out", type=Path, help="the report's folder")
    parser.add_argument("--quick", action="store_true", help="fewer runs and steps")
    parser.add_argument("--no-train", action="store_true", help="only report on existing runs")
    parser.add_argument("--only", help="only the sweeps whose names begin so")
    args = parser.parse_args()
    runs = args.runs or Path("outputs", "atlas_runs_quick" if args.quick else "atlas_runs")
    out = args.out or Path("outputs", "atlas_quick" if args.quick else "atlas")
    sweeps = [s.quick() if args.quick else s for s in all_sweeps()]

    for sweep in [] if args.no_train else sweeps:
        if args.only and not sweep.name.startswith(args.only):
            continue
        print(f"{sweep.name}: {sweep.count} runs of {sweep.steps} steps", flush=True)
        if status := train_sweep(runs / sweep.name, sweep.overrides(str(runs))):
            return status
    if args.only:
        return 0
    try:
        write_report(runs, out, {} if args.quick else REAL)
    except OSError as error:  # there are no runs, or nothing can be written
        print(f"atlas.py: {error}", file=sys.stderr)
        return 2
    print(out / "report.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
