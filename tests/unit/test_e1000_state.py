# SPDX-License-Identifier: BSD-3-Clause
"""What of an e1000 goes along when it is moved, part by part; and what a stopped one still does."""

from typing import Any

import pytest

from golden import scenes
from vfio_user.device_models.e1000.bench import DATA, IDE, IFCS, RS, RX_DATA, RX_RING, TSE, TX_DATA, Bench
from vfio_user.device_models.e1000.bits import LOOPBACK_MAC, Cause, Ctrl, Eecd, Rctl, Status, Tctl
from vfio_user.device_models.e1000.descriptors import RECEIVE, SIZE
from vfio_user.device_models.e1000.packet_buffer import CAPACITY, MOST
from vfio_user.device_models.e1000.phy import NEGOTIATION_TIME
from vfio_user.device_models.fake_migration import restore_device, save_device

MAC, PARTNER = scenes.MAC, scenes.PARTNER
FRAME = PARTNER + MAC + b"\x08\x00" + bytes(60)
PAUSE = bytes.fromhex("0180c2000001") + PARTNER + b"\x88\x08\x00\x01"
MAPPED = pytest.mark.parametrize("mapped", [True, False])


def frame_to(destination: bytes = MAC, size: int = 100) -> bytes:
    return (destination + PARTNER + b"\x08\x00").ljust(size, b"\xaa")


def started(**options: int) -> Bench:
    bench = Bench()
    bench.start(**options)
    return bench


# Time


def test_a_negotiation_takes_the_time_that_was_left() -> None:
    bench = Bench()
    bench.advance(NEGOTIATION_TIME - 1000)
    bench = bench.moved()
    bench.advance(999)
    assert not bench.read("STATUS") & Status.LU
    bench.advance(1)
    assert bench.read("STATUS") & Status.LU
    assert bench.read("ICR") == Cause.LSC


@pytest.mark.parametrize(("ring", "cause"), [("R", Cause.RXT0), ("T", Cause.TXDW)])
def test_a_delayed_cause_comes_when_its_time_is_over(ring: str, cause: int) -> None:
    bench = started()
    bench.write("RDTR", 100)
    bench.write("TIDV", 100)
    if ring == "R":
        bench.deliver(frame_to())
    else:
        bench.put_data(FRAME, command=IFCS | RS | IDE)
        bench.ring_bell()
    bench.read("ICR")
    bench.advance(60 * 1024)
    bench = bench.moved().moved()
    bench.advance(40 * 1024 - 1)
    assert not bench.read("ICS") & cause
    bench.advance(1)
    assert bench.read("ICS") & cause


def test_events_after_the_move_do_not_outlast_the_absolute_timer() -> None:
    bench = started()
    bench.write("RDTR", 100)
    bench.write("RADV", 150)
    bench.deliver(frame_to())
    bench.advance(90 * 1024)
    bench = bench.moved()
    bench.deliver(frame_to())
    bench.advance(60 * 1024 - 1)
    assert not bench.read("ICS") & Cause.RXT0
    bench.advance(1)
    assert bench.read("ICS") & Cause.RXT0


def test_the_throttle_holds_the_pin_for_the_rest_of_the_interval() -> None:
    bench = started()
    bench.write("ITR", 1000)
    bench.write("IMS", Cause.RXT0)
    bench.deliver(frame_to())
    assert bench.host.irq_level
    bench.read("ICR")
    bench.deliver(frame_to())
    bench.advance(200_000)
    bench = bench.moved()
    bench.advance(55_999)
    assert not bench.host.irq_level
    bench.advance(1)
    assert bench.host.irq_level


def test_a_throttle_whose_time_has_just_come_fires_at_the_destination() -> None:
    bench = started()
    bench.write("ITR", 1000)
    bench.write("IMS", Cause.RXT0)
    bench.deliver(frame_to())
    bench.read("ICR")
    bench.deliver(frame_to())
    bench.host.now += 256_000  # due, but the host has not looked yet
    bench = bench.moved()
    assert not bench.host.irq_level
    bench.advance(0)
    assert bench.host.irq_level


def test_the_level_is_held_until_the_causes_are_read() -> None:
    bench = started()
    bench.write("IMS", Cause.RXT0)
    bench.deliver(frame_to())
    bench = bench.moved()
    assert bench.host.irq_level
    assert bench.read("ICR") & Cause.RXT0
    assert not bench.host.irq_level


