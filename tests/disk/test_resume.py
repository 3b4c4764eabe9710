"""Nothing is lost when processes are killed, checkpoints are damaged, and sweeps are resumed."""

import errno
import fcntl
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from types import SimpleNamespace

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from conftest import (
    ENVIRONMENT,
    PATIENCE,
    ROOT,
    read_result,
    run_script,
    run_train,
    signal_at,
    slow,
)
from curves import assert_same, assert_same_training, events_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from losswatch.config.errors import ConfigError
from losswatch.config.kept import Kept
from losswatch.config.names import run_folder
from losswatch.config.quoting import quoted
from losswatch.data.form import Form
from losswatch.disk import checkpoint_files as checkpoints
from losswatch.disk.checkpoint import load_net, to_keep
from losswatch.disk.checkpoint_files import (
    checkpoint_path,
    find_checkpoint,
    finish,
    load_checkpoint,
    newest,
    read_about,
    save_checkpoint,
)
from losswatch.disk.curves import read_curves
from losswatch.disk.growing_files import event_files
from losswatch.disk.locks import hold
from losswatch.disk.result import Result, finished
from losswatch.disk.resume import check_folder, check_run, find_start
from losswatch.report.runs import read_runs
from losswatch.run import train as ordinary
from losswatch.run.build import make_net
from losswatch.run.callbacks import Images
from losswatch.run.module import SegmentationModule
from losswatch.run.plan import Plan
from losswatch.stack import module as stack_module
from losswatch.stack.fit import fit
from losswatch.stack.member import make_member
from losswatch.stack.refusal import NotStackable
from losswatch.sweep import parts
from losswatch.task import train

FORK = multiprocessing.get_context("fork")
RUN = ["experiment=smoke", "seed=3", "probe.cosines=true"]  # of the fixture `smoke`


@pytest.fixture
def whole(smoke):
    """The folder of a run that was not interrupted; tests may only read it."""
    return smoke.folder


def checkpoint_names(folder):
    """Each has a file beside it, unless it is damaged: `files_beside`."""
    return sorted(path.name for path in folder.glob("checkpoints/*") if path.suffix != ".json")


def files_beside(folder):
    return sorted(path.name for path in folder.glob("checkpoints/*.json"))


@pytest.fixture
def train_here(compose, monkeypatch):
    """train_here(folder, ...): trains as train.py does, 8 steps with a validation every two.

    `stop`: the time is up after so many batches. `die`: an error occurs then. `kill`: the process
    ends then, as by kill -9.
    """

    def run(folder, *overrides, stop=None, die=None, kill=None):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if index + 1 == kill:
                os._exit(0)
            if index + 1 == die:
                raise SystemError("died")
            if stop is not None and index + 1 >= stop:
                trainer.should_stop = True

        monkeypatch.setattr(Images, "on_train_batch_end", on_train_batch_end, raising=False)
        composed = compose(
            "experiment=smoke", "seed=5", "trainer.max_steps=8", "trainer.val_check_interval=2",
            "watch=[cce,dice]", "trainer.enable_progress_bar=false", *overrides,
        )  # fmt: skip
        folder.mkdir(exist_ok=True)
        return train(composed.plan(folder))

    return run


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of runs that several tests read."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def straight(train_here, kept):
    """The folder of such a run that was not interrupted; tests may only read it."""
    if not (folder := kept / "straight").exists():
        train_here(folder)
    return folder


@pytest.fixture
def died(train_here, kept):
    """died(folder, steps): a copy of such a run that an error ended after so many steps."""

    def copy(folder, steps):
        if not (first := kept / f"{steps} steps").exists():
            with pytest.raises(SystemError):
                train_here(first, die=steps)
        shutil.copytree(first, folder)

    return copy


def in_a_process(function, *args, **kwargs):
    """Call a function in a process of its own, which may be killed."""
    process = FORK.Process(target=function, args=args, kwargs=kwargs)
    process.start()
    process.join()


def no_step(*args):
    raise AssertionError("a step was trained again")


