"""The layout of an event file.

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


def varint_rows(numbers: np.ndarray, width: int) -> np.ndarray:
    """Numbers as varints of one width, with groups of zeros in front; [B] -> uint8 [B, width].

    >>> [bytes(row).hex() for row in varint_rows(np.array([1, 300]), 3)]
    ['818000', 'ac8200']
    """
    groups = np.asarray(numbers, np.int64)[:, None] >> 7 * np.arange(width)
    more = np.where(np.arange(width) < width - 1, 0x80, 0)
    return (groups & 0x7F | more).astype(np.uint8)


def field(key: bytes, content: bytes) -> bytes:
    """A field whose content has a length: text or a message. `key` is the field's first byte."""
    return key + varint(len(content)) + content
