# SPDX-License-Identifier: BSD-3-Clause
"""A VMM without a guest: does to a server what QEMU does, in the same order, and lets a test be the driver.

    async with open_vmm(path) as vmm:
        await vmm.write(0, 0x38, 1)
        await vmm.intx.wait()

The order of start-up is QEMU's: VERSION, DMA_MAPs, GET_INFO, GET_REGION_INFO of 0-5 and 7, GET_IRQ_INFO,
the configuration space read whole, the ROM probe, SET_IRQS, RESET; then firmware sizes every BAR with all
ones, assigns addresses and writes the command register.
"""

import contextlib
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from vfio_user.client.client import Client, open_client, open_client_on
from vfio_user.client.config_space import Bar, Capability, CommandBits, ConfigSpace
from vfio_user.client.interrupts import Intx, Irqs
from vfio_user.client.mapping import MappedRegion
from vfio_user.client.memory import FIXED_SIZE, GuestRam
from vfio_user.protocol import capabilities
from vfio_user.protocol import messages as m
from vfio_user.protocol.constants import PciIrq, PciRegion, RegionInfoFlags
from vfio_user.protocol.errors import DeviceError, RemoteProtocolError

QEMU_VERSION = capabilities.Version(
    0,
    capabilities.Capabilities(max_msg_fds=16, migration=capabilities.Migration(), write_multiple=True),
)
"""What QEMU 11.1 proposes."""

PC_MEMORY = ((0, 0xA0000), (0xC0000, 0x40000), (0x100000, 31 << 20), (4 << 30, 32 << 20))
"""Address and size in bytes: RAM as a PC has it, below and above the holes."""

_IO_WINDOW = 0xC000
_QEMU_REGIONS = (*range(PciRegion.BAR0, PciRegion.BAR5 + 1), PciRegion.CONFIG)
_MSI_ENABLE, _MSIX_ENABLE, _MSIX_MASK_ALL = 1 << 0, 1 << 15, 1 << 14
_WIDTHS = {1: struct.Struct("<B"), 2: struct.Struct("<H"), 4: struct.Struct("<I"), 8: struct.Struct("<Q")}


@dataclass(frozen=True, slots=True)
class VmmOptions:
    """`shared`: guest memory on memfds that the server may map, with `seals`; else DMA goes by message.
    `resample`: INTx is unmasked by eventfd (as under KVM) instead of by message (TCG). `bar_window`: memory
    BARs are placed from there on; devices of one VM need windows of their own. `timeout` and `spin` are in
    seconds, as in `open_client`."""

    memory: Sequence[tuple[int, int]] = PC_MEMORY
    shared: bool = True
    seals: int = FIXED_SIZE
    version: capabilities.Version = QEMU_VERSION
    resample: bool = False
    bar_window: int = 0xE000_0000
    timeout: float = 5.0
    spin: float = 0.0


DEFAULT_OPTIONS = VmmOptions()


class Peers(Protocol):
    """Where DMA goes that is not for memory; `peers.PeerBus` is one."""

    def write(self, address: int, data: m.Payload) -> bool:
        """Write to a device, if there is one at the address."""


