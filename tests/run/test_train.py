"""`python train.py ...`: the files of a run, its repetition, and the input that it refuses."""

import io
import os
import re
import shlex
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    ARTICLE,
    ENVIRONMENT,
    ROOT,
    SERVER,
    read_result,
    run_folders,
    run_script,
    run_train,
    signal_at,
)
from hydra.types import RunMode
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

from losswatch import task
from losswatch.config.schema import Probe
from losswatch.config.settings import LATER, Job
from losswatch.disk.curves import read_curves
from losswatch.disk.hparams import add_hparams
from losswatch.disk.result import finished

METRICS = ["accuracy", "dice", "iou", "dice/class_0", "dice/class_1", "iou/class_0", "iou/class_1"]


@pytest.fixture(scope="module")
def events(smoke):
    accumulator = EventAccumulator(str(smoke.folder), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


# --- What a run leaves ---------------------------------------------------------------------------


def test_files(smoke):
    assert smoke.folder.parent.parent == smoke.cwd / "outputs"
    assert smoke.folder.name == "seed=3,experiment=smoke,probe.cosines=true"
    assert len(list(smoke.folder.glob("events.out.tfevents.*"))) == 1
    assert list(smoke.folder.glob("checkpoints/*.ckpt"))
    assert (smoke.folder / "train.log").read_text().count("val Dice") == 1
    assert (smoke.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(smoke.cwd.glob("*.*")), "nothing may lie beside outputs/"


def test_output_is_short(smoke):
    """Without a terminal it prints what runs and how that went, and no progress bar or warning."""
    said = smoke.done.stderr + smoke.done.stdout
    assert "Warning" not in said and "warn" not in said
    lines = said.splitlines()
    assert len(lines) <= 4
    assert any(
        re.search(r"val Dice 0\.\d{4}, IoU 0\.\d{4}, .* in [\d.]+ s", line) for line in lines
    )


def test_watched_scalars(events, smoke):
    scalars = events.Tags()["scalars"]
    for tag in [f"{kind}/{name}" for kind in ("loss", "grad_norm") for name in ARTICLE]:
        seen = events.Scalars(tag)
        assert [e.step for e in seen] == list(range(30))
        assert all(np.isfinite(e.value) and e.value > 0 for e in seen)
    cosines = [tag for tag in scalars if tag.startswith("grad_cosine/")]
    assert len(cosines) == 10 and "grad_cosine/cce~dice" in cosines
    assert all(abs(e.value) <= 1 + 1e-6 for tag in cosines for e in events.Scalars(tag))
    frame = read_curves(smoke.folder)
    assert set(frame.columns) == set(scalars)
    for tag in scalars:  # the record holds what TensorBoard does
        assert frame[tag].dropna().to_dict() == {
            e.step: pytest.approx(e.value, rel=1e-7, abs=1e-45) for e in events.Scalars(tag)
        }
    kinds = [f"{kind}/{name}" for kind in ("loss", "grad_norm") for name in ARTICLE]
    assert smoke.result["watched"] == {tag: frame[tag].dropna().iloc[-1] for tag in kinds}


def test_validation_scalars(events):
    for tag in [*METRICS, *(f"loss/{name}" for name in ARTICLE)]:
        assert [e.step for e in events.Scalars(f"val/{tag}")] == [10, 20, 30]
    shares = [e.value for tag in METRICS for e in events.Scalars(f"val/{tag}")]
    assert all(0 <= share <= 1 for share in shares)
    mean = (
        events.Scalars("val/dice/class_0")[-1].value + events.Scalars("val/dice/class_1")[-1].value
    ) / 2
    assert events.Scalars("val/dice")[-1].value == pytest.approx(mean, rel=1e-6)


def test_images(events):
    """Four rows of input, label and prediction, enlarged six times, in grey frames."""
    assert events.Tags()["images"] == ["images/input_label_prediction", "images/curves"]
    shown = events.Images("images/input_label_prediction")
    assert [image.step for image in shown] == [10, 20, 30]
    side, frame = 6 * 16, 4
    for picture in shown:
        pixels = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)).convert("L"))
        assert pixels.shape == (4 * (side + 2 * frame), 3 * (side + 2 * frame))
        for row in np.split(pixels, 4, axis=0):
            tiles = np.split(row, 3, axis=1)
            for tile in tiles:
                assert set(tile[:frame].flatten()) == {tile[0, 0]}
                assert set(tile[:, -frame:].flatten()) == {tile[0, 0]}
                inner = tile[frame:-frame, frame:-frame]
                assert np.array_equal(inner, inner[::6, ::6].repeat(6, axis=0).repeat(6, axis=1))
            image, label, prediction = (t[frame:-frame:6, frame:-frame:6] for t in tiles)
            assert image.shape == (16, 16)
            assert set(label.flatten()) == {0, 255} and set(prediction.flatten()) <= {0, 255}
            # θ = 0.5 on inputs from 0 to 1, which the picture stretches from the range they fill.
            assert image[label == 255].min() >= 125 and image[label == 0].max() <= 130


