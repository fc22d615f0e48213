# SPDX-License-Identifier: BSD-3-Clause
"""Receive: filters, buffers, checksum status, VLANs, and rings full of nonsense."""

import struct
import zlib

import dpkt  # type: ignore[import-untyped]  # it has no stubs
import pytest

from vfio_user.device_models.e1000.bench import BUFFER, RX_DATA, RX_RING, Bench
from vfio_user.device_models.e1000.bits import Cause, Ctrl, Rctl
from vfio_user.device_models.e1000.descriptors import DD, EOP, IPCS, IPE, IXSM, PIF, TCPCS, TCPE, VP
from vfio_user.device_models.e1000.options import Verify
from vfio_user.device_models.e1000.packet_buffer import CAPACITY

OURS = bytes.fromhex("525400123456")
OTHER = bytes.fromhex("520000000001")
GROUP = bytes.fromhex("01005e0a0b0c")
BROADCAST = b"\xff" * 6
MODES = pytest.mark.parametrize("mapped", [True, False])
TUOFL, IPOFL, IPV6OFL = 0x200, 0x100, 0x400


def frame_to(destination: bytes = OURS, size: int = 100, kind: int = 0x88B5) -> bytes:
    return (destination + OTHER + struct.pack(">H", kind) + bytes(range(256)) * 64)[:size]


def ip_frame(payload: bytes = b"data", *, v6: bool = False, udp: bool = False, options: bytes = b"") -> bytes:
    segment = (
        dpkt.udp.UDP(sport=5, dport=6, data=payload, ulen=8 + len(payload))
        if udp
        else dpkt.tcp.TCP(sport=5, dport=6, data=payload)
    )
    number = 17 if udp else 6
    if v6:
        addresses = {"src": bytes(15) + b"\x01", "dst": bytes(15) + b"\x02"}
        packet = dpkt.ip6.IP6(nxt=number, hlim=64, plen=len(segment), data=segment, **addresses)
        packet.extension_hdrs = {}
    else:
        packet = dpkt.ip.IP(src=b"\x0a\0\0\x01", dst=b"\x0a\0\0\x02", p=number, data=segment, opts=options)
        packet.hl = 5 + len(options) // 4
        packet.len = len(packet)
    kind = 0x86DD if v6 else 0x0800
    return bytes(dpkt.ethernet.Ethernet(dst=OURS, src=OTHER, type=kind, data=packet))


def padded(frame: bytes) -> bytes:
    return frame.ljust(60, b"\0")


@MODES
def test_frames_arrive_in_order_with_room_for_the_fcs(mapped: bool) -> None:
    bench = Bench(mapped=mapped)
    bench.start()
    frames = [frame_to(size=size) for size in (14, 42, 60, 61, 1514, 1518)]
    assert bench.deliver(*frames)
    entries = bench.take_received()
    assert [entry.data[:-4] for entry in entries] == [padded(frame) for frame in frames]
    assert {entry.status for entry in entries} == {DD | EOP | IXSM}
    assert {entry.errors | entry.special | entry.checksum for entry in entries} == {0}
    assert bench.read("RDH") == len(frames)
    assert bench.read("ICR") & Cause.RXT0


def test_the_fcs_is_stripped_or_real_if_wanted() -> None:
    bench = Bench()
    bench.start(rctl=Rctl.SECRC)
    bench.deliver(frame_to())
    assert bench.take_received()[0].data == frame_to()
    bench = Bench(fcs=True)
    bench.start()
    bench.deliver(frame_to())
    data = bench.take_received()[0].data
    assert data == frame_to() + zlib.crc32(frame_to()).to_bytes(4, "little")


@MODES
def test_the_ring_wraps_as_the_guest_gives_descriptors_back(mapped: bool) -> None:
    bench = Bench(mapped=mapped)
    bench.start(rx=8)
    got = []
    for number in range(40):
        bench.deliver(frame_to(size=60 + number), frame_to(size=200 + number))
        got += bench.received()
        bench.write("RDT", (bench.next_received - 1) % 8)
    assert got == [frame_to(size=base + number) for number in range(40) for base in (60, 200)]
    assert bench.read("GPRC") == 80


