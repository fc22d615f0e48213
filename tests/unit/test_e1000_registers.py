# SPDX-License-Identifier: BSD-3-Clause
"""The register table, and the register test of Linux' driver (`ethtool -t`, test 1) step by step."""

import pytest

from vfio_user.device_models.device import RegionIndex
from vfio_user.device_models.e1000.bench import Bench
from vfio_user.device_models.e1000.device import E1000, REGISTERS

PATTERNS = (0x5A5A5A5A, 0xA5A5A5A5, 0x00000000, 0xFFFFFFFF)
ALL = 0xFFFFFFFF
BEFORE_INIT = (  # register, mask that must read back, bits that are written; in the driver's order
    ("FCAL", ALL, ALL),
    ("FCAH", 0x0000FFFF, ALL),
    ("FCT", 0x0000FFFF, ALL),
    ("VET", 0x0000FFFF, ALL),
    ("RDTR", 0x0000FFFF, ALL),
    ("RDBAH", ALL, ALL),
    ("RDLEN", 0x000FFF80, 0x000FFFFF),
    ("RDH", 0x0000FFFF, 0x0000FFFF),
    ("RDT", 0x0000FFFF, 0x0000FFFF),
    ("FCRTH", 0x0000FFF8, 0x0000FFF8),
    ("FCTTV", 0x0000FFFF, 0x0000FFFF),
    ("TIPG", 0x3FFFFFFF, 0x3FFFFFFF),
    ("TDBAH", ALL, ALL),
    ("TDLEN", 0x000FFF80, 0x000FFFFF),
)
AFTER_INIT = (
    ("RDBAL", 0xFFFFFFF0, ALL),
    ("TXCW", 0xC000FFFF, 0x0000FFFF),
    ("TDBAL", 0xFFFFFFF0, ALL),
    ("TIDV", 0x0000FFFF, 0x0000FFFF),
)
RCTL_BITS = 0x06DFB3FE


def pattern_test(bench: Bench, name: str, mask: int, written: int, index: int = 0) -> None:
    for pattern in PATTERNS:
        bench.write(name, written & pattern, index)
        assert bench.read(name, index) == written & pattern & mask, f"{name}[{index}] {pattern:#x}"


def set_and_check(bench: Bench, name: str, mask: int, written: int) -> None:
    bench.write(name, written & mask)
    assert bench.read(name) & mask == written & mask, f"{name} {written:#x}"


@pytest.mark.parametrize("mapped", [True, False])
def test_the_drivers_register_test(mapped: bool) -> None:
    """With frames arriving all the time, which must not do any DMA into the nonsense that is written."""
    bench = Bench(mapped=mapped)
    bench.link_up()
    before = bench.read("STATUS") & 0xFFFFF833
    bench.write("STATUS", 0xFFFFF833)
    assert bench.read("STATUS") & 0xFFFFF833 == before
    for name, mask, written in BEFORE_INIT:
        pattern_test(bench, name, mask, written)
    set_and_check(bench, "RCTL", ALL, 0)
    for value in (0x003FFFFB, ALL):
        set_and_check(bench, "RCTL", RCTL_BITS, value)
        bench.deliver(b"\xff" * 60, b"\x52\x54\x00\x12\x34\x56" + bytes(54))
    set_and_check(bench, "TCTL", ALL, 0)
    for name, mask, written in AFTER_INIT:
        pattern_test(bench, name, mask, written)
        bench.deliver(b"\xff" * 60)
    for index in range(15):
        pattern_test(bench, "RAH", 0x8003FFFF, ALL, index)
    for index in range(128):
        pattern_test(bench, "MTA", ALL, ALL, index)
    assert bench.host.dma.bytes_written == 0
    assert bench.port.frames == []
    bench.reset_by_window()
    bench.start()
    assert bench.deliver(b"\xff" * 60)
    assert len(bench.received()) == 1


def test_the_places_that_the_driver_uses() -> None:
    bench = Bench()
    expected = {"FCAL": 0x28, "FCRTH": 0x2168, "RDTR": 0x2820, "TDT": 0x3818, "MTA": 0x5200, "ICR": 0xC0}
    assert {name: bench.offset(name) for name in expected} == expected
    assert [bench.offset("RAH", index) for index in range(3)] == [0x5404, 0x540C, 0x5414]


