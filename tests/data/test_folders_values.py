"""Values of masks: how they are written, that they are read back; files that change."""

import shutil
import sqlite3

import nibabel
import numpy as np
import pytest
import tifffile
from folders import AFFINE, NAMES, SMALL, THREE, Row, pairs, put, scene
from folders_checks import assert_read, opened
from folders_flat import flat_scans
from folders_lists import write_lists
from folders_scans import write_itk, write_series
from folders_table import ROWS
from PIL import Image

from losswatch.data import folder as module
from losswatch.data.coding import check_classes, values_of
from losswatch.data.folder import FolderImages
from losswatch.data.labels import Coding, members, owners
from losswatch.data.reading import read
from losswatch.data.writing import write_mask


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# --- The value that is written for a class -------------------------------------------------------

SINGLES = (*range(-3, 4), *range(126, 130), *range(253, 258), 1000)
ENDS = (-300, -5, -2.5, 0, 0.5, 1, 3, 127, 200.5, 255, 256, 300)
WHOLE = (*range(-302, 303), 1000)  # a class of any whole number has one of these


def is_inside(value, threshold):
    number = float(threshold.strip("<>="))
    return (
        value == number and "=" in threshold
        or value < number and "<" in threshold
        or value > number and ">" in threshold
    )  # fmt: skip


def owner(value, classes, ignored):
    """The class of a value: single values go before thresholds, and these before the rest."""
    if value == ignored:
        return -1
    kinds = (
        lambda x: x == value,
        lambda x: isinstance(x, str) and x != "rest" and is_inside(value, x),
        lambda x: x == "rest",
    )
    for is_its in kinds:
        for label, given in enumerate(classes.values()):
            if any(map(is_its, given)):
                return label
    return None


def some_classes(rng):
    """Settings that name no value twice: single values, thresholds, the rest, ignored pixels."""
    low, high = sorted(rng.choice(ENDS, 2, replace=False))
    parts = [int(v) for v in rng.choice(SINGLES, rng.integers(1, 5), replace=False)]
    parts += [f"<{'=' * int(rng.integers(2))}{low:g}"] * int(rng.integers(2))
    parts += [f">{'=' * int(rng.integers(2))}{high:g}"] * int(rng.integers(2))
    parts += ["rest"] * int(rng.integers(2))
    ignored = parts.pop(0) if rng.integers(2) else None
    parts = [parts[i] for i in rng.permutation(len(parts))]
    count = min(len(parts), int(rng.integers(2, 5)))
    return {f"c{i}": parts[i::count] for i in range(count)}, ignored


def test_the_value_written_for_a_class_is_read_back_as_that_class():
    rng, tried = np.random.default_rng(0), 0
    for _ in range(600):
        given, ignored = some_classes(rng)
        wanted = list(range(len(given)))
        if set(wanted) - {owner(v, given, ignored) for v in WHOLE}:
            continue  # a class of no whole number
        tried += 1
        nearest = any(str(v)[0] in "<>" for values in given.values() for v in values)
        coding = Coding(check_classes(given, overlap=False), ignored, nearest=nearest)
        values = values_of(coding)
        assert [owner(v, given, ignored) for v in values] == wanted, (given, ignored, values)
        assert owners(np.array(values), coding)[0].tolist() == wanted, (given, ignored, values)
    assert tried > 200


@pytest.mark.parametrize("ignored", [None, "#ffffff", "#000001"])
@pytest.mark.parametrize(
    "given",
    [
        {"sky": "#000000", "road": "#FF0000"},
        {"sky": "rest", "road": ["#ff0000", "#fe0000"]},
        {"sky": "#fffffe", "road": "rest", "car": "#0000ff"},
        {"sky": ["#123456", "#000002"], "road": "#654321"},
    ],
)
def test_the_colour_written_for_a_class_is_read_back_as_that_class(given, ignored):
    coding = Coding(check_classes(given, overlap=False), ignored, colours=True)
    values = [int(colour.removeprefix("#"), 16) for colour in values_of(coding)]
    assert owners(np.array(values), coding)[0].tolist() == list(range(len(given)))


