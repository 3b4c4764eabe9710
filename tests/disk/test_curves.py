"""A run's own record: what is appended is read back, and what is torn or damaged is left out."""

import json
import logging
import os
import resource
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losswatch.disk.curves import Curves, last_watched, read_curves
from losswatch.disk.growing_files import file_sizes, rewind, what_is_lost
from losswatch.events.tags import watched_tags

TAGS = watched_tags(["cce", "dice"], cosines=True)


def write(folder, steps, tags=TAGS, scale=1.0):
    """Rows whose values tell the step and the column; their values, [steps, tags]."""
    values = scale * (np.asarray(steps)[:, None] + np.arange(len(tags)) / 8)
    Curves(folder).append(tags, np.asarray(steps), values)
    return values


def test_rows_and_metrics_are_read_back(tmp_path):
    """One frame: a row for each step, float64, NaN where a tag has no value."""
    record = Curves(tmp_path)
    steps = np.array([0, 10, 20, 2**40])
    values = np.random.default_rng(0).normal(size=(4, len(TAGS)))
    values[1, :4] = [np.nan, np.inf, -np.inf, 1e-45]
    record.append(TAGS, steps[:2], values[:2])
    record.add_metrics(15, {"val/accuracy": 0.1, "val/dice": float("nan")})
    record.append(TAGS, steps[2:], values[2:])
    record.add_metrics(20, {"val/accuracy": 0.2})
    record.add_metrics(20, {"val/accuracy": 0.3, "val/θ": 1.0})  # of a step validated twice
    record.add_metrics(20, {"test/accuracy": 0.4})
    frame = read_curves(tmp_path)
    assert list(frame.index) == [0, 10, 15, 20, 2**40]
    assert frame.index.dtype == np.int64 and frame.index.name == "step"
    assert set(frame.dtypes) == {np.dtype(np.float64)}
    np.testing.assert_array_equal(frame.loc[steps, TAGS], values.astype(np.float32))
    assert frame["val/accuracy"].dropna().to_dict() == {15: 0.1, 20: 0.3}
    assert frame["test/accuracy"].dropna().to_dict() == {20: 0.4}
    assert frame["val/dice"].isna().all() and frame.loc[20, "val/θ"] == 1
    parts = json.loads((tmp_path / "curves.json").read_text())
    assert parts == [{"start": 0, "columns": TAGS}]
    row = np.dtype([("step", "<i8"), ("values", "<f4", (len(TAGS),))])
    assert np.fromfile(tmp_path / "curves.f32", row)["step"].tolist() == steps.tolist()


def test_an_empty_record_is_an_empty_frame(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        frame = read_curves(folder)
        assert frame.empty and frame.index.name == "step" and frame.index.dtype == np.int64
        assert last_watched(folder) == {}
    rewind(tmp_path, {})
    assert read_curves(tmp_path).empty and {p.stat().st_size for p in tmp_path.iterdir()} == {0}


@pytest.mark.parametrize("kept", [1, 9, -1])
def test_a_torn_row_and_a_torn_line_are_left_out(tmp_path, caplog, kept):
    """Of a kill or a full disk: neither is an error."""
    write(tmp_path, range(5))
    Curves(tmp_path).add_metrics(2, {"val/accuracy": 0.5})
    whole = read_curves(tmp_path)
    sizes = file_sizes(tmp_path)
    write(tmp_path, range(5, 6))
    Curves(tmp_path).add_metrics(5, {"val/accuracy": 0.7})
    for name in ("curves.f32", "metrics.jsonl"):
        end = sizes[name] if kept > 0 else (tmp_path / name).stat().st_size
        os.truncate(tmp_path / name, end + kept)
    pd.testing.assert_frame_equal(read_curves(tmp_path), whole)
    assert last_watched(tmp_path)["loss/cce"] == 4 and not caplog.messages
    rewind(tmp_path, sizes)  # as the resumed run does
    write(tmp_path, range(5, 6))
    assert list(read_curves(tmp_path)["loss/cce"]) == [0, 1, 2, 3, 4, 5]


def test_what_cannot_be_written_whole_is_not_there(tmp_path):
    """A full disk, imitated by a limit on file sizes: the rows that follow stay in line."""
    write(tmp_path, range(3))
    before = (tmp_path / "curves.f32").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 17, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path, range(3, 9))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "curves.f32").read_bytes() == before
    write(tmp_path, range(3, 5))
    assert list(read_curves(tmp_path)["loss/cce"]) == [0, 1, 2, 3, 4]


def test_another_attempt_may_observe_other_losses(tmp_path):
    """A run that was begun in a stack of several losses goes on alone."""
    write(tmp_path, range(4))
    sizes = file_sizes(tmp_path)
    write(tmp_path, range(4, 6), ["loss/dice", "grad_norm/dice"])
    frame = read_curves(tmp_path)
    assert list(frame["grad_norm/dice"]) == [0.375, 1.375, 2.375, 3.375, 4.125, 5.125]
    assert frame["loss/cce"].count() == 4 and last_watched(tmp_path) == {
        "loss/dice": 5, "grad_norm/dice": 5.125,
    }  # fmt: skip
    rewind(tmp_path, sizes)  # the second part is gone, and its columns count no longer
    write(tmp_path, range(4, 6))
    assert list(read_curves(tmp_path)["loss/cce"]) == [0, 1, 2, 3, 4, 5]
    assert len(json.loads((tmp_path / "curves.json").read_text())) == 1