def test_a_level_without_a_cause_goes_down() -> None:
    """No device saves this; a stream might say it, and no driver would ever get rid of it."""
    bench = started()
    saved = save_device(bench.host, bench.device)
    sections = {**saved.sections}
    version, fields = sections["interrupts"]
    sections["interrupts"] = version, {**fields, "level": True}
    restore_device(bench.host, bench.device, saved.with_sections(sections))
    bench.host.resume()
    assert not bench.host.irq_level


def paused(quanta: int) -> Bench:
    bench = started()
    bench.write("CTRL", bench.read("CTRL") | Ctrl.RFCE | Ctrl.TFCE)
    for name, value in (("FCAL", 0x00C28001), ("FCAH", 0x0100), ("FCT", 0x8808), ("FCTTV", 0x100)):
        bench.write(name, value)
    bench.port.offer(PAUSE + quanta.to_bytes(2, "big") + bytes(42))
    return bench


def test_a_pause_ends_when_the_partner_wants_it() -> None:
    bench = paused(1000)
    bench.transmit([FRAME])
    bench.advance(500 * 512)
    bench = bench.moved()
    assert bench.read("STATUS") & Status.TXOFF
    bench.advance(500 * 512 - 1)
    assert bench.port.frames == []
    bench.advance(1)
    assert bench.port.frames == [FRAME]
    assert not bench.read("STATUS") & Status.TXOFF


def test_the_partner_that_was_stopped_is_let_go_by_the_destination() -> None:
    bench = paused(0)
    bench.write("FCRTH", 0x200)
    bench.write("FCRTL", 0x100 | 1 << 31)
    bench.write("RDT", 0)
    for _ in range(8):
        bench.port.offer(frame_to())
    assert bench.port.frames[-1][:18] == PAUSE[:6] + MAC + PAUSE[12:16] + b"\x01\x00"
    bench = bench.moved()
    bench.write("RDT", 40)
    bench.run()
    assert [frame[14:18] for frame in bench.port.frames] == [b"\x00\x01\x00\x00"]


# What is not in registers


def test_a_command_to_the_eeprom_goes_on_bit_by_bit() -> None:
    bench = Bench()
    bench.write_eeprom(0x15, 0xBEEF)
    bench.eeprom_begin()
    for number, bit in enumerate(f"110{0x15:06b}"):
        pins = Eecd.REQ | Eecd.CS | (Eecd.DI if bit == "1" else 0)
        for step in (pins, pins | Eecd.SK, pins):
            bench.write("EECD", step)
        bench = bench.moved(mapped=bool(number & 1))
    value = 0
    for _ in range(16):
        bench.write("EECD", Eecd.REQ | Eecd.CS | Eecd.SK)
        bench = bench.moved()
        value = value << 1 | bool(bench.read("EECD") & Eecd.DO)
        bench.write("EECD", Eecd.REQ | Eecd.CS)
    assert value == 0xBEEF


def test_a_read_of_the_eeprom_may_go_round_and_round() -> None:
    bench = Bench()
    bench.eeprom_begin()
    for bit in f"110{0:06b}":
        pins = Eecd.REQ | Eecd.CS | (Eecd.DI if bit == "1" else 0)
        for step in (pins, pins | Eecd.SK, pins):
            bench.write("EECD", step)
    words = []
    for word in range(130):
        value = 0
        for _ in range(16):
            bench.write("EECD", Eecd.REQ | Eecd.CS | Eecd.SK)
            value = value << 1 | bool(bench.read("EECD") & Eecd.DO)
            bench.write("EECD", Eecd.REQ | Eecd.CS)
        words.append(value)
        if word == 99:
            bench = bench.moved()
    content = bench.device.mac.eeprom.words
    assert words == [*content, *content, *content[:2]]


def test_a_segmentation_context_is_remembered() -> None:
    header = PARTNER + MAC + b"\x08\x00" + bytes.fromhex("4500002800004000400600000a0000010a000002")
    header += bytes.fromhex("04d2162e0000000000000000501000000000") + bytes(2)
    bench = started()
    bench.put_context(14, 24, 33, 34, 50, 0, 3 << 24, 54, 100)
    bench.ring_bell()
    bench = bench.moved()
    bench.put_data(header + bytes(250), command=IFCS | RS | DATA | TSE, upper=3 << 8)
    bench.ring_bell()
    assert [len(frame) for frame in bench.port.frames] == [154, 154, 104]


