# SPDX-License-Identifier: BSD-3-Clause
"""Loopback of MAC and PHY; test 4 of `ethtool -t` with the driver's writes and counts."""

import struct

import pytest

from vfio_user.device_models.e1000.bench import EOP, IFCS, RX_DATA, RX_RING, TX_DATA, TX_RING, Bench
from vfio_user.device_models.e1000.bits import Cause, Rctl
from vfio_user.device_models.e1000.descriptors import RECEIVE

DESCRIPTORS, ROUNDS, EACH = 256, 10, 64
MILLISECOND = 1_000_000
MODES = pytest.mark.parametrize("mapped", [True, False])


def test_frame() -> bytes:
    frame = bytearray(b"\xff" * 512 + b"\xaa" * 511 + b"\xff")
    frame[522], frame[524] = 0xBE, 0xAF
    return bytes(frame)


LOOPED = test_frame()
del test_frame


def set_up_rings(bench: Bench) -> None:
    """e1000_setup_desc_rings; bit 28 of the commands is RPS."""
    for name, value in (("BAL", TX_RING), ("BAH", 0), ("LEN", DESCRIPTORS * 16), ("H", 0), ("T", 0)):
        bench.write("TD" + name, value)
    bench.write("TCTL", 0x0003F0FA)
    for index in range(DESCRIPTORS):
        place = TX_DATA + index * 1024
        bench.memory[place : place + 1024] = LOOPED
        struct.pack_into("<QII", bench.memory, TX_RING + index * 16, place, 1024 | EOP | IFCS | 1 << 28, 0)
    bench.write("RCTL", bench.read("RCTL") & ~Rctl.EN)
    for name, value in (("BAL", RX_RING), ("BAH", 0), ("LEN", DESCRIPTORS * 16), ("H", 0), ("T", 0)):
        bench.write("RD" + name, value)
    bench.write("RCTL", Rctl.EN | Rctl.BAM)
    for index in range(DESCRIPTORS):
        RECEIVE.pack_into(bench.memory, RX_RING + index * 16, RX_DATA + index * 2048, 0, 0, 0, 0, 0)


def set_up_phy_loopback(bench: Bench) -> None:
    """e1000_integrated_phy_loopback for the M88 PHY."""
    bench.write_phy(16, 0x0808)
    for value in (0x9140, 0x8140, 0x4140):
        bench.write_phy(0, value)
    bench.write("CTRL", bench.read("CTRL") & ~0x300 | 0x800 | 0x1000 | 0x200 | 1 | 0x80)
    for number, value in ((29, 0x001F), (30, 0x8FFC), (29, 0x001A), (30, 0x8FF0)):
        bench.write_phy(number, value)


def is_good(bench: Bench, index: int) -> bool:
    """e1000_check_lbtest_frame."""
    place = RX_DATA + index * 2048
    return (bench.memory[place + 3], bench.memory[place + 522], bench.memory[place + 524]) == (
        0xFF,
        0xBE,
        0xAF,
    )


@MODES
@pytest.mark.parametrize("cable", [True, False])
def test_the_drivers_loopback_test(mapped: bool, cable: bool) -> None:
    bench = Bench(mapped=mapped)
    if cable:
        bench.link_up()
    bench.port.set_link(cable)
    set_up_rings(bench)
    set_up_phy_loopback(bench)
    bench.port.frames.clear()
    bench.write("RDT", DESCRIPTORS - 1)
    tail = seen = 0
    for _ in range(ROUNDS):
        tail = (tail + EACH) % DESCRIPTORS
        bench.write("TDT", tail)
        bench.deliver(b"\xff" * 60)
        bench.advance(200 * MILLISECOND)
        good = 0
        for _ in range(DESCRIPTORS):  # the driver looks for 64 good ones from where it stopped
            good += is_good(bench, seen)
            seen = (seen + 1) % DESCRIPTORS
            if good == EACH:
                break
        assert good == EACH
    assert bench.port.frames == []
    assert bench.read("RDH") == DESCRIPTORS - 1
    assert [bench.read(name) for name in ("GPTC", "GPRC", "MPC")] == [640, 255, 385]
    assert bench.read("ICR") & Cause.RXO
    assert not bench.device.mac.buffer.frames
    bench.write("RDT", 100)
    bench.run()
    assert bench.read("RDH") == DESCRIPTORS - 1  # nothing is delivered later
    clean_up(bench)


def clean_up(bench: Bench) -> None:
    """e1000_loopback_cleanup and the reset after it: the link is back, and the wire."""
    bench.write("RCTL", bench.read("RCTL") & ~Rctl.LBM)
    bench.write_phy(0, (bench.read_phy(0) or 0) & ~0x4000)
    bench.write_phy(0, (bench.read_phy(0) or 0) | 0x8000)
    bench.reset_by_window()
    bench.port.set_link(True)
    bench.write_phy(0, 0x1340)
    bench.start()
    bench.transmit([b"\xff" * 60])
    assert bench.port.frames == [b"\xff" * 60]
    assert bench.received() == []


@MODES
@pytest.mark.parametrize("mode", [Rctl.LBM_MAC, Rctl.LBM])
def test_mac_loopback(mapped: bool, mode: int) -> None:
    bench = Bench(mapped=mapped)
    bench.start(rctl=mode | Rctl.BAM)
    bench.port.set_link(False)
    frame = b"\xff" * 6 + bytes(54)
    bench.transmit([frame, b"\x02" + frame[1:], frame])
    assert bench.received() == [frame, frame]
    assert bench.port.frames == []
    bench.port.set_link(True)
    bench.link_up()
    bench.write("RCTL", Rctl.EN | Rctl.BAM)
    bench.transmit([frame])
    assert (bench.port.frames, bench.received()) == ([frame], [])


@MODES
def test_more_than_the_packet_buffer_holds_is_held_back_not_lost(mapped: bool) -> None:
    """The transmitter waits for the receiver, as long as there are descriptors."""
    bench = Bench(mapped=mapped, memory=8 << 20)
    bench.start(tx=256, rx=256, rctl=Rctl.LBM_MAC | Rctl.BAM)
    frames = [b"\xff" * 6 + struct.pack(">HH", 0, number) + bytes(1400) for number in range(250)]
    for frame in frames:
        bench.put_data(frame)
    bench.ring_bell()
    assert bench.received() == frames
    assert bench.read("MPC") == 0


def test_a_disabled_receiver_does_not_stop_looped_frames() -> None:
    bench = Bench()
    bench.start(rctl=Rctl.LBM_MAC | Rctl.BAM)
    bench.write("RCTL", Rctl.LBM_MAC | Rctl.BAM)
    bench.transmit([b"\xff" * 1000] * 60)
    assert bench.read("TDH") == 60
    assert bench.received() == []
