"""`python train.py -m ...`: the six-run sweep, its table, and the grid checked beforehand."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pandas as pd
import pytest
from conftest import ENVIRONMENT, PATIENCE, ROOT, read_result, run_python, run_train
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from switches import switches

from losswatch.command import Command, Facts
from losswatch.config.errors import ConfigError
from losswatch.config.sources import Sources
from losswatch.disk.curves import read_curves
from losswatch.disk.result import Result
from losswatch.sweep.exit import clear_errors, verdict

THETAS = [0.05, 0.5, 0.95]


def test_six_runs(six):
    wanted = {f"loss={loss},theta={t}" for loss in ("dice", "cce") for t in THETAS}
    assert set(six.runs) == wanted
    for folder in six.runs.values():
        result = read_result(folder)
        assert result["status"] == "done"
        assert len(read_curves(folder)["loss/cce"].dropna()) == 30


def test_runs_differ_only_as_asked(six):
    """The same images and first weights for both losses: the first observation is shared."""
    for theta in THETAS:
        a, b = (read_curves(six.runs[f"loss={loss},theta={theta}"]) for loss in ("dice", "cce"))
        watched = [c for c in a.columns if c.startswith(("loss/", "grad_norm/"))]
        pd.testing.assert_series_equal(a.loc[0, watched], b.loc[0, watched], rtol=1e-4)
        assert not a.loc[29, watched].equals(b.loc[29, watched])


def test_summary(six):
    summary = pd.read_csv(six.folder / "summary.csv")
    assert len(summary) == 6 and set(summary.status) == {"done"}
    assert set(zip(summary.loss, summary.theta, strict=True)) == {
        (loss, theta) for loss in ("dice", "cce") for theta in THETAS
    }
    for _, row in summary.iterrows():
        metrics = read_result(six.runs[row.run])["metrics"]
        for name in ("accuracy", "dice", "iou"):
            assert row[name] == pytest.approx(metrics[f"val/{name}"], rel=1e-6)
        assert row.seconds > 0 and row.optimizer == "adam" and not row.batch_norm


def test_a_sweep_takes_up_runs_of_other_names(six, tmp_path):
    """Earlier versions put what is not swept into the names; those runs are done, too.

    A run of another command in the same folder has the same name, but it is not taken for it.
    """
    sweep = tmp_path / "s"
    shutil.copytree(six.folder, sweep)
    old = sweep / "loss=dice,theta=0.5,experiment=smoke"
    (sweep / "loss=dice,theta=0.5").rename(old)
    given = ["-m", "experiment=smoke", "loss=dice,cce", "theta=0.05,0.5,0.95"]
    before = {file: file.read_bytes() for file in sweep.rglob("result.json")}
    again = run_train(*given, "hydra.sweep.dir=s", cwd=tmp_path)
    assert again.stderr.count("done before, skipped") == 6
    assert f"skipped: {old.name}" in again.stderr
    assert {file: file.read_bytes() for file in sweep.rglob("result.json")} == before
    other = run_train(*given, "model=unet", "hydra.sweep.dir=s", cwd=tmp_path, status=2)
    line = other.stderr.splitlines()[-1]
    assert "model._target_ was losswatch.nets.ConvNet, now losswatch.nets.UNet" in line
    assert "sweep what differs, or give another hydra.sweep.dir" in line
    assert {file: file.read_bytes() for file in sweep.rglob("result.json")} == before


def test_what_is_said(six):
    counted = re.findall(r"run (\d) of (\d): (.*)", six.done.stderr)
    assert [(i, n) for i, n, _ in counted] == [(str(i), "6") for i in range(1, 7)]
    assert counted[0][2] == "experiment=smoke loss=dice theta=0.05"
    table = six.done.stdout
    for head in ("loss", "θ", "optimiser", "BN", "Dice", "IoU", "accuracy", "seconds", "status"):
        assert head in table
    rows = [line.split() for line in table.splitlines() if "done" in line.split()]
    assert {(row[0], float(row[1])) for row in rows} == {
        (loss, theta) for loss in ("dice", "cce") for theta in THETAS
    }
    assert f"tensorboard --logdir outputs/{six.folder.name}" in table
    assert "Warning" not in six.done.stderr + table


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("theta=0.5,0.6,1.5", r"theta must be .*got 1\.5 \(in the run .*theta=1\.5"),
        ("seed=1,2,1", "the run experiment=smoke seed=1 is asked for twice"),
        (
            "seed=1,2 hydra.sweep.subdir=a",
            r"another run has the same folder, .*/a \(in the run experiment=smoke seed=2",
        ),
    ],
)
def test_grid_is_checked_before_the_first_run(tmp_path, arguments, message):
    done = run_train("-m", "experiment=smoke", *arguments.split(), cwd=tmp_path, status=2)
    [line] = (done.stdout + done.stderr).splitlines()
    assert re.match(f"losswatch: .*{message}.*nothing was started", line)
    assert not list(tmp_path.iterdir())


def test_a_refused_sweep_leaves_its_folder_as_it_was(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "multirun.yaml").write_text("earlier")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").touch()
    for folder in ("s", "other", "new/deep"):
        run_train("-m", "theta=0.5,1.5", f"hydra.sweep.dir={folder}", cwd=tmp_path, status=2)
    assert (tmp_path / "s" / "multirun.yaml").read_text() == "earlier"
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes"]
    assert not (tmp_path / "new").exists()


# --- What cannot be written ----------------------------------------------------------------------

TINY = ["-m", "experiment=smoke", "trainer.max_steps=2", "hydra.sweep.dir=s"]
# Without PYTHONUNBUFFERED: buffered output is written again at the end of a process, which fails.
BUFFERED = {k: v for k, v in ENVIRONMENT.items() if k not in ("PYTHONUNBUFFERED", "PYTHONWARNINGS")}


def full(*streams):
    """A function that makes streams of a new process write to a full disk."""

    def redirect():
        for stream in streams:
            os.dup2(os.open("/dev/full", os.O_WRONLY), stream)

    return redirect


def closed(*streams):
    return lambda: [os.close(stream) for stream in streams]


def statuses(sweep_dir):
    """The status of each run, by its learning rate."""
    results = [read_result(file.parent) for file in sweep_dir.glob("*/result.json")]
    return {result["config"]["optimizer"]["lr"]: result["status"] for result in results}


def case(name, preexec_fn, encoding, printed, last):
    return pytest.param(preexec_fn, encoding, printed, last, id=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "preexec_fn, encoding, printed, last",
    [
        case("full output", full(1), "utf-8", "", "losswatch: .*: .*No space left"),
        case("all closed", closed(0, 1, 2), "utf-8", "", ""),
        case("cp1252", None, "cp1252", r"loss \| +\? \|", ".*failed: Floating"),
        case("ascii", None, "ascii", r"loss \| +\? \|", ".*failed: Floating"),
        case("closed output", closed(1), "utf-8", "", ".*failed: Floating"),
        case("closed messages", closed(2), "utf-8", "(?m)^loss +\u03b8", ""),
        case("full messages", full(2), "utf-8", "(?m)^loss +\u03b8", ""),
        case("all full", full(1, 2), "utf-8", "", ""),
    ],
)
@pytest.mark.parametrize("launcher", ["auto", "basic", "fused", "joblib"])
def test_a_failed_run_is_told_by_the_exit_status(
    tmp_path, launcher, preexec_fn, encoding, printed, last
):
    """Whatever becomes of the output. The runs are trained, and summary.csv is written.

    The logs of the runs are on a full disk: that must not print an error for each of their lines.
    """
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    done = run_train(
        *TINY, "optimizer.lr=1e-3,1e30", f"hydra/launcher={launcher}",
        "hydra.job_logging.handlers.file.filename=/dev/full", cwd=tmp_path, status=1,
        preexec_fn=preexec_fn, env=BUFFERED | {"PYTHONIOENCODING": encoding}, encoding=encoding,
    )  # fmt: skip
    assert statuses(tmp_path / "s") == {1e-3: "done", 1e30: "failed"}
    assert sorted(pd.read_csv(tmp_path / "s" / "summary.csv").status) == ["done", "failed"]
    assert re.search(printed, done.stdout) and bool(printed) == bool(done.stdout)
    lines = done.stderr.splitlines()
    # Runs side by side end in any order.
    ends = lines[-1:] if launcher == "basic" else lines
    assert any(re.match(last, line) for line in ends) if last else not lines
    assert not re.search("Traceback|Warning|ignored", done.stderr)


# What Python finds where all streams were closed before it started.
CLOSED = """
import os, runpy, sys
for stream in range(3):
    os.close(stream)
