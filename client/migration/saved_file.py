# SPDX-License-Identifier: BSD-3-Clause
"""A guest kept in a file: its memory, the state of its devices, and what its VMM knew of them.

    header    magic, version, length of the text; JSON text: ranges of memory, number of devices
    record    kind, device, length of the payload, address; the payload
      MEMORY    bytes at the guest address; a later record replaces an earlier one
      ZERO      the address, and the length of a part that is zero (u64)
      STATE     the next piece of a device's state, as it was read from the device
      SETUP     JSON text: the VMM's own state, by device
      END       number of the records before it, and BLAKE2b-128 of every byte before the digest

All numbers are little-endian. A file is written under another name, and gets its own once it is complete
and on the disk; who reads one looks at the digest first.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import trio

from vfio_user.client.migration.report import MigrationError, Where
from vfio_user.client.migration.trail import Trail
from vfio_user.client.vmm_state import VmmState
from vfio_user.protocol.values import Payload

MAGIC, VERSION = b"vfusaved", 1
_HEADER = struct.Struct("<8sII")
_RECORD = struct.Struct("<HHIQ")
_END = struct.Struct("<Q16s")
_LENGTH = struct.Struct("<Q")
_DIGEST = 16
_LONGEST = 64 << 20
_ZEROS = bytes(1 << 20)  # memory is looked at in parts of this size


class Kind(IntEnum):
    MEMORY = 1
    ZERO = 2
    STATE = 3
    SETUP = 4
    END = 5


_FIXED = {Kind.ZERO: _LENGTH.size, Kind.END: _END.size}


class Record(NamedTuple):
    """One record as it was read."""

    kind: Kind
    device: int
    address: int
    payload: bytes


class SavedFileError(MigrationError):
    """A file that is no saved guest, or not a whole one; the text says what is wrong where."""


def _digest() -> Any:
    return hashlib.blake2b(digest_size=_DIGEST)


class FileSink:
    """A `Sink` that is a file. Raises OSError when the file cannot be written."""

    def __init__(self, path: Path, trail: Trail) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        """Its name while it is not complete."""
        self._trail = trail
        self._file: BinaryIO | None = None
        self._digest = _digest()
        self._records = 0

    async def open(self, ranges: Sequence[tuple[int, int]], devices: int) -> None:
        self._trail.at(Where.FILE)
        text = json.dumps({"ranges": [list(part) for part in ranges], "devices": devices}).encode()
        self._file = open(self.partial, "wb")  # noqa: SIM115, ASYNC230  # closed by `complete` or `abandon`
        self._write(_HEADER.pack(MAGIC, VERSION, len(text)) + text)

    async def memory(self, address: int, data: memoryview) -> None:
        for begin in range(0, len(data), len(_ZEROS)):
            part = data[begin : begin + len(_ZEROS)]
            if _ZEROS.startswith(bytes(part)):
                self._record(Kind.ZERO, 0, address + begin, _LENGTH.pack(len(part)))
            else:
                self._record(Kind.MEMORY, 0, address + begin, part)

    async def state(self, device: int, data: Payload) -> None:
        self._record(Kind.STATE, device, 0, data)

    async def setup(self, states: Sequence[VmmState]) -> None:
        self._record(Kind.SETUP, 0, 0, json.dumps([state.as_dict() for state in states]).encode())

    async def complete(self) -> None:
        self._trail.at(Where.FILE)
        file = self._file
        assert file is not None
        self._write(_RECORD.pack(Kind.END, 0, _END.size, 0) + _LENGTH.pack(self._records))
        file.write(self._digest.digest())
        file.flush()
        await trio.to_thread.run_sync(os.fsync, file.fileno())
        file.close()
        self.partial.replace(self.path)
        self._file = None
        try:
            _sync_folder(self.path.parent)
        except OSError:
            self.path.unlink(missing_ok=True)
            raise

    async def abandon(self) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        with suppress(OSError):  # what is still buffered may not find room either
            file.close()
        try:
            self.partial.unlink(missing_ok=True)
        except OSError as error:
            self._trail.note(f"{self.partial} cannot be removed: {error.strerror}")

    def _record(self, kind: Kind, device: int, address: int, payload: Payload) -> None:
        self._trail.at(Where.FILE, device if kind is Kind.STATE else None)
        self._write(_RECORD.pack(kind, device, len(payload), address))
        self._write(payload)
        self._records += 1

    def _write(self, data: Payload) -> None:
        assert self._file is not None
        self._digest.update(data)
        self._file.write(data)


def _sync_folder(folder: Path) -> None:
    """The name too is to be on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SavedFile:
    """A saved guest, opened for reading and found whole. `close` it, or use `with`."""

    def __init__(self, path: Path) -> None:
        """Reads all of it. SavedFileError when it is no saved guest, or not a whole one; OSError."""
        self._file = path.open("rb")
        try:
            self.ranges, self.devices = self._read_header()
            self._begin = self._file.tell()
            self._check()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "SavedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def records(self) -> Iterator[Record]:
        """All but END, in the order in which they were written."""
        self._file.seek(self._begin)
        while (record := self._read_record()).kind is not Kind.END:
            yield record

    def _read_header(self) -> tuple[list[tuple[int, int]], int]:
        magic, version, length = _HEADER.unpack(self._read(_HEADER.size))
        if magic != MAGIC:
            raise SavedFileError("this is no saved guest")
        if version != VERSION:
            raise SavedFileError(f"version {version} of the format is not known here, only {VERSION}")
        values = parse_json(self._read(length))
        try:
            return [(int(address), int(size)) for address, size in values["ranges"]], int(values["devices"])
        except (TypeError, KeyError, ValueError):
            raise SavedFileError("its header does not say what it must") from None

    def _check(self) -> None:
        """Numbers and digest of the whole file. A record at a time: it may be larger than our memory."""
        count = 0
        while (record := self._read_record()).kind is not Kind.END:
            count += 1
        end = self._file.tell()
        expected, digest = _END.unpack(record.payload)
        if self._file.read(1):
            raise SavedFileError(f"something follows its end at {end}")
        if expected != count or digest != self._digest_until(end - _DIGEST):
            raise SavedFileError("it has been changed since it was written: its digest is another")

    def _digest_until(self, end: int) -> bytes:
        found = _digest()
        self._file.seek(0)
        while end:
            piece = self._file.read(min(end, 1 << 20))
            found.update(piece)
            end -= len(piece)
        return bytes(found.digest())

    def _read_record(self) -> Record:
        place = self._file.tell()
        number, device, length, address = _RECORD.unpack(self._read(_RECORD.size))
        try:
            kind = Kind(number)
        except ValueError:
            raise SavedFileError(f"the record at {place} is of no known kind ({number})") from None
        if length != _FIXED.get(kind, length):
            raise SavedFileError(f"the record at {place} has {length} bytes")
        return Record(kind, device, address, self._read(length))

    def _read(self, length: int) -> bytes:
        place = self._file.tell()
        if length > _LONGEST:
            raise SavedFileError(f"{length} bytes at {place} are more than any record has")
        data = self._file.read(length)
        if len(data) < length:
            raise SavedFileError(f"it is cut off at {place + len(data)}")
        return data


def parse_json(data: bytes) -> Any:
    """The text of a record. SavedFileError."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise SavedFileError("a part that should be JSON text is not") from None
