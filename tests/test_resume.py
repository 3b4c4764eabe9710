"""Nothing is lost: real processes killed, checkpoints damaged, sweeps taken up again."""

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
from contextlib import contextmanager
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, read_result, run_train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from losswatch import resume
from losswatch.config import ConfigError
from losswatch.report import read_runs, read_scalars

FORK = multiprocessing.get_context("fork")
RUN = ["experiment=smoke", "trainer.max_steps=400", "trainer.val_check_interval=20", "seed=5"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    cwd = tmp_path_factory.mktemp("whole")
    run_train(*RUN, "hydra.run.dir=run", cwd=cwd)
    return cwd / "run"


def assert_same(folder, wanted):
    """Bit for bit: curves as the report and as TensorBoard read them, metrics, weights, moments."""
    curves, reference = read_scalars(folder), read_scalars(wanted)
    pd.testing.assert_frame_equal(curves[reference.columns], reference, check_exact=True)
    seen = []
    for each in (folder, wanted):
        events = EventAccumulator(str(each), size_guidance={"scalars": 0})
        events.Reload()
        tags = sorted(t for t in events.Tags()["scalars"] if not t.startswith("test/"))
        seen.append({t: [(e.step, e.value) for e in events.Scalars(t) if e.step] for t in tags})
    assert seen[0] == seen[1]
    result, other = read_result(folder), read_result(wanted)
    assert result["status"] == other["status"] == "done"
    assert result["metrics"] == other["metrics"]
    (name, state), (other_name, other_state) = resume.newest(folder), resume.newest(wanted)
    assert name.name == other_name.name
    for key, weight in other_state["state_dict"].items():
        assert torch.equal(state["state_dict"][key], weight), key
    moments, reference = (s["optimizer_states"][0]["state"] for s in (state, other_state))
    for i, kept in reference.items():
        assert all(torch.equal(moments[i][n], value) for n, value in kept.items())


def start(*overrides, cwd, **options):
    """train.py in the background. Ctrl-C reaches it even if a shell's `&` has shut it off here."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *overrides], cwd=cwd, env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), stdin=subprocess.DEVNULL,
        **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | options,
    )  # fmt: skip


def killed(cwd, overrides, by, checkpoints):
    """Start a run, and kill it after its n-th checkpoint; whether that was before its end."""
    process = start(*overrides, cwd=cwd)
    old = {file.name for file in cwd.glob("**/*.ckpt")}
    seen: set = set()
    while process.poll() is None and len(seen - old) < checkpoints:
        seen |= {file.name for file in cwd.glob("**/*.ckpt")}
        time.sleep(0.002)
    process.send_signal(by)
    return process.wait(timeout=60) != 0


@contextmanager
def held_elsewhere(folder, then):
    """Another process holds the run, and does `then(file, sender)`; yields what it sends first."""
    receiver, sender = FORK.Pipe()
    process = FORK.Process(target=lambda: then(resume.hold(folder), sender))
    process.start()
    yield process, receiver.recv()
    process.kill()
    process.join()


def test_one_process_trains_a_run(tmp_path):
    """Another is refused, until the first lets go or dies; the same one is not."""

    def twice(file, sender):
        again = resume.hold(tmp_path)
        sender.send(None)
        time.sleep(60)
        again.close()

    with held_elsewhere(tmp_path, twice):
        with pytest.raises(ConfigError, match=f"{tmp_path}: another process is training this run"):
            resume.hold(tmp_path)
    resume.hold(tmp_path).close()


def test_a_killed_run_is_free_though_its_workers_live(tmp_path):
    def fork(file, sender):
        if worker := os.fork():
            sender.send(worker)
        time.sleep(60)

    with held_elsewhere(tmp_path, fork) as (process, worker):
        process.kill()
        process.join()
        resume.hold(tmp_path).close()
        os.kill(worker, signal.SIGKILL)


def test_who_only_looks_refuses_nobody(tmp_path):
    def look(file, sender):
        sender.send(None)
        time.sleep(0.3)
        file.close()
        time.sleep(60)

    with held_elsewhere(tmp_path, look) as (process, _):
        resume.hold(tmp_path).close()
        assert process.is_alive()


@pytest.mark.parametrize("why", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_refuses_nobody(tmp_path, monkeypatch, why):
    def lockf(*args):
        raise OSError(getattr(errno, why), why)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    resume.hold(tmp_path).close()


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_a_sweep_leaves_a_run_that_another_process_took(tmp_path, fused):
    """Taken after the grid was checked; the others are trained."""
    sweep = ["-m", "experiment=smoke", "trainer.max_steps=300", "seed=0,1,2", "hydra.sweep.dir=s"]
    if fused:
        sweep += [
            "hydra/launcher=fused",
            "hydra.launcher.workers=1",
            "hydra.launcher.max_members=1",
        ]
    process = start(*sweep, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (first := list(tmp_path.glob("s/*seed=0*/events*"))):
        assert process.poll() is None
        time.sleep(0.01)
    taken = tmp_path / "s" / first[0].parent.name.replace("seed=0", "seed=1")
    taken.mkdir()
    with resume.hold(taken):
        _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said.count(f"{taken.name}: another process is training this run") == 1
    assert "Traceback" not in said
    status = {f.parent: read_result(f.parent)["status"] for f in tmp_path.glob("s/*/result.json")}
    assert len(status) == 2 and set(status.values()) == {"done"} and taken not in status
    assert not list(taken.glob("events*"))


@pytest.mark.slow
def test_the_same_command_beside_itself(tmp_path):
    """Refused in one line, alone and in a sweep; the first goes on undisturbed."""
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
    assert process.wait(timeout=60) == 130
    steps = read_scalars(folder)["loss/dice"].dropna().index
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
    """Again and again with kill -9: the second time it is a resumed run that is killed."""
    folder = tmp_path / "run"
    assert killed(tmp_path, [*RUN, f"hydra.run.dir={folder}"], by, 3)
    before, _ = resume.newest(folder)
    if by is signal.SIGKILL:
        assert killed(tmp_path, [*RUN, f"resume={folder}"], by, 2)
        assert resume.newest(folder)[1]["global_step"] >= 60
    done = run_train(*RUN, f"resume={folder}", cwd=tmp_path)
    assert "resumed from step" in done.stderr
    assert_same(folder, whole)
    assert before.name != "step=400.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_killed_at_random(tmp_path, compiled):
    """Twenty kills at moments spread over the whole run, start-up included; ten of a compiled one.

    A run that reaches its end must equal the one that nothing interrupted, and the next begins.
    """
    command = ["experiment=smoke", "seed=5", "trainer.enable_progress_bar=false"]
    command += ["trainer.val_check_interval=200", "data.val_size=4"]
    command += [f"trainer.max_steps={60_000 if compiled else 2000}"]
    command += ["compile=true", "probe.every_n_steps=50"] if compiled else []
    run_train(*command, "hydra.run.dir=whole", cwd=tmp_path, timeout=300)  # fills the caches, too
    (tmp_path / "whole").rename(tmp_path / "first")
    begin = time.monotonic()
    run_train(*command, "hydra.run.dir=whole", cwd=tmp_path, timeout=300)
    seconds = time.monotonic() - begin
    assert_same(tmp_path / "first", tmp_path / "whole")

    dice, kills, resumed, lost, ends = random.Random(1), 0, 0, [], 0
    while kills < (10 if compiled else 20):
        ends += 1
        folder = tmp_path / f"run{ends}"
        folder.mkdir()
        while not resume.finished(folder):
            by = dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
            process = start(*command, f"resume={folder}", cwd=tmp_path)
            before = resume.newest(folder)
            try:
                process.wait(timeout=dice.uniform(0, seconds))
                assert process.returncode == 0
                continue
            except subprocess.TimeoutExpired:
                process.send_signal(by)
                assert process.wait(timeout=60) or resume.finished(folder)
            kills += 1
            resumed += before is not None
            after, curves = resume.newest(folder), read_scalars(folder)
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
    """One bit of a weight; PyTorch itself would load it."""
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
        resume.save(content, tmp_path / "checkpoints" / f"step={step}.ckpt")
    assert {p.name for p in tmp_path.glob("checkpoints/*")} == {"step=20.ckpt", "step=30.ckpt"}
    assert resume.newest(tmp_path)[1]["global_step"] == 30
    assert resume.newest(tmp_path, below=30)[1]["global_step"] == 20
    damage(tmp_path / "checkpoints" / "step=30.ckpt")
    assert resume.newest(tmp_path)[1]["global_step"] == 20
    assert "step=30.ckpt cannot be read" in caplog.text and caplog.text.count("\n") == 1
    damage(tmp_path / "checkpoints" / "step=20.ckpt")
    assert resume.newest(tmp_path) is None


def test_loading_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "step=1.ckpt"
    torch.save({"state_dict": {}, "global_step": 1, "x": Bomb()}, file)
    with pytest.raises(ValueError, match="cannot be read"):
        resume.load(file)
    with pytest.raises(ConfigError, match="no readable checkpoint"):
        resume.find(str(tmp_path))
    assert not (tmp_path / "exploded").exists()


# --- The same settings ---------------------------------------------------------------------------


def test_another_config_is_refused(whole, tmp_path):
    """With the difference, before anything is touched; what does not matter may differ."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "result.json").unlink()  # as if interrupted: the checkpoint knows the config
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    done = run_train(*RUN, "resume=run", "optimizer.lr=0.1", "theta=0.3", cwd=tmp_path, status=2)
    [line] = done.stderr.splitlines()
    assert "optimizer.lr was 0.003, now 0.1; theta was 0.5, now 0.3" in line
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    done = run_train(*RUN, "resume=nowhere", cwd=tmp_path, status=2)
    assert done.stderr == "losswatch: resume=nowhere: there is no such run folder\n"
    done = run_train("-m", *RUN, "resume=run", cwd=tmp_path, status=2)
    assert "hydra.sweep.dir=" in done.stderr


def test_a_finished_run_is_left_alone(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("*") if p.suffix != ".log"}
    more = "trainer.enable_progress_bar=false"  # nothing that matters
    done = run_train(*RUN, "resume=run", more, cwd=tmp_path)
    assert "done before, skipped" in done.stderr
    assert before.items() <= {p: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("*")}.items()


# --- Sweeps --------------------------------------------------------------------------------------

SWEEP = [
    "experiment=smoke", "loss=dice,cce", "seed=0,1", "trainer.max_steps=60",
]  # fmt: skip


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("sweep")
    run_train("-m", *SWEEP, "hydra.sweep.dir=s", cwd=cwd)
    return cwd / "s"


@pytest.mark.parametrize(
    "launcher", ["basic", "fused", pytest.param("joblib", marks=pytest.mark.slow)]
)
def test_a_sweep_is_taken_up_again(swept, tmp_path, launcher):
    """One run done, one failed, one half done, one missing: all are done in the end."""
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
    own = ["loss=dice", "seed=0"]
    assert half.name == ",".join(["experiment=smoke", *own, "trainer.max_steps=60"])
    assert killed(
        tmp_path, ["experiment=smoke", *own, *SWEEP[3:], "hydra.run.dir=s/half"], signal.SIGKILL, 2
    )
    (sweep / "half").rename(half)
    said = run_train(
        "-m", *SWEEP, f"hydra/launcher={launcher}", "hydra.sweep.dir=s", cwd=tmp_path
    ).stderr
    if launcher != "joblib":
        assert said.count("done before, skipped") == 1
        assert said.count("resumed from step") == 1
    assert (done / "result.json").stat().st_mtime_ns == stamp
    summary, reference = (pd.read_csv(folder / "summary.csv") for folder in (sweep, swept))
    assert list(summary.status) == ["done"] * 4
    columns = ["run", "accuracy", "dice", "iou"]
    near = {"rtol": 0.02} if launcher == "fused" else {"check_exact": True}
    pd.testing.assert_frame_equal(summary[columns], reference[columns], **near)
    for run in (failed, half, missing):
        assert list(read_scalars(run)["loss/dice"].dropna().index) == list(range(60))


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_a_fused_sweep_is_killed_and_taken_up_again(tmp_path, compiled):
    """All its processes, once with kill -9 and once with Ctrl-C; its table is complete after."""
    steps = 60_000 if compiled else 20_000
    sweep = tmp_path / "s"
    command = [
        "-m", "experiment=smoke", "hydra/launcher=fused", "loss=dice,cce", "seed=0,1,2",
        f"trainer.max_steps={steps}", "trainer.val_check_interval=500", f"compile={compiled}",
        "probe.every_n_steps=10", "hydra.sweep.dir=s",
    ]  # fmt: skip

    def newest():
        found = [max(map(resume._step, run.glob("checkpoints/*")), default=0) for run in runs()]
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
        said, _ = process.communicate(timeout=60)
        reached.append(newest())
        print(by.name, process.returncode, reached[-1], said, sep="\n")
        assert "Traceback" not in said
        cut = read_runs(sweep)
        assert set(cut["status"]) == {"unfinished"} and set(cut["loss"]) == {"dice", "cce"}
        assert process.returncode == (-signal.SIGKILL if by is signal.SIGKILL else 130)
    assert "runs resumed from step" in said and "losswatch: interrupted" in said
    assert 0 < reached[0] < reached[1] < steps

    done = run_train(*command, cwd=tmp_path, timeout=600)
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
    """Names of runs say what the command gives; what a file of conf/ gives may change unseen."""
    shutil.copytree(swept, tmp_path / "s")
    file = sorted(tmp_path.glob("s/*/result.json"))[2]
    result = json.loads(file.read_text())
    result["config"]["data"]["image_size"] = 64
    file.write_text(json.dumps(result))
    done = run_train("-m", *SWEEP, "hydra.sweep.dir=s", cwd=tmp_path, status=2)
    [line] = done.stderr.splitlines()
    assert "data.image_size was 64, now 16" in line and "nothing was started" in line


# --- Testing a checkpoint ------------------------------------------------------------------------


def test_mode_test(whole, tmp_path):
    """The run's own metrics, from its folder or file; its θ and data unless others are given."""
    wanted = {k: v for k, v in read_result(whole)["metrics"].items() if k.startswith("test/")}
    [file] = whole.glob("checkpoints/*.ckpt")
    done = run_train(
        "mode=test", "model=convnet", f"checkpoint={file}", "hydra.run.dir=own", cwd=tmp_path
    )
    assert "test accuracy" in done.stderr
    result = read_result(tmp_path / "own")
    assert result["metrics"] == pytest.approx(wanted, rel=1e-5)
    assert result["config"]["data"]["image_size"] == 16
    run_train("-m", "mode=test", "model=convnet", f"checkpoint={whole}", "theta=0.6,0.9", "seed=7",
              "hydra.sweep.dir=other", cwd=tmp_path)  # fmt: skip
    others = [read_result(file.parent) for file in tmp_path.glob("other/*/result.json")]
    assert {(r["config"]["theta"], r["config"]["seed"]) for r in others} == {(0.6, 7), (0.9, 7)}
    found = {r["run"]: r["metrics"]["test/accuracy"] for r in others}
    assert max(found.values()) < wanted["test/accuracy"]
    summary = pd.read_csv(tmp_path / "other" / "summary.csv")
    assert dict(zip(summary.run, summary.accuracy, strict=True)) == pytest.approx(found)


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["model=convnet", "model.width=3"], r"is \(4, 1, 3, 3\) there and \(3, 1, 3, 3\) in"),
        ([], r"absent there and \(8, 1, 3, 3\) in this model; .*ConvNet"),
        (["model=convnet", "theta=[0.3,0.6]"], r"is \(2, 4, 1, 1\) there and \(3, 4, 1, 1\) in"),
    ],
)
def test_a_checkpoint_of_another_shape(whole, compose, overrides, said):
    composed = compose("mode=test", f"checkpoint={whole}", *overrides)
    content = resume.find(composed.cfg.checkpoint)
    given = [override.split("=")[0] for override in overrides]
    resume.adopt(composed.cfg, content, given)
    from losswatch.build import make_net

    with pytest.raises(ConfigError, match=said):
        resume.load_net(make_net(composed.cfg), content)