sys.stdin = sys.stdout = sys.stderr = sys.__stdin__ = sys.__stdout__ = sys.__stderr__ = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_failed_run_without_streams_is_told_by_the_exit_status(tmp_path):
    """And without a disk for the logs. The runs are trained, and summary.csv is written."""
    (tmp_path / "closed.py").write_text(CLOSED)
    done = run_python(
        "closed.py", str(ROOT / "train.py"), *TINY, "optimizer.lr=1e-3,1e30",
        "hydra.job_logging.handlers.file.filename=/dev/full", cwd=tmp_path, status=1,
    )  # fmt: skip
    assert statuses(tmp_path / "s") == {1e-3: "done", 1e30: "failed"}
    assert sorted(pd.read_csv(tmp_path / "s" / "summary.csv").status) == ["done", "failed"]
    assert not done.stdout + done.stderr


def mounted(folder, size, *options):
    """Mount a small disk; skip the test where that is not allowed."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "none", folder]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a disk")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["auto", "basic", "fused", "joblib"])
@pytest.mark.parametrize("size", ["300k", "1500k"])
def test_the_disk_fills_during_a_sweep(tmp_path, launcher, size):
    """At most one line a run, one at the end, and the table. With more room it is finished."""
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    disk = tmp_path / "disk"
    mounted(disk, size)
    try:
        command = [
            "-m", "experiment=smoke", "seed=range(8)", "loss=dice,cce", "trainer.max_steps=200",
            "trainer.val_check_interval=50", f"hydra/launcher={launcher}", "hydra.sweep.dir=disk/s",
        ]  # fmt: skip
        done = run_train(*command, cwd=tmp_path, status=1)
        print(done.stderr, done.stdout)
        *lines, last = done.stderr.splitlines()
        assert re.match("losswatch: .*cannot be .*written: .*No space left on device", last)
        assert "Traceback" not in done.stderr and "Logging error" not in done.stderr
        assert "leaked" not in done.stderr
        assert sum("No space left" in line for line in lines) <= done.stdout.count("loss=") + 16
        assert re.search(r"(?m)^loss |^ +trainer", done.stdout) and "unfinished" in done.stdout
        subprocess.run(["mount", "-o", "remount,size=60m", disk], check=True)
        run_train(*command, cwd=tmp_path)
        summary = pd.read_csv(disk / "s" / "summary.csv")
        assert len(summary) == 16 and set(summary.status) == {"done"}
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True])
def test_a_disk_that_is_read_only(tmp_path, before):
    """One line and exit status 1, for a new sweep and for a resumed one: it is refused.

    Hydra writes the sweep's own file before the grid is checked, so no run has begun.
    """
    disk = tmp_path / "disk"
    mounted(disk, "9m")
    try:
        command = [a.replace("dir=s", "dir=disk/s") for a in TINY] + ["seed=0,1"]
        if before:
            run_train(*command, cwd=tmp_path)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        done = run_train(*command, cwd=tmp_path, status=1)
        [line] = done.stderr.splitlines()
        assert re.match("losswatch: .*cannot be .*written: .*Read-only file system: ", line)
        assert line.endswith("/disk/s/multirun.yaml'" if before else "'disk/s'")
        assert not done.stdout
        if not before:  # where the folder's name is made along with it
            subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
            (disk / "here").mkdir()
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            done = run_train(*TINY[:-1], "seed=0,1", cwd=disk / "here", status=1)
            [line] = done.stderr.splitlines()
            assert re.match("losswatch: .*cannot be .*written: .*Read-only .*: 'outputs'", line)
    finally:
        subprocess.run(["umount", disk], check=True)


# --- One's own files -----------------------------------------------------------------------------

DICE = b"_target_: losswatch.losses.Dice\n"
BROKEN = {
    "a tab": (b"\texponent: 2\n", r", line 2: found character '\\t' that cannot start any token"),
    "an open bracket": (
        b"exponent: [1, 2\n", r", line 3: expected ',' or ']'.*\(while parsing .*, line 2\)",
    ),
    "a key twice": (b"alpha: 1\nalpha: 2\n", r", line 3: found duplicate key alpha \(while .*"),
    "an indent": (b"exponent: 2\n alpha: 1\n", ", line 3: mapping values are not allowed here"),
    "no such alias": (b"exponent: *two\n", ", line 2: found undefined alias 'two'"),
    "latin-1": (b"# caf\xe9\nexponent: 2\n", ", line 2: byte 0xe9 is not UTF-8"),
    "a control character": (b"\n# \x00\n", ", line 3: YAML has no character 0x00"),
    "an interpolation": (b"exponent: ${seed\n", ": no viable alternative at input '\\${seed'"),
}  # fmt: skip


@pytest.fixture
def mine(tmp_path):
    """mine(content) -> a folder for --config-dir with the loss `broken`, and this loss's file."""

    def make(content):
        file = tmp_path / "mine" / "loss" / "broken.yaml"
        file.parent.mkdir(parents=True)
        file.write_bytes(DICE + content)
        return file.parents[1], file

    return make