def test_the_last_watched_values_are_those_of_the_last_step_with_a_number(tmp_path):
    values = np.arange(100.0).reshape(20, 5)
    values[15:] = np.nan
    values[14, 1] = np.nan
    Curves(tmp_path).append(TAGS, np.arange(20), values)
    last = last_watched(tmp_path)
    assert list(last) == TAGS[:4]  # no cosines
    assert last["loss/cce"] == 70 and np.isnan(last["loss/dice"]) and last["grad_norm/dice"] == 73


def test_cut_to_a_checkpoint(tmp_path):
    """The record, and the event files of losswatch; a short event file is left as it is."""
    write(tmp_path, range(5))
    for name in ("cut", "short", "later"):
        (tmp_path / f"events.out.tfevents.{name}.losswatch").write_bytes(b"x" * 10)
    (tmp_path / "events.out.tfevents.theirs").write_bytes(b"x" * 10)
    sizes = file_sizes(tmp_path)
    assert len(sizes) == 4 and what_is_lost(tmp_path, sizes) is None
    sizes["events.out.tfevents.cut.losswatch"] = 7
    sizes["events.out.tfevents.short.losswatch"] = 12
    sizes["events.out.tfevents.gone.losswatch"] = 3
    del sizes["events.out.tfevents.later.losswatch"]
    write(tmp_path, range(5, 9))
    Curves(tmp_path).add_metrics(8, {"val/accuracy": 0.5})
    assert what_is_lost(tmp_path, sizes) is None
    rewind(tmp_path, sizes)
    left = {p.name.split(".")[-2]: p.stat().st_size for p in tmp_path.glob("events*.losswatch")}
    assert left == {"cut": 7, "short": 10}
    assert (tmp_path / "events.out.tfevents.theirs").stat().st_size == 10
    assert list(read_curves(tmp_path).index) == [0, 1, 2, 3, 4]
    os.truncate(tmp_path / "curves.f32", 30)
    assert what_is_lost(tmp_path, sizes) == "curves.f32 was cut from 140 to 30 bytes"
    (tmp_path / "curves.f32").unlink()
    assert what_is_lost(tmp_path, sizes) == "curves.f32 is gone"


@pytest.mark.parametrize(
    "name, content",
    [
        ("curves.json", "{"), ("curves.json", "[3]"), ("curves.json", '{"columns": []}'),
        ("curves.json", '[{"start": -3, "columns": ["loss/a"]}]'),
        ("curves.json", '[{"start": 0, "columns": ["loss/a", "loss/a"]}]'),
        ("curves.json", '[{"start": 0, "columns": [1]}]'), ("curves.json", None),
        ("curves.f32", None),
        ("metrics.jsonl", "[1]\n"), ("metrics.jsonl", '{"val/a": 1}\n'),
        ("metrics.jsonl", '{"step": 1, "val/a": "x"}\n'), ("metrics.jsonl", None),
        ("metrics.jsonl", "[" * 10**5 + "\n"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_and_left_out(tmp_path, caplog, name, content):
    """The others are read. None: a pipe, at which reading would wait for ever."""
    write(tmp_path, range(3))
    Curves(tmp_path).add_metrics(1, {"val/accuracy": 0.5})
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name) if content is None else (tmp_path / name).write_text(content)
    with caplog.at_level(logging.WARNING):
        frame = read_curves(tmp_path)
    [message] = caplog.messages
    assert message.startswith(f"{tmp_path / name}: left out, cannot be read (")
    assert list(frame) == (TAGS if name == "metrics.jsonl" else ["val/accuracy"])


def test_a_run_of_an_older_losswatch_is_named(tmp_path, caplog):
    Path(tmp_path, "events.out.tfevents.1.host.1.0.losswatch").touch()
    assert read_curves(tmp_path).empty
    assert caplog.messages == [
        f"{tmp_path} was written by an older losswatch (0.1); that version can resume and read it"
    ]


@given(
    st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=4, unique=True),
    st.lists(st.integers(0, 2**62), min_size=1, max_size=5, unique=True),
    st.data(),
)
@settings(max_examples=30, deadline=None)
def test_any_names_and_steps(tmp_path_factory, names, steps, data):
    folder = tmp_path_factory.mktemp("record")
    count = len(steps) * len(names)
    numbers = st.lists(st.floats(width=32, allow_nan=False), min_size=count, max_size=count)
    values = np.reshape(data.draw(numbers), (len(steps), len(names)))
    tags = [f"loss/{name}" for name in names]
    Curves(folder).append(tags, np.array(steps), values)
    np.testing.assert_array_equal(read_curves(folder).loc[steps, tags], values)
