# SPDX-License-Identifier: BSD-3-Clause
"""Configuration space and interrupts, saved and restored: what must match, what goes along."""

import struct
from typing import Any

import pytest

from vfio_user.device_models.device import Host, IrqIndex
from vfio_user.device_models.fake_host import FakeHost
from vfio_user.device_models.fake_migration import SavedDevice, restore_device, save_device
from vfio_user.device_models.pci import Bar, Identity, power_management
from vfio_user.device_models.pci_device import PciDevice
from vfio_user.device_models.regions import RamRegion
from vfio_user.device_models.state import StateError

INTX_DISABLE, STATUS_INTERRUPT, MSI_ENABLE, MSIX_ENABLE = 0x400, 0x08, 0x01, 0x8000


class Card(PciDevice):
    model = "card"
    state_version = 1
    identity = Identity(0x1234, 0x0001, 0xFF0000, 3, 0x1AF4, 0x1100)

    def __init__(self, host: Host, *, size: int = 0x2000, io: int = 64, vectors: int = 3) -> None:
        bars = {
            0: Bar(RamRegion(size)),
            1: Bar(RamRegion(io), io=True),
            2: Bar(RamRegion(0x1000), wide=True, prefetchable=True),
        }
        super().__init__(host, bars, msi_vectors=4, msix_vectors=vectors, capabilities=(power_management(),))


class OtherCard(Card):
    identity = Identity(0x1234, 0x0002, 0xFF0000, 3, 0x1AF4, 0x1100)


def make(card: type[Card] = Card, **options: int) -> tuple[FakeHost, Card]:
    host = FakeHost()
    device = card(host, **options)
    host.device = device
    device.reset()
    return host, device


def write(device: Card, offset: int, value: int, size: int = 4) -> None:
    device.config.write(offset, value.to_bytes(size, "little"))


def configured() -> SavedDevice:
    host, device = make()
    write(device, 0x04, 0x0507, 2)
    write(device, 0x10, 0xFEBF_2000)
    write(device, 0x14, 0xC041)
    write(device, 0x18, 0x38_0000_1000, 8)
    write(device, 0x3C, 11, 1)
    return save_device(host, device)


def patched(saved: SavedDevice, offset: int, data: bytes) -> SavedDevice:
    sections: Any = saved.sections
    config = bytearray.fromhex(sections["config"][1]["bytes"])
    config[offset : offset + len(data)] = data
    sections["config"][1]["bytes"] = config.hex()
    return saved.with_sections(sections)


def refused(saved: SavedDevice, **options: int) -> StateError:
    """The reason, from a device that has not changed."""
    host, device = make(**options)  # type: ignore[arg-type]
    before = save_device(host, device)
    with pytest.raises(StateError) as found:
        restore_device(host, device, saved)
    assert save_device(host, device) == before
    return found.value


def test_what_the_guest_has_set_goes_along() -> None:
    host, device = make()
    saved = configured()
    restore_device(host, device, saved)
    assert device.config.read(0x04, 2) == b"\x07\x05"
    assert device.config.read(0x10, 8) == struct.pack("<II", 0xFEBF_2000, 0xC041)
    assert device.config.read(0x18, 8) == struct.pack("<Q", 0x38_0000_100C)
    assert device.config.read(0x3C, 1) == b"\x0b"
    assert host.dma.enabled
    assert save_device(host, device) == saved


def test_a_bar_that_is_being_sized_goes_along() -> None:
    host, device = make()
    write(device, 0x10, 0xFFFF_FFFF)
    saved = save_device(host, device)
    host, device = make()
    restore_device(host, device, saved)
    assert device.config.read(0x10, 4) == struct.pack("<I", 0xFFFF_E000)


@pytest.mark.parametrize(
    ("offset", "data", "text"),
    [
        (0x10, struct.pack("<I", 0xFEBF_3000), "BAR 0: 0xfebf3000 is no address for 8192 bytes"),
        (0x10, struct.pack("<I", 0xFEBF_2004), "BAR 0: "),
        (0x14, struct.pack("<I", 0xC061), "BAR 1: 0xc061 is no address for 64 bytes"),
        (0x14, struct.pack("<I", 0xC040), "BAR 1: "),
        (0x18, struct.pack("<Q", 0x38_0000_180C), "BAR 2: 0x380000180c is no address for 4096 bytes"),
        (0x18, struct.pack("<Q", 0x38_0000_1004), "BAR 2: "),
        (0x00, b"\x86\x80", "the vendor or device id"),
        (0x08, b"\x04", "the revision or class code"),
        (0x0B, b"\x02", "the revision or class code"),
        (0x2C, b"\x00", "the subsystem"),
        (0x34, b"\x48", "a read-only bit"),
        (0x3D, b"\x02", "a read-only bit"),
        (0x40, b"\x05", "a capability"),
        (0x04, b"\x07\xff", "a read-only bit"),
        (0xFF, b"\x01", "a capability"),
    ],
)
def test_what_a_guest_cannot_have_set_is_refused(offset: int, data: bytes, text: str) -> None:
    error = refused(patched(configured(), offset, data))
    assert (error.section, error.field) == ("config", "bytes")
    assert text in error.reason


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": 0x1000}, "BAR 0 has 8192 bytes and flags 0x0 there, 4096 and 0x0 here"),
        ({"size": 0x4000}, "BAR 0 has 8192 bytes"),
        ({"io": 32}, "BAR 1 has 64 bytes and flags 0x1 there, 32 and 0x1 here"),
        ({"vectors": 200}, "BAR 4 has 4096 bytes"),
    ],
)
def test_bars_of_another_size_are_refused_by_number(options: dict[str, int], text: str) -> None:
    error = refused(configured(), **options)
    assert (error.section, error.field) == ("config", "bars")
    assert text in error.reason


