# SPDX-License-Identifier: BSD-3-Clause
"""What is to be moved: two QEMUs, the devices between them, the way of QEMU's own stream, and the limits."""

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from vfio_user.client.qemu_migration.qmp import parse_address
from vfio_user.protocol.errors import VfioUserError
from vfio_user.transport.listener import SUN_PATH_SIZE

MOST_DOWNTIME = 2_000_000
"""Milliseconds that QEMU takes for its `downtime-limit`."""


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

    def __post_init__(self) -> None:
        for name in ("timeout", "stop", "standstill", "recovery"):
            if not 0 < getattr(self, name) < math.inf:
                raise RequestError(f"{name} must be a number of seconds above 0")
        if self.downtime is not None and not 1 <= self.downtime <= MOST_DOWNTIME:
            raise RequestError(f"the downtime limit must be 1 to {MOST_DOWNTIME} milliseconds")


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
        for address in (self.source_qmp, self.destination_qmp):
            _check_qmp(address)
        if _same_socket(self.source_qmp, self.destination_qmp):
            raise RequestError("source and destination are the same QEMU")
        _require_distinct("device", (device.id for device in self.devices))
        _require_distinct(
            "control socket",
            (os.path.realpath(path) for one in self.devices for path in (one.source, one.destination)),
        )
        check_uri(self.uri)


def _same_socket(first: str, second: str) -> bool:
    one, other = parse_address(first), parse_address(second)
    if isinstance(one, str) and isinstance(other, str):
        return os.path.realpath(one) == os.path.realpath(other)
    return one == other


def _require_distinct(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise RequestError(f"the {what} {name} is named twice")
        seen.add(name)


_NOT_THESE = {
    "fd": "a descriptor cannot be given to QEMU from here",
    "file": "a file is no way to a QEMU that waits",
    "exec": "one command cannot be both ends; forward a socket, by ssh -L for one, and give that",
    "rdma": "it pins memory that servers map, and has never been tried with them",
    "defer": "it says where the stream goes, not when",
}
_HOST = r"(\[[0-9A-Fa-f:.]+(%[\w.-]+)?\]|[\w.-]+)"
_OPTIONS = r"(,(ipv4|ipv6|keep-alive|mptcp)(=(on|off))?)*"
_URIS = {
    "tcp": ("tcp:HOST:PORT", re.compile(rf"{_HOST}:(?P<port>[0-9]{{1,10}}){_OPTIONS}"), 0xFFFF),
    "unix": ("unix:PATH", re.compile(r"(?P<path>.+)", re.DOTALL), 0),
    "vsock": ("vsock:CID:PORT", re.compile(r"(?P<cid>[0-9]{1,10}):(?P<port>[0-9]{1,10})"), 0xFFFF_FFFE),
}
"""Those of QEMU's ways that are sockets: what is to be given, the rest of the URI, the highest port."""
_MOST_CID = 0xFFFF_FFFE


def check_uri(uri: str) -> None:
    """RequestError for a way that QEMU's stream cannot take here."""
    kind, colon, rest = uri.partition(":")
    if kind in _NOT_THESE and colon:
        raise RequestError(f"the URI {uri!r} does not do: {_NOT_THESE[kind]}")
    form, pattern, most = _URIS.get(kind, _NOTHING)
    if (found := pattern.fullmatch(rest)) is None:
        raise RequestError(f"the URI {uri!r} is none that does: {form} is needed")
    parts = found.groupdict()
    if "port" in parts and not 1 <= int(parts["port"]) <= most:
        raise RequestError(f"the URI {uri!r} has a port that cannot be: 1 to {most}")
    if "cid" in parts and not 1 <= int(parts["cid"]) <= _MOST_CID:
        raise RequestError(f"the URI {uri!r} has a CID that cannot be: 1 to {_MOST_CID}")
    if len(os.fsencode(parts.get("path", ""))) > SUN_PATH_SIZE:
        raise RequestError(f"the URI {uri!r} has a path that is too long: {SUN_PATH_SIZE} bytes at most")


_NOTHING = (" or ".join(row[0] for row in _URIS.values()), re.compile(r"(?!)"), 0)


def _check_qmp(address: str) -> None:
    try:
        parse_address(address)
    except ValueError as error:
        raise RequestError(str(error)) from error


def parse_device(text: str) -> DeviceRequest:
    """`ID=SOURCE_CONTROL,DESTINATION_CONTROL`. RequestError."""
    id, equals, paths = text.partition("=")
    source, comma, destination = paths.partition(",")
    if not (id and equals and source and comma and destination) or "," in destination:
        raise RequestError(f"{text!r} is not ID=SOURCE_CONTROL,DESTINATION_CONTROL")
    return DeviceRequest(id, Path(source), Path(destination))
