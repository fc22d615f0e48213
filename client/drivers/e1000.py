# SPDX-License-Identifier: BSD-3-Clause
"""A driver for the 82540EM over a fake VMM: what a guest's driver does, in the order of Linux's.

async with open_e1000(vmm) as nic:
    await nic.send([frame])
    frame = await nic.receive()
"""

import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import trio

from vfio_user.client.background import background
from vfio_user.client.drivers import e1000_hardware as hw
from vfio_user.client.drivers import packets
from vfio_user.client.drivers.e1000_board import LINK_PATIENCE, Board, DriverError
from vfio_user.client.drivers.e1000_hardware import Cause, Command, Rctl, Reg
from vfio_user.client.guest import DriverAccess
from vfio_user.client.memory import GuestRam

__all__ = ["E1000", "DriverCounters", "DriverError", "open_e1000"]

BUFFER_SIZE = 2048
LARGE_BUFFER = 64 * 1024
_CAUSES = Cause.TXDW | Cause.RXT0 | Cause.RXO | Cause.RXDMT0 | Cause.RXSEQ | Cause.LSC
_FULL_FRAME = Command.EOP | Command.IFCS | Command.RS
_RX_BAD_SUM = 0x60  # error bits TCPE and IPE


@dataclass(slots=True)
class DriverCounters:
    """What the driver has seen; bytes are those of frames without FCS."""

    frames_sent: int = 0
    bytes_sent: int = 0
    frames_received: int = 0
    bytes_received: int = 0
    interrupts: int = 0
    bad_sums: int = 0
    """Frames in which the device found a wrong checksum."""