def test_the_value_written_for_a_class_that_overlaps_is_one_of_its():
    given = {"a": "rest", "b": ">127", "c": 5, "d": [7, "<-3"], "e": "<-3", "f": ">=300", "g": -1}
    coding = Coding(check_classes(given, overlap=True), overlap=True)
    for name, value in zip(given, values_of(coding), strict=True):
        assert members(np.array([value]), dict(coding.classes)[name]).all(), (name, value)
        assert value != 0  # which a mask holds elsewhere


# --- Files of predicted masks --------------------------------------------------------------------


def array_of(path):
    """A mask in the order of its file's axes, by the library of its format."""
    if path.suffix == ".tif":
        return tifffile.imread(path)
    if path.suffix == ".npy":
        return np.load(path)
    if path.name.endswith(".nii.gz"):
        return np.asarray(nibabel.load(path).dataobj)
    return itk_of(path)[0].T


def itk_of(path):
    sitk = pytest.importorskip("SimpleITK")
    found = sitk.ReadImage(str(path))
    places = (found.GetSpacing(), found.GetOrigin(), found.GetDirection())
    return sitk.GetArrayFromImage(found), found.GetSize(), np.concatenate(places)


LARGE = (2**31 + 5, -(2**31) - 6, 2**40)


@pytest.mark.parametrize("image", ["a.png", "a.tif", "a.npy", "a.nii.gz", "a.mha"])
@pytest.mark.parametrize("value", LARGE)
def test_values_beyond_int32_are_written_as_they_are(image, value, tmp_path):
    is_volume = image.endswith((".gz", ".mha"))
    picture, label = scene(0, SMALL if is_volume else (40, 48))
    if image.endswith(".mha"):
        write_itk(tmp_path / image, picture[0])
    else:
        put(tmp_path / image, picture[0])
    label = label.astype(np.int64) * value
    path = write_mask(label, tmp_path / "mask", tmp_path / image)
    np.testing.assert_array_equal(array_of(path), label)
    for written in (np.uint8(label != 0), label):  # of a data set that has such values, all alike
        path = write_mask(written, tmp_path / "mask", tmp_path / image, values=[0, value])
        np.testing.assert_array_equal(array_of(path), written)


def written(root, out, **options):
    """The true masks of all images as `mode=test` writes them, with the files of the cases."""
    data = FolderImages(str(root), patch_size=4, normalize="none", **options)
    values = np.array(data.values).astype(int)
    for split, cases in data.layout.cases.items():
        for item, case in zip(data.items(split), cases, strict=True):
            mask = values[item["label"][0].numpy()]
            path = write_mask(
                mask, out / case.name, case.images[0], values=values, axes=data.form.axes
            )
            yield path, case.images[0], case.masks[0][0]


FLAT, MIRRORED = np.diag([0.5, 0.7, 3.0, 1.0]), np.diag([-0.5, 0.7, 3.0, 1.0])


@pytest.mark.parametrize("shape", [(40, 48, 1), (40, 48)])
@pytest.mark.parametrize("is_placed", [True, False])
def test_a_written_mask_of_a_flat_nifti_lies_on_its_image(shape, is_placed, tmp_path):
    for i, name in enumerate(NAMES):
        image, label = scene(i)
        for part, array in (("images", image[0]), ("masks", label)):
            file = nibabel.Nifti1Image(array.reshape(shape), MIRRORED if i % 3 == 0 else FLAT)
            if not is_placed:
                file.header.set_sform(None, 0)
                file.header.set_qform(None, 0)
                file = nibabel.Nifti1Image(array.reshape(shape), None, file.header)
                file.header.set_zooms((0.5, 0.7, 3.0)[: len(shape)])
            (tmp_path / "d" / part).mkdir(parents=True, exist_ok=True)
            nibabel.save(file, tmp_path / "d" / part / f"{name}.nii.gz")
    for path, image, mask in written(tmp_path / "d", tmp_path):
        found, true, image = nibabel.load(path), nibabel.load(mask), nibabel.load(image)
        np.testing.assert_array_equal(np.squeeze(found.dataobj), np.squeeze(true.dataobj))
        np.testing.assert_allclose(found.affine, image.affine)
        assert found.header.get_zooms()[:2] == image.header.get_zooms()[:2]


