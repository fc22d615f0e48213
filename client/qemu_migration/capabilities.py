# SPDX-License-Identifier: BSD-3-Clause
"""What QEMU keeps of a device's configuration space itself, and the writes that bring it back. Pure.

QEMU forwards every write to the server and reads most registers from there: they come with the device's
state, vendor's capabilities and the extended space among them. What it keeps besides, and does not move, is
what its own work hangs on: where the BARs and the option ROM are mapped, the command register, the power
state, MSI, and MSI-X with its table. A device that was reset has power-on values there, so that only what
differs from them is written.
"""

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vfio_user.client.qemu_migration.monitor import Write
from vfio_user.device_models.device import IrqIndex

COMMAND, STATUS, HEADER_TYPE, BAR0, ROM_BAR, CAPABILITIES = 0x04, 0x06, 0x0E, 0x10, 0x30, 0x34
COMMAND_MEMORY, COMMAND_BUS_MASTER = 1 << 1, 1 << 2
STATUS_CAPABILITIES = 1 << 4
ROM_ENABLE = 1
CAP_POWER, CAP_MSI, CAP_MSIX = 0x01, 0x05, 0x11
MSI_ENABLE, MSI_WIDE, MSI_MASKABLE = 1, 1 << 7, 1 << 8
MSIX_ENABLE, MSIX_MASK_ALL = 1 << 15, 1 << 14
POWER_STATE, NO_SOFT_RESET, PME_STATUS = 0x0003, 1 << 3, 1 << 15
TABLE_ENTRY = 16
"""Bytes of an entry of an MSI-X table (PCI Local Bus 3.0, 6.8.2)."""


class CannotRestore(Exception):
    """QEMU's view of the device cannot be restored; `reasons` has all that is known."""

    def __init__(self, *reasons: str) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


@dataclass(frozen=True, slots=True)
class Chipset:
    """`machine`: QEMU's type of the machine; `iommu`: type of the guest's IOMMU, empty without one."""

    machine: str
    iommu: str = ""


@dataclass(frozen=True, slots=True)
class BarShape:
    """A base address register: `size` in bytes; `wide`: 64 bits, with the next one."""

    index: int
    size: int
    io: bool
    wide: bool
    prefetchable: bool

    @property
    def offset(self) -> int:
        return BAR0 + 4 * self.index

    @property
    def flags(self) -> int:
        return 1 if self.io else self.wide << 2 | self.prefetchable << 3


@dataclass(frozen=True, slots=True)
class Configuration:
    """The control method `configuration`: what the guest reads, the same after a reset (None: the model does
    not tell), the BARs' shapes.

    `table` is BAR, offset and size in bytes of the MSI-X table, if there is one. `fired` has masks of the
    message vectors that have been fired at this QEMU.
    """

    space: bytes
    power_on: bytes | None
    bars: tuple[BarShape, ...]
    rom_size: int = 0
    table: tuple[int, int, int] | None = None
    fired: Mapping[IrqIndex, int] = field(default_factory=dict)

    def word(self, offset: int) -> int:
        """16 bits at an offset."""
        return int.from_bytes(self.space[offset : offset + 2], "little")

    @property
    def command(self) -> int:
        return self.word(COMMAND)

    def capability(self, id: int) -> int | None:
        """Offset of the first capability of an id."""
        return next((place for found, place in self._chain() if found == id), None)

    def _chain(self) -> Iterator[tuple[int, int]]:
        place = self.space[CAPABILITIES] & 0xFC if self.word(STATUS) & STATUS_CAPABILITIES else 0
        for _ in range(48):  # so many fit; a loop would have more
            if place < 0x40:
                return
            yield self.space[place], place
            place = self.space[place + 1] & 0xFC
        raise CannotRestore("its chain of capabilities has no end")

    def control(self, id: int, offset: int = 2) -> int:
        """A capability's 16 bits at `offset`; 0 without that capability."""
        place = self.capability(id)
        return 0 if place is None else self.word(place + offset)

    def bar_value(self, bar: BarShape) -> int:
        return int.from_bytes(self.space[bar.offset : bar.offset + 4 + 4 * bar.wide], "little")

    def bar_address(self, bar: BarShape) -> int:
        """0 where the guest has given none."""
        return self.bar_value(bar) & -bar.size

    def changed(self, offset: int, width: int) -> bool:
        """A register differs from what a reset leaves, as far as is known."""
        if self.power_on is None:
            return True
        return self.space[offset : offset + width] != self.power_on[offset : offset + width]

    @property
    def masked_msi(self) -> int:
        """A mask of the vectors of enabled MSI that the guest has masked (PCI Local Bus 3.0, 6.8.1)."""
        place, control = self.capability(CAP_MSI), self.control(CAP_MSI)
        if place is None or not control & MSI_ENABLE or not control & MSI_MASKABLE:
            return 0
        bits = place + (16 if control & MSI_WIDE else 12)
        return self.word(bits) | self.word(bits + 2) << 16

    @property
    def sleeps(self) -> bool:
        """Not in D0: QEMU maps none of its BARs."""
        return bool(self.control(CAP_POWER, 4) & POWER_STATE)