def start(*overrides, cwd, **options):
    """train.py in the background."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *overrides], cwd=cwd, env=ENVIRONMENT,
        **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL) | options,
    )  # fmt: skip


@contextmanager
def held_elsewhere(folder, then):
    """Another process holds the run and calls `then(file, sender)`; yields what it sends first."""
    receiver, sender = FORK.Pipe()
    process = FORK.Process(target=lambda: then(hold(folder), sender))
    process.start()
    yield process, receiver.recv()
    process.kill()
    process.join()


def test_one_process_trains_a_run(tmp_path):
    """Another process is refused until the first one lets go or dies; the same process is not."""

    def twice(file, sender):
        again = hold(tmp_path)
        sender.send(None)
        time.sleep(60)
        again.close()

    with held_elsewhere(tmp_path, twice):
        with pytest.raises(ConfigError, match=f"{tmp_path}: another process is training this run"):
            hold(tmp_path)
    hold(tmp_path).close()


def test_a_killed_run_is_free_though_its_workers_live(tmp_path):
    def fork(file, sender):
        if worker := os.fork():
            sender.send(worker)
        time.sleep(60)

    with held_elsewhere(tmp_path, fork) as (process, worker):
        process.kill()
        process.join()
        hold(tmp_path).close()
        os.kill(worker, signal.SIGKILL)


def test_who_only_looks_refuses_nobody(tmp_path):
    def look(file, sender):
        sender.send(None)
        time.sleep(0.3)
        file.close()
        time.sleep(60)

    with held_elsewhere(tmp_path, look) as (process, _):
        hold(tmp_path).close()
        assert process.is_alive()


@pytest.mark.parametrize("why", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_refuses_nobody(tmp_path, monkeypatch, why):
    def lockf(*args):
        raise OSError(getattr(errno, why), why)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    hold(tmp_path).close()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "auto", "fused"])
def test_a_sweep_leaves_a_run_that_another_process_took(tmp_path, launcher):
    """The run is taken after the grid was checked; the other runs are trained."""
    sweep = [
        "-m", "experiment=smoke", "trainer.max_steps=300", "seed=0,1,2", "hydra.sweep.dir=s",
        f"hydra/launcher={launcher}",
    ]  # fmt: skip
    if launcher != "basic":  # one run after the other, too
        sweep += ["hydra.launcher.workers=1", "hydra.launcher.max_members=1"]
    process = start(*sweep, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (first := list(tmp_path.glob("s/*seed=0*/events*"))):
        assert process.poll() is None
        time.sleep(0.01)
    taken = tmp_path / "s" / first[0].parent.name.replace("seed=0", "seed=1")
    taken.mkdir()
    with hold(taken):
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert said.count(f"{taken.name}: another process is training this run") == 1
    assert "Traceback" not in said
    status = {f.parent: read_result(f.parent)["status"] for f in tmp_path.glob("s/*/result.json")}
    assert len(status) == 2 and set(status.values()) == {"done"} and taken not in status
    assert not list(taken.glob("events*"))


@pytest.mark.slow
def test_the_same_command_beside_itself(tmp_path):
    """It is refused in one line, alone and in a sweep; the first command goes on."""
    run = ["experiment=smoke", "trainer.max_steps=1000000", "trainer.val_check_interval=100"]
    sweep = ["-m", *run, "hydra.sweep.dir=sweep"]
    process = start(*sweep, cwd=tmp_path)
    while not (found := list(tmp_path.glob("sweep/*/checkpoints/*.ckpt"))):
        assert process.poll() is None
        time.sleep(0.01)
    folder = found[0].parents[1]
    for command in ([*run, f"resume='{folder}'"], sweep):
        done = run_train(*command, cwd=tmp_path, status=2)
        assert "another process is training this run" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    steps = read_curves(folder)["loss/dice"].dropna().index
    assert list(steps) == list(range(len(steps))) and len(steps) >= 100


@pytest.mark.parametrize(
    "by",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed(whole, tmp_path, by):
    """It equals an uninterrupted run."""
    done = run_script(signal_at(by, 15), *RUN, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == -by if by == signal.SIGKILL else done.returncode > 0
    assert newest(tmp_path / "run")[1]["global_step"] == 10
    done = run_train(*RUN, "resume=run", cwd=tmp_path)
    assert "resumed from step 10" in done.stderr
    assert_same(tmp_path / "run", whole)


def test_killed_twice(train_here, straight, tmp_path):
    """A resumed run is killed, too."""
    for kill in (3, 7):
        in_a_process(train_here, tmp_path / "run", kill=kill)
        assert newest(tmp_path / "run")[1]["global_step"] == kill - 1
    in_a_process(train_here, tmp_path / "run")
    assert_same_training(tmp_path / "run", straight)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_killed_at_random(tmp_path, compiled):
    """Twenty kills at moments spread over the whole run, its start included; ten if compiled.

    A run that reaches its end must equal an uninterrupted one; then the next run begins.
    """
    command = ["experiment=smoke", "seed=5", "trainer.enable_progress_bar=false"]
    command += ["trainer.val_check_interval=200", "data.val_size=4"]
    command += [f"trainer.max_steps={60_000 if compiled else 2000}"]
    command += ["compile=true", "probe.every_n_steps=50"] if compiled else []
    run_train(*command, "hydra.run.dir=whole", cwd=tmp_path)  # also fills the caches
    (tmp_path / "whole").rename(tmp_path / "first")
    begin = time.monotonic()
    run_train(*command, "hydra.run.dir=whole", cwd=tmp_path)
    seconds = time.monotonic() - begin
    assert_same(tmp_path / "first", tmp_path / "whole")

    dice, kills, resumed, lost, ends = random.Random(1), 0, 0, [], 0
    while kills < (10 if compiled else 20):
        ends += 1
        folder = tmp_path / f"run{ends}"
        while not finished(folder):
            by = dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
            process = start(*command, f"hydra.run.dir={folder}", cwd=tmp_path)
            before = newest(folder)
            try:
                process.wait(timeout=dice.uniform(0, seconds))
                assert process.returncode == 0
                continue
            except subprocess.TimeoutExpired:
                process.send_signal(by)
                assert process.wait(PATIENCE) or finished(folder)
            kills += 1
            resumed += before is not None
            after, curves = newest(folder), read_curves(folder)
            kept = after[1]["global_step"] if after else 0
            assert kept >= (before[1]["global_step"] if before else 0)
            trained = curves["loss/dice"].dropna().index if "loss/dice" in curves else [-1]
            lost.append(max(0, int(max(trained, default=-1)) + 1 - kept))
        assert_same(folder, tmp_path / "whole")
    print(f"{kills} kills, {resumed} of resumed runs; {ends} ends, all as uninterrupted")
    print(f"steps on record past the checkpoint: {lost}; a whole run took {seconds:.0f} s")
    assert resumed
    assert compiled or max(lost) <= 200


# --- Damaged checkpoints -------------------------------------------------------------------------


def torn(file):
    os.truncate(file, file.stat().st_size // 2)


def flipped(file):
    """Flip one bit of a weight; PyTorch itself would load the file."""
    content = bytearray(file.read_bytes())
    tensor = torch.load(file, weights_only=True)["state_dict"]["net.0.0.weight"]
    at = content.index(tensor.numpy().tobytes())
    content[at] ^= 1
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [torn, flipped, empty])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, caplog, damage):
    net = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)))
    for step in (10, 20, 30):
        weights = {f"net.{n}": t + step for n, t in net.state_dict().items()}
        content = {"state_dict": weights, "global_step": step}
        save_checkpoint(content | {"losswatch": {"config": {"theta": 0.5}, "sizes": {}}}, tmp_path)
    assert checkpoint_names(tmp_path) == ["step=20.ckpt", "step=30.ckpt"]
    assert newest(tmp_path)[1]["global_step"] == 30
    damage(tmp_path / "checkpoints" / "step=30.ckpt")
    assert newest(tmp_path)[1]["global_step"] == 20
    assert "step=30.ckpt cannot be read" in caplog.text and caplog.text.count("\n") == 1
    damage(tmp_path / "checkpoints" / "step=20.ckpt")
    assert newest(tmp_path) is None


def test_loading_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "step=1.ckpt"
    torch.save({"state_dict": {}, "global_step": 1, "x": Bomb()}, file)
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(file)
    with pytest.raises(ConfigError, match="no readable checkpoint"):
        find_checkpoint(str(tmp_path))
    assert not (tmp_path / "exploded").exists()


def write(folder, *steps, config=None):
    """Write small checkpoints, as a run would, one after the other."""
    for step in steps:
        content = {"state_dict": {"net.w": torch.full((3,), float(step))}, "global_step": step}
        content["losswatch"] = {"config": config or {"theta": 0.5}, "sizes": {}}
        save_checkpoint(content, folder)


def test_damaged_checkpoints_do_not_count_when_old_ones_are_removed(tmp_path):
    """However late their steps are."""
    write(tmp_path, 700, 800)
    for step in (700, 800):
        torn(checkpoint_path(tmp_path, step))
    checkpoint_path(tmp_path, 7000).write_text("a stray file")
    strays = ["step=700.ckpt", "step=7000.ckpt", "step=800.ckpt"]
    write(tmp_path, 10)
    assert checkpoint_names(tmp_path) == sorted(["step=10.ckpt", *strays])
    write(tmp_path, 20, 30)
    assert checkpoint_names(tmp_path) == sorted(["step=20.ckpt", "step=30.ckpt", *strays])
    finish(tmp_path, 30)
    assert checkpoint_names(tmp_path) == sorted(["step=30.ckpt", *strays])
    assert find_checkpoint(str(tmp_path))["global_step"] == 30


def test_each_checkpoint_is_read_once_when_old_ones_are_removed(tmp_path, monkeypatch):
    """Each save would read all of them again. A file that has changed is read again."""
    read, read_file = [], checkpoints.read_file
    monkeypatch.setattr(
        checkpoints, "read_file", lambda path: read.append(path.name) or read_file(path)
    )
    write(tmp_path, 10, 20, 30, 40)
    assert [name for name in read if name.endswith(".ckpt")] == [
        f"step={step}.ckpt" for step in (10, 20, 30, 40)
    ]
    torn(checkpoint_path(tmp_path, 40))
    write(tmp_path, 50)
    assert checkpoint_names(tmp_path) == ["step=30.ckpt", "step=40.ckpt", "step=50.ckpt"]
    read.clear()
    assert find_start(tmp_path).step == 50  # a new attempt trusts no file that it has not read
    assert "step=50.ckpt" in read


def test_checkpoints_of_an_attempt_that_was_given_up_are_removed(tmp_path):
    """They would count as the newest, though training went on from an earlier step."""
    write(tmp_path, 300, 400)
    write(tmp_path, 310)
    assert checkpoint_names(tmp_path) == ["step=300.ckpt", "step=310.ckpt"]
    (tmp_path / "checkpoints" / ".step=305.ckpt.123").write_text("half of one")
    write(tmp_path, 320)
    assert checkpoint_names(tmp_path) == ["step=310.ckpt", "step=320.ckpt"]


def test_a_checkpoint_is_on_the_disk_before_older_ones_are_removed(tmp_path, monkeypatch):
    """A file is written under another name and then renamed, so a power cut leaves whole files."""
    write(tmp_path, 10, 20)
    done = []

    def sync(descriptor):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        done.append(checkpoint_names(tmp_path))

    monkeypatch.setattr(os, "fsync", sync)
    write(tmp_path, 30)
    partial, beside = (f".step=30.{kind}.{os.getpid()}" for kind in ("ckpt", "json"))
    before = ["step=10.ckpt", "step=20.ckpt"]
    after = [*before, "step=30.ckpt"]
    assert done == [
        partial, [partial, *before], beside, [partial, beside, *before], "checkpoints", after,
    ]  # fmt: skip
    assert checkpoint_names(tmp_path) == ["step=20.ckpt", "step=30.ckpt"]
    assert files_beside(tmp_path) == ["step=20.json", "step=30.json"]


@pytest.mark.parametrize("damage", [torn, empty, None])
def test_a_checkpoint_takes_the_place_of_one_of_its_name(
    straight, died, train_here, tmp_path, damage
):
    """A resumed run replaces files of the same name; otherwise its weights would not be used."""
    folder = tmp_path / "run"
    died(folder, 5)
    for step in (6, 8):
        path = checkpoint_path(folder, step)
        shutil.copy(checkpoint_path(folder, 4), path)
        if damage:
            damage(path)
    train_here(folder)
    assert checkpoint_names(folder) == ["step=6.ckpt", "step=8.ckpt"]
    assert_same_training(folder, straight)
    assert find_checkpoint(str(folder))["global_step"] == 8


def test_a_stack_that_fails_after_its_last_step_is_tested_alone(train_here, tmp_path, monkeypatch):
    """Its last checkpoint is that of the run: no step is done twice."""
    monkeypatch.setattr(stack_module, "compiled", lambda function: function)
    whole = train_here(tmp_path / "whole", "compile=true")
    report = stack_module.StackedModule.report

    def fail(module, stage, *args):
        if stage == "test":
            raise NotStackable("it needs the ordinary step")
        report(module, stage, *args)

    monkeypatch.setattr(stack_module.StackedModule, "report", fail)
    folder = tmp_path / "run"
    monkeypatch.setattr(SegmentationModule, "training_step", no_step)
    alone = train_here(folder, "compile=true")
    assert alone.steps == whole.steps == 8 and alone.is_done
    assert alone.metrics == pytest.approx(whole.metrics, abs=1e-5)  # rounded otherwise
    curves, wanted = read_curves(folder), read_curves(tmp_path / "whole")
    pd.testing.assert_frame_equal(curves[wanted.columns], wanted)
    weights, wanted = (
        find_checkpoint(str(run))["state_dict"] for run in (folder, tmp_path / "whole")
    )
    assert all(torch.equal(weights[name], weight) for name, weight in wanted.items())


def test_runs_at_different_steps_are_no_stack(compose, tmp_path):
    """Another process may have trained one of them after the stack was made."""
    members = []
    for seed in (0, 1):
        composed = compose("experiment=smoke", f"seed={seed}")
        folder = tmp_path / f"{seed}"
        folder.mkdir()
        plan = composed.plan(folder)
        members.append(make_member(plan))
    members[1].start = 10
    with pytest.raises(NotStackable, match="at different steps"):
        fit(members, None, plan)


@pytest.mark.parametrize(
    "change",
    [
        {"state_dict": [1]},
        {"state_dict": {"net.w": "text"}},
        {"state_dict": {7: torch.zeros(3)}},
        {"global_step": "30"},
        {"global_step": -1},
        {"global_step": 10},
        {"optimizer_states": 3},
        {"losswatch": None},
        {"losswatch": {"config": 5}},
        {"losswatch": {"config": {}, "metrics": {"x": "high"}}},
    ],
)
def test_a_checkpoint_that_holds_something_else(compose, tmp_path, change):
    """It counts as damaged wherever it is read."""
    write(tmp_path, 20)
    path = checkpoint_path(tmp_path, 30)
    torch.save(load_checkpoint(checkpoint_path(tmp_path, 20)) | {"global_step": 30} | change, path)
    with pytest.raises(ValueError, match="step=30.ckpt cannot be read"):
        load_checkpoint(path)
    found = find_start(tmp_path)
    assert found.step == 20 and "step=30.ckpt cannot be read" in found.notice
    with pytest.raises(ConfigError, match="cannot be read"):
        find_checkpoint(str(path))


def test_a_checkpoints_config_may_be_nonsense(compose):
    """Only keys of this command's config are taken over; the rest is at most shown."""
    config = {"model": "nothing", "data": {"image_size": 8, "[": 3, "low": {"x": 1}}, "theta": None}
    content = {"state_dict": {}, "losswatch": {"config": config}}
    composed = compose("model=convnet", "mode=test", "checkpoint=x")
    settings = composed.settings(recall=lambda _: to_keep(content))
    assert settings.data["image_size"] == 8 and settings.theta == 0.5
    with pytest.raises(ConfigError, match="trained with another"):
        load_net(make_net(Plan(settings, Form(1, ("a", "b"), 2), {})), content)