@MODES
def test_without_descriptors_frames_wait_and_then_the_backend_is_held_back(mapped: bool) -> None:
    bench = Bench(mapped=mapped)
    bench.start(rx=8)
    frames = [frame_to(size=1000 + number) for number in range(140)]
    taken = [frame for frame in frames if bench.port.offer(frame)]
    bench.run()
    assert 7 < len(taken) < 140
    assert taken == frames[: len(taken)]
    assert bench.device.mac.buffer.bytes <= CAPACITY + 2000
    assert bench.port.was_ready == 0
    assert bench.read("RNBC") == 0  # at that time the task had not run
    got = []
    while more := bench.received():
        got += more
        bench.write("RDT", (bench.next_received - 1) % 8)
        bench.run()
    assert got == taken
    assert bench.port.was_ready == 1


def test_frames_that_find_no_descriptor_are_counted() -> None:
    bench = Bench()
    bench.start(rx=8)
    for _ in range(10):
        bench.deliver(frame_to())
    assert (bench.read("RNBC"), bench.read("MPC"), bench.read("RDH")) == (3, 0, 7)


def test_a_disabled_receiver_drops_and_one_that_is_switched_off_forgets() -> None:
    bench = Bench()
    bench.start(rx=8)
    for _ in range(10):
        bench.deliver(frame_to())
    bench.write("RCTL", 0)
    assert bench.deliver(*[frame_to()] * 500)
    bench.received()
    bench.write("RCTL", Rctl.EN)
    bench.write("RDT", 6)
    bench.run()
    assert bench.received() == []
    assert bench.device.counters()["received_dropped"] == 3 + 500


def test_switching_off_frees_a_backend_that_waits() -> None:
    bench = Bench()
    bench.start(rx=8)
    while bench.port.offer(frame_to(size=1500)):
        pass
    bench.write("RCTL", 0)
    assert bench.port.was_ready == 1
    bench.start(rx=8)
    while bench.port.offer(frame_to(size=1500)):
        pass
    bench.reset_by_window()
    assert bench.port.was_ready == 2


def test_without_link_nothing_arrives() -> None:
    bench = Bench()
    bench.start()
    bench.write_phy(0, 0x0800)
    assert bench.deliver(frame_to())
    assert bench.received() == []


def accepted(bench: Bench, destination: bytes) -> int | None:
    """The PIF bit of a frame to `destination`, None if it does not arrive."""
    bench.deliver(frame_to(destination))
    entries = bench.take_received()
    bench.write("RDT", (bench.next_received - 1) % 64)
    return entries[0].status & PIF if entries else None


def test_destination_filters() -> None:
    bench = Bench()
    bench.start(rctl=0)
    filtered = [accepted(bench, address) for address in (OURS, OTHER, GROUP, BROADCAST)]
    assert filtered == [0, None, None, None]
    bench.write("RCTL", Rctl.EN | Rctl.BAM)
    assert accepted(bench, BROADCAST) == 0
    bench.write("RCTL", Rctl.EN | Rctl.UPE)
    assert [accepted(bench, address) for address in (OTHER, GROUP, BROADCAST)] == [PIF, None, None]
    bench.write("RCTL", Rctl.EN | Rctl.MPE)
    assert [accepted(bench, address) for address in (OTHER, GROUP, BROADCAST)] == [None, PIF, PIF]
    assert bench.device.counters()["received_filtered"] == 6
    assert bench.read("GPRC") == 5
    assert bench.read("TPR") == 11


def test_exact_addresses_need_their_valid_bit() -> None:
    bench = Bench()
    bench.start(rctl=0)
    for index in (1, 15):
        bench.write("RAL", int.from_bytes(OTHER[:4], "little"), index)
        bench.write("RAH", int.from_bytes(OTHER[4:], "little"), index)
        assert accepted(bench, OTHER) is None
        bench.write("RAH", int.from_bytes(OTHER[4:], "little") | 1 << 31, index)
        assert accepted(bench, OTHER) == 0
        bench.write("RAH", 0, index)
    bench.write("RAH", 0)
    assert accepted(bench, OURS) is None


