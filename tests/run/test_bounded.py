"""Memory does not grow with the length of a run, nor with the number of runs.

Resident memory of the real process, as Linux reports it.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ENVIRONMENT, ROOT, read_result

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory of a process"),
]

# The allocator has its default settings.
PLAIN = {key: value for key, value in ENVIRONMENT.items() if not key.startswith("MALLOC_")}


def resident(pid: int) -> float:
    """MiB of physical memory that a process holds; NaN once it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return float("nan")
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def start(*overrides, cwd):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *overrides], cwd=cwd, env=PLAIN, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def growth(done, memory) -> float:
    """MiB by which a line fitted to the samples rises from the first sample to the last."""
    slope, _ = np.polyfit(done, memory, 1)
    return slope * (done[-1] - done[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_long_run(tmp_path, compiled):
    """10,000 steps, 100,000 compiled: memory grows by less than 4 MiB after the first fifth.

    The size of the event file tells how far a run is.
    """
    steps = 100_000 if compiled else 10_000
    samples = []
    with start(
        "experiment=smoke", f"trainer.max_steps={steps}", "trainer.val_check_interval=500",
        f"compile={compiled}", "hydra.run.dir=run", cwd=tmp_path,
    ) as process:  # fmt: skip
        while process.poll() is None:
            if files := list(tmp_path.glob("run/events.*")):
                samples.append((files[0].stat().st_size, resident(process.pid)))
            time.sleep(0.1)
    assert process.returncode == 0 and read_result(tmp_path / "run")["status"] == "done"
    size, memory = np.array(samples).T
    share = size / size[-1]
    during = (share > 0.2) & (share < 0.98)  # after that it tests and draws the curves
    grown = growth(share[during], memory[during])
    print(f"{during.sum()} samples of {memory[during].mean():.0f} MiB, grown by {grown:.2f}")
    assert during.sum() > 30
    assert grown < 4


def test_a_sweep_of_500_runs(tmp_path):
    """From the 100th run on memory grows by less than 0.05 MiB a run; the summary is right.

    One run after the other, in one process.
    """
    begin, memory, said = time.monotonic(), [], []
    with start(
        "-m", "experiment=smoke", "loss=dice,cce", "theta=0.1,0.3,0.5,0.7,0.9", "seed=range(50)",
        "trainer.max_steps=2", "data.image_size=8", "hydra.sweep.dir=sweep", "hydra/launcher=basic",
        cwd=tmp_path,
    ) as process:  # fmt: skip
        for line in process.stderr:
            if line.startswith("run "):
                memory.append(resident(process.pid))
                if not memory[1:]:
                    print(f"the first begins after {time.monotonic() - begin:.0f} s")
            elif not re.match("val Dice|500 runs", line):
                said.append(line)
    assert process.returncode == 0 and not said
    print(f"finished after {time.monotonic() - begin:.0f} s")
    assert len(memory) == 500
    print("MiB at each 50th run:", *(f"{m:.1f}" for m in memory[::50]))
    grown = growth(range(100, 500), memory[100:])
    print(f"grown by {grown:.2f} MiB over the last 400")
    assert grown < 20

    summary = pd.read_csv(tmp_path / "sweep" / "summary.csv").set_index("run")
    results = {p.parent.name: read_result(p.parent) for p in tmp_path.glob("sweep/*/result.json")}
    assert len(results) == len(summary) == 500 and set(results) == set(summary.index)
    asked = set()
    for name, row in summary.iterrows():
        result = results[name]
        config, metrics = result["config"], result["metrics"]
        asked.add((result["choices"]["loss"], config["theta"], config["seed"]))
        assert (row.loss, row.theta, row.seed) == (
            result["choices"]["loss"], config["theta"], config["seed"],
        )  # fmt: skip
        assert row.status == result["status"] == "done"
        assert row.seconds == pytest.approx(result["seconds"])
        for metric in ("accuracy", "dice", "iou"):
            assert row[metric] == pytest.approx(metrics[f"val/{metric}"], rel=1e-6)
    wanted = {
        (loss, theta, seed)
        for loss in ("dice", "cce") for theta in (0.1, 0.3, 0.5, 0.7, 0.9) for seed in range(50)
    }  # fmt: skip
    assert asked == wanted