def test_curves_are_a_picture_in_tensorboard(events, smoke):
    """Each loss has a colour of its own there; TensorBoard's charts colour by run."""
    [picture] = events.Images("images/curves")
    assert picture.step == 30
    assert picture.encoded_image_string == (smoke.folder / "curves.png").read_bytes()
    with Image.open(smoke.folder / "curves.png") as drawn:
        assert (picture.width, picture.height) == drawn.size


def test_hparams_of_a_sweep(six):
    """What was swept is marked as different, and so shown first."""
    for folder in six.runs.values():
        plugin = EventAccumulator(str(folder)).Reload().PluginTagToContent("hparams")
        data = {tag: HParamsPluginData.FromString(content) for tag, content in plugin.items()}
        infos = data["_hparams_/experiment"].experiment.hparam_infos
        assert {info.name for info in infos if info.differs} == {"loss", "theta"}
        assert {info.name for info in infos} == {
            "loss", "theta", "model", "optimizer", "lr", "seed"
        }  # fmt: skip


def test_hparams_of_other_settings(tmp_path, compose):
    """Each swept key is a column: numbers as numbers, choices by name, of one run all overrides."""
    own = ["+trainer.max_time=null", "data.low=-0.5", "scheduler=cosine", "seed=3", "compile=true"]
    composed = compose(*own, "theta=[0.3,0.6]")
    wanted = {"data.low": "-0.5", "scheduler": "cosine", "seed": "3", "compile": "true"}
    more = {"+trainer.max_time": "null", "theta": "[0.3,0.6]"}
    read = {key.lstrip("+"): value for key, value in (wanted | more).items()}
    assert composed.settings().job.swept == read
    hydra = composed.cfg.hydra
    hydra.mode = RunMode.MULTIRUN
    hydra.job.config.override_dirname.exclude_keys = ["trainer.max_time", "theta"]
    job = Job.read(hydra, tmp_path / "run")
    assert job.swept == wanted
    settings = replace(composed.settings(), job=job)
    with SummaryWriter(tmp_path / "run") as writer:
        add_hparams(writer, settings)
    plugin = EventAccumulator(str(tmp_path / "run")).Reload().PluginTagToContent("hparams")
    data = HParamsPluginData.FromString(plugin["_hparams_/session_start_info"])
    shown = data.session_start_info.hparams
    assert shown["data.low"].number_value == -0.5 and shown["seed"].number_value == 3
    assert shown["scheduler"].string_value == "cosine" and shown["compile"].string_value == "true"
    assert shown["theta"].string_value == "[0.3, 0.6]"


def test_hparams(events, smoke):
    plugin = events.PluginTagToContent("hparams")
    data = {tag: HParamsPluginData.FromString(content) for tag, content in plugin.items()}
    start = data["_hparams_/session_start_info"].session_start_info.hparams
    assert start["loss"].string_value == "dice"
    assert start["theta"].number_value == 0.5
    assert start["model"].string_value == "ConvNet"
    assert start["optimizer"].string_value == "Adam"
    assert start["seed"].number_value == 3
    assert start["lr"].number_value == smoke.result["config"]["optimizer"]["lr"]
    infos = data["_hparams_/experiment"].experiment.metric_infos
    metrics = {info.name.tag for info in infos}
    assert metrics == {f"{s}/{m}" for s in ("val", "test") for m in ("accuracy", "dice", "iou")}
    # Each is the tag of a curve, whose last value is the one in result.json.
    for tag in metrics:
        assert events.Scalars(tag)[-1].value == pytest.approx(
            smoke.result["metrics"][tag], rel=1e-6
        )


