# SPDX-License-Identifier: BSD-3-Clause
"""What of a configuration space is restored in QEMU, in which order, and what is refused."""

import struct
from typing import Any

import pytest

from vfio_user.client.qemu_migration.capabilities import (
    CAP_MSI,
    CAP_MSIX,
    CAP_POWER,
    CannotRestore,
    Chipset,
    Configuration,
    bar_writes,
    blank_table,
    check,
    command_write,
    interrupt_writes,
    parse_configuration,
    power_writes,
)
from vfio_user.client.qemu_migration.monitor import Function, Write
from vfio_user.client.qemu_migration.view import View, in_full, may_be_placed, places_alike
from vfio_user.device_models import pci
from vfio_user.device_models.device import IrqIndex, RegionIndex
from vfio_user.device_models.fake_host import FakeHost
from vfio_user.device_models.pci_device import PciDevice
from vfio_user.device_models.regions import RamRegion
from vfio_user.server.control_configuration import describe

Q35 = Chipset("pc-q35-11.1-machine")


class Device(PciDevice):
    """A 64-bit BAR 0, ports in BAR 2, the MSI-X table in BAR 3."""

    identity = pci.Identity(0x1234, 0x5678, 0xFF0000)

    def __init__(self, host: Any) -> None:
        bars = {
            0: pci.Bar(RamRegion(0x1000), wide=True, prefetchable=True),
            2: pci.Bar(RamRegion(32), io=True),
        }
        super().__init__(host, bars, msi_vectors=4, msix_vectors=16, capabilities=(pci.power_management(),))


class Lines:
    level = False
    unanswered = False

    def fired_vectors(self, index: IrqIndex) -> int:
        return {IrqIndex.MSI: 0b0011, IrqIndex.MSIX: 0b1110}[index]


@pytest.fixture
def device() -> Device:
    return Device(FakeHost())


def answer(device: Device) -> dict[str, Any]:
    """As the server's control method gives it."""
    lines: Any = Lines()
    found: dict[str, Any] = describe(device, lines)
    return found


def view(device: Device) -> Configuration:
    return parse_configuration(answer(device))


def guest_writes(device: Device, offset: int, data: bytes) -> None:
    device.regions[RegionIndex.CONFIG].write(offset, data)


def place(device: Device, id: int) -> int:
    return device.config.capabilities[id]


def place_bars(device: Device) -> None:
    guest_writes(device, 0x10, struct.pack("<QII", 0x8_FEBF_F000, 0xC040, 0xFEBF_D000))


def test_after_a_reset_there_is_nothing_to_write(device: Device) -> None:
    found = view(device)
    assert bar_writes(found) + interrupt_writes(found) + power_writes(found) == []
    assert check(answer(device), Q35) == []


def test_bars_are_written_as_the_guest_has_them(device: Device) -> None:
    place_bars(device)
    assert bar_writes(view(device)) == [
        Write(0x10, 4, 0xFEBF_F00C),
        Write(0x14, 4, 8),
        Write(0x18, 4, 0xC041),
        Write(0x1C, 4, 0xFEBF_D000),
    ]
    guest_writes(device, 0x10, struct.pack("<Q", 0xFEBF_F000))
    assert Write(0x14, 4, 0) not in bar_writes(view(device))


def test_everything_is_written_when_a_reset_is_not_known(device: Device) -> None:
    place_bars(device)
    unknown = parse_configuration(answer(device) | {"power_on": None})
    assert [write.offset for write in bar_writes(unknown)] == [0x10, 0x14, 0x18, 0x1C]
    assert len(interrupt_writes(unknown)) == 5
    assert check(answer(device) | {"power_on": None}, Q35) == []


def test_msi_is_enabled_when_its_address_and_data_are_there(device: Device) -> None:
    msi = place(device, CAP_MSI)
    guest_writes(device, msi + 4, struct.pack("<IIH", 0xFEE0_0000, 1, 0x4041))
    guest_writes(device, msi + 2, b"\x21\x00")
    assert interrupt_writes(view(device)) == [
        Write(msi + 4, 4, 0xFEE0_0000),
        Write(msi + 8, 4, 1),
        Write(msi + 12, 2, 0x4041),
        Write(msi + 2, 2, 0x00A5),
    ]


