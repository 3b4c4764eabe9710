"""Whether a folder of the table is read right, is refused in one line, and is spoken of."""

import itertools
import re
import unicodedata

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from losswatch.data.folder import FolderImages


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
        labels = []
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
            labels.append(found[1].reshape(len(wanted), -1))
            assert np.isfinite(found[0]).all()
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
        assert_shares(data, split, np.concatenate(labels, 1))
    assert seen == set(truth)


def assert_shares(data, split, labels):
    """The table of shares is that of the labels [1 or K, pixels] that a network sees."""
    names = data.form.classes
    if data.form.target != "multilabel":
        labels = np.eye(len(names))[labels[labels >= 0]].T
    table = data.survey.classes  # DataFrame.query would parse its text each time: 3 ms
    shares = table[table["split"] == split].set_index("class")["share"]
    assert shares.to_dict() == pytest.approx(dict(zip(names, labels.mean(1), strict=True)))


def assert_said(row, notes):
    assert sum(note.startswith("not used") for note in notes) <= 1, notes
    if row.said:
        assert sum(re.search(row.said, note) is not None for note in notes) == 1, notes
