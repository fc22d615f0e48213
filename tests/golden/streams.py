# SPDX-License-Identifier: BSD-3-Clause
"""The states of `scenes` as bytes on the wire: a stream beside each file, made of it by today's writer.

As with the files: a stream that is published is never changed. It stands for all that has been saved with
that version of the model and of the format.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn, cast

from golden import scenes
from vfio_user.device_models.device import Device
from vfio_user.device_models.fake_host import FakeMemory
from vfio_user.device_models.fake_migration import SavedDevice
from vfio_user.device_models.regions import StreamedMemory
from vfio_user.device_models.state import Fields, Reader, Section
from vfio_user.device_models.state_memory import PAGE
from vfio_user.server.migration.reader import Staged, StreamReader
from vfio_user.server.migration.stream import Shape
from vfio_user.server.migration.writer import StreamWriter


class Kept:
    """In place of a device that has this state, in the versions that its sections had then."""

    def __init__(self, saved: SavedDevice) -> None:
        self.model = saved.model
        self.state_version = saved.version
        self._saved = saved
        self._memories = {name: _memory(data) for name, data in saved.memories.items()}

    def sections(self) -> Sequence[Section]:
        return [
            Section(name, version, lambda fields=fields: fields, _never)  # type: ignore[misc]
            for name, (version, fields) in self._saved.sections.items()
        ]

    def memories(self) -> dict[str, StreamedMemory]:
        return self._memories


def _never(_reader: Reader) -> NoReturn:
    raise AssertionError("it is only saved")


def _memory(data: bytes) -> StreamedMemory:
    """Of which only those pages were written that are not zero."""
    memory = StreamedMemory(FakeMemory(len(data)))
    for place in range(0, len(data), PAGE):
        if any(page := data[place : place + PAGE]):
            memory.write(place, page)
    return memory


def pieces(device: Device, size: int) -> Iterator[bytes]:
    """All of a stopped device's stream."""
    writer = StreamWriter(device)
    writer.finish()
    while piece := b"".join(writer.take(size)):
        yield piece
    writer.close()


def make(saved: SavedDevice) -> bytes:
    return b"".join(pieces(cast(Device, Kept(saved)), 1 << 20))


def parsed(device: Device, stream: bytes) -> tuple[dict[str, tuple[int, Fields]], dict[str, bytes]]:
    """Sections and memories of a stream that is for a device like this one."""
    reader = StreamReader(Shape.of(device))
    reader.feed(stream)
    staged: Staged = reader.finish()
    return staged.sections, {name: bytes(memory) for name, memory in staged.memories.items()}


def files(model: str) -> list[Path]:
    """The streams of a model, oldest first."""
    return [path.with_suffix(".stream") for path in scenes.files(model)]


def renew() -> None:
    """Write the streams that are missing, and today's."""
    for model in scenes.SCENES:
        newest = scenes.files(model)[-1]
        for path in scenes.files(model):
            stream = path.with_suffix(".stream")
            if path == newest or not stream.exists():
                stream.write_bytes(make(scenes.read(path)))
