# SPDX-License-Identifier: BSD-3-Clause
"""Migration under libvfio-user: its callbacks drive the one migration engine, and it keeps the dirty log.

v1: the library has the registers of the migration region; we have its data area, chunk by chunk. v2: it has
the features, and asks for the stream as it comes. Both tell of each change of state that they allow.
"""

import ctypes
from collections.abc import Mapping
from typing import Any

from vfio_user.protocol.constants import MigrationState
from vfio_user.server.engines import libvfio_user_abi as abi
from vfio_user.server.engines.libvfio_user_context import Context
from vfio_user.server.migration.engine import MigrationEngine

DATA_SIZE = 64 << 10
"""Bytes of v1's data area. The library takes a message only if all of it comes at once, and what a UNIX
socket delivers at once is some 100 KiB."""

STATES: Mapping[abi.MigrationState, MigrationState] = {
    abi.MigrationState.STOP: MigrationState.STOP,
    abi.MigrationState.RUNNING: MigrationState.RUNNING,
    abi.MigrationState.STOP_AND_COPY: MigrationState.STOP_COPY,
    abi.MigrationState.PRE_COPY: MigrationState.PRE_COPY,
    abi.MigrationState.RESUME: MigrationState.RESUMING,
}


class LibraryMigration:
    """Between a context and the migration engine of its device."""

    def __init__(self, context: Context, engine: MigrationEngine) -> None:
        self._context = context
        self._engine = engine
        self.state = MigrationState.RUNNING
        """What the library was last allowed to change to."""
        self._area = bytearray()
        """v1: what was prepared for reading, or is being written."""

    def set_up(self) -> None:
        """Tell the library; without it, it has neither migration nor a dirty log."""
        if self._context.abi is abi.Abi.V1:
            self._context.setup_migration_v1(DATA_SIZE, self._callbacks_v1())
        else:
            self._context.setup_migration_v2(self._callbacks_v2())

    def _callbacks_v1(self) -> abi.MigrationCallbacksV1:
        make = self._context.guard.callback
        return abi.MigrationCallbacksV1(
            abi.CALLBACKS_VERSION[self._context.abi],
            make(abi.TRANSITION, self._transition),
            make(abi.PENDING, self._pending_bytes, 0),
            make(abi.PREPARE, self._prepare_data),
            make(abi.DATA_V1, self._read_area),
            make(abi.DATA_V1, self._write_area),
            make(abi.WRITTEN, self._data_written),
        )

    def _callbacks_v2(self) -> abi.MigrationCallbacksV2:
        make = self._context.guard.callback
        return abi.MigrationCallbacksV2(
            abi.CALLBACKS_VERSION[self._context.abi],
            make(abi.TRANSITION, self._transition),
            make(abi.DATA_V2, self._read_stream),
            make(abi.DATA_V2, self._write_stream),
        )

    def _transition(self, _context: object, state: int) -> int:
        wanted = STATES[abi.MigrationState(state)]
        self._area = bytearray(DATA_SIZE if wanted is MigrationState.RESUMING else 0)
        self._engine.set_state(wanted)
        self.state = wanted
        return 0

    # v1

    def _pending_bytes(self, _context: object) -> int:
        return self._engine.pending_bytes if self._engine.saving else 0

    def _prepare_data(self, _context: object, offset: Any, size: Any) -> int:
        """While saving the next chunk; while resuming (no `size`) only the place where data goes."""
        offset[0] = 0
        if size:
            self._area = bytearray(b"".join(self._engine.read(DATA_SIZE)))
            size[0] = len(self._area)
        return 0

    def _read_area(self, _context: object, buffer: int, count: int, offset: int) -> int:
        data = bytes(self._area[offset : offset + count])
        ctypes.memmove(buffer, data, len(data))
        return len(data)

    def _write_area(self, _context: object, buffer: int, count: int, offset: int) -> int:
        if offset + count > len(self._area):
            raise ValueError(f"{count} bytes at {offset:#x} of an area of {len(self._area)}")
        self._area[offset : offset + count] = ctypes.string_at(buffer, count)
        return count

    def _data_written(self, _context: object, count: int) -> int:
        self._engine.write(bytes(self._area[:count]))
        return 0

    # v2

    def _read_stream(self, _context: object, buffer: int, count: int) -> int:
        data = b"".join(self._engine.read(count))
        ctypes.memmove(buffer, data, len(data))
        return len(data)

    def _write_stream(self, _context: object, buffer: int, count: int) -> int:
        self._engine.write(ctypes.string_at(buffer, count))
        return count