class FakeVmm:
    """One device, attached. Make it with `open_vmm`."""

    def __init__(self, ram: GuestRam, options: VmmOptions) -> None:
        self.ram = ram
        self.options = options
        self.info = m.DeviceGetInfoReply(0, 0, 0)
        self.regions: dict[int, m.DeviceGetRegionInfoReply] = {}
        self.irqs: dict[int, m.DeviceGetIrqInfoReply] = {}
        self.initial_config = b""
        """The configuration space as it was read whole at start-up."""
        self.rom_size = 0
        self.bars: dict[int, Bar] = {}
        self.peers: Peers | None = None
        """The other devices of the VM, if this one can reach them."""

    def bind(self, client: Client) -> None:
        """Use this connection."""
        self.client = client
        self.config = ConfigSpace(client)
        self.intx = Intx(client)
        self.msi = Irqs(client, PciIrq.MSI)
        self.msix = Irqs(client, PciIrq.MSIX)

    # Start-up

    async def start(self, step: Callable[[str], None] = lambda _: None) -> None:
        """All of the start-up after VERSION; `step` is told what was done."""
        await self.map_memory()
        step(f"{len(self.ram.ranges)} DMA_MAPs, {'by fd' if self.ram.shared else 'without fd'}")
        await self._examine()
        step(f"{len(self.regions)} region infos, {len(self.irqs)} irq infos, configuration space")
        await self._enable_intx()
        await self.client.reset()
        step("SET_IRQS, DEVICE_RESET")
        await self.assign_bars()
        step(f"{len(self.bars)} BARs sized and assigned, bus master on")

    async def start_incoming(self) -> None:
        """As `start`, for a guest that is going to come from elsewhere: its firmware does not run here."""
        await self.map_memory()
        await self._examine()
        await self.client.reset()

    async def map_memory(self) -> None:
        """DMA_MAP every range, pipelined."""
        calls = [self.client.begin_dma_map(memory) for memory in self.ram.ranges]
        for call in calls:
            await self.client.finish(call, m.DmaMapReply)

    async def _examine(self) -> None:
        self.info = await self.client.get_info()
        for index in _QEMU_REGIONS:
            self.regions[index] = await self.client.get_region_info(index)
        for index in range(self.info.num_irqs):
            self.irqs[index] = await self.client.get_irq_info(index)
        size = self.regions[PciRegion.CONFIG].size
        self.initial_config = await self.client.region_read(PciRegion.CONFIG, 0, size)
        self.rom_size = await self.config.size_rom()

    @property
    def posts_writes(self) -> bool:
        """QEMU posts writes to memory BARs unless any region can be mapped."""
        return not any(region.flags & RegionInfoFlags.MMAP for region in self.regions.values())

    async def _enable_intx(self) -> None:
        if self.irqs[PciIrq.INTX].count:
            await self.intx.enable(resample=self.options.resample)

    async def assign_bars(self) -> None:
        """Do as firmware: size the BARs, give them addresses, switch them and the bus master on.

        RemoteProtocolError when a BAR's size is not that of its region.
        """
        found = await self.config.size_bars()
        for bar in found:
            if bar.size != self.regions[bar.index].size:
                size = self.regions[bar.index].size
                raise RemoteProtocolError(f"BAR {bar.index} has {bar.size} bytes, its region has {size}")
        for bar in _placed(found, self.options.bar_window):
            await self.config.assign(bar)
            self.bars[bar.index] = bar
        await self.config.set_command(CommandBits.IO | CommandBits.MEMORY | CommandBits.BUS_MASTER)

    async def reset(self) -> None:
        """DEVICE_RESET with what a VMM does around it: the BARs get their addresses again."""
        await self.client.reset()
        self.config.command = CommandBits(0)
        await self.assign_bars()

    # BARs

    async def read(self, region: int, offset: int, width: int = 4) -> int:
        """Read `width` bytes (1, 2, 4, 8) of a BAR, little-endian."""
        return int(_WIDTHS[width].unpack(await self.client.region_read(region, offset, width))[0])

    async def write(self, region: int, offset: int, value: int, width: int = 4) -> None:
        """Write a BAR: posted to memory, waiting for the reply to I/O ports, as QEMU does."""
        bar = self.bars.get(region)
        posted = bar is not None and not bar.io and self.posts_writes
        await self.client.region_write(region, offset, _WIDTHS[width].pack(value), posted=posted)

    async def map_bar(self, index: int) -> MappedRegion:
        """Map what the server lets us map; the caller closes it. ValueError when that is nothing."""
        return await self.client.map_region(index)

    # MSI and MSI-X

    async def enable_msi(self, vectors: int = 1) -> None:
        """`vectors` (1, 2, 4, ... 32) messages in place of INTx."""
        place = await self.config.find_capability(Capability.MSI)
        await self._swap_intx(self.msi, vectors)
        control = await self.config.read(place + 2, 2) & ~0x71
        count = (vectors.bit_length() - 1) << 4
        await self.config.write(place + 2, control | count | _MSI_ENABLE, 2)

    async def disable_msi(self) -> None:
        place = await self.config.find_capability(Capability.MSI)
        control = await self.config.read(place + 2, 2)
        await self.config.write(place + 2, control & ~_MSI_ENABLE, 2)
        await self.msi.disable()
        await self._enable_intx()

    async def enable_msix(self, vectors: int) -> None:
        """Vectors 0 to `vectors` - 1 in place of INTx."""
        place = await self.config.find_capability(Capability.MSIX)
        control = await self.config.read(place + 2, 2) & ~_MSIX_MASK_ALL
        await self.config.write(place + 2, control | _MSIX_ENABLE | _MSIX_MASK_ALL, 2)
        await self._swap_intx(self.msix, vectors)
        await self.config.write(place + 2, control | _MSIX_ENABLE, 2)

    async def grow_msix(self, vectors: int) -> None:
        """More vectors, as QEMU gets them: disable all, enable again."""
        await self.msix.disable()
        await self.msix.enable(vectors)

    async def disable_msix(self) -> None:
        place = await self.config.find_capability(Capability.MSIX)
        control = await self.config.read(place + 2, 2)
        await self.config.write(place + 2, control & ~_MSIX_ENABLE, 2)
        await self.msix.disable()
        await self._enable_intx()

    async def _swap_intx(self, irqs: Irqs, vectors: int) -> None:
        if self.irqs[PciIrq.INTX].count:
            await self.intx.disable()
        await irqs.enable(vectors)

    # DMA by message

    def dma_read(self, address: int, count: int) -> m.Payload:
        """As QEMU: ENODEV while the guest has not made the device bus master."""
        self._check_bus_master()
        return self.ram.dma_read(address, count)

    def dma_write(self, address: int, data: m.Payload) -> None:
        """To memory, or to the BAR of another device of the VM."""
        self._check_bus_master()
        if self.peers is None or not self.peers.write(address, data):
            self.ram.dma_write(address, data)

    def _check_bus_master(self) -> None:
        if not self.config.bus_master:
            raise DeviceError("the bus master bit is off", errno.ENODEV)

    def close(self) -> None:
        """Close the interrupt receivers; `open_vmm` closes the rest."""
        for irqs in (self.intx, self.msi, self.msix):
            irqs.close()