@pytest.mark.parametrize(
    ("control", "places"),
    [(0x001, [(4, 4), (8, 2), (2, 2)]), (0x101, [(4, 4), (8, 2), (12, 4), (2, 2)]),
     (0x181, [(4, 4), (8, 4), (12, 2), (16, 4), (2, 2)])],
)  # fmt: skip
def test_the_shapes_of_msi(control: int, places: list[tuple[int, int]]) -> None:
    space = bytearray(256)
    space[6], space[0x34], space[0x40] = 0x10, 0x40, CAP_MSI
    struct.pack_into("<H", space, 0x42, control)
    found = interrupt_writes(Configuration(bytes(space), None, ()))
    assert [(write.offset - 0x40, write.width) for write in found] == places


def test_msix_control_and_the_command_register_are_written_alone(device: Device) -> None:
    msix = place(device, CAP_MSIX)
    guest_writes(device, msix + 2, b"\x00\xc0")
    assert interrupt_writes(view(device)) == [Write(msix + 2, 2, 0xC00F)]
    assert command_write(0x0407) == Write(4, 2, 0x0407)


def test_a_sleeping_device_is_put_to_sleep_again(device: Device) -> None:
    power = place(device, CAP_POWER)
    guest_writes(device, power + 4, b"\x03\x00")
    assert view(device).sleeps
    assert power_writes(view(device)) == [Write(power + 4, 2, 3)]
    assert check(answer(device), Q35) == []


def test_an_option_rom() -> None:
    space = bytearray(256)
    struct.pack_into("<I", space, 0x30, 0xFEB8_0001)
    found = Configuration(bytes(space), bytes(256), (), rom_size=0x10000)
    assert bar_writes(found) == [Write(0x30, 4, 0xFEB8_0001)]
    assert bar_writes(Configuration(bytes(space), bytes(256), ())) == []


def test_a_table_after_a_reset() -> None:
    assert blank_table(32) == (bytes(12) + b"\x01\0\0\0") * 2


def changed(found: dict[str, Any], **changes: bytes) -> dict[str, Any]:
    """The answer with other bytes at OFFSETS ("x10" for 0x10)."""
    space = bytearray.fromhex(found["space"])
    for name, data in changes.items():
        offset = int(name[1:], 16)
        space[offset : offset + len(data)] = data
    return found | {"space": space.hex()}


def refused(found: dict[str, Any], chipset: Chipset = Q35) -> str:
    (reason,) = check(found, chipset)
    return reason


def test_what_makes_no_sense_is_refused(device: Device) -> None:
    good = answer(device)
    assert "BAR 3 has 0x80, which is no address for 4096" in refused(changed(good, x1c=b"\x80"))
    assert "BAR 2 has 0x40, which is no address" in refused(changed(good, x18=b"\x40"))
    assert "BAR 2 is at port 0x10000" in refused(changed(good, x18=b"\x01\0\x01\0"))
    assert "type 1" in refused(changed(good, x0e=b"\x81"))
    assert "no end" in refused(changed(good, x41=b"\x40"))
    assert "has 252 bytes, and 256" in refused(good | {"space": good["space"][:-8]})
    assert "makes no sense" in refused(good | {"bars": [good["bars"][0] | {"index": 5}, *good["bars"][1:]]})
    assert "does not tell" in refused(good | {"space": None})
    assert "does not tell" in refused({})
    rom = changed(good | {"rom_size": 4096}, x30=b"\x01\x08")
    assert "the option ROM's BAR has 0x801" in refused(rom)
    assert check(changed(good, x0e=b"\x80"), Q35) == []  # one of several functions


def test_a_table_that_is_nowhere_is_refused(device: Device) -> None:
    good = answer(device)
    msix = good["msix"]
    for table in ({"bar": 5, "offset": 0}, {"bar": 2, "offset": 0}, {"bar": 3, "offset": 0xFF8}):
        assert "is not within BAR" in refused(good | {"msix": msix | {"table": table}})
    assert "does not tell where the table is" in refused(good | {"msix": None})
    power = place(device, CAP_POWER)
    sleeping = changed(good, **{f"x{power + 4:x}": b"\x0b"})
    assert "out of reach meanwhile" in refused(sleeping)


