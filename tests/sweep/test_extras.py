"""Hydra's other launchers and its optuna sweeper, run on this machine."""

import importlib.util
import os
import shutil
from types import SimpleNamespace

import hydra
import pandas as pd
import pytest
from conftest import ENVIRONMENT, ROOT, read_result, run_folders, run_train
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.types import HydraContext
from omegaconf import OmegaConf

from losswatch.command import Command, Facts
from losswatch.config import schema as config
from losswatch.disk.curves import read_curves
from losswatch.sweep.exit import clear_errors
from losswatch.sweep.outer import _outer_launcher
from losswatch.sweep.parts import Context

# Otherwise Ray leaves a token in the home folder, and colours in the output that it repeats.
ENVIRONMENT = ENVIRONMENT | {"RAY_AUTH_MODE": "disabled", "RAY_COLOR_PREFIX": "0"}


def plugin(name, choice):
    """A test's parameter, skipped where the plugin is not installed."""
    there = importlib.util.find_spec(f"hydra_plugins.{name}") is not None
    marks = [pytest.mark.skipif(not there, reason=f"{name} is not installed")]
    if choice == "submitit_slurm":  # where tmp_path is on one machine only, give --basetemp
        absent = shutil.which("sbatch") is None
        marks.append(pytest.mark.skipif(absent, reason="there is no Slurm here (sbatch)"))
    return pytest.param(choice, marks=[*marks, pytest.mark.slow])


def table(printed):
    """The rows of the printed table, without the seconds."""
    lines = printed.strip().split("\n\n")[0].splitlines()
    rule = "\N{BOX DRAWINGS LIGHT HORIZONTAL}"
    head, *rows = [line.split() for line in lines if line.strip(f" {rule}")]
    at = head.index("seconds")
    return [head, *([cell for i, cell in enumerate(row) if i != at] for row in rows)]