@pytest.mark.parametrize("typo", BROKEN)
def test_a_broken_file_is_named_with_its_line(mine, compose, typo, monkeypatch):
    """As the trained loss, and as a watched loss."""
    content, said = BROKEN[typo]
    folder, file = mine(content)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config-dir", str(folder)])
    added = f"hydra.searchpath=['{folder}']"
    for read in (
        lambda: compose("loss=broken", added),
        lambda: Sources([added]).read(["broken"], OmegaConf.create({"loss": {}})),
    ):
        with pytest.raises(Exception) as raised:  # noqa: B017
            read()
        line, status = verdict(raised.value, Command(Facts()), {})
        assert status == 2 and "\n" not in line
        assert re.fullmatch(re.escape(str(file)) + said, line)


def test_a_watched_file_without_keys_is_named(compose, tmp_path):
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "listed.yaml").write_text("- 1\n")
    compose()  # registers the schema and opens conf
    sources = Sources([f"hydra.searchpath=['{tmp_path}']"])
    with pytest.raises(ConfigError, match=r"the file of loss listed must hold keys .*, got \[1\]"):
        sources.read(["listed", "cce"], OmegaConf.create({"loss": {}}))


@pytest.mark.parametrize(
    "arguments",
    [
        ["loss=broken"],
        pytest.param(["-m", "watch=[cce,broken]", "seed=0,1"], marks=pytest.mark.slow),
        pytest.param(["watch=[cce,broken]"], marks=pytest.mark.slow),
        pytest.param(["-m", "loss=dice,broken"], marks=pytest.mark.slow),
        pytest.param(["-m", "loss=dice,broken", "hydra/launcher=fused"], marks=pytest.mark.slow),
        pytest.param(["--help", "loss=broken"], marks=pytest.mark.slow),
    ],
)
def test_a_broken_file_is_bad_input(tmp_path, mine, arguments):
    folder, file = mine(BROKEN["latin-1"][0])
    done = run_train("--config-dir", str(folder), *arguments, cwd=tmp_path, status=2)
    [*begun, line] = (done.stdout + done.stderr).splitlines()
    run = " (in the run watch=[cce,broken] seed=0; nothing was started)"  # each run reads `watch`
    in_run = run if arguments[1:2] == ["watch=[cce,broken]"] else ""
    assert line == f"losswatch: {file}, line 2: byte 0xe9 is not UTF-8{in_run}"
    assert not begun or (arguments[0] == "watch=[cce,broken]" and begun[0].startswith("run: "))
    assert not list(tmp_path.rglob("events.out.*"))