def test_both_kinds_of_messages_at_once_are_refused(device: Device) -> None:
    both = {f"x{place(device, id) + 2:x}": data for id, data in ((CAP_MSI, b"\x85"), (CAP_MSIX, b"\x0f\x80"))}
    assert "no meaning" in refused(changed(answer(device), **both))


def test_machines(device: Device) -> None:
    assert check(answer(device), Chipset("pc-i440fx-11.1-machine")) == []
    assert "neither i440fx nor q35" in refused(answer(device), Chipset("microvm-machine"))
    assert "intel-iommu" in refused(answer(device), Chipset("pc-q35-11.1-machine", "intel-iommu"))
    without = answer(device) | {"msix": None}
    msix = place(device, CAP_MSIX)
    without = changed(without, **{f"x{msix:x}": b"\x09"})
    assert check(without, Chipset("pc-q35-11.1-machine", "intel-iommu")) == []


def test_a_chain_that_loops_is_no_endless_loop() -> None:
    space = bytearray(256)
    space[6], space[0x34], space[0x41] = 0x10, 0x40, 0x40
    with pytest.raises(CannotRestore, match="no end"):
        Configuration(bytes(space), None, ()).capability(CAP_MSI)


@pytest.mark.parametrize(("control", "masked"), [(0x00, ()), (0x80, (1,)), (0xC0, (0, 1)), (0x40, ())])
def test_vectors_that_may_hold_a_message_back(device: Device, control: int, masked: tuple[int, ...]) -> None:
    guest_writes(device, place(device, CAP_MSIX) + 3, bytes([control]))
    entries = [(0xFEE0_0000, 0x4041, 0), (0xFEE0_0000, 0x4042, 1), (0, 0, 1)]
    table = b"".join(struct.pack("<QII", *entry) for entry in entries)
    assert View(Function(0, 4, 0), view(device), {}, table, 0).masked == masked
    assert View(Function(0, 4, 0), view(device), {}, None, 0).masked == ()


def test_a_vector_that_is_masked_and_has_been_fired_is_owed(device: Device) -> None:
    guest_writes(device, place(device, CAP_MSIX) + 3, b"\x80")
    table = b"".join(struct.pack("<QII", 0xFEE0_0000, 0x4041, masked) for masked in (1, 1, 0, 1))
    owed = View(Function(0, 4, 0), view(device), {}, table, 0).owed
    assert owed == {IrqIndex.MSI: 0, IrqIndex.MSIX: 0b1010}


@pytest.mark.parametrize(
    ("control", "place", "owed"),
    [(0x181, 0x50, 2), (0x101, 0x4C, 2), (0x180, 0x50, 0), (0x081, 0x50, 0)],
)
def test_msi_with_masks_owes_as_well(control: int, place: int, owed: int) -> None:
    space = bytearray(256)
    space[6], space[0x34], space[0x40] = 0x10, 0x40, CAP_MSI
    struct.pack_into("<H", space, 0x42, control)
    struct.pack_into("<I", space, place, 0x8000_0006)
    found = Configuration(bytes(space), None, (), fired={IrqIndex.MSI: 0b0011})
    assert View(Function(0, 4, 0), found, {}, None, 0).owed == {IrqIndex.MSI: owed, IrqIndex.MSIX: 0}


def at(device: Device, bus: int = 0) -> View:
    return View(Function(bus, 4, 0), view(device), {}, None, 0)


def test_what_may_be_placed_before_qemus_own_devices_come(device: Device) -> None:
    place_bars(device)
    assert may_be_placed(at(device))
    assert not may_be_placed(at(device, bus=1))
    guest_writes(device, place(device, CAP_MSIX) + 3, b"\x80")
    assert not may_be_placed(at(device))


def test_what_the_guest_has_changed_since_is_written_in_full(device: Device) -> None:
    place_bars(device)
    guest_writes(device, 4, b"\x07\x00")
    early = at(device)
    assert places_alike(early, at(device))
    guest_writes(device, 4, b"\x00\x00")
    late = at(device)
    assert not places_alike(early, late)
    assert not may_be_placed(in_full(late))  # by `restore`: interrupts are not left as they may be
    written = {write.offset for write in bar_writes(in_full(late).configuration)}
    assert written >= {bar.offset for bar in late.configuration.bars}
    assert in_full(late).configuration.changed(4, 2)
