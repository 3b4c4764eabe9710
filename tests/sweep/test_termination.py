"""SIGTERM ends a command as Ctrl-C does, sent to it alone or to all of its processes."""

import os
import signal
import sys
import time
from contextlib import suppress

import pytest
from conftest import ROOT, SERVER, read_result, slow
from disks import SHORT, make_folder
from processes import session

from losswatch.command import Command, Facts
from losswatch.disk.checkpoint_files import newest
from losswatch.disk.curves import read_curves
from losswatch.sweep.exit import clear_errors


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def in_order():
    """Also where the signal comes twice, and once more while the command ends."""
    try:
        terminate()
    finally:
        terminate()
        terminate()


def with_another_error():
    """As of a loader whose worker the signal ended, too."""
    signal.signal(signal.SIGCHLD, lambda *_: 1 / 0)
    try:
        terminate()
    except KeyboardInterrupt:
        os.kill(os.getpid(), signal.SIGCHLD)
        raise RuntimeError("a worker is killed") from None


def a_fork_first():
    """A process that was forked from the command ends by the signal alone."""
    if not (child := os.fork()):
        terminate()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    terminate()


@pytest.mark.parametrize("end", [in_order, with_another_error, a_fork_first])
def test_terminated_in_one_line(capsys, monkeypatch, end):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    child = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(SystemExit) as stopped, clear_errors(Command(Facts()), {}):
        end()
    assert stopped.value.code == 143
    assert capsys.readouterr().err == "losswatch: terminated\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGCHLD, child)


def test_a_handler_of_others_stays(monkeypatch):
    """Such as that of submitit in its jobs."""
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with clear_errors(Command(Facts()), {}):
            terminate()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [1]


def terminated(status, out, said, rows):
    """The table was printed, how to go on, and one line."""
    assert status == 143
    assert said.splitlines()[-1] == "losswatch: terminated"
    assert "Traceback" not in said and "failed" not in out + said
    assert out.count("unfinished") == rows
    assert not rows or "Resume   python" in out


RANDOM = ["experiment=smoke", "trainer.accelerator=cpu"]
FOLDER = [*SHORT, "data.root=a", "model=convnet"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the processes")
@pytest.mark.parametrize(
    "launcher, rows, data",
    [
        ("basic", 1, RANDOM), ("auto", 2, RANDOM), slow("basic", 1, FOLDER),
        slow("auto", 2, FOLDER),
    ],
)  # fmt: skip
def test_all_processes_of_a_sweep_with_loaders(tmp_path, launcher, rows, data):
    """Their workers end by the signal, too; the sweep goes on to no other run."""
    if data == FOLDER:
        make_folder(tmp_path / "a")
    command = [
        "-m", *data, "seed=0,1", "data.num_workers=2",
        "trainer.max_steps=100000", "trainer.val_check_interval=5", "hydra.sweep.dir=s",
        f"hydra/launcher={launcher}", *(["hydra.launcher.workers=2"] if launcher == "auto" else []),
    ]  # fmt: skip
    process = SERVER.start(
        str(ROOT / "train.py"), *command, cwd=tmp_path, env={"XDG_CACHE_HOME": str(tmp_path)}
    )
    try:
        deadline = time.monotonic() + 100
        while len(list(tmp_path.glob("s/*/checkpoints/"))) < rows:
            with suppress(Exception):
                process.wait(timeout=0.05)
            assert process.returncode is None and time.monotonic() < deadline
        time.sleep(0.3)
        assert len(session(process.pid)) >= 3
        os.kill(process.pid, signal.SIGTERM)  # as `timeout` does
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)
        assert not session(process.pid)
    finally:
        process.kill()
        done = process.result()
    terminated(process.returncode, done.stdout, done.stderr, rows)
    for folder in tmp_path.glob("s/*/"):
        result = read_result(folder)
        assert (result["status"], result["error"]) == ("unfinished", "interrupted")
        steps = read_curves(folder)["loss/dice"].dropna().index
        assert list(steps) == list(range(len(steps)))
        assert len(steps) >= newest(folder)[1]["global_step"]
