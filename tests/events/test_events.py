"""Encoded blocks of scalars, read back by TensorBoard."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from torch.utils.tensorboard import SummaryWriter

from losswatch.events.encode import encode, masked_crc, write_scalars

TAGS = ["loss/dice", "grad_norm/dice", "grad_cosine/a~b", "θ/損失 1", "x" * 300]


def records(data):
    """The event of each record; its checksums are verified with TensorBoard's function."""
    while data:
        length = data[:8]
        assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(length)
        end = 12 + struct.unpack("<Q", length)[0]
        assert struct.unpack("<I", data[end : end + 4])[0] == masked_crc32c(data[12:end])
        yield Event.FromString(data[12:end])
        data = data[end + 4 :]


def scalars(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(e.step, e.value) for e in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def same(seen, steps, values):
    assert [step for step, _ in seen] == list(steps)
    np.testing.assert_array_equal([v for _, v in seen], np.asarray(values, np.float32))


@given(
    st.lists(st.text(min_size=1, max_size=200), min_size=1, max_size=4, unique=True),
    st.lists(st.integers(0, 2**35 - 1), min_size=1, max_size=5),
    st.floats(0, 4e9),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_encode_is_what_protobuf_reads(tags, steps, wall_time, data):
    shape = (len(steps), len(tags))
    numbers = data.draw(
        st.lists(st.floats(width=32), min_size=math.prod(shape), max_size=math.prod(shape))
    )
    values = np.array(numbers, np.float32).reshape(shape)
    events = list(records(encode(tags, np.array(steps), values, wall_time)))
    assert [e.step for e in events] == steps
    for event, row in zip(events, values, strict=True):
        assert event.wall_time == wall_time
        assert [v.tag for v in event.summary.value] == tags
        np.testing.assert_array_equal([v.simple_value for v in event.summary.value], row)


@given(st.binary(min_size=1, max_size=300))
@settings(deadline=None)
def test_checksum_is_tensorboards(data):
    [crc] = masked_crc(np.frombuffer(data, np.uint8)[None])
    assert int.from_bytes(bytes(crc), "little") == masked_crc32c(data)


def test_read_back_by_tensorboard(tmp_path):
    steps = np.array([0, 1, 127, 128, 16384, 2**31, 2**35 - 1])
    values = np.random.default_rng(0).normal(size=(len(steps), len(TAGS))).astype(np.float32)
    values[1] = [np.nan, np.inf, -np.inf, -0.0, 1e-45]
    with SummaryWriter(tmp_path) as writer:
        write_scalars(writer, TAGS, steps, values)
    seen = scalars(tmp_path)
    assert sorted(seen) == sorted(TAGS)
    for tag, column in zip(TAGS, values.T, strict=True):
        same(seen[tag], steps, column)


def test_interleaved_with_ordinary_writes(tmp_path):
    """Blocks and ordinary events of one writer are in one file, in the order of the calls."""
    values = np.arange(6.0).reshape(3, 2)
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("val/accuracy", 0.5, 0)
        write_scalars(writer, ["loss/a", "loss/b"], np.arange(3), values)
        writer.add_image("images/x", torch.zeros(1, 4, 4), 3)
        writer.add_scalar("val/accuracy", 0.75, 3)
        write_scalars(writer, ["loss/a", "loss/b"], np.arange(3, 6), values + 10)
        writer.add_scalar("val/accuracy", 1.0, 6)
    [file] = tmp_path.iterdir()
    steps = [e.step for e in records(file.read_bytes()) if e.HasField("summary")]
    assert steps == [0, 0, 1, 2, 3, 3, 3, 4, 5, 6]
    seen = scalars(tmp_path)
    same(seen["loss/a"], range(6), [0, 2, 4, 10, 12, 14])
    same(seen["loss/b"], range(6), [1, 3, 5, 11, 13, 15])
    same(seen["val/accuracy"], [0, 3, 6], [0.5, 0.75, 1])
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert [e.step for e in accumulator.Images("images/x")] == [3]


def test_on_disk_at_once(tmp_path):
    """What was written can be read before the writer is closed, so a kill loses nothing."""
    writer = SummaryWriter(tmp_path)
    try:
        write_scalars(writer, ["loss/a"], np.arange(2), np.ones((2, 1)))
        same(scalars(tmp_path)["loss/a"], [0, 1], [1, 1])
    finally:
        writer.close()


def test_float64_is_rounded_to_float32(tmp_path):
    values = np.array([[0.1], [1e-60], [1 / 3]])
    with SummaryWriter(tmp_path) as writer:
        write_scalars(writer, ["a"], np.arange(3), values)
    same(scalars(tmp_path)["a"], range(3), values[:, 0])


@pytest.mark.parametrize("step", [-1, 2**35])
def test_steps_that_do_not_fit_are_refused(step):
    with pytest.raises(ValueError, match="step"):
        encode(["a"], np.array([step]), np.zeros((1, 1)), 0.0)
