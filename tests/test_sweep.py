"""`python train.py -m ...`: the six-run sweep, its table, and the grid checked beforehand."""

import json
import re

import pandas as pd
import pytest
from conftest import read_result, run_train
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import OmegaConf

from losswatch import sweep
from losswatch.report import read_scalars
from losswatch.result import write_result

THETAS = [0.05, 0.5, 0.95]


def test_six_runs(six):
    wanted = {f"experiment=smoke,loss={loss},theta={t}" for loss in ("dice", "cce") for t in THETAS}
    assert set(six.runs) == wanted
    for folder in six.runs.values():
        result = read_result(folder)
        assert result["status"] == "done"
        assert len(read_scalars(folder)["loss/cce"].dropna()) == 30


def test_runs_differ_only_as_asked(six):
    """The same images and first weights for both losses: the first observation is shared."""
    for theta in THETAS:
        a, b = (
            read_scalars(six.runs[f"experiment=smoke,loss={loss},theta={theta}"])
            for loss in ("dice", "cce")
        )
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


def test_what_is_said(six):
    counted = re.findall(r"run (\d) of (\d): (.*)", six.done.stderr)
    assert [(i, n) for i, n, _ in counted] == [(str(i), "6") for i in range(1, 7)]
    assert counted[0][2] == "experiment=smoke loss=dice theta=0.05"
    table = six.done.stdout
    for head in ("loss", "θ", "optimiser", "BN", "accuracy", "Dice", "IoU", "seconds", "status"):
        assert head in table
    rows = [line.split() for line in table.splitlines() if line.strip().endswith("done")]
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
    ],
)
def test_grid_is_checked_before_the_first_run(tmp_path, arguments, message):
    done = run_train("-m", "experiment=smoke", *arguments.split(), cwd=tmp_path, status=2)
    [line] = (done.stdout + done.stderr).splitlines()
    assert re.match(f"losswatch: .*{message}.*nothing was started", line)
    assert not list(tmp_path.glob("outputs/*/*/"))


# --- Parts ---------------------------------------------------------------------------------------


def test_grid_is_the_basic_sweepers():
    node = {
        "hydra": {
            "sweeper": {"params": {"optimizer.lr": "0.1,0.2"}},
            "overrides": {"task": ["theta=0.5,[0.3,0.6]", "loss=dice", "seed=range(0,3)"]},
        }
    }
    jobs = sweep.grid(OmegaConf.create(node))
    assert len(jobs) == len({tuple(job) for job in jobs}) == 2 * 2 * 3
    assert ["optimizer.lr=0.2", "theta=[0.3,0.6]", "loss=dice", "seed=2"] in jobs


def test_explain_is_one_line(compose):
    errors = {}
    for override in ("loss=dise", "data.imagesize=3", "modl=unet", "data.batch_size=x", "theta"):
        with pytest.raises((ConfigCompositionException, sweep.HydraException)) as raised:
            compose(override)
        errors[override] = sweep.explain(raised.value)
    assert errors["loss=dise"].startswith("there is no loss=dise; loss is one of cce, ")
    assert errors["data.imagesize=3"].startswith("there is no data.imagesize; data has image_size,")
    assert errors["modl=unet"].startswith("there is no modl; the config has theta, seed, ")
    assert "data.batch_size=x" in errors["data.batch_size=x"]
    assert not any("\n" in line or "http" in line for line in errors.values())


def test_clear_errors(capsys, monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    error = MissingConfigException("no", missing_cfg_file="loss/x", options=["a", "b"])
    with pytest.raises(SystemExit) as stopped, sweep.clear_errors():
        raise error
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "losswatch: there is no loss=x; loss is one of a, b\n"
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(MissingConfigException), sweep.clear_errors():
        raise error


def test_result_is_plain_json(tmp_path):
    metrics = {"a": float("nan"), "b": [1.0, float("inf")], "c": {"d": "ä"}}
    write_result(tmp_path, {"metrics": metrics})
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    assert "ä" in text
    assert json.loads(text) == {"metrics": {"a": None, "b": [1.0, None], "c": {"d": "ä"}}}
