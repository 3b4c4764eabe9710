"""The groups logger, callbacks and scheduler, `metric`, and keys that nothing reads."""

import functools
import itertools
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import read_result, run_folders, run_train, slow
from lightning_utilities.core.imports import RequirementCache
from omegaconf import OmegaConf
from pytorch_lightning import loggers
from pytorch_lightning.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from losswatch import task
from losswatch.config.errors import ConfigError
from losswatch.data.loaders import RemainingBatches
from losswatch.disk.result import Result
from losswatch.disk.resume import find_start
from losswatch.run.build import make_loggers, make_scheduler
from losswatch.run.module import SegmentationModule

QUICK = ["experiment=smoke", "trainer.max_steps=12", "trainer.val_check_interval=4"]


@pytest.fixture
def train_here(compose, tmp_path):
    """train_here(...) -> the folder of a short run in this process, without `result.json`.

    The same folder again resumes the run.
    """

    def train_here(*arguments, folder="run"):
        folder = tmp_path / folder
        folder.mkdir(exist_ok=True)
        task.train(compose(*QUICK, *arguments).plan(folder))
        return folder

    return train_here


@pytest.fixture
def cut_here(train_here, monkeypatch, tmp_path):
    """cut_here(...): a run as of `train_here` that is interrupted in its seventh step.

    It has a checkpoint of the validation after four steps.
    """
    step, calls = SegmentationModule.training_step, itertools.count(1)

    def training_step(*arguments):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return step(*arguments)

    def cut_here(*arguments, folder="run"):
        with monkeypatch.context() as patched:
            patched.setattr(SegmentationModule, "training_step", training_step)
            with pytest.raises((KeyboardInterrupt, SystemExit)):  # Lightning exits after Ctrl-C
                train_here(*arguments, folder=folder)
        assert find_start(tmp_path / folder).step == 4

    return cut_here


def train(cwd, *arguments, **options):
    """The folder of a short run by the command, which also writes `result.json`."""
    run_train(*QUICK, *arguments, "hydra.run.dir=run", cwd=cwd, **options)
    return cwd / "run"


def curve(folder, tag):
    return [(e.step, e.value) for e in EventAccumulator(str(folder)).Reload().Scalars(tag)]


# --- Loggers -------------------------------------------------------------------------------------


def test_a_second_logger_gets_the_same_numbers(train_here):
    folder = train_here("logger=[tensorboard,csv]", "watch=[cce,dice]")
    frame = pd.read_csv(folder / "csv/version_0/metrics.csv").set_index("step")
    for tag in ("loss/cce", "grad_norm/dice", "val/dice", "val/loss/cce", "test/accuracy"):
        steps, values = zip(*curve(folder, tag), strict=True)
        found = frame[tag].dropna()
        assert list(found.index) == list(steps)
        assert list(found) == pytest.approx(values, rel=1e-6)
    assert len(frame["loss/cce"].dropna()) == 12


@pytest.mark.filterwarnings("ignore")  # their own
@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_loggers_of_services(tmp_path, name, monkeypatch):
    pytest.importorskip(name)
    more = ["logger.wandb.offline=true"] if name == "wandb" else []
    more += ["tags=[pilot,new data]"]
    folder = train(tmp_path, f"logger={name}", *more)
    wanted = curve(folder, "val/dice/class_1")
    if name == "wandb":
        [run] = (folder / "wandb").rglob("offline-run-*")
        assert list((run / "files/media").rglob("*.png"))
        [log] = run.glob("*.wandb")
        for text in (b'["pilot","new data"]', b"trainer.max_steps"):  # of the settings
            assert text in log.read_bytes()
        return
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [experiment] = client.search_experiments(filter_string="name = 'losswatch'")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.data.params["tags"] == "['pilot', 'new data']"
    assert run.data.params["trainer.max_steps"] == "12"
    history = client.get_metric_history(run.info.run_id, "val/dice/class_1")
    assert [(m.step, m.value) for m in history] == [
        (step, pytest.approx(value, rel=1e-6)) for step, value in wanted
    ]


class Remote(CSVLogger):
    """A logger that begins a run on a server as soon as it is made."""

    made: ClassVar[list[str]] = []

    def __init__(self, save_dir, project, name="", group: str | None = None):
        super().__init__(save_dir, name)
        self.made.append(project)


REMOTE = f"+logger.remote={{_target_:{__name__}.Remote,project:mine,save_dir:logs}}"