def _placed(bars: Sequence[Bar], memory_window: int) -> list[Bar]:
    """The BARs with addresses, each a multiple of its size."""
    placed: list[Bar] = []
    following = {True: _IO_WINDOW, False: memory_window}
    for bar in sorted(bars, key=lambda bar: -bar.size):
        address = -(-following[bar.io] // bar.size) * bar.size
        following[bar.io] = address + bar.size
        placed.append(replace(bar, address=address))
    return placed


@contextlib.asynccontextmanager
async def open_vmm(
    server: str | os.PathLike[str] | socket.socket,
    options: VmmOptions = DEFAULT_OPTIONS,
    *,
    ram: GuestRam | None = None,
    start: bool = True,
    step: Callable[[str], None] = lambda _: None,
) -> AsyncIterator[FakeVmm]:
    """A VMM attached to the server at a socket path, or on a connected socket (which it owns then).

    `ram` stays the caller's; without it there is memory as the options say, gone at the end. `start`
    False: only VERSION has been done, `FakeVmm.start` does the rest.
    """
    with contextlib.ExitStack() as stack:
        if ram is None:
            ram = stack.enter_context(GuestRam(shared=options.shared, seals=options.seals))
            ram.add_file(options.memory)
        vmm = FakeVmm(ram, options)
        async with _connected(server, vmm) as client:
            vmm.bind(client)
            stack.callback(vmm.close)
            await client.negotiate(options.version)
            step("VERSION")
            if start:
                await vmm.start(step)
            yield vmm


def _connected(
    server: str | os.PathLike[str] | socket.socket, vmm: FakeVmm
) -> contextlib.AbstractAsyncContextManager[Client]:
    """The connection, not negotiated yet: the server cannot ask for DMA before it is bound."""
    timeout, spin = vmm.options.timeout, vmm.options.spin
    if isinstance(server, socket.socket):
        return open_client_on(server, dma=vmm, version=None, timeout=timeout, spin=spin)
    return open_client(server, dma=vmm, version=None, timeout=timeout, spin=spin)