@pytest.mark.parametrize("place", ["pipe", "folder", "/dev/zero"])
def test_what_is_no_file_is_not_read(tmp_path, place):
    """Opening a pipe would wait for ever, and a device never ends."""
    path = tmp_path / place
    if place == "pipe":
        os.mkfifo(path)
    if place == "folder":
        (path / "checkpoints").mkdir(parents=True)
        os.mkfifo(checkpoint_path(path, 10))
        os.mkfifo(path / "result.json")
        assert finished(path) is None and find_start(path).step == 0
    with pytest.raises(ConfigError, match="no readable checkpoint|not a regular file"):
        find_checkpoint(str(path))


# --- The same settings ---------------------------------------------------------------------------


def test_another_config_is_refused(whole, tmp_path):
    """The message names the difference, and no file is touched. Harmless keys may differ."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "result.json").unlink()  # as after an interruption; the checkpoint holds the config
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    done = run_train(*RUN, "resume=run", "optimizer.lr=0.1", "theta=0.3", cwd=tmp_path, status=2)
    [line] = done.stderr.splitlines()
    assert "optimizer.lr was 0.003, now 0.1; theta was 0.5, now 0.3" in line
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("place", ["nowhere", ""])  # "": a shell's variable that is not set
def test_a_folder_that_is_not_there(place):
    with pytest.raises(ConfigError, match=f"^resume={place}: there is no such run folder$"):
        run_folder(place, [])


def test_two_folders_of_one_run(whole, tmp_path):
    """Nothing is trained in either; the folder of the run is as it was."""
    shutil.copytree(whole, tmp_path / "a")
    done = run_train(*RUN, "resume=a", "hydra.run.dir=b", cwd=tmp_path, status=2)
    [line] = done.stderr.splitlines()
    assert line.startswith("losswatch: resume=a goes on in that folder; leave out hydra.run.dir,")
    assert not list((tmp_path / "b").iterdir())


@pytest.mark.slow
def test_what_the_command_says_of_such_a_folder(tmp_path):
    done = run_train(*RUN, "resume=nowhere", cwd=tmp_path, status=2)
    assert done.stderr == "losswatch: resume=nowhere: there is no such run folder\n"


def test_a_sweep_is_not_resumed_as_a_run(tmp_path):
    """Hydra composes the config of a sweep without its folder."""
    done = run_train("-m", *RUN, "resume=run", cwd=tmp_path, status=2)
    assert "hydra.sweep.dir=" in done.stderr


@pytest.mark.slow
def test_a_finished_run_is_left_alone(whole, tmp_path):
    """The run was done before the command was given.

    `test_a_run_that_ended_while_the_lock_was_waited_for` shows the same of one that ends later.
    """
    shutil.copytree(whole, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("*") if p.suffix != ".log"}
    more = "trainer.enable_progress_bar=false"  # a harmless key
    done = run_train(*RUN, "resume=run", more, cwd=tmp_path)
    assert "done before, skipped" in done.stderr
    assert before.items() <= {p: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("*")}.items()


# --- Sweeps --------------------------------------------------------------------------------------

SWEEP = ["experiment=smoke", "loss=dice,cce", "theta=0.05,0.5"]
OTHERS = ("basic", "joblib")


@pytest.fixture(scope="module")
def swept(six, tmp_path_factory):
    """A copy of the sweep `six` without the runs of one θ, which summary.csv still lists."""
    folder = tmp_path_factory.mktemp("sweep") / "s"
    shutil.copytree(six.folder, folder)
    for run in folder.glob("*theta=0.95"):
        shutil.rmtree(run)
    return folder


@pytest.mark.parametrize(
    "launcher", ["auto", "fused", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)]
)
def test_a_sweep_is_taken_up_again(swept, train_here, tmp_path, launcher):
    """One run is done, one failed, one is half done, one is missing: in the end all are done."""
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = tmp_path / "s"
    shutil.copytree(swept, sweep)
    done, failed, half, missing = sorted(p.parent for p in sweep.glob("*/result.json"))
    stamp = (done / "result.json").stat().st_mtime_ns
    result = read_result(failed) | {"status": "failed", "error": "interrupted"}
    (failed / "result.json").write_text(json.dumps(result))
    for run in (half, missing):
        shutil.rmtree(run)
    own = ["loss=dice", "theta=0.05"]
    assert half.name == ",".join(own)
    own += ["seed=0", "watch=[cce,dice,dice_fg,dice_square,dice_fg_square]"]
    own += ["trainer.max_steps=30", "trainer.val_check_interval=10"]
    in_a_process(train_here, half, *own, kill=15)
    workers = ["hydra.launcher.workers=1"] if launcher == "fused" else []
    said = run_train(
        "-m", *SWEEP, f"hydra/launcher={launcher}", *workers, "hydra.sweep.dir=s", cwd=tmp_path
    ).stderr
    if launcher != "joblib":
        assert said.count("done before, skipped") == 1
        assert said.count("resumed from step") == 2
        assert said.count("resumed from step 30") == 1  # the failed one has only its test left
    assert (done / "result.json").stat().st_mtime_ns == stamp
    summary, reference = (pd.read_csv(folder / "summary.csv") for folder in (sweep, swept))
    assert list(summary.status) == ["done"] * 4
    reference = reference[reference.theta != 0.95].reset_index(drop=True)
    columns = ["run", "accuracy", "dice", "iou"]
    near = {"rtol": 0.02} if launcher == "fused" else {"check_exact": True}
    pd.testing.assert_frame_equal(summary[columns], reference[columns], **near)
    for run in (failed, half, missing):
        assert list(read_curves(run)["loss/dice"].dropna().index) == list(range(30))


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_a_fused_sweep_is_killed_and_taken_up_again(tmp_path, compiled):
    """Ended by kill -9 and then by Ctrl-C, with all processes; its table is complete at last."""
    steps = 60_000 if compiled else 20_000
    sweep = tmp_path / "s"
    command = [
        "-m", "experiment=smoke", "hydra/launcher=fused", "loss=dice,cce", "seed=0,1,2",
        f"trainer.max_steps={steps}", "trainer.val_check_interval=500", f"compile={compiled}",
        "probe.every_n_steps=10", "hydra.sweep.dir=s",
    ]  # fmt: skip

    def newest():
        found = [
            max(map(checkpoints.step_in_name, run.glob("checkpoints/*")), default=0)
            for run in runs()
        ]
        return min(found) if len(found) == 6 else 0

    def runs():
        return [path for path in sweep.glob("*") if path.is_dir()]

    reached = []
    for by in (signal.SIGKILL, signal.SIGINT):
        before = newest()
        process = start(
            *command, cwd=tmp_path, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        while newest() <= before and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None
        os.killpg(process.pid, by)
        said, _ = process.communicate(timeout=PATIENCE)
        reached.append(newest())
        print(by.name, process.returncode, reached[-1], said, sep="\n")
        assert "Traceback" not in said
        cut = read_runs(sweep)
        assert set(cut["status"]) == {"unfinished"} and set(cut["loss"]) == {"dice", "cce"}
        assert process.returncode == (-signal.SIGKILL if by is signal.SIGKILL else 130)
    assert "runs resumed from step" in said and "losswatch: interrupted" in said
    assert 0 < reached[0] < reached[1] < steps

    done = run_train(*command, cwd=tmp_path)
    print(done.stderr, done.stdout)
    assert "runs resumed from step" in done.stderr
    summary = pd.read_csv(sweep / "summary.csv")
    assert len(summary) == 6 and set(summary.status) == {"done"}
    for run in runs():
        events = EventAccumulator(str(run), size_guidance={"scalars": 0})
        events.Reload()
        assert [e.step for e in events.Scalars("loss/dice")] == list(range(0, steps, 10))
        checked = [e.step for e in events.Scalars("val/accuracy") if e.step]
        assert checked == list(range(500, steps + 1, 500))


def test_a_changed_sweep_is_refused(swept, tmp_path):
    """A run's name tells the command's settings, but not those of conf/, which may have changed."""
    shutil.copytree(swept, tmp_path / "s")
    file = sorted(tmp_path.glob("s/*/result.json"))[2]
    result = json.loads(file.read_text())
    result["config"]["data"]["image_size"] = 64
    file.write_text(json.dumps(result))
    done = run_train("-m", *SWEEP, "hydra.sweep.dir=s", cwd=tmp_path, status=2)
    [line] = done.stderr.splitlines()
    assert "data.image_size was 64, now 16" in line and "nothing was started" in line


# --- Event files ---------------------------------------------------------------------------------


def add_foreign(folder):
    """Write an event file of another program; return its path and content."""
    with SummaryWriter(folder) as writer:
        writer.add_scalar("theirs", 1.0, 0)
    [file] = folder.glob("events.*")
    return file, file.read_bytes()


def test_other_programs_event_files_are_left_alone(train_here, straight, tmp_path, caplog):
    """A new run does not remove them, and a resumed run does not cut them if they have grown."""
    folder = tmp_path / "run"
    folder.mkdir()
    file, content = add_foreign(folder)
    with pytest.raises(SystemError):
        train_here(folder, die=5)
    assert file.read_bytes() == content
    assert f"({file.name}), left alone" in caplog.text
    file.write_bytes(content * 2)
    train_here(folder)
    assert file.read_bytes() == content * 2
    assert file.name not in read_about(newest(folder)[0]).sizes
    file.unlink()
    assert_same_training(folder, straight)


@pytest.mark.slow
def test_a_sweep_in_a_folder_of_another_program(tmp_path):
    """The files there and in its runs' folders stay."""
    run = tmp_path / "s" / "seed=0,experiment=smoke"
    kept = [add_foreign(folder) for folder in (tmp_path / "s", run)]
    notes = tmp_path / "s" / "checkpoints" / "step=7.ckpt"
    notes.parent.mkdir()
    notes.write_bytes(b"theirs")
    run_train("-m", "experiment=smoke", "seed=0", "hydra.sweep.dir=s", cwd=tmp_path)
    assert read_result(run)["status"] == "done" and notes.read_bytes() == b"theirs"
    assert all(file.read_bytes() == content for file, content in kept)


