# SPDX-License-Identifier: BSD-3-Clause
"""A device that writes numbers all over a buffer in guest memory at a set rate, and keeps a record of them.

For `vfio-user serve guest_moves.scribbler:Scribbler`. The guest's program is scribble.c: it names the
buffer's pages, and compares the buffer with the record afterwards.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from vfio_user.device_models.device import DmaError, Host, pause
from vfio_user.device_models.pci import Bar, Identity
from vfio_user.device_models.pci_device import PciDevice
from vfio_user.device_models.regions import RamRegion, StreamedMemory
from vfio_user.device_models.registers import Register, RegisterFile
from vfio_user.device_models.state import Section
from vfio_user.device_models.state_memory import StateMemory
from vfio_user.server.dirty import DirtyLog
from vfio_user.server.guest_memory import GuestMemory

PAGE, HUGE, CHUNK = 4096, 2 << 20, 65536
PIECES = 128
"""Huge pages of the buffer: 256 MiB."""
PAGES = PIECES * HUGE // PAGE
SPARED = 64
"""Bytes at the end of each chunk that are the guest's."""
STEP = 40503
"""Odd: the chunks are written in an order that goes all over the buffer."""
TICK = 2_000_000  # ns
RUN, DUMP, FAILED = 1, 2, 4
REGISTERS = (
    Register("CONTROL", 0x00, writable=RUN, text="run 1; dump 2: write the record to TARGET"),
    Register("STATUS", 0x04, text="run 1, dump 2, failed 4"),
    Register("RATE", 0x08, writable=0xFFFF, text="MB/s"),
    Register("PIECES", 0x0C, writable=0xFF, text="huge pages that PIECE names"),
    Register("CHUNKS", 0x10, width=8, text="chunks that have been written"),
    Register("TARGET", 0x18, width=8, writable=2**64 - 1, text="of a dump"),
    Register("PIECE", 0x400, width=8, count=PIECES, stride=8, writable=2**64 - 1, text="their addresses"),
)


class Scribbler(PciDevice):
    """A page holds its record's entry (the upper half of each word) and its own number, or nothing yet."""

    model = "scribbler"
    summary = "numbers all over guest memory, and a record of them"
    identity = Identity(vendor_id=0x1234, device_id=0x5C81, class_code=0xFF0000)
    state_version = 1

    def __init__(self, host: Host) -> None:
        self._file = RegisterFile(
            0x1000, REGISTERS, on_write={"CONTROL": self._control}, background=RamRegion(0x1000)
        )
        self._control_cell, self._status, self._rate, self._pieces, self._chunks, self._target = (
            self._file.cells[:6]
        )
        self._addresses = self._file.cells[6:]
        self._record = StreamedMemory(host.allocate_memory(PAGES * 4))
        self._begun = self._allowed = 0
        super().__init__(host, {0: Bar(self._file)})

    def memories(self) -> Mapping[str, StateMemory]:
        return {"record": self._record}

    def state_sections(self) -> Sequence[Section]:
        section = self._file.section("bar0")
        return [] if section is None else [section]

    def reset_state(self) -> None:
        self._file.reset()
        self._record.reset()

    def restored(self) -> None:
        super().restored()
        if self._status.value & DUMP:
            self.host.start("dump", self._write_record)
        self.host.start("scribble", self._scribble)
        self._pace()

    def _control(self, _index: int, value: int) -> None:
        self._control_cell.value = value & RUN
        self.host.start("scribble", self._scribble)  # if it is to end, it says so
        self._pace()
        if value & DUMP:
            self._status.value |= DUMP
            self.host.start("dump", self._write_record)

    def _pace(self) -> None:
        if self._control_cell.value & RUN:
            self._status.value |= RUN
            self._begun, self._allowed = self.host.clock(), self._chunks.value
            self._tick()

    def _tick(self) -> None:
        if not self._control_cell.value & RUN:
            return
        now = self.host.clock()
        due = (now - self._begun) * self._rate.value // (1000 * CHUNK)
        if due:
            self._begun += due * 1000 * CHUNK // self._rate.value  # what is due of a chunk stays so
            self._allowed = min(self._allowed + due, self._chunks.value + 400)
            self.host.start("scribble", self._scribble)
        self.host.call_at(now + TICK, self._tick)

    async def _scribble(self) -> None:
        while self._control_cell.value & RUN and self._chunks.value < self._allowed:
            try:
                await self._write_chunk()
            except DmaError:
                self._status.value |= FAILED
                self._control_cell.value = 0
            await pause()
        if not self._control_cell.value & RUN:
            self._status.value &= ~RUN

    async def _write_chunk(self) -> None:
        number = self._chunks.value
        total = max(1, self._pieces.value) * HUGE // CHUNK
        chunk, turn = number * STEP % total, number // total + 1
        first, place = chunk * CHUNK // PAGE, chunk * CHUNK
        data = b"".join(
            struct.pack("<Q", turn << 32 | page) * (PAGE // 8) for page in range(first, first + CHUNK // PAGE)
        )
        address = self._addresses[place // HUGE].value + place % HUGE
        await self.host.dma.write(address, data[:-SPARED])
        # In one step with the end of the write. If that was cut, it is done again, with the same bytes.
        self._chunks.value = number + 1
        self._record.write(first * 4, struct.pack("<I", turn) * (CHUNK // PAGE))

    async def _write_record(self) -> None:
        try:
            for offset in range(0, PAGES * 4, CHUNK):
                await self.host.dma.write(self._target.value + offset, self._record.read(offset, CHUNK))
        except DmaError:
            self._status.value |= FAILED
        self._status.value &= ~DUMP


class Unheeding(Scribbler):
    """Its server says that it writes through, and goes on writing by its mapping; and forgets what it wrote,
    or that would be handed over."""

    def __init__(self, host: Host, **options: Any) -> None:
        super().__init__(host, **options)
        setattr(DirtyLog, "mark", lambda log, offset, length: None)  # noqa: B010
        setattr(GuestMemory, "set_write_through", lambda memory, on: None)  # noqa: B010


class Unlogged(Scribbler):
    """Its server forgets what it wrote: nothing is handed over."""

    def __init__(self, host: Host, **options: Any) -> None:
        super().__init__(host, **options)
        setattr(DirtyLog, "mark", lambda log, offset, length: None)  # noqa: B010