def test_custom_scalars_layout(events):
    """One chart holds all losses, another one all gradient norms, as read from the event file."""
    [tensor] = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(tensor.tensor_proto.string_val[0])
    charts = [c for category in layout.category for c in category.chart]
    tags = events.Tags()["scalars"]

    def shown(chart):
        return {tag for tag in tags for regex in chart.multiline.tag if re.search(regex, tag)}

    sets = [shown(chart) for chart in charts]
    assert {f"loss/{name}" for name in ARTICLE} in sets
    assert {f"grad_norm/{name}" for name in ARTICLE} in sets
    assert {tag for tag in tags if tag.startswith("grad_cosine/")} in sets
    assert all(sets)


def test_result(smoke):
    result = smoke.result
    assert result["status"] == "done" and result["error"] is None
    assert result["run"] == smoke.folder.name
    assert result["choices"] == {"loss": "dice", "model": "convnet", "optimizer": "adam"}
    assert result["steps"] == 30 and 0 < result["seconds"] < 60
    assert set(result["metrics"]) >= {f"{s}/{m}" for s in ("val", "test") for m in METRICS}
    assert set(result["metrics"]) >= {f"val/loss/{name}" for name in ARTICLE}
    assert result["config"]["theta"] == 0.5 and result["config"]["seed"] == 3


def test_overrides_are_recorded(smoke):
    hydra = smoke.folder / ".hydra"
    given = ["experiment=smoke", "seed=3", "probe.cosines=true"]
    assert list(OmegaConf.load(hydra / "overrides.yaml")) == given == smoke.result["overrides"]
    config = OmegaConf.create(LATER)
    config.merge_with(OmegaConf.load(hydra / "config.yaml"))
    config = OmegaConf.to_container(config, resolve=True)
    assert {key: config[key] for key in config if key not in LATER} == smoke.result["config"]
    assert config["data"]["image_size"] == 16 and config["probe"]["cosines"] is True


def test_checkpoint_is_plain_and_of_the_last_step(smoke):
    [file] = smoke.folder.glob("checkpoints/*.ckpt")
    assert file.name == "step=30.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    assert checkpoint["global_step"] == 30
    assert checkpoint["state_dict"]


# --- The same seed gives the same numbers --------------------------------------------------------


@pytest.mark.slow
def test_repeats_itself_also_with_workers(smoke, tmp_path):
    """The smoke run again, in a sweep with other numbers of workers and another seed.

    One run after the other: a stack rounds differently.
    """
    run_train(
        "-m", "experiment=smoke", "seed=3,4", "probe.cosines=true", "data.num_workers=0,2",
        "hydra/launcher=basic", cwd=tmp_path,
    )  # fmt: skip
    wanted = read_curves(smoke.folder)
    folders = run_folders(tmp_path)
    assert len(folders) == 4
    for name, folder in folders.items():
        frame = read_curves(folder)
        assert set(frame.columns) == set(wanted.columns) and len(frame) == len(wanted)
        assert frame[wanted.columns].equals(wanted) == ("seed=3" in name), name


# --- Other people's parts ------------------------------------------------------------------------

OWN = '''
import torch
from torch import nn


class Mine(nn.Module):
    """Mean squared error of the softmax."""

    def __init__(self, power=2.0):
        super().__init__()
        self.power = power

    def forward(self, logits, target):
        p = logits.float().softmax(1)
        y = nn.functional.one_hot(target, p.shape[1]).movedim(-1, 1)
        return (p - y).abs().pow(self.power).mean()


def net(in_channels, num_classes, dims, width):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 1), nn.Tanh(), nn.Conv2d(width, num_classes, 1)
    )
'''


