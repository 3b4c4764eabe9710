"""Sweeps killed with kill -9, again and again, by each launcher, and taken up in their folder.

    LOSSWATCH_KILLS=20 pytest -m slow -n 0 -s tests/sweep/test_kills.py

The same command is given again after each kill. Whenever a sweep reaches its end, it must equal one
that nothing interrupted, and the next sweep begins. Each test prints its kills and the lost work.
"""

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ENVIRONMENT, PATIENCE, ROOT, read_result
from curves import assert_same
from forks import Fork, ForkServer
from processes import session
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from losswatch.disk.checkpoint_files import newest
from losswatch.disk.curves import read_curves
from losswatch.disk.result import finished
from losswatch.report.runs import read_runs

KILLS = int(os.environ.get("LOSSWATCH_KILLS", 20))
STEPS, EVERY = 240, 40  # of each run, and between its validations and so its checkpoints

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the processes"),
]

# Python imports `sitecustomize` at its start, in joblib's processes too. Nothing of losswatch knows
# of it: it looks at what Python's audit events tell of files.
PLUGIN = '''
import importlib.abc, os, re, signal, sys

seen = 0

def watch(event, args):
    """Kill this process and its group before its n-th operation on a file that KILL_AT describes.

    KILL_AT is the folder, n and a regular expression, separated by lines.
    """
    global seen
    if event == "open":
        if not isinstance(args[0], (str, bytes)) or not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
    elif event not in ("os.rename", "os.remove", "os.truncate", "os.mkdir"):
        return
    folder, count, pattern = os.environ.get("KILL_AT", "\\n\\n").split("\\n")
    path = os.path.abspath(os.fsdecode(args[event == "os.rename"]))
    if folder and path.startswith(folder) and re.search(pattern, f"{event} {path}"):
        seen += 1
        if seen == int(count):
            os.killpg(0, signal.SIGKILL)

sys.addaudithook(watch)

class Impatient(importlib.abc.MetaPathFinder):
    """A stack saves a checkpoint at each validation, as its SAVE_SECONDS are none."""

    def find_spec(self, name, path, target=None):
        if not name.startswith("losswatch.stack."):
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)):
                execute = spec.loader.exec_module
                def exec_module(module):
                    execute(module)
                    if hasattr(module, "SAVE_SECONDS"):
                        module.SAVE_SECONDS = 0
                spec.loader.exec_module = exec_module
                return spec

sys.meta_path.insert(0, Impatient())
'''


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Starts train.py with PLUGIN."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "sitecustomize.py").write_text(PLUGIN)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return ForkServer(ENVIRONMENT | {"PYTHONPATH": path})