def test_another_programs_checkpoint_is_not_replaced(compose, tmp_path):
    path = checkpoint_path(tmp_path, 10)
    path.parent.mkdir()
    torch.save({"state_dict": {}, "global_step": 10, "hyper_parameters": {}}, path)
    with pytest.raises(ConfigError, match="step=10.ckpt is a checkpoint of another program"):
        check_folder(tmp_path, compose("experiment=smoke").settings().as_config())


def test_what_is_no_run_is_not_resumed(swept, tmp_path):
    """A sweep's folder, an empty one, another program's: the message names what they hold."""
    empty, theirs, sweep = (tmp_path / name for name in ("empty", "theirs", "sweep"))
    empty.mkdir()
    (theirs / ".hydra").mkdir(parents=True)
    (theirs / ".hydra" / "config.yaml").write_text("lr: 0.1\n")
    add_foreign(theirs)
    shutil.copytree(swept, sweep)
    names = [path.name for path in sorted(sweep.glob("*/")) if path.is_dir()]
    for folder, holds in [
        (empty, "it holds nothing"),
        (theirs, r"it holds \.hydra, events\.out\.tfevents\."),
        (sweep, f"it holds the runs of a sweep: {', '.join(names)}"),
    ]:
        with pytest.raises(
            ConfigError, match=f"resume={folder} is not the folder of a run; {holds}"
        ):
            check_run(folder, str(folder))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    done = run_train("experiment=smoke", "resume=sweep", cwd=tmp_path, status=2)
    [line] = done.stderr.splitlines()
    assert line.startswith("losswatch: resume=sweep is not the folder of a run")
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_run_that_was_just_begun_can_be_resumed(tmp_path):
    """Its folder holds only its config, only an event file, or only a result."""
    for name in (".hydra/config.yaml", "events.out.tfevents.1.a.2.0.losswatch"):
        folder = tmp_path / name[:6]
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("theta: 0.5\nseed: 0\n")
        check_run(folder, name)
    Result(status="failed", config={"theta": 0.5}).write(empty := tmp_path)
    check_run(empty, str(empty))


