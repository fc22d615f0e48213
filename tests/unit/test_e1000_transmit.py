# SPDX-License-Identifier: BSD-3-Clause
"""Transmit: descriptors of all kinds, offloads, what is written back, and rings full of nonsense."""

import struct

import dpkt  # type: ignore[import-untyped]  # it has no stubs
import pytest

from vfio_user.device_models.e1000.bench import (
    DATA,
    DEXT,
    IFCS,
    RS,
    TSE,
    TX_DATA,
    TX_RING,
    VLE,
    Bench,
)
from vfio_user.device_models.e1000.bits import Cause, Ctrl
from vfio_user.device_models.net import Segmentation

FRAME = b"\x02\0\0\0\0\x01\x52\x54\x00\x12\x34\x56\x88\xb5" + bytes(range(86))
MODES = pytest.mark.parametrize("mapped", [True, False])
IP_OPTIONS, TXSM, IXSM = 0, 2 << 8, 1 << 8
SOURCE, DESTINATION = b"\x0a\0\0\x01", b"\x0a\0\0\x02"
TCP_CONTEXT_V4 = (14, 24, 33, 34, 50, 0)
IC = 1 << 26


def tcp_frame(payload: bytes, *, v6: bool = False, flags: int = 0x18) -> bytes:
    """A TCP frame with right lengths and sums."""
    segment = dpkt.tcp.TCP(sport=1, dport=2, seq=1000, flags=flags, data=payload)
    if v6:
        addresses = {"src": bytes(15) + b"\x01", "dst": bytes(15) + b"\x02"}
        packet = dpkt.ip6.IP6(nxt=6, hlim=64, plen=len(segment), data=segment, **addresses)
        packet.extension_hdrs = {}
    else:
        packet = dpkt.ip.IP(src=SOURCE, dst=DESTINATION, p=6, data=segment, id=7)
        packet.len = len(packet)
    kind = 0x86DD if v6 else 0x0800
    return bytes(dpkt.ethernet.Ethernet(dst=FRAME[:6], src=FRAME[6:12], type=kind, data=packet))


def without_sums(frame: bytes, *, v6: bool, with_length: bool) -> bytes:
    """As a driver hands it over: IP's sum and (for segmentation) length 0, in TCP's sum the pseudo-header."""
    head = bytearray(frame)
    transport = 54 if v6 else 34
    if not with_length:
        struct.pack_into(">H", head, 18 if v6 else 16, 0)
    if not v6:
        struct.pack_into(">H", head, 24, 0)
    addresses = frame[22:54] if v6 else frame[26:34]
    length = len(frame) - transport if with_length else 0
    total = sum(struct.unpack(f">{len(addresses) // 2}H", addresses)) + 6 + length
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    struct.pack_into(">H", head, transport + 16, total)
    return bytes(head)


@MODES
def test_legacy_frames_in_one_and_in_several_pieces(mapped: bool) -> None:
    bench = Bench(mapped=mapped)
    bench.start()
    last = [bench.put_data(FRAME), bench.put_data(FRAME, sizes=(1, 13, 50)), bench.put_data(FRAME)]
    bench.ring_bell()
    assert bench.port.frames == [FRAME] * 3
    assert bench.read("TDH") == bench.tail
    assert [index for index in range(8) if bench.done(index)] == last
    assert bench.read("ICR") & Cause.TXDW


@MODES
def test_the_ring_wraps(mapped: bool) -> None:
    bench = Bench(mapped=mapped)
    bench.start(tx=8)
    for number in range(50):
        bench.transmit([FRAME + bytes([number]), FRAME + bytes([number, 1])])
    assert bench.port.frames == [FRAME + bytes(end) for n in range(50) for end in ([n], [n, 1])]
    assert bench.read("GPTC") == 100


@MODES
def test_more_than_a_batch_at_once(mapped: bool) -> None:
    bench = Bench(mapped=mapped)
    bench.start(tx=256)
    frames = [FRAME + struct.pack(">H", number) for number in range(255)]
    bench.transmit(frames)
    assert bench.port.frames == frames


