# SPDX-License-Identifier: BSD-3-Clause
"""The state of a device as a stream of bytes: the format, and what both directions of it share.

    header    magic, format version, flags (0), version of the model's state, name of the model
    record    kind, length of the name, version, length of the payload; the name; the payload
      SECTION   fields as JSON in their shortest form, of one section in its version
      ZERO      offset, length: this part of a memory is zero; the first one of each memory spans all of it
      MEMORY    offset, and up to 1 MiB of a memory; a later record replaces an earlier one
      END       number of records before it, and XXH3-128 of every byte before the digest; nothing follows

All numbers are little-endian. Borders of records mean nothing to who carries the stream: v1's chunks
joined, of whatever size, are v2's bytes.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NoReturn

from vfio_user.device_models.device import Device
from vfio_user.device_models.state import Fields, StateError, Value

MAGIC: Final = b"vfiouser"
FORMAT_VERSION: Final = 1

HEADER: Final = struct.Struct("<8sHHHB")
RECORD: Final = struct.Struct("<BBHI")
MEMORY: Final = struct.Struct("<Q")
ZERO: Final = struct.Struct("<QQ")
END: Final = struct.Struct("<Q16s")

MAX_SECTION: Final = 1 << 20
"""Bytes of JSON in one section."""
BLOCK: Final = 1 << 20
"""Most bytes of a memory in one record."""


class Kind(IntEnum):
    """What a record is."""

    SECTION = 1
    MEMORY = 2
    ZERO = 3
    END = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """What a stream has to fit: the device's model and version, its sections, its memories with sizes."""

    model: str
    version: int
    sections: frozenset[str]
    memories: Mapping[str, int]

    @classmethod
    def of(cls, device: Device) -> "Shape":
        return cls(
            device.model,
            device.state_version,
            frozenset(section.name for section in device.sections()),
            {name: memory.size for name, memory in device.memories().items()},
        )


def encode_fields(section: str, fields: Fields) -> bytes:
    """The payload of a section. ValueError when it would not be read again: the model is broken."""
    payload = _shortest(fields)
    if len(payload) > MAX_SECTION:
        raise ValueError(f"section {section} has {len(payload)} bytes, at most {MAX_SECTION} are allowed")
    try:
        decode_fields(section, payload)
    except StateError as error:
        raise ValueError(f"section {section} cannot be restored: {error.reason}") from None
    return payload


def decode_fields(section: str, payload: bytes | bytearray) -> Fields:
    """The fields of a section. StateError for everything that `encode_fields` would not write: a state has
    one form, so that nobody reads another one out of it."""
    try:
        value = json.loads(
            payload.decode("ascii"),
            object_pairs_hook=_unique,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
        if b"\\ud" in payload:  # half a surrogate pair is no text, and fails where somebody encodes it
            json.dumps(value, ensure_ascii=False).encode()
        if _shortest(value) != payload:
            raise ValueError("it is not in its shortest form, with sorted names")
    except RecursionError:
        raise StateError(section, "", "it is nested too deeply") from None
    except UnicodeEncodeError:
        raise StateError(section, "", "it has half a surrogate pair, which is no text") from None
    except ValueError as error:
        raise StateError(section, "", f"it is not JSON as it should be: {error}") from None
    if not isinstance(value, dict):
        raise StateError(section, "", "it is not an object")
    return value


def _shortest(value: Value) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def _unique(pairs: Iterable[tuple[str, Value]]) -> Fields:
    fields: Fields = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{name[:40]!r} is there twice")
        fields[name] = value
    return fields


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is no whole number")
