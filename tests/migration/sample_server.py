# SPDX-License-Identifier: BSD-3-Clause
"""A model that behaves like libvfio-user's sample `server`, for the sample `client`.

BAR0 is a time in seconds since the epoch: written, INTx fires then, and after it the device writes 4 KiB of
`A` to the first DMA region and reads them back, by message; read, it is the seconds since that time. BAR1 is
12 KiB of memory, two pages of which may be mapped. Both are saved, and BAR0's time is waited for anew.
"""

import struct
import time
from collections.abc import Mapping, Sequence

from vfio_user.device_models.device import Host
from vfio_user.device_models.pci import Bar, Identity
from vfio_user.device_models.pci_device import PciDevice
from vfio_user.device_models.regions import Area, Buffer, RamRegion, Region
from vfio_user.device_models.state import U64, Apply, Fields, Reader, Section
from vfio_user.server.host import EngineHost

PAGE = 4096
_TIME = struct.Struct("<q")


class _Alarm(Region):
    """BAR0: 8 bytes at once, or nothing."""

    def __init__(self, device: "SampleServer") -> None:
        super().__init__(16)
        self._device = device

    def read(self, offset: int, count: int) -> bytes:
        self._check(offset, count)
        return _TIME.pack(int(time.time()) - self._device.alarm)

    def write(self, offset: int, data: Buffer) -> None:
        self._check(offset, len(data))
        self._device.set_alarm(_TIME.unpack(data)[0])

    def _check(self, offset: int, count: int) -> None:
        if (offset, count) != (0, _TIME.size):
            raise ValueError(f"{count} bytes at {offset:#x} of BAR0")


class _Memory(RamRegion):
    """BAR1: its first and its third page may be mapped."""

    def __init__(self, host: Host) -> None:
        super().__init__(4 * PAGE, host.allocate_memory(4 * PAGE))
        self.mmap_areas = (Area(0, PAGE), Area(2 * PAGE, PAGE))
        self.writes = 0

    def write(self, offset: int, data: Buffer) -> None:
        self.writes += 1
        super().write(offset, data)


class SampleServer(PciDevice):
    model = "sample"
    summary = "behaves like libvfio-user's sample server"
    state_version = 1
    identity = Identity(0xDEAD, 0xBEEF, 0xFF0000, subsystem_vendor_id=0xCAFE, subsystem_id=0xBABE)

    def __init__(self, host: Host) -> None:
        self.alarm = 0
        """Seconds since the epoch; 0: none."""
        self.rings = self.dma_done = 0
        self.dma_regions = 0
        """Of the client, when the DMA was done."""
        self.regions_left = -1
        """Those that the client had not unmapped when it left."""
        self.memory = _Memory(host)
        super().__init__(host, {0: Bar(_Alarm(self)), 1: Bar(self.memory)})
        assert isinstance(host, EngineHost)
        self._watch_detach(host)

    def _watch_detach(self, host: EngineHost) -> None:
        detach = host.detach

        def note() -> None:
            self.regions_left = len(host.table)
            detach()

        host.detach = note  # type: ignore[method-assign]

    def set_alarm(self, alarm: int) -> None:
        self.alarm = alarm
        nanoseconds = max(alarm - time.time(), 0) * 1e9
        self.host.call_at(self.host.clock() + int(nanoseconds), self._ring)

    def _ring(self) -> None:
        """The line goes up and down at once: the sample's client never acknowledges it."""
        self.rings += 1
        self.interrupts.set_level(True)
        self.interrupts.set_level(False)
        self.host.start("dma", self._dma)

    async def _dma(self) -> None:
        """By message, whether or not the memory could be mapped: the client counts on it."""
        host = self.host
        assert isinstance(host, EngineHost)
        assert host.dma.messages is not None
        self.dma_regions = len(host.table)
        first = min(region.address for region in host.table)
        writer, reader = host.dma.messages.writer(), host.dma.messages.reader()
        await writer.add(first, b"A" * PAGE)
        await writer.finish()
        await reader.add(first, PAGE)
        if bytes(await reader.result(PAGE)) != b"A" * PAGE:
            raise ValueError("what was written is not what is read")
        self.dma_done += 1

    def counters(self) -> Mapping[str, int]:
        return {
            "rings": self.rings,
            "dma_done": self.dma_done,
            "bar1_writes": self.memory.writes,
            "regions": self.dma_regions,
            "regions_left": self.regions_left,
        }

    def reset_state(self) -> None:
        """The sample's reset changes nothing."""

    def state_sections(self) -> Sequence[Section]:
        return (*super().state_sections(), Section("alarm", 1, self._save, self._load))

    def _save(self) -> Fields:
        return {"alarm": self.alarm}

    def _load(self, reader: Reader) -> Apply:
        alarm = reader.integer("alarm", U64 >> 1)
        return lambda: setattr(self, "alarm", alarm)

    def restored(self) -> None:
        super().restored()
        if self.alarm > time.time():
            self.set_alarm(self.alarm)