def test_every_register_says_what_it_is_and_fields_do_not_overlap() -> None:
    for row in REGISTERS:
        assert row.text
        taken = 0
        for field in row.fields:
            bits = ((1 << field.bits) - 1) << field.shift
            assert not bits & taken, f"{row.name}.{field.name}"
            assert bits < 1 << 32
            taken |= bits


def test_identity_and_bars() -> None:
    config = Bench().device.regions[RegionIndex.CONFIG]
    assert config.read(0, 4) == b"\x86\x80\x0e\x10"
    assert config.read(0x3D, 1) == b"\x01"
    for offset, size_mask in ((0x10, 0xFFFE0000), (0x18, 0xFFFFFFC1), (0x14, 0)):
        config.write(offset, b"\xff" * 4)
        assert int.from_bytes(config.read(offset, 4), "little") == size_mask


def test_reset_through_the_io_window() -> None:
    bench = Bench(mac=b"\x02\x03\x04\x05\x06\x07")
    bench.start()
    bench.transmit([b"\xff" * 60])
    bench.write("IMS", ALL)
    bench.write("RAL", 0x11111111)
    bench.write_phy(4, 0x0061)
    config = bench.device.config.read(4, 2)
    bench.reset_by_window()
    assert bench.read("CTRL") & 1 << 26 == 0
    zero = ("RCTL", "TCTL", "TDH", "TDT", "TDLEN", "RDBAL", "ICR", "IMS", "GPTC", "TOTL")
    assert {name: bench.read(name) for name in zero} == dict.fromkeys(zero, 0)
    assert (bench.read("RAL"), bench.read("RAH")) == (0x05040302, 0x80000706)
    assert bench.read_phy(4) == 0x0061
    assert bench.read("STATUS") & 2
    assert bench.device.config.read(4, 2) == config
    assert not bench.host.irq_level


def test_the_io_window_reads_and_is_bounded() -> None:
    bench = Bench()
    window = bench.device.regions[2]
    window.write(0, (0x5400).to_bytes(4, "little"))
    assert window.read(4, 4) == b"\x52\x54\x00\x12"
    for offset in (0x1FFFD, 0x20000, ALL):
        window.write(0, offset.to_bytes(4, "little"))
        window.write(4, b"\xff" * 4)
        assert window.read(4, 4) == bytes(4)
    assert bench.device.regions[2].size == 64


def test_a_reset_through_the_second_control_register_and_by_a_function_reset() -> None:
    bench = Bench()
    bench.start()
    bench.write("CTRL_DUP", 1 << 26)
    assert bench.read("RCTL") == 0
    bench.start()
    bench.host.reset()
    bench.device.reset()
    assert (bench.read("RCTL"), bench.read("ICR"), bench.read("STATUS") & 2) == (0, 0, 0)
    bench.device.config.write(4, b"\x07\x00")
    bench.start()
    assert bench.read("STATUS") & 2


def test_packet_buffer_allocation_gives_transmit_the_rest() -> None:
    bench = Bench()
    assert bench.read("PBA") == 0x00100030
    bench.write("PBA", 0x28)
    assert bench.read("PBA") == 0x00180028


def test_eeprom_reload_restores_the_address_only() -> None:
    bench = Bench()
    bench.write("RAL", 0)
    bench.write("VET", 0x1234)
    bench.write("CTRL_EXT", 1 << 13)
    assert (bench.read("RAL"), bench.read("VET"), bench.read("CTRL_EXT")) == (0x12005452, 0x1234, 0)


def test_partial_and_unaligned_accesses() -> None:
    bench = Bench()
    bar = bench.device.regions[0]
    bar.write(bench.offset("FCAL") + 1, b"\xab\xcd")
    assert bench.read("FCAL") == 0x00CDAB00
    assert bar.read(bench.offset("RAL"), 8) == bytes.fromhex("5254001234560080")


@pytest.mark.parametrize("name", [row.name for row in REGISTERS])
def test_no_write_to_a_register_raises(name: str) -> None:
    bench = Bench()
    for value in (*PATTERNS, 1, 1 << 31):
        for index in (0, len(bench.device.registers.array(name)) - 1):
            bench.write(name, value, index)
            bench.advance(1000)
            assert 0 <= bench.read(name, index) <= ALL


def test_counters_are_named() -> None:
    assert set(Bench().device.counters()) >= {"interrupts", "dma_errors", "received_dropped"}
    assert isinstance(Bench().device, E1000)