LAUNCHERS = [
    plugin("hydra_joblib_launcher", "joblib"),
    plugin("hydra_submitit_launcher", "submitit_local"),
    plugin("hydra_submitit_launcher", "submitit_slurm"),
    plugin("hydra_ray_launcher", "ray"),
]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_sweep_is_the_basic_launchers(six, tmp_path, launcher):
    """Six runs: the same table, summary.csv and curves, in one folder that all processes share."""
    done = run_train(
        "-m", f"hydra/launcher={launcher}", "experiment=smoke", "loss=dice,cce",
        "theta=0.05,0.5,0.95", cwd=tmp_path, env=ENVIRONMENT,
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
        pd.testing.assert_frame_equal(read_curves(run), read_curves(six.runs[name]))
        assert read_result(run)["config"] == read_result(six.runs[name])["config"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_failing_run_is_seen_from_outside(failing, tmp_path, launcher):
    done = run_train(
        "-m", *failing.arguments, f"hydra/launcher={launcher}", "loss=dice,boom", cwd=tmp_path,
        env=failing.env, status=1,
    )  # fmt: skip
    rows = [row for row in table(done.stdout) if row[0] in ("dice", "boom")]
    assert [row[:1] + row[7:] for row in rows] == [
        ["boom", "failed", "RuntimeError:", "boom"], ["dice", "done", "\N{EN DASH}"]
    ]  # fmt: skip
    [log] = tmp_path.glob("outputs/*/*loss=boom*/train.log")
    assert "Traceback" in log.read_text()


# --- Fused groups as the jobs of another launcher ------------------------------------------------

GROUPED = ["-m", "hydra/launcher=fused", "experiment=smoke", "hydra.launcher.max_members=2"]
GRID = ["loss=dice,cce", "theta=0.05,0.5,0.95"]


def outcome(cwd):
    """A sweep's folder, and its summary without the seconds."""
    [folder] = (cwd / "outputs").iterdir()
    return folder, pd.read_csv(folder / "summary.csv").drop(columns="seconds")


def files(folder):
    """All files of a sweep; names of event files without the time and the host."""
    names = {str(p.relative_to(folder)).split(".tfevents")[0] for p in folder.rglob("*")}
    return {name for name in names if not name.startswith(".submitit")}


def training_line(said):
    [line] = [line for line in said.splitlines() if line.startswith("training ")]
    return line


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """Six runs in three groups by the fused launcher alone."""
    cwd = tmp_path_factory.mktemp("grouped")
    done = run_train(*GROUPED, *GRID, "hydra.launcher.workers=1", cwd=cwd)
    folder, summary = outcome(cwd)
    return SimpleNamespace(done=done, folder=folder, runs=run_folders(cwd), summary=summary)


@pytest.mark.slow
@pytest.mark.parametrize("outer", LAUNCHERS)
def test_groups_through_another_launcher(grouped, tmp_path, outer):
    """Three jobs for six runs give the same files and numbers as the fused launcher alone."""
    done = run_train(
        *GROUPED, *GRID, f"hydra.launcher.outer={outer}", cwd=tmp_path, env=ENVIRONMENT
    )
    line = training_line(done.stderr)
    assert line.startswith("training 3 jobs of up to 2 runs, by ")
    assert outer.partition("_")[2 if "_" in outer else 0] in line.lower()
    folder, summary = outcome(tmp_path)
    pd.testing.assert_frame_equal(summary, grouped.summary)
    assert len(summary) == 6 and set(summary.status) == {"done"}
    assert table(done.stdout) == table(grouped.done.stdout)
    assert files(folder) == files(grouped.folder)
    for name, run in run_folders(tmp_path).items():
        pd.testing.assert_frame_equal(read_curves(run), read_curves(grouped.runs[name]))
        ours, theirs = (read_result(f) | {"seconds": 0} for f in (run, grouped.runs[name]))
        assert ours == theirs
    if outer.startswith("submitit"):
        assert len(list(folder.glob(".submitit/*/*_result.pkl"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("outer", LAUNCHERS)
def test_a_failing_run_within_a_group_of_another_launcher(tmp_path, outer):
    done = run_train(
        *GROUPED, "optimizer.lr=1e-3,1e30,1e-2", f"hydra.launcher.outer={outer}",
        cwd=tmp_path, env=ENVIRONMENT, status=1,
    )  # fmt: skip
    _, summary = outcome(tmp_path)
    assert dict(zip(summary.lr, summary.status, strict=True)) == {
        1e-3: "done", 1e30: "failed", 1e-2: "done"
    }  # fmt: skip
    assert summary.error[summary.lr == 1e30].item().startswith("FloatingPointError: ")
    assert done.stdout.count("FloatingPointError") == 1 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_groups_one_after_another(six, tmp_path):
    """The outer launcher given by its config; the values are those of the basic launcher."""
    outer = "+hydra/launcher@hydra.launcher.outer=basic"
    done = run_train(*GROUPED, *GRID, outer, cwd=tmp_path)
    said = training_line(done.stderr)
    assert said == "training 3 jobs of up to 2 runs, by BasicLauncher"
    folder, summary = outcome(tmp_path)
    theirs = pd.read_csv(six.folder / "summary.csv").drop(columns="seconds")
    pd.testing.assert_frame_equal(summary, theirs, rtol=1e-3, atol=1e-3)
    runs = {path.name for path in folder.iterdir()} - {"summary.csv", "multirun.yaml"}
    assert runs == six.runs.keys()


@pytest.mark.slow
def test_groups_taken_up_again(grouped, tmp_path):
    """Only the missing runs are given to the outer launcher."""
    args = [*GROUPED, "hydra.launcher.outer=basic", "hydra.sweep.dir=outputs/again"]
    run_train(*args, "loss=dice,cce", "theta=0.05,0.5", cwd=tmp_path)
    done = run_train(*args, *GRID, "hydra.launcher.max_members=null", cwd=tmp_path)
    assert training_line(done.stderr) == (
        "training 1 job of up to 2 runs, by BasicLauncher "
        "(hydra.launcher.max_members sets how large); 4 runs done before"
    )
    _, summary = outcome(tmp_path)
    pd.testing.assert_frame_equal(summary, grouped.summary, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "outer, said",
    [
        ("rey", "there is no hydra/launcher=rey; hydra/launcher is one of auto, basic, fused, "),
        ("submitit_pbs", 'pip install -e ".[submitit]" adds submitit_pbs'),
        ("fused", "hydra.launcher.outer takes the name of another launcher (hydra.launcher.outer="),
        ({"partition": "gpu"}, "hydra.launcher.outer takes the name of another launcher (hydra."),
    ],
)
def test_an_outer_launcher_that_is_none(capsys, outer, said):
    config.register()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = hydra.compose("config", ["hydra/launcher=fused"], return_hydra_config=True)
        context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks())
        with pytest.raises(SystemExit) as stopped, clear_errors(Command(Facts()), {}):
            given = OmegaConf.create({"outer": outer}).outer
            _outer_launcher(given, [], Context(context, None, cfg))
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("losswatch: ") and said in line


# --- Search --------------------------------------------------------------------------------------

SHORT = ["trainer.max_steps=20", "trainer.val_check_interval=20", "data.image_size=16",
         "data.batch_size=2", "data.val_size=8", "data.test_size=8"]  # fmt: skip


@pytest.mark.parametrize("experiment", [plugin("hydra_optuna_sweeper", "optuna")])
def test_search(tmp_path, experiment):
    """Six trials of the example: all are in the table, and the best is written to a file."""
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
    searched = ",".join(rf"{key}=[\d.e-]+" for key in ("loss.alpha", "loss.beta", "optimizer.lr"))
    assert summary.run.str.fullmatch(rf"trial=\d,{searched}").all()
    found = OmegaConf.load(folder / "optimization_results.yaml")
    best = summary.loc[summary.dice.idxmax()]
    assert found.best_value == pytest.approx(best.dice)
    assert best.dice > summary.dice.min()
    values = ["optimizer.lr", "loss.alpha", "loss.beta"]
    wanted = best[["lr", "loss.alpha", "loss.beta"]].astype(float)
    assert [found.best_params[v] for v in values] == pytest.approx(list(wanted))


@pytest.mark.parametrize("sweeper", [plugin("hydra_optuna_sweeper", "optuna")])
@pytest.mark.parametrize(
    "options, wanted",
    [
        (
            [],
            "a search by metric=val/dice needs hydra.sweeper.direction=maximize, got minimize",
        ),
        (
            ["metric=val/loss/cce", "hydra.sweeper.direction=maximize"],
            "a search by metric=val/loss/cce needs hydra.sweeper.direction=minimize, got maximize",
        ),
    ],
)
def test_a_search_for_the_worst(tmp_path, sweeper, options, wanted):
    done = run_train("-m", f"hydra/sweeper={sweeper}", *options, *SHORT, cwd=tmp_path, status=2)
    assert done.stderr.splitlines()[-1] == f"losswatch: {wanted}"


@pytest.mark.slow
@pytest.mark.parametrize("sweeper", [plugin("hydra_optuna_sweeper", "optuna")])
def test_a_search_goes_on_after_a_failed_trial(failing, tmp_path, sweeper):
    """A failed trial has no score. If no trial has one, there is the table and a line."""
    search = [
        "-m", *failing.arguments, f"hydra/sweeper={sweeper}", "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.direction=maximize",
    ]  # fmt: skip
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
        arguments=[
            "--config-dir",
            str(folder),
            "experiment=smoke",
            "watch=[cce]",
            "trainer.max_steps=60",
            "trainer.val_check_interval=60",
        ],
        env=ENVIRONMENT | {"PYTHONPATH": path},
    )


BOOM = """
from losswatch.losses import Dice


class Boom(Dice):
    calls = 0

    def forward(self, logits, target):
        self.calls += 1
        if self.calls > 30:  # the check before training needs fewer
            raise RuntimeError("boom")
        return super().forward(logits, target)
"""
