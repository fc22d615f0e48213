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
from vfio_user.device_models.state import LONGEST, MOST_VALUES, Fields, Section, StateError, Value

MAGIC: Final = b"vfiouser"
FORMAT_VERSION: Final = 1

HEADER: Final = struct.Struct("<8sHHHB")
RECORD: Final = struct.Struct("<BBHI")
MEMORY: Final = struct.Struct("<Q")
ZERO: Final = struct.Struct("<QQ")
END: Final = struct.Struct("<Q16s")

MAX_SECTION: Final = 1 << 20
"""Bytes of JSON in one section, whatever it says."""
MAX_DIGITS: Final = 64
"""Of one number: reading a long one costs the square of its length."""
BLOCK: Final = 1 << 20
"""Most bytes of a memory in one record."""


class Kind(IntEnum):
    """What a record is."""

    SECTION = 1
    MEMORY = 2
    ZERO = 3
    END = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """What the fields of a section may take: see `state.Section`."""

    longest: int = LONGEST
    values: int = MOST_VALUES

    @classmethod
    def of(cls, section: Section) -> "Limits":
        return cls(min(section.longest, MAX_SECTION), section.values)

    def check(self, section: str, length: int) -> None:
        """StateError: so many bytes are too long, whatever they are."""
        if length > self.longest:
            raise StateError(section, "", f"{length} bytes, where at most {self.longest} may be")

    def check_values(self, section: str, payload: bytes | bytearray) -> None:
        """Before anything is parsed. Each value and each name comes after one of these; in a text they count
        too, which a model that has such texts allows for."""
        values = len(payload) - len(payload.translate(None, b"[{,:"))
        if values > self.values:
            raise StateError(section, "", f"{values} values, where at most {self.values} may be")


USUAL: Final = Limits()


@dataclass(frozen=True, slots=True)
class Shape:
    """What a stream has to fit: the device's model and version, its sections, its memories with sizes."""

    model: str
    version: int
    sections: Mapping[str, Limits]
    memories: Mapping[str, int]

    @classmethod
    def of(cls, device: Device) -> "Shape":
        return cls(
            device.model,
            device.state_version,
            {section.name: Limits.of(section) for section in device.sections()},
            {name: memory.size for name, memory in device.memories().items()},
        )


def encode_fields(section: str, fields: Fields, limits: Limits = USUAL) -> bytes:
    """The payload of a section. ValueError when it would not be read again: the model is broken."""
    payload = _shortest(fields)
    try:
        limits.check(section, len(payload))
        decode_fields(section, payload, limits)
    except StateError as error:
        raise ValueError(f"section {section} cannot be restored: {error.reason}") from None
    return payload


def decode_fields(section: str, payload: bytes | bytearray, limits: Limits = USUAL) -> Fields:
    """The fields of a section, whose length has been checked. StateError for everything that `encode_fields`
    would not write: a state has one form, so that nobody reads another one out of it.

    It takes at most 5 times the bytes of the payload, and 160 for each value that may be there.
    """
    limits.check_values(section, payload)
    try:
        value = json.loads(
            payload.decode("ascii"),
            object_pairs_hook=_unique,
            parse_int=_whole,
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


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is no whole number")
