"""Folders of images as people have them, as one table: read right, or refused in one line.

*Right*: every image and every label is that of an independent reader, whatever the file's format,
its orientation or its place. *Refused*: one line names the file, the reason and the way out.
"""

import re

import folders_formats
import folders_layouts
import nibabel
import numpy as np
import pytest
import tifffile
import torch
from conftest import read_result, run_folders, run_train
from folders import SIZE, SMALL, scene, volumes
from folders_checks import assert_read, assert_refused, assert_said, opened
from folders_table import ROWS
from PIL import Image

from losswatch.data.cases import load
from losswatch.data.folder import FolderImages, UnlabelledImages
from losswatch.data.writing import write_mask


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * row.slow) for n, row in ROWS.items()]
)
def test_a_folder_is_read_right_or_refused(name, tmp_path):
    row, root = ROWS[name], tmp_path / "d"
    root.mkdir()
    truth = row.build(root)
    assert truth is not None or row.refused and not row.either, "the table is wrong"
    try:
        data = opened(root, row)
    except ValueError as error:
        if not row.refused:
            raise
        assert_refused(row, error)
    else:
        assert truth is not None and (row.either or not row.refused), "it was read"
        assert_read(row, data, truth)
        assert_said(row, data.survey.notes)


# --- What is said, and the masks that are written ------------------------------------------------

SHORT = ("data=folder", "data.root=d", "data.patch_size=12", "data.num_workers=0",
         "trainer.accelerator=cpu")  # fmt: skip


SAID = ["rgba_images", "geotiff_nodata", "class_file_missing", "skip_unpaired", "noise_threshold",
        "alpha_is_the_mask", "dsb2018", "voc_with_test", "tiff_turned", "image_far_from_zero",
        "left_of_all_kinds"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SAID)
def test_what_an_owner_should_know_is_said_once(name, tmp_path):
    """In a run. The notes of every row are compared above."""
    row = ROWS[name]
    (tmp_path / "d").mkdir()
    row.build(tmp_path / "d")
    done = run_train(*SHORT, *row.options, "trainer.max_steps=1", cwd=tmp_path)
    said = [line for line in done.stderr.splitlines() if "data.root=d" not in line]  # not options
    lines = [line for line in said if re.search(row.said, line)]
    assert len(lines) == 1, done.stderr


@pytest.mark.parametrize("image", ["a.tif", "a.png"])
def test_a_value_of_minus_one_is_written(image, tmp_path):
    """PNG knows no such number, so the mask of a PNG is a TIFF, too."""
    picture, label = scene(0)
    folders_formats.put(tmp_path / image, np.moveaxis(picture, 0, -1))
    label = label.astype(int) - 1
    path = write_mask(label, tmp_path / "mask", tmp_path / image)
    assert path.name == "mask.tif"
    np.testing.assert_array_equal(tifffile.imread(path), label)


def geo_tags(path):
    with tifffile.TiffFile(path) as file:
        tags = file.pages[0].tags
        return {code: tags[code].value if code in tags else None for code in (33550, 33922, 34735)}


def test_a_written_geotiff_keeps_its_place(tmp_path):
    folders_formats.geotiff(tmp_path)
    image = tmp_path / "images" / "03.tif"
    path = write_mask(scene(0)[1], tmp_path / "mask", image)
    assert None not in geo_tags(image).values()
    assert geo_tags(path) == geo_tags(image)
    np.testing.assert_array_equal(tifffile.imread(path), scene(0)[1])


def true_values(path, row, names):
    """A mask as the true values of its classes, read by the library of its format."""
    if path.name.endswith(".nii.gz"):
        stored = np.asarray(nibabel.load(path).dataobj).squeeze()
    elif path.suffix == ".tif":
        stored = tifffile.imread(path)
    elif names[0].startswith("#"):
        colours = np.asarray(Image.open(path).convert("RGB")).astype(int)
        stored = colours @ [65536, 256, 1]
        return sum(row.classes[name] * (stored == int(name[1:], 16)) for name in names)
    else:
        stored = np.asarray(Image.open(path))
    assert set(np.unique(stored)) <= set(row.classes.values())
    return stored


def dice(predicted, label, value):
    """Of an image; NaN where there is nothing to find and nothing was found."""
    a, b = predicted == value, label == value
    return 2 * (a & b).sum() / (a.sum() + b.sum()) if a.any() or b.any() else np.nan


