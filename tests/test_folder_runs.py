"""Runs on a folder of images: several devices, metrics and modes that cannot work, messages."""

import datetime
import os
import tempfile

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import read_result, run_folders, run_train
from PIL import Image
from torch import nn

from losswatch import Dice, LossSet, load_loss
from losswatch.data.form import Form
from losswatch.events.series import read_scalars
from losswatch.train.evaluation import ImageScores


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
    return {name: value.item() for name, value in scores.take(None).items()}


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
    """A loss that waited for the other rank would raise an error after some seconds."""
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=20),
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
        mp.spawn(score_on_rank, (f"{folder}/store", expected), nprocs=2)


# --- Whole runs -----------------------------------------------------------------------------------

RUN = [
    "data=folder", "data.root=a", "data.patch_size=16", "data.batch_size=4", "model=convnet",
    "trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.accelerator=cpu",
]  # fmt: skip
TWO = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.sync_batchnorm=true"]


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


@pytest.mark.slow
def test_a_run_of_two_devices_validates_and_tests_as_one(tmp_path):
    make_folder(tmp_path / "a", train=4, val=5, test=3)
    (tmp_path / "mine/loss").mkdir(parents=True)
    (tmp_path / "mine/loss/theirs.yaml").write_text(
        "_target_: torch.nn.CrossEntropyLoss\nignore_index: -1\n"
    )
    run = [*RUN, "model.batch_norm=true", "data.ignore_index=9", "watch=[cce,dice,dice_monai,theirs]"]
    found = []
    for name, more in {"one": [], "two": TWO}.items():
        folder, tested = tmp_path / name, tmp_path / f"{name}-tested"
        run_train("--config-dir", "mine", *run, *more, f"hydra.run.dir={folder}", cwd=tmp_path)
        run_train(
            "--config-dir", "mine", *run, *more, f"hydra.run.dir={tested}", "mode=test",
            "checkpoint=one", cwd=tmp_path,
        )  # fmt: skip
        assert len(list((tested / "predictions").iterdir())) == 3
        run_train(
            *run[:-1], *more, "mode=predict", "checkpoint=one", "data.root=a/val/images",
            f"hydra.run.dir={name}-predicted", cwd=tmp_path,
        )  # fmt: skip
        scalars = read_scalars(folder).filter(like="val/").dropna(how="all")
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
    assert "test/loss/theirs" in trained and tested["test/dice"] == trained["test/dice"]
