"""Folders of images as people have them, as one table: read right, or refused in one line.

*Right*: every image and every label is that of an independent reader, whatever the file's format,
its orientation or its place. *Refused*: one line names the file, the reason and the way out.
"""

import itertools
import re
import unicodedata

import folders_damaged
import folders_datasets
import folders_formats
import folders_layouts
import folders_masks
import folders_nnunet
import folders_scans
import numpy as np
import pytest
from folders import ROWS
from hydra.core.override_parser.overrides_parser import OverridesParser

from losswatch.data.folder import FolderImages

FILES = (folders_damaged, folders_datasets, folders_formats, folders_layouts, folders_masks)
assert all((*FILES, folders_nnunet, folders_scans))  # they fill the table


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def arguments(options):
    """Overrides of the command line as arguments of the data module."""
    parsed = OverridesParser.create().parse_overrides([o for o in options if o.startswith("data.")])
    return {override.key_or_group.removeprefix("data."): override.value() for override in parsed}


def opened(root, row):
    given = {"patch_size": 4, "normalize": "none", "num_workers": 0} | arguments(row.options)
    return FolderImages(str(root), **given)


def assert_refused(row, error):
    line = str(error)
    assert "\n" not in line
    assert re.search(row.refused, line), line
    assert row.at in line, line


def expected(label, row, names):
    """Labels [1 or K, *space] of the truth, in the order of classes of the data module."""
    planes = np.stack([np.isin(label, row.classes[name]) for name in names])
    if row.overlap:
        return planes.astype(int)
    assert (planes.sum(0) + np.isin(label, row.ignored) == 1).all(), "the table is wrong"
    return np.where(planes.any(0), planes.argmax(0), -1)[None]


def turns(array):
    """[channels, *space] with its axes in any order and direction."""
    dims = array.ndim - 1
    for order in itertools.permutations(range(dims)):
        for signs in itertools.product((1, -1), repeat=dims):
            steps = tuple(slice(None, None, sign) for sign in signs)
            yield array.transpose(0, *(k + 1 for k in order))[(slice(None), *steps)]


def is_near(found, true, far):
    """Whether an image is the true one; NaN stands for any value."""
    if found.shape != true.shape:
        return False
    difference = np.nan_to_num(np.abs(found - true.astype(np.float64)))
    return difference.mean() <= far if far else not difference.any()


def assert_read(row, data, truth):
    names = list(data.form.classes)
    assert set(names) == set(row.classes)
    if 0 in row.classes.values() and not names[0].startswith("#"):
        assert names[0] == next(iter(row.classes)), "the background is not the first class"
    assert (data.form.target == "multilabel") == row.overlap
    seen, ways = set(), set(range(48))
    for split, cases in data.layout.cases.items():
        for item, one in zip(data.items(split), cases, strict=True):
            name = unicodedata.normalize("NFC", one.name)
            keys = [k for k in truth if k in (name, f"{split}:{name}") or k.endswith(f"/{name}")]
            keys = [k for k in keys if ":" not in k or k.startswith(f"{split}:")]
            assert len(keys) == 1, f"{name} is not in {sorted(truth)}"
            [key] = keys
            seen.add(key)
            image, label = truth[key]
            wanted = expected(label, row, names)
            found = item["image"].numpy(), item["label"].numpy()
            if row.turned:
                tried = zip(turns(image), turns(wanted), strict=True)
                ways &= {
                    i
                    for i, (x, y) in enumerate(tried)
                    if is_near(found[0], x, row.far) and np.array_equal(found[1], y)
                }
                assert ways, key
                continue
            assert found[0].shape == image.shape, key
            assert is_near(found[0], image, row.far), key
            assert found[1].shape == wanted.shape, key
            assert (found[1] != wanted).mean() <= row.wrong, key
    assert seen == set(truth)


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