def test_a_written_mask_keeps_the_spacing_of_a_nifti_without_a_place(tmp_path):
    for part, k in (("images", 0), ("masks", 1)):
        (tmp_path / "d" / part).mkdir(parents=True)
        for i, name in enumerate(NAMES):
            array = scene(i, SMALL)[k]
            file = nibabel.Nifti1Image(array[0] if k == 0 else array, None)
            file.header.set_zooms((0.5, 0.7, 3.0))
            nibabel.save(file, tmp_path / "d" / part / f"{name}.nii.gz")
    for path, image, mask in written(tmp_path / "d", tmp_path):
        found, image = nibabel.load(path), nibabel.load(image)
        assert found.header.get_zooms() == image.header.get_zooms() == (0.5, np.float32(0.7), 3)
        np.testing.assert_allclose(found.affine, image.affine)
        np.testing.assert_array_equal(array_of(path), array_of(mask))


@pytest.mark.parametrize(
    "image, slices", [(".dcm", 1), (".mha", 1), (".nrrd", 1), (".mha", 0), (".nrrd", 0)]
)
def test_a_written_mask_of_a_slice_has_the_geometry_of_its_image(image, slices, tmp_path):
    (tmp_path / "d").mkdir()
    flat_scans(tmp_path / "d", image, ".mha", slices, (40, 48))
    for path, source, mask in written(tmp_path / "d", tmp_path):
        found, size, place = itk_of(path)
        assert size == itk_of(source)[1]
        np.testing.assert_allclose(place, itk_of(source)[2], atol=1e-5)
        np.testing.assert_array_equal(found, itk_of(mask)[0])


# --- Files that change ---------------------------------------------------------------------------


def scans_of_files(root):
    """MetaImage and its .raw, whose classes are swapped then."""
    truth = {}
    for i, name in enumerate(NAMES[:6]):
        image, label = scene(i, SMALL, 3)
        write_itk(root / "images" / f"{name}.mhd", image[0], AFFINE)
        write_itk(root / "masks" / f"{name}.mhd", label, AFFINE)
        truth[name] = image[:1], label
    yield truth
    for name, (image, label) in truth.items():
        swapped = np.uint8([0, 2, 1])[label]
        (root / "masks" / f"{name}.raw").write_bytes(swapped.tobytes(order="F"))
        truth[name] = image, swapped
    yield truth


def scans_of_slices(root):
    """A series of DICOM of which one slice becomes brighter."""
    truth = {}
    for i, name in enumerate(NAMES[:4]):
        image, label = scene(i, SMALL, 3)
        write_series(root / "images" / name, image[0].astype(np.int16))
        write_itk(root / "masks" / f"{name}.nrrd", label)
        truth[name] = image[:1].astype(np.int16), label
    yield truth
    image = truth["02"][0].copy()
    image[..., 5] += 1000
    write_series(root.parent / "other" / "02", image[0])
    file = f"{7 * 5 % SMALL[2]:04}.dcm"
    shutil.copy(root.parent / "other" / "02" / file, root / "images" / "02" / file)
    yield truth | {"02": (image, truth["02"][1])}


def masks_inverted(root):
    truth = pairs(root)
    yield truth
    for name, (image, label) in truth.items():
        put(root / "masks" / f"{name}.png", 1 - label)
        truth[name] = image, 1 - label
    yield truth


def pair_added(root):
    truth = pairs(root)
    yield truth
    yield truth | pairs(root, names=["09", "10"], first=20)


def lists_changed(root):
    truth = pairs(root)
    for split in ((0, 4, 6), (2, 6, 8)):
        parts = {"train": NAMES[split[0] : split[1]], "val": NAMES[split[1] : split[2]]}
        write_lists(root, **parts)
        yield {f"{part}:{name}": truth[name] for part, names in parts.items() for name in names}


CHANGES = {
    masks_inverted: {"0": 0, "1": 1}, pair_added: {"0": 0, "1": 1}, lists_changed: {"0": 0, "1": 1},
    scans_of_files: THREE, scans_of_slices: THREE,
}  # fmt: skip