@pytest.mark.parametrize("name", ["curves.f32", "metrics.jsonl"])
@pytest.mark.parametrize("damage", ["removed", "emptied", "cut"])
def test_a_record_that_lost_something(train_here, straight, died, tmp_path, caplog, damage, name):
    """Training goes on from a checkpoint whose record is whole, or starts anew."""
    folder = tmp_path / "run"
    died(folder, 7)
    size = read_about(checkpoint_path(folder, 4)).sizes[name]
    if damage == "removed":
        (folder / name).unlink()
    else:
        os.truncate(folder / name, size + 5 if damage == "cut" else 0)
    caplog.clear()
    train_here(folder)
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    then = "goes on from step=4.ckpt" if damage == "cut" else "starts anew"
    assert len(said) == 1 and name in said[0] and said[0].endswith(f"training {then}")
    assert_same_training(folder, straight)


@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_an_event_file_that_lost_something(train_here, straight, died, tmp_path, caplog, damage):
    """TensorBoard shows less; the run goes on as if nothing were lost."""
    folder = tmp_path / "run"
    died(folder, 7)
    [file] = folder.glob("events.*")
    file.unlink() if damage == "removed" else os.truncate(file, 100)
    caplog.clear()
    caplog.set_level("INFO")
    train_here(folder)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    assert "resumed from step 6" in caplog.text
    assert_same_training(folder, straight, events=False)


@pytest.mark.parametrize(
    "change",
    [
        None,
        "{",
        "[]",
        {"step": 20},
        {"config": 3},
        {"sizes": ["x"]},
        {"sizes": {"x": 1.5}},
        {"checksum": 1},
        {"checksum": None},
    ],
)
def test_a_checkpoint_without_what_stands_beside_it(tmp_path, change):
    """As after a kill between the two: it is passed over and named; a test can still load it."""
    write(tmp_path, 20, 30)
    path = checkpoint_path(tmp_path, 30)
    beside = path.with_suffix(".json")
    about = json.loads(beside.read_text())
    assert about["step"] == 30 and about["config"] == {"theta": 0.5}
    if change is None:
        beside.unlink()
    else:
        beside.write_text(change if isinstance(change, str) else json.dumps(about | change))
    found = find_start(tmp_path)
    assert found.step == 20 and found.path == checkpoint_path(tmp_path, 20)
    assert f"{path} cannot be read (" in found.notice and "\n" not in found.notice
    assert found.notice.endswith("training goes on from step=20.ckpt")
    same = {"theta": 0.5}
    check_folder(tmp_path, same)
    with pytest.raises(ConfigError, match="theta was 0.5, now 0.3"):
        check_folder(tmp_path, same | {"theta": 0.3})
    assert (
        find_checkpoint(str(tmp_path))["global_step"]
        == find_checkpoint(str(path))["global_step"]
        == 30
    )
    write(tmp_path, 30)
    assert find_start(tmp_path).step == 30 and find_start(tmp_path).notice is None


def test_what_is_compared_is_not_loaded(train_here, straight, died, tmp_path, monkeypatch):
    """Weights are loaded once, by the Trainer."""
    folder, loaded = tmp_path / "run", []
    died(folder, 7)
    original = torch.load
    monkeypatch.setattr(
        torch, "load", lambda file, *a, **k: loaded.append(str(file)) or original(file, *a, **k)
    )
    config = read_about(checkpoint_path(folder, 6)).config
    check_folder(folder, config)
    check_run(folder, str(folder))
    start = find_start(folder)
    assert not loaded and start.step == 6 and set(start.metrics) >= {"val/accuracy"}
    train_here(folder)
    assert len(loaded) == 1
    monkeypatch.undo()
    assert_same_training(folder, straight)


