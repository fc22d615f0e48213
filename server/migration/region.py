# SPDX-License-Identifier: BSD-3-Clause
"""The migration region of v1: `struct vfio_device_migration_info`, and a data area that can be mapped.

The order of accesses is that of the comment in linux/vfio.h of 5.8 to 5.17. While saving: pending_bytes
begins an iteration, data_offset prepares the data, data_size says how much, then the data is read;
pending_bytes again ends the iteration. While resuming: data is written, then data_size takes it.

Data that was offered and not read is offered again, whatever happens in between (`MigrationRegion._taken`).
"""

import struct
from typing import Final

from vfio_user.device_models.regions import Area, Buffer, Region
from vfio_user.protocol.errors import DeviceError
from vfio_user.protocol.migration import STATES
from vfio_user.server.migration.engine import MigrationEngine
from vfio_user.server.migration.offer import Offer
from vfio_user.server.shared_memory import MemfdMemory

DATA_OFFSET: Final = 4096
"""Page aligned, as the data area is mappable (linux/vfio.h: "If mmapped, data_offset must be")."""
DATA_SIZE: Final = 1 << 20
"""Bytes of the data area."""

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class MigrationRegion(Region):
    """The v1 front end of an engine. Errors are DeviceError; those of the client are EINVAL.

    Its memory belongs to one client: another one must not find its state in a mapping that it kept.
    """

    mmap_areas = (Area(DATA_OFFSET, DATA_SIZE),)

    def __init__(self, engine: MigrationEngine) -> None:
        super().__init__(DATA_OFFSET + DATA_SIZE)
        self._engine = engine
        self._memory: MemfdMemory | None = None
        self._session = 0
        self._counting = False
        """An iteration has begun: pending_bytes has been read."""
        self._offer: Offer | None = None
        """What waits in the data area to be read; None before data_offset was read."""
        self._measured = False
        """data_size was read."""
        self._lent = False
        """The client may have mapped the data area."""
        self._by_messages = False
        """The client has read a whole iteration by messages."""

    @property
    def memory(self) -> MemfdMemory:  # type: ignore[override]  # made when it is asked for
        """Registers and data area, though only the data area is used: to be lent to the client."""
        memory = self._own_memory()
        self._lent = True
        return memory

    def _own_memory(self) -> MemfdMemory:
        if self._memory is None:
            try:
                self._memory = MemfdMemory(self.size)
            except OSError as error:
                raise DeviceError(
                    f"memory for the migration region: {error.strerror}", error.errno
                ) from error
        return self._memory

    def release(self) -> None:
        """The client has gone: close the memory."""
        self._begin_anew()
        self._lent = self._by_messages = False
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()

    def _begin_anew(self) -> None:
        self._counting = self._measured = False
        self._offer = None

    def _follow(self) -> None:
        """At each access: this client moves the device itself (to ask where the region is says nothing: some
        look at every region of a device). And what belongs to a session that has ended, by whichever edition
        it was, is forgotten."""
        self._engine.edition = "v1"
        if self._session != self._engine.session:
            self._session = self._engine.session
            self._begin_anew()

    # Accesses

    def read(self, offset: int, count: int) -> bytes:
        self._follow()
        if offset >= DATA_OFFSET:
            return self._read_data(offset, count)
        read = _READ.get((offset, count))
        if read is None:
            raise DeviceError(f"no register has {count} bytes at {offset:#x}")
        return (_U32 if count == _U32.size else _U64).pack(read(self))

    def write(self, offset: int, data: Buffer) -> None:
        self._follow()
        if offset >= DATA_OFFSET:
            self._write_data(offset, data)
            return
        write = _WRITE.get((offset, len(data)))
        if write is None:
            raise DeviceError(f"no register to be written has {len(data)} bytes at {offset:#x}")
        write(self, int.from_bytes(data, "little"))

    def _read_data(self, offset: int, count: int) -> bytes:
        offer = self._offer
        readable = DATA_SIZE if self._engine.resuming else offer.size if offer else 0
        if offset + count > DATA_OFFSET + readable:
            raise DeviceError(f"{count} bytes at {offset:#x}: {readable} bytes are there to be read")
        if offer is not None:
            offer.read(offset - DATA_OFFSET, count)
        return bytes(self._own_memory().view[offset : offset + count])

    def _write_data(self, offset: int, data: Buffer) -> None:
        if not self._engine.resuming:
            raise DeviceError("migration data is written while resuming only")
        self._own_memory().view[offset : offset + len(data)] = data

    # Registers

    def _zero(self) -> int:
        return 0

    def _ignore(self, _value: int) -> None:
        """Writes to the reserved field."""

    def _read_state(self) -> int:
        return int(STATES[self._engine.state].v1)

    def _write_state(self, value: int) -> None:
        self._engine.set_v1_state(value)

    def _read_pending(self) -> int:
        if not self._engine.saving:
            return 0
        if self._offer is not None and self._taken(self._offer):
            self._begin_anew()
        self._counting = True
        return (self._offer.size if self._offer else 0) + self._engine.pending_bytes

    def _taken(self, offer: Offer) -> bool:
        """Whether the client has read what was offered.

        By the text it has, once it reads pending_bytes again. But it may have gone to another state in
        between; then who reads by messages is seen to have left something. Of who may have mapped the data,
        and did not begin to read it by messages, it is assumed once data_size was read.
        """
        if offer.whole:
            self._by_messages |= offer.size > 0
            return True
        return self._lent and not self._by_messages and self._measured and not offer.broken_off

    def _read_offset(self) -> int:
        if self._engine.saving:
            if not self._counting:
                raise DeviceError("data_offset is read after pending_bytes")
            if self._offer is None:
                self._prepare()
        return DATA_OFFSET

    def _prepare(self) -> None:
        place = DATA_OFFSET
        view = self._own_memory().view
        for piece in self._engine.read(DATA_SIZE):
            view[place : place + len(piece)] = piece
            place += len(piece)
        self._offer = Offer(place - DATA_OFFSET)

    def _read_size(self) -> int:
        if not self._engine.saving:
            return 0
        if self._offer is None:
            raise DeviceError("data_size is read after data_offset")
        self._measured = True
        return self._offer.size

    def _write_size(self, value: int) -> None:
        if not self._engine.resuming:
            raise DeviceError("data_size is written while resuming only")
        if value > DATA_SIZE:
            raise DeviceError(f"data_size {value} is more than the data area ({DATA_SIZE})")
        # A copy: who has mapped the area may go on writing while we look at it.
        self._engine.write(bytes(self._own_memory().view[DATA_OFFSET : DATA_OFFSET + value]))


_STATE, _RESERVED, _PENDING, _OFFSET, _SIZE = (0, 4), (4, 4), (8, 8), (16, 8), (24, 8)
"""Offset and width of each field: "only supported at their native width and alignment"."""

_READ = {
    _STATE: MigrationRegion._read_state,
    _RESERVED: MigrationRegion._zero,
    _PENDING: MigrationRegion._read_pending,
    _OFFSET: MigrationRegion._read_offset,
    _SIZE: MigrationRegion._read_size,
}
_WRITE = {
    _STATE: MigrationRegion._write_state,
    _RESERVED: MigrationRegion._ignore,
    _SIZE: MigrationRegion._write_size,
}