def test_the_check_makes_no_logger(compose, tmp_path, monkeypatch):
    monkeypatch.setattr(Remote, "made", [])
    composed = compose(*QUICK, REMOTE, "logger.remote.save_dir=${run.folder}/logs")
    for _ in range(2):
        plan = composed.plan()
    assert Remote.made == []
    [logger] = make_loggers(plan)
    assert logger.save_dir == str(plan.folder / "logs")
    assert Remote.made == ["mine"]


WRONG_LOGGERS = {
    "+logger.remote.projekt=x": "logger.remote: got an unexpected keyword argument 'projekt'",
    "~logger.remote.project": "logger.remote: missing a required argument: 'project'",
    "+logger.remote.group=3": "logger.remote.group must be text or null, got 3",
    "logger.remote._target_=torch.nn.ReLU": "logger.remote: got an unexpected keyword argument",
    "+logger.x._target_=torch.nn.Module": "logger.x: .*got an unexpected keyword argument|"
    "logger.x: torch.nn.Module must make a Logger, it makes a Module",
    "+logger.comet._target_=pytorch_lightning.loggers.CometLogger": "logger.comet: .*'nosuch",
}


@pytest.mark.parametrize("overrides", WRONG_LOGGERS)
def test_a_logger_that_cannot_be_made_is_found_before_training(compose, monkeypatch, overrides):
    monkeypatch.setattr(loggers.comet, "_COMET_AVAILABLE", RequirementCache("nosuch>=1"))
    monkeypatch.setattr(Remote, "made", [])
    run = compose(*QUICK, REMOTE, overrides)
    with pytest.raises(ConfigError, match=f"^(?:{WRONG_LOGGERS[overrides]})") as raised:
        run.plan()
    assert "\n" not in str(raised.value) and not Remote.made


# --- Callbacks -----------------------------------------------------------------------------------


def test_early_stopping_ends_a_run_that_counts_as_done(tmp_path):
    command = [
        *QUICK, "callbacks=early_stopping", "callbacks.early_stopping.patience=2",
        "optimizer.lr=1e-12", "trainer.max_steps=100",
    ]  # fmt: skip
    done = run_train(*command, "hydra.run.dir=run", cwd=tmp_path)
    assert re.search(
        r"^early stopping after 12 of 100 steps: Mon.* val/dice did", done.stderr, re.M
    )
    folder = tmp_path / "run"
    result = read_result(folder)
    assert (result["status"], result["steps"]) == ("done", 12)
    assert [step for step, _ in curve(folder, "val/dice")] == [4, 8, 12]
    assert "test/dice" in result["metrics"]
    again = run_train(*command, "resume=run", cwd=tmp_path)
    assert "done before, skipped" in again.stderr


def test_the_best_checkpoint_is_that_of_the_metric(tmp_path):
    folder = train(
        tmp_path, "callbacks=[best,lr_monitor]", "metric=val/loss/cce", "optimizer.lr=0.05",
        "trainer.max_steps=24",
    )  # fmt: skip
    values = dict(curve(folder, "val/loss/cce"))
    best = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)
    assert best["global_step"] == min(values, key=values.get)
    assert sorted(path.name for path in folder.glob("checkpoints/*.ckpt")) == [
        "best.ckpt", "step=24.ckpt",
    ]  # fmt: skip
    tags = EventAccumulator(str(folder)).Reload().Tags()["scalars"]
    assert "lr-Adam" in tags
    tested = run_train(
        "experiment=smoke", "mode=test", "checkpoint=run/checkpoints/best.ckpt", cwd=tmp_path
    )
    assert "test Dice" in tested.stderr


# --- Schedulers ----------------------------------------------------------------------------------

RATES = {
    "cosine": lambda i: 0.5e-2 * (1 + math.cos(math.pi * i / 12)),
    "warmup": lambda i: 1e-2 * (0.01 + 0.99 * min(i, 6) / 6),
}


@pytest.mark.parametrize("name", ["cosine", slow("warmup")])
def test_the_rate_over_the_training(train_here, name):
    more = ["scheduler.total_iters=6"] if name == "warmup" else []
    folder = train_here(f"scheduler={name}", *more, "optimizer.lr=1e-2", "callbacks=lr_monitor")
    steps, values = zip(*curve(folder, "lr-Adam"), strict=True)
    assert list(values) == pytest.approx([RATES[name](i) for i in range(len(steps))], rel=1e-4)


