"""Blocks of scalars into a TensorBoard event file, a hundred times as fast as one by one.

A file of events is a row of TFRecords, each a length, its checksum, an Event message and its
checksum. With the tags fixed, every record of a block has the same length and layout, so the
whole block is one array of bytes: numbers are written into columns, and the checksums of all
records are computed side by side.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

SUFFIX = ".losswatch"  # of the names of event files that runs write
STEP_BYTES = 5  # a varint of fixed width, for steps below 2^35


def _crc_table() -> np.ndarray:
    """CRC-32C (Castagnoli), reflected polynomial."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return table


_CRC = _crc_table()


def _masked_crc(rows: np.ndarray) -> np.ndarray:
    """TFRecord's masked CRC-32C of each row; uint8 [B, L] -> little-endian bytes [B, 4].

    >>> bytes(_masked_crc(np.frombuffer(b"123456789", np.uint8)[None])[0]).hex()
    'e5b08ac7'
    """
    crc = np.full(len(rows), 0xFFFFFFFF, dtype=np.uint32)
    for column in np.ascontiguousarray(rows.T):
        crc = _CRC[(crc ^ column) & 0xFF] ^ (crc >> 8)
    crc = ~crc
    masked = ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)
    return masked.astype("<u4").view(np.uint8).reshape(-1, 4)


def _varint(number: int) -> bytes:
    out = b""
    while number >= 0x80:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def encode(tags: Sequence[str], steps: np.ndarray, values: np.ndarray, wall_time: float) -> bytes:
    """Records of one Event a step, each with a simple value for every tag.

    Args:
        tags: K names.
        steps: [B] whole numbers below 2^35.
        values: [B, K].
        wall_time: seconds since the epoch, for the whole block.
    """
    if np.any(np.asarray(steps) >> (7 * STEP_BYTES)):  # a negative one too
        raise ValueError(f"steps must lie in [0, 2^{7 * STEP_BYTES}), got {steps}")
    names = [tag.encode() for tag in tags]
    # Summary.Value: field 1 (tag), field 2 (simple_value, a float32 to be filled in)
    entries = [b"\x0a" + _varint(len(n)) + n + b"\x15\0\0\0\0" for n in names]
    entries = [b"\x0a" + _varint(len(e)) + e for e in entries]
    summary = b"".join(entries)
    # Event: field 1 (wall_time, double), field 2 (step, varint), field 5 (summary)
    head = b"\x09" + np.array(wall_time, "<f8").tobytes() + b"\x10" + bytes(STEP_BYTES)
    event = head + b"\x2a" + _varint(len(summary)) + summary
    rows = np.tile(np.frombuffer(event, np.uint8), (len(steps), 1))

    start = len(head) - STEP_BYTES
    for i in range(STEP_BYTES):
        more = 0x80 if i < STEP_BYTES - 1 else 0
        rows[:, start + i] = (np.asarray(steps) >> (7 * i)) & 0x7F | more
    floats = np.ascontiguousarray(values, "<f4").view(np.uint8).reshape(*values.shape, 4)
    end = len(event) - len(summary)
    for k, entry in enumerate(entries):
        end += len(entry)
        rows[:, end - 4 : end] = floats[:, k]

    length = np.frombuffer(np.array(len(event), "<u8").tobytes(), np.uint8)[None]
    lengths = np.repeat(np.hstack([length, _masked_crc(length)]), len(steps), axis=0)
    return np.hstack([lengths, rows, _masked_crc(rows)]).tobytes()


def write_scalars(
    writer: SummaryWriter, tags: Sequence[str], steps: np.ndarray, values: np.ndarray
) -> None:
    """Append a block to the file of `writer`, after all that it has been given, and flush it."""
    writer.flush()  # its queue is empty now, and only this thread feeds it
    file = _file(writer)
    file.write(encode(tags, steps, values, time.time()))
    file.flush()


def put_last(writer: SummaryWriter) -> None:
    """Give the writer's file a name that stands behind those of the folder's other event files.

    TensorBoard reads the files of a run in the order of their names, which begin with the time. A
    clock that went back, or that of another machine, would put what comes last first.
    """
    assert writer.file_writer is not None
    path = Path(writer.file_writer.event_writer._file_name)
    stamp = re.compile(r"events\.out\.tfevents\.(\d{10})\.")
    others = [other.name for other in path.parent.iterdir() if stamp.match(other.name)]
    if path.name < (last := max(others)):
        later = f"events.out.tfevents.{int(stamp.match(last)[1]) + 1:010}."  # type: ignore[index]
        writer.flush()  # so that nothing is written while the file has no name
        path = path.rename(path.with_name(stamp.sub(later, path.name, count=1)))
        _file(writer).filename = os.fsencode(path)  # TensorBoard opens it anew for each write


def _file(writer: SummaryWriter) -> Any:
    """TensorBoard's file object. There is no public way to it; test_events.py guards this one."""
    assert writer.file_writer is not None
    return writer.file_writer.event_writer._async_writer._writer._writer
