# SPDX-License-Identifier: BSD-3-Clause
"""Streams that are whole, with the digest that fits: only the check that is meant can refuse them.

By hand, from the description of the format in `docs/migration.md`.
"""

import struct
from collections.abc import Callable, Mapping

import xxhash

_FORMAT, _VERSION, _NAME_LENGTH, _NAME = 8, 12, 14, 15
_RECORD = struct.Struct("<BBHI")
_SECTION, _DIGEST = 1, 16


def sealed(body: bytes) -> bytes:
    """With its digest; `body` is all that comes before it."""
    return body + xxhash.xxh3_128(body).digest()


def newer_format(data: bytes) -> bytes:
    return _with(data, _FORMAT, b"\2\0")


def newer_model(data: bytes) -> bytes:
    return _with(data, _VERSION, b"\x63\0")


def newer_section(data: bytes) -> bytes:
    return _with(data, _first_section(data) + 2, b"\x63\0")


def other_model(data: bytes) -> bytes:
    return _with(data, _NAME, b"x")


FOREIGN: Mapping[Callable[[bytes], bytes], str] = {
    newer_format: "field format: version 2, known is 1",
    newer_model: "field version: 99 is not one of those known",
    newer_section: ": version 99 is newer than",
    other_model: "field model: it is of x",
}
"""What makes a stream of another one that is good, and what the server must say of it."""


def _with(data: bytes, place: int, value: bytes) -> bytes:
    return sealed(data[:place] + value + data[place + len(value) : -_DIGEST])


def _first_section(data: bytes) -> int:
    place = _NAME + data[_NAME_LENGTH]
    while data[place] != _SECTION:
        _, name, _, payload = _RECORD.unpack_from(data, place)
        place += _RECORD.size + name + payload
    return place
