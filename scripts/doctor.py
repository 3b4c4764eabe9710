"""How the doctor fares: patients with their healthy twins, and false alarms among runs.

    python scripts/doctor.py patients FOLDER ...     # expected.json, and a file for each name
    python scripts/doctor.py runs outputs/<sweep> ...

Both print a table in Markdown. A patient is right if its first finding is one of those expected. A
run counts as healthy if its validation Dice is at least 0.9.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from losswatch.report.diagnosis import findings_of
from losswatch.report.runs import read_runs

HEALTHY = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["patients", "runs"])
    parser.add_argument("folders", nargs="+", type=Path)
    options = parser.parse_args()
    show = show_patients if options.what == "patients" else show_runs
    raise SystemExit(show(options.folders))


def show_patients(folders: Sequence[Path]) -> int:
    """Train each patient and its twin, and print what was found; return how many are wrong."""
    wrong = 0
    print("| patient | expected | found | in the healthy twin | Dice, sick | Dice, healthy |")
    print("| --- | --- | --- | --- | --- | --- |")
    for folder in folders:
        expected = json.loads((folder / "expected.json").read_text())
        for name, names in expected.items():
            sick, healthy = train(folder / f"{name}.py")
            found, alarms = ([f["name"] for f in r["findings"]] for r in (sick, healthy))
            right = (
                found[:1] == [] if not names else found[:1] and found[0] in names
            ) and not alarms
            wrong += not right
            cells = [name, ", ".join(names), ", ".join(found), ", ".join(alarms)]
            cells += [f"{r['dice_eval']:.2f}" for r in (sick, healthy)]
            mark = "" if right else " **wrong**"
            print(f"| {' | '.join(cell or '–' for cell in cells)}{mark} |", flush=True)
    print(f"\n{wrong} wrong")
    return int(wrong > 0)


def train(file: Path) -> list[dict]:
    """The records of a patient and of its healthy twin."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "records.json"
        command = [sys.executable, file.name, "--json", str(kept)]
        done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{file} failed:\n{done.stderr}")
        return json.loads(kept.read_text())


def show_runs(sweeps: Sequence[Path]) -> int:
    """Print the findings of the runs of sweeps, from their records."""
    healthy, alarms, failing, named = 0, 0, 0, 0
    print("| run | Dice | findings |")
    print("| --- | --- | --- |")
    for sweep in sweeps:
        for row in read_runs(sweep).to_dict("records"):
            found = findings_of(sweep / row["run"], row["loss"])
            names = ", ".join(f"{f.name} ({f.step})" for f in found)
            is_healthy = row["dice"] >= HEALTHY
            healthy, failing = healthy + is_healthy, failing + (not is_healthy)
            alarms += is_healthy and bool(found)
            named += not is_healthy and bool(found)
            if found or not is_healthy:
                print(f"| {row['run']} | {row['dice']:.3f} | {names or '–'} |")
    print(f"\n{healthy} healthy runs, {alarms} of them with a finding; ", end="")
    print(f"{failing} with a Dice below {HEALTHY}, {named} of them with a finding")
    return 0


if __name__ == "__main__":
    main()