@pytest.mark.parametrize("offset", range(4))
def test_the_multicast_table(offset: int) -> None:
    """The hash as Linux' driver computes it (e1000_hash_mc_addr), by its shifts."""
    low, high = ((4, 4), (3, 5), (2, 6), (0, 8))[offset]
    place = (GROUP[4] >> low | GROUP[5] << high) & 0xFFF
    bench = Bench()
    bench.start(rctl=offset << 12)
    assert accepted(bench, GROUP) is None
    bench.write("MTA", 1 << (place & 31), place >> 5)
    assert accepted(bench, GROUP) == PIF
    assert accepted(bench, GROUP[:5] + bytes([GROUP[5] ^ 0x08])) is None
    assert accepted(bench, OTHER[:4] + GROUP[4:]) is None  # unicast is not hashed


def test_verdicts_are_bounded() -> None:
    bench = Bench()
    bench.start(rctl=Rctl.UPE)
    for number in range(5000):
        bench.device.mac.buffer.filter.judge(struct.pack(">HI", 2, number))
    assert len(bench.device.mac.buffer.filter.verdicts) <= 1024


def tagged(tag: int, inner: bytes = b"", size: int = 100) -> bytes:
    frame = inner or frame_to(size=size)
    return frame[:12] + struct.pack(">HH", 0x8100, tag) + frame[12:]


def test_vlan_tags_are_stripped_where_the_mode_is_on() -> None:
    bench = Bench()
    bench.start()
    bench.deliver(tagged(0xA005))
    bench.write("CTRL", bench.read("CTRL") | Ctrl.VME)
    bench.deliver(tagged(0xA005), frame_to(), tagged(1, size=58))
    entries = bench.take_received()
    assert [entry.data[:-4] for entry in entries] == [
        tagged(0xA005),
        frame_to(),
        frame_to(),
        frame_to(size=58) + b"\0\0",
    ]
    assert [entry.status & VP for entry in entries] == [0, VP, 0, VP]
    assert [entry.special for entry in entries] == [0, 0xA005, 0, 1]


def test_the_vlan_filter() -> None:
    bench = Bench()
    bench.start(rctl=Rctl.VFE)
    bench.write("VFTA", 1 << 5, 0)
    bench.write("VFTA", 1 << 31, 127)
    for tag, passes in ((5, True), (6, False), (0xFFF, True), (0xFFE, False), (0xE005, True)):
        bench.deliver(tagged(tag))
        assert bool(bench.received()) is passes, hex(tag)
    bench.deliver(frame_to())
    assert len(bench.received()) == 1
    bench.write("RCTL", Rctl.EN | Rctl.VFE | Rctl.CFIEN)
    bench.deliver(tagged(0x1005), tagged(0x0005))
    assert len(bench.received()) == 1
    bench.write("VET", 0x9100)
    bench.deliver(tagged(6))
    assert len(bench.received()) == 1


@MODES
@pytest.mark.parametrize("size_bits", [0, 1, 2, 3])
@pytest.mark.parametrize("extended", [False, True])
def test_long_frames_over_several_buffers(mapped: bool, size_bits: int, extended: bool) -> None:
    sizes = (2048, 16384, 8192, 4096) if extended else (2048, 1024, 512, 256)
    bench = Bench(mapped=mapped, memory=8 << 20)
    bench.start(rx=64, rctl=Rctl.LPE | size_bits << 16 | (Rctl.BSEX if extended else 0))
    for index in range(64):
        struct.pack_into("<Q", bench.memory, RX_RING + index * 16, RX_DATA + index * 16384)
    frames = [frame_to(size=9014), frame_to(size=100), frame_to(size=sizes[size_bits] - 4)]
    bench.deliver(*frames)
    entries = bench.take_received()
    whole, joined = b"", []
    for entry in entries:
        assert len(entry.data) <= sizes[size_bits]
        whole += entry.data
        if entry.status & EOP:
            joined.append(whole[:-4])
            whole = b""
        else:
            assert entry.status == DD
    assert joined == frames
    assert bench.read("ROC") == 0


