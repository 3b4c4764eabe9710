"""Reads the scalars of one event file, fast, and safely whatever the file contains.

Runs of losswatch write long blocks of events that have the same layout (encode.py). Such a block is
read as one array, hundreds of times as fast as event by event.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.types_pb2 import DT_DOUBLE, DT_FLOAT, DT_HALF
from tensorboard.util.tensor_util import make_ndarray

from losswatch.events.layout import (
    FOOTER_BYTES,
    HEADER_BYTES,
    LENGTH,
    SIMPLE_VALUE,
    STEP,
    SUMMARY,
    TAG,
    VALUE,
    WALL_TIME,
    read_field,
    read_varint,
    read_varint_rows,
)
from losswatch.files import read_file
from losswatch.text import printable, reason

log = logging.getLogger(__name__)

SHORTEST = 9  # records in a row that are worth trying to read as one array


class Block(NamedTuple):
    """The scalars of consecutive events that have the same tags; often of a single event."""

    wall_time: float  # of its first event, seconds since the epoch
    steps: list[int]  # increasing
    values: dict[str, list[float]]  # by tag, a value for each step
    restart: bool = False  # the event marks that what was written from this step on is replaced


def read_blocks(path: Path) -> Iterator[Block]:
    """The scalars of an event file in the order of the file; images and texts give empty blocks.

    A file that cannot be read, and all that follows a torn record or a damaged value, are left out
    with a warning. Checksums are not verified: in Python, that would take ten times as long as all
    the rest.
    """
    try:
        data = read_file(path)
    except OSError as error:
        log.warning("%s: left out, cannot be read (%s)", printable(path), reason(error))
        return
    spans, end = _find_records(data)
    position = 0  # of the record that is being read
    try:
        for size, stretch in groupby(spans, key=itemgetter(1)):
            starts = [start for start, _ in stretch]
            if len(starts) >= SHORTEST and (block := _read_block(data, starts, size)):
                yield block
                continue
            for start in starts:
                position = start - HEADER_BYTES
                yield _read_event(Event.FromString(data[start : start + size]))
        position = end
        torn = end < len(data)
    except DecodeError:
        torn = True
    except (ValueError, OverflowError) as error:  # a tensor's bytes do not fit its type
        log.warning("%s: damaged; the rest is left out (%s)", printable(path), reason(error))
        return
    if torn:
        log.warning("%s: torn at byte %d; what follows is left out", printable(path), position)


def read_last(path: Path, prefixes: tuple[str, ...]) -> Block | None:
    """What the file holds under tags with one of `prefixes` at the last step with a number there.

    None if there is nothing. The file is searched from its end, so this takes milliseconds where
    `read_blocks` takes tenths of a second. Nothing is said of damage: `read_blocks` names it.

    Raises:
        OSError: the file cannot be read.
    """
    data = read_file(path)
    last: Block | None = None
    for start, size in reversed(_find_records(data)[0]):
        try:
            block = _read_event(Event.FromString(data[start : start + size]))
        except (DecodeError, ValueError, OverflowError):
            continue
        values = {tag: v for tag, v in block.values.items() if tag.startswith(prefixes)}
        if last and values and block.steps != last.steps and _has_number(last):
            break
        if last and block.steps == last.steps:  # written in several events
            values |= last.values
        if values:
            last = block._replace(values=values)
    return last if last and _has_number(last) else None


def _has_number(block: Block) -> bool:
    return any(value == value for column in block.values.values() for value in column)


def _find_records(data: bytes) -> tuple[list[tuple[int, int]], int]:
    """Where each event begins and its size in bytes; where the last whole record ends."""
    spans = []
    position = 0
    while position + HEADER_BYTES <= len(data):
        (size,) = LENGTH.unpack_from(data, position)
        start = position + HEADER_BYTES
        if size == 0 or start + size + FOOTER_BYTES > len(data):
            break
        spans.append((start, size))
        position = start + size + FOOTER_BYTES
    return spans, position


def _read_event(event: Any) -> Block:
    """The scalars of an `Event`.

    Raises:
        ValueError, OverflowError: a tensor's bytes do not fit its type.
    """
    values = {}
    for value in event.summary.value:
        if value.HasField("simple_value"):
            values[value.tag] = [value.simple_value]
        elif value.HasField("tensor") and _is_scalar(value.tensor):
            values[value.tag] = [make_ndarray(value.tensor).item()]
        # anything else is an image, HParams or a layout of charts
    restart = event.session_log.status == SessionLog.START
    return Block(event.wall_time, [event.step], values, restart)


def _is_scalar(tensor: Any) -> bool:
    """Whether a tensor in an event is one floating-point number (half, float or double)."""
    return tensor.dtype in (DT_HALF, DT_FLOAT, DT_DOUBLE) and all(
        d.size == 1 for d in tensor.tensor_shape.dim
    )


def _read_block(data: bytes, starts: list[int], size: int) -> Block | None:
    """Consecutive events of one size as one block, read as one array.

    The first event tells where the step and the values lie. None if the events differ anywhere else
    than there and in their times, or if their steps do not increase.
    """
    places = _find_scalars(data[starts[0] : starts[0] + size])
    if places is None:
        return None
    stride = HEADER_BYTES + size + FOOTER_BYTES
    rows = np.ndarray((len(starts), size), np.uint8, data, starts[0], (stride, 1))
    fixed = np.ones(size, bool)
    fixed[places.time] = fixed[places.step] = False
    for place in places.values.values():
        fixed[place] = False
    steps = read_varint_rows(rows[:, places.step])
    if (rows[:, fixed] != rows[0, fixed]).any() or steps is None or (np.diff(steps) <= 0).any():
        return None
    values = {
        tag: rows[:, place].copy().view("<f4")[:, 0].astype(float).tolist()
        for tag, place in places.values.items()
    }
    [wall_time] = rows[0, places.time].copy().view("<f8").tolist()
    return Block(wall_time, steps.tolist(), values)


class Places(NamedTuple):
    """Where an event holds its numbers, as slices of its bytes."""

    time: slice
    step: slice
    values: dict[str, slice]  # by tag


def _find_scalars(event: bytes) -> Places | None:
    """The places in an event of scalars; None if the event holds anything else."""
    try:
        if not (event.startswith(WALL_TIME) and event.startswith(STEP, 9)):
            return None
        time, (_, end) = slice(1, 9), read_varint(event, 10)
        step = slice(10, end)
        if end - 10 > 9:  # more than an int64 holds
            return None
        start, end = read_field(event, end, SUMMARY)
        if end != len(event):
            return None
        values: dict[str, slice] = {}
        while start < end:
            start, stop = read_field(event, start, VALUE)
            tag_start, tag_end = read_field(event, start, TAG)
            tag = event[tag_start:tag_end].decode()
            if not event.startswith(SIMPLE_VALUE, tag_end) or tag_end + 5 != stop or tag in values:
                return None
            values[tag] = slice(tag_end + 1, stop)
            start = stop
    except (ValueError, IndexError):  # another layout
        return None
    return Places(time, step, values) if values else None
