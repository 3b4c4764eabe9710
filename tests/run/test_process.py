"""The switches of the process: set for a run, and as before at its end."""

import logging
import random
import threading
import warnings

import numpy as np
import pytest
import torch

from losswatch.disk.curves import read_curves
from losswatch.disk.event_log import EventLog
from losswatch.nets import ConvNet
from losswatch.run import planner
from losswatch.run import train as run
from losswatch.run.process import only_errors, quiet, run_process
from losswatch.run.randomness import get_state


def switches():
    """All that `run_process` sets, as plain values."""
    state = get_state()
    return {
        "threads": torch.get_num_threads(),
        "denormals": float(torch.tensor(1e-40) * 1),
        "oneDNN": torch.backends.mkldnn.enabled,
        "torch": state["torch"].tolist(),
        "numpy": state["numpy"][1].tolist(),
        "python": state["python"],
        "thread errors": threading.excepthook,
        "levels": [logging.getLogger(n).level for n in ("pytorch_lightning", "hydra.utils")],
        "warnings": list(warnings.filters),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_the_process_as_it_was(fails):
    net = ConvNet(1, 2)
    before = switches()
    within = None
    try:
        with run_process(net, threads=before["threads"] + 1, seed=7):
            within = switches()
            torch.rand(1), np.random.rand(), random.random()
            if fails:
                raise RuntimeError("boom")
    except RuntimeError:
        assert fails
    assert switches() == before
    assert within["threads"] == before["threads"] + 1 and within["denormals"] == 0
    same = [name for name in before if within[name] == before[name]]
    assert same == [], "each of them must have been set"


def test_the_seed_is_that_of_the_run():
    drawn = []
    for seed in (3, 4, 3, None):
        with run_process(ConvNet(1, 2), seed=seed):
            drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert drawn[0] == drawn[2] and len(set(drawn)) == 3


def test_a_failed_run_leaves_no_thread(compose, tmp_path):
    """Of TensorBoard's writer: a sweep of many failing runs would keep one for each."""
    composed = compose(
        "experiment=smoke", "model=convnet", "trainer.accelerator=cpu", "optimizer.lr=1e30",
        "trainer.enable_progress_bar=false",
    )  # fmt: skip
    before = set(threading.enumerate())
    for name in ("a", "b"):
        with pytest.raises(FloatingPointError, match="step 1: "):
            run.train(composed.plan(tmp_path / name))
    assert set(threading.enumerate()) == before
    assert list(read_curves(tmp_path / "b")["loss/dice"].dropna().index) == [0]


def test_an_event_file_that_cannot_be_closed_hides_no_error(tmp_path, monkeypatch):
    def fail(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(EventLog, "close", fail)
    with pytest.raises(FloatingPointError), EventLog(str(tmp_path)):
        raise FloatingPointError
    with pytest.raises(OSError, match="No space"), EventLog(str(tmp_path)):
        pass


def failing_thread(error):
    def fail():
        raise error

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()


def test_a_full_disk_is_not_reported_by_threads(capsys):
    """The next write of the run fails and is reported; other errors of threads are shown."""
    with quiet():
        failing_thread(OSError(28, "No space left on device"))
        assert capsys.readouterr().err == ""
        failing_thread(ValueError("a bug"))
        assert "ValueError: a bug" in capsys.readouterr().err


def test_quiet_inside_quiet():
    with quiet():
        within = switches()
        with quiet():
            pass
        assert switches() == within


@pytest.mark.parametrize("enabled", [True, False])
def test_only_errors(caplog, enabled):
    log = logging.getLogger("losswatch.test")
    with caplog.at_level(logging.DEBUG), only_errors(enabled):
        log.warning("a warning")
        log.error("an error")
    log.warning("after")
    said = [record.getMessage() for record in caplog.records]
    assert said == [*([] if enabled else ["a warning"]), "an error", "after"]


# --- Threads -------------------------------------------------------------------------------------


def test_threads_of_a_run(compose, tmp_path, monkeypatch, caplog):
    """`auto` takes more than one where layers are large, for a single run on free cores."""
    caplog.set_level("INFO", "losswatch")
    monkeypatch.setattr(planner, "cpu_count", lambda: 6)
    monkeypatch.setattr(planner, "FLOPS_OF_THREAD", {2: 2e5})
    # Three convolutions: 3 x 3 from 1 to 8 and from 8 to 8 channels, 1 x 1 from 8 to 2; a
    # multiplication and an addition for each weight and pixel of 2 images of 16 x 16.
    flops = 2 * (9 * 8 + 9 * 8 * 8 + 8 * 2) * 2 * 16**2 / 3
    small = ["experiment=smoke", "model.width=8"]

    def threads(*overrides, **where):
        return compose(*small, *overrides).plan(tmp_path, **where).threads

    assert compose(*small).plan(tmp_path).traits.layer_flops == pytest.approx(flops)
    assert threads("threads=auto") == int(flops / 2e5) == 1
    assert not caplog.messages
    assert threads("threads=auto", "data.image_size=32") == int(4 * flops / 2e5) == 4
    assert caplog.messages[0].startswith("4 CPU threads; ")
    assert threads("threads=auto", "data.image_size=64") == 6
    assert threads("threads=auto", "data.image_size=64", is_sweep=True) == 1
    assert threads("threads=3") == 3
    monkeypatch.setattr(planner, "FLOPS_OF_THREAD", {3: 1.0})  # as for signals of one axis
    assert threads("threads=auto", "data.image_size=64") == 1