def test_long_frames_are_not_for_everyone() -> None:
    bench = Bench()
    bench.start()
    bench.deliver(frame_to(size=1519))
    assert (bench.received(), bench.read("ROC")) == ([], 1)
    bench.write("RCTL", Rctl.EN | Rctl.LPE)
    bench.deliver(frame_to(size=16381))
    assert (bench.received(), bench.read("ROC")) == ([], 1)
    bench.deliver(b"short")
    assert bench.read("RUC") == 1


def test_a_frame_longer_than_the_whole_ring_is_dropped() -> None:
    bench = Bench()
    bench.start(rx=8, rctl=Rctl.LPE | 3 << 16)
    bench.deliver(frame_to(size=9000), frame_to())
    assert bench.received() == [frame_to()]
    assert bench.device.counters()["received_dropped"] == 1


def test_a_long_frame_waits_for_enough_descriptors() -> None:
    bench = Bench()
    bench.start(rx=16, rctl=Rctl.LPE)
    bench.write("RDT", 3)
    bench.deliver(frame_to(size=9000))
    assert bench.read("RDH") == 0
    bench.write("RDT", 8)
    bench.run()
    assert bench.read("RDH") == 5


def test_a_descriptor_with_a_null_address_is_passed_over() -> None:
    bench = Bench()
    bench.start()
    struct.pack_into("<Q", bench.memory, RX_RING, 0)
    bench.deliver(frame_to())
    empty, full = bench.take_received()
    assert (empty.data, empty.status) == (b"", DD)
    assert (full.data[:-4], full.status & EOP) == (frame_to(), EOP)
    assert bench.memory[:0x1000] == bytes(0x1000)


def examined(control: int, *frames: bytes) -> list[tuple[int, int]]:
    bench = Bench()
    bench.start()
    bench.write("RXCSUM", control)
    bench.deliver(*frames)
    return [(entry.status & ~(DD | EOP), entry.errors) for entry in bench.take_received()]


def broken(frame: bytes, place: int) -> bytes:
    return frame[:place] + bytes([frame[place] ^ 0x40]) + frame[place + 1 :]


def test_checksum_status_of_ipv4() -> None:
    tcp, udp = ip_frame(b"odd"), ip_frame(b"even", udp=True)
    assert examined(TUOFL, tcp, udp, broken(tcp, 55), broken(udp, 43)) == [
        (TCPCS, 0),
        (TCPCS, 0),
        (TCPCS, TCPE),
        (TCPCS, TCPE),
    ]
    both = TUOFL | IPOFL
    assert examined(both, tcp, broken(tcp, 22), broken(tcp, 56)) == [
        (TCPCS | IPCS, 0),
        (TCPCS | IPCS, IPE),
        (TCPCS | IPCS, TCPE),
    ]
    assert examined(IPOFL, tcp, broken(tcp, 22)) == [(IPCS, 0), (IPCS, IPE)]
    assert examined(0, tcp) == [(IXSM, 0)]


def test_checksum_status_behind_options_padding_and_tags() -> None:
    frame = ip_frame(b"x" * 9, options=b"\x01" * 8)
    assert examined(TUOFL | IPOFL, frame, frame + bytes(6), tagged(5, frame)) == [(TCPCS | IPCS, 0)] * 3


def test_checksum_status_of_ipv6() -> None:
    tcp, udp = ip_frame(b"abc", v6=True), ip_frame(b"abcd", v6=True, udp=True)
    assert examined(TUOFL, tcp) == [(IXSM, 0)]
    both = TUOFL | IPV6OFL
    assert examined(both, tcp, udp, broken(tcp, 30)) == [(TCPCS, 0), (TCPCS, 0), (TCPCS, TCPE)]