def parse_configuration(answer: Mapping[str, Any]) -> Configuration:
    """From the control socket. CannotRestore when the server could not tell what is needed."""
    try:
        bars = tuple(
            BarShape(bar["index"], bar["size"], bar["io"], bar["wide"], bar["prefetchable"])
            for bar in answer["bars"]
        )
        power_on = None if answer["power_on"] is None else bytes.fromhex(answer["power_on"])
        space, table = bytes.fromhex(answer["space"]), _table(answer["msix"])
        fired = {index: _fired(answer[name]) for index, name in _MESSAGES.items()}
        return Configuration(space, power_on, bars, answer["rom_size"] or 0, table, fired)
    except (KeyError, TypeError, ValueError) as error:
        raise CannotRestore(f"its server does not tell the configuration space ({error!r})") from error


_MESSAGES = {IrqIndex.MSI: "msi", IrqIndex.MSIX: "msix"}


def _fired(capability: Mapping[str, Any] | None) -> int:
    return 0 if capability is None else int.from_bytes(bytes.fromhex(capability["fired"]), "little")


def _table(msix: Mapping[str, Any] | None) -> tuple[int, int, int] | None:
    if msix is None:
        return None
    return msix["table"]["bar"], msix["table"]["offset"], msix["vectors"] * TABLE_ENTRY


# What cannot be restored


def check(configuration: Mapping[str, Any], chipset: Chipset) -> list[str]:
    """Why QEMU's view of a device cannot be restored; empty when it can be.

    `configuration` is the answer of the control method of that name, `chipset` from `view.ask_chipset`. To be
    asked before anything is stopped; `view.take_view` looks once more, as the guest goes on meanwhile.
    """
    reasons = list(_check_chipset(chipset, configuration.get("msix") is not None))
    try:
        return reasons + reasons_against(parse_configuration(configuration))
    except CannotRestore as error:
        return [*reasons, *error.reasons]


def reasons_against(configuration: Configuration) -> list[str]:
    """Why this state of a configuration space cannot be restored. CannotRestore: it makes no sense at all."""
    if reasons := list(_check_shape(configuration)):
        return reasons
    return [reason for test in _CHECKS for reason in test(configuration)]


def _check_chipset(chipset: Chipset, msix: bool) -> Iterator[str]:
    if not chipset.machine.startswith(("pc-i440fx", "pc-q35")):
        yield f"the machine {chipset.machine} is neither i440fx nor q35: there is no way to its registers"
    if chipset.iommu and msix:
        yield (
            f"the guest has an IOMMU ({chipset.iommu}), which the device's writes go through: "
            "the MSI-X table is out of reach"
        )


def _check_shape(configuration: Configuration) -> Iterator[str]:
    size, before = len(configuration.space), len(configuration.power_on or configuration.space)
    if size not in (256, 4096) or size != before:
        yield f"its configuration space has {size} bytes, and {before} after a reset"
    elif kind := configuration.space[HEADER_TYPE] & 0x7F:
        yield f"its header is of type {kind}, not that of a device"