@pytest.mark.parametrize("metric", [slow("val/accuracy"), "val/loss/dice"])
def test_a_plateau_lowers_the_rate(train_here, metric):
    """At each validation after the first, all of them alike; a loss is better the smaller it is."""
    folder = train_here(
        "scheduler=plateau", "scheduler.patience=0", "optimizer.lr=1e-12",
        "callbacks=lr_monitor", "+scheduler.eps=0", f"metric={metric}",
        "trainer.accumulate_grad_batches=2",
    )  # fmt: skip
    rates = [*dict(curve(folder, "lr-Adam")).values()]  # the last one that each step begins with
    assert rates == pytest.approx([1e-12] * 8 + [3e-13] * 4, rel=1e-4, abs=0)


def test_resuming_keeps_scheduler_and_patience(train_here, cut_here, device):
    """Bit for bit: the optimiser's rate and the count of validations go on where they were."""
    options = [
        f"trainer.accelerator={device}",
        "scheduler=cosine", "callbacks=[early_stopping,best]", "trainer.max_steps=24",
        "callbacks.early_stopping.patience=50",
    ]  # fmt: skip
    whole = train_here(*options, folder="whole")
    cut_here(*options, folder="half")
    half = train_here(*options, folder="half")
    states = [
        torch.load(folder / "checkpoints/step=24.ckpt", weights_only=True)
        for folder in (whole, half)
    ]
    for key, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][key])
    assert states[0]["lr_schedulers"] == states[1]["lr_schedulers"]
    waits = [
        next(s["wait_count"] for name, s in state["callbacks"].items() if "Early" in name)
        for state in states
    ]
    assert waits[0] == waits[1]


@pytest.mark.parametrize(
    "option, why",
    [
        ("scheduler=cosine", "a scheduler needs the ordinary step"),
        slow("logger=csv", "logger=csv needs the ordinary step"),
        slow("callbacks=best", "callbacks=best needs the ordinary step"),
    ],
)
def test_compiled_runs_say_that_they_are_not(train_here, caplog, option, why):
    train_here(option, "compile=true")
    assert f"not compiled: {why}" in caplog.text


# --- The metric ----------------------------------------------------------------------------------


def test_the_score_is_the_metric(smoke):
    """What a search gets: the value of `metric` in result.json."""
    result = Result.read(smoke.folder)
    assert result.score("val/dice/class_1") == result.metrics["val/dice/class_1"]
    tested = replace(result, config={"mode": "test"})
    assert tested.score("val/dice/class_1") == result.metrics["test/dice/class_1"]
    assert math.isnan(replace(tested, metrics={}).score("val/dice"))


# --- Errors and settings in a run --------------------------------------------------------------


class Later(torch.nn.Module):
    """A loss, or a network, that fails at a later call."""

    def __init__(self, call, **sizes):
        super().__init__()
        self.call, self.calls = call, 0
        self.net = torch.nn.Conv2d(1, 2, 1)

    def forward(self, x, target=None):
        self.calls += 1
        if self.calls == self.call:
            raise RuntimeError("two\nlines")
        return self.net(x) if target is None else F.cross_entropy(x, target)


@pytest.mark.parametrize("what", ["loss", "model"])
def test_an_error_of_any_call_in_the_check_is_one_line(compose, what):
    """Found at each call that the check makes, and at no call that it does not make."""
    refused = []
    for call in range(1, 9):
        options = ["model=convnet", "model.width=1"] if what == "loss" else []
        composed = compose(*QUICK, *options, "watch=[cce]")
        composed.cfg[what] = OmegaConf.create({"_target_": f"{__name__}.Later", "call": call})
        try:
            composed.plan()
        except ConfigError as error:
            assert str(error) in ("loss dice: two lines", "model: two lines")
            refused.append(call)
    assert refused == list(range(1, len(refused) + 1)) and len(refused) >= 2


def test_a_folder_of_checkpoints_for_all_runs_of_a_sweep_is_refused(compose, tmp_path):
    run = compose(*QUICK, "callbacks=best", f"callbacks.best.dirpath={tmp_path}")
    with pytest.raises(ConfigError, match=f"^callbacks: all runs of a sweep would .* {tmp_path}; "):
        run.plan(is_sweep=True)
    run.plan()