def test_checksums_that_cannot_be_looked_at() -> None:
    tcp, udp = ip_frame(), ip_frame(udp=True)
    fragment = bytearray(tcp)
    fragment[20] = 0x20
    unsummed = bytearray(udp)
    unsummed[40:42] = b"\0\0"
    cut, lying = tcp[:30], bytearray(tcp)
    lying[16:18] = b"\xff\xff"
    icmp, short = bytearray(tcp), bytearray(tcp)
    icmp[23], short[14] = 1, 0x41
    frames = (bytes(fragment), bytes(unsummed), cut, bytes(lying), bytes(icmp), bytes(short), frame_to())
    assert examined(TUOFL, *frames) == [(IXSM, 0)] * 7
    for end in range(14, len(tcp)):
        examined(TUOFL | IPOFL | IPV6OFL, tcp[:end], ip_frame(v6=True)[:end])


def test_checksums_of_a_burst_are_left_to_the_guest_unless_always_wanted() -> None:
    for verify, expected in ((Verify.AUTO, {IXSM}), (Verify.ALWAYS, {TCPCS})):
        bench = Bench(verify=verify)
        bench.start()
        bench.write("RXCSUM", TUOFL)
        bench.deliver(*[ip_frame()] * 20)
        assert {entry.status & ~(DD | EOP) for entry in bench.take_received()} == expected


def trusted(control: int, *frames: bytes, burst: bool = True) -> list[tuple[int, int]]:
    """Status and errors of frames whose network is trusted, in a burst or alone."""
    bench = Bench(verify=Verify.TRUST)
    bench.start()
    bench.write("RXCSUM", control)
    bench.deliver(*frames, *[padded(frame_to())] * (20 if burst else 0))
    taken = bench.take_received()[: len(frames)]
    return [(entry.status & ~(DD | EOP), entry.errors) for entry in taken]


def test_a_trusted_network_vouches_for_tcp() -> None:
    """Its sums are not looked at: a broken one counts as right."""
    tcp, six = ip_frame(), ip_frame(v6=True)
    both, all_of_it = TUOFL | IPOFL, TUOFL | IPOFL | IPV6OFL
    for burst in (False, True):
        assert trusted(both, tcp, broken(tcp, 55), burst=burst) == [(IPCS | TCPCS, 0)] * 2
        assert trusted(all_of_it, six, broken(six, 75), burst=burst) == [(TCPCS, 0)] * 2
    assert trusted(TUOFL, tcp) == [(TCPCS, 0)]
    assert trusted(IPOFL, tcp) == [(IPCS, 0)]
    assert trusted(0, tcp) == [(IXSM, 0)]
    assert trusted(both, six) == [(IXSM, 0)]


def test_what_nobody_vouches_for_is_as_with_auto() -> None:
    tcp, udp = ip_frame(), ip_frame(udp=True)
    options, fragment = ip_frame(options=bytes(4)), tcp[:20] + b"\x20" + tcp[21:]
    tagged = tcp[:12] + b"\x81\x00\x00\x07" + tcp[12:]
    others = (udp, options, fragment, tagged, frame_to(), tcp[:40])
    assert trusted(TUOFL, *others) == [(IXSM, 0)] * len(others)
    assert trusted(TUOFL, broken(udp, 43), broken(options, 60), burst=False) == examined(
        TUOFL, broken(udp, 43), broken(options, 60)
    )


def test_the_packet_checksum_from_a_given_byte_on() -> None:
    bench = Bench()
    bench.start()
    bench.write("RXCSUM", 14)
    bench.deliver(ip_frame(b"payload"))
    (entry,) = bench.take_received()
    summed = entry.data[14:-4] + bytes(len(entry.data) % 2)
    total = sum(struct.unpack(f">{len(summed) // 2}H", summed))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert entry.checksum == total ^ 0xFFFF


