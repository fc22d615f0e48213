# SPDX-License-Identifier: BSD-3-Clause
"""Version and capability negotiation (specification: "VFIO_USER_VERSION"), without I/O.

A server calls `accept`, a client `propose` and `confirm`; each gets a `Session` with what holds from then
on. `parse` and `encode` are the JSON text. Parsing is strict about what it understands (types, ranges,
duplicate keys, the NUL) and ignores keys that it does not know.

Twin-socket mode is not offered and not accepted: no known client uses it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from vfio_user.protocol import constants as c
from vfio_user.protocol.errors import RemoteProtocolError
from vfio_user.protocol.messages import Payload, VersionReply, VersionRequest

MAX_TEXT: Final = 16384
"""Longest JSON text we look at, in bytes; real ones have about 200."""

_U64: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Migration:
    """v1 capability `migration`: page size in bytes, and most bytes of one dirty bitmap."""

    pgsize: int = c.DEFAULT_MIGRATION_PGSIZE
    max_bitmap_size: int = c.DEFAULT_MAX_BITMAP_SIZE


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one side says of itself; the defaults are what the specification assumes for absent keys.

    `max_msg_fds` and `max_data_xfer_size` (bytes) are what this side can receive in one message, `pgsizes`
    is an or of page sizes in bytes.
    """

    max_msg_fds: int = c.DEFAULT_MAX_MSG_FDS
    max_data_xfer_size: int = c.DEFAULT_MAX_DATA_XFER_SIZE
    max_dma_maps: int = c.DEFAULT_MAX_DMA_MAPS
    pgsizes: int = c.DEFAULT_PGSIZES
    migration: Migration | None = None
    write_multiple: bool = False


@dataclass(frozen=True, slots=True)
class Version:
    """Protocol version and capabilities of one side."""

    minor: int = c.VERSION_MINOR
    capabilities: Capabilities = field(default_factory=Capabilities)
    major: int = c.VERSION_MAJOR


@dataclass(frozen=True, slots=True)
class Session:
    """What both sides may do after the negotiation. `max_send_fds` is what the peer can receive in one
    message, `max_receive_fds` what we can; the others are the smaller of the two sides' values."""

    minor: int
    max_send_fds: int
    max_receive_fds: int
    max_data_xfer_size: int
    max_dma_maps: int
    pgsizes: int
    migration: Migration | None
    write_multiple: bool

    @property
    def max_message_size(self) -> int:
        """Of the messages that we have to take, in bytes with the header."""
        return self.max_data_xfer_size + c.MESSAGE_OVERHEAD


def negotiate(own: Version, theirs: Version) -> Session:
    """The session of two sides; the same for server and client, up to the two fd limits.

    RemoteProtocolError (EINVAL) when they have no major version or no page size in common.
    """
    if own.major != theirs.major:
        raise RemoteProtocolError(f"VERSION: major version {theirs.major}, we speak {own.major}")
    ours, peer = own.capabilities, theirs.capabilities
    if not ours.pgsizes & peer.pgsizes:
        raise RemoteProtocolError(f"VERSION: no page size of {peer.pgsizes:#x} is in our {ours.pgsizes:#x}")
    return Session(
        minor=min(own.minor, theirs.minor),
        max_send_fds=peer.max_msg_fds,
        max_receive_fds=ours.max_msg_fds,
        max_data_xfer_size=min(ours.max_data_xfer_size, peer.max_data_xfer_size),
        max_dma_maps=min(ours.max_dma_maps, peer.max_dma_maps),
        pgsizes=ours.pgsizes & peer.pgsizes,
        migration=_common_migration(ours.migration, peer.migration),
        write_multiple=ours.write_multiple and peer.write_multiple,
    )


def _common_migration(ours: Migration | None, peer: Migration | None) -> Migration | None:
    if ours is None or peer is None:
        return None
    return Migration(min(ours.pgsize, peer.pgsize), min(ours.max_bitmap_size, peer.max_bitmap_size))


def accept(own: Version, request: VersionRequest) -> tuple[Session, VersionReply]:
    """The server's half: the session, and the reply that is no longer than the request.

    QEMU refuses a reply that is longer than its own request, so keys are left out in the order of
    `_DROP_ORDER` until it fits; `own` still holds, and a peer that exceeds it gets an error.
    """
    theirs = Version(request.minor, parse(request.data), request.major)
    session = negotiate(own, theirs)
    data = _shorten(_worth_saying(own.capabilities, theirs.capabilities), len(request.data))
    return session, VersionReply(own.major, session.minor, data)


def propose(own: Version) -> VersionRequest:
    """The client's request. It says every capability: the server's reply may be as long as this."""
    return VersionRequest(own.major, own.minor, encode(_every_key(own.capabilities)))


def confirm(own: Version, reply: VersionReply) -> Session:
    """The client's other half. RemoteProtocolError when the server answers with a version above ours."""
    if reply.minor > own.minor:
        raise RemoteProtocolError(
            f"VERSION: minor version {reply.minor} in the reply, we proposed {own.minor}"
        )
    return negotiate(own, Version(reply.minor, parse(reply.data), reply.major))