def test_a_packet_whose_end_has_not_come_is_sent_whole_by_the_destination() -> None:
    bench = started()
    bench.memory[TX_DATA : TX_DATA + 100] = FRAME.ljust(100, b"\x11")
    bench.put(TX_DATA, 40 | IFCS)
    bench.ring_bell()
    bench = bench.moved()
    bench.put(TX_DATA + 40, 60 | IFCS | RS | 1 << 24)
    bench.ring_bell()
    assert bench.port.frames == [FRAME.ljust(100, b"\x11")]


def test_reports_that_are_owed_are_made_by_the_destination() -> None:
    """The golden state was saved while its VMM answered no more."""
    bench = Bench()
    saved = scenes.read(scenes.files("e1000")[-1])
    sections: Any = saved.sections
    (owed,) = sections["transmit"][1]["owed"]
    restore_device(bench.host, bench.device, saved)
    bench.host.resume()
    bench.run()
    assert bench.memory[owed] == 0  # the partner has asked for a pause: the task is not even started
    bench.advance(100_000_000)
    assert bench.memory[owed] == 1
    assert bench.read("ICR") & Cause.TXDW


def test_frames_that_wait_keep_the_verdict_of_the_filter_they_have_passed() -> None:
    group = bytes.fromhex("01005e000001")
    bench = started(rctl=Rctl.BAM | Rctl.MPE, rx=8)
    bench.write("RDT", 0)
    bench.port.offer(frame_to(group))
    bench.port.offer(frame_to())
    bench.write("RCTL", Rctl.EN | Rctl.BAM)  # the group would not pass any more
    bench = bench.moved()
    bench.write("RDT", 7)
    bench.run()
    first, second = bench.take_received()
    assert (first.status & 0x80, second.status & 0x80) == (0x80, 0)


def test_frames_looped_back_in_thousands_make_a_state_of_bounded_size() -> None:
    """A burst cut into tiny segments: each is a frame in the packet buffer."""
    bench = Bench(memory=8 << 20)
    bench.start(tx=8, rctl=Rctl.BAM | LOOPBACK_MAC | Rctl.UPE)
    base, count = 0x40_0000, 0xFF80 // SIZE * 8
    for name, value in (("BAL", base), ("LEN", count * SIZE), ("H", 0), ("T", count - 1)):
        bench.write("RD" + name, value)
    bench.write("RCTL", bench.read("RCTL") | Rctl.EN)
    buffer = bench.device.mac.buffer
    while buffer.bytes < MOST:
        buffer.take(frame_to(size=14), looped=True)
    missed = buffer.missed
    buffer.take(frame_to(size=14), looped=True)
    assert buffer.missed == missed + 1
    saved = save_device(bench.host, bench.device)
    assert len(str(saved.sections["receive"])) < 1 << 20
    other = Bench()
    restore_device(other.host, other.device, saved)
    assert len(other.device.mac.buffer.frames) == len(buffer.frames)


def test_frames_beyond_what_the_buffer_holds_are_refused() -> None:
    bench = started()
    saved = save_device(bench.host, bench.device)
    sections = {**saved.sections}
    version, fields = sections["receive"]
    frames = 2 + MOST // 16384
    sections["receive"] = version, {**fields, "frames": ["00" * 16380] * frames, "verdicts": "01" * frames}
    with pytest.raises(Exception, match="more than the packet buffer holds"):
        restore_device(bench.host, bench.device, saved.with_sections(sections))


# The wires at both ends


def test_a_stopped_card_takes_no_frame_and_asks_for_it_when_it_runs() -> None:
    bench = started()
    bench.host.stop()
    assert not bench.port.offer(frame_to())
    assert not bench.port.offer(frame_to())
    assert bench.port.was_ready == 0
    bench.host.resume()
    bench.run()
    assert bench.port.was_ready == 1
    assert bench.deliver(frame_to())
    assert bench.received() == [frame_to()]