def test_a_run_of_an_older_losswatch(compose, tmp_path):
    """It has event files, but no record: one line says what can read it. A finished one stays."""
    config = compose("experiment=smoke").settings().as_config()
    (tmp_path / "events.out.tfevents.1.host.1.0.losswatch").touch()
    with pytest.raises(ConfigError, match=r"written by an older losswatch \(0\.1\); that version"):
        check_folder(tmp_path, config)
    Result(status="done", config=config).write(tmp_path)
    check_folder(tmp_path, config)


@pytest.mark.slow
def test_a_fused_run_says_that_it_starts_anew(compose, tmp_path):
    """The notice is in its own log, though its group was trained before that was opened."""
    sweep = ["-m", "experiment=smoke", "seed=0", "hydra/launcher=fused", "hydra.sweep.dir=s"]
    folder = tmp_path / "s" / "seed=0,experiment=smoke"
    folder.mkdir(parents=True)
    write(folder, 10, config=compose("experiment=smoke", "seed=0").settings().as_config())
    torn(checkpoint_path(folder, 10))
    run_train(*sweep, cwd=tmp_path)
    log = (folder / "train.log").read_text()
    assert log.count("cannot be read") == 1 and "training starts anew" in log


# --- Stopped before the end ----------------------------------------------------------------------


@pytest.mark.parametrize("stop", [5, 6])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(train_here, straight, tmp_path, stop):
    """Stopped between validations or at one. The validation where it stops is not in the curves."""
    folder, limit = tmp_path / "run", "+trainer.max_time=01:00:00:00"
    steps, metrics, _ = train_here(folder, limit, stop=stop)
    assert steps == stop and "val/accuracy" in metrics and "test/accuracy" not in metrics
    content = newest(folder)[1]
    assert content["global_step"] == stop
    assert not content["callbacks"]  # with the timer's state no time would be left
    assert train_here(folder, limit)[0] == 8
    assert_same_training(folder, straight)


# A rate that falls at each validation but the first.
FALLING = ["scheduler=plateau", "scheduler.patience=0", "+scheduler.threshold=1.0"]
# The first validation is the best one: the metric is better the smaller it is.
FIRST_IS_BEST = ["callbacks=best", "callbacks.best.mode=min"]
STOPPING = [
    "callbacks=[best,early_stopping]", "callbacks.early_stopping.patience=2",
    "callbacks.early_stopping.mode=min",
]  # fmt: skip


@pytest.mark.parametrize(
    "options, accumulated",
    [
        (FALLING, 1), (FALLING, 2), (FIRST_IS_BEST, 1), (STOPPING, 1),
        slow(FIRST_IS_BEST, 2), slow(STOPPING, 2),
    ],
)  # fmt: skip
def test_a_kill_between_validations(train_here, tmp_path, options, accumulated):
    """What goes by validations knows those before the kill, also that of the last checkpoint."""
    options = [*options, f"trainer.accumulate_grad_batches={accumulated}"]
    train_here(tmp_path / "whole", *options)
    with suppress(SystemError):
        train_here(tmp_path / "run", *options, die=3 * accumulated)
    train_here(tmp_path / "run", *options)
    assert_same_training(tmp_path / "run", tmp_path / "whole")
    states = [newest(tmp_path / name)[1] for name in ("run", "whole")]
    assert states[0]["lr_schedulers"] == states[1]["lr_schedulers"]
    if "best" in options[0]:
        run, whole = (
            torch.load(tmp_path / name / "checkpoints/best.ckpt", weights_only=True)
            for name in ("run", "whole")
        )
        assert run["global_step"] == whole["global_step"]


@pytest.mark.parametrize(
    "options",
    [
        ["trainer.max_steps=4", "trainer.val_check_interval=3", "logger=csv"],
        # Early stopping after the second validation.
        ["callbacks=early_stopping", "callbacks.early_stopping.patience=1", "optimizer.lr=1e-12"],
    ],
)
def test_a_kill_after_the_last_checkpoint(train_here, tmp_path, monkeypatch, options):
    """The run goes on with its test: no step is trained again, and nothing is in the curves twice.

    What a second logger was given is in its files, too.
    """
    whole = train_here(tmp_path / "whole", *options)

    def test(*args, **kwargs):
        os._exit(0)

    monkeypatch.setattr(pl.Trainer, "test", test)
    in_a_process(train_here, tmp_path / "run", *options)
    monkeypatch.undo()
    last = newest(tmp_path / "run")[1]["global_step"]
    assert last == whole.steps == 4
    monkeypatch.setattr(SegmentationModule, "training_step", no_step)
    assert train_here(tmp_path / "run", *options) == whole
    assert_same_training(tmp_path / "run", tmp_path / "whole")
    tested = [e.step for e in events_of(tmp_path / "run").Scalars("test/accuracy")]
    assert tested == [last]
    if "logger=csv" in options:
        read = [
            pd.concat(
                map(pd.read_csv, sorted((tmp_path / name).glob("csv/*/metrics.csv"))),
                ignore_index=True,
            )
            for name in ("run", "whole")
        ]
        assert len(list((tmp_path / "run").glob("csv/*/metrics.csv"))) == 2
        pd.testing.assert_frame_equal(*read, check_like=True)


def test_a_kill_between_writes_of_a_logger(train_here, tmp_path):
    """What it was given before the last checkpoint is in its file; the run is watched as before."""
    folder, options = tmp_path / "run", ["logger=csv", "probe.every_n_steps=3"]
    in_a_process(train_here, folder, *options, kill=5)
    rows = pd.read_csv(folder / "csv/version_0/metrics.csv").set_index("step")
    assert list(rows["val/accuracy"].dropna().index) == [2, 4]
    assert list(rows["loss/dice"].dropna().index) == [0, 3]
    train_here(folder, *options)
    assert list(read_curves(folder)["loss/dice"].dropna().index) == [0, 3, 6]


def test_checkpoints_in_folders_of_the_users(train_here, tmp_path):
    """They lie in the run's folder. The run's own checkpoints neither replace nor remove them."""
    train_here(
        tmp_path / "run", "callbacks=best", "callbacks.best.save_top_k=-1",
        "callbacks.best.dirpath=${run.folder}/mine/checkpoints", "callbacks.best.filename='{step}'",
    )  # fmt: skip
    found = tmp_path.glob("run/mine/checkpoints/*.ckpt")
    assert {path.name: load_checkpoint(path)["global_step"] for path in found} == {
        f"step={step}.ckpt": step for step in (2, 4, 6, 8)
    }
    assert checkpoint_names(tmp_path / "run") == ["step=6.ckpt", "step=8.ckpt"]
    train_here(
        tmp_path / "other", "callbacks=best", "callbacks.best.filename='a/b-{step}'",
        "trainer.max_steps=2",
    )  # fmt: skip
    assert checkpoint_names(tmp_path / "other") == ["a", "step=2.ckpt"]
    assert load_checkpoint(tmp_path / "other/checkpoints/a/b-step=2.ckpt")["global_step"] == 2


