# SPDX-License-Identifier: BSD-3-Clause
"""What is to be moved: two QEMUs, the devices between them, the way of QEMU's own stream, and the limits."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from vfio_user.protocol.errors import VfioUserError


class RequestError(VfioUserError):
    """This cannot be asked for; the text says what is wrong. Nothing has been touched."""


class Writes(Enum):
    """How QEMU comes to know which pages a device writes through its mapping (docs/control.md)."""

    AUTO = "auto"
    """By the measured rate: hand-over unless it would cost more downtime than it may."""
    HAND_OVER = "hand-over"
    """The server keeps a log, and hands it over while everything stands still."""
    WRITE_THROUGH = "write-through"
    """The device writes by message, from before the first pass on."""


@dataclass(frozen=True, slots=True)
class DeviceRequest:
    """A device by its `id=` in both QEMUs, and the control sockets of its two servers."""

    id: str
    source: Path
    destination: Path


@dataclass(frozen=True, slots=True)
class Limits:
    """`downtime`: milliseconds, QEMU's `downtime-limit`; None leaves QEMU's own. Seconds: `timeout` for all
    of it, `stop` for a device to stand still, `standstill` from QEMU's stop of the CPUs until all devices
    are handed over, `recovery` for the way back."""

    downtime: int | None = None
    timeout: float = 600.0
    stop: float = 2.0
    standstill: float = 5.0
    recovery: float = 30.0


@dataclass(frozen=True, slots=True)
class Request:
    """RequestError when it contradicts itself. `uri` is QEMU's: `tcp:HOST:PORT`, `unix:PATH`, …"""

    source_qmp: str
    destination_qmp: str
    devices: tuple[DeviceRequest, ...]
    uri: str
    limits: Limits = field(default_factory=Limits)
    writes: Writes = Writes.AUTO

    def __post_init__(self) -> None:
        if not self.devices:
            raise RequestError("no device is named")
        if self.source_qmp == self.destination_qmp:
            raise RequestError("source and destination are the same QEMU")
        _require_distinct("device", (device.id for device in self.devices))
        _require_distinct(
            "control socket",
            (os.path.realpath(path) for one in self.devices for path in (one.source, one.destination)),
        )
        check_uri(self.uri)


def _require_distinct(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise RequestError(f"the {what} {name} is named twice")
        seen.add(name)


_NOT_THESE = {
    "fd": "a descriptor cannot be given to QEMU from here",
    "file": "a file is no way to a QEMU that waits",
    "defer": "it says where the stream goes, not when",
}


def check_uri(uri: str) -> None:
    """RequestError for a way that QEMU's stream cannot take here."""
    kind, colon, rest = uri.partition(":")
    if not colon or not kind or not rest:
        raise RequestError(f"the URI {uri!r} is none of QEMU's: tcp:HOST:PORT or unix:PATH is needed")
    if kind in _NOT_THESE:
        raise RequestError(f"the URI {uri!r} does not do: {_NOT_THESE[kind]}")


def parse_device(text: str) -> DeviceRequest:
    """`ID=SOURCE_CONTROL,DESTINATION_CONTROL`. RequestError."""
    id, equals, paths = text.partition("=")
    source, comma, destination = paths.partition(",")
    if not (id and equals and source and comma and destination) or "," in destination:
        raise RequestError(f"{text!r} is not ID=SOURCE_CONTROL,DESTINATION_CONTROL")
    return DeviceRequest(id, Path(source), Path(destination))
