# SPDX-License-Identifier: BSD-3-Clause
"""The v2 front end: DEVICE_FEATURE by a table of features, MIG_DATA_READ and MIG_DATA_WRITE."""

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vfio_user.protocol import layouts
from vfio_user.protocol import messages as m
from vfio_user.protocol.constants import (
    DEVICE_FEATURE_MASK,
    DEVICE_FEATURE_SIZE,
    MIG_DATA_SIZE,
    DeviceFeature,
    DeviceFeatureFlags,
    MigrationFlags,
)
from vfio_user.protocol.errors import DeviceError
from vfio_user.server.answer import Answer
from vfio_user.server.dirty_handlers import (
    logging_report,
    logging_report_size,
    logging_start,
    logging_stop,
)
from vfio_user.server.migration.engine import MigrationEngine
from vfio_user.transport.fds import OwnedFd

if TYPE_CHECKING:
    from vfio_user.server.session import Session

Method = Callable[["Session", m.DeviceFeatureRequest], tuple[m.Payload, ...]]
"""Does what a GET or SET asks, and gives the data of the reply, in buffers that never change again."""

_GET, _SET, _PROBE = DeviceFeatureFlags.GET, DeviceFeatureFlags.SET, DeviceFeatureFlags.PROBE
_KNOWN = int(
    DEVICE_FEATURE_MASK | _GET | _SET | _PROBE
)  # a plain number: ~ of a flag knows its own bits only

SUPPORTED: Final = MigrationFlags.STOP_COPY | MigrationFlags.P2P | MigrationFlags.PRE_COPY

NO_FD: Final = 0xFFFFFFFF
"""data_fd, "unused in vfio-user": -1 as in the kernel, so that nobody closes a descriptor of his own."""


def _always(session: "Session") -> bool:
    return True


def _migrates(session: "Session") -> bool:
    return session.host.migration.available


@dataclass(frozen=True, slots=True)
class Row:
    """What a feature can do. `available`: whether this device has it; `moves`: who asks for it can move the
    device himself."""

    get: Method | None = None
    set: Method | None = None
    get_size: Callable[["Session", m.DeviceFeatureRequest], int] = lambda _session, _request: 0
    """Bytes of data that GET will give, for one that must not be done when its reply does not fit; checks
    all that it depends on."""
    available: Callable[["Session"], bool] = _always
    moves: bool = False


def _get_migration(session: "Session", request: m.DeviceFeatureRequest) -> tuple[m.Payload, ...]:
    return (layouts.build(m.FeatureMigration(SUPPORTED)),)


def _get_state(session: "Session", request: m.DeviceFeatureRequest) -> tuple[m.Payload, ...]:
    return (layouts.build(m.FeatureMigState(session.host.migration.state, NO_FD)),)


def _set_state(session: "Session", request: m.DeviceFeatureRequest) -> tuple[m.Payload, ...]:
    wanted = layouts.parse(m.FeatureMigState, request.data)
    session.host.migration.set_state(wanted.device_state)
    return (bytes(request.data),)


FEATURES: Mapping[DeviceFeature, Row] = {
    DeviceFeature.MIGRATION: Row(get=_get_migration, available=_migrates, moves=True),
    DeviceFeature.MIG_DEVICE_STATE: Row(get=_get_state, set=_set_state, available=_migrates, moves=True),
    DeviceFeature.DMA_LOGGING_START: Row(set=logging_start),
    DeviceFeature.DMA_LOGGING_STOP: Row(set=logging_stop),
    DeviceFeature.DMA_LOGGING_REPORT: Row(get=logging_report, get_size=logging_report_size),
}
"""Specification: "Device Features"."""