@pytest.mark.parametrize("end", [{"stop": 13}, {"die": 22}])
def test_accumulated_gradients_are_in_no_checkpoint(train_here, kept, tmp_path, end):
    """The end of the time may fall within a step: no checkpoint is saved there."""
    accumulate = ["trainer.accumulate_grad_batches=4", "trainer.val_check_interval=5"]
    accumulate += ["trainer.max_steps=6"]
    if not (whole := kept / "accumulated").exists():
        train_here(whole, *accumulate)
    folder = tmp_path / "run"
    with suppress(SystemError):
        steps, *_ = train_here(folder, *accumulate, **end)
        assert steps == 4
    assert newest(folder)[1]["global_step"] == (4 if "stop" in end else 5)
    assert train_here(folder, *accumulate)[0] == 6
    assert_same_training(folder, whole)


@pytest.mark.slow
def test_no_time_left(tmp_path):
    """A stopped run is neither done nor failed; the same command with more time does the rest.

    A time limit is one of each run, so these runs are not stacked.
    """
    sweep = ["-m", "experiment=smoke", "seed=0,1", "hydra.sweep.dir=s"]
    sweep += ["hydra/launcher=fused", "hydra.launcher.workers=1"]
    limit = "+trainer.max_time=00:00:00:00"
    done = run_train(*sweep, limit, cwd=tmp_path, status=1)
    assert "(trainer.max_time=00:00:00:00 needs the ordinary step)" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout.count(" unfinished ") == 2
    runs = sorted(file.parent for file in tmp_path.glob("s/*/result.json"))
    for run in runs:
        result = read_result(run)
        assert (result["status"], result["steps"]) == ("unfinished", 0)
        assert result["error"] == "after 0 of 30 steps"
    assert list(read_runs(tmp_path / "s").status) == ["unfinished"] * 2
    resumed = ["experiment=smoke", "seed=0", f"resume={runs[0]}", limit.replace("=00", "=01")]
    run_train(*resumed, cwd=tmp_path)
    result = read_result(runs[0])
    assert (result["status"], result["steps"], result["error"]) == ("done", 30, None)
    assert list(read_runs(tmp_path / "s").status) == ["done", "unfinished"]


@pytest.mark.slow
def test_the_exit_status_of_a_stopped_run(tmp_path):
    """It is 1, since not all that was asked for is done."""
    command = ["experiment=smoke", "hydra.run.dir=run", "+trainer.max_time=00:00:00:00"]
    for _ in range(2):
        done = run_train(*command, cwd=tmp_path, status=1)
        assert "unfinished after 0 of 30 steps" in done.stderr and "Traceback" not in done.stderr
    assert read_result(tmp_path / "run")["status"] == "unfinished"


@pytest.mark.parametrize(
    "option",
    ["fast_dev_run=true", "fast_dev_run=3", "limit_train_batches=1", "limit_train_batches=0.5",
     "overfit_batches=2"],
)  # fmt: skip
def test_options_that_would_end_training_early_are_refused(compose, option):
    name, value = option.split("=")
    with pytest.raises(ConfigError, match=f"trainer.{name}=(?i:{value}) would end training before"):
        compose("experiment=smoke", f"+trainer.{option}").plan()


def test_options_that_do_not_end_training_early(compose):
    harmless = ["fast_dev_run=false", "limit_train_batches=1.0", "overfit_batches=0.0"]
    compose("experiment=smoke", *(f"+trainer.{option}" for option in harmless)).plan()


# --- Another process ends the run meanwhile ------------------------------------------------------