# The text


def encode(capabilities: Mapping[str, object]) -> bytes:
    """JSON without spaces, with the NUL."""
    return json.dumps({"capabilities": dict(capabilities)}, separators=(",", ":")).encode() + b"\0"


def _every_key(own: Capabilities) -> dict[str, object]:
    keys: dict[str, object] = {
        "max_msg_fds": own.max_msg_fds,
        "max_data_xfer_size": own.max_data_xfer_size,
        "max_dma_maps": own.max_dma_maps,
        "pgsizes": own.pgsizes,
    }
    if own.migration:
        keys["migration"] = {
            "pgsize": own.migration.pgsize,
            "max_bitmap_size": own.migration.max_bitmap_size,
        }
    if own.write_multiple:
        keys["write_multiple"] = True
    return keys


def _worth_saying(own: Capabilities, theirs: Capabilities) -> dict[str, object]:
    """What differs from the specification's default, of the capabilities that the client proposed."""
    keys, default = _every_key(own), _every_key(Capabilities())
    worth = {key: value for key, value in keys.items() if value != default.get(key)}
    if not theirs.write_multiple:
        worth.pop("write_multiple", None)
    if theirs.migration is None:
        worth.pop("migration", None)
    elif own.migration and own.migration.max_bitmap_size == c.DEFAULT_MAX_BITMAP_SIZE:
        worth["migration"] = {"pgsize": own.migration.pgsize}
    return worth


def _without_bitmap_size(keys: dict[str, object]) -> None:
    migration = keys.get("migration")
    if isinstance(migration, dict):
        keys["migration"] = {"pgsize": migration["pgsize"]}


def _without(key: str) -> Callable[[dict[str, object]], None]:
    def drop(keys: dict[str, object]) -> None:
        keys.pop(key, None)

    return drop


# First what a client never misses; last what it would break without.
_DROP_ORDER: tuple[Callable[[dict[str, object]], None], ...] = (
    _without("write_multiple"),
    _without("max_dma_maps"),
    _without_bitmap_size,
    _without("pgsizes"),
    _without("max_msg_fds"),
    _without("migration"),
    _without("max_data_xfer_size"),
)


def _shorten(keys: dict[str, object], limit: int) -> bytes:
    keys = dict(keys)
    for drop in _DROP_ORDER:
        if len(encode(keys)) <= limit:
            break
        drop(keys)
    return next(data for data in (encode(keys), b"{}\0", b"") if len(data) <= limit)


def parse(data: Payload) -> Capabilities:
    """The capabilities in a VERSION message's data; no data means all defaults.

    RemoteProtocolError (EINVAL) with the reason for anything that is not as the specification says.
    """
    if not len(data):
        return Capabilities()
    top = _object("version data", _decode(bytes(data)))
    given = _object("capabilities", top.get("capabilities", {}))
    values: dict[str, Any] = {key: check(key, given[key]) for key, check in _KEYS.items() if key in given}
    return Capabilities(**values)


def _decode(data: bytes) -> object:
    if len(data) > MAX_TEXT:
        raise _bad(f"{len(data)} bytes of JSON are more than {MAX_TEXT}")
    if data[-1]:
        raise _bad("the JSON text does not end with NUL")
    try:
        text = data.split(b"\0", 1)[0].decode()
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise _bad("the JSON text is nested too deeply") from None
    except ValueError as error:
        raise _bad(f"the data is not JSON: {error}") from None


def _unique(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key[:40]!r} is there twice")
        result[key] = value
    return result


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")


def _bad(reason: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"VERSION: {reason}")


def _object(name: str, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise _bad(f"{name} is not an object")
    return value


def _number(least: int) -> Callable[[str, object], int]:
    def check(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _bad(f"{name} is not a whole number")
        if not least <= value <= _U64:
            raise _bad(f"{name} is out of range")
        return value

    return check


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _bad(f"{name} is not true or false")
    return value


def _page_size(name: str, value: object) -> int:
    number = _number(1)(name, value)
    if number.bit_count() != 1:
        raise _bad(f"{name} is not a power of two")
    return number


def _migration(name: str, value: object) -> Migration:
    given = _object(name, value)
    values = {
        key: check(f"{name}.{key}", given[key]) for key, check in _MIGRATION_KEYS.items() if key in given
    }
    return Migration(**values)


_MIGRATION_KEYS: Mapping[str, Callable[[str, object], int]] = {
    "pgsize": _page_size,
    "max_bitmap_size": _number(1),
}
_KEYS: Mapping[str, Callable[[str, object], object]] = {
    "max_msg_fds": _number(0),
    "max_data_xfer_size": _number(1),
    "max_dma_maps": _number(1),
    "pgsizes": _number(1),
    "migration": _migration,
    "write_multiple": _boolean,
}
