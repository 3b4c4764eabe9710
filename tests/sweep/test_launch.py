"""hydra/launcher=fused: which runs are trained together, and that nothing else changes."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ENVIRONMENT, PATIENCE, ROOT, read_result, run_folders, run_train, slow
from curves import assert_same
from omegaconf import OmegaConf
from processes import session

from losswatch.config.errors import ConfigError
from losswatch.disk.curves import read_curves
from losswatch.disk.locks import hold
from losswatch.report.runs import read_runs
from losswatch.stack import module as stack_module
from losswatch.stack.module import StackedModule
from losswatch.sweep import launch, parts
from losswatch.sweep.groups import group_runs, order_groups
from losswatch.sweep.jobs import Run
from losswatch.sweep.split import Options, make_parts, split

SMALL = ["experiment=smoke", "trainer.max_steps=12", "trainer.val_check_interval=6"]


# --- Groups --------------------------------------------------------------------------------------


@pytest.fixture
def jobs(compose, tmp_path):
    """jobs([overrides], ...) -> what the launcher makes of them; one planner plans all."""

    def make(*runs, planned=True):
        found, planner = [], compose(*SMALL).planner
        for i, overrides in enumerate(runs):
            composed, folder = compose(*SMALL, *overrides), tmp_path / str(i)
            composed.planner = planner
            settings = composed.settings(folder, is_sweep=True)
            plan = composed.plan(folder, is_sweep=True) if planned else None
            found.append(Run(i, composed.cfg, folder, settings, plan))
        return found

    return make


def indices(found):
    return [[job.index for job in group] for group in found]


@pytest.mark.parametrize(
    "values",
    [
        # The first has no overrides, and each of the others differs from it in one setting.
        [
            "", "seed=1", "theta=0.05", "theta=[0.5]", "loss=cce", "optimizer.lr=1e-2",
            "optimizer.weight_decay=0.1", "optimizer.betas=[0.5,0.99]", "optimizer.eps=1e-3",
            "data.low=-1", "data.high=3",
        ],
        ["theta=[0.1,0.2]", "theta=[0.3,0.6]"],
        ["watch=[cce,dice]", "watch=[dice,cce]", "watch=[cce]"],  # dice is trained with
    ],
)  # fmt: skip
def test_what_may_differ_stays_together(jobs, values):
    found, differ = group_runs(jobs(*(value.split() for value in values), planned=False))
    assert differ == []
    assert indices(found) == [list(range(len(values)))]


@pytest.mark.parametrize("values", ["momentum=0 momentum=0.9", "nesterov=true weight_decay=0.1"])
def test_numbers_of_sgd_stay_together(jobs, values):
    common = ["optimizer=sgd", "optimizer.momentum=0.5"]
    runs = jobs(*([*common, f"optimizer.{value}"] for value in values.split()))
    assert indices(group_runs(runs)[0]) == [[0, 1]]


@pytest.mark.parametrize(
    "value, name",
    [
        ("model=unet", "model._target_"),
        ("model.batch_norm=true", "model.batch_norm"),
        slow("model.width=3", "model.width"),
        slow("model.bn_momentum=0.3", "model.bn_momentum"),
        ("optimizer=sgd", "optimizer._target_"),
        slow("optimizer=adamw", "optimizer._target_"),
        ("+optimizer.amsgrad=true", "optimizer.amsgrad"),
        ("theta=[0.3,0.6]", "theta"),
        ("compile=true", "compile"),
        ("probe.every_n_steps=2", "probe.every_n_steps"),
        slow("probe.cosines=true", "probe.cosines"),
        ("trainer.max_steps=5", "trainer.max_steps"),
        slow("trainer.precision=64-true", "trainer.precision"),
        ("data.image_size=8", "data.image_size"),
        slow("data.batch_size=3", "data.batch_size"),
        slow("data.dims=3", "data.dims"),
        slow("data.val_size=4", "data.val_size"),
        ("watch=[cce]", "watched"),
        ("loss=dice_log", "watched"),
    ],
)
def test_what_must_be_equal_splits(jobs, value, name):
    """Groups are in the order of their first runs, and the key in which they differ is named."""
    found, differ = group_runs(jobs([value], [], [value], planned=False))
    assert indices(found) == [[0, 2], [1]]
    assert name in differ
    assert {key.split(".")[0] for key in differ} == {name.split(".")[0]}


def test_a_changed_loss_is_another(jobs):
    """Its name means the loss of its file, which the other runs watch."""
    runs = jobs(
        ["loss=dice"], ["loss=dice_square"],
        ["loss=dice", "+loss.exponent=2"], ["loss=dice", "+loss.exponent=2", "seed=1"],
        ["loss=dice", "+loss.exponent=3"],
    )  # fmt: skip
    found, differ = group_runs(runs)
    assert indices(found) == [[0, 1], [2, 3], [4]]
    assert differ and all(name.startswith("changed loss") for name in differ)


def test_groups_of_one_compiled_step_begin_apart(jobs):
    grid = [[f"model.batch_norm={bn}", f"optimizer={o}"] for bn in (0, 1) for o in ("adam", "sgd")]
    found, _ = group_runs(jobs(*grid, planned=False))
    assert indices(found) == [[0], [1], [2], [3]]
    assert indices(order_groups(found)) == [[2], [0], [3], [1]]


def test_members_stay_in_order():
    assert split([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert split([1, 2], 5) == [[1, 2]]


# --- Which processes, and what is stacked --------------------------------------------------------

AUTO = Options("faster", None, None, None)
LARGE = ["model=unet", "data.image_size=64", "data.batch_size=8"]  # 30 MFLOP a layer


def decided(runs, at_once, options=AUTO):
    """The indices of the runs of each part, whether the part is a stack, and the line."""
    made, text = make_parts(runs, at_once, options)
    return [([run.index for run in part.runs], part.is_stack) for part in made], text


def test_small_networks_become_stacks(jobs):
    made, text = decided(jobs(*([f"seed={i}"] for i in range(5))), 2)
    assert made == [([0, 1, 2], True), ([3, 4], True)]
    assert text == "2 stacks of up to 3 runs, 2 at once (a run by itself is rounded differently)"


def test_large_layers_are_trained_run_by_run(jobs):
    """A stack would not be faster, unless it is asked for or compiled."""
    runs = jobs(*([*LARGE, f"seed={i}"] for i in range(3)))
    made, text = decided(runs, 2)
    assert made == [([0], False), ([1], False), ([2], False)]
    assert text == "3 single runs, 2 at once (layers of this size are not faster in a stack)"
    assert decided(runs, 2, Options("all", None, None, None))[0] == [([0, 1], True), ([2], True)]
    runs = jobs(*([*LARGE, "compile=true", f"seed={i}"] for i in range(3)))
    assert decided(runs, 2)[0] == [([0, 1], True), ([2], False)]


def test_a_stack_repeats_no_batches(jobs):
    runs = jobs(*(["data.batches=1", loss] for loss in ("loss=dice", "loss=cce")))
    made, text = decided(runs, 1)
    assert made == [([0], False), ([1], False)]
    assert text == "2 single runs, 1 at once (data.batches=1 needs the ordinary step)"


def test_as_many_processes_as_runs_need_no_stack(jobs):
    made, text = decided(jobs(["seed=0"], ["seed=1"]), 4)
    assert made == [([0], False), ([1], False)]
    assert text == "2 single runs, 2 at once"


def test_what_a_stack_does_not_support_follows_and_long_runs_first(jobs):
    clip = "trainer.gradient_clip_val=1"
    runs = jobs(["seed=0"], ["seed=1", clip], ["seed=1"], ["trainer.max_steps=24", clip])
    made, text = decided(runs, 1)
    assert made == [([0, 2], True), ([3], False), ([1], False)]
    assert text == (
        "1 stack of up to 2 runs and 2 single runs, 1 at once (a run by itself is rounded "
        "differently; trainer.gradient_clip_val=1 needs the ordinary step)"
    )


@pytest.mark.parametrize(
    "extra, options, cores, gib, count",
    [
        ([], {}, 8, 64, 5),  # no more than there are runs
        ([], {}, 3, 64, 3),
        (["threads=2"], {}, 8, 64, 4),
        (["threads=9"], {}, 8, 64, None),
        ([], {}, 1, 64, None),
        ([], {"workers": 2}, 8, 64, 2),
        ([], {"workers": 1}, 8, 64, None),
        ([], {}, 8, 2, 3),  # 600 MB a process
        (["+data.cache_mb=1024"], {}, 8, 4, 2),
        ([], {"outer": "ray"}, 8, 64, None),
    ],
)
def test_the_number_of_processes(compose, monkeypatch, extra, options, cores, gib, count):
    monkeypatch.setattr(launch.joblib, "cpu_count", lambda: cores)
    monkeypatch.setattr(launch, "_memory_mb", lambda: gib * 1024)
    monkeypatch.setattr(launch, "Workers", lambda *args: args)
    configs = [compose(*SMALL, *extra).cfg] * 5
    made = launch.start_workers(configs, Options(**{**vars(AUTO), **options}))
    one_thread = not any("threads" in override for override in extra)
    assert made == (count and (count, max(1, cores // count), one_thread))


def test_a_gpu_needs_no_processes(compose, monkeypatch):
    """Unless they are asked for. They start anew, because PyTorch cannot use a GPU after a fork."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(launch, "Workers", lambda *args: args)
    configs = [compose(*SMALL).cfg] * 3
    assert launch.start_workers(configs, AUTO) is None
    assert launch.start_workers(configs, Options("faster", None, 2, None))[::2] == (2, False)
    on_cpu = [compose(*SMALL, "trainer.accelerator=cpu").cfg] * 3
    assert launch.start_workers(on_cpu, Options("faster", None, 2, None))[::2] == (2, True)


