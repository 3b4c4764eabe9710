"""Runs on a folder of images: several devices, what is refused before any work, messages, paths."""

import datetime
import os
import re
import subprocess
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import make_losses, read_result, run_train, slow
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from pytorch_lightning.trainer.states import TrainerFn
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from losswatch import Dice, LossSet, load_loss
from losswatch.config.errors import ConfigError
from losswatch.config.quoting import quoted
from losswatch.data.form import Form
from losswatch.disk.curves import read_curves
from losswatch.run.module import SegmentationModule
from losswatch.run.scores import ImageScores
from losswatch.task import train


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# --- Images are scored by themselves --------------------------------------------------------------


class Mean(nn.Module):
    """Of somebody else: a mean over the pixels that count, NaN where there are none."""

    def forward(self, logits, target):
        return F.cross_entropy(logits, target, ignore_index=-1)


class Squared(Dice):
    """A subclass is foreign to `LossSet`, but sums over ranks as `Dice` does."""

    def forward(self, logits, target):
        return super().forward(logits, target) ** 2


class Broken(nn.Module):
    """NaN on images of 9 rows."""

    def forward(self, logits, target):
        return logits.mean() * (torch.nan if logits.shape[2] == 9 else 1)


FORM = Form(1, ("background", "cell", "nerve"), 2, has_ignored=True)
NAMES = ("cce", "dice", "dice_fg_square", "dice_ce_nnunet", "dice_monai", "dice_kornia")


def ill_losses():
    own = {"mean": Mean(), "squared": Squared(ignore_index=-1), "broken": Broken()}
    return LossSet({name: load_loss(name, ignore_index=-1) for name in NAMES} | own)


def validation():
    """Logits and labels of five images of different sizes, with ignored pixels.

    The second lacks a class, and the fourth has no pixel that counts.
    """
    g = torch.Generator().manual_seed(0)
    pairs = []
    for height in (5, 9, 6, 8, 4):
        logits = 3 * torch.randn(1, 3, height, 7, generator=g)
        pairs.append((logits, torch.randint(-1, 3, (1, height, 7), generator=g)))
    pairs[1][1][pairs[1][1] == 2] = 0
    pairs[3][1].fill_(-1)
    return pairs


def scores_of(pairs):
    losses, scores = ill_losses(), ImageScores(FORM, ill_losses().names)
    for logits, target in pairs:
        scores.add(logits, target, losses)
    return {name: value.item() for name, value in scores.compute_and_reset(None).items()}


def test_an_image_counts_by_its_pixels():
    """One without any counts nothing, whatever a loss makes of it; NaN of another one stays."""
    found, pairs = scores_of(validation()), validation()
    pixels = [(target >= 0).sum().item() for _, target in pairs]
    assert pixels[3] == 0 and Mean()(*pairs[3]).isnan()
    losses = ill_losses()
    for name, loss in zip(losses.names, losses.losses, strict=True):
        values = [loss(*pair).item() for pair, n in zip(pairs, pixels, strict=True) if n]
        mean = np.average(values, weights=[n for n in pixels if n])
        assert found[f"loss/{name}"] == pytest.approx(mean, rel=1e-6, nan_ok=True), name
    assert [name for name, value in found.items() if np.isnan(value)] == ["loss/broken"]


def score_on_rank(rank, file, expected):
    """A loss that waits for another rank raises an error after two minutes."""
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2,
        timeout=datetime.timedelta(minutes=2),
    )  # fmt: skip
    torch.set_num_threads(1)
    for pairs, scores in expected:
        found = scores_of(pairs[rank::2])
        assert found == pytest.approx(scores, rel=0, abs=1e-6, nan_ok=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # see test_losses_ddp.py


def test_two_devices_score_as_one():
    """Five images, three on one rank; four; and two, of which one rank's has no pixel."""
    cases = [validation(), validation()[:4], validation()[2:4]]
    expected = [(pairs, scores_of(pairs)) for pairs in cases]
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            score_on_rank, (f"{folder}/store", expected), nprocs=2, start_method="fork"
        )