def _check_bars(configuration: Configuration) -> Iterator[str]:
    for bar in configuration.bars:
        if not 0 <= bar.index <= 5 - bar.wide or bar.size <= 0 or bar.size & bar.size - 1:
            yield f"BAR {bar.index} with {bar.size} bytes makes no sense"
            continue
        value = configuration.bar_value(bar)
        if value & bar.size - 1 != bar.flags:
            yield f"BAR {bar.index} has {value:#x}, which is no address for {bar.size} bytes of its kind"
        elif bar.io and value >> 16:
            yield f"BAR {bar.index} is at port {value & ~3:#x}, and there are 65536"


def _check_rom(configuration: Configuration) -> Iterator[str]:
    (value,) = struct.unpack_from("<I", configuration.space, ROM_BAR)
    if configuration.rom_size and value & ~ROM_ENABLE & max(configuration.rom_size, 2048) - 1:
        yield f"the option ROM's BAR has {value:#x}, which is no address for {configuration.rom_size} bytes"


def _check_interrupts(configuration: Configuration) -> Iterator[str]:
    if configuration.control(CAP_MSI) & MSI_ENABLE and configuration.control(CAP_MSIX) & MSIX_ENABLE:
        yield "both MSI and MSI-X are enabled, which has no meaning"


def _check_table(configuration: Configuration) -> Iterator[str]:
    if configuration.table is None:
        if configuration.capability(CAP_MSIX) is not None:
            yield "it has MSI-X, and its server does not tell where the table is"
        return
    index, offset, size = configuration.table
    if not any(bar.index == index and not bar.io and offset + size <= bar.size for bar in configuration.bars):
        yield f"its MSI-X table ({size} bytes at {offset:#x}) is not within BAR {index}"
    elif configuration.sleeps and configuration.control(CAP_POWER, 4) & NO_SOFT_RESET:
        yield "it sleeps (D3hot) and keeps its MSI-X table over that, which is out of reach meanwhile"


_CHECKS: tuple[Callable[[Configuration], Iterator[str]], ...] = (
    _check_bars,
    _check_rom,
    _check_interrupts,
    _check_table,
)


# The writes


def bar_writes(configuration: Configuration) -> list[Write]:
    """Base addresses, the option ROM's too."""
    places = [bar.offset + 4 * half for bar in configuration.bars for half in range(1 + bar.wide)]
    places += [ROM_BAR] if configuration.rom_size else []
    return [_write(configuration, place, 4) for place in places if configuration.changed(place, 4)]


def interrupt_writes(configuration: Configuration) -> list[Write]:
    """MSI's address, data and mask before its control; MSI-X's control, for which the table must be there."""
    places = [*_msi_places(configuration), *_control_place(configuration, CAP_MSIX)]
    return [_write(configuration, *place) for place in places if configuration.changed(*place)]


def _msi_places(configuration: Configuration) -> list[tuple[int, int]]:
    """Offset and width of MSI's registers in order (PCI Local Bus 3.0, 6.8.1)."""
    place, control = configuration.capability(CAP_MSI), configuration.control(CAP_MSI)
    if place is None:
        return []
    wide = bool(control & MSI_WIDE)
    data = place + (12 if wide else 8)
    places = [(place + 4, 4), *([(place + 8, 4)] if wide else []), (data, 2)]
    return [*places, *([(data + 4, 4)] if control & MSI_MASKABLE else []), (place + 2, 2)]


def _control_place(configuration: Configuration, id: int) -> list[tuple[int, int]]:
    place = configuration.capability(id)
    return [] if place is None else [(place + 2, 2)]


def command_write(command: int) -> Write:
    """The command register alone: its neighbour, the status register, has bits that a written 1 clears."""
    return Write(COMMAND, 2, command)


def power_writes(configuration: Configuration) -> list[Write]:
    """The power state, after all else: QEMU maps no BAR of a device that sleeps."""
    place = configuration.capability(CAP_POWER)
    if place is None or not configuration.sleeps:
        return []
    return [Write(place + 4, 2, configuration.word(place + 4) & ~PME_STATUS)]


def _write(configuration: Configuration, offset: int, width: int) -> Write:
    return Write(offset, width, int.from_bytes(configuration.space[offset : offset + width], "little"))


def blank_table(size: int) -> bytes:
    """An MSI-X table after a reset: every vector masked."""
    return struct.pack("<QII", 0, 0, 1) * (size // TABLE_ENTRY)
