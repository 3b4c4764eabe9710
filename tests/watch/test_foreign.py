"""Losses and networks of other people: exact numbers, or one line before any work.

The reference is one `torch.autograd.grad` for each loss, in float64, on copies.
"""

import copy
import os
import re
import subprocess
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    ENVIRONMENT,
    ROOT,
    SERVER,
    load_losses,
    probe,
    read_result,
    run_folders,
    run_train,
    slow,
)
from foreign import LOSSES, NETS, monai
from oracle import Oracle, by_copies, truth
from torch import nn
from torch.func import vmap

from losswatch.checks.first_step import try_step
from losswatch.config.errors import ConfigError
from losswatch.config.schema import Probe
from losswatch.data.random import TRAIN, ThresholdedImages
from losswatch.disk.checkpoint_files import find_checkpoint
from losswatch.disk.curves import read_curves
from losswatch.disk.event_log import EventLog
from losswatch.losses import Dice, LossSet
from losswatch.nets import ConvNet
from losswatch.run.build import make_losses
from losswatch.run.module import SegmentationModule
from losswatch.stack.fit import fit
from losswatch.stack.flat_parameters import trained_parameters
from losswatch.stack.member import Member
from losswatch.stack.refusal import NotStackable
from losswatch.stack.step import make_gradient

# Where other processes find `foreign`.
HELPERS = {
    "PYTHONPATH": os.pathsep.join([str(ROOT / "tests/helpers"), os.environ.get("PYTHONPATH", "")])
}

# --- The true numbers ----------------------------------------------------------------------------