# --- Constructors ---------------------------------------------------------------------------------

PUBLIC = {
    "Dice": {"_target_": "losswatch.Dice"},
    "CrossEntropy": {"_target_": "losswatch.CrossEntropy"},
    "Sum": {
        "_target_": "losswatch.Sum",
        "losses": [{"_target_": "losswatch.Dice"}, {"_target_": "losswatch.CrossEntropy"}],
    },
    "load_loss": {"_target_": "losswatch.load_loss", "name": "dice_cce"},
}


@pytest.mark.parametrize("name", PUBLIC)
def test_losses_by_their_public_names_ignore_pixels(name):
    """The value does not depend on the logits under ignored pixels."""
    [loss] = make_losses({"own": PUBLIC[name]}, FORM).losses
    logits, target = validation()[0]
    other = torch.where(target.unsqueeze(1) < 0, 5 * logits, logits)
    assert (target < 0).any() and torch.equal(loss(logits, target), loss(other, target))


class Fails(nn.Module):
    """Its constructor fails for the reason that it gives, which has a cause of its own."""

    def __init__(self, inner=None, through=None):
        super().__init__()
        if through:
            instantiate({"_target_": f"{__name__}.Fails"})
        try:
            raise OSError("the cause")
        except OSError as error:
            raise ValueError("what the\nconstructor says") from error


class Silent(nn.Module):
    def __init__(self):
        super().__init__()
        raise NotImplementedError


