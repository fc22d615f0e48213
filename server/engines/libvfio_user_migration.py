# SPDX-License-Identifier: BSD-3-Clause
"""Migration under libvfio-user: its callbacks drive the one migration engine, and it keeps the dirty log.

v1: the library has the registers of the migration region; we have its data area, chunk by chunk. v2: it has
the features, and asks for the stream as it comes. Both tell of each change of state that they allow.
"""

import ctypes
from collections.abc import Mapping
from typing import Any

from vfio_user.protocol.constants import MigrationState
from vfio_user.protocol.errors import DeviceError
from vfio_user.server.engines import libvfio_user_abi as abi
from vfio_user.server.engines.libvfio_user_context import Context
from vfio_user.server.migration.engine import MigrationEngine
from vfio_user.server.migration.offer import Offer

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
        self._offer: Offer | None = None
        """v1: what the client has read of it, while saving; None where nothing is offered."""
        self._session = 0
        """The engine's, to which these belong."""

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
        self._engine.set_state(wanted)
        self.state = wanted
        if wanted is MigrationState.RESUMING:
            self._area, self._offer = bytearray(DATA_SIZE), None
        return 0

    # v1

    def _current(self) -> Offer | None:
        """The offer, unless it is of a session that has ended."""
        if self._session != self._engine.session:
            self._session = self._engine.session
            self._offer = None
        return self._offer

    def _pending_bytes(self, _context: object) -> int:
        """The library asks when an iteration begins, and in each state anew: what was read is done with."""
        if not self._engine.saving:
            return 0
        offer = self._current()
        if offer is not None and offer.whole:
            self._offer = offer = None
        return (offer.size if offer else 0) + self._engine.pending_bytes

    def _prepare_data(self, _context: object, offset: Any, size: Any) -> int:
        """While saving the next chunk, or the one that was not read; while resuming (no `size`) only the
        place where data goes."""
        offset[0] = 0
        if size:
            if self._current() is None:
                self._area = bytearray(b"".join(self._engine.read(DATA_SIZE)))
                self._offer = Offer(len(self._area))
            size[0] = len(self._area)
        return 0

    def _read_area(self, _context: object, buffer: int, count: int, offset: int) -> int:
        offer = self._current()
        readable = len(self._area) if offer or self._engine.resuming else 0
        if offset + count > readable:
            raise DeviceError(f"{count} bytes at {offset:#x}: {readable} bytes are there to be read")
        if offer is not None:
            offer.read(offset, count)
        ctypes.memmove(buffer, bytes(self._area[offset : offset + count]), count)
        return count

    def _write_area(self, _context: object, buffer: int, count: int, offset: int) -> int:
        if not self._engine.resuming:
            raise DeviceError("migration data is written while resuming only")
        if offset + count > len(self._area):
            raise DeviceError(f"{count} bytes at {offset:#x} of an area of {len(self._area)}")
        self._area[offset : offset + count] = ctypes.string_at(buffer, count)
        return count

    def _data_written(self, _context: object, count: int) -> int:
        if count > len(self._area):
            raise DeviceError(f"data_size {count} is more than the data area ({len(self._area)})")
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
