# SPDX-License-Identifier: BSD-3-Clause
"""Reads a state stream in pieces of any size, into memory of its own: the device is not touched.

The bytes are anybody's. Memory stays bounded by the device's own size, and by what its sections say that
they have at most (`state.Section`: `longest`, `values`); work by the number of bytes that come. Names, order,
sizes and offsets are checked as they come, and only what leaves nothing open is given out.
"""

import struct
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.state import Fields, StateError
from vfio_user.server.migration.staging import OF_MEMORY, StagedMemory
from vfio_user.server.migration.stream import (
    BLOCK,
    END,
    FORMAT_VERSION,
    HEADER,
    MAGIC,
    MEMORY,
    RECORD,
    ZERO,
    Kind,
    Shape,
    decode_fields,
)

_COUNT = struct.Struct("<Q")
_DIGEST = END.size - _COUNT.size


@dataclass(frozen=True, slots=True)
class Staged:
    """A whole state that has arrived: sections with their versions, and memories."""

    sections: dict[str, tuple[int, Fields]]
    memories: dict[str, memoryview]
    used: Mapping[str, Sequence[tuple[int, int]]]
    """Offset and length of each part of a memory that may differ from zero."""


@dataclass(frozen=True, slots=True)
class _Record:
    kind: int
    name: str
    version: int
    length: int


Parser = Generator[memoryview, None, None]
"""Yields a buffer to be filled, and goes on when that has been done."""