# --- Processes -----------------------------------------------------------------------------------

PARENT = """
import os, signal, time
import joblib
from losswatch import compat
from losswatch.sweep.workers import end_in_time

def work(number):
    open(f"{number}.{os.getpid()}", "w").close()
    time.sleep(60)

if __name__ == "__main__":
    compat.initialize_workers(end_in_time)
    joblib.Parallel(n_jobs=2)(joblib.delayed(work)(i) for i in range(2))
"""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for a process's state")
def test_joblibs_processes_end_with_the_one_that_began_them(tmp_path):
    """Even if that one is killed while they work."""
    (tmp_path / "parent.py").write_text(PARENT)
    with subprocess.Popen(
        [sys.executable, "parent.py"], cwd=tmp_path, start_new_session=True,
        env=BUFFERED | {"PYTHONPATH": str(ROOT / "src")}, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + PATIENCE
            while len(begun := list(tmp_path.glob("[01].*"))) < 2:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            workers = [int(file.suffix[1:]) for file in begun]
            assert all(map(alive, workers))
            process.kill()
            deadline = time.monotonic() + 10
            while any(map(alive, workers)):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            os.killpg(process.pid, signal.SIGKILL)


# --- Switches of the process ---------------------------------------------------------------------


@pytest.mark.parametrize("full_error", [None, "0"])
@pytest.mark.parametrize("filters", [None, "default"])
@pytest.mark.parametrize("error", [None, SystemExit(2), KeyboardInterrupt(), ValueError("a fault")])
def test_switches_are_put_back(monkeypatch, full_error, filters, error):
    """However the command ends."""
    for name, value in {"HYDRA_FULL_ERROR": full_error, "PYTHONWARNINGS": filters}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    before = switches()
    with suppress(SystemExit, ValueError), clear_errors(Command(Facts()), {}):
        during = switches()
        assert during[0]["HYDRA_FULL_ERROR"] == "1"
        ignored = "ignore:resource_tracker:UserWarning"
        assert during[0]["PYTHONWARNINGS"] == (f"{filters},{ignored}" if filters else ignored)
        assert not during[1] and during[2] is not before[2] and during[3] is not before[3]
        if error:
            raise error
    assert switches() == before


IN_PROCESS = """
import runpy, sys
from switches import switches

train, before = sys.argv[1], switches()
for arguments in (
    "seed=0,1 hydra.sweep.dir=a", "seed=0,1,0 hydra.sweep.dir=b",
    "seed=2 hydra.sweep.dir=c hydra/launcher=fused hydra.launcher.workers=1",
):
    sys.argv = [train, "-m", "experiment=smoke", "trainer.max_steps=2", *arguments.split()]
    try:
        runpy.run_path(train, run_name="__main__")
    except SystemExit as stopped:
        print("exit status", stopped.code)
    assert switches() == before, (switches(), before)
"""


@pytest.mark.slow
def test_a_sweep_leaves_its_process_as_it_was(tmp_path):
    """Three sweeps in one process: one is done, one refused, one done by the fused launcher."""
    path = os.pathsep.join([str(ROOT / "tests/helpers"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", IN_PROCESS, str(ROOT / "train.py")], cwd=tmp_path, timeout=PATIENCE,
        env=BUFFERED | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("exit status 2") == 1
    found = {name: list(pd.read_csv(tmp_path / name / "summary.csv")["status"]) for name in "ac"}
    assert found == {"a": ["done"] * 2, "c": ["done"]} and not (tmp_path / "b").exists()
    assert done.stderr.count("training 2 single runs") == 1  # on two cores or more
    assert done.stderr.count(" s: seed=2,experiment=smoke,") == 1  # the line of a run that ends


# --- Parts ---------------------------------------------------------------------------------------


def test_clear_errors(capsys, monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    error = MissingConfigException("no", missing_cfg_file="loss/x", options=["a", "b"])
    with pytest.raises(SystemExit) as stopped, clear_errors(Command(Facts()), {}):
        raise error
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "losswatch: there is no loss=x; loss is one of a, b\n"
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(MissingConfigException), clear_errors(Command(Facts()), {}):
        raise error


@pytest.fixture
def sweep_in(monkeypatch):
    """sweep_in(folder): `clear_errors` around a command whose sweep is in that folder."""
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    @contextmanager
    def around(folder):
        command = Command(Facts())
        with clear_errors(command, {}):
            command.folder = folder
            yield

    return around


def lightning():
    """What Lightning makes of Ctrl-C."""
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def ctrl_c():
    raise KeyboardInterrupt


@pytest.mark.parametrize("interrupt", [ctrl_c, lightning])
@pytest.mark.parametrize("folder", [None, "empty", "missing"])
def test_interrupted_in_one_line(tmp_path, capsys, sweep_in, interrupt, folder):
    """Before the first run too, when there is no table."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stopped, sweep_in(folder and tmp_path / folder):
        interrupt()
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "losswatch: interrupted\n"


def test_a_sweep_that_ends_early_shows_its_table(six, tmp_path, capsys, sweep_in):
    """The exit status is that of the error that ended it."""
    shutil.copytree(six.folder, tmp_path / "s")
    for error, status in ((OSError("full"), 1), (ValueError("x\ny"), 1), (SystemExit(2), 2)):
        with pytest.raises(SystemExit) as stopped, sweep_in(tmp_path / "s"):
            raise error
        assert stopped.value.code == status
        out, err = capsys.readouterr()
        assert out.count(" done ") == 6
        assert len(err.splitlines()) == (status == 1) and " ".join(str(error).split()) in err + "2"
    with sweep_in(tmp_path / "s"):
        pass
    assert capsys.readouterr().out.count(" done ") == 6


def test_a_summary_that_cannot_be_written(six, tmp_path, capsys, sweep_in):
    """The table shows that all runs are done; a line and the exit status are about the summary."""
    shutil.copytree(six.folder, tmp_path / "s")
    (tmp_path / "s" / "summary.csv").unlink()
    (tmp_path / "s" / "summary.csv").mkdir()
    with pytest.raises(SystemExit) as stopped, sweep_in(tmp_path / "s"):
        pass
    assert stopped.value.code == 1
    out, err = capsys.readouterr()
    assert out.count(" done ") == 6
    assert re.fullmatch("losswatch: the sweep's summary cannot be .*: .*summary.csv'\n", err)


def test_a_run_that_cannot_write_its_result_ends_no_sweep(tmp_path, monkeypatch):
    """The other runs are trained; a line names the run, and the exit status is 1."""
    folder = tmp_path / "s" / "seed=0"
    (folder / "result.json").mkdir(parents=True)
    done = run_train(*TINY, "seed=0,1", cwd=tmp_path, status=1)
    assert re.search(rf"{re.escape(str(folder))}: \w+Error: .*result.json", done.stderr)
    assert "Traceback" not in done.stderr
    assert re.search(r"^dice .* 1 of 2  0\.", done.stdout, re.M)
    assert re.search(rf"^{folder.name} +unfinished ", done.stdout, re.M)


def test_result_is_plain_json(tmp_path):
    metrics = {"a": float("nan"), "b": [1.0, float("inf")], "c": {"d": "ä"}}
    Result(metrics=metrics).write(tmp_path)
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    assert "ä" in text
    assert json.loads(text)["metrics"] == {"a": None, "b": [1.0, None], "c": {"d": "ä"}}