def device_feature(session: "Session", request: m.DeviceFeatureRequest, fds: list[OwnedFd]) -> Answer:
    """Specification: "VFIO_USER_DEVICE_FEATURE"; in the order in which the kernel checks."""
    flags = request.flags
    if request.argsz < DEVICE_FEATURE_SIZE or flags & ~_KNOWN:
        raise DeviceError(f"DEVICE_FEATURE: argsz {request.argsz}, flags {flags:#x}")
    if flags & _GET and flags & _SET and not flags & _PROBE:
        raise DeviceError("DEVICE_FEATURE: GET and SET exclude each other")
    row = _row(session, request.feature)
    if row.moves:
        session.host.migration.edition = "v2"
    if (flags & _GET and row.get is None) or (flags & _SET and row.set is None):
        raise DeviceError(f"feature {request.feature} is not there to GET or SET, as {flags:#x} asks")
    if flags & _PROBE:
        return _reply(request, (bytes(request.data),))
    if flags & _GET and row.get is not None:
        return _get(session, request, row.get, row.get_size(session, request))
    if flags & _SET and row.set is not None:
        return _set(session, request, row.set)
    raise DeviceError("DEVICE_FEATURE: neither GET nor SET nor PROBE")


def _row(session: "Session", feature: int) -> Row:
    try:
        row = FEATURES[DeviceFeature(feature)]
    except (ValueError, KeyError):
        row = None
    if row is None or not row.available(session):
        raise DeviceError(f"this device has no feature {feature}", errno.ENOTTY)
    return row


def _get(session: "Session", request: m.DeviceFeatureRequest, method: Method, size: int) -> Answer:
    if DEVICE_FEATURE_SIZE + size > request.argsz:
        return Answer(m.DeviceFeatureReply(request.flags, b"", DEVICE_FEATURE_SIZE + size))
    return _reply(request, method(session, request))


def _set(session: "Session", request: m.DeviceFeatureRequest, method: Method) -> Answer:
    if DEVICE_FEATURE_SIZE + len(request.data) > request.argsz:
        # Before it is done: a reply without its data would not tell whether it was.
        raise DeviceError(f"DEVICE_FEATURE: argsz {request.argsz} is too small for the reply to SET")
    return _reply(request, method(session, request))


def _reply(request: m.DeviceFeatureRequest, data: tuple[m.Payload, ...]) -> Answer:
    """Specification: "Message sizes": a reply that does not fit tells the size that is needed."""
    body = m.DeviceFeatureReply(request.flags, more=data)
    return Answer(m.fit(body, request.argsz), lasting=True)


def mig_data_read(session: "Session", request: m.MigDataReadRequest, fds: list[OwnedFd]) -> Answer:
    """Specification: "VFIO_USER_MIG_DATA_READ". Less than `size` means the end, so that nothing is given
    when not all of it may be."""
    engine = _engine(session)
    if request.size > session.max_data_xfer_size:
        raise DeviceError(f"MIG_DATA_READ of {request.size} bytes: {session.max_data_xfer_size} are allowed")
    if request.argsz < MIG_DATA_SIZE + request.size:
        raise DeviceError(f"MIG_DATA_READ: argsz {request.argsz} has no room for {request.size} bytes")
    # Not copied, however slowly the client reads: where it changes the memory of the device meanwhile, it
    # spoils the stream that it reads (linux/vfio.h: "or risk corruption"), and the digest tells.
    return Answer(m.MigDataReadReply(b"", more=tuple(engine.read(request.size))), lasting=True)


def mig_data_write(session: "Session", request: m.MigDataWriteRequest, fds: list[OwnedFd]) -> Answer:
    """Specification: "VFIO_USER_MIG_DATA_WRITE"."""
    engine = _engine(session)
    if len(request.data) > session.max_data_xfer_size:
        raise DeviceError(
            f"MIG_DATA_WRITE of {len(request.data)} bytes: {session.max_data_xfer_size} are allowed"
        )
    engine.write(request.data)
    return Answer(m.MigDataWriteReply())


def _engine(session: "Session") -> MigrationEngine:
    engine = session.host.migration
    if not engine.available:
        raise DeviceError("this device does not migrate", errno.ENOTSUP)
    return engine
