"""Hydra's own launchers and its optuna sweeper, for real on this machine."""

import importlib.util
import os
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import ENVIRONMENT, read_result, run_folders, run_train
from omegaconf import OmegaConf

from losswatch.report import read_scalars

# Ray would leave a token in the home folder, and colours in what it repeats.
ENVIRONMENT = ENVIRONMENT | {"RAY_AUTH_MODE": "disabled", "RAY_COLOR_PREFIX": "0"}


def plugin(name, choice, slow=True):
    """A test's parameter, which is skipped where the plugin is missing."""
    there = importlib.util.find_spec(f"hydra_plugins.{name}") is not None
    marks = [pytest.mark.skipif(not there, reason=f"{name} is not installed")]
    return pytest.param(choice, marks=marks + [pytest.mark.slow] * slow)


def table(printed):
    """The printed table's rows but for the seconds."""
    lines = printed[: printed.index("Summary")].splitlines()
    rule = "\N{BOX DRAWINGS LIGHT HORIZONTAL}"
    head, *rows = [line.split() for line in lines if line.strip(f" {rule}")]
    at = head.index("seconds")
    return [head, *([cell for i, cell in enumerate(row) if i != at] for row in rows)]


@pytest.mark.parametrize(
    "launcher",
    [
        plugin("hydra_joblib_launcher", "joblib", slow=False),
        plugin("hydra_submitit_launcher", "submitit_local"),
        plugin("hydra_ray_launcher", "ray"),
    ],
)
def test_a_sweep_is_the_basic_launchers(six, tmp_path, launcher):
    """Six runs: the same table, summary.csv and curves, in one folder that all processes share."""
    done = run_train(
        "-m", f"hydra/launcher={launcher}", "experiment=smoke", "loss=dice,cce",
        "theta=0.05,0.5,0.95", cwd=tmp_path, env=ENVIRONMENT, timeout=600,
    )  # fmt: skip
    [folder] = (tmp_path / "outputs").iterdir()
    assert len(table(done.stdout)) == 7 and table(done.stdout) == table(six.done.stdout)
    ours, theirs = (
        pd.read_csv(sweep / "summary.csv").drop(columns="seconds") for sweep in (folder, six.folder)
    )
    pd.testing.assert_frame_equal(ours, theirs)
    runs = run_folders(tmp_path)
    assert runs.keys() == six.runs.keys()
    for name, run in runs.items():
        pd.testing.assert_frame_equal(read_scalars(run), read_scalars(six.runs[name]))
        assert read_result(run)["config"] == read_result(six.runs[name])["config"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        plugin("hydra_joblib_launcher", "joblib"),
        plugin("hydra_submitit_launcher", "submitit_local"),
        plugin("hydra_ray_launcher", "ray"),
    ],
)
def test_a_failing_run_is_seen_from_outside(failing, tmp_path, launcher):
    done = run_train(
        "-m", *failing.arguments, f"hydra/launcher={launcher}", "loss=dice,boom", cwd=tmp_path,
        env=failing.env, status=1, timeout=600,
    )  # fmt: skip
    rows = [row for row in table(done.stdout) if row[0] in ("dice", "boom")]
    assert [row[:1] + row[7:] for row in rows] == [
        ["boom", "failed", "RuntimeError:", "boom"], ["dice", "done", "\N{EN DASH}"]
    ]  # fmt: skip
    [log] = tmp_path.glob("outputs/*/*loss=boom*/train.log")
    assert "Traceback" in log.read_text()


# --- Search --------------------------------------------------------------------------------------

SHORT = ["trainer.max_steps=20", "trainer.val_check_interval=20", "data.image_size=16",
         "data.batch_size=2", "data.val_size=8", "data.test_size=8"]  # fmt: skip


@pytest.mark.parametrize("experiment", [plugin("hydra_optuna_sweeper", "optuna", slow=False)])
def test_search(tmp_path, experiment):
    """The example: six trials, the best of them written down, all of them in the table."""
    done = run_train(
        "-m", f"experiment={experiment}", "hydra.sweeper.n_trials=6", *SHORT, cwd=tmp_path
    )
    [folder] = (tmp_path / "outputs").iterdir()
    summary = pd.read_csv(folder / "summary.csv")
    assert len(summary) == 6 and set(summary.status) == {"done"}
    assert done.stdout.count(" done ") == 6
    assert summary.lr.between(1e-4, 1e-1).all() and summary.lr.nunique() == 6
    assert summary["loss.alpha"].between(0.1, 0.9).all() and summary["loss.beta"].nunique() == 6
    assert sorted(summary.run.str.split(",").str[0]) == [f"trial={i}" for i in range(6)]
    found = OmegaConf.load(folder / "optimization_results.yaml")
    best = summary.loc[summary.accuracy.idxmax()]
    assert found.best_value == pytest.approx(best.accuracy)
    assert best.accuracy > summary.accuracy.min()
    values = ["optimizer.lr", "loss.alpha", "loss.beta"]
    wanted = best[["lr", "loss.alpha", "loss.beta"]].astype(float)
    assert [found.best_params[v] for v in values] == pytest.approx(list(wanted))


@pytest.mark.slow
@pytest.mark.parametrize("sweeper", [plugin("hydra_optuna_sweeper", "optuna")])
def test_a_search_goes_on_after_a_failed_trial(failing, tmp_path, sweeper):
    """It has no score; where none has one, the table comes all the same, and a line."""
    search = ["-m", *failing.arguments, f"hydra/sweeper={sweeper}", "hydra.sweeper.n_jobs=1"]
    done = run_train(
        *search, "hydra.sweeper.n_trials=5", "loss=choice(boom,dice)", "seed=range(0,100)",
        "hydra.sweeper.sampler.seed=0", "hydra.sweeper.max_failure_rate=1",
        cwd=tmp_path, env=failing.env, status=1,
    )  # fmt: skip
    [folder] = (tmp_path / "outputs").iterdir()
    summary = pd.read_csv(folder / "summary.csv")
    assert len(summary) == 5 and set(summary.status) == {"done", "failed"}
    assert OmegaConf.load(folder / "optimization_results.yaml").best_params.loss == "dice"
    assert "Traceback" not in done.stderr

    done = run_train(
        *search, "hydra.sweeper.n_trials=1", "loss=boom", "seed=range(0,100)",
        cwd=tmp_path, env=failing.env, status=1,
    )  # fmt: skip
    assert "RuntimeError: boom" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("losswatch: the sweep ended early: ValueError: ")
    assert "Traceback" not in done.stderr


@pytest.fixture
def failing(tmp_path_factory):
    """Arguments and environment of smoke runs that know a loss `boom`, which raises in training."""
    folder = tmp_path_factory.mktemp("failing")
    (folder / "loss").mkdir()
    (folder / "loss" / "boom.yaml").write_text("_target_: boom.Boom\n")
    (folder / "boom.py").write_text(BOOM)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return SimpleNamespace(
        arguments=["--config-dir", str(folder), "experiment=smoke", "watch=[cce]"],
        env=ENVIRONMENT | {"PYTHONPATH": path},
    )


BOOM = """
from losswatch.losses import Dice


class Boom(Dice):
    def forward(self, logits, target):
        if logits.shape[-1] == 16:  # not in the check before training
            raise RuntimeError("boom")
        return super().forward(logits, target)
"""
