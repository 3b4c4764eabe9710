"""data=folder: files as their libraries write them, layouts, patches, and whole runs."""

import json
import subprocess
import sys
import time

import imagecodecs  # noqa: F401 - for TIFFs that are compressed
import nibabel
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
import torch.nn.functional as F
from conftest import ENVIRONMENT, ROOT, make_losses, read_result, run_folders, run_train
from disks import SHORT, disks, make_folder, save
from oracle import gradients, truth
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from losswatch import CrossEntropy, Dice, LossSet, Observer, Sum
from losswatch.checks.images import check_images
from losswatch.config.errors import ConfigError
from losswatch.data.folder import FolderImages
from losswatch.data.form import Form
from losswatch.data.reading import read
from losswatch.data.writing import write_mask
from losswatch.disk.resume import check_folder
from losswatch.run import build
from losswatch.run.callbacks import Images
from losswatch.run.module import SegmentationModule
from losswatch.run.scores import ImageScores
from losswatch.task import train as run_task

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# --- Files ---------------------------------------------------------------------------------------

FILES = {
    "grey.png": RNG.integers(0, 255, (5, 7), np.uint8),
    "grey16.png": RNG.integers(0, 60000, (5, 7), np.uint16),
    "colour.png": RNG.integers(0, 255, (5, 7, 3), np.uint8),
    "alpha.png": RNG.integers(0, 255, (5, 7, 4), np.uint8),
    "grey.tif": RNG.integers(0, 255, (5, 7), np.uint8),
    "grey16.tif": RNG.integers(0, 60000, (5, 7), np.uint16),
    "colour16.tif": RNG.integers(0, 60000, (5, 7, 3), np.uint16),
    "float.tif": RNG.random((5, 7)).astype(np.float32),
    "volume.tif": RNG.integers(0, 60000, (6, 5, 7), np.uint16),
    "flat.nii.gz": RNG.integers(0, 999, (5, 7), np.int16),
    "volume.nii.gz": RNG.integers(0, 999, (5, 7, 4), np.int16),
    "channels.nii": RNG.integers(0, 999, (5, 7, 4, 2), np.int16),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_as_they_were_written(tmp_path, name):
    array = FILES[name]
    save(tmp_path / name, array)
    found = read(tmp_path / name, is_mask=False).array
    if name == "alpha.png":
        array = array[..., :3]
    if name == "flat.nii.gz":
        found = found[..., 0]
    has_channels = name.startswith(("colour", "alpha", "channels"))
    np.testing.assert_array_equal(found, np.moveaxis(array, -1, 0) if has_channels else array[None])


def test_compressed_and_planar_tiffs(tmp_path):
    array = RNG.integers(0, 60000, (5, 7, 3), np.uint16)
    for i, options in enumerate(({"compression": "lzw"}, {"compression": "zlib"})):
        tifffile.imwrite(tmp_path / f"{i}.tif", array, photometric="rgb", **options)
        np.testing.assert_array_equal(
            read(tmp_path / f"{i}.tif", is_mask=False).array, np.moveaxis(array, 2, 0)
        )
    planar = np.ascontiguousarray(np.moveaxis(array, 2, 0))
    tifffile.imwrite(tmp_path / "p.tif", planar, photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read(tmp_path / "p.tif", is_mask=False).array, planar)


def test_a_jpeg_is_nearly_what_was_written(tmp_path):
    [(picture, _)] = disks(1, channels=3)
    save(tmp_path / "a.jpg", picture)
    found = np.moveaxis(read(tmp_path / "a.jpg", is_mask=False).array, 0, 2)
    assert found.shape == picture.shape
    assert np.corrcoef(found.ravel(), picture.ravel())[0, 1] > 0.85


def test_a_palette_is_colours_of_an_image_and_classes_of_a_mask(tmp_path):
    """As the masks of PASCAL VOC are."""
    indices = RNG.integers(0, 3, (5, 7), np.uint8)
    file = Image.fromarray(indices).convert("P")
    file.putdata(indices.ravel().tolist())
    palette = [0, 0, 0, 128, 0, 0, 0, 128, 0]
    file.putpalette(palette)
    file.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png", is_mask=True).array[0], indices)
    colours = np.array(palette, np.uint8).reshape(3, 3)[indices]
    np.testing.assert_array_equal(
        read(tmp_path / "a.png", is_mask=False).array, np.moveaxis(colours, 2, 0)
    )


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.nii.gz"])
def test_a_written_mask_is_read_again(tmp_path, name):
    [(picture, _)] = disks(1)
    save(tmp_path / name, picture)
    labels = RNG.integers(0, 300, picture.shape)
    path = write_mask(labels, tmp_path / "out" / "a", tmp_path / name)
    assert path.name == name
    np.testing.assert_array_equal(np.squeeze(read(path, is_mask=True).array), labels)
    if name == "a.nii.gz":
        np.testing.assert_array_equal(nibabel.load(path).affine, np.diag([2.0, 1, 1, 1]))


# --- Layouts -------------------------------------------------------------------------------------


def names(data):
    return {split: [case.name for case in cases] for split, cases in data.layout.cases.items()}


def test_pairs_by_suffix(tmp_path):
    make_folder(tmp_path, 6)
    for path in (tmp_path / "masks").iterdir():
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    data = FolderImages(tmp_path, mask_suffix="_mask", patch_size=16)
    assert sorted(sum(names(data).values(), [])) == [f"{i:02}" for i in range(6)]


def test_the_split_is_the_same_each_time(tmp_path):
    make_folder(tmp_path, 20)
    first = names(FolderImages(tmp_path, patch_size=16, seed=0))
    assert {split: len(part) for split, part in first.items()} == {
        "train": 12, "val": 4, "test": 4,
    }  # fmt: skip
    assert names(FolderImages(tmp_path, patch_size=16, seed=5)) == first
    # One more image moves hardly any other.
    [(picture, label)] = disks(1, seed=9)
    save(tmp_path / "images/zz.png", picture)
    save(tmp_path / "masks/zz.png", label * np.uint8(255))
    from losswatch.data.folder import _layout

    _layout.cache_clear()
    second = names(FolderImages(tmp_path, patch_size=16))
    moved = sum(name not in second[split] for split, part in first.items() for name in part)
    assert moved <= 2
    assert set(names(FolderImages(tmp_path, patch_size=16, test_share=0.0))) == {"train", "val"}


def test_split_folders(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        make_folder(tmp_path / split, count, seed=count)
    data = FolderImages(tmp_path, patch_size=16)
    assert names(data) == {"train": ["00", "01", "02"], "val": ["00", "01"]}


def make_nnunet(root, labels=None, regions=False, ignored=None):
    """Two channels; values 0, 1 and 2, the disk and its middle."""
    (root / "imagesTr").mkdir(parents=True)
    (root / "labelsTr").mkdir()
    for i, (picture, label) in enumerate(disks(6)):
        label = label.copy()
        label[label.cumsum(0) > 6] = 2 * (label[label.cumsum(0) > 6] > 0)
        if ignored is not None:
            label[:3] = ignored
        save(root / "imagesTr" / f"case_{i}_0000.png", picture)
        save(root / "imagesTr" / f"case_{i}_0001.png", 255 - picture)
        save(root / "labelsTr" / f"case_{i}.png", label)
    labels = {"background": 0, "whole": [1, 2], "core": 2} if regions else {
        "background": 0, "upper": 1, "lower": 2}  # fmt: skip
    if ignored is not None:
        labels["ignore"] = ignored
    about = {"channel_names": {"0": "a", "1": "b"}, "labels": labels, "numTraining": 6,
             "file_ending": ".png"}  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(about))
    return root


def test_nnunets_layout(tmp_path):
    data = FolderImages(make_nnunet(tmp_path, ignored=3), patch_size=16)
    assert data.form.classes == ("background", "upper", "lower") and data.form.in_channels == 2
    assert data.form.has_ignored and data.form.target == "softmax"
    [case, *_] = data.layout.cases["train"]
    image, label = data.items("train")[0]["image"], data.items("train")[0]["label"]
    raw = np.asarray(Image.open(case.masks[0][0])).astype(int)
    np.testing.assert_array_equal(label[0], np.where(raw == 3, -1, raw))
    np.testing.assert_allclose(image[0], -image[1], atol=1e-5)  # zscore of 255 - x


def test_nnunets_regions(tmp_path):
    data = FolderImages(make_nnunet(tmp_path, regions=True), patch_size=16)
    assert data.form.classes == ("whole", "core") and data.form.target == "multilabel"
    raw = np.asarray(Image.open(data.layout.cases["train"][0].masks[0][0]))
    label = data.items("train")[0]["label"]
    np.testing.assert_array_equal(label, np.stack([raw > 0, raw == 2]))
    assert data.patches[0][1].shape == (8, 2, 16, 16)


def test_a_folder_of_masks_for_each_class(tmp_path):
    make_folder(tmp_path, 5)
    for path in sorted((tmp_path / "masks").glob("*.png")):
        label = np.asarray(Image.open(path))
        save(tmp_path / "masks/disk" / path.name, label)
        save(tmp_path / "masks/half" / path.name, label * (np.indices(label.shape)[0] > 20))
        path.unlink()
    data = FolderImages(tmp_path, patch_size=16)
    assert data.form.classes == ("disk", "half") and data.form.target == "multilabel"
    label = data.items("val")[0]["label"]
    assert (label[1] <= label[0]).all() and set(label.unique().tolist()) == {0, 1}


# --- What is checked before training --------------------------------------------------------------


def spoil(root, what):
    images, masks = root / "images", root / "masks"
    [(picture, label)] = disks(1)
    if what == "mask without image":
        (images / "03.png").unlink()
    elif what == "image without mask":
        (masks / "03.png").unlink()
    elif what == "sizes":
        save(masks / "03.png", label[:-1])
    elif what == "value":
        save(masks / "03.png", label * np.uint8(7))
    elif what == "corrupt":
        (images / "03.png").write_bytes((images / "03.png").read_bytes()[:200])
    elif what == "empty":
        for path in images.iterdir():
            path.unlink()
    elif what == "channels":
        save(images / "03.png", np.stack([picture] * 3, -1))
    elif what == "colours":
        save(masks / "03.png", RNG.integers(0, 255, (*label.shape, 3), np.uint8))
    elif what == "objects":
        save(masks / "03.png", np.arange(label.size).reshape(label.shape).astype(np.uint16))
    elif what == "no folder":
        for path in images.iterdir():
            path.unlink()
        images.rmdir()


BAD = {
    "mask without image": ({}, r"masks/03.png is a mask without an image in .*images; data.skip_"),
    "image without mask": ({}, r"images/03.png is an image without a mask in .*masks; data.skip_"),
    "sizes": ({}, r"masks/03.png is of 39 x 48, its image .*03.png of 40 x 48; a mask needs"),
    "value": (
        {"classes": {"background": 0, "disk": 255}},
        r"masks/03.png holds value 7, which no class has; data.classes are .*disk",
    ),
    "corrupt": ({}, r"images/03.png cannot be read: .*truncated"),
    "empty": ({}, r"images holds no images; known are .png"),
    "channels": ({}, r"has 3 channels and 2 dimensions, .* 1 channel and 2 dimensions"),
    "colours": ({}, r"masks: the masks hold \d+ values, .*road:'#804080'.* data.nearest=true$"),
    "objects": ({}, r"the masks hold \d+ values, as if each object had its own; .*object:rest"),
    "no folder": ({}, r"images is not a folder; it must hold images"),
    "patch": ({"patch_size": 41}, r"data.patch_size=41 is larger than .*\(40 x 48\)"),
    "sides": ({"patch_size": [8, 8, 8]}, r"must be a whole number or 2 of them"),
    "class": (
        {"classes": {"a": 0, "b": 255, "c": 9}}, "no training image has a pixel of class c"
    ),
    "target": ({"target": "multilabel"}, "but the classes of .* do not overlap"),
    "word": ({"target": "soft"}, "data.target=soft: allowed are softmax, sigmoid, multilabel"),
    "classes": ({"classes": {"a": "all"}}, "data.classes must map each name to a whole number"),
    "shares": ({"val_share": 0.6, "test_share": 0.5}, "must leave a rest"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_folders(tmp_path, what):
    options, message = BAD[what]
    make_folder(tmp_path)
    spoil(tmp_path, what)
    with pytest.raises(ValueError, match=message) as raised:
        FolderImages(tmp_path, **{"patch_size": 16} | options)
    assert "\n" not in str(raised.value)


def test_a_split_that_lacks_a_class(tmp_path, compose, caplog):
    """Training says so, and its metrics leave the class out."""
    for split in ("train", "val"):
        make_folder(tmp_path / "a" / split, 3)
    for path in (tmp_path / "a/val/masks").iterdir():
        save(path, np.zeros((40, 48), np.uint8))
    data = FolderImages(tmp_path / "a", patch_size=16)
    assert data.missing == [("val", "255")]
    compose(*SHORT, f"data.root={tmp_path / 'a'}").plan()
    assert "no image of val has class 255; its metrics leave the class out" in caplog.text
    with pytest.raises(ConfigError, match="train has 3 images, fewer than the 4 devices"):
        check_images(data, {}, ranks=4)


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("losswatch.data.folder.find_spec", lambda name: name != "nibabel" or None)
    with pytest.raises(
        ValueError, match=r'^nibabel is missing: pip install "losswatch\[images\]"$'
    ):
        FolderImages(tmp_path)


def test_the_survey_counts_pixels(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "masks/00.png").unlink()
    save(tmp_path / "masks/00.png", np.zeros((40, 48), np.uint8))  # without foreground
    data = FolderImages(tmp_path, patch_size=16, ignore_index=None)
    for split, cases in data.layout.cases.items():
        masks = [np.asarray(Image.open(case.masks[0][0])) for case in cases]
        rows = data.survey.classes.query("split == @split").set_index("class")
        assert rows.share["255"] == pytest.approx(np.mean([m > 0 for m in masks]))
        assert rows.without["255"] == sum(not m.any() for m in masks)
        images = [np.asarray(Image.open(case.images[0])) for case in cases]
        seen = data.survey.splits.loc[split]
        assert seen.images == len(cases)
        assert (seen.low, seen.high) == (np.min(images), np.max(images))


def test_files_that_have_not_changed_are_opened_once(tmp_path, monkeypatch):
    from losswatch.data import cases
    from losswatch.data.folder import _layout

    make_folder(tmp_path)
    opened = []

    def count(path, *more):
        opened.append(path)
        return read(path, *more)

    monkeypatch.setattr(cases, "read", count)
    counts = []
    for _ in range(3):
        _layout.cache_clear()
        FolderImages(tmp_path, patch_size=16)
        counts.append(len(opened))
        [(picture, _label)] = disks(1, seed=4)
        if len(counts) == 2:
            save(tmp_path / "images/05.png", picture)
    assert counts == [20, 20, 22]


# --- Patches -------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_seed_and_step(tmp_path):
    make_folder(tmp_path)
    one, two = (FolderImages(tmp_path, patch_size=16, seed=3) for _ in range(2))
    for step in (0, 7, 3):
        for a, b in zip(one.patches[step], two.patches[step], strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(one.patches[0][0], one.patches[1][0])
    other = FolderImages(tmp_path, patch_size=16, seed=4)
    assert not torch.equal(one.patches[0][0], other.patches[0][0])
    # Ranks share the batch.
    whole = one.patches[5][0]
    for rank in (0, 1):
        two.rank, two.world_size = rank, 2
        assert torch.equal(two.patches[5][0], whole[rank::2])


def test_patches_are_parts_of_the_images(tmp_path):
    make_folder(tmp_path)
    data = FolderImages(tmp_path, patch_size=[12, 20], flip=False, intensity=0, normalize="none")
    known = [data.items("train")[i] for i in range(len(data.layout.cases["train"]))]
    images, labels = data.patches[1]
    assert images.shape == (8, 1, 12, 20) and labels.shape == (8, 12, 20)
    for image, label in zip(images, labels, strict=True):
        windows = [
            (item, y, x)
            for item in known
            for y in range(29)
            for x in range(29)
            if torch.equal(item["image"][:, y : y + 12, x : x + 20], image)
        ]
        [(item, y, x)] = windows
        assert torch.equal(item["label"][0, y : y + 12, x : x + 20].long(), label)


def test_flips_and_intensities(tmp_path):
    make_folder(tmp_path)
    options = {"patch_size": None, "normalize": "none", "batch_size": 64}
    plain, changed = (
        FolderImages(tmp_path, flip=on, intensity=0.2 * on, **options) for on in (False, True)
    )
    known = {}
    for i in range(len(plain.layout.cases["train"])):
        item = plain.items("train")[i]
        for axes in ((), (1,), (2,), (1, 2)):
            known[item["label"].flip(axes).numpy().tobytes()] = item["image"].flip(axes), axes
    seen = []
    images, labels = changed.patches[0]
    for image, label in zip(images, labels, strict=True):
        original, axes = known[label.short().numpy()[None].tobytes()]
        slope, shift = np.polyfit(original.ravel().numpy(), image.ravel().numpy(), 1)
        assert 0.799 < slope < 1.201
        assert (float(slope) * original + float(shift) - image).abs().max() < 1e-2
        seen.append((axes, abs(slope - 1) > 1e-3))
    assert {axes for axes, _ in seen} == {(), (1,), (2,), (1, 2)}
    assert 10 < sum(scaled for _, scaled in seen) < 54  # half of 64


def test_balanced_patches(tmp_path):
    """Half of the patches are around a pixel of a class that is rare."""
    make_folder(tmp_path, 4, size=(200, 200))
    share = {}
    for sampling in ("random", "balanced"):
        data = FolderImages(tmp_path, patch_size=16, sampling=sampling, batch_size=64)
        share[sampling] = float((data.patches[0][1] == 1).flatten(1).any(1).float().mean())
    assert share["random"] < 0.2 and 0.45 < share["balanced"] < 0.75


@pytest.mark.parametrize("kind", ["zscore", "unit", "none"])
def test_normalisation(tmp_path, kind):
    make_folder(tmp_path, channels=3)
    image = FolderImages(tmp_path, patch_size=16, normalize=kind).items("val")[0]["image"]
    flat = image.flatten(1)
    if kind == "zscore":
        torch.testing.assert_close(flat.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(flat.std(1, correction=0), torch.ones(3), atol=1e-4, rtol=0)
    elif kind == "unit":
        assert flat.amin(1).tolist() == [0, 0, 0] and flat.amax(1).tolist() == [1, 1, 1]
    else:
        assert flat.max() > 100


def test_images_beyond_the_bound_are_read_at_each_use(tmp_path):
    make_folder(tmp_path)
    small, large = (FolderImages(tmp_path, patch_size=16, cache_mb=n) for n in (0, 100))
    for data, kept in ((small, 0), (large, 6)):
        assert data.patches[2] and not data.items("train").kept  # until training begins
        data.items("train").fill()
        assert len(data.items("train").kept) == kept
    for a, b in zip(small.patches[2], large.patches[2], strict=True):
        assert torch.equal(a, b)


# --- Scores and targets --------------------------------------------------------------------------


def one_by_one(predicted, label, counted, classes):
    """Dice and IoU [images, classes] by numpy; NaN where there is nothing of a class."""
    dice, iou = np.full((2, len(label), classes), np.nan)
    for n in range(len(label)):
        for c in range(classes):
            p, y = ((x[n] == c) & counted[n] for x in (predicted, label))
            if p.any() or y.any():
                dice[n, c] = 2 * (p & y).sum() / (p.sum() + y.sum())
                iou[n, c] = (p & y).sum() / (p | y).sum()
    return dice, iou


class Alone:
    """A strategy of one process."""


@pytest.mark.filterwarnings("error")
def test_scores_are_those_of_each_image():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 4, (5, 9, 8))
    label[0] = 0  # without foreground
    label[1][label[1] == 3] = 2
    label[2:] = np.where(rng.random((3, 9, 8)) < 0.2, -1, label[2:])  # ignored
    logits = torch.from_numpy(rng.standard_normal((5, 4, 9, 8))).float()
    logits[1, 3] = -99  # class 3 is neither there nor predicted
    losses = LossSet({"ce": nn.CrossEntropyLoss(ignore_index=-1), "dice": Dice(ignore_index=-1)})
    scores = ImageScores(Form(1, tuple("abcd"), 2, has_ignored=True), losses.names)
    for part in (slice(0, 2), slice(2, 5)):
        scores.add(logits[part], torch.from_numpy(label[part]), losses)
    found = scores.compute_and_reset(Alone())
    predicted, counted = logits.argmax(1).numpy(), label >= 0
    dice, iou = one_by_one(predicted, label, counted, 4)
    assert np.isnan(dice).any() and (dice == 0).any()
    for c, name in enumerate("abcd"):
        assert found[f"dice/{name}"] == pytest.approx(np.nanmean(dice[:, c]), rel=1e-6)
        assert found[f"iou/{name}"] == pytest.approx(np.nanmean(iou[:, c]), rel=1e-6)
    assert found["dice"] == pytest.approx(np.nanmean(dice, 0).mean(), rel=1e-6)
    assert found["accuracy"] == pytest.approx((predicted == label)[counted].mean(), rel=1e-6)
    for c, name in enumerate("abcd"):
        share = (predicted == c)[counted].mean()
        assert found[f"predicted/{name}"] == pytest.approx(share, rel=1e-6)
    weights = [counted[:2].sum(), counted[2:].sum()]
    values = [
        float(losses(logits[part], torch.from_numpy(label[part]))[1])
        for part in (slice(0, 2), slice(2, 5))
    ]
    assert found["loss/dice"] == pytest.approx(np.average(values, weights=weights), rel=1e-6)
    # A class that no image has is left out of the mean.
    scores.add(logits[1:2], torch.from_numpy(label[1:2]), losses)
    again = scores.compute_and_reset(Alone())
    assert "dice/d" not in again
    assert again["dice"] == pytest.approx(np.nanmean(dice[1]), rel=1e-6)


def test_scores_of_classes_that_overlap():
    rng = np.random.default_rng(1)
    label = rng.random((3, 2, 9, 8)) < 0.3
    label[0, 1] = False
    logits = torch.from_numpy(rng.standard_normal((3, 2, 9, 8))).float()
    losses = LossSet({"bce": nn.BCEWithLogitsLoss()})
    scores = ImageScores(Form(1, ("a", "b"), 2, "multilabel"), losses.names)
    scores.add(logits, torch.from_numpy(label).float(), losses)
    found = scores.compute_and_reset(Alone())
    predicted = logits.numpy() > 0
    for c, name in enumerate("ab"):
        dice, _ = one_by_one(predicted[:, c], label[:, c], np.ones_like(label[:, c]), 2)
        assert found[f"dice/{name}"] == pytest.approx(dice[:, 1].mean(), rel=1e-6)
    assert found["accuracy"] == pytest.approx((predicted == label).mean(), rel=1e-6)
    for c, name in enumerate("ab"):
        assert found[f"predicted/{name}"] == pytest.approx(predicted[:, c].mean(), rel=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "multilabel", "ignored"])
def test_training_values_and_norms(tmp_path, kind, compose):
    """Against one gradient for each loss by PyTorch, in float64, by train.py's own parts."""
    if kind == "multilabel":
        root = make_nnunet(tmp_path / "a", regions=True)
    elif kind == "ignored":
        root = make_nnunet(tmp_path / "a", ignored=3)
    else:
        root = make_folder(tmp_path / "a")
    target = {"sigmoid": "sigmoid"}.get(kind, "null")
    plan = compose(
        *SHORT, "data.patch_size=null", f"data.root={root}", f"data.target={target}", "loss=dice",
        "watch=[cce_stable,dice]",
    ).plan()  # fmt: skip
    images, labels = plan.data.first_batch()
    net, losses = build.make_net(plan).double(), build.make_losses(plan)
    optimizer = build.make_optimizer(plan.settings)
    module = SegmentationModule(net, losses, "dice", optimizer, plan.form)
    output = net(images.double())
    module.finite.check_logits = lambda *_: None
    logits = module._as_logits(output)
    y = module._as_target(labels, logits)
    observer = Observer(losses, net.parameters(), activation=module.activation,
                        ignore_index=module.ignore_index)  # fmt: skip
    seen = observer(logits, y)
    if kind == "multilabel":
        p, t = output.sigmoid(), labels.double()
        cce = F.binary_cross_entropy_with_logits(output, t)
    else:
        p = torch.cat([1 - output.sigmoid(), output.sigmoid()], 1) if kind == "sigmoid" else (
            output.softmax(1))  # fmt: skip
        counted = labels != -1
        assert (kind == "ignored") == bool((~counted).any())
        t = F.one_hot(labels.clamp_min(0), p.shape[1]).movedim(-1, 1).double()
        cce = F.nll_loss(p.log(), labels, ignore_index=-1)
        p, t = (x * counted.unsqueeze(1) for x in (p, t))
    tp, both = (p * t).sum((0, 2, 3)), (p + t).sum((0, 2, 3))
    dice = (1 - (2 * tp + 1e-7) / (both + 1e-7)).mean()
    wanted = truth([cce, dice], gradients([cce, dice], net.parameters()))
    torch.testing.assert_close(seen.values, wanted.values, rtol=1e-9, atol=0)
    torch.testing.assert_close(seen.norms, wanted.norms, rtol=1e-9, atol=0)


class Plain(Dice):
    """A subclass with the constructor of its base."""


class Renamed(CrossEntropy):
    """A subclass that passes on what it gets."""

    def __init__(self, **settings):
        super().__init__(**settings)


class Closed(Dice):
    """A subclass that takes no setting."""

    def __init__(self):
        super().__init__(ignore_index=-1)


class Both(Sum):
    """A sum that makes its parts."""

    def __init__(self, ignore_index=None):
        super().__init__([Dice(ignore_index=ignore_index), CrossEntropy(ignore_index=ignore_index)])


@pytest.mark.parametrize("dice, cross_entropy", [
    ("losswatch.losses.Dice", "losswatch.losses.CrossEntropy"),
    ("losswatch.Dice", "losswatch.CrossEntropy"),
    ("losswatch.losses.compose.Dice", "losswatch.losses.cross_entropy.CrossEntropy"),
    (f"{__name__}.Plain", f"{__name__}.Renamed"),
    (f"{__name__}.Closed", "losswatch.CrossEntropy"),
])  # fmt: skip
def test_losses_ignore_pixels_under_each_name_of_their_class(dice, cross_entropy):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, 5, generator=rng, dtype=torch.float64)
    target = torch.randint(-1, 3, (2, 5, 5), generator=rng)
    nodes = {
        "dice": {"_target_": dice},
        "cce": {"_target_": cross_entropy},
        "sum": {"_target_": "losswatch.Sum", "losses": [{"_target_": dice},
                                                        {"_target_": cross_entropy}]},
        "own_sum": {"_target_": f"{__name__}.Both"},
        "loaded": {"_target_": "losswatch.load_loss", "name": "dice_cce"},
    }  # fmt: skip
    losses = make_losses(nodes, Form(1, tuple("abc"), 2, has_ignored=True))
    values = dict(zip(losses.names, losses(logits, target).tolist(), strict=True))
    counted = target != -1
    p = logits.softmax(1).movedim(1, -1)[counted]  # [pixels, 3]
    y = F.one_hot(target[counted], 3)
    wanted = (1 - 2 * (p * y).sum(0) / (p + y).sum(0)).mean().item()
    cce = F.cross_entropy(logits, target, ignore_index=-1).item()
    assert values["dice"] == pytest.approx(wanted, rel=1e-6)
    assert values["cce"] == pytest.approx(cce, rel=1e-6)
    for name in ("sum", "own_sum", "loaded"):
        assert values[name] == pytest.approx(wanted + cce, rel=1e-6), name


# --- Runs ----------------------------------------------------------------------------------------


def train(cwd, *arguments, **options):
    """A short run of a folder; its folder and what it printed."""
    before = set(run_folders(cwd).values())
    done = run_train(*SHORT, *arguments, cwd=cwd, **options)
    [folder] = set(run_folders(cwd).values()) - before
    return folder, done


def curves(folder):
    """All scalars of a run: tag -> [(step, value)]."""
    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    return scalars, tags["images"]


@pytest.mark.slow
def test_a_sweep_of_a_users_jpegs(tmp_path):
    """With the toy task's curves, table and comparison."""
    make_folder(tmp_path / "cells", image=".jpg", channels=3)
    done = run_train(
        "-m", *SHORT, "data.root=cells", "loss=dice,cce", "seed=0,1",
        "data.classes={background:0,cell:rest}", cwd=tmp_path,
    )  # fmt: skip
    for text in ("cells: share of pixels", "│ cell ", "intensities from 0 to 2"):
        assert done.stderr.count(text) == 1, text
    assert " θ " not in done.stdout
    runs = run_folders(tmp_path)
    assert len(runs) == 4
    for folder in runs.values():
        result = read_result(folder)
        assert result["status"] == "done" and result["config"]["theta"] is None
        metrics = result["metrics"]
        for name in ("accuracy", "dice", "iou", "dice/cell", "iou/background", "loss/cce"):
            for stage in ("val", "test"):
                assert np.isfinite(metrics[f"{stage}/{name}"])
        assert metrics["val/dice"] == pytest.approx(
            (metrics["val/dice/cell"] + metrics["val/dice/background"]) / 2, rel=1e-6
        )
        scalars, images = curves(folder)
        assert [step for step, _ in scalars["grad_norm/dice_fg"]] == list(range(12))
        assert "data/class_shares" in images and "images/input_label_prediction/0" in images
    [sweep] = {folder.parent for folder in runs.values()}
    assert len(pd.read_csv(sweep / "summary.csv")) == 4
    # Training has begun: seeds differ, and so do losses.
    values = {round(read_result(f)["metrics"]["val/loss/dice"], 6) for f in runs.values()}
    assert len(values) == 4


@pytest.mark.slow
def test_16_bit_tiffs_and_one_output_channel(tmp_path):
    make_folder(tmp_path / "t", image=".tif", mask=".tif", depth=16)
    folder, _ = train(tmp_path, "data.root=t", "data.target=sigmoid", "loss=dice_ce_monai")
    state = torch.load(next(folder.glob("checkpoints/*.ckpt")), weights_only=True)["state_dict"]
    last = [value for name, value in state.items() if name.startswith("net.")][-1]
    assert last.shape == (1,)
    tested = run_train(
        f"checkpoint={folder}", "mode=test", "data=folder", "data.root=t", 
        "trainer.accelerator=cpu", cwd=tmp_path,
    )  # fmt: skip
    assert "test Dice" in tested.stderr
    [other] = set(run_folders(tmp_path).values()) - {folder}
    for name, value in read_result(other)["metrics"].items():
        assert value == pytest.approx(read_result(folder)["metrics"][name], rel=1e-5)
    # The saved masks are what was scored: Dice of each image by numpy.
    scores = []
    for path in sorted((other / "predictions").iterdir()):
        predicted = read(path, True).array == 255
        label = read(tmp_path / "t/masks" / path.name, True).array > 0
        scores.append(
            2 * (predicted & label).sum() / (predicted.sum() + label.sum())
            if label.any() or predicted.any()
            else np.nan
        )
    assert len(scores) == 2
    found = read_result(other)["metrics"]["test/dice/255"]
    assert found == pytest.approx(np.nanmean(scores), rel=1e-5)
    # Images without masks, in a folder of their own.
    for path in (tmp_path / "t/images").iterdir():
        save(tmp_path / "new" / path.name, tifffile.imread(path))
    run_train(
        f"checkpoint={folder}", "mode=predict", "data=folder", "data.root=new",
         "trainer.accelerator=cpu", cwd=tmp_path,
    )  # fmt: skip
    [third] = set(run_folders(tmp_path).values()) - {folder, other}
    assert len(list((third / "predictions").iterdir())) == 10
    for path in (other / "predictions").iterdir():
        np.testing.assert_array_equal(
            read(third / "predictions" / path.name, True).array, read(path, True).array
        )


@pytest.fixture
def train_here(compose, tmp_path, monkeypatch):
    """train_here(folder, ...) -> (plan, what was reached) of a run that is trained in this process.

    Modules in `tmp_path` can be imported; `mine` in it is a folder as conf.
    """
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a module may change within a second

    def run(folder, *overrides):
        monkeypatch.delitem(sys.modules, "cells", raising=False)  # of another case
        plan = compose(*overrides, "trainer.enable_progress_bar=false").plan(tmp_path / folder)
        (tmp_path / folder).mkdir(exist_ok=True)
        return plan, run_task(plan)

    return run


FEW = [*SHORT, "data.num_workers=0", "trainer.max_steps=4", "trainer.val_check_interval=2"]


def test_nnunets_layout_with_ignored_pixels(train_here, tmp_path, capfd):
    """A folder in nnU-Net's layout, some of whose pixels are ignored, is trained on and tested."""
    make_nnunet(tmp_path / "n", ignored=3)
    _, reached = train_here(
        "run", *FEW, f"data.root={tmp_path / 'n'}", "loss=dice", "data.patch_size=null",
        "watch=[cce,dice,dice_ce_nnunet]",
    )  # fmt: skip
    assert "lower" in capfd.readouterr().err
    assert {"val/dice/upper", "val/dice/lower", "test/loss/dice_ce_nnunet"} <= set(reached.metrics)


def test_overlapping_regions(train_here, tmp_path):
    make_nnunet(tmp_path / "r", regions=True)
    options = [f"data.root={tmp_path / 'r'}", "loss=dice_cce", "watch=[cce,dice,dice_fg]"]
    train_here("run", *FEW, "model=convnet", *options)
    scalars, images = curves(tmp_path / "run")
    assert scalars["loss/cce"][0][1] == pytest.approx(0.69, abs=0.3)  # two fair coins
    assert {"val/dice/whole", "val/dice/core"} <= set(scalars)


def test_a_volume(train_here, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):
        mask = np.zeros((24, 20, 16), np.uint8)
        mask[5 + i : 14 + i, 4:12, 5:10] = 1
        save(tmp_path / f"v/images/{i}.nii.gz", (rng.random(mask.shape) + mask).astype(np.float32))
        save(tmp_path / f"v/masks/{i}.nii.gz", mask)
    _, reached = train_here(
        "run", *FEW, f"data.root={tmp_path / 'v'}", "data.patch_size=8", "model=monai_unet",
        "model.channels=[4,8]", "model.strides=[2]",
    )  # fmt: skip
    assert reached.is_done


@pytest.mark.slow
def test_resume_is_bit_identical(tmp_path):
    """A run that is killed (kill -9) and goes on is that of an uninterrupted one."""
    make_folder(tmp_path / "a")
    options = ["data.root=a", "trainer.max_steps=24", "loss=dice"]
    whole, _ = train(tmp_path, *options)
    half = tmp_path / "half"
    command = [sys.executable, str(ROOT / "train.py"), *SHORT, *options, f"hydra.run.dir={half}"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while not list(half.glob("checkpoints/step=*.ckpt")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (half / "result.json").exists()
    done = run_train(*SHORT, *options, f"resume={half}", cwd=tmp_path)
    assert "resumed from step" in done.stderr
    assert read_result(half)["status"] == "done"
    a, b = curves(whole)[0], curves(half)[0]
    assert a.keys() == b.keys()
    for tag, values in a.items():
        assert values == b[tag], tag
    states = [
        torch.load(folder / "checkpoints/step=24.ckpt", weights_only=True)["state_dict"]
        for folder in (whole, half)
    ]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])


MODULE = """
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

class Cells(pl.LightningDataModule):
    def __init__(self, size=16, seed=0, as_dict=False):
        super().__init__()
        self.size, self.seed, self.as_dict = size, seed, as_dict
    def setup(self, stage):
        g = torch.Generator().manual_seed(self.seed)
        images = torch.rand(12, 2, self.size, self.size, generator=g)
        labels = (images[:, :1] > 0.7).long() + (images[:, :1] > 0.9).long()
        items = [{"image": x, "label": y} for x, y in zip(images, labels)]
        self.data = items if self.as_dict else TensorDataset(images, labels)
    def train_dataloader(self):
        return DataLoader(self.data, batch_size=4, shuffle=True)
    def val_dataloader(self):
        return DataLoader(self.data, batch_size=6)
"""


def write_cells(folder, module):
    (folder / "cells.py").write_text(module)
    (folder / "mine/data").mkdir(parents=True, exist_ok=True)
    (folder / "mine/data/cells.yaml").write_text("_target_: cells.Cells\nsize: 16\n")


def train_cells(folder, *options, module=MODULE, **kwargs):
    """Train with a module as above, which has three batches of four images."""
    write_cells(folder, module)
    return run_train(
        "--config-dir", "mine", "data=cells", "model=convnet", *options, cwd=folder,
        env=ENVIRONMENT | {"PYTHONPATH": f"{ENVIRONMENT.get('PYTHONPATH', '')}:{folder}"}, **kwargs
    )  # fmt: skip


@pytest.fixture
def train_cells_here(train_here, tmp_path):
    """train_cells_here(folder, ...): the same in this process, see `train_here`."""

    def run(folder, *options, module=MODULE):
        write_cells(tmp_path, module)
        mine = f"hydra.searchpath=['{tmp_path}/mine']"
        return train_here(folder, mine, "data=cells", "model=convnet", *options)

    return run


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_users_data_module(train_cells_here, tmp_path, as_dict):
    options = ["trainer.max_steps=12", "trainer.val_check_interval=5", "seed=4"]
    _, reached = train_cells_here("run", f"+data.as_dict={as_dict}", *options)
    assert {"val/dice/class_2", "val/accuracy"} <= set(reached.metrics)
    assert not any(name.startswith("test/") for name in reached.metrics)
    scalars, _ = curves(tmp_path / "run")
    assert [step for step, _ in scalars["val/dice"]] == [5, 10, 12]
    assert [step for step, _ in scalars["loss/cce"]] == list(range(12))


def test_epochs_of_a_users_data_module(train_cells_here, tmp_path, monkeypatch):
    """Four passes over three batches, also for a schedule; resumed bit for bit."""
    options = [
        "trainer.max_epochs=4", "trainer.accumulate_grad_batches=2", "scheduler=cosine",
        "trainer.val_check_interval=2", "callbacks=lr_monitor",
    ]  # fmt: skip
    done = train_cells(tmp_path, *options, "hydra.run.dir=whole")
    assert "trainer.max_epochs=4 sets trainer.max_steps=6\n" in done.stderr
    assert "Warning" not in done.stderr
    result = read_result(tmp_path / "whole")
    assert (result["steps"], result["config"]["scheduler"]["T_max"]) == (6, 6)
    assert [step for step, _ in curves(tmp_path / "whole")[0]["val/accuracy"]] == [2, 4, 6]

    def stop(self, trainer, module, outputs, batch, index):
        trainer.should_stop = index >= 5

    with monkeypatch.context() as patched:
        patched.setattr(Images, "on_train_batch_end", stop, raising=False)
        plan, reached = train_cells_here("half", *options)
        assert (plan.steps, reached.steps, reached.is_done) == (6, 3, False)
        # With twice as many images the schedule would be another one.
        plan, _ = train_cells_here("more", *options, module=MODULE.replace("12,", "24,"))
    with pytest.raises(ConfigError, match="T_max was 6, now 12"):
        check_folder(tmp_path / "half", plan.settings.as_config())
    _, reached = train_cells_here("half", *options)
    assert reached.is_done
    assert curves(tmp_path / "half")[0] == curves(tmp_path / "whole")[0]
    weights = [
        torch.load(tmp_path / name / "checkpoints/step=6.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "half")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


HOOK = """
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0].float() / 255, batch[1]
"""


def test_a_module_that_changes_batches_after_their_transfer(train_cells_here):
    module = MODULE.replace("TensorDataset(images,", "TensorDataset((255 * images).byte(),") + HOOK
    _, reached = train_cells_here("run", "trainer.max_steps=3", module=module)
    assert reached.is_done


def test_a_plateau_with_a_users_data_module(train_cells_here, tmp_path):
    """Its validations are counted through all passes."""
    train_cells_here(
        "run", "scheduler=plateau", "scheduler.patience=0", "+scheduler.eps=0",
        "optimizer.lr=1e-9", "callbacks=lr_monitor", "trainer.max_steps=20",
        "trainer.val_check_interval=5", "trainer.accumulate_grad_batches=2",
    )  # fmt: skip
    rates = [*dict(curves(tmp_path / "run")[0]["lr-Adam"]).values()]
    assert rates == pytest.approx([1e-9] * 10 + [3e-10] * 5 + [9e-11] * 5, rel=1e-4, abs=0)


BAD_MODULES = {
    "no val_dataloader": (
        MODULE[: MODULE.index("    def val_dataloader")], [],
        "data: its val_dataloader gives no batch to validate on: "
    ),
    "two val loaders": (
        MODULE.replace("return DataLoader(self.data, batch_size=6)", "return [self.data]"),
        [], "data: its val_dataloader gives no batch to validate on: ValueError: data: a batch ",
    ),
    "a trainer": (
        MODULE.replace("shuffle=True", "shuffle=self.trainer.world_size == 1"), [],
        "data: before training, without a trainer, its batches cannot be looked at: AttributeErr",
    ),
    "devices": (
        MODULE, ["trainer.devices=2", "trainer.accelerator=cpu", "trainer.strategy=ddp"],
        "trainer.devices x trainer.num_nodes is 2: a data module of yours is trained on one device",
    ),
    "batches that cannot be counted": (
        MODULE.replace(
            "return DataLoader(self.data, batch_size=4, shuffle=True)",
            "return ((x[None], y[None]) for x, y in self.data)",
        ),
        ["trainer.max_epochs=4"],
        "trainer.max_epochs=4 needs training batches that can be counted",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MODULES)
def test_what_a_users_data_module_cannot_do_is_refused(refusal, tmp_path, monkeypatch, case):
    module, options, message = BAD_MODULES[case]
    write_cells(tmp_path, module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cells", raising=False)  # of another case
    mine = f"hydra.searchpath=['{tmp_path}/mine']"
    assert refusal(mine, "data=cells", "model=convnet", *options).startswith(message)


def test_the_fused_launcher_trains_them_one_by_one(tmp_path):
    """In a sweep over epochs: a folder's epoch is as many patches as there are training images."""
    make_folder(tmp_path / "a", 10)
    images = len(FolderImages(str(tmp_path / "a"), patch_size=16).layout.cases["train"])
    done = run_train(
        "-m", *FEW, "data.root=a", "data.batch_size=4", "trainer.max_epochs=1,3",
        "watch=[dice]", "hydra/launcher=fused", "hydra.launcher.workers=1", cwd=tmp_path,
    )  # fmt: skip
    assert "(images that are read from files need the ordinary step)" in done.stderr
    results = [read_result(folder) for folder in run_folders(tmp_path).values()]
    assert {result["status"] for result in results} == {"done"}
    epoch = -(-images // 4)
    assert images % 4 and {result["steps"] for result in results} == {epoch, 3 * epoch}
    [sweep] = {folder.parent for folder in run_folders(tmp_path).values()}
    assert set(pd.read_csv(sweep / "summary.csv")["trainer.max_epochs"]) == {1, 3}


@pytest.mark.slow
def test_modes_that_need_images(tmp_path):
    make_folder(tmp_path / "a", 5)
    folder, _ = train(tmp_path, "data.root=a", "data.test_share=0")
    given = [f"checkpoint={folder}", "data=folder", "data.root=a", "data.test_share=0"]
    done = run_train("mode=test", *given, cwd=tmp_path, status=2)
    assert "mode=test: the data have no images for a test" in done.stderr
    done = run_train("mode=predict", given[0], cwd=tmp_path, status=2)
    assert done.stderr.splitlines()[-1].endswith("data=folder needs data.root=<folder of images>")
    done = run_train("mode=predict", given[0], "data=random", cwd=tmp_path, status=2)
    assert "mode=predict needs data=folder and data.root=" in done.stderr
    done = run_train(
        "mode=predict", given[0], "data=folder", "data.root=no", cwd=tmp_path, status=2
    )
    assert "no is not a folder; it must hold images" in done.stderr
