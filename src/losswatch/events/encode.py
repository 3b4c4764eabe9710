"""Writes blocks of scalars into a TensorBoard event file, a hundred times as fast as one by one.

The tags of a block are fixed, so all its records have the same length and layout (layout.py). The
whole block is therefore one array of bytes with a row for each record: steps and values are written
into its columns, and the checksums of all records are computed side by side.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from losswatch.compat import event_file
from losswatch.events.layout import (
    LENGTH,
    SIMPLE_VALUE,
    STEP,
    SUMMARY,
    TAG,
    VALUE,
    WALL_TIME,
    field,
    varint_rows,
)

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

STEP_BYTES = 5  # width of each step's varint, enough for steps below 2^35


def _crc_table() -> np.ndarray:
    """CRC-32C (Castagnoli, reflected polynomial) of each single byte; uint32 [256]."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return table


_CRC = _crc_table()


def masked_crc(rows: np.ndarray) -> np.ndarray:
    """TFRecord's masked CRC-32C of each row; uint8 [B, L] -> little-endian bytes [B, 4].

    >>> bytes(masked_crc(np.frombuffer(b"123456789", np.uint8)[None])[0]).hex()
    'e5b08ac7'
    """
    crc = np.full(len(rows), 0xFFFFFFFF, dtype=np.uint32)
    for column in np.ascontiguousarray(rows.T):
        crc = _CRC[(crc ^ column) & 0xFF] ^ (crc >> 8)
    crc = ~crc
    masked = ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)
    return masked.astype("<u4").view(np.uint8).reshape(-1, 4)


def encode(tags: Sequence[str], steps: np.ndarray, values: np.ndarray, wall_time: float) -> bytes:
    """One record for each step, with a scalar for each tag.

    Args:
        tags: K names.
        steps: [B] whole numbers in [0, 2^35).
        values: [B, K], rounded to float32.
        wall_time: seconds since the epoch, the same for the whole block.

    Raises:
        ValueError: a step is out of range.
    """
    if np.any(np.asarray(steps) >> (7 * STEP_BYTES)):  # of a negative step, too
        raise ValueError(f"steps must lie in [0, 2^{7 * STEP_BYTES}), got {steps}")

    # One event, with zeros in place of the step and of the values.
    head = WALL_TIME + struct.pack("<d", wall_time) + STEP + bytes(STEP_BYTES)
    scalars = [
        field(VALUE, field(TAG, tag.encode()) + SIMPLE_VALUE + struct.pack("<f", 0)) for tag in tags
    ]
    summary = b"".join(scalars)
    event = head + field(SUMMARY, summary)

    rows = np.tile(np.frombuffer(event, np.uint8), (len(steps), 1))
    rows[:, len(head) - STEP_BYTES : len(head)] = varint_rows(steps, STEP_BYTES)
    floats = np.ascontiguousarray(values, "<f4").view(np.uint8).reshape(*values.shape, 4)
    end = len(event) - len(summary)
    for k, scalar in enumerate(scalars):
        end += len(scalar)  # its last four bytes are the value
        rows[:, end - 4 : end] = floats[:, k]

    length = np.frombuffer(LENGTH.pack(len(event)), np.uint8)[None]
    header = np.repeat(np.hstack([length, masked_crc(length)]), len(steps), axis=0)
    return np.hstack([header, rows, masked_crc(rows)]).tobytes()


def write_scalars(
    writer: SummaryWriter, tags: Sequence[str], steps: np.ndarray, values: np.ndarray
) -> None:
    """Append a block to the writer's file, behind all that the writer was given, and flush it.

    Args:
        writer: only this thread may use it meanwhile.
        tags, steps, values: as `encode` takes them.
    """
    writer.flush()  # now nothing is queued, since only this thread fills the queue
    file = event_file(writer)
    file.write(encode(tags, steps, values, time.time()))
    file.flush()


def append_picture(file: Path, tag: str, png: bytes, step: int) -> None:
    """Append a picture to an event file that is closed; `png` is the content of a PNG file."""
    # Imported late: `from losswatch import Watch` needs nothing but PyTorch.
    from tensorboard.compat.proto.summary_pb2 import Summary

    width, height = struct.unpack(">II", png[16:24])  # of every PNG
    image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
    _append(file, Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def append_text(file: Path, tag: str, text: str, step: int) -> None:
    """Append a text (Markdown) to an event file that is closed."""
    from torch.utils.tensorboard.summary import text as text_summary

    _append(file, text_summary(tag, text), step)


def _append(file: Path, summary: Any, step: int) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    event = Event(wall_time=time.time(), step=step, summary=summary)
    with file.open("ab") as events:
        RecordWriter(events).write(event.SerializeToString())