def test_a_checkpoints_config_is_only_numbers(compose):
    """A `_target_` in it names what would be called: it is not taken over, nor any string."""
    saved = {
        "theta": 0.2, "seed": 3, "data": {"image_size": 8, "low": "${oc.env:HOME}"},
        "model": {"_target_": "os.system", "width": 7}, "loss": {"_target_": "os.system"},
        "watch": ["x"], "trainer": {"max_steps": 1},
    }  # fmt: skip
    composed = compose("model=convnet", "mode=test", "checkpoint=x")
    before = resume.plain(composed.cfg)
    resume.adopt(composed.cfg, {"losswatch": {"config": saved}}, ["seed"])
    wanted = before | {"theta": 0.2, "data": before["data"] | {"image_size": 8}}
    assert resume.plain(composed.cfg) == wanted


def test_no_checkpoint(tmp_path):
    missing = "nowhere/step=3.ckpt"  # whose "=" Hydra would not read
    done = run_train("mode=test", f"checkpoint={missing}", cwd=tmp_path, status=2)
    assert f"checkpoint={missing}: there is no such file or run folder" in done.stderr
    assert "Traceback" not in done.stderr


# --- The disk is full ----------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [pytest.param(3_000, marks=pytest.mark.slow), 20_000])
def test_a_full_disk(tmp_path, limit):
    """Stood in for by a limit to the size of files: clear lines, and what is there is readable."""
    done = run_train(
        "experiment=smoke", "hydra.run.dir=run", cwd=tmp_path, status=1,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert "File too large" in done.stderr and "Traceback" not in done.stderr
    curves = read_scalars(tmp_path / "run")
    assert curves.empty or len(curves["loss/cce"].dropna()) in (10, 20, 30)
    run_train("experiment=smoke", "resume=run", cwd=tmp_path)
    whole = SimpleNamespace(**read_result(tmp_path / "run"))
    assert whole.status == "done" and len(read_scalars(tmp_path / "run")["loss/cce"].dropna()) == 30