@pytest.mark.parametrize(
    "setting, said",
    [
        ("workers=0", "hydra.launcher.workers must be at least 1, or null, got 0"),
        slow("max_members=-1", "hydra.launcher.max_members must be at least 1, or null, got -1"),
        slow("stack=never", "hydra.launcher.stack must be faster or all, got never"),
    ],
)
def test_a_wrong_setting_of_the_launcher(tmp_path, setting, said):
    done = run_train("-m", *SMALL, "seed=0,1", f"hydra.launcher.{setting}", cwd=tmp_path, status=2)
    assert done.stderr.splitlines()[-1] == f"losswatch: {said}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"workers": 0}, "workers must be at least 1, or null, got 0"),
        ({"max_members": -1}, "max_members must be at least 1, or null, got -1"),
        ({"stack": "never"}, "stack must be faster or all, got never"),
    ],
)
def test_options_of_the_launcher_are_checked(wrong, said):
    with pytest.raises(ConfigError, match=f"^hydra.launcher.{said}$"):
        replace(AUTO, **wrong)


AFFINITY = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system has no affinity"
)


@AFFINITY
def test_cores_that_the_process_may_not_use_do_not_count(compose, monkeypatch):
    monkeypatch.setattr(launch, "_memory_mb", lambda: 2**16)
    monkeypatch.setattr(launch, "Workers", lambda *args: args)
    configs, cores = [compose(*SMALL).cfg] * 2, os.sched_getaffinity(0)
    found = []
    for allowed in (cores, {min(cores)}):
        os.sched_setaffinity(0, allowed)
        try:
            found.append(launch.start_workers(configs, AUTO))
        finally:
            os.sched_setaffinity(0, cores)
    assert found[1] is None and (len(cores) == 1 or found[0][0] == 2)