@pytest.mark.parametrize(
    "options, mode",
    [
        (["metric=val/loss/cce"], "min"),
        (["metric=val/dice"], "max"),
        (["metric=val/dice", "callbacks.best.monitor=val/loss/cce"], "min"),
    ],
)
def test_a_loss_is_better_the_smaller_it_is(compose, options, mode):
    assert compose("callbacks=best", *options).settings().callbacks["best"]["mode"] == mode


@pytest.mark.parametrize("kind", ["subclass", "without an end"])
def test_schedulers_of_the_users(compose, monkeypatch, kind):
    """A plateau is one by its class; `total_steps` means something to OneCycleLR alone."""

    class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
        pass

    class Endless(torch.optim.lr_scheduler.ExponentialLR):
        total_steps = None

    chosen = Plateau if kind == "subclass" else functools.partial(Endless, gamma=0.9)
    monkeypatch.setattr(torch.optim.lr_scheduler, "Own", chosen, raising=False)
    compose(*QUICK, "+scheduler._target_=torch.optim.lr_scheduler.Own").plan()
    run = compose(*QUICK, "+scheduler._target_=torch.optim.lr_scheduler.Own")
    settings = make_scheduler(run.settings())(torch.optim.SGD([torch.zeros(1)], lr=0.1))
    assert (settings["frequency"] > 2**31) == (kind == "subclass")


def test_each_knob_of_a_loss_can_be_changed(tmp_path):
    """Also those that its file does not name; folder and table show the plain override."""
    run_train(
        "-m", *QUICK, "loss=dice", "loss.alpha=0.3,0.7", "probe.every_n_steps=0",
        "trainer.max_steps=1", cwd=tmp_path,
    )  # fmt: skip
    runs = run_folders(tmp_path)
    alphas = {read_result(folder)["config"]["loss"]["alpha"] for folder in runs.values()}
    assert alphas == {0.3, 0.7}
    assert all("loss.alpha=0." in name and "+" not in name for name in runs)
    [sweep] = {folder.parent for folder in runs.values()}
    assert set(pd.read_csv(sweep / "summary.csv")["loss.alpha"]) == {0.3, 0.7}


def test_validations_are_counted_in_steps_not_in_batches(train_here):
    folder = train_here("trainer.accumulate_grad_batches=2", "trainer.val_check_interval=5")
    assert [step for step, _ in curve(folder, "val/accuracy")] == [5, 10, 12]


# --- Presets for finding bugs --------------------------------------------------------------------


def test_overfit_trains_on_one_batch_again_and_again(train_here):
    folder = train_here("experiment=overfit", "model=convnet", "optimizer.lr=1e-12")
    losses = [value for _, value in curve(folder, "loss/dice")]
    assert losses == pytest.approx([losses[0]] * 12, rel=1e-6)


def test_two_batches_take_turns_in_a_resumed_run_too(train_here, cut_here):
    options = ["data.batches=2", "optimizer.lr=1e-12"]
    cut_here(*options)
    losses = [value for _, value in curve(train_here(*options), "loss/dice")]
    assert losses == pytest.approx(losses[:2] * 6, rel=1e-6)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    trainer = SimpleNamespace(max_steps=7, accumulate_grad_batches=1, global_step=3)
    assert list(RemainingBatches(trainer, 3)) == [0, 1, 2, 0]
    assert list(RemainingBatches(trainer)) == [3, 4, 5, 6]


def test_one_step_goes_all_the_way(tmp_path):
    """Also in a folder whose path has equals signs."""
    run_train("experiment=one_step", "model=convnet", "hydra.run.dir=a=b/c=d", cwd=tmp_path)
    result = read_result(tmp_path / "a=b/c=d")
    assert (result["status"], result["steps"]) == ("done", 1)
    assert {"val/dice", "test/dice"} <= set(result["metrics"])
    assert "max_steps" in json.dumps(result["config"])
    assert (tmp_path / "a=b/c=d/curves.png").exists()


@pytest.mark.parametrize("profiler", ["simple", slow("advanced")])
def test_a_profile_is_a_file_of_the_run(tmp_path, profiler):
    done = run_train(
        "experiment=profile", "model=convnet", "trainer.max_steps=3", "hydra.run.dir=run",
        f"trainer.profiler={profiler}", cwd=tmp_path,
    )  # fmt: skip
    assert "the profile goes to run/*-profile.txt" in done.stderr
    assert "run_training_batch" in (tmp_path / "run/fit-profile.txt").read_text()