def fit_and_compare(make_run, observed, losses, trained, net=None):
    oracle = Oracle()
    run = make_run(
        losses=losses, trained=trained, probe=probe(cosines=True), callbacks=[oracle],
        precision="64-true", validate=False,
    )  # fmt: skip
    if net is not None:
        run.module.net = net
    run.fit()
    assert len(observed) == 4
    torch.testing.assert_close(torch.stack(observed), oracle.table(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("trained", ["it", "dice"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_foreign_loss_trained_and_watched(make_run, observed, name, trained):
    loss = LOSSES[name][0]()
    ours = load_losses("cce", "dice", "dice_fg_square")
    losses = LossSet(dict(zip(ours.names, ours.losses, strict=True)) | {"it": loss})
    fit_and_compare(make_run, observed, losses, trained)


@pytest.mark.parametrize("name", NETS)
def test_a_foreign_network(make_run, observed, name):
    losses = load_losses("cce", "dice", "dice_fg_square", it=monai("DiceLoss", softmax=True))
    torch.manual_seed(3)
    fit_and_compare(make_run, observed, losses, "cce", NETS[name][0]())


def test_a_hook_added_later_counts(make_run, observed):
    losses = load_losses("cce", "dice", "dice_cce")
    losses.losses[1].register_forward_hook(lambda module, args, value: 3 * value)
    fit_and_compare(make_run, observed, losses, "dice")


# --- In stacks: the same numbers, or refused ----------------------------------------------------


class Wide(nn.Module):
    """Converts the images, which are float32, to the precision of its weights."""

    def __init__(self, net):
        super().__init__()
        self.net = net.double()

    def forward(self, x):
        return self.net(x.double())


def stack_or_reason(tmp_path, net, losses, trained):
    """The reason why a stack of two such runs is refused; None if it is trained."""
    batch = ThresholdedImages(0.5, image_size=8, batch_size=3).first_batch()
    form = ThresholdedImages(0.5).form
    traits, _ = try_step(copy.deepcopy(net), losses, trained, torch.optim.SGD, batch, form)
    members = []
    for i in range(2):
        folder = tmp_path / str(i)
        folder.mkdir()
        own = copy.deepcopy(net)
        data = ThresholdedImages([0.5], seed=i, image_size=8, batch_size=3, val_size=3, test_size=3)
        optimizer = torch.optim.SGD(list(trained_parameters(own).values()), lr=0.1)
        log = EventLog(str(folder))
        members.append(Member(folder, own, data, trained, optimizer, log, {"config": {}}, traits))
    options = {"max_steps": 2, "val_check_interval": 2, "accelerator": "cpu",
               "enable_progress_bar": False}  # fmt: skip
    settings = SimpleNamespace(compile=False, probe=Probe(1, False))
    plan = SimpleNamespace(settings=settings, options=options, steps=2, threads=1)
    try:
        fit(members, losses, plan)
    except NotStackable as error:
        return str(error)
    assert all(member.result() for member in members)
    return None


def assert_mapped_step_is_exact(net, losses):
    """The stacked step in float64 equals one `autograd.grad` for each loss."""
    data = ThresholdedImages([0.5], seed=0, image_size=8, batch_size=3)
    names = trained_parameters(net)
    state = net.state_dict()
    flat = torch.cat([state[n].flatten() for n in names])
    rest = {n: state[n][None] for n in state if n not in names}
    numbers = {
        "seed": torch.tensor([0]), "thresholds": data.thresholds[None],
        "low": torch.zeros(1), "high": torch.ones(1),
        "trained": torch.eye(len(losses.names), dtype=torch.float64)[:1],
    }  # fmt: skip
    step = make_gradient(net, losses, (3, 1, 8, 8), observed=True, cosines=True)
    mapped = vmap(step, in_dims=(0, 0, 0, None))
    _, _, seen = mapped(flat[None].double(), rest, numbers, torch.tensor(0))
    wanted = truth(*by_copies(net, losses.losses, *data.draw(TRAIN, 0, 3))).row()
    torch.testing.assert_close(seen[0], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_a_foreign_loss_in_a_stack(tmp_path, name):
    make, reason = LOSSES[name]
    losses = load_losses("cce", "dice", it=make())
    torch.manual_seed(0)
    seen = stack_or_reason(tmp_path, ConvNet(1, 2), losses, "it")
    if reason:
        assert seen and re.search(reason, seen) and "\n" not in seen
    else:
        assert seen is None
        losses = load_losses("cce", "dice", it=make().double())
        assert_mapped_step_is_exact(Wide(ConvNet(1, 2)), losses)


@pytest.mark.parametrize("name", NETS)
def test_a_foreign_network_in_a_stack(tmp_path, name):
    make, reason = NETS[name]
    losses = load_losses("cce", "dice")
    torch.manual_seed(0)
    assert stack_or_reason(tmp_path, make(), losses, "cce") == reason
    if reason is None:
        assert_mapped_step_is_exact(Wide(make()), losses)


# --- The check does what training does, in every launcher ---------------------------------------


@pytest.mark.slow
def test_every_launcher_trains_the_same(tmp_path):
    """The fused launcher trains what cannot be stacked as the basic launcher does."""
    losses = {
        "mine": "foreign.MyDice",
        "learned": "foreign.Learned",
        "old": "foreign.OldStyle",
    }
    for name, target in losses.items():
        file = tmp_path / "conf" / "loss" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"_target_: {target}\n")
    (tmp_path / "conf/model").mkdir()
    (tmp_path / "conf/model/drop.yaml").write_text("_target_: foreign.Dropped\n")
    results = []
    for launcher, workers in ("basic", []), ("fused", ["hydra.launcher.workers=1"]):
        cwd = tmp_path / launcher
        cwd.mkdir()
        done = run_train(
            "-m", "--config-dir", str(tmp_path / "conf"), "experiment=smoke", "model=drop",
            "loss=mine,learned,old", "watch=[cce,dice,mine,old]", f"hydra/launcher={launcher}",
            *workers, cwd=cwd, env=ENVIRONMENT | HELPERS,
        )  # fmt: skip
        if launcher == "fused":
            assert re.search(r"trained one by one: the network draws random numbers", done.stderr)
        runs = run_folders(cwd)
        results.append({n.split("loss=")[1].split(",")[0]: f for n, f in runs.items()})
    for loss, folder in results[0].items():
        other = results[1][loss]
        assert read_result(folder)["metrics"] == read_result(other)["metrics"]
        a, b = read_curves(folder), read_curves(other)
        assert a.equals(b[a.columns]), loss
    # A watched subclass shows the value of its own `forward`, three times Dice's plus one.
    curves = read_curves(results[0]["learned"]).dropna(subset=["loss/mine"])
    np.testing.assert_allclose(curves["loss/mine"], 3 * curves["loss/dice"] + 1, rtol=1e-5)
    np.testing.assert_allclose(curves["grad_norm/mine"], 3 * curves["grad_norm/dice"], rtol=1e-4)


# --- Truth values ------------------------------------------------------------------------------

FLAGS = [
    "model.batch_norm", "+loss.joint", "+loss.include_background", "trainer.deterministic",
    "trainer.benchmark", "trainer.sync_batchnorm", "trainer.enable_progress_bar",
    "++optimizer.nesterov", "++optimizer.maximize", "probe.cosines", "compile",
]  # fmt: skip
# By how it is read: by the schema, by losswatch's classes, PyTorch's and Lightning's.
ONE_OF_EACH = ["compile", "+loss.joint", "++optimizer.nesterov", "trainer.benchmark"]
NUMBERS = ["optimizer.lr", "++optimizer.weight_decay", "model.bn_momentum", "+loss.smooth_nr",
           "trainer.gradient_clip_val", "trainer.max_steps"]  # fmt: skip


def compose_or_refuse(compose, key, value):
    """The value that a run would use; None if it is refused in a line that names the key."""
    from hydra.errors import ConfigCompositionException
    from omegaconf import OmegaConf

    name = key.lstrip("+")
    try:
        composed = compose(
            "experiment=smoke", "optimizer=sgd", "optimizer.momentum=0.9", f"{key}={value}"
        )
        composed.plan()
    except ConfigCompositionException as error:
        assert name in str(error)
        return None
    except ConfigError as error:
        assert name.replace("loss.", "") in str(error), error
        return None
    return OmegaConf.select(composed.cfg, name)


@pytest.mark.parametrize("values", ["few", slow("all")])
@pytest.mark.parametrize("key", FLAGS)
def test_a_truth_value_is_one_or_refused(compose, key, values):
    meant = {"true": True, "on": True, "yes": True, "1": True,
             "false": False, "off": False, "no": False}  # fmt: skip
    more = ("1", "''", "on", "off", "yes", "no", "None")
    for value in ("true", "maybe", *(more if key in ONE_OF_EACH or values == "all" else ())):
        used = compose_or_refuse(compose, key, value)
        assert used is None or used is meant[value], (key, value, used)
    assert compose_or_refuse(compose, key, "false") is False


@pytest.mark.parametrize("value", ["true", "''", slow("off"), slow("maybe")])
@pytest.mark.parametrize("key", NUMBERS)
def test_a_truth_value_is_no_number(compose, key, value):
    assert compose_or_refuse(compose, key, value) is None


# --- One's own files ---------------------------------------------------------------------------


def test_a_loss_file_with_defaults_and_interpolation(tmp_path):
    """It gives the same loss, trained or watched."""
    folder = tmp_path / "conf" / "loss"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "defaults:\n  - dice_square\n  - _self_\nsmooth_nr: ${seed}\nsmooth_dr: ${.smooth_nr}\n"
    )
    run_train(
        "-m", "--config-dir", str(tmp_path / "conf"), "experiment=smoke", "loss=mine,dice",
        "seed=3", "watch=[dice,mine]", "trainer.max_steps=1", cwd=tmp_path,
    )  # fmt: skip
    trained, watched = (read_curves(f)["loss/mine"][0] for f in run_folders(tmp_path).values())
    loss = Dice(exponent=2, smooth_nr=3, smooth_dr=3)
    assert trained == watched and abs(trained - 1) > 1e-3
    [*folders] = run_folders(tmp_path).values()
    square = read_curves(folders[0])["loss/dice"][0]
    assert loss.smooth_nr == 3 and trained != square


def test_a_file_with_a_built_in_name_is_refused(tmp_path):
    folder = tmp_path / "mine" / "loss"
    folder.mkdir(parents=True)
    (folder / "dice.yaml").write_text("_target_: torch.nn.CrossEntropyLoss\n")
    done = run_train("--config-dir", "mine", "experiment=smoke", cwd=tmp_path, status=2)
    line = done.stderr.splitlines()[-1]
    assert re.match(r"losswatch: .*mine/loss/dice.yaml would not be used, but .*another name", line)


def test_make_losses_of_the_zoo(compose):
    """Every loss of conf/loss is made as its file says."""
    composed = compose("experiment=smoke")
    names = composed.planner.sources.losses
    composed.cfg.watch = names
    losses = make_losses(composed.plan())
    assert list(losses.names) == names and not losses.is_foreign("dice")


# --- The same seed, the same numbers ------------------------------------------------------------

DRAWS = [
    "experiment=smoke", "model._target_=foreign.Dropped", "trainer.max_steps=120",
    "loss._target_=foreign.Noisy", "trainer.val_check_interval=20",
]  # fmt: skip


def test_random_draws_repeat_and_resume(tmp_path):
    """A network with dropout and a loss that draws are killed after a checkpoint and resumed."""
    environment = ENVIRONMENT | HELPERS
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_train(*DRAWS, f"hydra.run.dir={whole}", cwd=tmp_path, env=environment)
    process = SERVER.start(
        str(ROOT / "train.py"), *DRAWS, f"hydra.run.dir={cut}", cwd=tmp_path,
        env=HELPERS,
    )  # fmt: skip
    while not list(cut.glob("checkpoints/*.ckpt")):
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.002)
            break
    process.kill()
    assert process.result().returncode != 0, "the run must have been killed before its end"
    run_train(*DRAWS, f"resume={cut}", cwd=tmp_path, env=environment)
    a, b = read_curves(whole), read_curves(cut)
    assert a.equals(b[a.columns])
    assert read_result(whole)["metrics"] == read_result(cut)["metrics"]


@pytest.mark.slow
def test_watching_draws_nothing_from_training(tmp_path):
    """A run is the same with and without a random loss among the watched ones."""
    (tmp_path / "conf/loss").mkdir(parents=True)
    (tmp_path / "conf/loss/noisy.yaml").write_text("_target_: foreign.Noisy\n")
    curves = []
    for watch in ("[cce,dice]", "[cce,dice,noisy]"):
        folder = tmp_path / str(len(watch))
        run_train(
            "--config-dir", str(tmp_path / "conf"), "experiment=smoke", f"watch={watch}",
            "model._target_=foreign.Dropped", f"hydra.run.dir={folder}",
            cwd=tmp_path, env=ENVIRONMENT | HELPERS,
        )  # fmt: skip
        curves.append(read_curves(folder))
    assert curves[0].equals(curves[1][curves[0].columns])
    assert curves[1]["loss/noisy"].notna().any()


@pytest.mark.slow
def test_threads_are_the_configs(tmp_path):
    """The environment does not matter: another number of threads would round otherwise."""
    metrics = []
    for threads in ("1", "2"):
        folder = tmp_path / threads
        run_train(
            "experiment=smoke", f"hydra.run.dir={folder}", cwd=tmp_path,
            env=ENVIRONMENT | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )  # fmt: skip
        metrics.append(read_result(folder)["metrics"])
    assert metrics[0] == metrics[1]


# --- What a loss keeps is kept -----------------------------------------------------------------


@pytest.mark.slow
def test_what_the_trained_loss_learnt_is_tested(tmp_path):
    """mode=test of a finished run gives the run's own test metrics."""
    environment = ENVIRONMENT | HELPERS
    common = ["experiment=smoke", "loss._target_=foreign.Learned", "optimizer.lr=0.1"]
    run_train(*common, "hydra.run.dir=run", cwd=tmp_path, env=environment)
    run_train(
        *common, "mode=test", "checkpoint=run", "hydra.run.dir=test", cwd=tmp_path, env=environment
    )
    trained, tested = (read_result(tmp_path / name)["metrics"] for name in ("run", "test"))
    assert tested == pytest.approx({name: trained[name] for name in tested}, rel=1e-5)
    kept = find_checkpoint(str(tmp_path / "run"))["state_dict"]["loss.temperature"]
    assert kept != 1.5 and "test/loss/dice" in tested


def test_a_stack_leaves_the_checkpoint_of_an_ordinary_run(tmp_path):
    """It holds the buffers of foreign losses, too, so an ordinary run can go on from it."""
    losses = load_losses("cce", it=nn.CrossEntropyLoss(torch.tensor([1.0, 3.0])))
    assert stack_or_reason(tmp_path, ConvNet(1, 2), losses, "it") is None
    module = SegmentationModule(ConvNet(1, 2), losses, "it", torch.optim.SGD)
    for i in (0, 1):
        state = find_checkpoint(str(tmp_path / str(i)))["state_dict"]
        assert {n: t.shape for n, t in state.items()} == {
            n: t.shape for n, t in module.state_dict().items()
        }


# --- An error of somebody's code is that of its runs --------------------------------------------


def test_an_error_in_a_stack_fails_its_runs_alone(tmp_path):
    """They are not trained one by one, and the sweep goes on, whatever the error is."""
    (tmp_path / "conf/loss").mkdir(parents=True)
    for name, error in {"runtime": "RuntimeError", "value": "ValueError"}.items():
        text = f"_target_: foreign.Boom\nerror: {error}\n"
        (tmp_path / f"conf/loss/{name}.yaml").write_text(text)
    done = run_train(
        "-m", "--config-dir", str(tmp_path / "conf"), "experiment=smoke", "hydra/launcher=fused",
        "hydra.launcher.workers=1", "loss=cce", "watch=[cce,dice],[cce,runtime],[cce,value]",
        "seed=0,1",
        cwd=tmp_path, status=1, env=ENVIRONMENT | HELPERS,
    )  # fmt: skip
    assert "one by one" not in done.stderr and "Traceback" not in done.stderr
    results = {name: read_result(folder) for name, folder in run_folders(tmp_path).items()}
    assert len(results) == 6
    for name, result in results.items():
        wanted = {"dice": None, "runtime": "RuntimeError: boom", "value": "ValueError: boom"}
        [error] = [error for loss, error in wanted.items() if loss in name]
        assert (result["status"], result["error"]) == ("failed" if error else "done", error)
        if error:
            assert "Traceback" in (run_folders(tmp_path)[name] / "train.log").read_text()