@pytest.mark.parametrize("is_same_process", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_files_that_change_are_looked_at_again(change, is_same_process, tmp_path):
    row = Row(change, classes=CHANGES[change], turned=CHANGES[change] is THREE)
    (tmp_path / "d").mkdir()
    for truth in change(tmp_path / "d"):
        data = opened(tmp_path / "d", row)
        assert_read(row, data, truth)
        images = [image for key, (image, _) in truth.items()]
        assert data.survey.splits["high"].max() == max(image.max() for image in images)
        if not is_same_process:  # what a process keeps is lost
            for kept in vars(module).values():
                getattr(kept, "cache_clear", int)()


def damaged_row(file):
    with sqlite3.connect(file) as base:
        assert base.execute("UPDATE looks SET look = ?", (b"\x80\x04junk",)).rowcount == 8


def other_schema(file):
    file.unlink()
    with sqlite3.connect(file) as base:
        base.execute("CREATE TABLE looks (a TEXT)")


def other_content(file):
    file.write_bytes(b"junk" * 3000)


def cut_off(file):
    file.write_bytes(file.read_bytes()[:5000])


@pytest.mark.parametrize("spoil", [damaged_row, other_schema, other_content, cut_off])
def test_a_damaged_file_of_earlier_looks_is_no_harm(spoil, tmp_path):
    row = ROWS["rgba_masks"]
    truth = row.build(tmp_path / "d")
    for _ in range(2):
        data = opened(tmp_path / "d", row)
        assert_read(row, data, truth)
        spoil(tmp_path / "cache" / "losswatch" / "looks.sqlite")
        for kept in vars(module).values():
            getattr(kept, "cache_clear", int)()
    assert_read(row, opened(tmp_path / "d", row), truth)


# --- What is said --------------------------------------------------------------------------------


def test_masks_in_a_folder_elsewhere(tmp_path):
    truth = pairs(tmp_path / "d")
    (tmp_path / "d" / "masks").rename(tmp_path / "drawn")
    row = Row(pairs, (f"data.masks={tmp_path}/drawn",), {"0": 0, "1": 1})
    assert_read(row, opened(tmp_path / "d", row), truth)


ALL_READ = ["rgba_masks", "sub_folders", "beside", "class_folders_overlap", "class_folders_split",
         "splits_upper_case", "npz", "promise12", "dicom_nifti", "nn_label_order",
         "nn_splits_final", "nn_test_labels", "brats_raw", "kits", "hidden_everywhere"]  # fmt: skip


@pytest.mark.parametrize("name", ALL_READ)
def test_nothing_is_left_where_all_is_read(name, tmp_path):
    (tmp_path / "d").mkdir()
    ROWS[name].build(tmp_path / "d")
    for path in tmp_path.rglob("survival_info.csv"):
        path.unlink()
    data = opened(tmp_path / "d", ROWS[name])
    assert not [note for note in data.survey.notes if "not used" in note]


def test_runs_in_a_folder_are_no_data(tmp_path):
    """As in a sweep that was started in the folder of the images."""
    pairs(tmp_path, "{}.png", "{}_mask.png")
    sweep = tmp_path / "outputs" / "2026-01-01"
    for place in (sweep / "loss=dice", sweep):
        pairs(place, "{}.png", "{}_mask.png", ("11", "12"))
    (sweep / "multirun.yaml").touch()
    (tmp_path / "outputs" / "single" / ".hydra").mkdir(parents=True)
    pairs(tmp_path / "outputs" / "single", "{}.png", "{}_mask.png", ("13",))
    data = FolderImages(str(tmp_path), patch_size=4)
    names = [case.name for part in data.layout.cases.values() for case in part]
    assert sorted(names) == list(NAMES) and not data.survey.notes


# --- What a second review found -------------------------------------------------------------------


def test_a_tiff_of_colours_is_turned_once(tmp_path):
    """Pillow turns a TIFF when it reads it, tifffile does not."""
    table = np.stack([np.arange(256) * 257] * 3).astype(np.uint16)
    for i, name in enumerate(NAMES):
        picture, label = scene(i)
        stored = np.ascontiguousarray(picture[0, ::-1, ::-1])
        tags = [(274, "H", 1, 3, True)]
        put(tmp_path / "images" / f"{name}.tif", stored, photometric="palette", colormap=table,
            extratags=tags)  # fmt: skip
        put(tmp_path / "masks" / f"{name}.png", label)
    data = FolderImages(str(tmp_path), patch_size=4, normalize="none")
    for item, case in zip(data.items("train"), data.layout.cases["train"], strict=True):
        np.testing.assert_array_equal(item["image"], [scene(NAMES.index(case.name))[0][0]] * 3)


def test_the_numbers_of_a_header_with_dots_in_its_name(tmp_path):
    """p.0.mhd and its p.0.raw, in a folder with a dot: seen when they change, and not left over."""
    sitk = pytest.importorskip("SimpleITK")
    for value in (1, 2):
        for i in range(6):
            picture, label = scene(i, SMALL)
            for kind, array in (("images", picture[0]), ("masks", label * np.uint8(value))):
                path = tmp_path / "v1.0" / kind / f"p.{i}.mhd"
                path.parent.mkdir(parents=True, exist_ok=True)
                sitk.WriteImage(sitk.GetImageFromArray(array), path)
        data = FolderImages(str(tmp_path / "v1.0"), patch_size=4)
        assert data.form.classes == ("0", str(value)) and not data.survey.notes


@pytest.mark.parametrize("suffix", [".tif", ".npy"])
def test_three_slices_are_a_volume(suffix, tmp_path):
    for i, name in enumerate(NAMES):
        picture, label = scene(i, (3, 24, 28))
        put(tmp_path / "images" / f"{name}{suffix}", picture[0])
        put(tmp_path / "masks" / f"{name}{suffix}", label)
    data = FolderImages(str(tmp_path), patch_size=[2, 4, 4], normalize="none")
    assert data.form.dims == 3 and data.form.classes == ("0", "1")


def test_colours_of_an_array_are_channels(tmp_path):
    for i, name in enumerate(NAMES):
        picture, label = scene(i)
        put(tmp_path / "images" / f"{name}.npy", np.moveaxis(picture, 0, -1))
        put(tmp_path / "masks" / f"{name}.npy", np.stack([label * np.uint8(255)] * 3, -1))
    data = FolderImages(str(tmp_path), patch_size=4)
    assert data.form.in_channels == 3 and data.form.classes == ("0", "255")


def test_greys_that_two_indices_share_do_not_merge_classes(tmp_path):
    pairs(tmp_path, classes=3)
    for path in (tmp_path / "masks").iterdir():
        mask = Image.fromarray(np.asarray(Image.open(path)), "P")
        mask.putpalette([0, 0, 0, 255, 255, 255, 255, 255, 255])
        mask.save(path)
    assert FolderImages(str(tmp_path), patch_size=4).form.classes == ("0", "1", "2")


@pytest.mark.parametrize("image", ["a.npy", "a.png", "a.mha"])
def test_colours_are_written_as_a_picture(image, tmp_path):
    if image.endswith("mha"):
        sitk = pytest.importorskip("SimpleITK")
        sitk.WriteImage(sitk.GetImageFromArray(scene(0)[0][0]), tmp_path / image)
    else:
        put(tmp_path / image, scene(0)[0][0])
    label = np.array([0x4682B4, 0x804080])[scene(0)[1]]
    path = write_mask(label, tmp_path / "mask", tmp_path / image, colours=True)
    stored = np.asarray(Image.open(path)).astype(int)
    np.testing.assert_array_equal(stored @ [65536, 256, 1], label)


def test_lists_count_where_they_are_the_split_alone(tmp_path):
    pairs(tmp_path)
    write_lists(tmp_path, train=NAMES[:4], val=NAMES[4:6], test=["99"])
    data = FolderImages(str(tmp_path), patch_size=4)
    assert "test.txt names 1 image without a mask, 99 first" in data.survey.notes
    for split in ("train", "val"):
        pairs(tmp_path / "b" / split)
    write_lists(tmp_path / "b", train=NAMES[:1], val=NAMES[1:2])
    notes = FolderImages(str(tmp_path / "b"), patch_size=4).survey.notes
    assert notes == ("not used: 2 files (2 .txt), train.txt is the first",)


def test_a_header_that_two_threads_parse_at_once_is_read_again(tmp_path, monkeypatch):
    """Python 3.11: SystemError, "AST constructor recursion depth mismatch"."""
    np.save(tmp_path / "a.npy", np.arange(12.0).reshape(3, 4))
    load, calls = np.load, []

    def once(*args, **options):
        calls.append(args)
        if len(calls) == 1:
            raise SystemError("AST constructor recursion depth mismatch")
        return load(*args, **options)

    monkeypatch.setattr(np, "load", once)
    assert read(tmp_path / "a.npy", False).array.size == 12 and len(calls) == 2