def test_bars_that_are_too_many_or_twice_are_refused() -> None:
    for extra in ({"index": 5, "size": 16, "flags": 0}, {"index": 0, "size": 0x2000, "flags": 0}):
        sections: Any = configured().sections
        sections["config"][1]["bars"].append(extra)
        assert "there are 5 BARs, 4 here" in refused(configured().with_sections(sections)).reason


def test_another_device_of_the_same_model_is_refused() -> None:
    host, device = make(OtherCard)
    error = refused(save_device(host, device))
    assert "the vendor or device id is not that of this device" in error.reason


# Interrupts


def test_the_level_is_held_across_and_driven_again() -> None:
    host, device = make()
    device.interrupts.set_level(True)
    saved = save_device(host, device)
    host, device = make()
    restore_device(host, device, saved)
    host.resume()
    assert (host.irq_level, host.irq_rises) == (True, 1)
    assert device.config.read(0x06, 1)[0] & STATUS_INTERRUPT
    device.interrupts.set_level(False)
    assert not host.irq_level


def test_a_level_that_was_low_stays_low_whatever_the_other_device_had() -> None:
    saved = save_device(*make())
    host, device = make()
    device.interrupts.set_level(True)
    restore_device(host, device, saved)
    host.resume()
    assert not host.irq_level
    assert not device.config.read(0x06, 1)[0] & STATUS_INTERRUPT


def test_the_intx_disable_bit_keeps_the_pin_low_but_shows_the_level() -> None:
    host, device = make()
    write(device, 0x04, INTX_DISABLE, 2)
    device.interrupts.set_level(True)
    saved = save_device(host, device)
    host, device = make()
    restore_device(host, device, saved)
    host.resume()
    assert not host.irq_level
    write(device, 0x04, 0, 2)
    assert host.irq_level


def pending(index: IrqIndex, enable: tuple[int, int]) -> SavedDevice:
    """Vector 2 wanted to be delivered and could not."""
    host, device = make()
    place = device.config.capabilities[enable[0]]
    write(device, place + 2, enable[1], 2)
    host.enabled_irqs, host.masked = {index}, {(index, 2)}
    device.interrupts.notify(2)
    device.interrupts.notify(1)
    assert host.fired == [(index, 1)]
    return save_device(host, device)


MESSAGES = pytest.mark.parametrize(
    ("index", "enable"), [(IrqIndex.MSI, (0x05, MSI_ENABLE)), (IrqIndex.MSIX, (0x11, MSIX_ENABLE))]
)


@MESSAGES
@pytest.mark.parametrize("early", [True, False])
def test_a_pending_message_fires_once_whenever_the_client_is_ready(
    index: IrqIndex, enable: tuple[int, int], early: bool
) -> None:
    """The eventfds may come before the state, or after the device runs."""
    saved = pending(index, enable)
    host, device = make()
    if early:
        host.enabled_irqs = {index}
    restore_device(host, device, saved)
    assert host.fired == []  # it does not run yet
    host.resume()
    if not early:
        assert host.fired == []
        host.enabled_irqs = {index}
        host.unmask(index, 2)
    assert host.fired == [(index, 2)]
    host.unmask(index, 2)
    host.stop()
    host.resume()
    assert host.fired == [(index, 2)]


@MESSAGES
def test_a_masked_message_stays_pending_over_several_moves(index: IrqIndex, enable: tuple[int, int]) -> None:
    saved = pending(index, enable)
    for _ in range(3):
        host, device = make()
        host.enabled_irqs, host.masked = {index}, {(index, 2)}
        restore_device(host, device, saved)
        host.resume()
        assert host.fired == []
        assert save_device(host, device) == saved
    assert index is IrqIndex.MSI or device.regions[4].read(2048, 1) == b"\x04"
    host.resume()
    host.unmask(index, 2)
    assert host.fired == [(index, 2)]


def test_the_msix_table_goes_along() -> None:
    host, device = make()
    entry = struct.pack("<QII", 0xFEE0_1000, 0x4055, 0)
    device.regions[4].write(16, entry)
    saved = save_device(host, device)
    host, device = make()
    restore_device(host, device, saved)
    assert device.regions[4].read(0, 48) == bytes(12) + b"\1\0\0\0" + entry + bytes(12) + b"\1\0\0\0"


def test_pending_bits_of_vectors_that_do_not_exist_are_refused() -> None:
    for name, path in (("msi_pending", None), ("msix.pending", "msix")):
        sections: Any = configured().sections
        fields = sections["interrupts"][1]
        (fields[path] if path else fields)[name.rpartition(".")[2]] = "10"
        error = refused(configured().with_sections(sections))
        assert (error.section, error.field) == ("interrupts", name)


def test_a_message_of_a_vector_that_does_not_exist_leaves_a_good_state() -> None:
    host, device = make()
    host.enabled_irqs = {IrqIndex.MSI}
    device.interrupts.notify(77)
    restore_device(*make(), save_device(host, device))
