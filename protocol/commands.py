# SPDX-License-Identifier: BSD-3-Clause
"""COMMANDS: one row for each command. Parsing, file descriptors, direction and documentation read it.

A new command is: a member of `Command`, a layout, a pair of messages, a row here, a handler in the server.
tests/unit/test_protocol_commands.py names whichever is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from vfio_user.protocol import messages as m
from vfio_user.protocol.constants import SCM_MAX_FD, Command, Role

Limits: TypeAlias = tuple[int, int]
NONE: Limits = (0, 0)
ONE: Limits = (0, 1)
MANY: Limits = (0, SCM_MAX_FD)


@dataclass(frozen=True, slots=True)
class Row:
    """`request_fds` and `reply_fds` are the least and the most file descriptors beside the message."""

    command: Command
    sender: Role
    request: type[m.Message]
    reply: type[m.Message]
    request_fds: Limits
    reply_fds: Limits
    edition: str = "v1 and v2"

    @property
    def heading(self) -> str:
        """The specification's heading of this command."""
        return f"VFIO_USER_{self.command.name}"


_C, _S = Role.CLIENT, Role.SERVER
_ROWS = (
    # The reply may bring the socket of twin-socket mode, which we never ask for.
    Row(Command.VERSION, _C, m.VersionRequest, m.VersionReply, NONE, ONE),
    Row(Command.DMA_MAP, _C, m.DmaMapRequest, m.DmaMapReply, ONE, NONE),
    Row(Command.DMA_UNMAP, _C, m.DmaUnmapRequest, m.DmaUnmapReply, NONE, NONE),
    Row(Command.DEVICE_GET_INFO, _C, m.DeviceGetInfoRequest, m.DeviceGetInfoReply, NONE, NONE),
    # The specification says one descriptor; libvfio-user sends one for each mappable area.
    Row(
        Command.DEVICE_GET_REGION_INFO,
        _C,
        m.DeviceGetRegionInfoRequest,
        m.DeviceGetRegionInfoReply,
        NONE,
        MANY,
    ),
    Row(
        Command.DEVICE_GET_REGION_IO_FDS,
        _C,
        m.DeviceGetRegionIoFdsRequest,
        m.DeviceGetRegionIoFdsReply,
        NONE,
        MANY,
    ),
    Row(Command.DEVICE_GET_IRQ_INFO, _C, m.DeviceGetIrqInfoRequest, m.DeviceGetIrqInfoReply, NONE, NONE),
    Row(Command.DEVICE_SET_IRQS, _C, m.DeviceSetIrqsRequest, m.DeviceSetIrqsReply, MANY, NONE),
    Row(Command.REGION_READ, _C, m.RegionReadRequest, m.RegionReadReply, NONE, NONE),
    Row(Command.REGION_WRITE, _C, m.RegionWriteRequest, m.RegionWriteReply, NONE, NONE),
    Row(Command.DMA_READ, _S, m.DmaReadRequest, m.DmaReadReply, NONE, NONE),
    Row(Command.DMA_WRITE, _S, m.DmaWriteRequest, m.DmaWriteReply, NONE, NONE),
    Row(Command.DEVICE_RESET, _C, m.DeviceResetRequest, m.DeviceResetReply, NONE, NONE),
    Row(Command.DIRTY_PAGES, _C, m.DirtyPagesRequest, m.DirtyPagesReply, NONE, NONE, "v1"),
    Row(Command.REGION_WRITE_MULTI, _C, m.RegionWriteMultiRequest, m.RegionWriteMultiReply, NONE, NONE, "v2"),
    Row(Command.DEVICE_FEATURE, _C, m.DeviceFeatureRequest, m.DeviceFeatureReply, NONE, NONE, "v2"),
    Row(Command.MIG_DATA_READ, _C, m.MigDataReadRequest, m.MigDataReadReply, NONE, NONE, "v2"),
    Row(Command.MIG_DATA_WRITE, _C, m.MigDataWriteRequest, m.MigDataWriteReply, NONE, NONE, "v2"),
)

COMMANDS: Mapping[Command, Row] = {row.command: row for row in _ROWS}
BY_NUMBER: Mapping[int, Row] = {int(row.command): row for row in _ROWS}
BY_REQUEST: Mapping[type[m.Message], Row] = {row.request: row for row in _ROWS}
BY_REPLY: Mapping[type[m.Message], Row] = {row.reply: row for row in _ROWS}