def test_short_frames_are_padded_if_the_guest_wants_it() -> None:
    bench = Bench()
    bench.start()
    bench.transmit([FRAME[:20]])
    bench.write("TCTL", 2)
    bench.transmit([FRAME[:20]])
    assert bench.port.frames == [FRAME[:20] + bytes(40), FRAME[:20]]


def test_a_frame_that_brings_its_own_fcs_loses_it() -> None:
    bench = Bench()
    bench.start()
    bench.put_data(FRAME + b"FCSx", sizes=(98, 4), command=RS)
    bench.ring_bell()
    assert bench.port.frames == [FRAME]


def test_only_descriptors_that_ask_for_it_are_marked() -> None:
    bench = Bench()
    bench.start()
    quiet = bench.put_data(FRAME, command=IFCS)
    bench.ring_bell()
    assert not bench.done(quiet)
    assert bench.host.dma.bytes_written == 0


@MODES
def test_tcp_checksum_is_left_to_the_wire(mapped: bool) -> None:
    bench = Bench(mapped=mapped)
    bench.start()
    frame = tcp_frame(b"hello world")
    bench.put_context(0, 0, 0, 34, 50, 0, 1 << 24, 0, 0)
    bench.put_data(
        without_sums(frame, v6=False, with_length=True), command=DATA | IFCS | RS, upper=TXSM | IXSM
    )
    bench.put_context(*TCP_CONTEXT_V4, 1 << 24, 0, 0)
    bench.put_data(
        without_sums(frame, v6=False, with_length=True),
        sizes=(20, 4),
        command=DATA | IFCS | RS,
        upper=TXSM | IXSM,
    )
    bench.ring_bell()
    assert bench.port.frames[1] == frame
    _, offload = bench.port.sent[1]
    assert offload is not None
    assert (offload.checksum_start, offload.checksum_offset, offload.segmentation) == (34, 16, 0)


def test_a_context_holds_until_the_next_one_and_over_batches() -> None:
    bench = Bench()
    bench.start()
    frame = tcp_frame(b"x" * 100, v6=True)
    bench.put_context(0, 0, 0, 54, 70, 0, 1 << 24, 0, 0)
    for _ in range(3):
        bench.put_data(without_sums(frame, v6=True, with_length=True), command=DATA | IFCS, upper=TXSM)
        bench.ring_bell()
    bench.transmit([FRAME])
    assert bench.port.frames == [frame] * 3 + [FRAME]


def test_a_sum_that_ends_before_the_frame_is_made_here() -> None:
    bench = Bench()
    bench.start()
    frame = tcp_frame(b"y" * 7)
    data = without_sums(frame, v6=False, with_length=True) + b"trailer"
    bench.put_context(14, 24, 33, 34, 50, len(frame) - 1, 1 << 24, 0, 0)
    bench.put_data(data, sizes=(30, 30), command=DATA | IFCS, upper=TXSM | IXSM)
    bench.ring_bell()
    assert bench.port.frames == [frame + b"trailer"]
    assert bench.port.sent[0][1] is None


def test_legacy_checksum_insertion() -> None:
    bench = Bench()
    bench.start()
    frame = tcp_frame(b"z" * 21)
    data = without_sums(frame, v6=False, with_length=True)
    data = data[:24] + frame[24:26] + data[26:]
    bench.put_data(data, command=IFCS | IC | 50 << 16, upper=34 << 8)
    bench.put_data(FRAME, command=IFCS | IC | 0xFF << 16, upper=0xFE << 8)  # outside of the frame: ignored
    bench.ring_bell()
    assert bench.port.frames == [frame, FRAME]