FAILS, SILENT = ({"_target_": f"{__name__}.{kind.__name__}"} for kind in (Fails, Silent))
CONSTRUCTORS = {
    "alone": (FAILS, "loss own: what the constructor says"),
    "nested": ({"_target_": "losswatch.Sum", "losses": [FAILS]},
               "loss own: what the constructor says"),
    "by a constructor": (FAILS | {"through": True}, "loss own: what the constructor says"),
    "without a word": (SILENT, "loss own: NotImplementedError"),
    "a preset": (
        {"_target_": "losswatch.load_loss", "name": "dice", "smooth_nr": -1},
        "loss own: loss dice: smooth_nr=-1: allowed is a number at least 0",
    ),
    "a setting": ({"_target_": "losswatch.Dice", "smooth_nr": -1},
                  "loss own: smooth_nr=-1: allowed is a number at least 0"),
    "a name": ({"_target_": "losswatch.Dice", "smoooth": 1},
               "loss own: Dice.__init__() got an unexpected keyword argument 'smoooth'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_the_error_of_a_constructor_is_shown_itself(case):
    node, message = CONSTRUCTORS[case]
    with pytest.raises(ConfigError) as raised:
        make_losses({"own": node}, replace(FORM, has_ignored=False))
    assert str(raised.value) == message


def test_a_damaged_image_is_named(tmp_path, compose):
    make_folder(tmp_path / "a", train=3, val=2)
    path = tmp_path / "a/train/images/1.png"
    path.write_bytes(path.read_bytes()[:200])
    composed = compose("data=folder", f"data.root={tmp_path / 'a'}")
    with pytest.raises(ConfigError, match=f"^data: {path} cannot be read: "):
        composed.plan()


# --- Whole runs -----------------------------------------------------------------------------------

RUN = [
    "data=folder", "data.root=a", "data.patch_size=16", "data.batch_size=4", "model=convnet",
    "trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.accelerator=cpu",
]  # fmt: skip
TWO = ["trainer.devices=2", "trainer.strategy=ddp"]


def make_folder(root, **counts):
    """Images of different sizes, bright where a mask is 1, in train/, val/ and test/.

    Each mask has a row of ignored pixels (9), and the second one of val nothing else.
    """
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros((20 + 3 * i, 24), np.uint8)
            mask[6 : 12 + i, 5:14] = 1
            image = (100 * rng.random(mask.shape) + 120 * mask).astype(np.uint8)
            mask[0 : None if (split, i) == ("val", 1) else 1] = 9
            Image.fromarray(image).save(root / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{i}.png")


def last_line(done):
    line = done.stderr.splitlines()[-1]
    assert line.startswith("losswatch: ") and "Traceback" not in done.stderr, done.stderr
    return line


LACKING = {
    "metric": ["metric=val/dice/nerve"],
    "plateau": ["scheduler=plateau", "metric=val/iou/nerve"],
    "best": ["callbacks=best", "metric=val/dice", "callbacks.best.monitor=val/dice/nerve"],
    "early stopping": ["callbacks=early_stopping", "metric=val/dice/nerve"],
}


@pytest.mark.parametrize("case", LACKING)
def test_a_metric_of_a_class_that_validation_lacks(tmp_path, compose, case):
    make_folder(tmp_path / "a", train=3, val=2)
    for path in (tmp_path / "a/train/masks").iterdir():
        mask = np.array(Image.open(path))
        mask[-3:] = 2
        Image.fromarray(mask).save(path)
    run = [
        *RUN, f"data.root={tmp_path / 'a'}", "data.ignore_index=9",
        "data.classes={background:0,cell:1,nerve:2}",
    ]  # fmt: skip
    with pytest.raises(ConfigError) as raised:
        compose(*run, *LACKING[case]).plan()
    assert "\n" not in str(raised.value)
    assert re.search(
        r"monitors val/dice/nerve, which needs|^metric=val/\w+/nerve needs", str(raised.value)
    )
    assert "class nerve, of which no image of val has a pixel; give val an" in str(raised.value)
    compose(*run, *(part.replace("nerve", "cell") for part in LACKING[case])).plan()


def test_a_share_is_one_image_of_each_device(tmp_path, compose):
    """Otherwise one device would validate without the other, and wait for it."""
    make_folder(tmp_path / "a", train=4, val=3)
    run = [*RUN, *TWO, f"data.root={tmp_path / 'a'}"]
    with pytest.raises(ConfigError, match="limit_val_batches=0.5 of 1 is less than one batch"):
        compose(*run, "+trainer.limit_val_batches=0.5").plan()
    compose(*run, "+trainer.limit_val_batches=1").plan()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Tests may only read it.

    `a`: images to train and validate on, none to test on. `colours`: one image of three channels.
    """
    cwd = tmp_path_factory.mktemp("trained")
    make_folder(cwd / "a", train=3, val=2)
    colours = np.zeros((20, 20, 3), np.uint8)
    (cwd / "colours").mkdir()
    Image.fromarray(colours).save(cwd / "colours/0.png")
    (cwd / "none").mkdir()
    return cwd


@pytest.fixture
def trained(images, compose, monkeypatch):
    """That folder, with a run that was trained on a."""
    monkeypatch.chdir(images)
    if not (images / "run").exists():
        plan = compose(*RUN, "data.ignore_index=9", "trainer.enable_progress_bar=false").plan(
            images / "run"
        )
        plan.folder.mkdir()
        train(plan)
    return images


REFUSED = {
    "no test": (["mode=test"], r"mode=test: the data have no images for a test"),
    "no folder": (["mode=predict", "data.root=no"], r"\bno\b.*folder"),
    "no image": (["mode=predict", "data.root=none"], r"\bnone\b.*no images"),
    "channels": (["mode=predict", "data.root=colours"], r"colours/0.png has 3 channels"),
    "trainer": (
        ["mode=predict", "data.root=colours", "trainer.precision=16-mixed"],
        "trainer.precision=16-mixed needs a GPU",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mode_that_cannot_work_is_refused(trained, compose, case):
    overrides, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as raised:
        compose(*RUN, "checkpoint=run", *overrides).plan()
    assert "\n" not in str(raised.value)


def test_a_mode_that_cannot_work_ends_before_any_work(trained):
    for case, start in (("channels", []), ("no folder", ["-m"])):
        overrides, message = REFUSED[case]
        done = run_train(*start, *RUN, "checkpoint=run", *overrides, cwd=trained, status=2)
        assert re.search(message, last_line(done)), done.stderr
    assert not list(trained.glob("outputs/*/*/result.json"))


@pytest.mark.slow
def test_modes_that_can_work_leave_masks(trained):
    for name, start, root in (("p", [], "a/val/images"), ("q", ["-m"], "a/val/images,a/val")):
        run_train(
            *start, *RUN, "checkpoint=run", "mode=predict", f"data.root={root}",
            f"hydra.run.dir={name}", f"hydra.sweep.dir={name}", cwd=trained,
        )  # fmt: skip
        masks = {path.read_bytes() for path in trained.glob(f"{name}/**/predictions/*.png")}
        assert len(masks) == 2


@pytest.mark.slow
def test_a_run_of_two_devices_validates_and_tests_as_one(tmp_path):
    make_folder(tmp_path / "a", train=4, val=5, test=3)
    (tmp_path / "mine/loss").mkdir(parents=True)
    (tmp_path / "mine/loss/theirs.yaml").write_text(
        "_target_: torch.nn.CrossEntropyLoss\nignore_index: -1\n"
    )
    run = [*RUN, "data.ignore_index=9"]
    watched = ["--config-dir", "mine", *run, "watch=[cce,dice,dice_monai,theirs]"]
    # Devices have batch statistics of their own, so the network with batch norm is trained by one.
    norm = ["model.batch_norm=true"]
    run_train(*watched, *norm, f"hydra.run.dir={tmp_path / 'norm'}", cwd=tmp_path)
    found = []
    for name, more in {"one": [], "two": TWO}.items():
        folder, tested = tmp_path / name, tmp_path / f"{name}-tested"
        run_train(*watched, *more, f"hydra.run.dir={folder}", cwd=tmp_path)
        run_train(
            *watched, *norm, *more, f"hydra.run.dir={tested}", "mode=test", "checkpoint=norm",
            cwd=tmp_path,
        )  # fmt: skip
        assert len(list((tested / "predictions").iterdir())) == 3
        run_train(
            *run, *norm, *more, "mode=predict", "checkpoint=norm", "data.root=a/val/images",
            f"hydra.run.dir={name}-predicted", cwd=tmp_path,
        )  # fmt: skip
        scalars = read_curves(folder).filter(like="val/").dropna(how="all")
        found.append((scalars, *(read_result(f)["metrics"] for f in (folder, tested))))
    (curves, trained, tested), (curves_of_two, trained_by_two, tested_by_two) = found
    assert {"val/loss/theirs", "val/dice", "val/accuracy"} <= {*curves}
    assert len(curves) == 2 and not curves.isna().to_numpy().any()
    np.testing.assert_allclose(curves_of_two[curves.columns], curves, rtol=0, atol=1e-6)
    assert trained_by_two == pytest.approx(trained, abs=1e-6)
    assert tested_by_two == pytest.approx(tested, abs=1e-6)
    for path in (tmp_path / "one-predicted/predictions").iterdir():
        other = tmp_path / "two-predicted/predictions" / path.name
        np.testing.assert_array_equal(Image.open(path), Image.open(other))
    assert len(list((tmp_path / "two-predicted/predictions").iterdir())) == 5
    assert "test/loss/theirs" in trained
    assert tested["test/dice"] == read_result(tmp_path / "norm")["metrics"]["test/dice"]


# --- Names of folders on the command line ---------------------------------------------------------

FOLDERS = [
    "Köln", "a#b", "it's", "my images", "data[1]", "(x)", "~/x", "a=b", "a:b", "2024_05", "1e3",
    "end\\", "$x", 'say "x"', "a!", "`x`", "x (Köln=1)",
]  # fmt: skip
# Hydra takes a comma for a list of values, and a bracket for the beginning of one.
AMBIGUOUS = ["Lund, 2024", "it's,Köln", '[$a] `b` "c"', "{end\\"]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_any_name(compose, name):
    argument = quoted(f"data.root={name}")
    assert quoted(argument) == argument  # as it is given to a second device
    assert compose("data=folder", argument).cfg.data.root == name


def root_of(argument, cwd):
    """data.root as the command understands it."""
    done = run_train("data=folder", argument, "--cfg", "job", cwd=cwd)
    return OmegaConf.create(done.stdout).data.root


def pasted(line):
    """What a shell makes of the setting that a line gives."""
    _, hint = line.split(" quote the value for Hydra: ")
    shell = subprocess.run(["sh", "-c", f"printf %s {hint}"], capture_output=True, text=True)
    return shell.stdout


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_the_line_about_a_name_can_be_pasted_into_a_shell(refusal, compose, name):
    line = refusal("data=folder", f"data.root={name}")
    assert line.startswith(f"data.root={name}: ")
    assert compose("data=folder", quoted(pasted(line))).cfg.data.root == name


@pytest.mark.parametrize("name", [AMBIGUOUS[0], *map(slow, AMBIGUOUS[1:])])
def test_the_command_says_it_and_takes_it(tmp_path, name):
    line = last_line(run_train("data=folder", f"data.root={name}", cwd=tmp_path, status=2))
    assert line.startswith(f"losswatch: data.root={name}: ")
    assert root_of(pasted(line), tmp_path) == name


def test_any_setting_that_hydra_cannot_read(tmp_path, refusal):
    """Text is quoted; a list with a mistake is not."""
    done = run_train("tags=[a", cwd=tmp_path, status=2)
    assert last_line(done) == (
        "losswatch: tags=[a: the value cannot be read; if it is text, quote the value for Hydra: "
        "\"tags='[a'\""
    )
    line = refusal("watch=dice,cce")
    assert "add -m; for a list give watch=[dice,cce]; for text quote" in line
    assert quoted("model.name=Größe 1") == "model.name='Größe 1'"
    assert quoted("loss.name=ö") == "++loss.name='ö'"
    for argument in ("seed=range(start=0,stop=2)", "theta=[0.3,0.6]", "loss=dice,cce", "a b=ö"):
        assert quoted(argument) == argument


@pytest.mark.slow
def test_folders_of_odd_names_are_trained_with(tmp_path):
    names = ["it's [1] #ö", "2024_05"]
    for name in names:
        make_folder(tmp_path / name, train=3, val=2)
    run = [part for part in RUN if not part.startswith("data.root=")]
    run_train(*run, f"data.root={names[0]}", "hydra.run.dir=one", cwd=tmp_path)
    assert read_result(tmp_path / "one")["config"]["data"]["root"] == names[0]
    run_train("-m", *run, f"data.root={','.join(names)}", "hydra.sweep.dir=two", cwd=tmp_path)
    found = {read_result(path.parent)["config"]["data"]["root"]
             for path in tmp_path.glob("two/*/result.json")}  # fmt: skip
    assert found == set(names)


def test_a_plateau_of_a_class_that_a_users_validation_lacks():
    """Which classes a data module of the user's lacks is known at its validation alone."""
    plateau = ReduceLROnPlateau(torch.optim.SGD([torch.zeros(1)]))
    trainer = SimpleNamespace(
        state=SimpleNamespace(fn=TrainerFn.FITTING),
        lr_scheduler_configs=[SimpleNamespace(scheduler=plateau, monitor="val/dice/rare")],
    )
    module = SimpleNamespace(trainer=trainer, _report=lambda split: {"val/dice": torch.tensor(0.5)})
    with pytest.raises(ValueError, match="^metric=val/dice/rare: no validation image has the cla"):
        SegmentationModule.on_validation_epoch_end(module)
    trainer.lr_scheduler_configs[0].monitor = "val/dice"
    SegmentationModule.on_validation_epoch_end(module)
    assert plateau.best == 0.5
