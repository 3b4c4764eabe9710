"""The layout of an event file: what its writer and its reader both rely on.

An event file is a sequence of TFRecords. All numbers are little-endian. A record consists of

    length      uint64, the size of the event in bytes
    checksum    uint32, masked CRC-32C of the length
    event       a protocol-buffer message of type Event
    checksum    uint32, masked CRC-32C of the event

An event with scalars, as runs write it, consists of

    09 <float64>                wall_time, seconds since the epoch
    10 <varint>                 step
    2a <varint> ...             summary: its length, then for each scalar
        0a <varint> ...             value: its length, then
            0a <varint> ...             tag: its length, then UTF-8 text
            15 <float32>                simple_value

The first byte of a field holds the field's number and type. A varint is a whole number in groups of
seven bits, one group a byte, the lowest first; the eighth bit is set in all bytes but the last.
"""

from __future__ import annotations

import struct

import numpy as np

# Names of files: TensorBoard begins them all with PREFIX, runs of losswatch end theirs with SUFFIX.
PREFIX = "events.out.tfevents."
SUFFIX = ".losswatch"

# Records.
LENGTH = struct.Struct("<Q")
HEADER_BYTES = 12  # before the event: its length and the checksum of that
FOOTER_BYTES = 4  # after the event: its checksum

# First bytes of the fields of an event.
WALL_TIME, STEP, SUMMARY = b"\x09", b"\x10", b"\x2a"
VALUE = b"\x0a"  # of a summary
TAG, SIMPLE_VALUE = b"\x0a", b"\x15"  # of a value


def varint(number: int) -> bytes:
    """A whole number, at least 0, as a varint.

    >>> varint(300).hex()
    'ac02'
    """
    groups = b""
    while number >= 0x80:
        groups += bytes([number & 0x7F | 0x80])
        number >>= 7
    return groups + bytes([number])


def read_varint(data: bytes, start: int) -> tuple[int, int]:
    """The varint at `start`, and the position behind it.

    Raises:
        IndexError: the data ends before the varint does.

    >>> read_varint(bytes.fromhex("ac02"), 0)
    (300, 2)
    """
    end = start
    while data[end] & 0x80:
        end += 1
    groups = range(start, end + 1)
    return sum((data[i] & 0x7F) << 7 * (i - start) for i in groups), end + 1


def varint_rows(numbers: np.ndarray, width: int) -> np.ndarray:
    """Numbers as varints of one width, with groups of zeros in front; [B] -> uint8 [B, width].

    >>> [bytes(row).hex() for row in varint_rows(np.array([1, 300]), 3)]
    ['818000', 'ac8200']
    """
    groups = np.asarray(numbers, np.int64)[:, None] >> 7 * np.arange(width)
    more = np.where(np.arange(width) < width - 1, 0x80, 0)
    return (groups & 0x7F | more).astype(np.uint8)


def read_varint_rows(rows: np.ndarray) -> np.ndarray | None:
    """Varints of one width, at most 9 bytes; uint8 [B, width] -> int64 [B], None if they differ.

    >>> read_varint_rows(varint_rows(np.array([1, 300]), 3))
    array([  1, 300])
    """
    width = rows.shape[1]
    if ((rows >> 7) != (np.arange(width) < width - 1)).any():
        return None
    return ((rows & 0x7F).astype(np.int64) << 7 * np.arange(width)).sum(1)


def field(key: bytes, content: bytes) -> bytes:
    """A field whose content has a length: text or a message. `key` is the field's first byte."""
    return key + varint(len(content)) + content


def read_field(data: bytes, start: int, key: bytes) -> tuple[int, int]:
    """Where the content of the field at `start` begins and ends.

    Raises:
        ValueError: another field is there, or the content is longer than the data.
        IndexError: the data ends before the content begins.
    """
    if not data.startswith(key, start):
        raise ValueError(f"no field {key.hex()} at byte {start}")
    length, begin = read_varint(data, start + 1)
    if begin + length > len(data):
        raise ValueError(f"the field at byte {start} is longer than the data")
    return begin, begin + length