def test_a_run_that_ended_while_the_lock_was_waited_for(whole, tmp_path):
    """Its result is read again under the lock, and it is not trained a second time."""
    script = (
        "import shutil, losswatch.disk.locks as locks\n"
        "hold = locks.hold\n"
        "def wait(folder):\n"
        f"    shutil.copytree({str(whole)!r}, folder, dirs_exist_ok=True)\n"
        "    return hold(folder)\n"
        "locks.hold = wait\n"
    )
    shutil.copytree(whole / ".hydra", tmp_path / "run" / ".hydra")  # it had just begun
    more = "trainer.enable_progress_bar=false"  # a harmless key
    done = run_script(script, *RUN, "resume=run", more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "done before, skipped" in done.stderr and "resumed" not in done.stderr
    before, after = (
        {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.glob("*") if p.is_file()}
        for run in (whole, tmp_path / "run")
    )
    del before["train.log"]
    assert before.items() <= after.items()


def test_a_group_leaves_out_a_run_that_ended_while_the_lock_was_waited_for(tmp_path, monkeypatch):
    def wait(folder):
        Result(status="done", metrics={"val/accuracy": 0.5}).write(folder)
        return hold(folder)

    job = SimpleNamespace(folder=tmp_path / "run", plan=object())
    with ExitStack() as held:
        assert parts._lock(job, held)
    monkeypatch.setattr(parts, "hold", wait)
    with ExitStack() as held:
        assert not parts._lock(job, held)


# --- Damaged results -----------------------------------------------------------------------------

RESULT = '{"status": "done", "config": {"theta": %s}, "metrics": {"val/accuracy": %s}}'
DAMAGED = {
    "no metrics": '{"status": "done", "config": {"theta": 0.5}}',
    "no config": '{"status": "done", "metrics": {"val/accuracy": 0.5}}',
    "metrics are a list": '{"status": "done", "config": {}, "metrics": [1]}',
    "a metric is text": RESULT % ("0.5", '"high"'),
    "a huge number": RESULT % ("0.5", "1" * 400),
    "a huger number": RESULT % ("0.5", "1" * 5000),
    "deep": "[" * 100_000,
    "a list": "[1, 2]",
    "a number": "3",
    "half of one": '{"status": "do',
    "not UTF-8": '{"status": "\xff"}'.encode("latin-1"),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_result(compose, tmp_path, content):
    """The run is not done; when it is resumed, one line says why."""
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "result.json").write_bytes(content)
    assert finished(tmp_path) is None
    check_folder(tmp_path, compose("experiment=smoke").settings().as_config())
    notice = find_start(tmp_path).notice
    assert "result.json cannot be read (" in notice and "\n" not in notice and len(notice) < 500


def test_a_run_whose_result_is_damaged_is_taken_up(straight, train_here, tmp_path, caplog):
    shutil.copytree(straight, folder := tmp_path / "run")
    (folder / "result.json").write_text(DAMAGED["no metrics"])
    train_here(folder)
    [said] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "done, but without metrics" in said and said.endswith(
        "training goes on from step=8.ckpt"
    )
    assert_same_training(folder, straight)


@pytest.mark.slow
def test_a_damaged_result_on_the_command_line(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    result = read_result(whole)
    del result["metrics"]
    (tmp_path / "run" / "result.json").write_text(json.dumps(result))
    done = run_train(*RUN, "resume=run", cwd=tmp_path)
    assert done.stderr.count("result.json cannot be read") == 1 and "Traceback" not in done.stderr
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("text", ["\udcff", "\x1b[31mred\nline", "x" * 10_000])
def test_a_results_text_is_shown_on_one_line(compose, tmp_path, text):
    """Characters that do not print are replaced, and long text is cut."""
    config = compose("experiment=smoke").settings().as_config() | {"note": text, text: 1}
    Result(status="failed", error=text, config=config).write(tmp_path)
    assert json.loads((tmp_path / "result.json").read_text("utf-8"))["error"] == text
    with pytest.raises(ConfigError) as refused:
        check_folder(tmp_path, compose("experiment=smoke").settings().as_config())
    said = str(refused.value)
    said.encode()
    assert "note was " in said and said.isprintable() and len(said) < 500


# --- Testing a checkpoint ------------------------------------------------------------------------


def test_mode_test(whole, compose, tmp_path):
    """The run's metrics again, from its folder or file; its θ and data unless others are given."""
    wanted = {k: v for k, v in read_result(whole)["metrics"].items() if k.startswith("test/")}
    [file] = whole.glob("checkpoints/*.ckpt")

    def tested(place, *overrides):
        composed = compose("mode=test", "model=convnet", quoted(f"checkpoint={place}"), *overrides)
        return ordinary.test(composed.plan(tmp_path / str(len(overrides)))).metrics

    assert tested(file) == pytest.approx(wanted, rel=1e-5)
    run_train("-m", "mode=test", "model=convnet", f"checkpoint={whole}", "theta=0.6,0.9", "seed=7",
              "hydra.sweep.dir=other", "hydra/launcher=fused", "hydra.launcher.workers=1",
              cwd=tmp_path)  # fmt: skip
    others = [read_result(file.parent) for file in tmp_path.glob("other/*/result.json")]
    assert {(r["config"]["theta"], r["config"]["seed"]) for r in others} == {(0.6, 7), (0.9, 7)}
    assert {r["config"]["data"]["image_size"] for r in others} == {16}
    found = {r["run"]: r["metrics"]["test/accuracy"] for r in others}
    [other] = (r["metrics"] for r in others if r["config"]["theta"] == 0.6)
    assert other == pytest.approx(tested(whole, "theta=0.6", "seed=7"), rel=1e-5)
    assert len({*found.values(), wanted["test/accuracy"]}) == 3
    summary = pd.read_csv(tmp_path / "other" / "summary.csv")
    assert dict(zip(summary.run, summary.accuracy, strict=True)) == pytest.approx(found)


@pytest.mark.slow
def test_mode_test_on_the_command_line(whole, tmp_path):
    """A single run names the checkpoint's file; a sweep gives the same by each launcher."""
    wanted = {k: v for k, v in read_result(whole)["metrics"].items() if k.startswith("test/")}
    [file] = whole.glob("checkpoints/*.ckpt")
    done = run_train(
        "mode=test", "model=convnet", f"checkpoint={file}", "hydra.run.dir=own", cwd=tmp_path
    )
    assert "test Dice" in done.stderr
    assert read_result(tmp_path / "own")["metrics"] == pytest.approx(wanted, rel=1e-5)
    found = []
    for name, more in (("auto", []), ("fused", ["hydra.launcher.workers=1"])):
        run_train(
            "-m", "mode=test", "model=convnet", f"checkpoint={whole}", "theta=0.6,0.9",
            f"hydra.sweep.dir={name}", f"hydra/launcher={name}", *more, cwd=tmp_path,
        )  # fmt: skip
        results = [read_result(file.parent) for file in tmp_path.glob(f"{name}/*/result.json")]
        found.append({r["run"]: r["metrics"]["test/accuracy"] for r in results})
    assert len(found[0]) == 2 and found[0] == found[1]


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["model=convnet", "model.width=3"], r"is \(4, 1, 3, 3\) there and \(3, 1, 3, 3\) in"),
        (["model=unet"], r"absent there and \(8, 1, 3, 3\) in this model; .*ConvNet"),
        (["model=convnet", "theta=[0.3,0.6]"], r"is \(2, 4, 1, 1\) there and \(3, 4, 1, 1\) in"),
    ],
)
def test_a_checkpoint_of_another_shape(whole, compose, overrides, said, tmp_path):
    composed = compose("mode=test", quoted(f"checkpoint={whole}"), *overrides)
    with pytest.raises(ConfigError, match=said):
        ordinary.test(composed.plan(tmp_path))


def test_a_test_that_was_cut_off_is_given_again(whole, compose, tmp_path, monkeypatch):
    """Its folder is not taken for one of an older version, and its log is begun anew."""
    composed = compose("mode=test", quoted(f"checkpoint={whole}"), "model=convnet")
    plan = composed.plan(tmp_path)

    def cut_off(*_):
        raise RuntimeError("cut off")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="cut off"):
        patched.setattr(SegmentationModule, "test_step", cut_off)
        ordinary.test(plan)
    check_folder(tmp_path, plan.settings.as_config())
    metrics = ordinary.test(plan).metrics
    expected = read_result(whole)["metrics"]
    assert metrics == pytest.approx({tag: expected[tag] for tag in metrics}, rel=1e-5)
    assert len(event_files(tmp_path)) == 1


@pytest.mark.parametrize("mode", ["test", "predict"])
def test_only_a_training_is_resumed(compose, mode):
    """The folder of a finished run would say that it was done before."""
    composed = compose(f"mode={mode}", "checkpoint=run", "resume=run")
    with pytest.raises(
        ConfigError, match=f"^resume=run goes on with a training, not with mode={mode}"
    ):
        composed.settings(recall=lambda _: Kept())


def test_a_checkpoints_config_is_only_numbers(compose):
    """A `_target_` would name code to call: neither that nor any other text is taken over."""
    saved = {
        "theta": 0.2, "seed": 3, "data": {"image_size": 8, "low": "${oc.env:HOME}"},
        "model": {"_target_": "os.system", "width": 7}, "loss": {"_target_": "os.system"},
        "watch": ["x"], "trainer": {"max_steps": 1},
    }  # fmt: skip
    composed = compose("model=convnet", "mode=test", "checkpoint=x", "seed=0")
    before = composed.settings(recall=lambda _: Kept()).as_config()
    settings = composed.settings(recall=lambda _: to_keep({"losswatch": {"config": saved}}))
    data = before["data"] | {"image_size": 8, "thresholds": 0.2}
    wanted = before | {"theta": 0.2, "data": data}
    assert settings.as_config() == wanted


def test_no_checkpoint(refusal):
    missing = "nowhere/step=3.ckpt"  # Hydra would not read its "="
    line = refusal("mode=test", f"checkpoint={missing}")
    assert f"checkpoint={missing}: there is no such file or run folder" in line


# --- The disk is full ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("limit", [3_000, 20_000])
def test_a_full_disk(tmp_path, limit):
    """Imitated by a limit on file sizes: messages are clear, and existing files are readable."""
    done = run_train(
        "experiment=smoke", "hydra.run.dir=run", cwd=tmp_path, status=1,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert "File too large" in done.stderr and "Traceback" not in done.stderr
    curves = read_curves(tmp_path / "run")
    assert curves.empty or len(curves["loss/cce"].dropna()) in (10, 20, 30)
    run_train("experiment=smoke", "resume=run", cwd=tmp_path)
    whole = SimpleNamespace(**read_result(tmp_path / "run"))
    assert whole.status == "done" and len(read_curves(tmp_path / "run")["loss/cce"].dropna()) == 30