def test_a_reset_while_stopped_does_not_forget_the_wire() -> None:
    bench = started()
    bench.host.stop()
    bench.port.offer(frame_to())
    bench.host.reset()
    bench.device.reset()
    bench.port.offer(frame_to())
    bench.host.resume()
    bench.run()
    assert bench.port.was_ready


def test_a_wire_refused_before_the_restore_is_let_go_after_it() -> None:
    source, bench = started(), Bench()
    saved = save_device(source.host, source.device)
    bench.host.stop()
    bench.port.offer(frame_to())
    restore_device(bench.host, bench.device, saved)
    bench.host.resume()
    bench.run()
    assert bench.port.was_ready == 1


def test_a_full_card_that_arrives_full_refuses_the_wire_until_there_is_room() -> None:
    bench = started(rx=8)
    bench.write("RDT", 0)
    while bench.port.offer(frame_to(size=1500)):
        pass
    bench = bench.moved()
    assert bench.device.mac.buffer.bytes >= CAPACITY
    assert not bench.port.offer(frame_to())
    assert bench.port.was_ready == 0
    for _ in range(20):
        for index in range(8):
            RECEIVE.pack_into(bench.memory, RX_RING + index * SIZE, RX_DATA + index * 2048, 0, 0, 0, 0, 0)
        bench.write("RDT", (bench.read("RDH") - 1) % 8)
        bench.run()
    assert bench.port.was_ready == 1
    assert bench.port.offer(frame_to())


@pytest.mark.parametrize("there", [True, False])
def test_the_cable_is_that_of_the_port_at_the_destination(there: bool) -> None:
    bench = started()
    bench.write("IMS", Cause.LSC)
    saved = save_device(bench.host, bench.device)
    other = Bench()
    other.port.set_link(there)
    restore_device(other.host, other.device, saved)
    other.host.resume()
    assert bool(other.read("STATUS") & Status.LU) == there
    assert other.host.irq_level == (not there)


def test_a_cable_that_was_pulled_comes_up_where_one_is_plugged_in() -> None:
    bench = started()
    bench.port.set_link(False)
    bench.read("ICR")
    bench = bench.moved()
    assert not bench.read("STATUS") & Status.LU
    bench.link_up()
    assert bench.read("STATUS") & Status.LU
    assert bench.read("ICR") == Cause.LSC


@MAPPED
def test_nothing_is_sent_while_stopped(mapped: bool) -> None:
    bench = Bench(mapped=mapped)
    bench.start()
    bench.write("FCTTV", 0x1234)
    bench.host.stop()
    bench.put_data(FRAME)
    bench.write("TDT", bench.tail)
    bench.write("TCTL", bench.read("TCTL") | Tctl.SWXOFF)
    bench.host.answer()
    bench.advance(10_000_000)
    assert bench.port.frames == []
    bench = bench.moved(mapped=mapped)
    bench.run()
    assert sorted(len(frame) for frame in bench.port.frames) == [60, len(FRAME)]
    assert bench.read("XOFFTXC") == 1


def test_frames_read_when_the_stop_comes_are_sent_by_one_of_the_two_only() -> None:
    for answers in range(1, 6):
        bench = Bench(mapped=False)
        bench.start()
        last = [bench.put_data(FRAME + bytes([number])) for number in range(3)]
        bench.write("TDT", bench.tail)
        bench.host.answer(answers)
        bench.host.stop()
        before = len(bench.port.frames)
        bench.host.dma.answer()
        bench.host.settle()
        assert len(bench.port.frames) == before
        sent = bench.port.frames
        bench = bench.moved()
        bench.run()
        assert [*sent, *bench.port.frames] == [FRAME + bytes([number]) for number in range(3)]
        assert all(bench.done(index) for index in last)


def test_a_failed_move_lets_the_source_go_on_where_it_was() -> None:
    bench = Bench(mapped=False)
    bench.start()
    for number in range(5):
        bench.port.offer(frame_to(size=60 + number))
        bench.put_data(FRAME + bytes([number]))
    bench.write("TDT", bench.tail)
    for _ in range(20):
        bench.host.answer(1)
        save_device(bench.host, bench.device)
        bench.host.resume()
    bench.run()
    assert bench.received() == [frame_to(size=60 + number) for number in range(5)]
    assert bench.port.frames == [FRAME + bytes([number]) for number in range(5)]