class E1000:
    """A running NIC. `ring` is the number of descriptors of each ring, a multiple of 8."""

    def __init__(self, device: DriverAccess, ring: int, link_patience: float = LINK_PATIENCE) -> None:
        self.board = Board(device, link_patience)
        self.counters = DriverCounters()
        self.causes: Counter[str] = Counter()
        """How often each interrupt cause was seen."""
        self._device = device
        self._ring = ring
        self._statistics: Counter[str] = Counter()
        self._inbox: deque[bytes] = deque()
        self._progress = trio.Event()

    @property
    def mac(self) -> bytes:
        return self.board.mac

    @property
    def _ram(self) -> GuestRam:
        """Another one after the guest has been moved."""
        return self._device.ram

    async def start(self) -> None:
        """From reset to a running NIC with a link. DriverError when the device does not behave."""
        await self.board.reset()
        await self.board.set_up()
        await self.start_rings()
        await self.board.write(Reg.IMS, _CAUSES)

    # Rings

    async def start_rings(self) -> None:
        """Fresh rings and buffers, transmitter and receiver on."""
        ram, size = self._ram, self._ring * hw.DESCRIPTOR_SIZE
        self._tx, self._rx = ram.allocate(size), ram.allocate(size)
        self._tx_buffers, self._rx_buffers = (ram.allocate(self._ring * BUFFER_SIZE) for _ in range(2))
        self._large = ram.allocate(LARGE_BUFFER)
        self._tx_head = self._tx_tail = self._rx_head = 0
        self._tx_last: deque[int] = deque()
        """The last descriptor of each packet that is not known to be sent."""
        for index in range(self._ring):
            address = self._rx_buffers + index * BUFFER_SIZE
            ram.pack(hw.RX_DESCRIPTOR, self._rx + index * hw.DESCRIPTOR_SIZE, address, 0, 0, 0, 0, 0)
        await self._start_transmitter()
        await self._start_receiver()

    async def _start_transmitter(self) -> None:
        values = {
            Reg.TDBAL: self._tx & 0xFFFF_FFFF,
            Reg.TDBAH: self._tx >> 32,
            Reg.TDLEN: self._ring * hw.DESCRIPTOR_SIZE,
            Reg.TDH: 0,
            Reg.TDT: 0,
            Reg.TIPG: hw.TIPG_COPPER,
            Reg.TIDV: 0,
            Reg.TCTL: hw.TCTL_EN | hw.TCTL_PSP | hw.TCTL_CT | hw.TCTL_COLD,
        }
        await self.board.write_all(values)

    async def _start_receiver(self) -> None:
        values = {
            Reg.RDTR: 0,
            Reg.RDBAL: self._rx & 0xFFFF_FFFF,
            Reg.RDBAH: self._rx >> 32,
            Reg.RDLEN: self._ring * hw.DESCRIPTOR_SIZE,
            Reg.RDH: 0,
            Reg.RDT: 0,
            Reg.RXCSUM: hw.RXCSUM_ALL,
            Reg.RCTL: Rctl.EN | Rctl.BAM,
        }
        await self.board.write_all(values)
        await self.board.write(Reg.RDT, self._ring - 1)

    # Transmit

    @property
    def tx_room(self) -> int:
        """Free descriptors."""
        return (self._tx_head - self._tx_tail - 1) % self._ring

    async def send(self, frames: Sequence[bytes]) -> None:
        """Send frames of at most 2048 bytes by legacy descriptors; waits for room, not for the wire."""
        for frame in frames:
            if not self.tx_room:
                await self._ring_doorbell()
                await self._until_room(1)
            address = self._tx_buffers + self._tx_tail * BUFFER_SIZE
            self._ram.write(address, frame)
            self._put(hw.TX_LEGACY.pack(address, len(frame), 0, _FULL_FRAME, 0, 0, 0))
            self._tx_last.append((self._tx_tail - 1) % self._ring)
            self.counters.frames_sent += 1
            self.counters.bytes_sent += len(frame)
        await self._ring_doorbell()

    async def send_segmented(self, headers: bytes, payload: bytes, mss: int) -> None:
        """Let the device cut `payload` into TCP segments of `mss` bytes after `headers` (Ethernet, IPv4 and
        TCP without options, prepared as `packets.tcp_segmentation_header` does). Waits until it is done."""
        await self._until_room(2)
        self._ram.write(self._large, headers + payload)
        self._put(hw.TX_CONTEXT.pack(*_segmentation_context(len(headers), len(payload), mss)))
        command = int(_FULL_FRAME | Command.TSE | Command.DEXT) << 24
        length = len(headers) + len(payload)
        options = hw.OPTION_IP_SUM | hw.OPTION_TCP_SUM
        self._put(hw.TX_DATA.pack(self._large, length | hw.TYPE_DATA | command, 0, options, 0))
        self._tx_last.append((self._tx_tail - 1) % self._ring)
        segments = -(-len(payload) // mss)
        self.counters.frames_sent += segments
        self.counters.bytes_sent += len(payload) + segments * len(headers)
        await self._ring_doorbell()
        await self._until_room(self._ring - 1)

    async def drain(self) -> None:
        """Wait until everything is sent."""
        await self._until_room(self._ring - 1)

    def _put(self, descriptor: bytes) -> None:
        self._ram.write(self._tx + self._tx_tail * hw.DESCRIPTOR_SIZE, descriptor)
        self._tx_tail = (self._tx_tail + 1) % self._ring

    async def _ring_doorbell(self) -> None:
        await self.board.write(Reg.TDT, self._tx_tail)

    async def _until_room(self, wanted: int) -> None:
        while self._clean_tx() < wanted:
            await self._progress.wait()

    def _clean_tx(self) -> int:
        """Take back the descriptors of packets whose last one is done: how many are free then."""
        while self._tx_last:
            place = self._tx + self._tx_last[0] * hw.DESCRIPTOR_SIZE
            if not self._ram.read(place + hw.TX_STATUS_OFFSET, 1)[0] & hw.DONE:
                break
            self._tx_head = (self._tx_last.popleft() + 1) % self._ring
        return self.tx_room

    # Receive

    async def receive(self) -> bytes:
        """The next frame, without FCS."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._inbox:
            await self._progress.wait()
        return self._inbox.popleft()

    async def _clean_rx(self) -> None:
        """Take what the device has received, and give the descriptors back."""
        taken = 0
        while True:
            place = self._rx + self._rx_head * hw.DESCRIPTOR_SIZE
            address, length, _, status, errors, _ = self._ram.unpack(hw.RX_DESCRIPTOR, place)
            if not status & hw.DONE:
                break
            self._take(address, length, status, errors)
            self._ram.pack(hw.RX_DESCRIPTOR, place, address, 0, 0, 0, 0, 0)
            self._rx_head = (self._rx_head + 1) % self._ring
            taken += 1
        if taken:
            await self.board.write(Reg.RDT, (self._rx_head - 1) % self._ring)

    def _take(self, address: int, length: int, status: int, errors: int) -> None:
        if not status & hw.RX_END_OF_PACKET or not packets.FCS_SIZE < length <= BUFFER_SIZE:
            raise DriverError(f"receive descriptor with length {length}, status {status:#x}")
        if not status & hw.RX_IGNORE_SUM and errors & _RX_BAD_SUM:
            self.counters.bad_sums += 1
        self._inbox.append(self._ram.read(address, length - packets.FCS_SIZE))
        self.counters.frames_received += 1
        self.counters.bytes_received += length - packets.FCS_SIZE

    # Interrupts

    async def serve_interrupts(self) -> None:
        """The interrupt handler, for ever."""
        while True:
            self.counters.interrupts += await self._device.intx.wait()
            causes = await self.board.read(Reg.ICR)
            self.causes.update(cause.name for cause in Cause if causes & cause and cause.name)
            await self._clean_rx()
            self._clean_tx()
            self._progress.set()
            self._progress = trio.Event()
            await self._device.intx.acknowledge()

    # Statistics

    async def statistics(self) -> Counter[str]:
        """The device's counters since `start`; octets include the FCS."""
        for name, offset in hw.STATISTICS.items():
            self._statistics[name] += await self.board.read(offset)
        return self._statistics

    async def stop(self) -> None:
        """Receiver, transmitter and interrupts off."""
        await self.board.write(Reg.IMC, 0xFFFF_FFFF)
        await self.board.write(Reg.RCTL, 0)
        await self.board.write(Reg.TCTL, 0)
        await self.board.read(Reg.STATUS)


def _segmentation_context(header: int, payload: int, mss: int) -> tuple[int, ...]:
    """3.3.6: where the checksums are, the payload's length, header length and segment size."""
    ip, tcp = 14, 34
    command = int(Command.TCP | Command.IP | Command.TSE | Command.DEXT) << 24
    return (ip, ip + 10, tcp - 1, tcp, tcp + 16, 0, payload | command, 0, header, mss)


@contextlib.asynccontextmanager
async def open_e1000(
    device: DriverAccess, *, ring: int = 256, link_patience: float = LINK_PATIENCE
) -> AsyncIterator[E1000]:
    """A started NIC whose interrupts are served; stopped at the end. DriverError when it does not start."""
    nic = E1000(device, ring, link_patience)
    async with background() as nursery:
        await nic.start()
        nursery.start_soon(nic.serve_interrupts)  # not before: one may wait there that another driver left
        yield nic
        await nic.stop()
