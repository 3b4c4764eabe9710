"""An error at each stage of a fused sweep, with two groups at work at once: only its runs fail."""

import os
import re
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import ENVIRONMENT, read_result, run_train

from losswatch.config.names import run_name
from losswatch.disk.curves import read_curves

# A loss that fails at its stage and a network that fails for seed 2, in the processes that train
# the groups and only where FAULTS names the stage. The stage is known by the number of images, and
# training by the number of calls before: to try the step takes fewer than 30.
FAULTY = """
import multiprocessing
import os
import signal

import torch
from torch import nn

from losswatch.nets import ConvNet


def fail(stage, error=RuntimeError):
    if stage in os.environ["FAULTS"].split() and multiprocessing.parent_process():
        if stage == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise error(f"broken at {stage}")


class Loss(nn.Module):
    def __init__(self, stage):
        super().__init__()
        self.stage, self.calls = stage, 0
        if stage == "make":
            fail(stage)

    def forward(self, logits, target):
        self.calls += 1
        if self.stage == "compile" and torch.compiler.is_compiling():
            fail("compile", MemoryError)
        images = {"try": 2, "train": 2, "kill": 2, "validate": 3, "test": 5}.get(self.stage)
        if images == len(target) and (self.stage not in ("train", "kill") or self.calls > 30):
            fail(self.stage)
        return (logits.softmax(1)[:, 1] - target).square().mean()


class Net(ConvNet):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if torch.initial_seed() == 2:
            fail("member")
"""
SMALL = [
    "experiment=smoke", "data.image_size=8", "data.batch_size=2", "data.val_size=3",
    "data.test_size=5", "data.eval_batch_size=5", "trainer.max_steps=60",
    "trainer.val_check_interval=30", "model._target_=faulty.Net", "model.width=2",
]  # fmt: skip
# What the group of that name finds in the place of a file or folder that it writes.
IN_THE_WAY = {
    "config": ".hydra",
    "save": "checkpoints",
    "result": "result.json/",
}
# What result.json says. None: there can be no such file.
ERRORS = {
    "make": "ConfigError: loss make: broken at make",
    "try": "RuntimeError: broken at try",
    "compile": "MemoryError: broken at compile",
    "train": "RuntimeError: broken at train",
    "kill": "RuntimeError: the process that trained it was killed, .*",
    "validate": "RuntimeError: broken at validate",
    "save": "FileExistsError: .*checkpoints'",
    "test": "RuntimeError: broken at test",
    "config": None,
    "result": None,
    "member": "ConfigError: model: broken at member",
}


@pytest.fixture
def sweep(tmp_path):
    """sweep(names, faults, status, *overrides) -> the finished command; a group for each name."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    (tmp_path / "loss").mkdir()
    for stage in ERRORS:
        text = f"_target_: faulty.Loss\nstage: {stage}\n"
        (tmp_path / "loss" / f"{stage}.yaml").write_text(text)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])

    def run(names, faults, status, *overrides):
        return run_train(
            "-m", "--config-dir", str(tmp_path), *SMALL, *overrides, "seed=1,2",
            "watch=" + ",".join(f"[cce,{name}]" for name in names), "hydra.sweep.dir=s",
            "hydra/launcher=fused", "hydra.launcher.workers=2", cwd=tmp_path, status=status,
            env=ENVIRONMENT | {"PYTHONPATH": path, "FAULTS": " ".join(faults)},
        )  # fmt: skip

    def folder(name, seed):
        return tmp_path / "s" / run_name([f"watch=[cce,{name}]", f"seed={seed}"])

    return SimpleNamespace(run=run, folder=folder)


def case(*stages):
    return pytest.param(stages, marks=[pytest.mark.slow], id="-".join(stages))


@pytest.mark.parametrize("stages", [case("try", "save"), *(case(stage) for stage in ERRORS)])
def test_an_error_at_a_stage_is_that_of_its_runs(sweep, stages):
    """The others are done, in the table, and left alone when the same command is given again."""
    compiled = ["compile=True"] if "compile" in stages else []
    groups = ["dice", *stages]
    runs = {(name, seed): sweep.folder(name, seed) for name in groups for seed in (1, 2)}
    failing = {
        (name, seed): ERRORS["member" if "member" in stages else name]
        for name, seed in runs
        if (seed == 2 if "member" in stages else name != "dice")
    }
    for (name, _), folder in runs.items():
        if name in IN_THE_WAY:
            folder.mkdir(parents=True)
            place = folder / IN_THE_WAY[name]
            place.mkdir() if IN_THE_WAY[name].endswith("/") else place.touch()

    done = sweep.run(groups, stages, 1, *compiled)
    print(done.stdout, done.stderr)
    # Both seeds are in one stack: "member" shows that an error of one does not touch the other.
    said = rf"^training {len(groups)} stacks of up to 2 runs, 2 at once"
    assert re.search(said, done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    # What fails while torch.func maps the first step is tried again by the ordinary step.
    assert ("one by one" in done.stderr) == ("try" in stages)
    summary = pd.read_csv(runs["dice", 1].parent / "summary.csv").set_index("run")
    listed = 0
    for run, folder in runs.items():
        error = failing.get(run)
        if run in failing and error is None:
            assert f"{folder}: " in done.stderr and not (folder / "result.json").is_file()
            status = "unfinished"
        else:
            result = read_result(folder)
            status = "failed" if error else "done"
            assert result["status"] == status
            assert re.match(f"{error}$", str(result["error"]))
        if folder.name in summary.index:
            assert summary.status[folder.name] == status
            listed += 1
        else:
            assert run[0] == "config"
    for name, status in summary.status[summary.status != "done"].items():
        assert re.search(rf"(?m)^{re.escape(name)} +{status} ", done.stdout)
    # A group whose settings are on disk has a row, which counts its runs that are done: "1 of 2".
    rows = re.findall(r"(?m)^dice\b.*?  (\d+)(?: of (\d+))?  ", done.stdout)
    assert sum(int(count) for count, _ in rows) == (summary.status == "done").sum()
    assert [int(of or count) for count, of in rows] == [2 for name in groups if name != "config"]
    assert "Summary  s/summary.csv" in done.stdout

    for (name, _), folder in runs.items():
        if name in IN_THE_WAY:
            place = folder / IN_THE_WAY[name]
            shutil.rmtree(place) if place.is_dir() else place.unlink()
    before = {run: (runs[run] / "result.json").stat() for run in runs if run not in failing}
    done = sweep.run(groups, [], 0, *compiled)
    assert re.search(rf"; {len(before)} runs? done before$", done.stderr, re.MULTILINE)
    for run, folder in runs.items():
        assert read_result(folder)["status"] == "done"
        assert list(read_curves(folder)["loss/cce"].dropna().index) == list(range(60))
        if run in before:
            assert (folder / "result.json").stat() == before[run]