BOOM = """
class Boom(Mine):
    def forward(self, logits, target):
        if not torch.is_grad_enabled():  # in validation, which is not tried before
            raise RuntimeError("boom\\nsecond line")
        return super().forward(logits, target)
"""


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A sweep with a user's losses and network, a loss of MONAI's, and a loss that fails."""
    cwd = tmp_path_factory.mktemp("own losses, networks")
    (cwd / "mine.py").write_text(OWN + BOOM)
    for path, text in {
        "loss/mse": "_target_: mine.Mine\npower: 2.0",
        "loss/boom": "_target_: mine.Boom",
        "loss/monai": "_target_: losswatch.losses.OneHotTarget\n"
        "loss: {_target_: monai.losses.GeneralizedDiceLoss, softmax: true}",
        "model/mine": "_target_: mine.net\nwidth: 3\nin_channels: ${form.in_channels}\n"
        "num_classes: ${form.channels}\ndims: ${form.dims}",
    }.items():
        file = cwd / "conf" / f"{path}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    path = os.pathsep.join([str(cwd), os.environ.get("PYTHONPATH", "")])
    done = run_train(
        "-m", "--config-dir", "conf", "experiment=smoke", "model=mine", "loss=mse,boom",
        "theta=0.5,[0.3,0.6]", "watch=[cce,mse,monai]",
        f"tags=[{','.join(LONG)}]", "+trainer.default_root_dir='a b/\"c\"; d'",
        "trainer.max_steps=4",
        cwd=cwd, status=1, env=ENVIRONMENT | {"PYTHONPATH": path},
    )  # fmt: skip
    runs = {name: read_result(folder) for name, folder in run_folders(cwd).items()}
    return cwd, done, runs


LONG = ["dice_log", "dice_tversky", "dice_gamma", "dice_jaccard", "dice_kornia_macro", "dice_flat"]


def test_own_losses_and_network(others):
    cwd, _, runs = others
    assert len(runs) == 4
    for name, result in runs.items():
        if result["choices"]["loss"] == "boom":
            continue
        assert result["status"] == "done" and result["choices"]["model"] == "mine"
        frame = read_curves(run_folders(cwd)[name])
        for loss in ("cce", "mse", "monai"):
            assert len(frame[f"loss/{loss}"].dropna()) == 4
            assert (frame[f"grad_norm/{loss}"].dropna() > 0).all()
        classes = 3 if isinstance(result["config"]["theta"], list) else 2
        assert f"val/dice/class_{classes - 1}" in result["metrics"]
        assert f"val/dice/class_{classes}" not in result["metrics"]


def test_a_failing_run_ends_no_sweep(others):
    cwd, done, runs = others
    failed = {name for name, result in runs.items() if result["status"] == "failed"}
    assert failed == {n for n, result in runs.items() if result["choices"]["loss"] == "boom"}
    assert len(failed) == 2
    for name in failed:
        assert runs[name]["error"] == "RuntimeError: boom second line"
        assert "Traceback" in (run_folders(cwd)[name] / "train.log").read_text()
    assert "Traceback" not in done.stderr and done.stderr.count("boom second line") == 2
    [file] = cwd.glob("outputs/*/summary.csv")
    summary = pd.read_csv(file)
    assert sorted(summary.status) == ["done", "done", "failed", "failed"]
    assert set(summary.error.dropna()) == {"RuntimeError: boom second line"}


def test_folder_names_of_long_and_strange_overrides(others):
    _, _, runs = others
    for name in runs:
        assert len(name.encode()) <= 150 and re.fullmatch(r"[\w.,=+~@\[\]-]+", name)


# --- Help ----------------------------------------------------------------------------------------


def test_help_is_worth_reading(tmp_path):
    shown = run_train("--help", cwd=tmp_path).stdout
    for text in (
        "loss: cce, ", "model: convnet, monai_unet, smp_unet, unet", "optimizer: adam", "smoke",
        "data: folder, random", "theta=0.05,0.5,0.95", "batch_size: 8", "tensorboard --logdir",
    ):  # fmt: skip
        assert text in shown
    assert not list(tmp_path.iterdir())


# --- Interrupted ---------------------------------------------------------------------------------


def test_interrupted_run_loses_nothing(tmp_path):
    """Control-C: all steps are on disk, and the command printed goes on with the run.

    Its folder has a name to be quoted, and is named from where the command was given.
    """
    options = ["experiment=smoke", "hydra.job.chdir=true", "hydra.run.dir=a b,c"]
    done = run_script(signal_at(signal.SIGINT, 15), *options, cwd=tmp_path)
    assert done.returncode != 0
    assert "Traceback" not in done.stdout + done.stderr
    folder = tmp_path / "a b,c"
    assert read_result(folder)["status"] == "unfinished"
    steps = read_curves(folder)["loss/dice"].dropna().index
    validated = read_curves(folder)["val/accuracy"].dropna().index
    assert list(steps) == list(range(len(steps)))
    assert len(steps) > validated.max() == 10, "the last block was lost"
    *_, resume, last = done.stderr.splitlines()
    assert last == "losswatch: interrupted"
    word, python, program, *arguments = shlex.split(resume)
    assert (word, python, program) == ("Resume", "python", str(ROOT / "train.py"))
    assert arguments[-1] == "resume=a b,c"
    again = run_train(*arguments, cwd=tmp_path)
    assert "resumed from step 10" in again.stderr
    assert read_result(folder)["status"] == "done"


def test_a_checkout_in_a_folder_of_any_name(tmp_path):
    """Only what follows the program is quoted: Lightning starts further ranks by its path, too."""
    program = tmp_path / "a=1,b=2 c" / "train.py"
    program.parent.mkdir()
    shutil.copy(ROOT / "train.py", program)
    options = ["experiment=smoke", "+trainer.max_time=00:00:00:00"]
    fork = SERVER.start(str(program), *options, "loss.exponent=2", cwd=tmp_path)
    fork.wait(60)
    done = fork.result()
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("Resume")]
    [folder] = run_folders(tmp_path).values()
    assert f"unfinished after 0 of 30 steps: {folder.relative_to(tmp_path)}\n" in done.stderr
    assert shlex.split(line) == [
        "Resume", "python", str(program), *options, "++loss.exponent=2",
        f"resume={folder.relative_to(tmp_path)}",
    ]  # fmt: skip


def test_curves_without_an_event_file(tmp_path):
    """A finished run whose event file somebody removed is done all the same."""
    job = SimpleNamespace(base=tmp_path.parent, folder=tmp_path)
    settings = SimpleNamespace(trained="dice", job=job, probe=Probe(1, False))
    task._draw_curves(SimpleNamespace(folder=tmp_path, settings=settings), step=3)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_a_run_that_observes_nothing_has_no_picture(tmp_path):
    settings = SimpleNamespace(trained="dice", probe=Probe(0, False))
    task._draw_curves(SimpleNamespace(folder=tmp_path, settings=settings), step=3)
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_drawn(tmp_path, compose, caplog):
    """The run is done all the same; it is drawn when the same command is given again."""
    (picture := tmp_path / "run" / "curves.png").mkdir(parents=True)
    command = ["experiment=smoke", "trainer.max_steps=2"]
    done = run_train(*command, "hydra.run.dir=run", cwd=tmp_path)
    [said] = [line for line in done.stderr.splitlines() if "cannot be drawn" in line]
    assert said.startswith("run/curves.png cannot be drawn: IsADirectoryError: ")
    assert "Traceback" not in done.stderr
    assert read_result(tmp_path / "run")["status"] == "done"
    picture.rmdir()
    caplog.set_level("INFO")
    task._skip(finished(tmp_path / "run"), compose(*command).plan(tmp_path / "run"))
    assert "done before, skipped" in caplog.text and "cannot be drawn" not in caplog.text
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_picture_that_is_missing_on_the_command_line(smoke, tmp_path):
    """Nothing else of the finished run is changed."""
    shutil.copytree(smoke.folder, tmp_path / "run")
    (tmp_path / "run/curves.png").unlink()
    given = ["experiment=smoke", "seed=3", "probe.cosines=true", "resume=run"]
    again = run_train(*given, cwd=tmp_path)
    assert "done before, skipped" in again.stderr and "cannot be drawn" not in again.stderr
    assert (tmp_path / "run/curves.png").read_bytes().startswith(b"\x89PNG")
    wanted = (smoke.folder / "result.json").read_bytes()
    assert (tmp_path / "run/result.json").read_bytes() == wanted
