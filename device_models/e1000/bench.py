# SPDX-License-Identifier: BSD-3-Clause
"""An e1000 on a test bench: a fake host, a port that records, and what a driver does with registers.

bench = Bench(mapped=False)
bench.start()                       # rings, enable bits, link
bench.transmit([b"..."])            # one frame in one piece
assert bench.port.frames == [b"..."]
bench.deliver(b"...")
assert bench.received() == [b"..."]
"""

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from vfio_user.device_models.backends import Backend
from vfio_user.device_models.e1000.bits import Eecd, Mdic, Rctl, Tctl
from vfio_user.device_models.e1000.descriptors import RECEIVE, SIZE
from vfio_user.device_models.e1000.device import E1000
from vfio_user.device_models.e1000.phy import NEGOTIATION_TIME
from vfio_user.device_models.fake_host import FakeHost
from vfio_user.device_models.fake_migration import restore_device, save_device
from vfio_user.device_models.net import Offload
from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.segmentation import Burst, segment

COMMAND = 0x04
TX_RING, RX_RING, TX_DATA, RX_DATA = 0x1000, 0x4000, 0x10_0000, 0x20_0000
BUFFER = 2048
EOP, IFCS, RS, DEXT, VLE, IDE = 1 << 24, 1 << 25, 1 << 27, 1 << 29, 1 << 30, 1 << 31
DATA, TSE = DEXT | 1 << 20, 1 << 26