WRITTEN = ["negative", "geotiff", "exif_portrait", "palette_order", "nn_affine_flip",
           "nifti_2d", "scans_two_orientations", "values_beyond_int32"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_written_masks_are_those_that_were_scored(name, tmp_path):
    """Each lies on its image as a viewer shows it; Dice of the files is that of the test."""
    row, root = ROWS[name], tmp_path / "d"
    root.mkdir()
    truth = row.build(root)
    options = (*SHORT, *row.options, "data.test_share=0.4")
    run_train(*options, "trainer.max_steps=30", "loss=cce", "optimizer.lr=0.01", cwd=tmp_path)
    [trained] = run_folders(tmp_path).values()
    run_train(*options, "mode=test", f"checkpoint={trained}", cwd=tmp_path)
    [tested] = set(run_folders(tmp_path).values()) - {trained}
    scores = {key: [] for key in row.classes}
    for path in sorted((tested / "predictions").iterdir()):
        key = path.name.split(".")[0]
        found, label = true_values(path, row, list(row.classes)), truth[key][1]
        if path.name.endswith(".nii.gz"):
            [image] = root.glob(f"images*/{key}*")
            np.testing.assert_allclose(nibabel.load(path).affine, nibabel.load(image).affine)
            if name == "scans_two_orientations":  # the truth is turned; its file is not
                label = np.asarray(nibabel.load(root / "masks" / path.name).dataobj)
        elif name == "geotiff":
            assert geo_tags(path) == geo_tags(root / "images" / path.name)
        assert found.shape == label.shape
        for key, value in row.classes.items():
            scores[key].append(dice(found, label, value))
    assert len(scores[key]) > 1
    metrics = read_result(tested)["metrics"]
    for key, values in scores.items():
        assert metrics[f"test/dice/{key}"] == pytest.approx(np.nanmean(values), rel=1e-5)


def stored_as(axes, before, after):
    """Volumes of a folder as another scanner stores them: the same in the world."""
    for path in before.rglob("*.nii.gz"):
        scan = nibabel.load(path)
        change = nibabel.orientations.axcodes2ornt(axes)
        new = after / path.relative_to(before)
        new.parent.mkdir(parents=True, exist_ok=True)
        now = nibabel.io_orientation(scan.affine)
        nibabel.save(scan.as_reoriented(nibabel.orientations.ornt_transform(now, change)), new)


def test_volumes_are_brought_to_the_orientation_that_is_asked_for(tmp_path):
    truth = volumes(tmp_path / "a")
    stored_as("PIR", tmp_path / "a", tmp_path / "b")
    for folder, axes in (("a", None), ("b", "RAS")):
        data = FolderImages(str(tmp_path / folder), patch_size=4, normalize="none", axes=axes)
        assert data.form.axes == "RAS"
        item, [case, *_] = data.items("train")[0], data.layout.cases["train"]
        np.testing.assert_array_equal(item["image"], truth[case.name][0])
        np.testing.assert_array_equal(item["label"][0], truth[case.name][1])
    with pytest.raises(ValueError, match="data.axes=RAL must be three letters such as RAS"):
        FolderImages(str(tmp_path / "a"), patch_size=4, axes="RAL")


@pytest.mark.parametrize("part", ["images", "masks"])
@pytest.mark.parametrize("size", [SMALL, (14, 16, 1)])
def test_a_mask_without_a_place_lies_on_its_image(part, size, tmp_path):
    """Arrays say nothing of a place. They are turned as their scan is, or neither of the two is."""
    truth = volumes(tmp_path / "a", size=size)
    stored_as("LPS", tmp_path / "a", tmp_path / "b")
    for path in sorted((tmp_path / "b").rglob("*.nii.gz"))[::2]:  # of each kind every second one
        path.replace(tmp_path / "a" / path.relative_to(tmp_path / "b"))
    for path in (tmp_path / "a" / part).iterdir():
        array = np.asarray(nibabel.load(path).dataobj)
        np.save(path.with_name(path.name.replace(".nii.gz", ".npy")), np.squeeze(array))
        path.unlink()
    data = FolderImages(str(tmp_path / "a"), patch_size=4, normalize="none", axes="RAS")
    for split, cases in data.layout.cases.items():
        for item, case in zip(data.items(split), cases, strict=True):
            image, label = truth[case.name]
            label = np.searchsorted([int(name) for name in data.form.classes], label)
            found = item["image"].numpy(), item["label"].numpy()
            wanted = image.squeeze(-1) if size[2] == 1 else image, label.squeeze()[None]
            if part == "images" and (found[0] != wanted[0]).any():  # stored as LPS: not turned
                wanted = tuple(x[:, ::-1, ::-1] for x in wanted)
            np.testing.assert_array_equal(found[0], wanted[0])
            np.testing.assert_array_equal(found[1], wanted[1])


@pytest.mark.slow
def test_a_network_sees_scans_in_the_orientation_that_it_was_trained_on(tmp_path):
    """The test of other scans gives the same scores, and so does the prediction."""
    volumes(tmp_path / "d")
    stored_as("PIR", tmp_path / "d", tmp_path / "e")
    options = (*SHORT, "data.patch_size=8", "trainer.max_steps=20", "loss=cce", "data.flip=false")
    run_train(*options, cwd=tmp_path)
    [trained] = run_folders(tmp_path).values()
    given = ["data=folder", "data.num_workers=0", "trainer.accelerator=cpu"]
    run_train(*given, "data.root=e", "mode=test", f"checkpoint={trained}", cwd=tmp_path)
    [tested] = set(run_folders(tmp_path).values()) - {trained}
    before, after = (read_result(folder)["metrics"] for folder in (trained, tested))
    names = [name for name in before if name.startswith("test/")]
    assert len(names) > 5
    for name in names:
        assert after[name] == pytest.approx(before[name], abs=1e-5), name
    run_train(*given, "data.root=e/images", "mode=predict", f"checkpoint={trained}", cwd=tmp_path)
    [predicted] = set(run_folders(tmp_path).values()) - {trained, tested}
    for path in (tested / "predictions").iterdir():
        masks = [nibabel.load(folder / "predictions" / path.name) for folder in (tested, predicted)]
        np.testing.assert_array_equal(*(np.asarray(mask.dataobj) for mask in masks))
        image = nibabel.load(tmp_path / "e" / "images" / path.name)
        for mask in masks:
            np.testing.assert_allclose(mask.affine, image.affine)


# --- Memory and threads --------------------------------------------------------------------------


@pytest.mark.parametrize("name, planes", [("beside", 1), ("class_folders_overlap", 2)])
def test_the_images_kept_fit_into_the_budget(name, planes, tmp_path, monkeypatch):
    """An image is float32, a label has two bytes for each of its planes."""
    row = ROWS[name]
    row.build(tmp_path)
    size = 4 * 3 * SIZE[0] * SIZE[1] + 2 * planes * SIZE[0] * SIZE[1]
    data = opened(tmp_path, row)
    for kept in (0, 1, 3):
        data.cache_mb = (kept * size + 1) / 2**20
        items = data.items("train")
        items.fill()
        assert len(items.kept) == kept
        used = sum(x.numel() * x.element_size() for item in items.kept for x in item.values())
        assert used == kept * size
        assert not data.items("test").count


def test_threads_leave_the_switch_of_monai_as_it_is(tmp_path):
    """`set_track_meta` is one switch of the process. With it on, crops carry more than numbers."""
    from monai.data.meta_obj import get_track_meta

    row = ROWS["beside"]
    row.build(tmp_path)
    data = FolderImages(str(tmp_path), patch_size=8)
    assert get_track_meta()
    items = data.items("train")
    for _ in range(5):
        items.kept.clear()
        items.fill()
        assert get_track_meta()
        assert {type(x) for item in items.kept for x in item.values()} == {torch.Tensor}
    assert {type(x) for x in data.patches[0]} == {torch.Tensor} and get_track_meta()


def test_an_image_for_prediction_is_read_when_it_is_due(tmp_path, monkeypatch):
    folders_layouts.pairs(tmp_path)
    form = FolderImages(str(tmp_path), patch_size=8).form
    data = UnlabelledImages(str(tmp_path), form, "none", 8, 4)
    read = []
    monkeypatch.setattr("losswatch.data.patches.load", lambda *a: read.append(a) or load(*a))
    batches = iter(data.predict_dataloader())
    for i in range(3):
        picture, _ = scene(i)
        np.testing.assert_array_equal(next(batches)[0], picture)
        assert len(read) == i + 1