class StreamReader:
    """`feed` it the stream, then `finish`. Both raise StateError; a reader that has done so stays refused."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._sections: dict[str, tuple[int, Fields]] = {}
        self._memories: dict[str, StagedMemory] = {}
        self._hash = xxhash.xxh3_128()
        self._records = 0
        self._received = 0
        self._place = "the header"
        self._between_records = False
        """The parser waits for the first byte of a record."""
        self._error: StateError | None = None
        self._parser = self._parse()
        self._wanted: memoryview | None = next(self._parser)

    def feed(self, data: Buffer) -> None:
        """The next bytes. StateError says what is wrong with them."""
        rest = memoryview(data)
        try:
            self._check()
            while rest:
                rest = self._fill(self._short_way(rest) if self._between_records else rest)
        except StateError as error:
            self._refuse(error)
            raise

    def finish(self) -> Staged:
        """All of the stream has been fed: what it holds. StateError when something is missing."""
        try:
            self._check()
            if self._wanted is not None:
                raise StateError("", "", f"it ends after {self._received} bytes, in {self._place}")
        except StateError as error:
            self._refuse(error)
            raise
        memories = {name: memory.view for name, memory in self._memories.items()}
        used = {name: tuple(memory.used()) for name, memory in self._memories.items()}
        return Staged(self._sections, memories, used)

    def close(self) -> None:
        """Nothing more is wanted of it. What was staged and not given out is freed at once.

        The parser and the error know the reader, which would wait for the cyclic collector otherwise.
        """
        self._parser.close()
        self._wanted = None
        self._error = StateError("", "", "the reader is closed")
        self._sections = {}
        self._memories = {}

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _refuse(self, error: StateError) -> None:
        self._error = error
        self._sections.clear()
        self._memories.clear()

    def _short_way(self, data: memoryview) -> memoryview:
        """Take the whole records of memories at its beginning; the parser gets the rest, and what is wrong.

        A message of a megabyte may consist of 50,000 of them: the parser would take half a second.
        """
        place, size, memories = 0, len(data), self._memories
        while size - place >= RECORD.size:
            kind, name_length, version, length = RECORD.unpack_from(data, place)
            head = place + RECORD.size + name_length
            end = head + length
            if kind not in OF_MEMORY or version or length < MEMORY.size or end > size:
                break
            memory = memories.get(str(data[place + RECORD.size : head], "latin-1"))
            if memory is None or not OF_MEMORY[kind](memory, data[head:end]):
                break
            place = end
            self._records += 1
        self._hash.update(data[:place])
        self._received += place
        return data[place:]

    def _fill(self, data: memoryview) -> memoryview:
        """Copy what fits into the buffer that is wanted; what is left over is given back."""
        if not data:
            return data
        if self._wanted is None:
            raise StateError("", "", f"{len(data)} bytes follow the end")
        self._between_records = False
        count = min(len(data), len(self._wanted))
        self._wanted[:count] = data[:count]
        self._received += count
        self._wanted = self._wanted[count:]
        if not self._wanted:
            self._wanted = next(self._parser, None)
        return data[count:]

    # The parser

    def _parse(self) -> Parser:
        yield from self._header()
        while True:
            record = yield from self._record()
            if record.kind == Kind.END:
                yield from self._end(record)
                return
            read = _READERS.get(record.kind)
            if read is None:
                raise StateError(record.name, "", f"there is no record of kind {record.kind}")
            yield from read(self, record)
            self._records += 1

    def _bytes(self, size: int) -> Generator[memoryview, None, bytearray]:
        buffer = bytearray(size)
        if size:
            yield memoryview(buffer)
            self._hash.update(buffer)
        return buffer

    def _unpack(self, layout: struct.Struct) -> Generator[memoryview, None, tuple[Any, ...]]:
        return layout.unpack((yield from self._bytes(layout.size)))

    def _header(self) -> Parser:
        magic, version, flags, model_version, length = yield from self._unpack(HEADER)
        if magic != MAGIC:
            raise StateError("", "magic", "this is no saved state of a device")
        if version != FORMAT_VERSION:
            raise StateError("", "format", f"version {version}, known is {FORMAT_VERSION}")
        if flags:
            raise StateError("", "flags", f"{flags:#x} is not known")
        model = bytes((yield from self._bytes(length)))
        if model != self._shape.model.encode():
            raise StateError("", "model", f"it is of {_printable(model)}, not of {self._shape.model}")
        if not 1 <= model_version <= self._shape.version:
            known = self._shape.version
            raise StateError("", "version", f"{model_version} is not one of those known, 1 to {known}")

    def _record(self) -> Generator[memoryview, None, _Record]:
        self._place = f"the head of record {self._records}"
        self._between_records = True
        kind, name_length, version, length = yield from self._unpack(RECORD)
        name = _printable((yield from self._bytes(name_length)))
        self._place = f"record {self._records}, {name or 'the end'}"
        return _Record(kind, name, version, length)

    def _section(self, record: _Record) -> Parser:
        name = record.name
        limits = self._shape.sections.get(name)
        if limits is None:
            raise StateError(name, "", "this device has no such section")
        if name in self._sections:
            raise StateError(name, "", "it is there twice")
        limits.check(name, record.length)
        payload = yield from self._bytes(record.length)
        self._sections[name] = record.version, decode_fields(name, payload, limits)

    def _zero(self, record: _Record) -> Parser:
        _check_length(record, ZERO.size, ZERO.size)
        offset, length = yield from self._unpack(ZERO)
        memory = self._memories.get(record.name)
        if memory is None:
            self._open(record.name, offset, length)
        else:
            _check_range(record.name, memory, offset, length)
            memory.clear(offset, length)

    def _open(self, name: str, offset: int, length: int) -> None:
        size = self._shape.memories.get(name)
        if size is None:
            raise StateError(name, "", "this device has no such memory")
        if offset or length != size:
            raise StateError(name, "size", f"{length} bytes from {offset}, not the {size} of this device")
        self._memories[name] = StagedMemory(size)

    def _memory(self, record: _Record) -> Parser:
        _check_length(record, MEMORY.size + 1, MEMORY.size + BLOCK)
        (offset,) = yield from self._unpack(MEMORY)
        memory = self._memories.get(record.name)
        if memory is None:
            raise StateError(record.name, "", "nothing has said how large this memory is")
        length = record.length - MEMORY.size
        _check_range(record.name, memory, offset, length)
        target = memory.take(offset, length)
        yield target
        self._hash.update(target)

    def _end(self, record: _Record) -> Parser:
        if record.name or record.version:
            raise StateError("", "end", "it has a name or a version")
        _check_length(record, END.size, END.size)
        (count,) = yield from self._unpack(_COUNT)
        computed = self._hash.digest()
        digest = bytes((yield from self._bytes(_DIGEST)))
        if count != self._records:
            raise StateError("", "end", f"it counts {count} records, {self._records} have come")
        if digest != computed:
            raise StateError("", "digest", "it does not match: the stream has been damaged")
        for name in self._shape.memories:
            if name not in self._memories:
                raise StateError(name, "", "the memory is missing")


_READERS = {
    int(Kind.SECTION): StreamReader._section,
    int(Kind.ZERO): StreamReader._zero,
    int(Kind.MEMORY): StreamReader._memory,
}


def _check_length(record: _Record, least: int, most: int) -> None:
    if record.version:
        raise StateError(record.name, "version", f"{record.version}, where there is none")
    if not least <= record.length <= most:
        raise StateError(record.name, "length", f"{record.length}, not from {least} to {most}")


def _check_range(name: str, memory: StagedMemory, offset: int, length: int) -> None:
    if not memory.has_block(offset, length):
        raise StateError(name, "offset", f"{length} bytes at {offset:#x} of {len(memory):#x}")


def _printable(name: bytes | bytearray) -> str:
    """A name of the stream; what is no ASCII is shown, and matches no name that a device has."""
    text = name.decode("ascii", "backslashreplace")
    return text if text.isprintable() else repr(text)