def put_burst(bench: Bench, frame: bytes, mss: int, *, v6: bool = False, tag: int | None = None) -> None:
    """As Linux' e1000_tso: context, then data with the header in the first piece."""
    header = 74 if v6 else 54
    fields = (14, 0, 0, 54, 70, 0) if v6 else TCP_CONTEXT_V4
    command = 1 << 24 | TSE | (0 if v6 else 1 << 25) | (len(frame) - header)
    bench.put_context(*fields, command, header, mss)
    lower = DATA | TSE | IFCS | RS | (0 if tag is None else VLE)
    upper = TXSM | (0 if v6 else IXSM) | (tag or 0) << 16
    sizes = [4096] * ((len(frame) - header - 1) // 4096)
    bench.put_data(
        without_sums(frame, v6=v6, with_length=False), sizes=(header, *sizes), command=lower, upper=upper
    )


def test_many_tiny_segments_do_not_keep_the_device_busy_in_one_turn() -> None:
    """64 KiB of bursts would do for a batch; cut into single bytes they are a second of work."""
    bench = Bench()
    bench.start()
    for _ in range(8):
        put_burst(bench, tcp_frame(bytes(2000)), 1)
    bench.write("TDT", bench.tail)
    turns = []
    while bench.host.tasks.ready:
        before = len(bench.port.frames)
        bench.host.tasks.run_ready()
        turns.append(len(bench.port.frames) - before)
    assert sum(turns) == 8 * 2000
    assert max(turns) == 2000


@MODES
@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize(
    ("length", "mss"), [(60000, 1448), (14480, 1448), (1449, 1448), (1448, 1448), (900, 7)]
)
def test_a_tcp_burst_goes_to_the_wire_in_one_piece(mapped: bool, v6: bool, length: int, mss: int) -> None:
    bench = Bench(mapped=mapped)
    bench.start()
    payload = bytes(range(251)) * (length // 251 + 1)
    put_burst(bench, tcp_frame(payload[:length], v6=v6), mss, v6=v6)
    bench.ring_bell()
    assert len(bench.port.sent) == 1
    offload = bench.port.sent[0][1]
    assert offload is not None
    assert offload.segmentation is (Segmentation.TCPV6 if v6 else Segmentation.TCPV4)
    header, count = 74 if v6 else 54, -(-length // mss)
    assert len(bench.port.frames) == count
    assert b"".join(frame[header:] for frame in bench.port.frames) == payload[:length]
    for number, frame in enumerate(bench.port.frames):
        last = number == count - 1
        expected = tcp_frame(frame[header:], v6=v6, flags=0x18 if last else 0x10)
        same = bytearray(frame)
        same[header - 16 : header - 12] = expected[header - 16 : header - 12]  # the sequence number differs
        assert len(frame) == len(expected)
        assert same[:14] == expected[:14]
    assert bench.read("TSCTC") == 1
    assert bench.read("GPTC") == count
    octets = sum(len(frame) + 4 for frame in bench.port.frames)
    assert bench.read("GOTCL") | bench.read("GOTCH") << 32 == octets
    sizes = [bench.read(f"PTC{size}") for size in (64, 127, 255, 511, 1023, 1522)]
    limits = (64, 127, 255, 511, 1023, 1 << 20)
    expected_sizes = [0] * 6
    for frame in bench.port.frames:
        expected_sizes[next(i for i, limit in enumerate(limits) if len(frame) + 4 <= limit)] += 1
    assert sizes == expected_sizes


def test_a_vlan_tag_is_inserted_where_the_mode_is_on() -> None:
    bench = Bench()
    bench.start()
    bench.put_data(FRAME, command=IFCS | VLE, upper=0x2005 << 16)
    bench.ring_bell()
    bench.write("CTRL", bench.read("CTRL") | Ctrl.VME)
    bench.put_data(FRAME, sizes=(5, 5), command=IFCS | VLE, upper=0x2005 << 16)
    bench.put_data(FRAME)
    frame = tcp_frame(b"v" * 50)
    bench.put_context(*TCP_CONTEXT_V4, 1 << 24, 0, 0)
    data = without_sums(frame, v6=False, with_length=True)
    bench.put_data(data, command=DATA | IFCS | VLE, upper=7 << 16 | TXSM | IXSM)
    bench.ring_bell()
    tagged = FRAME[:12] + b"\x81\x00\x20\x05" + FRAME[12:]
    assert bench.port.frames == [FRAME, tagged, FRAME, frame[:12] + b"\x81\x00\x00\x07" + frame[12:]]


def test_a_tagged_burst() -> None:
    bench = Bench()
    bench.start()
    bench.write("CTRL", bench.read("CTRL") | Ctrl.VME)
    put_burst(bench, tcp_frame(b"t" * 3000), 1000, tag=0xABC)
    bench.ring_bell()
    assert [frame[12:18] for frame in bench.port.frames] == [b"\x81\x00\x0a\xbc\x08\x00"] * 3
    assert bench.read("GOTCL") == sum(len(frame) + 4 for frame in bench.port.frames)


def test_statistics_by_kind_and_size() -> None:
    bench = Bench()
    bench.start()
    broadcast, multicast = b"\xff" * 6 + FRAME[6:], b"\x01" + FRAME[1:]
    bench.transmit([broadcast, multicast, FRAME, FRAME[:60], FRAME * 12])
    names = ("GPTC", "TPT", "BPTC", "MPTC", "PTC64", "PTC127", "PTC1522", "GOTCL", "TOTL")
    octets = 3 * 104 + 64 + 1204
    assert [bench.read(name) for name in names] == [5, 5, 1, 1, 1, 3, 1, octets, octets]
    assert bench.read("GPTC") == 0
    assert bench.port.counts.sent_bytes + 4 * bench.port.counts.sent_frames == octets


def test_octets_that_come_between_the_two_reads_are_not_lost() -> None:
    bench = Bench()
    bench.start()
    bench.transmit([FRAME])
    low = bench.read("GOTCL")
    bench.transmit([FRAME])
    assert (low, bench.read("GOTCH")) == (104, 0)
    assert (bench.read("GOTCL"), bench.read("GOTCH")) == (104, 0)
    assert (bench.read("GOTCL"), bench.read("GOTCH")) == (0, 0)


def test_octets_beyond_32_bits() -> None:
    bench = Bench()
    counter = bench.device.mac.statistics.octets["GOTC"]
    counter.value = 5 << 32 | 7
    assert (bench.read("GOTCL"), bench.read("GOTCH"), counter.value) == (7, 5, 0)
    counter.value = 3 << 32
    assert (bench.read("GOTCH"), counter.value) == (3, 0)
    bench.device.registers.cell("GPTC").value = 1 << 33
    assert (bench.read("GPTC"), bench.read("GPTC")) == (0xFFFFFFFF, 0)


@pytest.mark.parametrize(
    ("fields", "command", "payload"),
    [
        ((*TCP_CONTEXT_V4, 1 << 24 | 1 << 25 | TSE, 54, 0), DATA | TSE, 3000),  # MSS 0
        (
            (*TCP_CONTEXT_V4, 1 << 24 | 1 << 25 | TSE, 255, 100),
            DATA | TSE,
            10,
        ),  # header longer than the frame
        ((*TCP_CONTEXT_V4, 1 << 25 | TSE, 54, 100), DATA | TSE, 3000),  # UDP
        ((14, 24, 33, 200, 216, 0, 1 << 24 | 1 << 25 | TSE, 54, 100), DATA | TSE, 3000),
        ((14, 24, 33, 34, 30, 0, 1 << 24 | 1 << 25 | TSE, 54, 100), DATA | TSE, 3000),
        ((0, 0, 0, 0, 0, 0, 1 << 24 | TSE, 0, 1), DATA | TSE, 60000),
    ],
)
def test_impossible_bursts_are_dropped_and_counted(
    fields: tuple[int, ...], command: int, payload: int
) -> None:
    bench = Bench()
    bench.start()
    bench.put_context(*fields)
    frame = without_sums(tcp_frame(b"b" * payload), v6=False, with_length=False)
    last = bench.put_data(
        frame, sizes=[10000] * (len(frame) // 10001), command=command | IFCS | RS, upper=TXSM
    )
    bench.transmit([FRAME])
    assert bench.port.frames == [FRAME]
    assert bench.done(last)
    assert (bench.read("TSCTFC"), bench.device.counters()["transmitted_malformed"]) == (1, 1)


def test_empty_and_tiny_and_huge_frames() -> None:
    bench = Bench()
    bench.start()
    bench.put(0, IFCS | RS | 1 << 24)  # an empty frame
    bench.put_data(FRAME[:13])
    for _ in range(5):
        bench.put(TX_DATA, IFCS | 0xFFFF)
    bench.put(TX_DATA, IFCS | RS | 0xFFFF | 1 << 24)
    bench.put(1 << 50, DATA | IFCS | RS | 0xFFFFF | 1 << 24)  # longer than any burst: is not even read
    bench.put_data(FRAME, sizes=(0, 0, 14, 0))
    bench.ring_bell()
    assert bench.port.frames == [FRAME]
    assert bench.read("TDH") == bench.tail


def test_a_packet_without_an_end_waits_for_more() -> None:
    bench = Bench()
    bench.start()
    bench.memory[TX_DATA : TX_DATA + 100] = FRAME
    bench.put(TX_DATA, IFCS | 50)
    bench.ring_bell()
    assert (bench.port.frames, bench.read("TDH")) == ([], 0)
    bench.put(TX_DATA + 50, IFCS | RS | 50 | 1 << 24)
    bench.ring_bell()
    assert (bench.port.frames, bench.read("TDH")) == ([FRAME], 2)


def test_a_packet_of_more_descriptors_than_a_batch() -> None:
    bench = Bench()
    bench.start(tx=512)
    bench.put_data(FRAME * 4, sizes=[1] * 300)
    bench.ring_bell()
    assert bench.port.frames == [FRAME * 4]


def test_a_ring_full_of_pieces_without_an_end_is_given_up() -> None:
    bench = Bench()
    bench.start(tx=128)
    for _ in range(127):
        bench.put(TX_DATA, IFCS | 50)
    bench.ring_bell()
    assert bench.read("TDH") == bench.tail
    assert bench.device.counters()["transmitted_malformed"] == 1
    bench.transmit([FRAME])
    assert bench.port.frames == [FRAME]


@MODES
def test_a_buffer_that_cannot_be_read_loses_its_frame_only(mapped: bool) -> None:
    bench = Bench(mapped=mapped)
    bench.start()
    bench.put_data(FRAME)
    bad = bench.put(1 << 40, 100 | IFCS | RS | 1 << 24)
    bench.put_data(FRAME)
    bench.ring_bell()
    assert bench.port.frames == [FRAME, FRAME]
    assert bench.done(bad)
    assert bench.device.counters()["dma_errors"] > 0


@MODES
def test_a_ring_that_cannot_be_read(mapped: bool) -> None:
    bench = Bench(mapped=mapped)
    bench.start()
    bench.write("TDBAH", 0x100)
    bench.write("TDT", 5)
    bench.run()
    assert (bench.read("TDH"), bench.port.frames) == (0, [])
    bench.write("TDBAH", 0)
    bench.tail = 0
    bench.transmit([FRAME])
    assert bench.port.frames == [FRAME]


def test_without_bus_master_frames_wait() -> None:
    bench = Bench()
    bench.start()
    bench.device.config.write(4, b"\x03\x00")
    bench.transmit([FRAME])
    assert bench.port.frames == []
    bench.device.config.write(4, b"\x07\x00")
    bench.run()
    assert bench.port.frames == [FRAME]


@pytest.mark.parametrize(
    ("length", "head", "tail"), [(0, 0, 5), (128, 8, 3), (128, 0, 8), (128, 0xFFFF, 0xFFFF)]
)
def test_indexes_outside_of_the_ring_do_nothing(length: int, head: int, tail: int) -> None:
    bench = Bench()
    bench.start()
    bench.write("TDLEN", length)
    bench.write("TDH", head)
    bench.write("TDT", tail)
    bench.run()
    assert (bench.port.frames, bench.host.tasks.idle) == ([], True)
    assert bench.host.dma.bytes_read == 0


def test_a_disabled_transmitter_sends_nothing_until_enabled() -> None:
    bench = Bench()
    bench.start()
    bench.write("TCTL", 0)
    bench.transmit([FRAME])
    assert bench.port.frames == []
    bench.write("TCTL", 2)
    bench.run()
    assert bench.port.frames == [FRAME]


@pytest.mark.parametrize("after", range(12))
def test_a_task_cut_at_any_await_loses_and_repeats_nothing(after: int) -> None:
    """In message mode the task is cut after so many answers, as when a client leaves; then it goes on."""
    bench = Bench(mapped=False)
    bench.start(tx=8)
    frames = [FRAME + bytes([number]) for number in range(6)]
    last = [bench.put_data(frame, sizes=(40,) if number == 2 else ()) for number, frame in enumerate(frames)]
    bench.write("TDT", bench.tail)
    bench.host.answer(after)
    bench.host.stop()
    bench.host.tasks.cut()
    bench.host.dma.waiting.clear()  # these answers come too late
    bench.host.resume()
    bench.run()
    assert bench.port.frames == frames
    assert all(bench.done(index) for index in last)
    assert bench.read("ICR") & Cause.TXDW


@pytest.mark.parametrize("after", range(6))
def test_a_reset_in_the_middle_leaves_nothing_behind(after: int) -> None:
    bench = Bench(mapped=False)
    bench.start()
    for _ in range(3):
        bench.put_data(FRAME)
    bench.write("TDT", bench.tail)
    bench.host.answer(after)
    bench.reset_by_window()
    bench.host.dma.waiting.clear()
    bench.run()
    assert not bench.device.mac.transmitter.owed
    assert bench.read("ICR") == 0
    bench.port.frames.clear()
    bench.start()
    bench.transmit([FRAME])
    assert bench.port.frames == [FRAME]


def test_the_ring_is_moved_while_its_descriptors_are_being_read() -> None:
    bench = Bench(mapped=False)
    bench.start()
    bench.put_data(FRAME)
    bench.write("TDT", bench.tail)
    bench.host.run()
    assert len(bench.host.dma.waiting) == 1
    bench.write("TDBAL", TX_RING + 0x1000)
    bench.memory[TX_RING + 0x1000 : TX_RING + 0x1010] = struct.pack(
        "<QII", TX_DATA, 60 | IFCS | RS | 1 << 24, 0
    )
    bench.run()
    assert bench.port.frames == [FRAME[:60]]
    assert not bench.done(0)
    assert bench.memory[TX_RING + 0x100C] & 1


def test_nobody_keeps_a_view_of_guest_memory() -> None:
    bench = Bench()
    bench.start()
    bench.transmit([FRAME])
    put_burst(bench, tcp_frame(b"q" * 5000), 1000)
    bench.put(1 << 40, 100 | IFCS | RS | 1 << 24)
    bench.ring_bell()
    bench.memory.append(0)  # BufferError while a view exists


def test_dext_without_data_type_is_a_context_even_inside_of_a_packet() -> None:
    bench = Bench()
    bench.start()
    bench.memory[TX_DATA : TX_DATA + 100] = FRAME
    bench.put(TX_DATA, DATA | IFCS | 50)
    bench.put_context(*TCP_CONTEXT_V4, DEXT, 0, 0)
    bench.put(TX_DATA + 50, DATA | IFCS | 50 | 1 << 24)
    bench.ring_bell()
    assert bench.port.frames == [FRAME]