@AFFINITY
@pytest.mark.slow
def test_cores_that_the_command_may_not_use_do_not_count(tmp_path):
    core = str(min(os.sched_getaffinity(0)))
    command = ["taskset", "-c", core, sys.executable, str(ROOT / "train.py"), "-m", *SMALL]
    done = subprocess.run(
        [*command, "seed=0,1"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert training_line(done.stderr).startswith("training 1 stack of up to 2 runs, 1 at once (")


# --- Memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, fits", [(3, 1), slow(5, 4), slow(5, 2), slow(5, 1)])
def test_halves_where_memory_runs_out(jobs, monkeypatch, caplog, count, fits):
    """Like a group too large for a GPU. Each run is trained once, and leaves one event file."""
    trained = []
    train = StackedModule.training_step

    def small(module, *args):
        if len(module.members) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        trained.append(len(module.members))
        train(module, *args)

    monkeypatch.setattr(StackedModule, "training_step", small)
    runs, outcomes = jobs(*([f"seed={i}"] for i in range(count))), {}
    parts._train(runs, outcomes)
    assert sum(trained) == count * 2 and max(trained) <= fits  # two blocks each
    assert list(outcomes) == [run.folder for run in runs]
    said = [r.getMessage() for r in caplog.records if "do not fit into memory" in r.getMessage()]
    assert said[0] == f"{count} runs do not fit into memory; trying half as many at once"
    for run in runs:
        assert outcomes[run.folder].result()["test/accuracy"] > 0
        assert list(read_curves(run.folder)["loss/dice"].dropna().index) == list(range(12))
        assert len(list(run.folder.glob("events.out.tfevents.*"))) == 1


def test_a_stack_that_fails_late_keeps_its_curves(jobs, monkeypatch):
    """Its halves start at the checkpoint, and have what was logged before it."""
    train, blocks = StackedModule.training_step, []

    def fails_once(module, *args):
        blocks.append(len(module.members))
        if len(blocks) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        train(module, *args)

    monkeypatch.setattr(StackedModule, "training_step", fails_once)
    monkeypatch.setattr(stack_module, "SAVE_SECONDS", 0)  # a checkpoint at the first validation
    runs = jobs(["seed=0"], ["seed=1"])
    parts._train(runs, {})
    assert blocks == [2, 2, 1, 1]
    for run in runs:
        assert list(read_curves(run.folder)["loss/dice"].dropna().index) == list(range(12))


def test_one_run_too_large_fails(jobs, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StackedModule, "training_step", full)
    with pytest.raises(torch.OutOfMemoryError):
        parts._train(jobs(["seed=0"]), {})


def test_what_is_cut_off_is_known_by_its_settings(jobs, monkeypatch, tmp_path):
    def cut(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(StackedModule, "training_step", cut)
    with pytest.raises((KeyboardInterrupt, SystemExit)):  # Lightning turns one into the other
        stack = parts.Part(jobs(["loss=dice", "theta=0.05"], ["loss=cce", "theta=0.3"]))
        parts.train_part(stack, context=None)
    runs = read_runs(tmp_path)
    assert list(runs["status"]) == ["unfinished"] * 2
    assert list(runs["error"]) == ["interrupted"] * 2
    assert list(runs["loss"]) == ["dice", "cce"] and list(runs["theta"]) == [0.05, 0.3]


# --- The command ---------------------------------------------------------------------------------


def sweep(cwd, *args, status=0, start=SMALL):
    done = run_train("-m", *start, *args, cwd=cwd, status=status)
    [folder] = (cwd / "outputs").iterdir()
    return SimpleNamespace(folder=folder, done=done, runs=run_folders(cwd), said=done.stderr)


def tree(folder):
    """All files of a sweep; names of event files without the time and the host."""
    names = (str(p.relative_to(folder)) for p in folder.rglob("*"))
    return sorted(re.sub(r"(events\.out\.tfevents)\..*", r"\1", name) for name in names)


def training_line(said):
    [line] = [line for line in said.splitlines() if line.startswith("training ")]
    return line


GRID = ["loss=dice,cce", "theta=0.05,0.5,0.95"]


@pytest.fixture(scope="module")
def two(six, tmp_path_factory):
    """The same sweep by both launchers."""
    options = ["hydra/launcher=fused", "hydra.launcher.workers=2"]
    return six, sweep(tmp_path_factory.mktemp("fused"), *GRID, *options, start=SMALL[:1])


def test_same_files(two):
    basic, fused = two
    assert len(basic.runs) == 6
    assert tree(fused.folder) == tree(basic.folder)


def test_same_results(two):
    basic, fused = two
    for name, folder in basic.runs.items():
        a, b = read_result(folder), read_result(fused.runs[name])
        assert b["status"] == "done" and b.pop("seconds") > 0 and a.pop("seconds") > 0
        for name_of_numbers in ("metrics", "watched"):
            numbers, others = a.pop(name_of_numbers), b.pop(name_of_numbers)
            assert others == pytest.approx(numbers, rel=1e-3, abs=1e-3)
        assert a == b
        curve, other = read_curves(folder), read_curves(fused.runs[name])
        assert set(curve.columns) == set(other.columns)
        watched = [c for c in curve.columns if c.startswith(("loss/", "grad_norm/"))]
        np.testing.assert_allclose(
            curve[watched].to_numpy(), other[watched].to_numpy(), rtol=1e-4, atol=1e-5
        )
        for file in ("config.yaml", "overrides.yaml"):
            texts = [(f / ".hydra" / file).read_text() for f in (folder, fused.runs[name])]
            assert texts[0] == texts[1]


def test_same_summary(two):
    basic, fused = (pd.read_csv(s.folder / "summary.csv").drop(columns="seconds") for s in two)
    pd.testing.assert_frame_equal(basic, fused, rtol=1e-3, atol=1e-3)


def test_what_is_said(two):
    _, fused = two
    assert training_line(fused.said) == (
        "training 2 stacks of up to 3 runs, 2 at once (a run by itself is rounded differently)"
    )
    assert "Warning" not in fused.said + fused.done.stdout
    assert "one by one" not in fused.said
    assert not re.search(r"run \d+ of", fused.said)
    ended = re.findall(r"^val .* in .* s: (.*)$", fused.said, re.MULTILINE)
    assert sorted(ended) == sorted(fused.runs)
    assert sum("done" in line.split() for line in fused.done.stdout.splitlines()) == 6


def test_single_runs_side_by_side_are_those_of_the_basic_launcher(six, tmp_path):
    """To the last bit, and with the same files. One run begins where another has ended."""
    done = run_train(
        "-m", "experiment=smoke", "loss=dice", "theta=0.05,0.5,0.95",
        "hydra.launcher.workers=2", "hydra.launcher.max_members=1", cwd=tmp_path,
    )  # fmt: skip
    assert training_line(done.stderr) == "training 3 single runs, 2 at once"
    assert not re.search(r"run \d+ of", done.stderr)
    runs = run_folders(tmp_path)
    assert set(runs) == {f"theta={theta}" for theta in (0.05, 0.5, 0.95)}
    files = [
        {file.name for file in folder.iterdir() if file.is_file()}
        for folder in (next(iter(runs.values())).parent, six.folder)
    ]
    assert files[0] == files[1]
    for name, folder in runs.items():
        assert tree(folder) == tree(six.runs[f"loss=dice,{name}"])
        assert_same(folder, six.runs[f"loss=dice,{name}"])


def complete(swept, count):
    """All runs are done, and each has its files, once."""
    assert len(swept.runs) == count
    for folder in swept.runs.values():
        assert read_result(folder)["status"] == "done"
        assert len(list(folder.glob("events.out.tfevents.*"))) == 1
        frame = read_curves(folder)
        assert list(frame["loss/cce"].dropna().index) == list(range(12))
        assert (folder / "curves.png").exists() and list(folder.glob("checkpoints/*.ckpt"))


def test_what_cannot_be_stacked_is_trained_one_by_one(tmp_path):
    """An optimiser that stacks do not know, and gradient clipping, beside runs without them."""
    extra = tmp_path / "conf" / "optimizer"
    extra.mkdir(parents=True)
    OmegaConf.save({"_target_": "torch.optim.Adagrad", "lr": 0.01}, extra / "adagrad.yaml")
    swept = sweep(
        tmp_path, "hydra/launcher=fused", "hydra.launcher.workers=1", "optimizer=adam,adagrad",
        "trainer.gradient_clip_val=null,1", "--config-dir", str(tmp_path / "conf"),
    )  # fmt: skip
    complete(swept, 4)
    line = training_line(swept.said)
    assert line.startswith("training 2 stacks of up to 1 run and 2 single runs, 1 at once (they ")
    assert "differ in optimizer._target_" in line
    assert line.endswith("; trainer.gradient_clip_val=1 needs the ordinary step)")
    said = [line for line in swept.said.splitlines() if "one by one" in line]
    assert said == ["1 run trained one by one: Adagrad is not written out for stacked runs"]


def test_a_failing_member(tmp_path):
    """It is marked as failed and the others are done; groups are no larger than asked."""
    swept = sweep(
        tmp_path, "hydra/launcher=fused", "hydra.launcher.workers=1",
        "hydra.launcher.max_members=2", "optimizer.lr=1e-3,1e30,1e-2", status=1,
    )  # fmt: skip
    assert training_line(swept.said).startswith("training 2 stacks of up to 2 runs, 1 at once (")
    results = {read_result(f)["config"]["optimizer"]["lr"]: f for f in swept.runs.values()}
    failed = read_result(results.pop(1e30))
    assert failed["status"] == "failed"
    assert re.match(
        r"FloatingPointError: trained with dice, step \d+: (loss|grad_norm)/dice is \S+$",
        failed["error"],
    )
    assert [read_result(f)["status"] for f in results.values()] == ["done", "done"]
    summary = pd.read_csv(swept.folder / "summary.csv")
    assert sorted(summary.status) == ["done", "done", "failed"]
    assert "Traceback" not in swept.said


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["-m", "hydra/launcher=fused", "seed=0,1,2"]])
def test_compiled(tmp_path, launcher):
    """compile=true gives the numbers of compile=false, without a warning."""
    runs = []
    for compiled in ("true", "false"):
        cwd = tmp_path / compiled
        cwd.mkdir()
        plain = [a for a in launcher if compiled == "true" or "launcher" not in a]
        done = run_train(*plain, "experiment=smoke", f"compile={compiled}", cwd=cwd)
        said = done.stderr.replace("DeprecationWarning: `torch.jit.script_method`", "")  # PyTorch's
        assert "Warning" not in said and "not compiled" not in said
        runs.append([
            folder for _, folder in
            sorted((read_result(f)["config"]["seed"], f) for f in run_folders(cwd).values())
        ])  # fmt: skip
    assert len(runs[0]) == len(runs[1]) == (3 if launcher else 1)
    for a, b in zip(*runs, strict=True):
        fast, plain = read_curves(a), read_curves(b)
        assert set(fast.columns) == set(plain.columns)
        watched = [c for c in plain.columns if c.startswith(("loss/", "grad_norm/"))]
        np.testing.assert_allclose(fast[watched], plain[watched], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            fast.loc[:9, watched], plain.loc[:9, watched], rtol=1e-5, atol=1e-5
        )
        metrics = [read_result(f)["metrics"] for f in (a, b)]
        assert metrics[0] == pytest.approx(metrics[1], rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_compiled_with_another_optimizer_falls_back(tmp_path):
    done = run_train(*SMALL, "compile=true", "optimizer._target_=torch.optim.RAdam", cwd=tmp_path)
    said = [line for line in done.stderr.splitlines() if "not compiled" in line]
    assert len(said) == 1 and said[0].endswith("RAdam is not written out for stacked runs")
    [folder] = run_folders(tmp_path).values()
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1


# --- Stopped -------------------------------------------------------------------------------------

LONG = [
    "experiment=smoke", "trainer.max_steps=1000000", "trainer.val_check_interval=100",
    "hydra.sweep.dir=s",
]  # fmt: skip
SWEEP = ["-m", *LONG, "seed=0,1", "loss=dice,cce"]
FUSED = [*SWEEP, "hydra/launcher=fused"]
JOBLIB = pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None,
    reason="hydra_joblib_launcher is not installed",
)


def stopped(cwd, command, by, whom, when, env=None):
    """Start a command, and signal it or all its processes when `when()`; return its output.

    None of its processes may be left 10 seconds later.
    """
    with subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *command], cwd=cwd, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=ENVIRONMENT | {"PYTHONWARNINGS": ""} | (env or {}),
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + PATIENCE
            while not when():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            {"all": os.killpg, "first": os.kill}[whom](process.pid, by)
            process.wait(PATIENCE)
            deadline = time.monotonic() + 10
            while left := session(process.pid):
                assert time.monotonic() < deadline, left
                time.sleep(0.05)
        finally:
            if session(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
        out, said = process.communicate()
        print(process.returncode, out, said, sep="\n")
        return process.returncode, out, said


ENDS = {"SIGINT": (130, "losswatch: interrupted"), "SIGTERM": (143, "losswatch: terminated")}


def interrupted(status, out, said, rows, by="SIGINT"):
    """The command printed the table of what is finished, how to go on, and one line."""
    wanted, line = ENDS[by]
    assert status == wanted
    known = r"checking|run[ :]|training |val Dice|compiling|\d+ runs|Resume   python"
    others = [line for line in said.splitlines() if not re.match(known, line)]
    assert others == [line]
    assert out.count("unfinished") == rows
    assert not rows or re.search(r"^Resume   python .* hydra\.sweep\.dir=s$", out, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the processes")
@pytest.mark.parametrize(
    "by, whom",
    [("SIGKILL", "first"), *((by, whom) for by in ENDS for whom in ("first", "all"))],
)
@pytest.mark.parametrize(
    "command",
    [
        [*FUSED, "hydra.launcher.workers=2"],
        [*FUSED, "hydra.launcher.workers=1"],
        [*SWEEP, "trainer.gradient_clip_val=1e6", "hydra.launcher.workers=2"],  # single runs
        pytest.param([*SWEEP, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], marks=JOBLIB),
        pytest.param(
            [*FUSED, "hydra.launcher.outer=joblib", "hydra.launcher.max_members=2"], marks=JOBLIB
        ),
    ],
)
def test_a_stopped_sweep_leaves_no_process(tmp_path, command, by, whom):
    """Whether killed, interrupted or terminated; its runs are not locked any more."""

    def under_way():
        return len(list(tmp_path.glob("s/*/checkpoints/*.ckpt"))) >= 2

    status, out, said = stopped(tmp_path, command, getattr(signal, by), whom, under_way)
    if by in ENDS:
        interrupted(status, out, said, len(list(tmp_path.glob("s/*/events*"))), by)
    for run in tmp_path.glob("s/*/.lock"):
        hold(run.parent).close()
    assert "leaked" not in said and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the processes")
@pytest.mark.parametrize("command", [[*FUSED, "hydra.launcher.workers=1"], FUSED, LONG])
def test_interrupted_while_it_compiles(tmp_path, command):
    """The compiler's cache is empty, so compiling takes a while."""

    def compiling():
        return list(tmp_path.glob("cache/**/*.cpp"))

    status, out, said = stopped(
        tmp_path, [*command, "compile=true", "model.batch_norm=true"], signal.SIGINT, "all",
        compiling, env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    interrupted(status, out, said, 0 if command == LONG else 4)
    assert not list(tmp_path.glob("**/*.ckpt"))