class RecordingPort(Backend):
    """A backend that keeps what the device sends."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[bytes, Offload | None]] = []
        """Each frame or burst as it was given, in one piece."""
        self.frames: list[bytes] = []
        """What it is on the wire."""
        self.was_ready = 0

    def _transmit(self, buffers: Sequence[Buffer], offload: Offload | None, burst: Burst | None) -> int:
        self.sent.append((b"".join(buffers), offload))
        self.frames += segment(buffers, offload)
        return 0

    def offer(self, frame: bytes) -> bool:
        """Deliver a frame; False: refused."""
        return self._offer(frame)

    def ready(self) -> None:
        self.was_ready += 1


class Received(NamedTuple):
    """A receive descriptor as it was written back, with its data."""

    data: bytes
    checksum: int
    status: int
    errors: int
    special: int


class Bench:
    """A device and the driver's knowledge of it."""

    def __init__(self, *, mapped: bool = True, memory: int = 4 << 20, **options: Any) -> None:
        self.host = FakeHost(memory, mapped=mapped)
        self._options = options
        self.port = RecordingPort()
        self.device = E1000(self.host, self.port, **options)
        self.memory = self.host.dma.memory
        self.device.config.write(COMMAND, b"\x07\x00")
        self.tx_count = self.rx_count = 0
        self.tail = self.next_received = 0
        self._free = TX_DATA

    def moved(self, *, mapped: bool = True) -> "Bench":
        """The driver and its memory with another card that has taken over the state; this one is stopped.

        The new host's time has nothing to do with the old one's, and its port has sent nothing yet.
        """
        bench = Bench(mapped=mapped, memory=len(self.memory), **self._options)
        bench.host.advance(123_456_789)
        restore_device(bench.host, bench.device, save_device(self.host, self.device))
        bench.memory[:] = self.memory
        for name in ("tx_count", "rx_count", "tail", "next_received", "_free"):
            setattr(bench, name, getattr(self, name))
        bench.host.resume()
        return bench

    # Registers

    def offset(self, name: str, index: int = 0) -> int:
        return self.device.registers.cell(name, index).offset

    def read(self, name: str, index: int = 0) -> int:
        return int.from_bytes(self.device.regions[0].read(self.offset(name, index), 4), "little")

    def write(self, name: str, value: int, index: int = 0) -> None:
        self.device.regions[0].write(self.offset(name, index), value.to_bytes(4, "little"))

    def reset_by_window(self) -> None:
        """CTRL.RST through the I/O BAR, as Linux does it for an 82540."""
        control = self.read("CTRL") | 1 << 26
        self.device.regions[2].write(0, self.offset("CTRL").to_bytes(4, "little"))
        self.device.regions[2].write(4, control.to_bytes(4, "little"))

    def read_phy(self, number: int, address: int = 1) -> int | None:
        """None: the error bit is set."""
        self.write("MDIC", number << Mdic.REGISTER_SHIFT | address << Mdic.PHY_SHIFT | Mdic.READ)
        value = self.read("MDIC")
        assert value & Mdic.READY
        return None if value & Mdic.ERROR else value & Mdic.DATA

    def write_phy(self, number: int, value: int) -> None:
        self.write("MDIC", value | number << Mdic.REGISTER_SHIFT | 1 << Mdic.PHY_SHIFT | Mdic.WRITE)
        assert self.read("MDIC") & (Mdic.READY | Mdic.ERROR) == Mdic.READY

    def run(self) -> None:
        """Let the device work until it waits for nothing but the guest or time."""
        self.host.answer()

    def advance(self, nanoseconds: int) -> None:
        self.host.advance(nanoseconds)
        self.run()

    def link_up(self) -> None:
        """Wait for the end of negotiation."""
        self.advance(NEGOTIATION_TIME)

    # The EEPROM, bit by bit

    def _pins(self, value: int) -> None:
        self.write("EECD", value)

    def _clock_out(self, value: int, bits: int) -> None:
        for bit in reversed(range(bits)):
            pins = Eecd.REQ | Eecd.CS | (Eecd.DI if value >> bit & 1 else 0)
            for step in (pins, pins | Eecd.SK, pins):
                self._pins(step)
        self._pins(Eecd.REQ | Eecd.CS)

    def _standby(self) -> None:
        for pins in (0, Eecd.SK, Eecd.SK | Eecd.CS, Eecd.CS):
            self._pins(Eecd.REQ | pins)

    def eeprom_begin(self) -> None:
        self._pins(Eecd.REQ)
        assert self.read("EECD") & (Eecd.GNT | Eecd.PRES) == Eecd.GNT | Eecd.PRES
        self._pins(Eecd.REQ | Eecd.CS)

    def eeprom_end(self) -> None:
        for pins in (Eecd.REQ, Eecd.REQ | Eecd.SK, Eecd.REQ, 0):
            self._pins(pins)

    def eeprom_command(self, value: int, bits: int = 9) -> None:
        """A command without data, then CS low and high again."""
        self._clock_out(value, bits)
        self._standby()

    def read_eeprom(self, address: int, words: int = 1) -> list[int]:
        self.eeprom_begin()
        self._clock_out(0b110 << 6 | address, 9)
        data = []
        for _ in range(words):
            value = 0
            for _ in range(16):
                self._pins(Eecd.REQ | Eecd.CS | Eecd.SK)
                value = value << 1 | bool(self.read("EECD") & Eecd.DO)
                self._pins(Eecd.REQ | Eecd.CS)
            data.append(value)
        self._standby()
        self.eeprom_end()
        return data

    def write_eeprom(self, address: int, value: int, *, enable: bool = True) -> None:
        self.eeprom_begin()
        if enable:
            self.eeprom_command(0b10011 << 4)  # EWEN
        self._clock_out(0b101 << 6 | address, 9)
        self._clock_out(value, 16)
        self._standby()
        assert self.read("EECD") & Eecd.DO  # ready
        self._standby()
        if enable:
            self.eeprom_command(0b10000 << 4)  # EWDS
        self.eeprom_end()

    # Rings

    def start(self, *, tx: int = 64, rx: int = 64, rctl: int = Rctl.BAM, tctl: int = Tctl.PSP) -> None:
        """Rings of `tx` and `rx` descriptors, everything enabled, the link up."""
        self.tx_count, self.rx_count, self.tail, self.next_received = tx, rx, 0, 0
        for name, value in (("BAL", TX_RING), ("BAH", 0), ("LEN", tx * SIZE), ("H", 0), ("T", 0)):
            self.write("TD" + name, value)
        for index in range(rx):
            address = RX_DATA + index * BUFFER
            RECEIVE.pack_into(self.memory, RX_RING + index * SIZE, address, 0, 0, 0, 0, 0)
        for name, value in (("BAL", RX_RING), ("BAH", 0), ("LEN", rx * SIZE), ("H", 0)):
            self.write("RD" + name, value)
        self.write("RCTL", Rctl.EN | rctl)
        self.write("RDT", rx - 1)
        self.write("TCTL", Tctl.EN | tctl)
        self.link_up()
        self.read("ICR")

    def put(self, address: int, lower: int, upper: int = 0) -> int:
        """Put a transmit descriptor behind the last one, without telling; gives its index."""
        index = self.tail
        struct.pack_into("<QII", self.memory, TX_RING + index * SIZE, address, lower, upper)
        self.tail = (self.tail + 1) % self.tx_count
        return index

    def put_context(self, *fields: int) -> int:
        """IPCSS, IPCSO, IPCSE, TUCSS, TUCSO, TUCSE, command and PAYLEN, HDRLEN, MSS."""
        packed = struct.pack("<BBHBBHIBBH", *fields[:6], fields[6] | DEXT, 0, *fields[7:])
        return self.put(*struct.unpack("<QII", packed))

    def put_data(
        self, data: bytes, *, sizes: Sequence[int] = (), command: int = IFCS | RS, upper: int = 0
    ) -> int:
        """Put a frame as descriptors of `sizes` bytes, the rest in the last one; gives the last index."""
        if self._free + len(data) > RX_DATA:
            self._free = TX_DATA
        base, self._free = self._free, self._free + len(data)
        self.memory[base : base + len(data)] = data
        place = 0
        for size in sizes:
            self.put(base + place, size | command & ~RS, upper)
            place += size
        return self.put(base + place, len(data) - place | command | EOP, upper)

    def ring_bell(self) -> None:
        """Write the tail and let the device work."""
        self.write("TDT", self.tail)
        self.run()

    def transmit(self, frames: Sequence[bytes]) -> None:
        for frame in frames:
            self.put_data(frame)
        self.ring_bell()

    def done(self, index: int) -> bool:
        """Whether a transmit descriptor is marked as done."""
        return bool(self.memory[TX_RING + index * SIZE + 12] & 1)

    def deliver(self, *frames: bytes) -> bool:
        """Frames from the wire; tells whether all were taken."""
        taken = True
        for frame in frames:
            taken &= self.port.offer(frame)
        self.run()
        return taken

    def take_received(self) -> list[Received]:
        """Take what has arrived out of the ring, descriptor by descriptor, without giving them back."""
        taken: list[Received] = []
        while True:
            place = RX_RING + self.next_received * SIZE
            address, length, checksum, status, errors, special = RECEIVE.unpack_from(self.memory, place)
            if not status & 1:
                return taken
            data = bytes(self.memory[address : address + length])
            taken.append(Received(data, checksum, status, errors, special))
            self.memory[place + 12] = 0
            self.next_received = (self.next_received + 1) % self.rx_count

    def received(self) -> list[bytes]:
        """The frames that have arrived, without FCS; each in one descriptor."""
        return [entry.data[:-4] for entry in self.take_received()]