RUNS = 4
SWEEP = [
    "-m", "experiment=smoke", "loss=dice,cce", "seed=0,1", f"trainer.max_steps={STEPS}",
    f"trainer.val_check_interval={EVERY}", "trainer.enable_progress_bar=false", "hydra.sweep.dir=s",
]  # fmt: skip
BASIC = [*SWEEP, "hydra/launcher=basic"]
# Runs that cannot be a stack: each process trains one after the other.
AUTO = [*SWEEP, "trainer.gradient_clip_val=1e6", "hydra.launcher.workers=2"]
JOBLIB = [*SWEEP, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
FUSED = [*SWEEP, "hydra/launcher=fused", "hydra.launcher.workers=2"]
ONE_STACK = [*SWEEP, "hydra/launcher=fused", "hydra.launcher.workers=1"]


def complete(fork: Fork, cwd: Path) -> Path:
    """The folder of a sweep whose process has ended: with a complete table, if not killed."""
    done = fork.result()
    assert fork.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    sweep = cwd / "s"
    assert re.findall(r"^(\w+) +2  0\.", done.stdout, re.M) == ["cce", "dice"]
    summary = pd.read_csv(sweep / "summary.csv")
    assert list(summary.status) == ["done"] * RUNS
    assert len(read_runs(sweep)) == RUNS
    return sweep


def runs_of(sweep: Path) -> list[Path]:
    return sorted(path for path in sweep.glob("*") if path.is_dir())


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """whole(command) -> the folder of such a sweep that nothing interrupted, and its seconds.

    The second of two: the first one may fill caches.
    """
    made = {}

    def make(command):
        if (key := tuple(command)) not in made:
            for _ in range(2):
                cwd = tmp_path_factory.mktemp("whole")
                begin = time.monotonic()
                fork = server.start(str(ROOT / "train.py"), *command, cwd=cwd)
                fork.wait(PATIENCE)
                seconds = time.monotonic() - begin
            made[key] = complete(fork, cwd), seconds
        return made[key]

    return make


@dataclass
class Kill:
    """One way to end a sweep.

    Args:
        share: of the time that a whole sweep takes, to wait before the kill.
        at, count: instead of that, the operation before which the process ends: a regular
            expression of an audit event and a path, and which of those that match.
        name: for the table.
        group: all processes; else the first, whose others must end by themselves.
    """

    share: float = 0.0
    at: str | None = None
    count: int = 1
    name: str = "at random"
    group: bool = True

    def __str__(self) -> str:
        return self.name + ("" if self.group else ", the first process alone")


@dataclass
class Report:
    """What became of the kills."""

    kills: Counter = field(default_factory=Counter)
    lost: dict[str, list[int]] = field(default_factory=dict)  # steps, of all runs together
    resumed: int = 0  # sweeps of which something was there
    ends: int = 0

    def add(self, kill: Kill, lost: int) -> None:
        self.kills[str(kill)] += 1
        self.lost.setdefault(str(kill), []).append(lost)

    def print(self, name: str, seconds: float) -> None:
        print(f"\n{name}: {self.kills.total()} kills, {self.resumed} of sweeps taken up again")
        print(f"{self.ends} ends, all as uninterrupted; a whole sweep took {seconds:.1f} s")
        print("Lost: steps on record past the last checkpoint, of all runs together")
        print(f"{'killed':44} times  lost: mean  max")
        for kill, times in self.kills.items():
            lost = self.lost[kill]
            print(f"{kill:44} {times:5}  {np.mean(lost):10.1f} {max(lost):4}")


def progress(run: Path) -> tuple[int, int]:
    """Steps that a run has kept, and the steps on record."""
    curves = read_curves(run)
    trained = curves["loss/dice"].dropna().index if "loss/dice" in curves else []
    recorded = int(max(trained, default=-1)) + 1
    if finished(run):
        return STEPS, recorded
    found = newest(run)
    return found[1]["global_step"] if found else 0, recorded


def kill_again_and_again(server, cwds, whole, command, kills):
    """Give `command` until it was killed in each of these ways, and has reached its end."""
    reference, seconds = whole
    assert_same_sweep = assert_near if "hydra/launcher=fused" in command else assert_equal
    report, kills = Report(), list(kills)
    while kills:
        report.ends += 1
        cwd = cwds / str(report.ends)
        cwd.mkdir(parents=True)
        kept: dict[str, int] = {}  # steps of each run
        attempts = 0
        while True:
            kill = kills[0] if kills else None
            fork = attempt(server, command, cwd, kill, seconds)
            if fork.returncode != -signal.SIGKILL:
                break
            attempts += 1
            fork.result()
            kills.pop(0)
            now = {run.name: progress(run) for run in runs_of(cwd / "s")}
            assert all(now[run][0] >= steps for run, steps in kept.items())
            report.resumed += any(kept.values())
            kept = {run: steps for run, (steps, _) in now.items()}
            report.add(kill, sum(max(0, recorded - steps) for steps, recorded in now.values()))
        # Some way does not come about in what is left of a sweep, but does in a new one.
        assert attempts or not (kill and kill.at), f"no sweep comes to {kill}"
        assert_same_sweep(complete(fork, cwd), reference)
    report.print(" ".join(command[len(SWEEP) :]), seconds)


def attempt(server, command, cwd, kill, seconds) -> Fork:
    """Run the command to its end, or to where it is killed; none of its processes is left."""
    at = kill.at if kill else None
    environment = {"KILL_AT": f"{cwd}/s\n{kill.count}\n{at}"} if at else {}
    fork = server.start(str(ROOT / "train.py"), *command, cwd=cwd, env=environment)
    try:
        fork.wait(timeout=kill.share * seconds if kill and not at else PATIENCE)
    except subprocess.TimeoutExpired:
        fork.kill(kill.group if kill else True)
    deadline = time.monotonic() + 20
    while left := session(fork.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    return fork


def assert_equal(sweep, reference):
    """Bit for bit."""
    for run, other in zip(runs_of(sweep), runs_of(reference), strict=True):
        assert_same(run, other)


def assert_near(sweep, reference):
    """Each step once. A stack of other members rounds otherwise, so curves are only near."""
    for run, other in zip(runs_of(sweep), runs_of(reference), strict=True):
        assert read_result(run)["status"] == "done"
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
        assert [e.step for e in events.Scalars("loss/dice")] == list(range(STEPS))
        validated = [e.step for e in events.Scalars("val/accuracy") if e.step]
        assert validated == list(range(EVERY, STEPS + 1, EVERY))
        curves, wanted = read_curves(run), read_curves(other)
        assert set(curves.columns) == set(wanted.columns)
        pd.testing.assert_frame_equal(curves[wanted.columns], wanted, rtol=1e-3, atol=1e-3)
        (name, state), (other_name, other_state) = newest(run), newest(other)
        assert name.name == other_name.name == f"step={STEPS}.ckpt"
        for key, weight in other_state["state_dict"].items():
            torch.testing.assert_close(state["state_dict"][key], weight, rtol=1e-2, atol=1e-3)


# Operations on files, by what has not come about when the process is killed before one of them.
BEFORE_THE_RESULT = {
    "the result": r"open .*/\.result\.json",
    "the result's name": r"os\.rename .*/result\.json$",
}
WINDOWS = BEFORE_THE_RESULT | {
    "the last checkpoint": rf"os\.rename .*/step={STEPS}\.ckpt$",
    "what stands beside the last checkpoint": rf"os\.rename .*/step={STEPS}\.json$",
    "the picture": r"os\.rename .*/curves\.png$",
    "the removal of the one before": rf"os\.remove .*/step={STEPS - EVERY}\.ckpt$",
    "the table": r"(open|os\.rename) .*summary\.csv",
}
OPERATIONS = 100  # on files, at least, in a sweep by one process


def at_random(dice: random.Random, group: float = 1.0) -> Kill:
    return Kill(share=dice.uniform(0, 0.95), group=dice.random() < group)


def before(window: str, count: int = 1) -> Kill:
    return Kill(at=WINDOWS[window], count=count, name=f"before {window}")


@pytest.mark.parametrize("command", [AUTO, FUSED, JOBLIB], ids=["auto", "fused", "joblib"])
def test_sweeps_of_several_processes(server, whole, tmp_path, command):
    """All of them, or the first alone; and just before a run has its result."""
    if command is JOBLIB:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    dice = random.Random(1)
    kills = [at_random(dice, group=0.5) for _ in range(KILLS)]
    kills += [before(window) for window in BEFORE_THE_RESULT]
    dice.shuffle(kills)
    kill_again_and_again(server, tmp_path, whole(command), command, kills)


@pytest.mark.parametrize("command", [BASIC, ONE_STACK], ids=["basic", "one stack"])
def test_sweeps_taken_up_in_their_folder(server, whole, tmp_path, command):
    """Mostly in narrow windows: before or after the last checkpoint, the result, the table."""
    dice, windows = random.Random(2), itertools.cycle(WINDOWS)
    kills = []
    for i in range(KILLS):
        if i % 5 < 3:
            window = next(windows)
            kills.append(before(window, count=1 if window == "the table" else dice.choice([1, 3])))
        elif i % 5 == 3:
            count = dice.randint(1, OPERATIONS)
            kills.append(Kill(at=".", count=count, name="before some operation on a file"))
        else:
            kills.append(at_random(dice))
    kill_again_and_again(server, tmp_path, whole(command), command, kills)