def test_the_minimum_threshold_of_free_descriptors() -> None:
    for bits, threshold in ((0, 32), (1, 16), (2, 8)):
        bench = Bench()
        bench.start(rctl=bits << 8)
        for free in range(62, 0, -1):
            bench.deliver(frame_to())
            assert bool(bench.read("ICR") & Cause.RXDMT0) is (free == threshold), (bits, free)


def test_small_packets_are_told() -> None:
    bench = Bench()
    bench.start()
    bench.write("RSRPD", 100)
    bench.deliver(frame_to(size=101))
    assert not bench.read("ICR") & Cause.SRPD
    bench.deliver(frame_to(size=100))
    assert bench.read("ICR") & Cause.SRPD


def test_statistics_by_kind_and_size() -> None:
    bench = Bench()
    bench.start(rctl=Rctl.BAM | Rctl.MPE)
    sizes = (42, 60, 61, 123, 124, 508, 1019, 1020, 1514)
    bench.deliver(*[frame_to(size=size) for size in sizes], frame_to(BROADCAST), frame_to(GROUP))
    names = ("GPRC", "BPRC", "MPRC", "PRC64", "PRC127", "PRC255", "PRC511", "PRC1023", "PRC1522")
    assert [bench.read(name) for name in names] == [11, 1, 1, 2, 4, 1, 0, 2, 2]
    octets = bench.read("GORCL") | bench.read("GORCH") << 32
    assert octets == bench.port.counts.received_bytes + 4 * bench.port.counts.received_frames


@MODES
def test_a_buffer_that_cannot_be_written_loses_its_frame_only(mapped: bool) -> None:
    bench = Bench(mapped=mapped)
    bench.start()
    struct.pack_into("<Q", bench.memory, RX_RING + 16, 1 << 40)
    bench.deliver(*[frame_to(size=size) for size in (70, 71, 72)])
    assert bench.received() == [frame_to(size=70)]
    assert bench.device.counters()["received_dropped"] == 2  # the descriptor stays the device's
    struct.pack_into("<Q", bench.memory, RX_RING + 16, RX_DATA + BUFFER)
    bench.deliver(frame_to(size=73))
    assert bench.received() == [frame_to(size=73)]


def test_a_ring_that_cannot_be_read_and_no_bus_master() -> None:
    bench = Bench()
    bench.start()
    bench.device.config.write(4, b"\x03\x00")
    bench.deliver(frame_to())
    assert bench.read("RDH") == 0
    bench.device.config.write(4, b"\x07\x00")
    bench.run()
    assert bench.received() == [frame_to()]
    bench.write("RDBAH", 0x100)
    bench.deliver(frame_to())
    assert bench.received() == []
    assert bench.device.counters()["dma_errors"] >= 2


@pytest.mark.parametrize(
    ("length", "head", "tail"), [(0, 0, 5), (128, 8, 3), (128, 0, 8), (0xFFF80, 0xFFFF, 0xFFFF)]
)
def test_indexes_outside_of_the_ring_do_nothing(length: int, head: int, tail: int) -> None:
    bench = Bench()
    bench.start()
    bench.write("RDLEN", length)
    bench.write("RDH", head)
    bench.write("RDT", tail)
    bench.deliver(frame_to())
    assert (bench.host.tasks.idle, bench.host.dma.bytes_read) == (True, 0)


@pytest.mark.parametrize("after", range(14))
def test_a_task_cut_at_any_await_loses_and_repeats_nothing(after: int) -> None:
    bench = Bench(mapped=False)
    bench.start(rx=8)
    bench.write("RDH", 5)
    bench.write("RDT", 4)
    bench.next_received = 5
    frames = [frame_to(size=100 + number) for number in range(6)]
    for frame in frames:
        assert bench.port.offer(frame)
    bench.host.answer(after)
    bench.host.stop()
    bench.host.tasks.cut()
    bench.host.dma.waiting.clear()
    bench.host.resume()
    bench.run()
    assert bench.received() == frames
    assert bench.read("ICR") & Cause.RXT0


@pytest.mark.parametrize("after", range(5))
def test_the_receiver_is_switched_off_and_on_while_a_batch_is_written(after: int) -> None:
    """What is on its way arrives, what is not is dropped; head and descriptors never disagree."""
    bench = Bench(mapped=False)
    bench.start(rx=8)
    bench.port.offer(frame_to(size=100))
    bench.port.offer(frame_to(size=101))
    bench.host.answer(after)
    bench.write("RCTL", 0)
    bench.write("RCTL", Rctl.EN)
    bench.port.offer(frame_to(size=200))
    bench.run()
    got = bench.received()
    assert got in ([frame_to(size=200)], [frame_to(size=size) for size in (100, 101, 200)])
    assert bench.read("RDH") == len(got)
    assert bench.device.mac.buffer.bytes == 0


def test_rewriting_rctl_disturbs_nothing() -> None:
    bench = Bench(mapped=False)
    bench.start()
    for number in range(10):
        bench.port.offer(frame_to(size=100 + number))
        bench.write("RCTL", bench.read("RCTL") ^ Rctl.MPE)
        bench.host.answer(number % 4)
    bench.run()
    assert bench.received() == [frame_to(size=100 + number) for number in range(10)]


def pause_frame(quanta: int, opcode: int = 1) -> bytes:
    address = bytes.fromhex("0180c2000001")
    return (address + OTHER + struct.pack(">HHH", 0x8808, opcode, quanta)).ljust(60, b"\0")


def with_flow_control(bench: Bench, bits: int) -> None:
    bench.write("FCAL", 0x00C28001)
    bench.write("FCAH", 0x0100)
    bench.write("FCT", 0x8808)
    bench.write("FCTTV", 0x1234)
    bench.write("CTRL", bench.read("CTRL") | bits)


def test_a_pause_frame_stops_the_transmitter_for_its_time() -> None:
    bench = Bench()
    bench.start()
    with_flow_control(bench, Ctrl.RFCE)
    bench.deliver(pause_frame(100))
    assert bench.read("STATUS") & 1 << 4
    bench.transmit([frame_to(OTHER)])
    assert bench.port.frames == []
    bench.advance(100 * 512 - 1)
    assert bench.port.frames == []
    bench.advance(1)
    assert bench.port.frames == [frame_to(OTHER)]
    bench.deliver(pause_frame(0xFFFF))
    bench.transmit([frame_to(OTHER)])
    bench.deliver(pause_frame(0))
    assert len(bench.port.frames) == 2
    assert not bench.read("STATUS") & 1 << 4
    assert [bench.read(name) for name in ("XOFFRXC", "XONRXC", "GPRC")] == [2, 1, 0]
    bench.deliver(pause_frame(5, opcode=2))
    assert bench.read("FCRUC") == 1


def test_pause_frames_mean_nothing_without_flow_control() -> None:
    bench = Bench()
    bench.start(rctl=Rctl.MPE)
    with_flow_control(bench, 0)
    bench.deliver(pause_frame(100))
    assert not bench.read("STATUS") & 1 << 4
    assert bench.received() == [pause_frame(100)]


def test_a_full_packet_buffer_sends_xoff_and_then_xon() -> None:
    bench = Bench()
    bench.start(rx=8)
    bench.write("FCRTH", 0x4000)
    bench.write("FCRTL", 0x2000 | 1 << 31)
    with_flow_control(bench, Ctrl.TFCE)
    for _ in range(30):
        bench.deliver(frame_to(size=1000))
    (xoff,) = bench.port.frames
    assert xoff == bytes.fromhex("0180c2000001") + OURS + bytes.fromhex("880800011234") + bytes(42)
    while bench.received():
        bench.write("RDT", (bench.next_received - 1) % 8)
        bench.run()
    assert [frame[16:18] for frame in bench.port.frames] == [b"\x12\x34", b"\0\0"]
    assert [bench.read(name) for name in ("XOFFTXC", "XONTXC", "GPTC", "TPT")] == [1, 1, 0, 2]
    bench.write("TCTL", 2 | 1 << 22)
    assert (bench.read("XOFFTXC"), bench.read("TCTL")) == (1, 2)
